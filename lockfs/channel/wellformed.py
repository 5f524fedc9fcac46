"""Which requests go on to pyfuse3, and what each must look like.

pyfuse3's library takes every request as the kernel means it and reads names up to their NUL; so nothing
reaches it whose fixed part, strings or counts do not fit the message. Layouts: include/uapi/linux/fuse.h.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from lockfs.channel.protocol import HEADER_BYTES, Header, Opcode, ProtocolError

_SIZES = struct.Struct("=II")  # setxattr_in: size, flags; batch_forget_in: count, dummy
_FORGET_ONE_BYTES = 16


@dataclass(frozen=True)
class _Shape:
    """The bytes of the fixed part, and how many NUL-terminated strings follow and end the message."""

    fixed: int
    strings: int = 0


_SHAPES = {
    1: _Shape(0, 1),  # LOOKUP
    2: _Shape(8),  # FORGET
    3: _Shape(16),  # GETATTR
    4: _Shape(88),  # SETATTR
    5: _Shape(0),  # READLINK
    6: _Shape(0, 2),  # SYMLINK
    8: _Shape(16, 1),  # MKNOD
    9: _Shape(8, 1),  # MKDIR
    10: _Shape(0, 1),  # UNLINK
    11: _Shape(0, 1),  # RMDIR
    12: _Shape(8, 2),  # RENAME
    13: _Shape(8, 1),  # LINK
    14: _Shape(8),  # OPEN
    17: _Shape(0),  # STATFS
    18: _Shape(24),  # RELEASE
    22: _Shape(8, 1),  # GETXATTR
    23: _Shape(8),  # LISTXATTR
    24: _Shape(0, 1),  # REMOVEXATTR
    27: _Shape(8),  # OPENDIR
    29: _Shape(24),  # RELEASEDIR
    30: _Shape(16),  # FSYNCDIR
    35: _Shape(16, 1),  # CREATE
    44: _Shape(40),  # READDIRPLUS
    45: _Shape(16, 2),  # RENAME2
}
SETXATTR = 21


def serves(opcode: int) -> bool:
    """Whether pyfuse3 has a handler for this request."""
    return opcode in _SHAPES or opcode in (SETXATTR, Opcode.BATCH_FORGET)


def check(header: Header, request: memoryview) -> None:
    """See that a whole request (header included) has the form that its opcode demands.

    Raises:
        ProtocolError: it has not; says what is wrong.
    """
    body = request[HEADER_BYTES:]
    if header.opcode == SETXATTR:
        _check_setxattr(body)
        return
    if header.opcode == Opcode.BATCH_FORGET:
        _check_batch_forget(body)
        return
    shape = _SHAPES.get(header.opcode)
    if shape is None:
        raise ProtocolError(f"request {header.opcode} is not served by name")
    if len(body) < shape.fixed:
        raise ProtocolError(f"request {header.opcode} has {len(body)} of {shape.fixed} bytes")
    if shape.strings:
        text = bytes(body[shape.fixed :])
        if text.count(b"\0") != shape.strings or not text.endswith(b"\0"):
            raise ProtocolError(f"request {header.opcode} does not end in {shape.strings} strings")


def _check_setxattr(body: memoryview) -> None:
    if len(body) < _SIZES.size:
        raise ProtocolError("a SETXATTR is cut short")
    size, _ = _SIZES.unpack_from(body)
    name, end, value = bytes(body[_SIZES.size :]).partition(b"\0")
    if not end or not name or len(value) != size:
        raise ProtocolError(f"a SETXATTR of {size} bytes carries {len(value)}")


def _check_batch_forget(body: memoryview) -> None:
    if len(body) < _SIZES.size:
        raise ProtocolError("a BATCH_FORGET is cut short")
    count, _ = _SIZES.unpack_from(body)
    if len(body) != _SIZES.size + count * _FORGET_ONE_BYTES:
        raise ProtocolError(f"a BATCH_FORGET of {count} inodes has {len(body)} bytes")
