"""Ending what is left of a family that a service manager brings back: two must never serve one mount.

Its places in the journal are not enough to find it by: while they are read, one that is left may go from one
place to another, or fill one with a new process. All of them have the journal open under the same number.
"""

from __future__ import annotations

import contextlib
import os
import signal

from lockfs.errors import LockfsError
from lockfs.guardian.words import KILL_LIMIT_S
from lockfs.journal.memory import SharedMemory
from lockfs.linux import cloning, dying

PLACES = ("guardian", "twin", "worker", "spare")
PASSES_MAX = 64
"""A process that is killed may have made another one just before, but not that often."""
_CLEAN_PASSES = 2


class StillAlive(LockfsError):
    """A process of the former family could not be ended: two families must not serve one mount."""


def end_family(memory: SharedMemory, number: int) -> None:
    """Kill who has the journal open as descriptor `number`, until nobody does, and see them dead.

    Raises:
        StillAlive: a process does not end, or there are ever more.
    """
    journal = os.fstat(memory.descriptor)
    clean = 0
    for _ in range(PASSES_MAX):
        placed = [getattr(memory.header, f"{place}_pid") for place in PLACES]
        others = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
        found = False
        for pid in dict.fromkeys([*placed, *others]):
            if pid and pid != os.getpid():
                found |= _end(pid, number, journal, pid in placed)
        clean = 0 if found else clean + 1
        if clean == _CLEAN_PASSES:
            return
    raise StillAlive("Processes of this mount that are killed start others again and again.")


def _end(pid: int, number: int, journal: os.stat_result, placed: bool) -> bool:
    """Kill a process if it is of the family, and see it dead; whether it was alive.

    Raises:
        StillAlive: it is of the family, and cannot be killed or does not end.
    """
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
        if not _is_of(pid, number, journal, placed):
            return False
        pidfd = os.pidfd_open(pid)
        try:
            # Only now does the pid stand for the process that is looked at.
            if cloning.is_dead(pidfd) or not _is_of(pid, number, journal, placed):
                return False
            cloning.send(pidfd, signal.SIGKILL)
            if cloning.await_death(pidfd, KILL_LIMIT_S):
                return True
        except PermissionError:
            pass  # told as one that does not end: what may not be killed is served by somebody else
        finally:
            os.close(pidfd)
        raise StillAlive(f"Process {pid} of this mount cannot be ended.")
    return False


def _is_of(pid: int, number: int, journal: os.stat_result, placed: bool) -> bool:
    """Whether a process has the journal open and is a lockfs: the service manager's store has the journal
    too, under whatever number. Only the first guardian is without the name, until the mount is served; it has
    a place.

    One that is dying shows no descriptors, but may still write: the worker, which has a place for as long as
    that counts.
    """
    if not (placed or _is_lockfs(pid)):
        return False
    try:
        status = os.stat(f"/proc/{pid}/fd/{number}")
    except (FileNotFoundError, PermissionError):  # or it is another user's
        return placed and _is_lockfs(pid) and dying.is_done(f"/proc/{pid}/task/{pid}")
    return (status.st_dev, status.st_ino) == (journal.st_dev, journal.st_ino)


def _is_lockfs(pid: int) -> bool:
    with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as name:
        return name.read().startswith("lockfs")
