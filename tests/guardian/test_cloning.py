"""A process cloned with one descriptor table: what it opened stays open however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from lockfs.linux import cloning

ROOT = Path(__file__).parents[2]
DEADLINE_S = 20.0
PROGRAM = """
import os, signal, threading
from lockfs.linux import cloning
{}
"""


def output(text: str) -> list[str]:
    """What a program prints; pytest itself may have threads, and so cannot be cloned."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(text)],
        cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_descriptor_outlives_its_opener() -> None:
    """A thread of the clone opens a file and the clone is killed: the file is open here."""
    words = output(
        """
before = set(os.listdir("/proc/self/fd"))
pid, pidfd = cloning.clone_sharing_files()
if pid == 0:
    thread = threading.Thread(target=os.open, args=("/etc/passwd", os.O_RDONLY))
    thread.start()
    thread.join()
    os.kill(os.getpid(), signal.SIGKILL)
assert cloning.await_death(pidfd, 10)
assert os.waitpid(pid, 0)[1] == signal.SIGKILL
os.close(pidfd)
for name in set(os.listdir("/proc/self/fd")) - before:
    print(os.readlink(f"/proc/self/fd/{name}"))
"""
    )
    assert words == ["/etc/passwd"]


def test_clone_is_a_whole_process() -> None:
    """Its thread id is its own where the C library keeps it; a sibling has the same parent."""
    words = output(
        """
parent = os.getpid()
pid, pidfd = cloning.clone_sharing_files()
if pid == 0:
    address = cloning.searched_thread_id_address()
    own = threading.get_native_id() == os.getpid() and os.getppid() == parent
    sibling, _ = cloning.clone_sharing_files(sibling=True)
    if sibling == 0:
        os.write(1, b"%d %d\\n" % (own, os.getppid() == parent))
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(-1, 0)[1]), os.waitstatus_to_exitcode(os.waitpid(-1, 0)[1]))
"""
    )
    assert words == ["1", "1", "7", "7"]


def test_threads_are_refused() -> None:
    """A process with threads is not cloned."""
    words = output(
        """
stop = threading.Event()
thread = threading.Thread(target=stop.wait)
thread.start()
try:
    cloning.await_single_thread(0.01)
except cloning.SeveralThreads:
    print("refused")
stop.set()
thread.join()
cloning.await_single_thread()
print(cloning.threads())
"""
    )
    assert words == ["refused", "1"]


def test_signals_reach_only_the_process_itself() -> None:
    """A pidfd of a process that has ended leads nowhere, whoever has its number."""
    process = subprocess.Popen(["sleep", "60"])
    pidfd = os.pidfd_open(process.pid)
    try:
        assert not cloning.is_dead(pidfd)
        cloning.send(pidfd, signal.SIGKILL)
        assert cloning.await_death(pidfd, DEADLINE_S)
        process.wait()
        assert cloning.is_dead(pidfd)
        cloning.send(pidfd, signal.SIGKILL)
    finally:
        os.close(pidfd)


def test_threads_are_counted() -> None:
    """The count follows threads that start and end; in a process where nobody else's come and go."""
    words = output(
        """
stop = threading.Event()
thread = threading.Thread(target=stop.wait)
print(cloning.threads())
thread.start()
print(cloning.threads())
stop.set()
thread.join()
cloning.await_single_thread()
print(cloning.threads())
"""
    )
    assert words == ["1", "2", "1"]
