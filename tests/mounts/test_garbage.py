"""Any messages at all into the whole stack, pyfuse3 and mirror included: errors, no crash, no leak."""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pyfuse3
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lockfs.backends.nop import NopBackend
from lockfs.channel.device import Device
from lockfs.channel.handles import HandleTable
from lockfs.channel.library import Library
from lockfs.channel.protocol import Opcode
from lockfs.channel.relay import Relay
from lockfs.keeper.keeper import Keeper
from lockfs.keeper.policy import Policy
from lockfs.mirror.mirror import Mirror
from lockfs.mirror.modes import IoMode
from tests.channel.fake_kernel import FakeKernel
from tests.conftest import ExpectLog

PATIENCE_S = 20.0
LOOKUP, GETATTR, STATFS, SETXATTR = 1, 3, 17, 21
NAMES = st.sampled_from([b"image", b"dir", b".", b"..", b".lockfs", b"", b"a/b", b"x" * 300, b"\xff\xfe"])
NUMBERS = st.one_of(st.integers(0, 8), st.integers(0, 2**64 - 1))


def _shaped(opcode: int, fixed: int, strings: int) -> st.SearchStrategy[tuple[int, int, bytes]]:
    names = st.lists(NAMES, min_size=strings, max_size=strings).map(lambda n: b"".join(x + b"\0" for x in n))
    body = st.tuples(st.binary(min_size=fixed, max_size=fixed), names).map(b"".join)
    return st.tuples(st.just(opcode), NUMBERS, body)


MESSAGES = st.one_of(
    st.tuples(st.integers(0, 70), NUMBERS, st.binary(max_size=200)),
    *(
        _shaped(opcode, fixed, strings)
        for opcode, fixed, strings in (
            (1, 0, 1), (2, 8, 0), (3, 16, 0), (4, 88, 0), (5, 0, 0), (6, 0, 2), (8, 16, 1), (9, 8, 1),
            (10, 0, 1), (11, 0, 1), (12, 8, 2), (13, 8, 1), (14, 8, 0), (17, 0, 0), (18, 24, 0), (22, 8, 1),
            (23, 8, 0), (24, 0, 1), (27, 8, 0), (29, 24, 0), (30, 16, 0), (35, 16, 1), (44, 40, 0),
            (45, 16, 2), (51, 16, 1),
        )
    ),
)  # fmt: skip


class NoPassthrough(Device):
    """A device that never had an INIT; nothing is registered."""

    def invalidate(self, nodeid: int) -> None:
        """Nothing is cached on the far side."""


@contextlib.asynccontextmanager
async def stack(store_fd: int) -> AsyncIterator[tuple[FakeKernel, Mirror]]:
    """Everything of a mount but the kernel."""
    kernel, handles = FakeKernel(), HandleTable()
    device = NoPassthrough(kernel.device_fd)
    policy = Policy(wait=0.0, handover_wait=0.0)
    mirror = Mirror(store_fd, handles, device, io=IoMode.AUTO, policy=policy)
    mirror.keeper = Keeper(NopBackend(), policy, "host", surroundings=mirror.surroundings)
    library = Library()
    library.attach(mirror)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pyfuse3.main, 1, 100)
        library.greet()
        await trio.to_thread.run_sync(library.await_greeting)
        relay = Relay(device, library, handles, mirror, nursery)
        relay.start()
        try:
            yield kernel, mirror
        finally:
            kernel.hang_up()
            with trio.fail_after(PATIENCE_S):
                await relay.wait()
                # The descriptors' numbers are used again once they are closed: nobody may be reading them.
                while any(thread.name.startswith("reader-") for thread in threading.enumerate()):
                    await trio.sleep(0.001)
            pyfuse3.terminate()
            nursery.cancel_scope.cancel()
    await mirror.release_all()
    mirror.close()
    library.close()
    pyfuse3.close(unmount=False)
    kernel.close()


@given(messages=st.lists(MESSAGES, max_size=40))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_messages(tmp_path: Path, expect_log: ExpectLog, messages: list[tuple[int, int, bytes]]) -> None:
    """After any messages the stack still answers, and in the end it has nothing open."""
    expect_log("is not open|is not a request|not known", None)
    store = tmp_path / f"store{len(os.listdir(tmp_path))}"
    store.mkdir()
    (store / "image").write_bytes(bytes(4096))
    (store / "dir").mkdir()

    async def main() -> None:
        store_fd = os.open(store, os.O_PATH | os.O_DIRECTORY)
        try:
            async with stack(store_fd) as (kernel, _):
                for opcode, nodeid, body in messages:
                    if opcode not in (Opcode.INIT, Opcode.DESTROY):
                        kernel.send(opcode, body, nodeid)
                with trio.fail_after(PATIENCE_S):
                    error, _ = await trio.to_thread.run_sync(kernel.call, STATFS, b"")
                assert error == 0
        finally:
            os.close(store_fd)

    before = len(os.listdir("/proc/self/fd"))
    trio.run(main)
    assert len(os.listdir("/proc/self/fd")) == before


def test_requests_are_served_in_the_stack(tmp_path: Path) -> None:
    """A look-up, attributes and an unknown inode through the same stack, as a check of the rig itself."""
    (tmp_path / "image").write_bytes(bytes(4096))

    async def main() -> None:
        store_fd = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)
        try:
            async with stack(store_fd) as (kernel, mirror):
                error, entry = await trio.to_thread.run_sync(kernel.call, LOOKUP, b"image\0")
                assert error == 0
                (nodeid,) = struct.unpack_from("=Q", entry)
                assert nodeid == (tmp_path / "image").stat().st_ino
                error, _ = await trio.to_thread.run_sync(kernel.call, GETATTR, bytes(16), nodeid)
                assert error == 0
                error, _ = await trio.to_thread.run_sync(kernel.call, GETATTR, bytes(16), 4242424242)
                assert error == errno.ESTALE
                value = struct.pack("=II", 2, 0) + b"user.lockfs.pid\0" + b"no"
                error, _ = await trio.to_thread.run_sync(kernel.call, SETXATTR, value, nodeid)
                assert error == errno.EPERM
                assert mirror.statistics().lookups == 1
        finally:
            os.close(store_fd)

    trio.run(main)
