"""One binary slot for each inode that the kernel knows: they are many, and their counts change all the time.

Every number is one word, written in one store. A slot counts from the moment its node number, the last word
written, is there; it counts no more from the moment that is 0.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

SLOT_WORDS = 8
INODES_MAX = 1 << 20
INODES_BYTES = INODES_MAX * SLOT_WORDS * 8
_NUMBER, _DESCRIPTOR, _KIND, _DEVICE, _FILE, _GENERATION, _LOOKUPS, _USED = range(SLOT_WORDS)
# _USED, in the first slot only: how many slots were ever used.
_SIGN = 1 << 63


@dataclass(frozen=True)
class InodeSlot:
    """What is remembered of an inode: its node number, its O_PATH descriptor, its type (S_IFMT), st_dev and
    st_ino on the storage, the generation that the kernel was told last, and its lookups."""

    slot: int
    number: int
    descriptor: int
    kind: int
    device: int
    file: int
    generation: int
    lookups: int


class InodeSlots:
    """All inodes of one journal. The caller sees to it that one thread at a time takes or frees slots."""

    def __init__(self, words: memoryview) -> None:
        """`words`: INODES_BYTES as numbers of 8 bytes."""
        self._words = words
        self.watcher: Callable[[int, int, int], None] | None = None
        """Told of each slot that is taken, with its node number and descriptor, or freed, with zeros."""
        self._free: list[int] = []
        self._used = 0

    def add(self, number: int, descriptor: int, kind: int, key: tuple[int, int], generation: int) -> int:
        """Remember an inode without lookups; returns its slot, -1 if there is none left.

        Without a slot an inode works, but is not known after a failover.
        """
        if self._free:
            slot = heapq.heappop(self._free)
        elif self._used < INODES_MAX:
            slot = self._used
            self._used += 1
            self._words[_USED] = self._used
        else:
            return -1
        at = slot * SLOT_WORDS
        words = self._words
        words[at + _DESCRIPTOR] = descriptor
        words[at + _KIND] = kind
        words[at + _DEVICE] = _signed(key[0])
        words[at + _FILE] = _signed(key[1])
        words[at + _GENERATION] = generation
        words[at + _LOOKUPS] = 0
        words[at + _NUMBER] = number
        if self.watcher is not None:
            self.watcher(slot, number, descriptor)
        return slot

    def count(self, slot: int, lookups: int) -> None:
        """Set the lookups."""
        if slot >= 0:
            self._words[slot * SLOT_WORDS + _LOOKUPS] = lookups

    def generation(self, slot: int, generation: int) -> None:
        """Set the generation."""
        if slot >= 0:
            self._words[slot * SLOT_WORDS + _GENERATION] = generation

    def remove(self, slot: int) -> None:
        """Forget an inode."""
        if slot >= 0:
            self._words[slot * SLOT_WORDS + _NUMBER] = 0
            heapq.heappush(self._free, slot)
            if self.watcher is not None:
                self.watcher(slot, 0, 0)

    def reload(self) -> None:
        """Find out anew which slots are free."""
        self._used = self._words[_USED]
        self._free = [slot for slot in range(self._used) if not self._words[slot * SLOT_WORDS + _NUMBER]]

    def all(self) -> list[InodeSlot]:
        """Everything that is remembered."""
        found = []
        for slot in range(self._used):
            at = slot * SLOT_WORDS
            number, descriptor, kind, device, file, generation, lookups = self._words[at : at + _USED]
            if number:
                key = (_unsigned(device), _unsigned(file))
                found.append(InodeSlot(slot, number, descriptor, kind, *key, generation, lookups))
        return found

    def descriptors(self) -> set[int]:
        """The descriptors of all inodes."""
        return {inode.descriptor for inode in self.all() if inode.descriptor >= 0}


def _signed(value: int) -> int:
    return value - (_SIGN << 1) if value >= _SIGN else value


def _unsigned(value: int) -> int:
    return value + (_SIGN << 1) if value < 0 else value
