"""The relay between /dev/fuse and pyfuse3.

Reader threads take requests from the device, one each. Requests on file contents are served at once on
that thread (data.py); a few the kernel must not ask again are answered ENOSYS; everything else goes to
pyfuse3 as it came. Its replies are carried back on its own thread, as soon as the task that wrote one
pauses, and those of opens completed with the backing file's id. Threads, not tasks: a request of the data
path costs no switch to the event loop.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import mmap
import os
import struct
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Protocol

import pyfuse3
import trio

from lockfs.backends.base import Memory
from lockfs.channel import protocol, wellformed
from lockfs.channel.data import DataPath, Deferred
from lockfs.channel.device import MAX_WRITE, PAGE, Device
from lockfs.channel.door import Door
from lockfs.channel.handles import Handle, HandleTable
from lockfs.channel.library import Library
from lockfs.channel.protocol import Header, Opcode, ProtocolError
from lockfs.channel.replies import Replies, attr_out, entry_out, known_entry_out
from lockfs.channel.requests import PID_OFFSET, Caller, Requests, caller_of
from lockfs.errors import LockfsError, errno_of
from lockfs.keeper.gate import GateState
from lockfs.linux import proc

log = logging.getLogger("lockfs.channel")

READERS_MIN = 2
READERS_IDLE = 3  # readers that wait besides the one that is about to
READERS_LEAVE_S = 2.0
READERS_MAX = 12  # requests served at the same time
DEFERRED_MAX = 256  # writes that wait for a lease at the same time
INTERRUPT_RETRY_S = 0.02
HUGE_PAGE = 2 << 20
_MADV_POPULATE_WRITE = 23  # Linux 5.14
_LEFT = object()
_GONE = (errno.ENODEV, errno.ECONNABORTED)
_AGAIN = (errno.EINTR, errno.EAGAIN, errno.ENOENT)
_NO_REPLY = frozenset({Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.NOTIFY_REPLY})
_MAY_WAIT = frozenset(
    {Opcode.OPEN, Opcode.CREATE, Opcode.SETATTR, Opcode.UNLINK, Opcode.RENAME, Opcode.RENAME2}
)
_OPENS = (Opcode.OPEN, Opcode.CREATE)
_PID = struct.Struct("=I")


class FileSystem(Protocol):
    """What the channel asks of the mirror beyond pyfuse3's operations; called on the trio thread."""

    async def tmpfile(
        self, parent: int, mode: int, flags: int, umask: int, ctx: Caller
    ) -> tuple[pyfuse3.EntryAttributes, pyfuse3.FileInfo]:
        """Make an unnamed file in a directory and open it (O_TMPFILE)."""

    async def abandon(self, number: int) -> None:
        """Undo an open whose opener was killed before it could be told."""

    async def claim(self, handle: Handle) -> None:
        """Get the handle's gate opened; raises the LockfsError its caller is to see."""

    def answered(self, unique: int, number: int) -> None:
        """The reply to a request is at the kernel; `number`: of the handle that it told of, or 0."""

    def attributes(self, number: int) -> tuple[os.stat_result, int] | None:
        """An inode's attributes and the seconds they hold, if they can be had without waiting; any thread."""

    def entry(self, parent: int, name: bytes) -> tuple[int, int, os.stat_result, int] | None:
        """Look a name up, counting it, if that can be had without waiting; any thread.

        The node number, its generation, its attributes and the seconds that these hold.
        """

    def interrupt(self, tid: int) -> bool:
        """A signal hit thread `tid`; True if that thread was waiting for a lease."""


class Buffers:
    """One thread's memory for one request: headers, then page-aligned data, so that O_DIRECT works.

    The kernel's WRITE puts 80 bytes of headers before the data, which therefore starts at `data`'s first
    byte; other requests continue from `head` into `data`.

    All of it is there before the first request: the kernel ends a request with EIO if it must have a page
    made for it while this process is being killed (fs/fuse/dev.c, fuse_dev_do_read; mm/gup.c), and does not
    send it again.
    """

    def __init__(self) -> None:
        # One huge page, if the system has them: disks and copies then meet one piece of memory, not 256.
        self._memory = mmap.mmap(-1, 2 * HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        start = -address % HUGE_PAGE + PAGE
        with contextlib.suppress(OSError):  # before Linux 5.14, and without memory, it comes page by page
            self._memory.madvise(_MADV_POPULATE_WRITE, start - PAGE, MAX_WRITE + 2 * PAGE)
        whole = memoryview(self._memory)
        self.data = whole[start : start + MAX_WRITE + PAGE]
        self.all = whole[start - protocol.WRITE_HEADER_BYTES : start + MAX_WRITE + PAGE]
        self.iov = [self.all]


class Relay:
    """Carries requests and replies until the mount is gone, or something failed that must not be hidden."""

    def __init__(  # noqa: PLR0917  (the parts of a channel)
        self,
        device: Device,
        library: Library,
        handles: HandleTable,
        files: FileSystem,
        nursery: trio.Nursery,
        requests: Requests | None = None,
        memory: Memory | None = None,
    ) -> None:
        self._device = device
        self._library = library
        self._handles = handles
        self._files = files
        self._nursery = nursery
        self._token = trio.lowlevel.current_trio_token()
        self._door = Door()
        self._data = DataPath(handles, self._door.slow, memory)
        self._lock = threading.Lock()
        self._readers = 0
        self._grown_at = 0.0
        self._idle: list[None] = []  # one entry for each reader that waits for a request
        self._requests = requests or Requests()
        self._deferred = 0
        self._failure: BaseException | None = None
        self._replies = Replies(library, self._carry_reply, self._end)
        self.ended = trio.Event()

    def start(self) -> None:
        """Start the threads; the mount serves from here on."""
        for _ in range(READERS_MIN):
            self._add_reader()
        trio.lowlevel.add_instrument(self._replies)

    async def wait(self) -> None:
        """Return when the mount is gone; raise what stopped the relay otherwise."""
        try:
            await self.ended.wait()
        finally:
            trio.lowlevel.remove_instrument(self._replies)
        if self._failure is not None:
            raise self._failure

    # Threads

    def _add_reader(self) -> None:
        with self._lock:
            if self._readers >= READERS_MAX:
                return
            self._readers += 1
            self._grown_at = time.monotonic()
            name = f"reader-{self._readers}"
        self._idle.append(None)
        threading.Thread(target=self._guarded, args=(self._read_requests,), name=name, daemon=True).start()

    def _may_leave(self) -> bool:
        """Whether the calling reader is one too many, and has been for a while; it then is counted out."""
        with self._lock:
            now = time.monotonic()
            if self._readers <= READERS_IDLE or now - self._grown_at < READERS_LEAVE_S:
                return False
            self._readers -= 1
            self._grown_at = now - READERS_LEAVE_S / 2
            return True

    def _guarded(self, body: Callable[[], object]) -> None:
        """Run a thread; unless it merely left, the relay ends with it, and an unknown failure is told."""
        try:
            if body() is _LEFT:
                return
            failure = None
        except BaseException as error:  # noqa: BLE001  (handed to `wait`, which raises it)
            failure = error
        self._end(failure)

    def _end(self, failure: BaseException | None) -> None:
        def end() -> None:
            self._failure = self._failure or failure
            self.ended.set()

        try:
            self._token.run_sync_soon(end)
        except trio.RunFinishedError:
            log.debug("a thread of the relay outlived the event loop")

    def _read_requests(self) -> object:
        """One thread: reads, serves, reads. A reader more whenever none is left to read, up to READERS_MAX.

        Few readers are better than many, for the kernel wakes them in turn, each with cold memory: when more
        than READERS_IDLE have nothing to do for long, the surplus leaves.
        """
        buffers = Buffers()
        idle, door = self._idle, self._door
        while True:
            door.wait()
            try:
                received = os.readv(self._device.descriptor, buffers.iov)
                if not received:
                    return None
            except OSError as error:
                if error.errno in _AGAIN:
                    continue
                if error.errno in _GONE:
                    return None
                raise
            idle.pop()
            if not idle:
                self._add_reader()
            self._handle_request(buffers, received)
            door.served()
            if len(idle) >= READERS_IDLE and not door.leads() and self._may_leave():
                return _LEFT
            idle.append(None)

    def _handle_request(self, buffers: Buffers, received: int) -> None:
        try:
            header = protocol.parse_header(buffers.all, received)
        except ProtocolError as error:
            # Without a trustworthy header there is nobody to answer.
            log.error("the kernel sent what is not a request: %s", error)
            return
        operation = self._data.operations.get(header.opcode)
        request = buffers.all[:received]
        try:
            if operation is None:
                self._route(header, request)
                return
            parts = operation(header, request[protocol.HEADER_BYTES :], buffers.data)
        except Deferred as deferred:
            self._defer(header, bytes(request), deferred.handle)
        except ProtocolError as error:
            log.error("the kernel sent what is not a request: %s", error)
            self._answer_error(header, errno.EIO)
        except OSError as error:
            self._answer_error(header, errno_of(error))
        except OverflowError:  # an offset or a length that fits no system call's argument
            self._answer_error(header, errno.EINVAL)
        else:
            self._device.send(parts)
            if header.opcode == Opcode.FALLOCATE:
                self._data.answered(header)

    def _answer_error(self, header: Header, number: int) -> None:
        if header.opcode not in _NO_REPLY:
            self._device.send_error(header.unique, number)

    # Requests that are not data

    def _route(self, header: Header, request: memoryview) -> None:
        if header.opcode == Opcode.INTERRUPT:
            self._interrupt(header, request)
        elif header.opcode == Opcode.TMPFILE:
            self._start(self._serve_tmpfile, header, bytes(request))
        elif header.opcode == Opcode.DESTROY:
            self._device.send_error(header.unique, 0)
        elif not wellformed.serves(header.opcode):
            # The kernel remembers ENOSYS and does without (locks stay local to this mount, as is wanted).
            self._answer_error(header, errno.ENOSYS)
        else:
            wellformed.check(header, request)
            if self._answer_at_once(header, request):
                return
            if header.opcode not in _NO_REPLY:
                _PID.pack_into(request, PID_OFFSET, self._requests.enter(header).token)
            self._library.ours.send(request)

    def _answer_at_once(self, header: Header, request: memoryview) -> bool:
        """Answer GETATTR or LOOKUP here; False if pyfuse3 must. Two threads less have to wake up for it."""
        if header.opcode == Opcode.GETATTR:
            attributes = self._files.attributes(header.nodeid)
            if attributes is None:
                return False
            body = attr_out(header.nodeid, *attributes)
        elif header.opcode == Opcode.LOOKUP:
            entry = self._files.entry(header.nodeid, bytes(request[protocol.HEADER_BYTES : -1]))
            if entry is None:
                return False
            body = known_entry_out(*entry)
        else:
            return False
        self._device.send(protocol.reply(header.unique, body))
        return True

    def _start(self, task: Callable[..., Awaitable[None]], *arguments: object) -> None:
        """Start a task from any thread. Once the mount is gone nobody waits for its outcome any more.

        What such a task would have undone, the end of the mount undoes (`release_all`).
        """

        def start() -> None:
            if not self.ended.is_set():
                self._nursery.start_soon(task, *arguments)

        self._token.run_sync_soon(start)

    def _interrupt(self, header: Header, request: memoryview) -> None:
        (unique,) = protocol.parse(protocol.INTERRUPT_IN, request)
        waiting = self._requests.find(unique)
        if waiting is not None and waiting.pid and waiting.opcode in _MAY_WAIT:
            self._start(self._pass_interrupt, header.unique, unique, waiting.pid)

    async def _pass_interrupt(self, own: int, unique: int, tid: int) -> None:
        """Tell the keeper; if no signal asks for it, or nothing waits yet, let the kernel send it again.

        The kernel sends an interrupt also when a thread only has work of the kernel to do (io_uring in QEMU).
        """
        if await trio.to_thread.run_sync(proc.interrupted, tid) and self._files.interrupt(tid):
            return
        await trio.sleep(INTERRUPT_RETRY_S)
        if self._requests.find(unique) is not None:
            self._device.send_error(own, errno.EAGAIN)

    async def _serve_tmpfile(self, header: Header, request: bytes) -> None:
        try:
            flags, mode, umask, _ = protocol.parse(protocol.CREATE_IN, request)
            caller = caller_of(header, umask)
            entry, info = await self._files.tmpfile(header.nodeid, mode, flags, umask, caller)
        except pyfuse3.FUSEError as error:
            self._device.send_error(header.unique, error.errno)
            return
        except (OSError, LockfsError) as error:
            self._device.send_error(header.unique, errno_of(error))
            return
        handle = self._handles.find(info.fh)
        open_out = protocol.OPEN_OUT.pack(info.fh, *(_open_reply(handle) if handle else (0, 0)))
        if not self._device.send(protocol.reply(header.unique, entry_out(entry) + open_out)):
            await self._files.abandon(info.fh)
        else:
            self._files.answered(header.unique & ~protocol.RESENT, info.fh)

    # Writes that met a closed gate

    def _defer(self, header: Header, request: bytes, handle: Handle) -> None:
        with self._lock:
            if self._deferred >= DEFERRED_MAX:
                refuse = True
            else:
                refuse = False
                self._deferred += 1
        if refuse:
            self._device.send_error(header.unique, errno.ENOSPC)
        else:
            self._start(self._claim_and_retry, header, request, handle)

    async def _claim_and_retry(self, header: Header, request: bytes, handle: Handle) -> None:
        try:
            if handle.gate is not None and handle.gate.state is GateState.SHUT and handle.gate.refusal:
                raise handle.gate.refusal
            await self._files.claim(handle)
            await trio.to_thread.run_sync(self._retry, header, request)
        except (OSError, LockfsError) as error:
            self._device.send_error(header.unique, errno_of(error))
        finally:
            with self._lock:
                self._deferred -= 1

    def _retry(self, header: Header, request: bytes) -> None:
        """Serve a deferred request once more; a gate that closed again in between refuses it."""
        buffers = Buffers()
        buffers.all[: len(request)] = request
        operation = self._data.operations[header.opcode]
        try:
            parts = operation(header, buffers.all[protocol.HEADER_BYTES : len(request)], buffers.data)
        except Deferred:
            self._device.send_error(header.unique, errno.ENOSPC)
        except (OSError, LockfsError) as error:
            self._answer_error(header, errno_of(error))
        else:
            self._device.send(parts)

    # Replies

    def _carry_reply(self, reply: memoryview) -> None:
        """Bring one reply of pyfuse3's to the device."""
        _, error, unique = protocol.OUT_HEADER.unpack_from(reply)
        number = 0
        request = self._requests.leave(unique)
        if request is not None and request.opcode in _OPENS and not error:
            number = self._complete_open(reply, len(reply))
        wanted = self._device.send([reply])
        if number and not wanted:
            self._start(self._files.abandon, number)
        elif request is not None:
            self._files.answered(request.unique, number if wanted else 0)

    def _complete_open(self, reply: memoryview, size: int) -> int:
        """Put the handle's FOPEN flags and backing id into an open's reply, its last 16 bytes."""
        at = size - protocol.OPEN_OUT.size
        number, _, _ = protocol.OPEN_OUT.unpack_from(reply, at)
        handle = self._handles.find(number)
        if handle is not None:
            protocol.OPEN_OUT.pack_into(reply, at, number, *_open_reply(handle))
            return int(number)
        return 0


def _open_reply(handle: Handle) -> tuple[int, int]:
    return handle.open_flags, handle.backing_id
