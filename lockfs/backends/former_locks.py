"""Locks that a former worker of this mount took: found again, or given back.

The image's descriptor is not kept open by its note: whoever opened it remembers it, or the sweep of the next
worker has closed it and so has dropped its locks. Its number may have become another file's meanwhile, so it
is used only if it still leads to the inode of the note.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from dataclasses import dataclass, field

import trio

from lockfs.backends import image_locks
from lockfs.backends.base import Image, Mode
from lockfs.backends.file_lease import Looks, still_ours
from lockfs.backends.owners import OwnerRecords
from lockfs.backends.remembered import Ledger, Note, Stage
from lockfs.backends.virtlockd import LockDirectory, LockFile
from lockfs.errors import BackendError

SETTLE_THREADS = 8

_log = logging.getLogger(__name__)


@dataclass
class _Former:
    note: Note
    turn: trio.Lock = field(default_factory=trio.Lock)


@dataclass(frozen=True)
class Found:
    """Locks that are still held, in which mode, on an image of which st_dev."""

    mode: Mode
    device: int
    lock_file: LockFile | None


class FormerLocks:
    """What a former worker's notes speak of, until it is found again or given back."""

    def __init__(
        self,
        ledger: Ledger,
        parties: image_locks.Parties,
        records: OwnerRecords,
        lock_files: LockDirectory | None,
        looks: Looks | None,
    ) -> None:
        self._ledger = ledger
        self._parties = parties
        self._records = records
        self._lock_files = lock_files
        self._looks = looks
        self._left = {inode: _Former(note) for inode, note in ledger.notes().items()}
        self._limiter = trio.CapacityLimiter(SETTLE_THREADS)

    async def find_again(self, image: Image) -> Found | None:
        """The locks of an image, if they were held and the storage still takes them for ours; else None.

        Raises:
            BackendError: the storage did not say.
        """
        former = self._left.get(image.inode)
        if former is None:
            return None
        found = await trio.to_thread.run_sync(self._find_again, former.note, image, limiter=self._limiter)
        if found is not None:
            del self._left[image.inode]
        return found

    async def settle(self, inode: int) -> None:
        """Give back what there is of one inode."""
        former = self._left.get(inode)
        if former is None:
            return
        async with former.turn:
            if inode in self._left:
                await trio.to_thread.run_sync(self._give_back, inode, former.note, limiter=self._limiter)
                del self._left[inode]

    async def settle_all(self) -> None:
        """Give back everything, several at a time."""
        async with trio.open_nursery() as nursery:
            for inode in list(self._left):
                nursery.start_soon(self.settle, inode)

    # On worker threads

    def _find_again(self, note: Note, image: Image) -> Found | None:
        found = None
        try:
            found = self._still_there(note, image)
        except OSError as error:
            if error.errno not in (*image_locks.LOST, errno.EAGAIN):
                reason = error.strerror or str(error)
                raise BackendError(f"The locks of {image.name} could not be looked at: {reason}.") from error
        if found is None and note.in_hand:
            _log.error("%s: the locks that a former worker had on it are lost", image.name)
        return found

    def _still_there(self, note: Note, image: Image) -> Found | None:
        """What a conversion had begun is made SHARED, which it was at every moment."""
        if not note.in_hand or not _leads_to(note, image.inode, image.descriptor):
            return None
        lock_file = self._lock_file(note)
        if self._lock_files is not None and lock_file is None:
            return None
        mode = note.mode if note.stage is Stage.HELD else Mode.SHARED
        if note.stage is Stage.CONVERTING:
            image_locks.narrow(image.descriptor, self._parties)
        ours = still_ours(self._looks, image.descriptor, mode)
        if ours and (lock_file is None or lock_file.convert(mode)):
            return Found(mode, note.number("device") or 0, lock_file)
        return None

    def _lock_file(self, note: Note) -> LockFile | None:
        name = note.text("file")
        if self._lock_files is None or name is None or not note.descriptors:
            return None
        return self._lock_files.locked(name.encode(), note.descriptors[0])

    def _give_back(self, inode: int, note: Note) -> None:
        """Drop whatever the note may speak of, each part also if another fails."""
        self._records.remove(inode, Mode.SHARED)
        descriptor = note.number("image")
        for step in (self._remove_record, self._give_back_lock_file):
            try:
                step(inode, note)
            except OSError as error:
                _log.error("inode %d: what a former worker had locked: %s", inode, error.strerror)
        if descriptor is not None and _leads_to(note, inode, descriptor):
            try:
                image_locks.drop(descriptor)
            except OSError as error:
                _log.error("inode %d could not be unlocked: %s", inode, error.strerror)
        self._ledger.forget(inode)

    def _remove_record(self, inode: int, note: Note) -> None:
        """An EXCLUSIVE holder's record is ours to remove only under the lock: others' have the same name."""
        descriptor = note.number("image")
        if descriptor is None or not _leads_to(note, inode, descriptor):
            return
        writable = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
        if writable and image_locks.still_ours(descriptor, Mode.EXCLUSIVE):
            self._records.remove(inode, Mode.EXCLUSIVE)

    def _give_back_lock_file(self, inode: int, note: Note) -> None:
        lock_file, name = self._lock_file(note), note.text("file")
        if self._lock_files is None or name is None:
            return
        if lock_file is None:
            self._lock_files.clean(name.encode())
            return
        facts = {key: fact for key, fact in note.facts.items() if key != "fd"}
        self._lock_files.give_back_former(
            lock_file, lambda: self._ledger.note(inode, Stage.ENDING, note.mode, **facts)
        )


def _leads_to(note: Note, inode: int, descriptor: int) -> bool:
    """Whether the descriptor is the one of the note, and open on the note's file."""
    if descriptor != note.number("image"):
        return False
    try:
        status = os.fstat(descriptor)
    except OSError:
        return False
    return (status.st_dev, status.st_ino) == (note.number("device"), inode)
