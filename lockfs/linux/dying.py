"""What the threads of a process that was killed still do.

A process is dead once its last thread is, and a thread in an uninterruptible system call dies when that
returns. From the moment at which SIGKILL is pending for a thread it never runs its program again: it finishes
the system call that it is in, and ends. A process that is being killed makes no new threads (copy_process in
kernel/fork.c gives up under the lock under which the signal was spread).

A thread that exits gives back its memory, which may take long, and the references to open files that its
last call held. The descriptor table is left as it is, for others have it too. (Asynchronous I/O of
io_submit(2) ends only with the memory; lockfs has none.)
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

_PIDFD_THREAD = os.O_EXCL
_STATE, _FLAGS = 0, 6
"""Fields of /proc/PID/stat, counted from the one after the name."""
_PF_EXITING = 0x4
"""Set in the second step of do_exit (kernel/exit.c); io_uring's work is cancelled before."""
_SIGKILL_BIT = 1 << (signal.SIGKILL - 1)
_GENERIC = {
    "fsync": 82, "fdatasync": 83, "sync_file_range": 84, "syncfs": 267,
    "pread64": 67, "preadv": 69, "preadv2": 286, "fstat": 80, "newfstatat": 79, "statx": 291,
}  # fmt: skip
_X86_64 = {
    "fsync": 74, "fdatasync": 75, "sync_file_range": 277, "syncfs": 306,
    "pread64": 17, "preadv": 295, "preadv2": 327, "fstat": 5, "newfstatat": 262, "statx": 332,
}  # fmt: skip
_HARMLESS = {
    "x86_64": frozenset(_X86_64.values()),
    "aarch64": frozenset(_GENERIC.values()),
    "riscv64": frozenset(_GENERIC.values()),
}
"""Calls after whose beginning nobody finds anything changed that was not due anyhow: they read into the dying
process's own memory, or write out what was written before. open and close are none: they change the
descriptor table, which others share."""


def open_thread(tid: int) -> int:
    """A pidfd of one thread, readable once that thread has ended whatever the others do (closed on exec).

    Not to be used of a process's first thread, whose end is told with that of the last.

    Raises:
        OSError: EINVAL, the kernel is older than Linux 6.9.
    """
    return os.pidfd_open(tid, _PIDFD_THREAD)


def changes_nothing(pid: int) -> bool:
    """Whether all that is left of a process that is being killed are threads that change nothing any more.

    False also where that cannot be told: a thread ended meanwhile, or runs, or the kernel does not tell (it
    takes CAP_SYS_PTRACE or the right to trace), or the machine is unknown here. To be called only after a
    thread has died of the kill. Opens descriptors; takes some ten microseconds a thread.
    """
    try:
        tasks = f"/proc/{pid}/task"
        before = _threads(tasks)
        tids = os.listdir(tasks)
        # A listing ends early if the thread at which it stands ends. None is made any more, so with equal
        # counts before and after nobody ended, and whoever is not on the list would be missing in its length.
        return all(is_done(f"{tasks}/{tid}") for tid in tids) and before == len(tids) == _threads(tasks)
    except (OSError, ValueError, IndexError):
        return False


def _threads(tasks: str) -> int:
    """How many threads the kernel counts (fs/proc/base.c, proc_task_getattr)."""
    return os.stat(tasks).st_nlink - 2


def is_done(task: str) -> bool:
    """Whether a thread, given by its directory /proc/PID/task/TID, has ended, or is exiting, or is being
    killed and in a harmless call that is its last.

    Raises:
        OSError: it is not there any more, or may not be looked at.
        ValueError, IndexError: the kernel's files are not as proc(5) has them.
    """
    stat = _text(f"{task}/stat").rsplit(")", 1)[1].split()
    if stat[_STATE] in ("Z", "X") or int(stat[_FLAGS]) & _PF_EXITING:
        return True
    status = _text(f"{task}/status")
    pending = status[status.index("\nSigPnd:") :].split(None, 2)[1]
    if not int(pending, 16) & _SIGKILL_BIT:  # asked before its call is
        return False
    call = _text(f"{task}/syscall").split()[0]
    return call != "running" and int(call) in _HARMLESS.get(os.uname().machine, frozenset())


def _text(path: str) -> str:
    return Path(path).read_text(encoding="utf-8", errors="replace")


def exit_status(pid: int) -> int | None:
    """How a process that is being killed ends, as os.waitstatus_to_exitcode has it; None: not told (yet).

    The last field of /proc/PID/stat (proc(5), exit_code), 0 for whoever may not trace the process.
    """
    try:
        status = int(_text(f"/proc/{pid}/stat").split()[-1])
    except (OSError, ValueError, IndexError):
        return None
    return os.waitstatus_to_exitcode(status) if status else None
