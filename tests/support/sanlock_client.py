"""A client of the sanlock daemon in plain Python: its socket protocol, awaited, every call with a deadline.

The structures and numbers are those of sanlock 3.8's client library (sanlock.h, sanlock_sock.h):
native-endian headers of 32 bytes, fixed-size structures behind them.

The daemon kills whoever holds a lease when its lockspace fails, when another host asks for the lease, or
when it is shut down; it knows the holder by the pid that connected. So that this is never the tests' own
process, each registration is made by a small one that stands in for it and hands over the connection.
"""

from __future__ import annotations

import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

CALL_S = 30.0  # for calls that do a little I/O; what may have to wait for a dead host is given its own
JOIN_S = 30.0
STAND_IN_S = 10.0
PAYLOAD_MAX = 1 << 24

_MAGIC, _VERSION = 0x04282010, 1
_OWN_PID = 0xFFFFFFFF
_HEADER = struct.Struct("=8I")
_DISK = struct.Struct("=1024sQII")
_RESOURCE = struct.Struct("=48s48sQQIIII")
_LOCKSPACE = struct.Struct("=48sQI4x")
_HOST = struct.Struct("=QQQII")
_EVENT = struct.Struct("=QQQQ")
_OPTIONS = struct.Struct("=48sII")

_REGISTER, _ADD_LOCKSPACE, _REM_LOCKSPACE, _ACQUIRE, _RELEASE, _INQUIRE = 1, 2, 3, 7, 8, 9
_REQUEST, _WRITE_LOCKSPACE, _WRITE_RESOURCE, _GET_LOCKSPACES, _GET_HOSTS = 11, 18, 19, 22, 23
_OWNERS, _CONVERT, _VERSION_CALL, _SHUTDOWN_WAIT, _SET_EVENT = 24, 27, 28, 29, 32

_RESOURCE_LVER, _RESOURCE_SHARED = 0x1, 0x4
_REMOVE_UNUSED = 0x2
_RELEASE_ALL = 0x1
OWNER_NOWAIT = 0x8  # acquire and convert: -247 rather than wait for a host that may be dying
SECTOR_512, SECTOR_4K = 0x100, 0x200
ALIGN_1M, ALIGN_2M, ALIGN_4M, ALIGN_8M = 0x10, 0x20, 0x40, 0x80
FORCE_KILL, FORCE_GRACEFUL = 1, 2

FREE, LIVE, FAIL, DEAD = 2, 3, 4, 5  # what Host.state may be; 1 is unknown
OWNER_ALIVE, OWNER_DYING, ID_IN_USE = -243, -247, -262
LOST_VERSION, COMMITTED_OTHER, SHARED_RETRIES = -244, -245, -246
AGAIN, BUSY, EXISTS = -11, -16, -17


class SanlockError(Exception):
    """The daemon refused; `code` is its result, a sanlock code (-2xx) or a negative errno."""

    def __init__(self, call: str, code: int) -> None:
        super().__init__(f"{call}: {code}")
        self.code = code


class SanlockGone(Exception):
    """The connection ended: the daemon did, or does not like us."""


@dataclass(frozen=True)
class Lockspace:
    """A lockspace area; `offset` in bytes, `shape` SECTOR_* | ALIGN_* for another than the usual geometry."""

    name: bytes
    path: Path
    offset: int = 0
    shape: int = 0

    def packed(self, host_id: int) -> bytes:
        """The sanlk_lockspace structure."""
        return _LOCKSPACE.pack(self.name, host_id, self.shape) + _disk(self.path, self.offset)


@dataclass(frozen=True)
class Resource:
    """A paxos lease area of `lockspace`; `offset` in bytes."""

    lockspace: bytes
    name: bytes
    path: Path
    offset: int
    shape: int = 0

    def packed(self, *, shared: bool = False, lver: int | None = None, disks: bool = True) -> bytes:
        """The sanlk_resource structure, with its one disk or without."""
        flags = self.shape | (_RESOURCE_SHARED if shared else 0) | (_RESOURCE_LVER if lver is not None else 0)
        head = _RESOURCE.pack(self.lockspace, self.name, lver or 0, 0, 0, 0, flags, 1)
        return head + _disk(self.path, self.offset) if disks else head


def _disk(path: Path, offset: int) -> bytes:
    return _DISK.pack(str(path).encode(), offset, 0, 0)


@dataclass(frozen=True)
class Host:
    """A host as the daemon sees it; `state` is one of FREE, LIVE, FAIL, DEAD, or 1 while unknown."""

    host_id: int
    generation: int
    timestamp: int
    io_timeout: int
    flags: int

    @property
    def state(self) -> int:
        return self.flags & 0xF


@dataclass(frozen=True)
class Owners:
    """Who has a resource according to the storage; `lver` is the version it has been given so far."""

    lver: int
    shared: bool
    hosts: tuple[Host, ...]


@dataclass(frozen=True)
class Held:
    """A lease as a registration's state string tells of it."""

    resource: bytes
    lver: int | None  # not told of a shared one
    shared: bool


@dataclass(frozen=True)
class _Reply:
    result: int
    count: int
    payload: bytes


class _Connection:
    """One socket; one call at a time."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._lock = trio.Lock()

    async def send(
        self, command: int, payload: bytes = b"", *, flags: int = 0, data: int = 0, data2: int = 0
    ) -> None:
        header = _HEADER.pack(_MAGIC, _VERSION, command, flags, _HEADER.size + len(payload), 0, data, data2)
        try:
            await self._stream.send_all(header + payload)
        except trio.BrokenResourceError as error:
            raise SanlockGone(str(error)) from error

    async def call(
        self, name: str, command: int, payload: bytes = b"", *,
        flags: int = 0, data: int = 0, data2: int = 0, timeout: float = CALL_S,
    ) -> _Reply:  # fmt: skip
        """One command and its answer. One that is cut short by cancellation ends the connection.

        Raises:
            SanlockError: the result is negative. SanlockGone. trio.TooSlowError: no answer in `timeout` s.
        """
        async with self._lock:
            try:
                with trio.fail_after(timeout):
                    await self.send(command, payload, flags=flags, data=data, data2=data2)
                    reply = await self._receive()
            except BaseException:
                await trio.aclose_forcefully(self._stream)
                raise
        if reply.result < 0:
            raise SanlockError(name, reply.result)
        return reply

    async def _receive(self) -> _Reply:
        magic, _, _, _, length, _, data, data2 = _HEADER.unpack(await self._exactly(_HEADER.size))
        if magic != _MAGIC or not _HEADER.size <= length <= PAYLOAD_MAX:
            raise SanlockGone(f"no header of sanlock: magic {magic:#x}, length {length}")
        payload = await self._exactly(length - _HEADER.size)
        return _Reply(data - (1 << 32) if data >> 31 else data, data2, payload)

    async def _exactly(self, size: int) -> bytes:
        found = bytearray()
        while len(found) < size:
            try:
                part = await self._stream.receive_some(size - len(found))
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise SanlockGone(str(error)) from error
            if not part:
                raise SanlockGone("the daemon closed the connection")
            found += part
        return bytes(found)

    async def ended(self) -> None:
        """Return when the daemon closes the connection; nothing may be called meanwhile."""
        async with self._lock:
            while await self._stream.receive_some(_HEADER.size):
                pass

    async def close(self) -> None:
        await trio.aclose_forcefully(self._stream)


class SanlockClient:
    """Calls to the daemon behind a socket. Each opens a connection of its own, as the client library does."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[_Connection]:
        connection = _Connection(await trio.open_unix_socket(str(self._socket)))
        try:
            yield connection
        finally:
            await connection.close()

    async def _call(
        self, name: str, command: int, payload: bytes = b"", *,
        flags: int = 0, data: int = 0, data2: int = 0, timeout: float = CALL_S,
    ) -> _Reply:  # fmt: skip
        async with self._connected() as connection:
            return await connection.call(
                name, command, payload, flags=flags, data=data, data2=data2, timeout=timeout
            )

    async def version(self) -> int:
        """The daemon's version, 0x03080500 for 3.8.5."""
        return (await self._call("version", _VERSION_CALL)).count

    async def shutdown(self, *, timeout: float = CALL_S) -> None:
        """End the daemon: it kills every holder, leaves its lockspaces, answers and ends."""
        await self._call("shutdown", _SHUTDOWN_WAIT, data=1, timeout=timeout)

    async def init_lockspace(self, lockspace: Lockspace, *, io_timeout: int) -> None:
        """Write a new lockspace area into a file that is long enough; `io_timeout` in seconds."""
        await self._call("init lockspace", _WRITE_LOCKSPACE, lockspace.packed(0), data2=io_timeout)

    async def init_resource(self, resource: Resource, *, num_hosts: int = 0) -> None:
        """Write a new resource area for `num_hosts` hosts (0: as many as fit)."""
        # The daemon reads the number here, where its own library sends another one, always 0.
        await self._call("init resource", _WRITE_RESOURCE, resource.packed(), data=num_hosts)

    async def add_lockspace(
        self, lockspace: Lockspace, host_id: int, *, io_timeout: int, timeout: float = JOIN_S
    ) -> None:
        """Join as `host_id`: 3 s with an io_timeout of 1, for a free id."""
        payload = lockspace.packed(host_id)
        await self._call("add lockspace", _ADD_LOCKSPACE, payload, data=io_timeout, timeout=timeout)

    async def rem_lockspace(self, lockspace: Lockspace, host_id: int, *, force: bool = False) -> None:
        """Leave. `force` kills the holders at once; without it a lockspace in use is refused (BUSY)."""
        flags = 0 if force else _REMOVE_UNUSED
        await self._call("rem lockspace", _REM_LOCKSPACE, lockspace.packed(host_id), flags=flags)

    async def lockspaces(self) -> list[tuple[bytes, int]]:
        """Name and own host id of each lockspace joined."""
        reply = await self._call("get lockspaces", _GET_LOCKSPACES)
        size = _LOCKSPACE.size + _DISK.size
        found = []
        for at in range(0, reply.count * size, size):
            name, host_id, _ = _LOCKSPACE.unpack_from(reply.payload, at)
            found.append((name.rstrip(b"\0"), host_id))
        return found

    async def hosts(self, lockspace: Lockspace, host_id: int = 0) -> dict[int, Host]:
        """The hosts of a joined lockspace by id, or the one asked for. AGAIN until the first look at them."""
        reply = await self._call("get hosts", _GET_HOSTS, lockspace.packed(host_id))
        return {host.host_id: host for host in _hosts(reply.payload, reply.count)}

    async def owners(self, resource: Resource) -> Owners:
        """Who has the resource, read from the storage."""
        reply = await self._call("read owners", _OWNERS, resource.packed())
        _, _, lver, _, _, _, flags, _ = _RESOURCE.unpack_from(reply.payload)
        hosts = _hosts(reply.payload[-reply.count * _HOST.size :] if reply.count else b"", reply.count)
        return Owners(lver, bool(flags & _RESOURCE_SHARED), tuple(hosts))

    async def request(self, resource: Resource, *, lver: int, mode: int = FORCE_GRACEFUL) -> None:
        """Have the owner's daemon end it: `lver` is the version wanted, one more than the present one."""
        await self._call("request", _REQUEST, resource.packed(lver=lver), data=mode)

    async def set_event(
        self, lockspace: Lockspace, host_id: int, generation: int, *, event: int, data: int = 0
    ) -> None:
        """Tell a host something through the storage."""
        payload = lockspace.packed(0) + _EVENT.pack(host_id, generation, event, data)
        await self._call("set event", _SET_EVENT, payload)

    @asynccontextmanager
    async def register(self) -> AsyncIterator[Registration]:
        """A registration; leaving the block closes it, which releases its leases a few milliseconds later."""
        with _StandIn(self._socket) as stand_in:
            stream = await stand_in.connected()
            connection = _Connection(trio.SocketStream(stream))
            try:
                await connection.send(_REGISTER)
                registration = Registration(connection, stand_in)
                await registration.inquire()  # REGISTER has no answer; this one has, and comes behind it
                yield registration
            finally:
                await connection.close()


def _hosts(payload: bytes, count: int) -> list[Host]:
    return [Host(*_HOST.unpack_from(payload, number * _HOST.size)) for number in range(count)]


# Standard input is the test's socket; the process ends when the test closes it, or is killed.
_STAND_IN = """
import socket, sys
test = socket.socket(fileno=0)
with socket.socket(socket.AF_UNIX) as daemon:
    daemon.connect(sys.argv[1])
    socket.send_fds(test, [b"."], [daemon.fileno()])
test.recv(1)
"""


class _StandIn:
    """The process that the daemon takes for a registration's owner, and kills in its place."""

    def __init__(self, daemon: Path) -> None:
        self._ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-I", "-S", "-c", _STAND_IN, str(daemon)]
            self.process = subprocess.Popen(command, stdin=theirs.fileno())

    async def connected(self) -> trio.socket.SocketType:
        """The connection it made.

        Raises:
            SanlockGone: there is no daemon to connect to; the stand-in has said more on standard error.
        """
        with trio.fail_after(STAND_IN_S):
            await trio.lowlevel.wait_readable(self._ours)
        data, descriptors, _, _ = socket.recv_fds(self._ours, 1, 1)
        if not data:
            raise SanlockGone("the daemon cannot be connected to")
        return trio.socket.from_stdlib_socket(socket.socket(fileno=descriptors[0]))

    def __enter__(self) -> _StandIn:
        return self

    def __exit__(self, *_: object) -> None:
        self._ours.close()
        self.process.kill()
        self.process.wait(STAND_IN_S)


class Registration:
    """A connection on which leases are held: they are released when it closes."""

    def __init__(self, connection: _Connection, stand_in: _StandIn) -> None:
        self._connection = connection
        self._stand_in = stand_in

    @property
    def killed_by(self) -> int | None:
        """The signal by which the daemon has ended the holder, or None."""
        code = self._stand_in.process.poll()
        return None if code is None else -code

    async def acquire(
        self, resource: Resource, *,
        shared: bool = False, nowait: bool = False, lver: int | None = None, owner_name: bytes = b"",
        timeout: float = CALL_S,
    ) -> None:  # fmt: skip
        """Take a lease. Waits for a host that may be dead, 8 * io_timeout + 60 s, unless `nowait`.

        Raises:
            SanlockError: OWNER_ALIVE, AGAIN (shared by others), OWNER_DYING, EXISTS (held here) and others.
        """
        payload = resource.packed(shared=shared, lver=lver) + _OPTIONS.pack(owner_name, 0, 0)
        flags = OWNER_NOWAIT if nowait else 0
        await self._connection.call(
            "acquire", _ACQUIRE, payload, flags=flags, data=1, data2=_OWN_PID, timeout=timeout
        )

    async def release(self, *resources: Resource) -> None:
        """Give back these leases, or without any all that are held."""
        payload = b"".join(resource.packed(disks=False) for resource in resources)
        flags = 0 if resources else _RELEASE_ALL
        await self._connection.call(
            "release", _RELEASE, payload, flags=flags, data=len(resources), data2=_OWN_PID
        )

    async def convert(self, resource: Resource, *, shared: bool, nowait: bool = False) -> None:
        """Make a lease that is held shared or exclusive."""
        payload = resource.packed(shared=shared, disks=False)
        flags = OWNER_NOWAIT if nowait else 0
        await self._connection.call("convert", _CONVERT, payload, flags=flags, data2=_OWN_PID)

    async def inquire(self) -> Sequence[Held]:
        """The leases held. A path with a space in it makes the daemon fail here (-81)."""
        reply = await self._connection.call("inquire", _INQUIRE, data2=_OWN_PID)
        return [_held(word) for word in reply.payload.rstrip(b"\0").split()]

    async def ended(self) -> None:
        """Return when the daemon goes away; nothing else may be called meanwhile."""
        await self._connection.ended()


def _held(state: bytes) -> Held:
    """From LOCKSPACE:NAME:PATH:OFFSET:LVER, or with SH in the last place."""
    words = state.split(b":")
    shared = words[-1] == b"SH"
    return Held(words[1], None if shared else int(words[-1]), shared)
