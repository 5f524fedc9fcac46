"""Calls that do not come back in time: who returns when, what lands, what stays open, who is not disturbed.

Time is a clock that moves only when a test says so; threads are met by events.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from lockfs.errors import SetupError
from lockfs.paxos.seams import DiskError, DiskTimeout
from lockfs.storage.buffers import Buffers
from lockfs.storage.disk import DirectDisk

from .conftest import OpenDisk, all_threads_ended, descriptors_of, sector
from .fakes import BuffersReusedAtOnce, FaultyIO, Held

TIMEOUT_S = 10.0
LONG_S = 1000.0
LATE = b"\xee" * 512
OTHER = b"\x11" * 512


async def times_out(call: Awaitable[object], held: Held, clock: MockClock) -> DiskTimeout:
    """Let `call`, which has TIMEOUT_S, get stuck and its time run out. It returns just then."""
    caught: list[DiskTimeout] = []
    start = trio.current_time()

    async def attempt() -> None:
        with pytest.raises(DiskTimeout) as info:
            await call
        assert trio.current_time() == start + TIMEOUT_S
        caught.append(info.value)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(attempt)
        await held.entered()
        assert not caught
        clock.jump(TIMEOUT_S)
    return caught[0]


async def test_a_stuck_call_returns_at_its_deadline(
    open_disk: OpenDisk, lease_file: Path, faults: FaultyIO, mock_clock: MockClock
) -> None:
    disk = await open_disk(io=faults)
    write, read = faults.hold("pwritev", 512), faults.hold("preadv", 0)
    error = await times_out(disk.write(512, LATE, TIMEOUT_S), write, mock_clock)
    assert error.number == errno.ETIMEDOUT
    assert str(error) == f"Writing 512 bytes at byte 512 of {lease_file} did not end within 10 s."
    assert disk.stuck == 1
    await times_out(disk.read(0, 512, TIMEOUT_S), read, mock_clock)
    assert disk.stuck == 2
    assert await disk.read(1024, 512, TIMEOUT_S) == sector(2)


# --- the buffer of a late write


async def late_write_among_others(disk: DirectDisk, path: Path, faults: FaultyIO, clock: MockClock) -> bytes:
    """What a late write puts into sector 1 after others used the disk meanwhile."""
    held = faults.hold("pwritev", 512)
    await times_out(disk.write(512, LATE, TIMEOUT_S), held, clock)
    for number in range(8, 24):
        await disk.write(number * 512, OTHER, LONG_S)
        assert await disk.read(number * 512, 512, LONG_S) == OTHER
    async with trio.open_nursery() as nursery:
        for number in range(8, 24):
            nursery.start_soon(disk.read, number * 512, 512, LONG_S)
    assert path.read_bytes()[512:1024] == sector(1)
    held.let_go()
    await disk.close()
    await all_threads_ended()
    return path.read_bytes()[512:1024]


async def test_a_late_write_lands_with_its_own_bytes(
    open_disk: OpenDisk, lease_file: Path, faults: FaultyIO, mock_clock: MockClock
) -> None:
    disk = await open_disk(io=faults)
    assert await late_write_among_others(disk, lease_file, faults, mock_clock) == LATE


async def test_that_test_finds_a_buffer_lent_twice(
    open_disk: OpenDisk, lease_file: Path, faults: FaultyIO, mock_clock: MockClock
) -> None:
    disk = await open_disk(io=faults, buffers=BuffersReusedAtOnce())
    assert await late_write_among_others(disk, lease_file, faults, mock_clock) == OTHER


async def test_a_late_read_disturbs_no_later_one(
    open_disk: OpenDisk, faults: FaultyIO, mock_clock: MockClock
) -> None:
    disk = await open_disk(io=faults, places=2)
    held, second = faults.hold("preadv", 512), faults.hold("preadv", 1024)
    await times_out(disk.read(512, 512, TIMEOUT_S), held, mock_clock)
    answers: list[bytes] = []

    async def read_second() -> None:
        answers.append(await disk.read(1024, 512, LONG_S))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read_second)
        await second.entered()
        held.let_go()
        assert await disk.read(1536, 512, LONG_S) == sector(3)  # in the place of the late one, which is over
        second.let_go()
    assert answers == [sector(2)]
    assert disk.stuck == 0


# --- order


async def lands_in_order(disk: DirectDisk, lease_file: Path, faults: FaultyIO, mock_clock: MockClock) -> None:
    """A write that timed out lands before the next one of its sector, however late."""
    held = faults.hold("pwritev", 512)
    await times_out(disk.write(512, LATE, TIMEOUT_S), held, mock_clock)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(disk.write, 512, OTHER, LONG_S)
        await disk.write(1024, OTHER, LONG_S)  # another sector waits for nobody
        held.let_go()
    assert await disk.read(512, 512, LONG_S) == OTHER


async def test_writes_of_a_sector_land_in_order(
    open_disk: OpenDisk, lease_file: Path, faults: FaultyIO, mock_clock: MockClock
) -> None:
    await lands_in_order(await open_disk(io=faults), lease_file, faults, mock_clock)


async def test_a_disk_that_keeps_no_order_is_noticed(
    open_disk: OpenDisk,
    lease_file: Path,
    faults: FaultyIO,
    mock_clock: MockClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def at_once(self: DirectDisk, *arguments: object) -> None:
        return

    monkeypatch.setattr(DirectDisk, "_after_earlier", at_once)
    disk = await open_disk(io=faults)
    held = faults.hold("pwritev", 512)
    await times_out(disk.write(512, LATE, TIMEOUT_S), held, mock_clock)
    await disk.write(512, OTHER, LONG_S)
    held.let_go()
    await disk.close()
    await all_threads_ended()
    assert lease_file.read_bytes()[512:1024] == LATE


async def reads_what_lands_late(disk: DirectDisk, faults: FaultyIO, mock_clock: MockClock) -> None:
    """What is read of a sector does not become untrue by a write that this program had begun before."""
    held = faults.hold("pwritev", 512)
    await times_out(disk.write(512, LATE, TIMEOUT_S), held, mock_clock)
    answers: list[bytes] = []

    async def read_both() -> None:
        answers.append(await disk.read(0, 1024, LONG_S))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read_both)
        assert await disk.read(1024, 512, LONG_S) == sector(2)  # another sector waits for nobody
        held.let_go()
    assert answers == [sector(0) + LATE]


async def test_a_read_waits_for_a_late_write(
    open_disk: OpenDisk, faults: FaultyIO, mock_clock: MockClock
) -> None:
    await reads_what_lands_late(await open_disk(io=faults), faults, mock_clock)


async def test_a_read_that_does_not_wait_is_noticed(
    open_disk: OpenDisk, faults: FaultyIO, mock_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def at_once(self: DirectDisk, *arguments: object) -> None:
        return

    monkeypatch.setattr(DirectDisk, "_after_earlier", at_once)
    with pytest.raises(AssertionError):
        await reads_what_lands_late(await open_disk(io=faults), faults, mock_clock)


async def test_a_read_waits_in_vain_for_a_write_that_never_lands(
    open_disk: OpenDisk, faults: FaultyIO, mock_clock: MockClock
) -> None:
    disk = await open_disk(io=faults)
    held = faults.hold("pwritev", 512)
    await times_out(disk.write(512, LATE, TIMEOUT_S), held, mock_clock)
    async with trio.open_nursery() as nursery:

        async def second() -> None:
            with pytest.raises(DiskTimeout, match="earlier write"):
                await disk.read(512, 512, 2.0)

        nursery.start_soon(second)
        await wait_all_tasks_blocked()
        mock_clock.jump(2.0)
    held.let_go()


async def test_a_write_waits_in_vain_for_one_that_never_lands(
    open_disk: OpenDisk, lease_file: Path, faults: FaultyIO, mock_clock: MockClock
) -> None:
    disk = await open_disk(io=faults)
    held = faults.hold("pwritev", 512)
    await times_out(disk.write(512, LATE, TIMEOUT_S), held, mock_clock)
    async with trio.open_nursery() as nursery:

        async def second() -> None:
            with pytest.raises(DiskTimeout, match="earlier write"):
                await disk.write(512, OTHER, 2.0)

        nursery.start_soon(second)
        await wait_all_tasks_blocked()
        mock_clock.jump(2.0)
    held.let_go()
    await disk.close()
    await all_threads_ended()
    assert lease_file.read_bytes()[512:1024] == LATE


# --- places


async def test_without_a_place_a_call_waits_until_its_own_deadline(
    open_disk: OpenDisk, lease_file: Path, faults: FaultyIO, mock_clock: MockClock
) -> None:
    disk = await open_disk(io=faults, places=2)
    held = [faults.hold("pwritev", 512), faults.hold("pwritev", 2048)]
    for one, offset in zip(held, (512, 2048), strict=True):
        await times_out(disk.write(offset, LATE, TIMEOUT_S), one, mock_clock)
    start = trio.current_time()
    ends: dict[float, str] = {}

    async def attempt(timeout: float, offset: int) -> None:
        with pytest.raises(DiskTimeout) as caught:
            await disk.write(offset, OTHER, timeout)
        assert trio.current_time() == start + timeout
        ends[timeout] = str(caught.value)

    async with trio.open_nursery() as nursery:
        for timeout, offset in ((5.0, 1024), (3.0, 1536)):
            nursery.start_soon(attempt, timeout, offset)
        for passed in (3.0, 2.0):
            await wait_all_tasks_blocked()
            mock_clock.jump(passed)
    assert ends == {
        3.0: f"Writing 512 bytes at byte 1536 of {lease_file} did not begin within 3 s.",
        5.0: f"Writing 512 bytes at byte 1024 of {lease_file} did not begin within 5 s.",
    }
    assert disk.stuck == 2
    for one in held:
        one.let_go()
    assert await disk.read(1024, 512, LONG_S) == sector(2)  # never begun, so it never lands
    await disk.close()
    await all_threads_ended()
    assert lease_file.read_bytes()[512:1536] == LATE + sector(2)


async def test_a_late_end_frees_the_place_for_who_waits(
    open_disk: OpenDisk, lease_file: Path, faults: FaultyIO, mock_clock: MockClock
) -> None:
    disk = await open_disk(io=faults, places=1)
    held = faults.hold("pwritev", 512)
    await times_out(disk.write(512, LATE, TIMEOUT_S), held, mock_clock)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(disk.write, 1024, OTHER, LONG_S)
        await wait_all_tasks_blocked()
        assert disk.stuck == 1
        held.let_go()
    assert disk.stuck == 0
    assert lease_file.read_bytes()[512:1536] == LATE + OTHER


@pytest.mark.parametrize("timeout", [0.0, -1.0])
async def test_without_time_nothing_begins(open_disk: OpenDisk, lease_file: Path, timeout: float) -> None:
    disk = await open_disk()
    with pytest.raises(DiskTimeout, match="did not begin within 0 s"):
        await disk.write(0, LATE, timeout)
    assert disk.stuck == 0
    assert lease_file.read_bytes()[:512] == sector(0)


async def test_another_disk_is_not_disturbed(
    open_disk: OpenDisk, lease_file: Path, faults: FaultyIO, mock_clock: MockClock
) -> None:
    images, renewals = await open_disk(io=faults, places=2), await open_disk(io=faults, places=1)
    async with trio.open_nursery() as nursery:
        for offset in (4096, 8192):
            held = faults.hold("preadv", offset)
            nursery.start_soon(images.read, offset, 512, LONG_S)
            await held.entered()
        nursery.start_soon(images.read, 0, 512, LONG_S)  # waits for a place
        await wait_all_tasks_blocked()
        for _ in range(50):
            await renewals.write(512, LATE, TIMEOUT_S)
            assert await renewals.read(512, 512, TIMEOUT_S) == LATE
        assert trio.current_time() == 0
        faults.let_all_go()


# --- cancellation


async def test_a_cancelled_write_returns_at_once_and_may_land(
    open_disk: OpenDisk, lease_file: Path, faults: FaultyIO
) -> None:
    disk = await open_disk(io=faults, places=1)
    held = faults.hold("pwritev", 512)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(disk.write, 512, LATE, LONG_S)
        await held.entered()
        nursery.cancel_scope.cancel()
    assert disk.stuck == 1
    held.let_go()
    assert await disk.read(512, 512, LONG_S) == LATE
    assert disk.stuck == 0


async def test_a_call_cancelled_before_or_while_it_waits_for_a_place_never_runs(
    open_disk: OpenDisk, lease_file: Path, faults: FaultyIO
) -> None:
    disk = await open_disk(io=faults, places=1)
    held = faults.hold("preadv", 0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(disk.read, 0, 512, LONG_S)
        await held.entered()
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as waiting:
                waiting.start_soon(disk.write, 512, LATE, LONG_S)
                await wait_all_tasks_blocked()
                scope.cancel()
        held.let_go()
    with trio.CancelScope() as scope:
        scope.cancel()
        await disk.write(512, LATE, LONG_S)
    assert scope.cancelled_caught
    assert disk.stuck == 0
    assert await disk.read(512, 512, LONG_S) == sector(1)


# --- closing


async def test_the_file_stays_open_until_the_last_late_write_landed(
    open_disk: OpenDisk, lease_file: Path, faults: FaultyIO, mock_clock: MockClock
) -> None:
    disk = await open_disk(io=faults, places=3)
    held = {offset: faults.hold("pwritev", offset) for offset in (512, 1024)}
    for offset, one in held.items():
        await times_out(disk.write(offset, LATE, TIMEOUT_S), one, mock_clock)
    await disk.close()  # at once, although two are stuck
    assert descriptors_of(lease_file) == 1
    held[512].let_go()
    await held[512].thread_ended()
    assert lease_file.read_bytes()[512:1536] == LATE + sector(2)
    assert descriptors_of(lease_file) == 1
    held[1024].let_go()
    await all_threads_ended()
    assert lease_file.read_bytes()[512:1536] == LATE + LATE
    assert descriptors_of(lease_file) == 0


async def test_closing_with_all_places_stuck(
    open_disk: OpenDisk, lease_file: Path, faults: FaultyIO, mock_clock: MockClock
) -> None:
    disk = await open_disk(io=faults, places=1)
    held = faults.hold("pwritev", 512)
    await times_out(disk.write(512, LATE, TIMEOUT_S), held, mock_clock)
    async with trio.open_nursery() as nursery:

        async def refused() -> None:
            with pytest.raises(DiskError, match="it is closed"):
                await disk.read(0, 512, LONG_S)

        nursery.start_soon(refused)
        await wait_all_tasks_blocked()
        await disk.close()
        assert descriptors_of(lease_file) == 1
        held.let_go()
    await all_threads_ended()
    assert descriptors_of(lease_file) == 0
    assert lease_file.read_bytes()[512:1024] == LATE


async def test_closing_while_cancelled(open_disk: OpenDisk, lease_file: Path) -> None:
    disk = await open_disk()
    with trio.CancelScope() as scope:
        scope.cancel()
        await disk.close()
    await all_threads_ended()
    assert descriptors_of(lease_file) == 0


def test_a_write_that_outlives_the_program_s_loop_closes_the_file(lease_file: Path, faults: FaultyIO) -> None:
    held = faults.hold("pwritev", 512)

    async def main() -> None:
        disk = await DirectDisk.open(str(lease_file), io=faults)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(disk.write, 512, LATE, LONG_S)
            await held.entered()
            nursery.cancel_scope.cancel()
        await disk.close()

    trio.run(main)
    assert descriptors_of(lease_file) == 1
    held.let_go()
    trio.run(all_threads_ended)
    assert descriptors_of(lease_file) == 0
    assert lease_file.read_bytes()[512:1024] == LATE


async def test_a_defect_in_a_late_call_is_logged(
    open_disk: OpenDisk, faults: FaultyIO, mock_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    class BrokenBuffers(Buffers):
        def give_back(self, buffer: object) -> None:
            raise LookupError("a defect")

    disk = await open_disk(io=faults, places=1, buffers=BrokenBuffers())
    held = faults.hold("preadv", 0)
    await times_out(disk.read(0, 512, TIMEOUT_S), held, mock_clock)
    held.let_go()
    await disk.size(LONG_S)
    assert [record.getMessage() for record in caplog.records] == [
        "A call that nobody waited for any more failed."
    ]


# --- opening


async def test_an_opening_that_is_stuck_is_reported_and_closed_later(
    lease_file: Path, faults: FaultyIO, mock_clock: MockClock
) -> None:
    held = faults.hold("alignment", 0)

    async def attempt() -> None:
        with pytest.raises(SetupError, match=r"could not be opened within 10 s; check that its storage"):
            await DirectDisk.open(str(lease_file), io=faults, timeout=TIMEOUT_S)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(attempt)
        await held.entered()
        mock_clock.jump(TIMEOUT_S)
    assert descriptors_of(lease_file) == 1
    held.let_go()
    await all_threads_ended()
    assert descriptors_of(lease_file) == 0
