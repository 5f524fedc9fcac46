"""pyfuse3's replies: taken off its socket as soon as they are written, and the forms the kernel wants."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable

import pyfuse3
import trio

from lockfs.channel import protocol
from lockfs.channel.library import REPLY_BYTES_MAX, Library

_SECOND = 1_000_000_000
_MASK_32, _MASK_64 = (1 << 32) - 1, (1 << 64) - 1


class Replies(trio.abc.Instrument):
    """Takes pyfuse3's replies off its socket after each step of any task: no thread has to wake up for them.

    A step writes one reply at most, or a few short ones, so the socket never fills up with nobody to empty
    it; and the kernel takes a reply without making its writer wait.
    """

    def __init__(
        self,
        library: Library,
        carry: Callable[[memoryview], None],
        end: Callable[[BaseException | None], None],
    ) -> None:
        self._library = library
        self._carry = carry
        self._end = end
        self._room = memoryview(bytearray(REPLY_BYTES_MAX))
        self._ended = False

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        """Called by trio on its thread; an exception would go unheard, so it ends the relay instead."""
        try:
            while not self._ended:
                size = self._library.ours.recv_into(self._room, 0, socket.MSG_DONTWAIT)
                if not size:
                    self._stop(None)
                    return
                self._carry(self._room[:size])
        except BlockingIOError:
            return
        except BaseException as error:  # noqa: BLE001  (handed to `wait`, which raises it)
            closed = isinstance(error, OSError) and error.errno == errno.EBADF
            self._stop(None if closed else error)

    def _stop(self, failure: BaseException | None) -> None:
        self._ended = True
        self._end(failure)


def entry_out(entry: pyfuse3.EntryAttributes) -> bytes:
    """A fuse_entry_out with zero timeouts from pyfuse3's form of it."""
    return protocol.ENTRY_OUT.pack(entry.st_ino, entry.generation, 0, 0, 0, 0) + _attr(entry.st_ino, entry)


def known_entry_out(number: int, generation: int, status: os.stat_result, valid_s: int) -> bytes:
    """A fuse_entry_out whose name holds for no time, and whose attributes do for `valid_s` seconds."""
    return protocol.ENTRY_OUT.pack(number, generation, 0, valid_s, 0, 0) + _attr(number, status)


def attr_out(number: int, status: os.stat_result, valid_s: int) -> bytes:
    """A fuse_attr_out that the kernel may rely on for `valid_s` seconds."""
    return protocol.ATTR_OUT.pack(valid_s, 0, 0) + _attr(number, status)


def _attr(number: int, status: os.stat_result | pyfuse3.EntryAttributes) -> bytes:
    """A fuse_attr. A device's number has the same 32 low bits in glibc's dev_t and in the kernel's form."""
    times = [divmod(time, _SECOND) for time in (status.st_atime_ns, status.st_mtime_ns, status.st_ctime_ns)]
    return protocol.ATTR.pack(
        number,
        status.st_size,
        status.st_blocks,
        *(seconds & _MASK_64 for seconds, _ in times),
        *(nanoseconds for _, nanoseconds in times),
        status.st_mode,
        status.st_nlink,
        status.st_uid,
        status.st_gid,
        status.st_rdev & _MASK_32,
        status.st_blksize,
        0,
    )
