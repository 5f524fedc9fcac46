"""The protocol layer: what is well formed passes, everything else is a ProtocolError."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockfs.channel import protocol, wellformed
from lockfs.channel.protocol import Flag, Header, Opcode, ProtocolError
from tests.channel.fake_kernel import kernel_init


def header(opcode: int, length: int = 40) -> Header:
    """A header as the checks need it."""
    return Header(length, opcode, 2, 1, 0, 0, 1)


def request(opcode: int, body: bytes) -> memoryview:
    """A whole message with a right header."""
    length = protocol.HEADER_BYTES + len(body)
    return memoryview(protocol.IN_HEADER.pack(length, opcode, 2, 1, 0, 0, 1, 0, 0) + body)


@pytest.mark.parametrize(
    ("layout", "size"),
    [
        (protocol.IN_HEADER, 40),
        (protocol.OUT_HEADER, 16),
        (protocol.INIT_IN, 64),
        (protocol.INIT_OUT, 64),
        (protocol.ENTRY_OUT, 40),
        (protocol.ATTR, 88),
        (protocol.OPEN_OUT, 16),
        (protocol.READ_IN, 40),
        (protocol.FALLOCATE_IN, 32),
        (protocol.LSEEK_IN, 24),
        (protocol.COPY_IN, 56),
        (protocol.BACKING_MAP, 16),
    ],
)
def test_sizes(layout: struct.Struct, size: int) -> None:
    """Each structure has the size that the kernel's header gives it."""
    assert layout.size == size


def test_init_is_understood() -> None:
    """A kernel's offer is read whole, the upper flags included."""
    offer = protocol.parse_init(bytes(request(Opcode.INIT, kernel_init())))
    assert Flag.PASSTHROUGH in offer.flags
    assert offer.minor == 45


@pytest.mark.parametrize(("major", "minor"), [(6, 45), (8, 0), (7, 35), (7, 8)])
def test_old_or_strange_kernels_are_refused(major: int, minor: int) -> None:
    """A protocol that lockfs cannot speak is an error, not a guess."""
    with pytest.raises(ProtocolError):
        protocol.parse_init(bytes(request(Opcode.INIT, kernel_init(major, minor))))


@given(st.binary(max_size=200))
def test_any_bytes_as_header(data: bytes) -> None:
    """Arbitrary bytes are a header of their own length or an error."""
    try:
        found = protocol.parse_header(data, len(data))
    except ProtocolError:
        return
    assert found.length == len(data)


@given(st.integers(0, 70), st.binary(max_size=300))
def test_any_body_is_checked(opcode: int, body: bytes) -> None:
    """Whatever passes the check ends in the strings that its request has, each with its NUL."""
    message = request(opcode, body)
    if not wellformed.serves(opcode):
        with pytest.raises(ProtocolError):
            wellformed.check(header(opcode), message)
        return
    try:
        wellformed.check(header(opcode), message)
    except ProtocolError:
        return
    if opcode == Opcode.LOOKUP:
        assert body.count(b"\0") == 1 and body.endswith(b"\0")


@pytest.mark.parametrize(
    ("opcode", "body", "good"),
    [
        (Opcode.LOOKUP, b"name\0", True),
        (Opcode.LOOKUP, b"name", False),
        (Opcode.LOOKUP, b"", False),
        (Opcode.RENAME, bytes(8) + b"a\0b\0", True),
        (Opcode.RENAME, bytes(8) + b"a\0b", False),
        (Opcode.RENAME, bytes(8) + b"a\0", False),
        (wellformed.SETXATTR, struct.pack("=II", 3, 0) + b"user.a\0xyz", True),
        (wellformed.SETXATTR, struct.pack("=II", 4, 0) + b"user.a\0xyz", False),
        (wellformed.SETXATTR, struct.pack("=II", 0, 0) + b"user.a", False),
        (Opcode.BATCH_FORGET, struct.pack("=II", 1, 0) + bytes(16), True),
        (Opcode.BATCH_FORGET, struct.pack("=II", 1 << 31, 0) + bytes(16), False),
        (Opcode.OPEN, bytes(7), False),
    ],
)
def test_shapes(opcode: int, body: bytes, good: bool) -> None:
    """Known good and known bad messages."""
    if good:
        wellformed.check(header(opcode), request(opcode, body))
    else:
        with pytest.raises(ProtocolError):
            wellformed.check(header(opcode), request(opcode, body))
