"""pyfuse3's end of the channel: a socket that its C library takes for a mounted /dev/fuse descriptor.

The library accepts a mount point of the form /dev/fd/N (libfuse 3.3 and later) and then reads requests
from descriptor N and writes replies to it. One SOCK_SEQPACKET message is one request or one reply.
"""

from __future__ import annotations

import os
import select
import socket

import pyfuse3

from lockfs.channel import protocol
from lockfs.channel.protocol import Flag
from lockfs.errors import SetupError

SOCKET_BYTES = 8 << 20  # room for requests that pyfuse3 has not read yet; names only, no file data
REPLY_BYTES_MAX = (1 << 20) + 4096  # the largest reply: directory entries
INIT_UNIQUE = 2
_BUFFER_OPTIONS = (
    (32, socket.SO_SNDBUF),  # SO_SNDBUFFORCE, with CAP_NET_ADMIN
    (33, socket.SO_RCVBUF),  # SO_RCVBUFFORCE
)
INIT_DEADLINE_S = 20.0
_SHOWN = (
    Flag.ASYNC_READ
    | Flag.ATOMIC_O_TRUNC
    | Flag.BIG_WRITES
    | Flag.DONT_MASK
    | Flag.DO_READDIRPLUS
    | Flag.PARALLEL_DIROPS
    | Flag.POSIX_ACL
    | Flag.MAX_PAGES
)


class Library:
    """Both ends of the socket. `ours` is the channel's; the other belongs to pyfuse3 until `close`."""

    def __init__(self) -> None:
        self.ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self.ours, self._theirs):
            for forced, plain in _BUFFER_OPTIONS:
                try:
                    end.setsockopt(socket.SOL_SOCKET, forced, SOCKET_BYTES)
                except PermissionError:
                    end.setsockopt(socket.SOL_SOCKET, plain, SOCKET_BYTES)

    def attach(self, operations: pyfuse3.Operations) -> None:
        """Make pyfuse3 serve `operations` on its end. The library owns a duplicate from here on."""
        pyfuse3.init(operations, f"/dev/fd/{os.dup(self._theirs.fileno())}", set())
        self._theirs.close()

    def greet(self) -> None:
        """Send the INIT that stands in for the kernel's; pyfuse3's main loop must run to answer it."""
        self.ours.send(protocol.library_init(INIT_UNIQUE, _SHOWN))

    def await_greeting(self) -> None:
        """Read the library's answer to INIT; blocks, for a worker thread.

        Raises:
            SetupError: no answer in time or an error instead of one.
        """
        poll = select.poll()
        poll.register(self.ours.fileno(), select.POLLIN)
        if not poll.poll(INIT_DEADLINE_S * 1000):
            raise SetupError("pyfuse3 did not answer its INIT request")
        answer = self.ours.recv(REPLY_BYTES_MAX)
        _, error, unique = protocol.OUT_HEADER.unpack_from(answer)
        if error or unique != INIT_UNIQUE:
            raise SetupError(f"pyfuse3 refused its INIT request: {os.strerror(-error)}")

    def close(self) -> None:
        """Close our end; pyfuse3 reads end-of-file."""
        self.ours.close()
