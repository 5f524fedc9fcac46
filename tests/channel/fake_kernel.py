"""A kernel's side of /dev/fuse made of a socket.

Fault model: it may send any bytes at all as a request, of any length up to what the reader takes in, in any
order, with any handle, node or unique number, and may stop listening at any moment. It keeps to the kernel's
one promise: one message is one request or reply.
"""

from __future__ import annotations

import os
import socket
import struct

from lockfs.channel import protocol

SOCKET_BYTES = 4 << 20
REPLY_BYTES_MAX = 2 << 20
REPLY_DEADLINE_S = 10.0


class FakeKernel:
    """The far end of a device descriptor."""

    def __init__(self) -> None:
        self._ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self._ours, self._theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
        self._ours.settimeout(REPLY_DEADLINE_S)
        self.device_fd = self._theirs.fileno()
        self._unique = 0

    def send_raw(self, message: bytes) -> None:
        """Send bytes as they are."""
        self._ours.send(message)

    def send(self, opcode: int, body: bytes = b"", nodeid: int = 1, pid: int = 0) -> int:
        """Send a request with a right header; returns its unique number."""
        self._unique += 2
        length = protocol.HEADER_BYTES + len(body)
        header = protocol.IN_HEADER.pack(
            length, opcode, self._unique, nodeid, os.getuid(), os.getgid(), pid, 0, 0
        )
        self._ours.send(header + body)
        return self._unique

    def receive(self) -> tuple[int, int, bytes]:
        """The next reply: (unique, errno or 0, body)."""
        message = self._ours.recv(REPLY_BYTES_MAX)
        length, error, unique = protocol.OUT_HEADER.unpack_from(message)
        if length != len(message):
            raise ValueError(f"a reply of {len(message)} bytes says {length}")
        return unique, -error, message[protocol.OUT_HEADER.size :]

    def call(self, opcode: int, body: bytes = b"", nodeid: int = 1) -> tuple[int, bytes]:
        """Send a request and return (errno or 0, body) of its reply; replies to others are dropped."""
        wanted = self.send(opcode, body, nodeid)
        while True:
            unique, error, answer = self.receive()
            if unique == wanted:
                return error, answer

    def hang_up(self) -> None:
        """Say nothing any more: the reader finds the end, as after an unmount."""
        self._ours.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Drop both ends."""
        self._ours.close()
        self._theirs.close()


def kernel_init(major: int = 7, minor: int = 45, flags: int = (1 << 64) - 1) -> bytes:
    """The body of an INIT request."""
    return struct.pack("=IIIII44x", major, minor, 131072, flags & 0xFFFFFFFF, flags >> 32)
