"""Running before the other programs of the machine, for as long as others wait for this process.

By niceness (setpriority(2)), which each thread has its own of and which new threads and processes inherit.

Not by a real-time policy. The kernel has loops that wait for another task without sleeping (as
shrink_dcache_parent in fs/dcache.c, where processes die and /proc is read), and a real-time task in one keeps
that other task from running for as long as the kernel lets it, about a second.
"""

from __future__ import annotations

import contextlib
import os

ORDINARY, URGENT = -10, -20
"""The niceness of lockfs's processes, and of those that are waited for."""
_LOOKS_MAX = 5


def be_ordinary() -> None:
    """Give the calling thread, and all that it starts, at least the ordinary priority of lockfs's processes.

    It takes CAP_SYS_NICE, without which nothing changes.
    """
    if os.getpriority(os.PRIO_PROCESS, 0) > ORDINARY:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, ORDINARY)


def begin() -> None:
    """Let the calling thread, and all that it starts, be urgent, if that is allowed; see `be_ordinary`."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, URGENT)


def end() -> None:
    """Let the calling thread be urgent no more."""
    _end(0)


def end_everywhere() -> None:
    """The same for every thread of this process; looks again, for one may just have started another."""
    for _ in range(_LOOKS_MAX):
        urgent = [thread for thread in map(int, os.listdir("/proc/self/task")) if is_urgent(thread)]
        if not urgent:
            return
        for thread in urgent:
            _end(thread)


def is_urgent(thread: int) -> bool:
    """Whether a thread, of any process, is urgent; False also if it is gone."""
    with contextlib.suppress(OSError):
        return os.getpriority(os.PRIO_PROCESS, thread) == URGENT
    return False


def _end(thread: int) -> None:
    if is_urgent(thread):
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, ORDINARY)
