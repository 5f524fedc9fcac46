"""All processes of a mount are killed at once, and the service manager's store brings it back."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.support import write_loop
from tests.support.manager import managed, service_manager
from tests.support.mounts import mounted, needs_mount

pytestmark = needs_mount


def _writer(path: Path, stop: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, write_loop.__file__, str(path), str(stop)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"open\n"
    return process


def _ended(process: subprocess.Popen[bytes], stop: Path) -> int:
    stop.touch()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return int(output)


@pytest.mark.parametrize("io", ["daemon", "auto"])
def test_a_write_loop_sees_a_pause_and_no_error(tmp_path: Path, io: str) -> None:
    store, words = tmp_path / "store", f"backend=nop,io={io}"
    with service_manager(tmp_path) as manager, managed(manager, store, tmp_path / "m", words) as m:
        (m.path / "image").write_bytes(bytes(512))
        writer = _writer(m.path / "image", tmp_path / "stop")
        for _ in range(3):
            manager.again(m, words)
        count = _ended(writer, tmp_path / "stop")
        assert b"%08d" % (count - 1) in (store / "image").read_bytes()


def test_what_was_open_goes_on(tmp_path: Path) -> None:
    """A file created through the mount, whose handle and backing are one description; one without a name;
    a directory that is being read; a directory that is somewhere to start from.
    """
    store = tmp_path / "store"
    with service_manager(tmp_path) as manager, managed(manager, store, tmp_path / "m", "backend=nop") as m:
        (m.path / "deep").mkdir()
        for number in range(20):
            (m.path / "deep" / str(number)).touch()
        created = os.open(m.path / "created", os.O_CREAT | os.O_RDWR)
        nameless = os.open(m.path / "nameless", os.O_CREAT | os.O_RDWR)
        os.unlink(m.path / "nameless")
        here = os.open(m.path / "deep", os.O_PATH)
        with os.scandir(m.path / "deep") as entries:
            next(entries)
            os.pwrite(created, b"before", 0)
            os.pwrite(nameless, b"before", 0)
            manager.again(m, "backend=nop")
            assert len(list(entries)) == 19
        assert os.pread(created, 6, 0) == os.pread(nameless, 6, 0) == b"before"
        os.pwrite(created, b"after!", 0)
        os.pwrite(nameless, b"after!", 0)
        assert (store / "created").read_bytes() == b"after!" == os.pread(nameless, 6, 0)
        os.close(os.open("7", os.O_RDONLY, dir_fd=here))
        for descriptor in (created, nameless, here):
            os.close(descriptor)
        manager.await_true(lambda: len(manager.leads_to("/created")) <= 1, "the end of what was closed")


def test_locks_survive(tmp_path: Path) -> None:
    """Another host tries all the time, and never gets what is held."""
    store = tmp_path / "store"
    store.mkdir()
    (store / "image").write_bytes(bytes(512))
    mine, theirs = "backend=fcntl,host=hostA,wait=0", "backend=fcntl,host=hostB,wait=0"
    done, got = threading.Event(), []

    def attempt() -> None:
        while not done.is_set() and not got:
            try:
                got.append(os.open(tmp_path / "b" / "image", os.O_RDWR))
            except OSError:
                continue

    with (
        service_manager(tmp_path) as manager,
        mounted(store, tmp_path / "b", theirs),
        managed(manager, store, tmp_path / "m", mine) as m,
    ):
        writer = _writer(m.path / "image", tmp_path / "stop")
        rival = threading.Thread(target=attempt)
        rival.start()
        try:
            for _ in range(2):
                manager.again(m, mine)
                assert not got
            _ended(writer, tmp_path / "stop")
            rival.join(30)
            assert got, "the lock outlives its last holder"
        finally:
            done.set()
            rival.join()
            for descriptor in got:
                os.close(descriptor)


def test_paxos_leases_survive(tmp_path: Path) -> None:
    store = tmp_path / "store"
    words = f"backend=paxos,io_timeout=5,state_dir={tmp_path}/state,host=hostA"
    with service_manager(tmp_path) as manager, managed(manager, store, tmp_path / "m", words) as m:
        (m.path / "image").write_bytes(bytes(512))
        writer = _writer(m.path / "image", tmp_path / "stop")
        manager.again(m, words)
        assert _ended(writer, tmp_path / "stop") > 0
        assert "lost" not in m.log()


def test_an_orderly_end_leaves_nothing(tmp_path: Path) -> None:
    store = tmp_path / "store"
    with service_manager(tmp_path) as manager:
        with managed(manager, store, tmp_path / "m", "backend=nop") as m:
            (m.path / "image").write_bytes(bytes(512))
            manager.again(m, "backend=nop")
            assert manager.leads_to("/dev/fuse")
        manager.await_said("STOPPING=1")
        manager.await_true(lambda: not manager.store, "an empty store")


def test_the_store_follows_a_killed_worker(tmp_path: Path) -> None:
    """What its successor opens is kept as well."""
    store = tmp_path / "store"
    with service_manager(tmp_path) as manager, managed(manager, store, tmp_path / "m", "backend=nop") as m:
        m.wait_ready()
        first = os.open(m.path / "first", os.O_CREAT | os.O_RDWR)
        m.kill("lockfs-worker")
        second = os.open(m.path / "second", os.O_CREAT | os.O_RDWR)
        os.close(first)
        manager.await_true(lambda: manager.leads_to("/second"), "what was opened")
        manager.again(m, "backend=nop")
        assert os.pwrite(second, b"after", 0) == 5
        os.close(second)


_HOLDER = """
import os, sys
descriptors = [os.open(path, os.O_CREAT | os.O_RDWR) for path in sys.argv[1:]]
print("open", flush=True)
sys.stdin.readline()
for descriptor in descriptors:
    try:
        print(os.pwrite(descriptor, b"after", 0), flush=True)
    except OSError as error:
        print(-error.errno, flush=True)
"""


def test_what_was_sent_too_late_fails_alone(tmp_path: Path) -> None:
    """Another process has the files open: a copy in the one that starts lockfs would wait at its close."""
    store, words = tmp_path / "store", "backend=nop,io=daemon"
    with service_manager(tmp_path) as manager, managed(manager, store, tmp_path / "m", words) as m:
        command = [sys.executable, "-c", _HOLDER, str(m.path / "kept"), str(m.path / "late")]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
            assert holder.stdout is not None and holder.stdout.readline() == b"open\n"
            manager.await_true(lambda: manager.leads_to("/late") and manager.leads_to("/kept"), "both")
            m.wait_ready()
            m.kill()
            manager.hear_all()
            manager.lose(*manager.leads_to("/late"))
            m.process = manager.start(store, m.path, words).process
            manager.await_said("READY=1", 2)
            output, _ = holder.communicate(b"go\n", timeout=60)
        assert output.split()[0] == b"5"
        assert -int(output.split()[1]) in (errno.EBADF, errno.EIO)
        assert (store / "late").read_bytes() == b""
        assert "takes over (turn 3)" not in m.log()


def test_a_journal_of_another_version_is_refused(tmp_path: Path) -> None:
    store = tmp_path / "store"
    with service_manager(tmp_path) as manager, managed(manager, store, tmp_path / "m", "backend=nop") as m:
        m.wait_ready()
        m.kill()
        (name,) = manager.leads_to("lockfs-journal (deleted)")
        (journal,) = [stored.descriptor for stored in manager.store if stored.name == name]
        magic = os.pread(journal, 8, 0)
        os.pwrite(journal, b"\x7f" + magic[1:], 0)
        assert manager.start(store, m.path, "backend=nop").process.wait(30) != 0
        m.logs("no journal of this version")
        os.pwrite(journal, magic, 0)
        m.process = manager.start(store, m.path, "backend=nop").process
        manager.await_said("READY=1", 2)
