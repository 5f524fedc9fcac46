"""Opening lease storage, and saying what to do where that is not possible."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass

from lockfs.errors import SetupError
from lockfs.storage.alignment import sector_size_of
from lockfs.storage.descriptor import SharedDescriptor
from lockfs.storage.rawio import RawIO


@dataclass(frozen=True)
class Place:
    """What to open: `path`, relative to the descriptor `directory` if there is one; people call it `name`."""

    path: str
    name: str
    directory: int | None
    writable: bool


@dataclass(frozen=True)
class Opened:
    """What was found: sectors in bytes (512 or 4096), whether it is a block device, and which file it is
    (st_dev, st_ino)."""

    sector_size: int
    is_device: bool
    identity: tuple[int, int]


class StorageMissing(SetupError):
    """Nothing has the name."""


def open_storage(file: SharedDescriptor, place: Place, io: RawIO) -> Opened:
    """Open and examine it; `file` holds the descriptor then, or nothing after a failure. May block.

    Raises:
        SetupError: with a sentence that says what to do.
    """
    try:
        # Before the opening, which has effects on a tape or a pipe; and again after it.
        _check_type(os.stat(place.path, dir_fd=place.directory), place)
        with file.opened(lambda: _open(place)) as descriptor:
            status = os.fstat(descriptor)
            _check_type(status, place)
            sector_size = sector_size_of(descriptor, place.name, io)
            return Opened(sector_size, stat.S_ISBLK(status.st_mode), (status.st_dev, status.st_ino))
    except OSError as error:
        family = StorageMissing if error.errno == errno.ENOENT else SetupError
        raise family(_sentence(error, place)) from error


def _open(place: Place) -> int:
    access = os.O_RDWR if place.writable else os.O_RDONLY
    # O_DSYNC and not O_SYNC, which would also wait for the time of change to be recorded at each write.
    flags = access | os.O_DIRECT | os.O_DSYNC | os.O_CLOEXEC
    return os.open(place.path, flags, dir_fd=place.directory)


def _check_type(status: os.stat_result, place: Place) -> None:
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
        raise SetupError(f"{place.name} is neither a file nor a block device; leases need one of these.")


def _sentence(error: OSError, place: Place) -> str:
    number = error.errno or errno.EIO
    name = place.name
    if number in {errno.ENOENT, errno.ENOTDIR}:
        return f"{name} does not exist; check the path, or prepare it with lockfsctl init."
    if number in {errno.EACCES, errno.EPERM}:
        access = "read and write" if place.writable else "read"
        return f"{name} cannot be opened: {os.strerror(number)}; let the user of lockfs {access} it."
    if number == errno.EROFS:
        return f"{name} lies on a file system that is mounted read-only; leases must be written."
    if number == errno.EINVAL:
        return (
            f"{name} lies on a file system without O_DIRECT, where caches would hide one host's leases from "
            "another; put the lease area on other storage."
        )
    if number in {errno.ENXIO, errno.ENODEV}:
        return f"{name} is a device that is not there; check that it is connected and active."
    return f"{name} cannot be used for leases: {os.strerror(number)}; check its storage."
