"""The shared memory and its parts.

    one page           the header: words of 8 bytes, each written in one store
    INODES * 64 bytes  inodes.py: one binary slot for each inode that the kernel knows
    NUMBERS * 8 bytes  serials.py: what a service manager keeps of each descriptor
    the rest           facts.py: JSON values by key

The memfd is sparse: only what was written to takes memory.
"""

from __future__ import annotations

import mmap
import os
from typing import Final

from lockfs.errors import LockfsError
from lockfs.journal.facts import FACTS_BYTES, Facts, named_in
from lockfs.journal.inodes import INODES_BYTES, InodeSlots
from lockfs.journal.serials import SERIALS_BYTES, Serials

HEADER_BYTES = 4096
MAGIC: Final = 0x6C6F636B66730003
"""'lockfs' and the version of the layout: a program that does not know it starts afresh."""
TOTAL_BYTES = HEADER_BYTES + INODES_BYTES + SERIALS_BYTES + FACTS_BYTES


class JournalError(LockfsError):
    """The shared memory is of another layout, or is not one of lockfs."""


def _word(index: int, meaning: str) -> property:
    def read(header: Header) -> int:
        return header.words[index]

    def write(header: Header, value: int) -> None:
        header.words[index] = value

    return property(read, write, doc=meaning)


class Header:
    """Numbers that any process of the family may read at any moment; who writes which is said at each."""

    def __init__(self, words: memoryview) -> None:
        self.words = words

    magic = _word(0, "MAGIC.")
    heartbeat_ns = _word(1, "When the worker's event loop last turned, CLOCK_MONOTONIC; the worker's.")
    guardian_pid = _word(2, "The guardian's.")
    twin_pid = _word(3, "The guardian's.")
    worker_pid = _word(4, "The guardian's.")
    spare_pid = _word(5, "The guardian's.")
    turns = _word(6, "How many workers have begun to serve; the guardian's.")
    served = _word(7, "1 once requests were answered; the worker's.")
    upgrade = _word(8, "1: the next worker is to be of the program as it is installed by then; the worker's.")
    backing_max = _word(9, "The greatest backing id that the kernel gave; the worker's.")
    # Words from FREE_FIRST on belong to lockfs.guardian.
    FREE_FIRST = 64


class SharedMemory:
    """One mount's journal. The descriptor is closed on exec unless somebody makes it inheritable."""

    NAME: Final = "lockfs-journal"
    """Under this name /proc shows it."""

    def __init__(self, descriptor: int) -> None:
        """Use `create` or `attach`."""
        self.descriptor = descriptor
        self._map = mmap.mmap(descriptor, TOTAL_BYTES)
        whole = memoryview(self._map)
        words = whole.cast("q")
        first, second = HEADER_BYTES // 8, (HEADER_BYTES + INODES_BYTES) // 8
        third = second + SERIALS_BYTES // 8
        parts = [words[:first], words[first:second], words[second:third], whole[third * 8 :], words[third:]]
        self._views = [whole, words, *parts]
        self.header = Header(parts[0])
        self.inodes = InodeSlots(parts[1])
        self.serials = Serials(parts[2])
        self.facts = Facts(*parts[3:])

    @classmethod
    def create(cls) -> SharedMemory:
        """A new and empty one; the descriptor is its caller's to close.

        Raises:
            OSError: no memory, or no descriptor left.
        """
        descriptor = os.memfd_create(cls.NAME, os.MFD_CLOEXEC)
        try:
            os.ftruncate(descriptor, TOTAL_BYTES)
            memory = cls(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        memory.header.magic = MAGIC
        return memory

    @classmethod
    def attach(cls, descriptor: int) -> SharedMemory:
        """The one that `descriptor` leads to, with all that it holds.

        Raises:
            JournalError: it is no journal of this version.
            OSError: the descriptor is not open.
        """
        if os.fstat(descriptor).st_size != TOTAL_BYTES:
            raise JournalError(f"descriptor {descriptor} is no journal of this version of lockfs.")
        memory = cls(descriptor)
        if memory.header.magic != MAGIC:
            memory.unmap()
            raise JournalError(f"descriptor {descriptor} is no journal of this version of lockfs.")
        memory.reload()
        return memory

    def close(self) -> None:
        """Give back the mapping and the descriptor; for a process that is done with a journal but goes on."""
        self.unmap()
        os.close(self.descriptor)

    def unmap(self) -> None:
        """Give back the mapping alone."""
        self.facts.close()
        for view in reversed(self._views):
            view.release()
        self._map.close()

    def reload(self) -> None:
        """Read anew what another process wrote: the first thing that a process does that takes over."""
        self.facts.reload()
        self.inodes.reload()

    def named_descriptors(self) -> set[int]:
        """The descriptors that the journal names: of inodes, and in the `fd` and `fds` of values."""
        named = self.inodes.descriptors()
        for value in self.facts.items("").values():
            named |= named_in(value)
        return {number for number in named if number >= 0}
