"""The family of errors that lockfs raises on purpose, and their two translations.

Every member carries a sentence for the user. `errno_of` is the one place that turns an error into
the number a system call fails with; `exit_code_of` the one place that turns it into a process's exit
code (mount(8): 1 wrong usage, 2 system error, 32 mount failure). Anything that is not of this family
and not an OSError is a defect: it stops the mount.
"""

from __future__ import annotations

import errno

EXIT_OK = 0
EXIT_USAGE = 1
EXIT_SYSTEM = 2
EXIT_MOUNT = 32


class LockfsError(Exception):
    """An expected failure; `str()` of it is one sentence that tells the user what to do."""

    errno = errno.EIO
    exit_code = EXIT_SYSTEM


class UsageError(LockfsError):
    """An unknown, malformed or contradictory option or argument."""

    errno = errno.EINVAL
    exit_code = EXIT_USAGE


class SetupError(LockfsError):
    """The mount cannot be made: the source, the mount point, the kernel or a privilege is at fault."""

    exit_code = EXIT_MOUNT


class HopelessError(LockfsError):
    """What a killed worker of a mount left cannot be taken over, by this one or any other."""


class ImageBusy(LockfsError):
    """The image is held by somebody else; the sentence names the holder."""

    errno = errno.EBUSY


class NotPermitted(LockfsError):
    """The operation is refused by rule, whoever holds the image."""

    errno = errno.EPERM


class WriteRefused(LockfsError):
    """A handle without a lease tried to change data and may not (a manager's handle)."""

    errno = errno.EROFS


class LeaseUnavailable(LockfsError):
    """A write needs a lease that could not be had in time.

    ENOSPC, because it is the one error that QEMU answers, by default, by pausing the guest and
    repeating the write when told to continue (docs/hypervisors.md).
    """

    errno = errno.ENOSPC


class Interrupted(LockfsError):
    """A waiting request was interrupted by a signal to its caller."""

    errno = errno.EINTR


class BackendError(LockfsError):
    """The storage could not say whether the lease is free (I/O error, no lock manager)."""

    errno = errno.EIO


def errno_of(error: LockfsError | OSError) -> int:
    """The number a system call fails with when `error` ends its request."""
    if isinstance(error, OSError):
        return error.errno or errno.EIO
    return error.errno


def exit_code_of(error: LockfsError | OSError) -> int:
    """The exit code of a command that `error` ends."""
    if isinstance(error, OSError):
        return EXIT_SYSTEM
    return error.exit_code
