"""Closing what a killed worker left open and nobody names."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection

from lockfs.guardian.words import Words
from lockfs.journal.memory import SharedMemory


def named(memory: SharedMemory, kept: Collection[int]) -> set[int]:
    """The descriptors that must stay open: the standard streams, the guardian's and the journal's.

    The journal's values must have been read anew.
    """
    return {0, 1, 2, memory.descriptor, *kept, *Words(memory).descriptors(), *memory.named_descriptors()}


def close_unnamed(memory: SharedMemory, kept: Collection[int]) -> int:
    """Close every other descriptor of the shared table; how many there were.

    Other descriptors of the journal's memory stay: mappings of it keep one each. Nobody else may open or
    close anything meanwhile. Blocks where closing does, on storage that answers slowly.
    """
    needed = named(memory, kept)
    journal = os.fstat(memory.descriptor).st_ino, os.fstat(memory.descriptor).st_dev
    closed = 0
    for descriptor in sorted(map(int, os.listdir("/proc/self/fd"))):
        if descriptor in needed:
            continue
        with contextlib.suppress(OSError):  # the directory that was listed
            status = os.fstat(descriptor)
            if (status.st_ino, status.st_dev) != journal:
                os.close(descriptor)
                closed += 1
    return closed
