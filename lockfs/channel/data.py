"""The data path in user space: requests on file contents, served on the thread that read them.

Each function takes one parsed request and does its system call on the handle's own descriptor, which was
opened with the caller's flags, so that O_DIRECT, O_SYNC and errors mean what they mean on the bare file.
Every change of data passes the handle's gate first: a gate that is not open makes `Deferred`, and the
relay lets the keeper decide outside this thread.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable

from lockfs.backends.base import Forgetful, Memory
from lockfs.channel import protocol
from lockfs.channel.handles import Handle, HandleTable
from lockfs.channel.protocol import Header, Opcode, ProtocolError
from lockfs.keeper.gate import Gate, GateState
from lockfs.linux import calls

COPY_BYTES_MAX = 0x7FFFF000  # the kernel's own bound for one transfer
SMALL_BYTES = 64 << 10  # more than that is worth a second thread, even from memory
_SHIFTING = 0x08 | 0x20  # FALLOC_FL_COLLAPSE_RANGE, FALLOC_FL_INSERT_RANGE
_SYNCHRONOUS = os.O_DIRECT | os.O_SYNC | os.O_DSYNC
_CHANGEABLE = os.O_APPEND | os.O_DIRECT | os.O_NONBLOCK | os.O_NOATIME  # fcntl(2), F_SETFL

Reply = list[bytes | memoryview]


class Deferred(Exception):
    """A change met a gate that asks or is shut; the keeper must be heard before it may be tried again."""

    def __init__(self, handle: Handle) -> None:
        super().__init__()
        self.handle = handle


class DataPath:
    """Serves data requests. Stateless but for the handle table, so any number of threads may use it.

    A request that is sent again after a worker was killed is done again, but for what must not be done twice.

    `slow` is called, on the thread of the request, before anything that may wait for a disk or a server.
    """

    def __init__(self, handles: HandleTable, slow: Callable[[], None], memory: Memory | None = None) -> None:
        self._handles = handles
        self._slow = slow
        self._memory = memory or Forgetful()
        self.operations: dict[int, Callable[[Header, memoryview, memoryview], Reply]] = {
            Opcode.READ: self._read,
            Opcode.WRITE: self._write,
            Opcode.FLUSH: self._flush,
            Opcode.FSYNC: self._fsync,
            Opcode.FALLOCATE: self._fallocate,
            Opcode.LSEEK: self._lseek,
            Opcode.COPY_FILE_RANGE: self._copy,
            Opcode.COPY_FILE_RANGE_64: self._copy,
        }

    def _handle(self, number: int) -> Handle:
        handle = self._handles.find(number)
        if handle is None:
            raise OSError(errno.EBADF, "no such handle")
        return handle

    def _read(self, header: Header, body: memoryview, room: memoryview) -> Reply:
        number, offset, size, _, _, flags, _ = protocol.parse(protocol.READ_IN, body, 0)
        handle = self._handle(number)
        if size > len(room):
            raise ProtocolError(f"a read of {size} bytes exceeds what was negotiated")
        if flags != handle.flags:
            _adapt(handle, flags)
        target = room[:size]
        if size > SMALL_BYTES or handle.flags & os.O_DIRECT or not _peek(handle, target, offset):
            self._slow()
            target = target[: os.preadv(handle.descriptor, [target], offset)]
        return protocol.reply(header.unique, target)

    def _write(self, header: Header, body: memoryview, room: memoryview) -> Reply:
        number, offset, size, write_flags, _, flags, _ = protocol.parse(protocol.WRITE_IN, body, 0)
        handle = self._handle(number)
        if header.length != protocol.WRITE_HEADER_BYTES + size or size > len(room):
            raise ProtocolError(f"a write of {size} bytes came with {header.length} bytes")
        if flags != handle.flags:
            _adapt(handle, flags)
        if size > SMALL_BYTES or handle.flags & _SYNCHRONOUS:
            self._slow()
        if (
            handle.flags & os.O_APPEND
            and header.unique & protocol.RESENT
            and _is_there(handle, room[:size], offset)
        ):
            return protocol.reply(header.unique, protocol.WRITE_OUT.pack(size, 0))
        gate = _pass(handle)
        try:
            count = os.pwritev(handle.descriptor, [room[:size]], offset)
            if write_flags & protocol.WRITE_KILL_SUIDGID:
                _drop_privilege_bits(handle.descriptor)
        finally:
            gate.leave()
        return protocol.reply(header.unique, protocol.WRITE_OUT.pack(count, 0))

    def _flush(self, header: Header, body: memoryview, room: memoryview) -> Reply:
        """Close a duplicate: network file systems write back, and report errors, when a descriptor closes."""
        (number,) = protocol.parse(protocol.FH_IN, body, 0)
        handle = self._handle(number)
        self._slow()
        if handle.writable:
            os.close(os.dup(handle.descriptor))
        return protocol.reply(header.unique)

    def _fsync(self, header: Header, body: memoryview, room: memoryview) -> Reply:
        number, flags, _ = protocol.parse(protocol.FSYNC_IN, body, 0)
        sync = os.fdatasync if flags & protocol.FSYNC_DATA_ONLY else os.fsync
        self._slow()
        sync(self._handle(number).descriptor)
        return protocol.reply(header.unique)

    def _fallocate(self, header: Header, body: memoryview, room: memoryview) -> Reply:
        number, offset, length, mode, _ = protocol.parse(protocol.FALLOCATE_IN, body, 0)
        handle = self._handle(number)
        self._slow()
        gate = _pass(handle)
        try:
            if mode & _SHIFTING:
                self._shift(header, handle.descriptor, (mode, offset, length))
            else:
                calls.fallocate(handle.descriptor, mode, offset, length)
        finally:
            gate.leave()
        return protocol.reply(header.unique)

    def _shift(self, header: Header, descriptor: int, what: tuple[int, int, int]) -> None:
        """Take a range out of the file, or put one in: once, though it is sent again. The size tells."""
        key = f"shift:{header.unique & ~protocol.RESENT}"
        said = self._memory.get(key) if header.unique & protocol.RESENT else None
        size = os.fstat(descriptor).st_size
        if said is not None and said != size:
            return
        self._memory.set(key, size)
        calls.fallocate(descriptor, *what)

    def answered(self, header: Header) -> None:
        """The answer is at the kernel: the request will not be sent again."""
        self._memory.remove(f"shift:{header.unique & ~protocol.RESENT}")

    def _lseek(self, header: Header, body: memoryview, room: memoryview) -> Reply:
        number, offset, whence, _ = protocol.parse(protocol.LSEEK_IN, body, 0)
        self._slow()
        found = os.lseek(self._handle(number).descriptor, _signed(offset), whence)
        return protocol.reply(header.unique, protocol.LSEEK_OUT.pack(found))

    def _copy(self, header: Header, body: memoryview, room: memoryview) -> Reply:
        source, at, _, target, to, length, _ = protocol.parse(protocol.COPY_IN, body, 0)
        reader, writer = self._handle(source), self._handle(target)
        self._slow()
        gate = _pass(writer)
        try:
            count = os.copy_file_range(
                reader.descriptor, writer.descriptor, min(length, COPY_BYTES_MAX), at, to
            )
        finally:
            gate.leave()
        wide = header.opcode == Opcode.COPY_FILE_RANGE_64
        body_out = protocol.LSEEK_OUT.pack(count) if wide else protocol.WRITE_OUT.pack(count, 0)
        return protocol.reply(header.unique, body_out)


def _is_there(handle: Handle, data: memoryview, offset: int) -> bool:
    """Whether the file has these data where an append should have put them: a former worker did it."""
    try:
        with open(f"/proc/self/fd/{handle.descriptor}", "rb") as file:
            return os.pread(file.fileno(), len(data), offset) == data
    except OSError:
        return False


def _peek(handle: Handle, target: memoryview, offset: int) -> bool:
    """Read what is wanted from memory if all of it is there; False if the storage must be asked."""
    if not handle.peeks:
        return False
    try:
        return os.preadv(handle.descriptor, [target], offset, os.RWF_NOWAIT) == len(target)
    except OSError as error:
        handle.peeks = error.errno != errno.EOPNOTSUPP
        return False


def _pass(handle: Handle) -> Gate:
    """Enter the handle's gate; the caller leaves it when the change has ended.

    Raises:
        Deferred: the gate is not open.
        OSError: EBADF, the handle cannot change data.
    """
    if handle.gate is None:
        raise OSError(errno.EBADF, "not open for writing")
    if handle.gate.enter() is not GateState.OPEN:
        raise Deferred(handle)
    return handle.gate


def _adapt(handle: Handle, flags: int) -> None:
    """Follow what F_SETFL changed on the caller's descriptor since the open or the last request."""
    if (flags ^ handle.flags) & _CHANGEABLE:
        now = fcntl.fcntl(handle.descriptor, fcntl.F_GETFL)
        fcntl.fcntl(handle.descriptor, fcntl.F_SETFL, now & ~_CHANGEABLE | flags & _CHANGEABLE)
    handle.flags = flags


def _drop_privilege_bits(descriptor: int) -> None:
    """What a write does to set-id bits; ours has CAP_FSETID, so the kernel below does not (KILLPRIV_V2)."""
    mode = os.fstat(descriptor).st_mode
    kept = mode & ~stat.S_ISUID
    if mode & stat.S_IXGRP:
        kept &= ~stat.S_ISGID
    if kept != mode:
        os.fchmod(descriptor, stat.S_IMODE(kept))


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
