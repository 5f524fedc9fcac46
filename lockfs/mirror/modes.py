"""Who serves an open file's data: the kernel from the backing file, or lockfs.

The kernel's rules (fs/fuse/iomode.c, Linux 6.9 and later): all passthrough opens of an inode carry one
backing id; while one is open, an open without passthrough is refused with EIO; an open with direct I/O
alone does not keep a later one from passthrough.
"""

from __future__ import annotations

import enum

from lockfs.channel.handles import (
    FOPEN_DIRECT_IO,
    FOPEN_NOFLUSH,
    FOPEN_PARALLEL_DIRECT_WRITES,
    FOPEN_PASSTHROUGH,
)
from lockfs.keeper.grants import Kind

SERVED = FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES
"""All data through lockfs."""
GUARDED = FOPEN_PASSTHROUGH | FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES
"""Reads and writes through lockfs, on an inode that other handles use in passthrough."""
PASSED = FOPEN_PASSTHROUGH
"""Nothing of the data through lockfs."""


class IoMode(enum.Enum):
    """The data mode of a mount.

    AUTO: passthrough where it can be had, guarded for handles whose lease may have to be yielded.
    PASSTHROUGH: as AUTO, but nothing is ever yielded. GUARDED: all writing handles pass through lockfs,
    readers do not. DAEMON: all data passes through lockfs.
    """

    AUTO = "auto"
    PASSTHROUGH = "passthrough"
    GUARDED = "guarded"
    DAEMON = "daemon"


def choose(
    io: IoMode, kind: Kind, *, may_yield: bool, registered: bool, passing: bool, locks_apart: bool
) -> int:
    """The FOPEN_* bits of an open: SERVED, GUARDED or PASSED.

    `registered`: the kernel knows the inode's backing file. `passing`: the inode has an open with
    passthrough now. `locks_apart`: the lease's locks are not on the registered description, so that they
    would not outlive lockfs together with a passthrough.
    """
    if io is IoMode.DAEMON or not registered:
        return SERVED
    if kind is Kind.READER:
        return PASSED
    if kind is Kind.LEASED:
        guarded = io is IoMode.GUARDED or locks_apart or (may_yield and io is IoMode.AUTO)
        return GUARDED if guarded else PASSED
    # A handle without a lease must not write past lockfs, not even through a shared mapping, which a
    # guarded open would map onto the backing file. With passthrough open beside it there is no choice.
    return GUARDED if passing else SERVED


def is_passed(open_flags: int) -> bool:
    """Whether none of an open's data passes through lockfs."""
    return open_flags & ~FOPEN_NOFLUSH == PASSED


def without_flush(open_flags: int) -> int:
    """The bits of an open on a local file system, where a close writes nothing back and has no error to tell.

    Only for what is wholly passed through: a close then costs its caller no round trip (Linux 5.16).
    """
    return open_flags | FOPEN_NOFLUSH if is_passed(open_flags) else open_flags
