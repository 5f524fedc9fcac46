"""Which sectors the storage under an open file or device takes in O_DIRECT transfers."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct

from lockfs.errors import SetupError
from lockfs.storage.buffers import Buffers
from lockfs.storage.rawio import RawIO

SECTOR_SIZES = (512, 4096)
_BLKSSZGET = 0x1268  # linux/fs.h, asm-generic encoding


def sector_size_of(descriptor: int, name: str, io: RawIO) -> int:
    """The smallest of SECTOR_SIZES (bytes) that the storage takes as length and offset. May block.

    A device states its logical sectors. Of a file the kernel may tell (RawIO.alignment); else one sector is
    read to see, and an empty file is believed to take 512.

    Raises:
        SetupError: it needs larger ones, or reads and writes the file through a cache in spite of O_DIRECT.
        OSError: it cannot be read.
    """
    if stat.S_ISBLK(os.fstat(descriptor).st_mode):
        needed = struct.unpack("i", fcntl.ioctl(descriptor, _BLKSSZGET, bytes(4)))[0]
    else:
        told = io.alignment(descriptor)
        needed = tried_alignment(descriptor, io) if told is None else told
    if needed == 0:
        raise SetupError(
            f"{name} lies on a file system that reads and writes it through its cache in spite of O_DIRECT "
            "(encrypted, or with journalled data); put the lease area on other storage."
        )
    for size in SECTOR_SIZES:
        if needed <= size:
            return size
    raise SetupError(
        f"{name} lies on storage with sectors of {needed} bytes; leases need sectors of 512 or 4096 bytes."
    )


def tried_alignment(descriptor: int, io: RawIO) -> int:
    """512 or 4096, by whether the first 512 bytes can be read alone. Raises OSError."""
    smallest = SECTOR_SIZES[0]
    buffer = Buffers().take(smallest)
    try:
        io.preadv(descriptor, [memoryview(buffer)[:smallest]], 0)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return SECTOR_SIZES[1]
    return smallest
