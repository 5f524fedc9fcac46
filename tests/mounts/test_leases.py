"""Two mounts of one store, as two hosts: the second writer is refused, and told by whom."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.mounts import Mount, TwoMounts, mounted, start, two_mounts

PATIENCE_S = 15.0
HOLD = (
    "import os, sys\n"
    "os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)\n"
    "print('open', flush=True)\n"
    "sys.stdin.read()\n"
)


class Holder:
    """Another process that holds an image open for writing."""

    def __init__(self, path: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "open\n"

    def end(self) -> None:
        """Close the image and end."""
        self.process.communicate("", PATIENCE_S)


@pytest.fixture
def image(hosts: TwoMounts) -> str:
    """An image in the store."""
    (hosts.store / "disk.img").write_bytes(bytes(1 << 20))
    return "disk.img"


def refused(path: Path, flags: int = os.O_RDWR) -> bool:
    """Whether an open is refused with EBUSY; other errors propagate."""
    try:
        os.close(os.open(path, flags))
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return True
    return False


def opens_soon(path: Path) -> None:
    """Open for writing, allowing for the asynchronous release of another."""
    end = time.monotonic() + PATIENCE_S
    while refused(path):
        assert time.monotonic() < end


def ctl(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run lockfsctl."""
    command = [sys.executable, "-m", "lockfs.cli.ctl", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_second_host_is_refused_by_name(hosts: TwoMounts, image: str) -> None:
    """While one host writes, the other is refused; log, lockfsctl and xattrs name host, program and pid."""
    with open(hosts.a.path / image, "r+b"):
        assert refused(hosts.b.path / image)
        hosts.b.logs(f"(pid {os.getpid()}) on hostA")
        who = json.loads(ctl("who", "--json", str(hosts.b.path / image)).stdout)
        assert str(os.getpid()) in json.dumps(who) and "hostA" in json.dumps(who)
        assert b"hostA" in os.getxattr(hosts.b.path / image, "user.lockfs.host")
        assert not refused(hosts.b.path / image, os.O_RDONLY)
    opens_soon(hosts.b.path / image)


def test_both_ways(hosts: TwoMounts, image: str) -> None:
    """After the second host had it, the first is refused in turn."""
    with open(hosts.b.path / image, "r+b"):
        assert refused(hosts.a.path / image)
    opens_soon(hosts.a.path / image)


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR | os.O_CREAT, os.O_RDONLY | os.O_TRUNC])
def test_every_kind_of_writing_open_counts(hosts: TwoMounts, image: str, flags: int) -> None:
    """Write-only, creating and truncating opens need the lease, and change nothing without it."""
    with open(hosts.a.path / image, "r+b"):
        assert refused(hosts.b.path / image, flags)
        assert (hosts.store / image).stat().st_size == 1 << 20


def test_destruction_is_refused(hosts: TwoMounts, image: str) -> None:
    """Truncate, unlink, and rename over an image that another host holds fail with EBUSY and do nothing."""
    (hosts.store / "other").write_bytes(b"other")
    with open(hosts.a.path / image, "r+b"):
        for change in (
            lambda: os.truncate(hosts.b.path / image, 0),
            lambda: os.unlink(hosts.b.path / image),
            lambda: os.rename(hosts.b.path / "other", hosts.b.path / image),
        ):
            with pytest.raises(OSError) as caught:
                change()
            assert caught.value.errno == errno.EBUSY
    assert (hosts.store / image).stat().st_size == 1 << 20


def test_hard_links_share_the_lease(hosts: TwoMounts, image: str) -> None:
    """Two names of one file never give two leases, not even after a rename."""
    os.link(hosts.store / image, hosts.store / "alias")
    with open(hosts.a.path / image, "r+b"):
        assert refused(hosts.b.path / "alias")
        (hosts.a.path / image).rename(hosts.a.path / "moved")
        assert refused(hosts.b.path / "moved")
        (hosts.b.path / "fresh").write_bytes(b"no lease in the way")


def test_one_writing_process_on_a_host(hosts: TwoMounts, image: str) -> None:
    """Another process of the same host is refused; the same process, and a fork of it, is not."""
    holder = Holder(hosts.a.path / image)
    assert refused(hosts.a.path / image)
    holder.end()
    opens_soon(hosts.a.path / image)
    with open(hosts.a.path / image, "r+b"), open(hosts.a.path / image, "r+b"):
        child = subprocess.run(
            [sys.executable, "-c", "import os, sys; os.open(sys.argv[1], os.O_RDWR)", hosts.a.path / image],
            capture_output=True,
            check=False,
        )
        assert child.returncode != 0


def test_inherited_descriptor_belongs_to_the_writer(hosts: TwoMounts, image: str) -> None:
    """A process that inherited a writable descriptor may open the image again, as qemu-nbd --fork does."""
    script = (
        "import os, sys\n"
        "f = os.open(sys.argv[1], os.O_RDWR)\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    os._exit(0 if os.open(sys.argv[1], os.O_RDWR) > 0 else 1)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, hosts.a.path / image], check=False)
    assert done.returncode == 0


def test_lease_outlives_the_process_with_the_handle(hosts: TwoMounts, image: str) -> None:
    """The lease goes with the last handle, not with the process that opened it."""
    script = (
        "import os, sys, time\n"
        "f = os.open(sys.argv[1], os.O_RDWR)\n"
        "r, w = os.pipe()\n"
        "if os.fork() == 0:\n"
        "    print(os.getpid(), flush=True); sys.stdin.read(); os._exit(0)\n"
        "os._exit(0)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, hosts.a.path / image],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    assert parent.stdout.readline()
    parent.wait(PATIENCE_S)
    assert refused(hosts.b.path / image)
    parent.communicate("", PATIENCE_S)
    opens_soon(hosts.b.path / image)


def test_killed_holder_frees_the_image(hosts: TwoMounts, image: str) -> None:
    """SIGKILL of the holder is a close like any other."""
    holder = Holder(hosts.a.path / image)
    holder.process.kill()
    holder.process.communicate()
    opens_soon(hosts.b.path / image)


def test_local_host_lets_processes_write_together(tmp_path: Path) -> None:
    """With local=host a second process of the host may write; another host still may not."""
    with two_mounts(tmp_path, "wait=0.2,local=host") as hosts:
        (hosts.store / "disk").write_bytes(bytes(4096))
        holder = Holder(hosts.a.path / "disk")
        assert not refused(hosts.a.path / "disk")
        assert refused(hosts.b.path / "disk")
        holder.end()


def test_shared_readers_keep_writers_out(tmp_path: Path) -> None:
    """With readers=shared, readers of both hosts go together, a reader and a writer do not."""
    with two_mounts(tmp_path, "wait=0.2,readers=shared") as hosts:
        (hosts.store / "disk").write_bytes(bytes(4096))
        with open(hosts.a.path / "disk", "rb"), open(hosts.b.path / "disk", "rb"):
            assert refused(hosts.b.path / "disk")
        opens_soon(hosts.b.path / "disk")
        with open(hosts.a.path / "disk", "r+b"):
            assert refused(hosts.b.path / "disk", os.O_RDONLY)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_waiting_open_is_interrupted(tmp_path: Path, number: signal.Signals) -> None:
    """A signal ends an open that waits for an image, long before its wait is over; nothing is left taken."""
    with two_mounts(tmp_path, "wait=600") as hosts:
        (hosts.store / "disk").write_bytes(bytes(4096))
        holder = Holder(hosts.a.path / "disk")
        waiter = subprocess.Popen(
            # A program that was started in the background ignores SIGINT, and so do those that it starts.
            [sys.executable, "-c",
             "import os, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
             "print(flush=True); os.open(sys.argv[1], os.O_RDWR)",
             hosts.b.path / "disk"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert waiter.stdout is not None
        waiter.stdout.readline()
        end = time.monotonic() + PATIENCE_S
        while '"waiting"' not in json.dumps(json.loads(ctl("who", "--json", str(hosts.b.path)).stdout)):
            assert time.monotonic() < end
        waiter.send_signal(number)
        waiter.communicate(timeout=PATIENCE_S)
        holder.end()
        opens_soon(hosts.a.path / "disk")


def test_other_signals_do_not_end_a_wait(tmp_path: Path) -> None:
    """A caught SIGCHLD or SIGUSR1 leaves a waiting open waiting, and it gets the image in the end."""
    script = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGUSR1, lambda *_: None)\n"
        "signal.signal(signal.SIGCHLD, lambda *_: None)\n"
        "print('armed', flush=True)\n"
        "libc = __import__('ctypes').CDLL(None, use_errno=True)\n"
        "sys.exit(0 if libc.open(os.fsencode(sys.argv[1]), os.O_RDWR) >= 0 else 1)\n"
    )
    with two_mounts(tmp_path, "wait=60") as hosts:
        (hosts.store / "disk").write_bytes(bytes(4096))
        holder = Holder(hosts.a.path / "disk")
        waiter = subprocess.Popen(
            [sys.executable, "-c", script, hosts.b.path / "disk"], stdout=subprocess.PIPE
        )
        assert waiter.stdout is not None
        waiter.stdout.readline()
        for number in (signal.SIGUSR1, signal.SIGCHLD) * 5:
            time.sleep(0.05)
            waiter.send_signal(number)
        assert waiter.poll() is None
        holder.end()
        waiter.communicate(timeout=PATIENCE_S)
        assert waiter.returncode == 0


def test_waiting_open_gets_the_image(tmp_path: Path) -> None:
    """An open that waits succeeds as soon as the other host lets go."""
    with two_mounts(tmp_path, "wait=60") as hosts:
        (hosts.store / "disk").write_bytes(bytes(4096))
        holder = Holder(hosts.a.path / "disk")
        waiter = subprocess.Popen([sys.executable, "-c", "import os, sys; os.open(sys.argv[1], os.O_RDWR)",
                                   hosts.b.path / "disk"])  # fmt: skip
        with pytest.raises(subprocess.TimeoutExpired):
            waiter.wait(1)
        holder.end()
        assert waiter.wait(PATIENCE_S) == 0


def test_mount_over_itself(tmp_path: Path) -> None:
    """SOURCE may be MOUNTPOINT: the store works through the mount and cannot be reached around it."""
    (tmp_path / "disk").write_bytes(b"below")
    store = tmp_path / "over"
    store.mkdir()
    (store / "disk").write_bytes(b"itself")
    with mounted(store, store, f"log={tmp_path}/log") as made:
        assert (store / "disk").read_bytes() == b"itself"
        (store / "new").write_bytes(b"x")
        assert sorted(os.listdir(store)) == ["disk", "new"]
        assert isinstance(made, Mount)
    assert (store / "new").read_bytes() == b"x"


def test_killed_server_leaves_a_dead_mount_not_an_open_door(tmp_path: Path) -> None:
    """After SIGKILL of the server the mount point answers ENOTCONN, and can be mounted again."""
    store, point = tmp_path / "store", tmp_path / "mount"
    store.mkdir()
    point.mkdir()
    (store / "disk").write_bytes(bytes(4096))
    made = start(store, point)
    made.kill()
    with pytest.raises(OSError) as caught:
        os.listdir(point)
    assert caught.value.errno == errno.ENOTCONN
    subprocess.run(["umount", point], check=True)
    with mounted(store, point):
        assert os.listdir(point) == ["disk"]
