"""The kernel's FUSE protocol as far as lockfs speaks it itself: numbers, structures, and their checks.

Source: include/uapi/linux/fuse.h, protocol 7.45. All integers are native-endian; every fixed part is
followed by names or data. Parsing never trusts a length: whatever does not fit raises ProtocolError.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import NamedTuple

from lockfs.errors import LockfsError

KERNEL_MAJOR = 7
KERNEL_MINOR = 45
MINOR_MIN = 36  # flags2 in INIT, without which nothing here can be negotiated (Linux 5.17)

Bytes = bytes | bytearray | memoryview

IN_HEADER = struct.Struct("=IIQQIIIHH")  # len opcode unique nodeid uid gid pid total_extlen padding
OUT_HEADER = struct.Struct("=IiQ")  # len error unique
INIT_IN = struct.Struct("=IIIII44x")  # major minor max_readahead flags flags2
INIT_OUT = struct.Struct("=IIIIHHIIHHIIH22x")
ENTRY_OUT = struct.Struct("=QQQQII")  # nodeid generation entry_valid attr_valid entry_nsec attr_nsec
ATTR_OUT = struct.Struct("=QII")  # attr_valid, attr_valid_nsec, dummy; an ATTR follows
ATTR = struct.Struct("=QQQQQQIIIIIIIIII")
OPEN_OUT = struct.Struct("=QIi")  # fh open_flags backing_id
CREATE_IN = struct.Struct("=IIII")  # flags mode umask open_flags
READ_IN = struct.Struct("=QQIIQII")  # fh offset size read_flags lock_owner flags padding
WRITE_IN = READ_IN  # fh offset size write_flags lock_owner flags padding
WRITE_OUT = struct.Struct("=II")  # size padding
FH_IN = struct.Struct("=Q")  # the first field of flush_in, release_in and fsync_in
FSYNC_IN = struct.Struct("=QII")  # fh fsync_flags padding
FALLOCATE_IN = struct.Struct("=QQQII")  # fh offset length mode padding
LSEEK_IN = struct.Struct("=QQII")  # fh offset whence padding
LSEEK_OUT = struct.Struct("=Q")
COPY_IN = struct.Struct("=QQQQQQQ")  # fh_in off_in nodeid_out fh_out off_out len flags
INTERRUPT_IN = struct.Struct("=Q")
BACKING_MAP = struct.Struct("=iIQ")  # fd flags padding
NOTIFY_INVAL_INODE = struct.Struct("=Qqq")  # nodeid offset length

ENTRY_BYTES = ENTRY_OUT.size + ATTR.size
HEADER_BYTES = IN_HEADER.size
WRITE_HEADER_BYTES = HEADER_BYTES + WRITE_IN.size  # what precedes the data of a WRITE
REQUEST_BYTES_MIN = 8192  # the kernel refuses to read into less
RESENT = 1 << 63  # in `unique`: sent again after NOTIFY_RESEND

FSYNC_DATA_ONLY = 1
WRITE_KILL_SUIDGID = 1 << 2
NOTIFY_CODE_INVAL_INODE = 2
NOTIFY_CODE_RESEND = 7

IOC_BACKING_OPEN = 0x4010E501
IOC_BACKING_CLOSE = 0x4004E502


class Opcode(enum.IntEnum):
    """Requests that the channel looks at; all others go to pyfuse3 as they are."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    UNLINK = 10
    RENAME = 12
    OPEN = 14
    READ = 15
    WRITE = 16
    RELEASE = 18
    FSYNC = 20
    FLUSH = 25
    INIT = 26
    GETLK = 31
    SETLK = 32
    SETLKW = 33
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36
    BMAP = 37
    DESTROY = 38
    IOCTL = 39
    POLL = 40
    NOTIFY_REPLY = 41
    BATCH_FORGET = 42
    FALLOCATE = 43
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    SYNCFS = 50
    TMPFILE = 51
    STATX = 52
    COPY_FILE_RANGE_64 = 53


class Flag(enum.IntFlag):
    """INIT flags, the low 32 in `flags`, the others in `flags2`."""

    ASYNC_READ = 1 << 0
    ATOMIC_O_TRUNC = 1 << 3
    BIG_WRITES = 1 << 5
    DONT_MASK = 1 << 6
    AUTO_INVAL_DATA = 1 << 12
    DO_READDIRPLUS = 1 << 13
    ASYNC_DIO = 1 << 15
    PARALLEL_DIROPS = 1 << 18
    POSIX_ACL = 1 << 20
    ABORT_ERROR = 1 << 21
    MAX_PAGES = 1 << 22
    HANDLE_KILLPRIV_V2 = 1 << 28
    INIT_EXT = 1 << 30
    DIRECT_IO_ALLOW_MMAP = 1 << 36
    PASSTHROUGH = 1 << 37
    HAS_RESEND = 1 << 39


class ProtocolError(LockfsError):
    """A message that is not of the protocol; the request it came with is answered EIO."""


class Header(NamedTuple):
    """The fixed start of every request. `pid` is the caller's thread id, 0 outside our pid namespace.

    The last two are the length of extensions, in 8-byte units, and padding.
    """

    length: int
    opcode: int
    unique: int
    nodeid: int
    uid: int
    gid: int
    pid: int
    extensions: int = 0
    padding: int = 0


def parse_header(data: Bytes, received: int) -> Header:
    """The header of a request of `received` bytes.

    Raises:
        ProtocolError: shorter than a header, or its length field is not `received`.
    """
    if received < HEADER_BYTES:
        raise ProtocolError(f"a request of {received} bytes is shorter than its header")
    header = Header._make(IN_HEADER.unpack_from(data))
    if header.length != received:
        raise ProtocolError(f"a request says it has {header.length} bytes and has {received}")
    return header


def parse(layout: struct.Struct, data: Bytes, offset: int = HEADER_BYTES) -> tuple[int, ...]:
    """The fixed part of a request.

    Raises:
        ProtocolError: fewer bytes than the structure has.
    """
    if len(data) < offset + layout.size:
        raise ProtocolError(
            f"a request has {len(data)} bytes where at least {offset + layout.size} are needed"
        )
    return layout.unpack_from(data, offset)


def reply(unique: int, body: bytes | memoryview = b"") -> list[bytes | memoryview]:
    """A successful reply as pieces for writev."""
    return [OUT_HEADER.pack(OUT_HEADER.size + len(body), 0, unique), body]


def error_reply(unique: int, number: int) -> bytes:
    """A reply that makes the system call fail with errno `number`."""
    return OUT_HEADER.pack(OUT_HEADER.size, -number, unique)


@dataclass(frozen=True)
class KernelInit:
    """What the kernel offered in INIT."""

    unique: int
    major: int
    minor: int
    max_readahead: int
    flags: Flag


def parse_init(data: Bytes) -> KernelInit:
    """The kernel's INIT request.

    Raises:
        ProtocolError: not an INIT, truncated, or of a protocol older than MINOR_MIN.
    """
    header = parse_header(data, len(data))
    if header.opcode != Opcode.INIT:
        raise ProtocolError(f"the first request is {header.opcode}, not INIT")
    major, minor, readahead, flags, flags2 = parse(INIT_IN, data)
    if major != KERNEL_MAJOR or minor < MINOR_MIN:
        raise ProtocolError(f"the kernel speaks FUSE {major}.{minor}; 7.{MINOR_MIN} (Linux 5.17) is needed")
    return KernelInit(header.unique, major, minor, readahead, Flag(flags | flags2 << 32))


def init_reply(offer: KernelInit, flags: Flag, max_write: int, max_pages: int, stack_depth: int) -> bytes:
    """Our answer to INIT; sizes in bytes and 4 KiB pages."""
    body = INIT_OUT.pack(
        KERNEL_MAJOR,
        min(offer.minor, KERNEL_MINOR),
        offer.max_readahead,
        int(flags) & 0xFFFFFFFF,
        MAX_BACKGROUND,
        MAX_BACKGROUND * 3 // 4,
        max_write,
        1,
        max_pages,
        0,
        int(flags) >> 32,
        stack_depth,
        0,
    )
    return b"".join(bytes(part) for part in reply(offer.unique, body))


MAX_BACKGROUND = 256  # asynchronous requests the kernel may have under way


def library_init(unique: int, flags: Flag) -> bytes:
    """The INIT request that pyfuse3's library gets in the kernel's place (protocol 7.31, 16-byte body)."""
    body = struct.pack("=IIII", KERNEL_MAJOR, 31, 131072, int(flags) & 0xFFFFFFFF)
    return IN_HEADER.pack(HEADER_BYTES + len(body), Opcode.INIT, unique, 0, 0, 0, 0, 0, 0) + body
