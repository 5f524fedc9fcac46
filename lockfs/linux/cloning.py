"""Processes that share their descriptor table, and what keeps a process in memory.

`clone_sharing_files` makes a process as glibc's fork(3) does, by the same kernel call, but with CLONE_FILES:
what either opens or closes is open or closed in both, also after one was killed. The memory is a copy.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import select
import signal
import time
from ctypes import c_int, c_long, c_ulong
from pathlib import Path

_SYS_CLONE = {"x86_64": 56, "aarch64": 220, "riscv64": 220}
_CLONE_FILES = 0x400
_CLONE_PIDFD = 0x1000
_CLONE_PARENT = 0x8000
_CLONE_CHILD_CLEARTID = 0x200000
_CLONE_CHILD_SETTID = 0x1000000
_PR_SET_PDEATHSIG, _PR_SET_NAME, _PR_GET_TID_ADDRESS = 1, 15, 40
_MCL_CURRENT, _MCL_ONFAULT = 1, 4
_THREAD_BYTES = 1760
"""Less than glibc's struct pthread has (2304 with glibc 2.36 on x86-64)."""
_THREAD_ID_FROM = 256
THREADS_END_S = 1.0

# The interpreter stays locked in all of these: nothing of Python may run between the two halves of a fork.
_libc = ctypes.PyDLL(None, use_errno=True)
_libc.syscall.restype = c_long
_libc.prctl.argtypes = [c_int, c_ulong, c_ulong, c_ulong, c_ulong]
_before_fork = ctypes.pythonapi.PyOS_BeforeFork
_after_fork_parent = ctypes.pythonapi.PyOS_AfterFork_Parent
_after_fork_child = ctypes.pythonapi.PyOS_AfterFork_Child
for _hook in (_before_fork, _after_fork_parent, _after_fork_child):
    _hook.restype = None


class SeveralThreads(OSError):
    """The process has more than one thread: a copy of it could wait for ever for what another one locked."""


def _failure() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


def threads() -> int:
    """How many threads this process has, found without opening a descriptor.

    The directory /proc/PID/task counts two links and one for each thread (fs/proc/base.c,
    proc_task_getattr).
    """
    return os.stat("/proc/self/task").st_nlink - 2


def await_single_thread(deadline_s: float = THREADS_END_S) -> None:
    """Return once the process has one thread; one that was joined is in the kernel's count a little longer.

    Raises:
        SeveralThreads: it still has more after `deadline_s` seconds.
    """
    end = time.monotonic() + deadline_s
    while (count := threads()) > 1:
        if time.monotonic() > end:
            raise SeveralThreads(f"the process has {count} threads")
        time.sleep(0.0005)


def _thread_id_address() -> int:
    """Where glibc keeps the id of the calling thread, which is the only one.

    The kernel knows the address, for it clears the word when the thread ends; it tells it if it was built
    with CONFIG_CHECKPOINT_RESTORE. If not, the word is searched for.
    """
    address = c_ulong()
    if not _libc.prctl(_PR_GET_TID_ADDRESS, ctypes.addressof(address), 0, 0, 0) and address.value:
        return address.value
    return searched_thread_id_address()


def searched_thread_id_address() -> int:
    """The same, found by its value in glibc's struct pthread.

    Raises:
        OSError: ENOSYS, it is not there once: this C library is not known.
    """
    _libc.pthread_self.restype = c_ulong
    start, tid = int(_libc.pthread_self()), os.getpid()
    words = (c_int * ((_THREAD_BYTES - _THREAD_ID_FROM) // 4)).from_address(start + _THREAD_ID_FROM)
    found = [index for index, word in enumerate(words) if word == tid]
    if platform.libc_ver()[0] != "glibc" or not found:
        raise OSError(38, "the C library does not show where it keeps a thread's id")
    return start + _THREAD_ID_FROM + 4 * found[0]


def clone_sharing_files(*, sibling: bool = False) -> tuple[int, int]:
    """A new process with this one's descriptor table: its id and a pidfd of it; (0, -1) in the new process.

    The pidfd, which is closed on exec, is open before the process runs, so that its id cannot mean another.
    `sibling`: the new process is a child of this one's parent (CLONE_PARENT). In the new process, leave by
    os._exit alone, and let no object that closes a descriptor when it is collected exist in both.

    Raises:
        SeveralThreads: this process has threads.
        OSError: EAGAIN or ENOMEM, no more processes; ENOSYS, the machine is unknown here.
    """
    number = _SYS_CLONE.get(os.uname().machine)
    if number is None:
        raise OSError(38, f"the clone system call number of {os.uname().machine} is not known to lockfs")
    await_single_thread()
    tid = _thread_id_address()
    pidfd = c_int(-1)
    flags = _CLONE_FILES | _CLONE_PIDFD | _CLONE_CHILD_CLEARTID | _CLONE_CHILD_SETTID | signal.SIGCHLD
    if sibling:
        flags |= _CLONE_PARENT
    tail = (c_ulong(tid), c_ulong(0)) if os.uname().machine == "x86_64" else (c_ulong(0), c_ulong(tid))
    arguments = (c_long(number), c_ulong(flags), c_ulong(0), ctypes.byref(pidfd), *tail)
    _before_fork()
    pid = int(_libc.syscall(*arguments))
    if pid == 0:
        _after_fork_child()
        return 0, -1
    failure = _failure() if pid < 0 else None
    _after_fork_parent()
    if failure is not None:
        raise failure
    return pid, pidfd.value


def is_dead(pidfd: int) -> bool:
    """Whether a process has ended, with all its threads (pidfd_open(2)); instant."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(0))


def await_death(pidfd: int, deadline_s: float) -> bool:
    """Wait until a process has ended; False if it has not within `deadline_s` seconds."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(max(0.0, deadline_s) * 1000))


def send(pidfd: int, number: int) -> None:
    """Send a signal to exactly this process; one that has ended is nothing to complain of."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, number)


def die_with_parent(number: int) -> None:
    """Have the kernel send this process a signal when its parent ends (PR_SET_PDEATHSIG); 0: none."""
    _libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)


def set_name(name: str) -> None:
    """The name that ps(1) shows of this process, up to 15 bytes (prctl(2), PR_SET_NAME)."""
    text = ctypes.create_string_buffer(name.encode()[:15])
    _libc.prctl(_PR_SET_NAME, ctypes.addressof(text), 0, 0, 0)


def stay_in_memory() -> bool:
    """Never page out what this process has in memory (mlockall(2)); whether that was allowed.

    With MCL_ONFAULT, for without it everything that is mapped would be filled, shared memory without a page
    in it included.
    """
    return not _libc.mlockall(_MCL_CURRENT | _MCL_ONFAULT)


def oom_adjustment() -> int:
    """How likely this process is to be killed when memory runs out (proc(5), oom_score_adj)."""
    try:
        return int(Path("/proc/self/oom_score_adj").read_text(encoding="ascii"))
    except OSError:
        return 0


def set_oom_adjustment(pid: int, value: int) -> None:
    """Set it, from -1000 (never) to 1000; to lower it takes CAP_SYS_RESOURCE, without which it stays."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/oom_score_adj", "w", encoding="ascii") as file:
        file.write(str(value))
