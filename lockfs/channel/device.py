"""The descriptor of /dev/fuse: negotiation, replies, backing files, notifications.

This is the one place that writes to the device. Replies may be written from any thread: the kernel takes
each write as one message.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import select
import struct
from collections.abc import Callable, Collection, Sequence

from lockfs.channel import protocol
from lockfs.channel.protocol import Flag
from lockfs.errors import SetupError

log = logging.getLogger("lockfs.channel")

MAX_WRITE = 1 << 20  # bytes of data in one request; fs.fuse.max_pages_limit's default
PAGE = 4096
STACK_DEPTH = 1  # backing files lie on plain file systems, and the mount may be under one overlay
INIT_DEADLINE_S = 20.0
BACKINGS_BEHIND, BACKINGS_AHEAD = 256, 64
"""How far from the last one known a backing id may lie that nobody could name any more: each thread that
registers files may have had one."""
_WANTED = (
    Flag.ASYNC_READ
    | Flag.ATOMIC_O_TRUNC
    | Flag.BIG_WRITES
    | Flag.DONT_MASK
    | Flag.AUTO_INVAL_DATA
    | Flag.DO_READDIRPLUS
    | Flag.ASYNC_DIO
    | Flag.PARALLEL_DIROPS
    | Flag.POSIX_ACL
    | Flag.ABORT_ERROR
    | Flag.MAX_PAGES
    | Flag.HANDLE_KILLPRIV_V2
    | Flag.INIT_EXT
    | Flag.DIRECT_IO_ALLOW_MMAP
    | Flag.PASSTHROUGH
    | Flag.HAS_RESEND
)
_NEEDED = Flag.ATOMIC_O_TRUNC | Flag.MAX_PAGES | Flag.INIT_EXT | Flag.DO_READDIRPLUS
_UNWANTED = (errno.ENOENT, errno.ENODEV, errno.ECONNABORTED)
_IDS = struct.Struct("=I")


class Device:
    """A mounted /dev/fuse descriptor. Implements handles.Kernel."""

    def __init__(self, descriptor: int, registered: Callable[[int], None] = lambda number: None) -> None:
        """`registered` is told each backing id that the kernel gives."""
        self.descriptor = descriptor
        self._registered = registered
        self.flags = Flag(0)
        self._passthrough = False

    @property
    def passthrough(self) -> bool:
        """Whether the kernel serves data of backing files that this process registers."""
        return self._passthrough

    def negotiate(self, want_passthrough: bool, probe: int) -> None:
        """Answer the kernel's INIT. `probe` is any regular file, registered once to see whether that works.

        Raises:
            SetupError: no INIT within INIT_DEADLINE_S, or a kernel that lacks what lockfs cannot do without.
        """
        poll = select.poll()
        poll.register(self.descriptor, select.POLLIN)
        if not poll.poll(INIT_DEADLINE_S * 1000):
            raise SetupError(f"the kernel did not greet the new mount within {INIT_DEADLINE_S:.0f} seconds")
        try:
            offer = protocol.parse_init(os.read(self.descriptor, MAX_WRITE + PAGE))
        except protocol.ProtocolError as error:
            raise SetupError(f"this kernel cannot carry lockfs: {error}") from error
        wanted = _WANTED if want_passthrough else _WANTED & ~Flag.PASSTHROUGH
        self.flags = offer.flags & wanted
        missing = _NEEDED & ~self.flags
        if missing:
            raise SetupError(f"this kernel's FUSE lacks {missing!s}; Linux 5.17 or later is needed")
        depth = STACK_DEPTH if Flag.PASSTHROUGH in self.flags else 0
        os.write(self.descriptor, protocol.init_reply(offer, self.flags, MAX_WRITE, MAX_WRITE // PAGE, depth))
        self._passthrough = Flag.PASSTHROUGH in self.flags and self._can_register(probe)

    def _can_register(self, probe: int) -> bool:
        try:
            self.unregister_backing(self.register_backing(probe))
        except OSError as error:
            log.info("no passthrough: %s", error.strerror)
            return False
        return True

    def register_backing(self, descriptor: int) -> int:
        """FUSE_DEV_IOC_BACKING_OPEN; the id is returned only through a mutable buffer."""
        argument = bytearray(protocol.BACKING_MAP.pack(descriptor, 0, 0))
        number = int(fcntl.ioctl(self.descriptor, protocol.IOC_BACKING_OPEN, argument, True))
        self._registered(number)
        return number

    def unregister_unnamed(self, named: Collection[int], greatest: int) -> None:
        """Give back backing ids that a killed worker was given and could not name.

        `greatest`: of those it was given, as far as it could say. The kernel gives ids in order, so they lie
        about there; the earlier ones have all been named or given back.
        """
        for number in range(max(1, greatest - BACKINGS_BEHIND), greatest + BACKINGS_AHEAD):
            if number not in named:
                with contextlib.suppress(OSError):  # ENOENT: there is none of that number
                    self.unregister_backing(number)

    def unregister_backing(self, backing_id: int) -> None:
        """FUSE_DEV_IOC_BACKING_CLOSE."""
        fcntl.ioctl(self.descriptor, protocol.IOC_BACKING_CLOSE, _IDS.pack(backing_id))

    def send(self, parts: Sequence[bytes | memoryview | bytearray]) -> bool:
        """Write one reply; False if nobody waits for it any more (the caller was killed, the mount is gone).

        Raises:
            OSError: EINVAL and the like for a malformed reply.
        """
        try:
            os.writev(self.descriptor, parts)
        except OSError as error:
            if error.errno in _UNWANTED:
                return False
            raise
        return True

    def send_error(self, unique: int, number: int) -> bool:
        """Write an error reply (`number` 0: plain success); False as for `send`."""
        return self.send([protocol.error_reply(unique, number)])

    @property
    def state(self) -> dict[str, int]:
        """What was negotiated, for a later worker's `recall`."""
        return {"flags": int(self.flags), "passthrough": int(self._passthrough)}

    def recall(self, state: dict[str, int]) -> None:
        """Go on with what a former worker negotiated."""
        self.flags = Flag(state["flags"])
        self._passthrough = bool(state["passthrough"])

    @property
    def resends(self) -> bool:
        """Whether the kernel can send again what a worker took and did not answer (Linux 6.9)."""
        return Flag.HAS_RESEND in self.flags

    def resend(self) -> None:
        """FUSE_NOTIFY_RESEND: have every request sent again that was read and not answered."""
        self.send([protocol.OUT_HEADER.pack(protocol.OUT_HEADER.size, protocol.NOTIFY_CODE_RESEND, 0)])

    def knows(self, nodeid: int) -> bool:
        """FUSE_NOTIFY_INVAL_INODE for attributes alone, which waits for nothing; fails if it is unknown."""
        body = protocol.NOTIFY_INVAL_INODE.pack(nodeid, -1, 0)
        size = protocol.OUT_HEADER.size + len(body)
        return self.send([protocol.OUT_HEADER.pack(size, protocol.NOTIFY_CODE_INVAL_INODE, 0), body])

    def invalidate(self, nodeid: int) -> None:
        """FUSE_NOTIFY_INVAL_INODE for everything; waits for I/O on the inode's cached pages."""
        body = protocol.NOTIFY_INVAL_INODE.pack(nodeid, 0, 0)
        head = protocol.OUT_HEADER.pack(
            protocol.OUT_HEADER.size + len(body), protocol.NOTIFY_CODE_INVAL_INODE, 0
        )
        self.send([head, body])
