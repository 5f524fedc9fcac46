"""A lease that file locks are, and how it is known that the storage still knows the locks.

Locks of a local file system are this kernel's own affair. A server gives those of a client that was silent
to others, and refuses nothing of what the client then writes: so it is asked again and again, and nothing is
written unless it was seen lately to know the locks.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, field

from lockfs.backends import bound, image_locks
from lockfs.backends.base import Lease, Mode
from lockfs.backends.storecheck import mount_entries
from lockfs.backends.virtlockd import LockFile
from lockfs.linux import nfs
from lockfs.paxos.seams import Clock, WallClock
from lockfs.storage.clock import BootClock, hardware_clock

COUNTS_MAX_S = 15.0
"""For how long a look counts at most, seconds: after that writes wait for the next one."""
LEASE_PART = 2
"""A look counts for this part of the time for which an NFS server keeps the locks of a silent client."""
PER_LOOK = 3
"""So many looks are made in the time for which one counts."""
STOOD_S = 1.0
"""A machine that stood still together with its clocks for longer has not looked."""

_log = logging.getLogger("lockfs.backends.fcntl")


@dataclass(frozen=True)
class Look:
    """When the storage was asked, by the host's clock, and by how much the hardware's was ahead then."""

    at: float
    ahead: float


class Looks:
    """How the storage is asked, and how long its answer counts. Shared by threads."""

    def __init__(
        self, clock: Clock, hardware: WallClock | None, lease_s: float | None = None, *, binds: bool = False
    ) -> None:
        """`lease_s`: the server's lease time, if that is known. Servers wait 90 s by default. `binds`: it
        refuses what is done through descriptions whose locks it dropped (see bound).
        """
        self.binds = binds
        self._clock = clock
        self._hardware = hardware
        self.counts_s = COUNTS_MAX_S if lease_s is None else min(COUNTS_MAX_S, lease_s / LEASE_PART)
        self.every_s = self.counts_s / PER_LOOK

    @classmethod
    def at_store(cls, store_fd: int) -> Looks:
        """As the server of a store allows, by this machine's clocks. Asks no server."""
        entries = mount_entries(store_fd)
        stated = (nfs.lease_time(entry.source) for entry in entries)
        lease_s = next((each for each in stated if each is not None), None)
        return cls(BootClock(), hardware_clock(), lease_s, binds=any(e.fstype == nfs.TYPE for e in entries))

    def now(self) -> Look:
        """The look of somebody who is about to ask."""
        return Look(self._clock.now(), self._ahead())

    def counts(self, look: Look) -> bool:
        """Whether a write may still be started on it."""
        if self._clock.now() - look.at >= self.counts_s:
            return False
        return self._hardware is None or self._ahead() - look.ahead <= STOOD_S + self._hardware.late

    def _ahead(self) -> float:
        return self._hardware.now() - self._clock.now() if self._hardware is not None else 0.0


@dataclass
class FcntlLease(Lease):
    """A lease held by locks on its image's descriptor and, in indirect mode, on a lock file.

    `device` is the image's st_dev. `mutex` is held by threads that change or probe the locks; `ended` is set
    under it when they are given up. `looks` is None where the locks are this kernel's own affair; else
    `checked` is the last look that showed the locks.
    """

    device: int = 0
    looks: Looks | None = None
    checked: Look | None = None
    lock_file: LockFile | None = None
    mutex: threading.Lock = field(default_factory=threading.Lock)
    ended: bool = False

    def __post_init__(self) -> None:
        """Made by whoever is about to take the locks, or has just found them: that is a look."""
        if self.looks is not None:
            self.checked = self.looks.now()

    def in_time(self) -> bool:
        """Whether the locks were seen lately; see Lease.in_time. A machine that was frozen has not looked."""
        return self.looks is None or (self.checked is not None and self.looks.counts(self.checked))

    def saw_locks(self, look: Look | None) -> bool:
        """Take in a look that has shown the locks; whether anybody may have met the one before run out.

        That is asked only now: whoever looks later finds the new one, and whoever met the old one run out did
        so by now.
        """
        former, self.checked = self.checked, look
        return self.looks is not None and former is not None and not self.looks.counts(former)


def still_ours(looks: Looks | None, descriptor: int, mode: Mode) -> bool:
    """Whether the storage still takes the locks on a description for ours; blocks. One that cannot be read
    through is asked about by its lock on NFS 4 too.

    Raises:
        OSError: one of image_locks.LOST if it knows that they are lost; others if it did not say.
    """
    if looks is not None and looks.binds and bound.can_ask(descriptor):
        bound.ask(descriptor)
        return True
    return image_locks.still_ours(descriptor, mode)


@dataclass
class Probed:
    """What asking the storage has shown. `lost`: whose locks are gone, and why. `shown_again`: whose last
    look had run out before this one, so that somebody may have been told to wait for it.
    """

    lost: list[tuple[FcntlLease, str]] = field(default_factory=list)
    shown_again: list[FcntlLease] = field(default_factory=list)


def probe_all(leases: list[FcntlLease]) -> Probed:
    """Ask the storage whether it still knows the locks; worker thread."""
    found = Probed()
    for lease in leases:
        with lease.mutex:
            if lease.ended:
                continue
            now = lease.looks.now() if lease.looks is not None else None
            try:
                if not still_ours(lease.looks, lease.image.descriptor, lease.mode):
                    found.lost.append((lease, "somebody else has locked the image"))
                elif lease.saw_locks(now):
                    found.shown_again.append(lease)
            except OSError as error:
                if error.errno in image_locks.LOST:
                    found.lost.append((lease, error.strerror or str(error)))
                else:
                    _log.warning("%s: its locks cannot be checked: %s", lease.image.name, error.strerror)
    return found
