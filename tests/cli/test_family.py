"""The mount outlives its processes: whoever is killed, a request through the kernel is answered."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lockfs.linux import calls

from .conftest import DEADLINE_S, ROOT, Stub, until


def answers(stub: Stub) -> None:
    """Fail unless the mount answers."""
    assert os.statvfs(stub.point).f_blocks == 100


@pytest.mark.parametrize("background", [True, False])
def test_killed_worker(stub: Stub, background: bool) -> None:
    """The next one answers, and the log says what happened."""
    if background:
        assert stub.run().returncode == 0
    else:
        stub.start()
    for turn in (2, 3):
        worker = stub.named("lockfs-worker")
        os.kill(worker, signal.SIGKILL)
        answers(stub)
        until(lambda worker=worker: stub.named("lockfs-worker") != worker, "another worker")
        text = f"was killed by SIGKILL: process {stub.named('lockfs-worker')} takes over (turn {turn})"
        stub.logs(text)
    calls.umount(str(stub.point))
    until(lambda: not stub.servers(), "everybody has ended")


def test_killed_guardian(stub: Stub) -> None:
    """The twin goes on; umount and SIGTERM to it end the mount as ever."""
    process = stub.start()
    twin = stub.named("lockfs-twin")
    process.kill()
    until(lambda: stub.named("lockfs") == twin, "the twin is guardian")
    answers(stub)
    os.kill(twin, signal.SIGTERM)
    until(lambda: not stub.is_mounted(), "unmounted")
    until(lambda: not stub.servers(), "everybody has ended")
    stub.logs("is unmounted")


def test_killed_guardian_and_worker(stub: Stub) -> None:
    """The twin replaces the worker as well."""
    assert stub.run().returncode == 0
    guardian, worker = stub.named("lockfs"), stub.named("lockfs-worker")
    for pid in (guardian, worker):
        os.kill(pid, signal.SIGSTOP)
    for pid in (guardian, worker):
        os.kill(pid, signal.SIGKILL)
    answers(stub)
    until(lambda: not {guardian, worker} & set(stub.family()), "they are replaced")
    answers(stub)


@pytest.mark.parametrize("background", [True, False])
def test_upgrade(stub: Stub, background: bool) -> None:
    """SIGHUP: the program as it is installed goes on, with the options of the old one."""
    if background:
        assert stub.run().returncode == 0
    else:
        stub.start()
    guardian, worker = stub.named("lockfs"), stub.named("lockfs-worker")
    os.kill(guardian, signal.SIGHUP)
    stub.logs("was replaced by a new version")
    answers(stub)
    until(lambda: len(stub.servers()) == 4 and worker not in stub.servers(), "all are there")
    assert stub.named("lockfs") == guardian
    assert b"--resume" in Path(f"/proc/{guardian}/cmdline").read_bytes()
    os.kill(stub.named("lockfs-worker"), signal.SIGKILL)
    answers(stub)
    os.kill(guardian, signal.SIGTERM)
    until(lambda: not stub.servers(), "everybody has ended")
    assert not stub.is_mounted()


def test_terminal_signal_unmounts_once(stub: Stub) -> None:
    """A service manager signals everybody: one unmount, and nothing in the log of another."""
    process = stub.start()
    for pid in stub.family():
        os.kill(pid, signal.SIGTERM)
    assert process.wait(DEADLINE_S) == 0
    assert "could not be unmounted" not in stub.log.read_text()


def test_guardian_imports_little(stub: Stub) -> None:
    """What serves is not imported by the process that guards, also after it has mounted and ended."""
    program = (
        "import sys; from lockfs.cli import main, options; "
        "code = main.run(options.parse(sys.argv[1:])); "
        "print(sorted({'trio', 'pyfuse3', 'ssl', 'hashlib'} & set(sys.modules)), code)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, "-f", str(stub.source), str(stub.point)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    stub.running.append(process)
    guardian, twin = stub.named("lockfs"), stub.named("lockfs-twin")
    for pid in (guardian, twin):
        status = Path(f"/proc/{pid}/status").read_text()
        assert int(status.split("VmRSS:")[1].split()[0]) < 20 * 1024
    calls.umount(str(stub.point))
    assert process.stdout is not None
    assert process.stdout.read() == "[] 0\n"
