"""The relay between a kernel made of a socket and a pyfuse3 made of a socket: data, opens, garbage."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lockfs.channel import protocol
from lockfs.channel.device import Device
from lockfs.channel.handles import FOPEN_PASSTHROUGH, Handle, HandleTable
from lockfs.channel.protocol import Opcode
from lockfs.channel.relay import Relay
from lockfs.errors import LeaseUnavailable, WriteRefused
from lockfs.keeper.gate import Gate, GateState
from tests.channel.fake_kernel import FakeKernel
from tests.conftest import ExpectLog

PATIENCE_S = 10.0


class FakeLibrary:
    """pyfuse3's place: `theirs` is what pyfuse3 would read and write."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.theirs.settimeout(PATIENCE_S)

    def close(self) -> None:
        """Close both ends."""
        self.ours.shutdown(socket.SHUT_RDWR)
        self.ours.close()
        self.theirs.close()


class FakeFiles:
    """The mirror's place: records what the relay asks of it."""

    def __init__(self) -> None:
        self.abandoned: list[int] = []
        self.interrupted: list[int] = []
        self.claims = 0
        self.known: dict[int, os.stat_result] = {}
        self.claim_error: Exception | None = None

    async def tmpfile(self, *arguments: object) -> None:
        """There are no unnamed files here."""
        raise OSError(errno.EOPNOTSUPP, "no unnamed files")

    async def abandon(self, number: int) -> None:
        """Record."""
        self.abandoned.append(number)

    def answered(self, unique: int, number: int) -> None:
        pass

    async def claim(self, handle: Handle) -> None:
        """Open the gate or fail, as told."""
        self.claims += 1
        if self.claim_error:
            raise self.claim_error
        assert handle.gate is not None
        handle.gate.set(GateState.OPEN)

    def attributes(self, number: int) -> tuple[os.stat_result, int] | None:
        """Those of `known`, the node numbers that can be told of at once."""
        return (self.known[number], 1) if number in self.known else None

    def entry(self, parent: int, name: bytes) -> tuple[int, int, os.stat_result, int] | None:
        """The node 2, if it is known, for every name."""
        return (2, 5, self.known[2], 0) if 2 in self.known else None

    def interrupt(self, tid: int) -> bool:
        """Record."""
        self.interrupted.append(tid)
        return True


class Rig:
    """A running relay and everything around it."""

    def __init__(self) -> None:
        self.kernel = FakeKernel()
        self.library = FakeLibrary()
        self.files = FakeFiles()
        self.handles = HandleTable()

    def open(self, path: Path, flags: int = os.O_RDWR, gate: GateState = GateState.OPEN) -> Handle:
        """A handle as the mirror would make it."""
        handle = Handle(2, os.open(path, flags), flags, FOPEN_PASSTHROUGH, 7, Gate(gate))
        self.handles.add(handle)
        return handle

    async def call(self, opcode: int, body: bytes) -> tuple[int, bytes]:
        """A request and its reply, off the trio thread."""
        with trio.fail_after(PATIENCE_S):
            return await trio.to_thread.run_sync(self.kernel.call, opcode, body)


@contextlib.asynccontextmanager
async def rig() -> AsyncIterator[Rig]:
    """A relay that ends with the block, every descriptor of it closed."""
    made = Rig()
    async with trio.open_nursery() as nursery:
        relay = Relay(Device(made.kernel.device_fd), made.library, made.handles, made.files, nursery)  # type: ignore[arg-type]
        relay.start()
        try:
            yield made
        finally:
            made.kernel.hang_up()
            with trio.fail_after(PATIENCE_S):
                await relay.wait()
                # The descriptors' numbers are used again once they are closed: nobody may be reading them.
                while any(thread.name.startswith("reader-") for thread in threading.enumerate()):
                    await trio.sleep(0.001)
            nursery.cancel_scope.cancel()
    for handle in made.handles.all():
        os.close(handle.descriptor)
    made.library.close()
    made.kernel.close()


def write_body(handle: Handle, offset: int, data: bytes, size: int | None = None) -> bytes:
    """A WRITE's body."""
    size = len(data) if size is None else size
    return protocol.WRITE_IN.pack(handle.number, offset, size, 0, 0, handle.flags, 0) + data


def read_body(handle: Handle, offset: int, size: int) -> bytes:
    """A READ's body."""
    return protocol.READ_IN.pack(handle.number, offset, size, 0, 0, handle.flags, 0)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A file of 1 MiB, its second half a hole."""
    path = tmp_path / "image"
    path.write_bytes(bytes(range(256)) * 2048)
    os.truncate(path, 1 << 20)
    return path


async def test_write_then_read(image: Path) -> None:
    """What was written through a handle is in the file and is read back."""
    async with rig() as r:
        handle = r.open(image)
        error, answer = await r.call(Opcode.WRITE, write_body(handle, 4096, b"x" * 8192))
        assert (error, struct.unpack("=II", answer)[0]) == (0, 8192)
        assert await r.call(Opcode.READ, read_body(handle, 4095, 3)) == (0, b"\xffxx")
        assert image.read_bytes()[4096 : 4096 + 8192] == b"x" * 8192


async def test_direct_io_is_aligned(image: Path) -> None:
    """Aligned requests on an O_DIRECT handle work, a misaligned one is EINVAL as on the disk."""
    async with rig() as r:
        try:
            handle = r.open(image, os.O_RDWR | os.O_DIRECT)
        except OSError:
            pytest.skip("the file system of the temporary directory has no O_DIRECT")
        error, _ = await r.call(Opcode.WRITE, write_body(handle, 8192, b"d" * 4096))
        assert error == 0
        assert await r.call(Opcode.READ, read_body(handle, 8192, 4096)) == (0, b"d" * 4096)
        assert (await r.call(Opcode.READ, read_body(handle, 1, 1)))[0] == errno.EINVAL


async def test_data_requests(image: Path) -> None:
    """fsync, fallocate, lseek, copy_file_range and flush do what they do on the file."""
    async with rig() as r:
        handle = r.open(image)
        fsync = protocol.FSYNC_IN.pack(handle.number, 1, 0)
        assert await r.call(Opcode.FSYNC, fsync) == (0, b"")
        hole = protocol.LSEEK_IN.pack(handle.number, 0, os.SEEK_HOLE, 0)
        assert struct.unpack("=Q", (await r.call(Opcode.LSEEK, hole))[1])[0] == 1 << 19
        punch = protocol.FALLOCATE_IN.pack(handle.number, 0, 65536, 0x03, 0)
        assert (await r.call(Opcode.FALLOCATE, punch))[0] == 0
        assert image.read_bytes()[:65536] == bytes(65536)
        nonsense = protocol.FALLOCATE_IN.pack(handle.number, 0, 65536, 0x4000, 0)
        assert (await r.call(Opcode.FALLOCATE, nonsense))[0] == errno.EOPNOTSUPP
        copy = protocol.COPY_IN.pack(handle.number, 65536, 2, handle.number, 1 << 19, 4096, 0)
        error, answer = await r.call(Opcode.COPY_FILE_RANGE_64, copy)
        assert (error, struct.unpack("=Q", answer)[0]) == (0, 4096)
        error, answer = await r.call(Opcode.COPY_FILE_RANGE, copy)
        assert (error, struct.unpack("=II", answer)[0]) == (0, 4096)
        assert (await r.call(Opcode.FLUSH, struct.pack("=QIIQ", handle.number, 0, 0, 0)))[0] == 0


async def test_append_flag_set_later_is_followed(image: Path) -> None:
    """After F_SETFL O_APPEND on the caller's side, a write lands at the end."""
    async with rig() as r:
        handle = r.open(image)
        body = protocol.WRITE_IN.pack(handle.number, 0, 3, 0, 0, os.O_RDWR | os.O_APPEND, 0) + b"end"
        assert (await r.call(Opcode.WRITE, body))[0] == 0
        assert image.read_bytes()[-3:] == b"end"


async def test_set_id_bits_go_when_told(image: Path) -> None:
    """A write that the kernel marks clears set-user-id and executable set-group-id bits."""
    image.chmod(0o6777)
    async with rig() as r:
        handle = r.open(image)
        body = protocol.WRITE_IN.pack(handle.number, 0, 1, 4, 0, handle.flags, 0) + b"x"
        assert (await r.call(Opcode.WRITE, body))[0] == 0
        assert image.stat().st_mode & 0o7777 == 0o777


async def test_asking_gate_is_claimed_once_and_the_write_repeated(image: Path) -> None:
    """A write that meets an asking gate lands after the keeper opened it."""
    async with rig() as r:
        handle = r.open(image, gate=GateState.ASK)
        assert (await r.call(Opcode.WRITE, write_body(handle, 0, b"late")))[0] == 0
        assert r.files.claims == 1
        assert image.read_bytes()[:4] == b"late"


async def test_refused_claim_is_no_space(image: Path) -> None:
    """A lease that cannot be had is ENOSPC, and nothing was written."""
    before = image.read_bytes()
    async with rig() as r:
        handle = r.open(image, gate=GateState.ASK)
        r.files.claim_error = LeaseUnavailable("held elsewhere")
        assert (await r.call(Opcode.WRITE, write_body(handle, 0, b"no")))[0] == errno.ENOSPC
        assert image.read_bytes() == before


async def test_shut_gate_refuses_every_change(image: Path) -> None:
    """Write, fallocate and copy into a shut handle fail with the gate's refusal; reading works."""
    before = image.read_bytes()
    async with rig() as r:
        handle = r.open(image)
        assert handle.gate is not None
        handle.gate.set(GateState.SHUT, WriteRefused("a manager's handle"))
        for opcode, body in (
            (Opcode.WRITE, write_body(handle, 0, b"no")),
            (Opcode.FALLOCATE, protocol.FALLOCATE_IN.pack(handle.number, 0, 4096, 3, 0)),
            (Opcode.COPY_FILE_RANGE, protocol.COPY_IN.pack(handle.number, 0, 2, handle.number, 8192, 10, 0)),
        ):
            assert (await r.call(opcode, body))[0] == errno.EROFS
        assert (await r.call(Opcode.READ, read_body(handle, 0, 1)))[0] == 0
        assert image.read_bytes() == before
        assert handle.gate.inside == 0


async def test_open_reply_carries_the_backing_file(image: Path) -> None:
    """pyfuse3's reply to an open leaves with the handle's flags and backing id."""
    async with rig() as r:
        handle = r.open(image)
        unique = r.kernel.send(Opcode.OPEN, struct.pack("=II", os.O_RDWR, 0), nodeid=2)
        await trio.to_thread.run_sync(r.library.theirs.recv, 4096)
        plain = protocol.OPEN_OUT.pack(handle.number, 0, 0)
        r.library.theirs.send(protocol.OUT_HEADER.pack(32, 0, unique) + plain)
        got, error, body = await trio.to_thread.run_sync(r.kernel.receive)
        assert (got, error) == (unique, 0)
        assert protocol.OPEN_OUT.unpack(body) == (handle.number, FOPEN_PASSTHROUGH, 7)


async def test_attributes_are_told_at_once_or_asked_for(image: Path) -> None:
    """GETATTR is answered where it arrived if the mirror can tell; otherwise pyfuse3 gets it."""
    async with rig() as r:
        r.files.known[2] = os.stat(image)
        unique = r.kernel.send(Opcode.GETATTR, bytes(16), nodeid=2)
        got, error, body = await trio.to_thread.run_sync(r.kernel.receive)
        assert (got, error) == (unique, 0)
        assert protocol.ATTR_OUT.unpack_from(body) == (1, 0, 0)
        number, size, *_ = protocol.ATTR.unpack_from(body, protocol.ATTR_OUT.size)
        assert (number, size) == (2, image.stat().st_size)
        unique = r.kernel.send(Opcode.LOOKUP, b"name\0")
        got, error, body = await trio.to_thread.run_sync(r.kernel.receive)
        assert (got, error) == (unique, 0)
        assert protocol.ENTRY_OUT.unpack_from(body) == (2, 5, 0, 0, 0, 0)
        r.kernel.send(Opcode.GETATTR, bytes(16), nodeid=3)
        request = await trio.to_thread.run_sync(r.library.theirs.recv, 4096)
        assert protocol.parse_header(memoryview(request), len(request)).nodeid == 3


async def test_nothing_is_started_once_the_mount_is_gone() -> None:
    """What a thread asks for after the end is dropped: the nursery may be closed by then."""
    kernel, library, started = FakeKernel(), FakeLibrary(), []

    async def task() -> None:
        started.append(True)

    async with trio.open_nursery() as nursery:
        relay = Relay(Device(kernel.device_fd), library, HandleTable(), FakeFiles(), nursery)  # type: ignore[arg-type]
        relay.ended.set()
    relay._start(task)
    await trio.testing.wait_all_tasks_blocked()
    assert not started
    library.close()
    kernel.close()


async def test_absurd_numbers_are_refused(image: Path) -> None:
    """Offsets beyond what a file can have are EINVAL, and the relay goes on."""
    async with rig() as r:
        handle = r.open(image)
        far = 2**64 - 1
        assert (await r.call(Opcode.READ, read_body(handle, far, 1)))[0] == errno.EINVAL
        assert (await r.call(Opcode.WRITE, write_body(handle, far, b"x")))[0] == errno.EINVAL
        allocate = protocol.FALLOCATE_IN.pack(handle.number, far, far, 0, 0)
        assert (await r.call(Opcode.FALLOCATE, allocate))[0] == errno.EINVAL
        assert (await r.call(Opcode.READ, read_body(handle, 0, 1)))[0] == 0


async def test_interrupt_reaches_the_waiting_open(image: Path) -> None:
    """An INTERRUPT names the thread whose open waits; one for nothing under way is dropped."""
    async with rig() as r:
        unique = r.kernel.send(Opcode.OPEN, struct.pack("=II", os.O_RDWR, 0), nodeid=2, pid=4711)
        await trio.to_thread.run_sync(r.library.theirs.recv, 4096)
        r.kernel.send(Opcode.INTERRUPT, struct.pack("=Q", 999999))
        r.kernel.send(Opcode.INTERRUPT, struct.pack("=Q", unique))
        with trio.fail_after(PATIENCE_S):
            while not r.files.interrupted:
                await trio.sleep(0.001)
        assert r.files.interrupted == [4711]


@given(
    messages=st.lists(
        st.one_of(
            st.binary(max_size=300).map(lambda data: ("raw", 0, data)),
            st.tuples(st.just("ok"), st.integers(0, 80), st.binary(max_size=200)),
            st.tuples(st.just("fh"), st.sampled_from(sorted(Opcode)), st.binary(max_size=120)),
        ),
        max_size=20,
    )
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_garbage_is_answered_and_leaves_nothing(
    tmp_path: Path, messages: list[tuple[str, int, bytes]], expect_log: ExpectLog
) -> None:
    """Any messages at all: the relay goes on serving, its gate is empty and no descriptor stays."""
    expect_log("is not a request", None)
    image = tmp_path / "image"
    image.write_bytes(bytes(65536))

    async def main() -> None:
        async with rig() as r:
            handle = r.open(image)
            for kind, opcode, data in messages:
                if kind == "raw" and data:
                    r.kernel.send_raw(data)
                elif kind == "ok":
                    r.kernel.send(opcode, data)
                elif kind == "fh":
                    r.kernel.send(opcode, struct.pack("=Q", handle.number) + data)
            error, _ = await r.call(Opcode.FLUSH, struct.pack("=QIIQ", handle.number, 0, 0, 0))
            assert error == 0
            with trio.fail_after(PATIENCE_S):
                while handle.gate is not None and handle.gate.inside:
                    await trio.sleep(0.001)

    before = len(os.listdir("/proc/self/fd"))
    trio.run(main)
    assert len(os.listdir("/proc/self/fd")) == before
