"""Which host id a mount takes where the administrator gave none, and that it takes the same next time.

Ids that were used lie as files in a directory of this machine, one directory for each lockspace; a mount
keeps its file locked (flock(2)), so that two mounts of one machine never share an id. Nothing here decides
who owns an id: that does the lockspace. Methods block and belong on worker threads.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
from random import Random

_log = logging.getLogger(__name__)

CHOICE = 16
"""A new id is chosen at random among so many free ones, so that hosts that start together seldom collide."""


class HostIds:
    """This machine's ids in one lockspace."""

    def __init__(self, state_dir: str, area: str, lockspace: bytes) -> None:
        """`area` is the lease area's name on this machine."""
        key = hashlib.sha256(os.fsencode(area) + b"\0" + lockspace).hexdigest()[:16]
        self._directory = os.path.join(state_dir, "host-ids", key)
        self._held: dict[int, int] = {}
        self._warned = False

    def candidates(self, free: list[int], random: Random) -> list[int]:
        """The free ids in the order in which to try them: kept ones first, then chance.

        If none is free, the kept ones: an id that this machine did not leave, because it crashed or lost the
        storage, comes back to nobody but who waits it out.
        """
        kept = self._kept()
        low = [host_id for host_id in free if host_id not in kept][:CHOICE]
        random.shuffle(low)
        return [host_id for host_id in kept if host_id in free] + low or kept

    def _kept(self) -> list[int]:
        try:
            names = os.listdir(self._directory)
        except OSError:
            return []
        return sorted(int(name) for name in names if name.isdecimal() and len(name) <= 4)

    def hold(self, host_id: int) -> bool:
        """Keep the id for this mount; False if another mount of this machine has it."""
        path = os.path.join(self._directory, str(host_id))
        try:
            os.makedirs(self._directory, mode=0o700, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            self._warn(error)
            return True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        except OSError as error:
            self._warn(error)
        self._held[host_id] = descriptor
        return True

    def descriptor(self, host_id: int) -> int | None:
        """What keeps the id's file locked, None if nothing does."""
        return self._held.get(host_id)

    def adopt(self, host_id: int, descriptor: int) -> None:
        """Go on with an id whose file a former process of this mount keeps locked."""
        self._held[host_id] = descriptor

    def let_go(self, host_id: int, *, keep: bool) -> None:
        """End the holding; with `keep` the id is tried first the next time."""
        descriptor = self._held.pop(host_id, -1)
        if descriptor < 0:
            return
        if not keep:
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(self._directory, str(host_id)))
        os.close(descriptor)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            _log.warning("The host id cannot be kept in %s: %s.", self._directory, error.strerror)
