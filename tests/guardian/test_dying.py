"""A worker whose thread sits in a call to a file that does not answer is killed: who waits for the call."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lockfs.linux import cloning, dying
from tests.guardian.conftest import DEADLINE_S, ROOT, Family

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount")


class Slow:
    """A mounted SlowFile."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.mountpoint = directory / "mount"
        self.file = self.mountpoint / "file"
        self.mountpoint.mkdir(parents=True)
        command = [sys.executable, "-m", "tests.guardian.slow_file", str(self.mountpoint), str(directory)]
        with open(directory / "output", "wb") as output:
            self._process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
        end = time.monotonic() + DEADLINE_S
        while not os.path.ismount(self.mountpoint):
            if time.monotonic() > end or self._process.poll() is not None:
                pytest.fail((directory / "output").read_text())
            time.sleep(0.01)

    def begun(self) -> list[str]:
        """The calls that have begun."""
        path = self._directory / "begun"
        return path.read_text().split() if path.exists() else []

    def go(self) -> None:
        """Answer them."""
        (self._directory / "go").touch()

    def close(self) -> None:
        """End it."""
        self.go()
        self._process.terminate()
        try:
            self._process.wait(DEADLINE_S)
        finally:
            self._process.kill()
            self._process.wait()
            if os.path.ismount(self.mountpoint):
                subprocess.run(["umount", "-l", str(self.mountpoint)], check=True, timeout=DEADLINE_S)


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[Slow]:
    """A file that does not answer."""
    made = Slow(tmp_path / "slow")
    yield made
    made.close()


def start_stuck(family: Family, slow: Slow, *calls: str) -> int:
    """Start a family whose first workers each have a thread in one of `calls`; the first worker."""
    stuck = {str(turn): {"call": call, "path": str(slow.file)} for turn, call in enumerate(calls, 1)}
    family.start(stuck=stuck)
    family.until(lambda: calls[0] in slow.begun(), "the call has begun")
    return family.pids()["worker"]


def threads_alive(pid: int) -> int:
    """How many threads of a process have not ended; 0 also if there is no such process."""
    count = 0
    for status in Path(f"/proc/{pid}/task").glob("*/stat"):
        try:
            count += status.read_text().rsplit(")", 1)[1].split()[0] not in ("Z", "X")
        except OSError:
            continue
    return count


def replace_twin(family: Family) -> None:
    """See the guardian go through its whole loop."""
    twin = family.pids()["twin"]
    os.kill(twin, signal.SIGKILL)
    family.until(lambda: family.pids()["twin"] not in (0, twin), "a new twin")


@pytest.mark.parametrize("call", ["fsync", "fdatasync", "pread"])
def test_harmless_call_is_not_waited_for(family: Family, slow: Slow, call: str) -> None:
    """The next worker serves while the last one's thread is still in its call, and that is reaped at last."""
    worker = start_stuck(family, slow, call)
    os.kill(worker, signal.SIGKILL)
    second = family.turns(2)
    assert threads_alive(worker) == 1
    assert family.of("turn")[1]["died"] == "was killed by SIGKILL"
    assert family.words.lingering() == [worker, 0, 0, 0]
    family.complete(worker)
    slow.go()
    family.until(lambda: not Path(f"/proc/{worker}").exists(), "reaped")
    family.until(lambda: not any(family.words.lingering()), "forgotten")
    assert family.pids()["worker"] == second["pid"]
    family.end()


@pytest.mark.parametrize("call", ["pwrite", "ftruncate"])
def test_call_that_changes_something_is_waited_for(family: Family, slow: Slow, call: str) -> None:
    """Nobody takes over before it has ended."""
    worker = start_stuck(family, slow, call)
    os.kill(worker, signal.SIGKILL)
    family.until(lambda: threads_alive(worker) == 1, "only the thread in the call is left")
    for _ in range(3):
        replace_twin(family)
    assert threads_alive(worker) == 1
    assert (family.header.turns, family.pids()["worker"]) == (1, worker)
    slow.go()
    family.turns(2)
    family.end()


def test_guardian_dies_while_a_worker_lingers(family: Family, slow: Slow) -> None:
    """The twin forgets the worker, which is nobody's child that it could reap, and replaces the next one."""
    first = start_stuck(family, slow, "fsync", "pread")
    os.kill(first, signal.SIGKILL)
    family.turns(2)
    pids = family.complete(first)
    family.until(lambda: "pread" in slow.begun(), "the second call has begun")
    os.kill(pids["guardian"], signal.SIGKILL)
    family.complete(pids["guardian"])
    family.until(lambda: not any(family.words.lingering()), "forgotten")
    os.kill(pids["worker"], signal.SIGKILL)
    family.turns(3)
    assert (threads_alive(first), threads_alive(pids["worker"])) == (1, 1)
    slow.go()
    family.end()


def test_worker_that_hangs_in_a_call(family: Family, slow: Slow) -> None:
    """One that the guardian kills itself is not waited for either."""
    worker = start_stuck(family, slow, "fsync")
    os.kill(worker, signal.SIGSTOP)
    family.turns(2)
    assert threads_alive(worker) == 1
    assert family.of("turn")[1]["died"] == "did not answer and was killed"
    slow.go()
    family.end()


def test_so_many_linger_at_most(family: Family, slow: Slow) -> None:
    """Once every place is taken, a worker's whole death is waited for."""
    worker = start_stuck(family, slow, *["pread"] * 5)
    for turn in range(1, 5):
        family.turns(turn)
        family.until(lambda turn=turn: len(slow.begun()) == turn, "the call has begun")  # type: ignore[misc]
        worker = family.complete(worker if turn > 1 else 0)["worker"]
        os.kill(worker, signal.SIGKILL)
        family.turns(turn + 1)
    assert all(family.words.lingering())
    family.until(lambda: len(slow.begun()) == 5, "the last call has begun")
    last = family.complete(worker)["worker"]
    os.kill(last, signal.SIGKILL)
    family.until(lambda: threads_alive(last) == 1, "only the thread in the call is left")
    for _ in range(3):
        replace_twin(family)
    assert family.header.turns == 5
    slow.go()
    family.turns(6)
    family.end()


_EXITING, _KILLED = 0x404044, "100"
_X86 = {"fsync": "74", "pread64": "17", "pwrite64": "18", "openat": "257", "close": "3", "none": "-1"}
_OTHER = {"fsync": "82", "pread64": "67", "pwrite64": "68", "openat": "56", "close": "57", "none": "-1"}


@pytest.mark.parametrize(
    ("state", "flags", "pending", "call", "done"),
    [
        ("Z", 0x404040, "0", "none", True),
        ("R", _EXITING, "0", "running", True),
        ("D", _EXITING, "0", "pwrite64", True),
        ("D", 0x404040, _KILLED, "fsync", True),
        ("D", 0x404040, _KILLED, "pread64", True),
        ("D", 0x404040, "0", "fsync", False),
        ("D", 0x404040, "4100", "fsync", True),
        ("D", 0x404040, "4000", "fsync", False),
        ("D", 0x404040, _KILLED, "pwrite64", False),
        ("D", 0x404040, _KILLED, "openat", False),
        ("D", 0x404040, _KILLED, "close", False),
        ("D", 0x404040, _KILLED, "none", False),
        ("R", 0x404040, _KILLED, "running", False),
    ],
)
def test_thread_is_done(tmp_path: Path, state: str, flags: int, pending: str, call: str, done: bool) -> None:
    """What /proc says of a thread."""
    numbers = _X86 if os.uname().machine == "x86_64" else _OTHER
    (tmp_path / "stat").write_text(f"12 (a ) Z b) {state} 1 12 12 0 -1 {flags} 0 0 0\n")
    (tmp_path / "status").write_text(
        f"Name:\ta\nState:\t{state}\nSigPnd:\t{pending:0>16}\nShdPnd:\t{_KILLED}\n"
    )
    (tmp_path / "syscall").write_text(f"{numbers.get(call, call)} 0x1 0x2 0x3\n")
    assert dying.is_done(str(tmp_path)) is done


def test_living_process_changes_something(slow: Slow) -> None:
    """A thread in a harmless call that is not being killed goes on after it."""
    code = f"import os; f = os.open({str(slow.file)!r}, os.O_RDWR); os.fsync(f)"
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        end = time.monotonic() + DEADLINE_S
        while "fsync" not in slow.begun() and time.monotonic() < end:
            time.sleep(0.005)
        assert slow.begun() == ["fsync"]
        assert not dying.changes_nothing(process.pid)
        process.kill()
        while not dying.changes_nothing(process.pid) and time.monotonic() < end:
            time.sleep(0.005)
        assert dying.changes_nothing(process.pid)
        pidfd = os.pidfd_open(process.pid)
        try:
            assert not cloning.is_dead(pidfd)
            slow.go()
            assert cloning.await_death(pidfd, DEADLINE_S)
        finally:
            os.close(pidfd)
        assert dying.exit_status(process.pid) == -signal.SIGKILL
    finally:
        slow.go()
        process.wait(DEADLINE_S)
