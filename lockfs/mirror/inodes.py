"""The files that the kernel knows, each with a descriptor of its own.

An inode is found by what it is on the storage, (st_dev, st_ino), so that hard links are one inode, and by
its node number, under which the kernel names it. Its O_PATH descriptor follows it through renames and
keeps it when it is unlinked. Inodes come and go on the trio thread only.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import pyfuse3

from lockfs.backends.base import Forgetful, Memory
from lockfs.journal.inodes import InodeSlot

if TYPE_CHECKING:
    from lockfs.mirror.backings import Backing

SYNTHETIC_FIRST = 1 << 62
"""Node numbers from here up stand for files whose own number is taken or of another device."""

TURN_NUMBERS = 1 << 40
"""How many of them each worker of a mount has to itself."""

Key = tuple[int, int]


class Slots(Protocol):
    """Where inodes are remembered for the next worker; see journal.inodes.InodeSlots."""

    def add(self, number: int, descriptor: int, kind: int, key: Key, generation: int) -> int: ...
    def count(self, slot: int, lookups: int) -> None: ...
    def generation(self, slot: int, generation: int) -> None: ...
    def remove(self, slot: int) -> None: ...
    def all(self) -> list[InodeSlot]: ...


class NoSlots:
    """Remembers nothing."""

    def add(self, number: int, descriptor: int, kind: int, key: Key, generation: int) -> int:
        """See Slots."""
        return -1

    def count(self, slot: int, lookups: int) -> None:
        """See Slots."""

    def generation(self, slot: int, generation: int) -> None:
        """See Slots."""

    def remove(self, slot: int) -> None:
        """See Slots."""

    def all(self) -> list[InodeSlot]:
        """See Slots."""
        return []


@dataclass(frozen=True)
class Found:
    """A file that a name led to: a fresh O_PATH descriptor, its status, and whether the inode that the
    table knows under the same key turned out to be a file that is gone from the server (ESTALE)."""

    descriptor: int
    status: os.stat_result
    stale: bool = False

    @property
    def key(self) -> Key:
        """What the file is on the storage."""
        return (self.status.st_dev, self.status.st_ino)


@dataclass(eq=False, slots=True)
class Inode:
    """A file that the kernel knows.

    `lookups` is how many times it was told to the kernel and not yet forgotten. `generation` tells apart
    files that had the same number one after another. `backing` is there while the file is open. `retired`
    are descriptors of earlier generations, closed together with the current one. `slot`: where the next
    worker finds it.
    """

    number: int
    descriptor: int
    key: Key
    kind: int
    lookups: int = 0
    generation: int = 0
    backing: Backing | None = None
    forgotten: bool = False
    retired: list[int] = field(default_factory=list)
    slot: int = -1

    @property
    def path(self) -> str:
        """A path that leads to the file itself, also when it has no name or is a symbolic link."""
        return f"/proc/self/fd/{self.descriptor}"

    @property
    def regular(self) -> bool:
        """Whether it is a regular file: an image."""
        return self.kind == stat.S_IFREG

    def take_descriptors(self) -> list[int]:
        """The descriptors to close now that the inode is not needed any more."""
        descriptors = [*self.retired, self.descriptor]
        self.retired, self.descriptor = [], -1
        return descriptors


class InodeTable:
    """All inodes that the kernel knows, and the root.

    A former worker may have counted a lookup whose answer never arrived: what it knew and the kernel gave up,
    but not wholly, is `doubtful`, with the lookups that are left.

    Only the trio thread adds and forgets inodes; `_counting` makes that and the counts of one piece for those
    threads that count lookups of inodes that are known.
    """

    def __init__(
        self, root: int, slots: Slots | None = None, memory: Memory | None = None, turn: int = 0
    ) -> None:
        """`root` is an O_PATH descriptor of the store's root directory; the table owns it from here on.

        `slots` and `memory` tell what a former worker knew; `turn`: how many there were.
        """
        status = os.fstat(root)
        self.device = status.st_dev
        self._slots = slots or NoSlots()
        self._memory = memory or Forgetful()
        self._by_number: dict[int, Inode] = {}
        self._by_key: dict[Key, Inode] = {}
        self._synthetic = SYNTHETIC_FIRST + turn * TURN_NUMBERS
        self._counting = threading.Lock()
        self._recalled: set[Inode] = set()
        self.doubtful: dict[Inode, int] = {}
        for slot in self._slots.all():
            self._recall(slot)
        found = self._by_number.get(pyfuse3.ROOT_INODE)
        if found is None:
            key = (status.st_dev, status.st_ino)
            found = self._enter(Inode(pyfuse3.ROOT_INODE, root, key, stat.S_IFDIR))
            self._set_lookups(found, 1)
        else:
            os.close(root)
        self.root = found

    def _recall(self, slot: InodeSlot) -> None:
        """Know an inode that the kernel had from a former worker."""
        if slot.number in self._by_number:
            # Its slot was taken a moment before another one's was freed.
            self._slots.remove(slot.slot)
            return
        inode = Inode(
            slot.number,
            slot.descriptor,
            (slot.device, slot.file),
            slot.kind,
            slot.lookups,
            slot.generation,
            slot=slot.slot,
        )
        known = self._memory.get(_retired_key(slot.number))
        if isinstance(known, dict):
            inode.retired = list(known["fds"])
        self._by_number[inode.number] = self._by_key[inode.key] = inode
        self._recalled.add(inode)

    def _enter(self, inode: Inode) -> Inode:
        inode.slot = self._slots.add(inode.number, inode.descriptor, inode.kind, inode.key, inode.generation)
        self._by_number[inode.number] = self._by_key[inode.key] = inode
        return inode

    def _set_lookups(self, inode: Inode, lookups: int) -> None:
        inode.lookups = lookups
        self._slots.count(inode.slot, lookups)

    def __len__(self) -> int:
        return len(self._by_number)

    @property
    def lookups(self) -> int:
        """The sum of all lookup counts, the root's own not counted."""
        return sum(inode.lookups for inode in self._by_number.values()) - 1

    def get(self, number: int) -> Inode:
        """The inode of a node number.

        Raises:
            OSError: ESTALE if there is none.
        """
        try:
            return self._by_number[number]
        except KeyError:
            raise OSError(errno.ESTALE, f"there is no inode {number}") from None

    def known(self, number: int) -> Inode | None:
        """The inode of a node number, if there is one. Any thread may ask."""
        return self._by_number.get(number)

    def find(self, key: Key) -> Inode | None:
        """The inode of a file on the storage, if it is known. Any thread may ask."""
        return self._by_key.get(key)

    def adopt(self, found: Found) -> Inode:
        """The inode of a file that was found, with one more lookup; the table owns `found.descriptor`."""
        inode = self._by_key.get(found.key)
        if inode is None:
            number = self._number_for(found.key)
            inode = self._enter(Inode(number, found.descriptor, found.key, stat.S_IFMT(found.status.st_mode)))
        elif found.stale or inode.kind != stat.S_IFMT(found.status.st_mode):
            self._succeed(inode, found)
        else:
            os.close(found.descriptor)
        with self._counting:
            self._set_lookups(inode, inode.lookups + 1)
        return inode

    def _succeed(self, inode: Inode, found: Found) -> None:
        """Another file with a number used before: the kernel tells them apart by the generation."""
        inode.retired.append(inode.descriptor)
        inode.descriptor, inode.kind = found.descriptor, stat.S_IFMT(found.status.st_mode)
        inode.generation += 1
        inode.backing = None
        self._memory.set(_retired_key(inode.number), {"fds": inode.retired})
        former = inode.slot
        self._enter(inode)
        self._slots.count(inode.slot, inode.lookups)
        self._slots.remove(former)

    def bump(self, inode: Inode) -> None:
        """Give an inode another generation."""
        inode.generation += 1
        self._slots.generation(inode.slot, inode.generation)

    def count(self, inode: Inode) -> None:
        """Count one more lookup of an inode that is known."""
        with self._counting:
            self._set_lookups(inode, inode.lookups + 1)

    def count_again(self, status: os.stat_result) -> Inode | None:
        """Count one more lookup of a file that is known as just what `status` says; None if it is not.

        Any thread may call it, but only where no number is used again for another file while it is known.
        """
        with self._counting:
            inode = self._by_key.get((status.st_dev, status.st_ino))
            if inode is None or inode.kind != stat.S_IFMT(status.st_mode):
                return None
            self._set_lookups(inode, inode.lookups + 1)
        return inode

    def _number_for(self, key: Key) -> int:
        device, number = key
        usable = pyfuse3.ROOT_INODE < number < SYNTHETIC_FIRST
        if device == self.device and usable and number not in self._by_number:
            return number
        self._synthetic += 1
        return self._synthetic

    def forget(self, number: int, count: int) -> list[int]:
        """Take back `count` lookups; returns descriptors to close, of an inode that nobody knows any more.

        A number that is not in the table was never told to the kernel; forgetting it is harmless. The
        descriptor of an inode that is still open is left to the end of its backing.
        """
        inode = self._by_number.get(number)
        if inode is None:
            return []
        with self._counting:
            self._set_lookups(inode, inode.lookups - count)
            if inode.lookups > 0 or inode is self.root:
                if inode in self._recalled:
                    self.doubtful[inode] = inode.lookups
                return []
            del self._by_number[number]
            del self._by_key[inode.key]
        inode.forgotten = True
        self._recalled.discard(inode)
        self._slots.remove(inode.slot)
        if inode.retired:
            self._memory.remove(_retired_key(number))
        return [] if inode.backing is not None else inode.take_descriptors()

    def all(self) -> list[Inode]:
        """A copy of all inodes."""
        return list(self._by_number.values())

    def clear(self) -> list[int]:
        """Forget everything, the root too; returns all descriptors to close."""
        for inode in self._by_number.values():
            self._slots.remove(inode.slot)
        descriptors = [fd for inode in self._by_number.values() for fd in inode.take_descriptors()]
        self._by_number.clear()
        self._by_key.clear()
        return descriptors


def _retired_key(number: int) -> str:
    return f"retired:{number}"
