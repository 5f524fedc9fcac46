"""Plans in one turn of a thread: what ends a turn between two I/Os, what lands late, what waits for what.

Time is a clock that moves only when a test says so; threads are met by events. Each rule is also tried on a
turn that breaks it.
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from mmap import mmap
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from lockfs.paxos.seams import DiskError, DiskTimeout, Plan, Step, ToRead, ToWrite
from lockfs.storage.buffers import Buffers
from lockfs.storage.order import Order
from lockfs.storage.turn import Turn
from lockfs.storage.workers import Workers

from .conftest import OpenDisk, all_threads_ended, descriptors_of, sector
from .fakes import WAIT_S, FaultyIO

TIMEOUT_S = 10.0
LONG_S = 1000.0
FIRST, SECOND, THIRD = b"\x11" * 512, b"\x22" * 512, b"\x33" * 512
OTHER = b"\xee" * 512

Check = Callable[[OpenDisk, Path, FaultyIO, MockClock], Awaitable[None]]


class Paces:
    """A plan of these steps that tells how far it got: `seen` is what it was sent, `threads` who ran it."""

    def __init__(self, *steps: Step) -> None:
        self.steps = steps
        self.seen: list[bytes] = []
        self.threads: list[threading.Thread] = []
        self.plan = self._plan()

    def _plan(self) -> Plan[str]:
        for step in self.steps:
            self.threads.append(threading.current_thread())
            self.seen.append(bytes((yield step)))
        self.threads.append(threading.current_thread())
        return "done"

    @property
    def closed(self) -> bool:
        """Whether nothing of it can run any more."""
        return self.plan.gi_frame is None


def writes(timeout: float = TIMEOUT_S) -> Paces:
    """Three sectors in a row, 1 to 3."""
    data = (FIRST, SECOND, THIRD)
    return Paces(*(ToWrite(number * 512, data[number - 1], timeout) for number in (1, 2, 3)))


async def end_of(call: Awaitable[str]) -> str:
    """What a call returns, or why it was late."""
    try:
        return await call
    except DiskTimeout as late:
        return str(late)


async def test_a_plan_is_one_turn_of_one_thread(open_disk: OpenDisk, lease_file: Path) -> None:
    disk = await open_disk()
    paces = Paces(ToRead(512, 1024, LONG_S), ToWrite(512, OTHER, LONG_S), ToRead(0, 1024, LONG_S))
    assert await disk.carry_out(paces.plan) == "done"
    assert paces.seen[::2] == [sector(1) + sector(2), sector(0) + OTHER]
    first, *others = paces.threads
    assert first is threading.current_thread()
    assert len(set(others)) == 1 and others[0] is not first


async def test_a_plan_without_steps(open_disk: OpenDisk) -> None:
    disk = await open_disk()
    assert await disk.carry_out(Paces().plan) == "done"


async def test_what_was_read_is_lent_until_the_next_step(open_disk: OpenDisk) -> None:
    """Whoever keeps it is told so, and reads no other I/O's bytes."""
    disk = await open_disk()

    def keeps() -> Plan[bytes]:
        kept = yield ToRead(512, 512, LONG_S)
        yield ToRead(1024, 512, LONG_S)
        return bytes(kept)

    with pytest.raises(ValueError, match="released"):
        await disk.carry_out(keeps())


# --- what comes late


async def late_ends_the_turn(
    open_disk: OpenDisk, lease_file: Path, faults: FaultyIO, clock: MockClock
) -> None:
    """The second I/O is stuck: the call returns at its deadline, it lands later, the third never begins."""
    disk = await open_disk(io=faults, places=2)
    held, paces = faults.hold("pwritev", 1024), writes()
    async with trio.open_nursery() as nursery:

        async def attempt() -> None:
            with pytest.raises(DiskTimeout) as caught:
                await disk.carry_out(paces.plan)
            said = f"Writing 512 bytes at byte 1024 of {lease_file} did not end within 10 s."
            assert str(caught.value) == said
            assert paces.closed

        nursery.start_soon(attempt)
        await held.entered()
        clock.jump(TIMEOUT_S)
    assert disk.stuck == 1
    assert lease_file.read_bytes()[512:2048] == FIRST + sector(2) + sector(3)
    answers: list[bytes] = []

    async def read() -> None:
        answers.append(await disk.read(1024, 512, LONG_S))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await wait_all_tasks_blocked()
        assert not answers  # it waits for the late write
        held.let_go()
    assert answers == [SECOND]
    await disk.close()
    await all_threads_ended()
    assert lease_file.read_bytes()[512:2048] == FIRST + SECOND + sector(3)
    assert len(paces.seen) == 1


async def each_io_has_its_own_time(
    open_disk: OpenDisk, lease_file: Path, faults: FaultyIO, clock: MockClock
) -> None:
    """Counted from the moment at which the plan asked for it, whatever the ones before took."""
    disk = await open_disk(io=faults)
    first, second, paces = faults.hold("pwritev", 512), faults.hold("pwritev", 1024), writes()
    ends: list[float] = []

    async def attempt() -> None:
        with pytest.raises(DiskTimeout, match="at byte 1024"):
            await disk.carry_out(paces.plan)
        ends.append(trio.current_time())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(attempt)
        await first.entered()
        clock.jump(8.0)
        first.let_go()
        await second.entered()
        clock.jump(8.0)
        await wait_all_tasks_blocked()
        assert not ends
        clock.jump(2.0)
    assert ends == [18.0]


class Watched(Buffers):
    """Tells when a thread has given a buffer back, and so has decided whether it goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.given_back = threading.Event()

    def give_back(self, buffer: mmap) -> None:
        """See Buffers."""
        super().give_back(buffer)
        self.given_back.set()


async def too_late_is_late_whoever_looks_first(
    open_disk: OpenDisk, lease_file: Path, faults: FaultyIO, clock: MockClock
) -> None:
    """The I/O ends after its time, before the trio thread has noticed: the thread itself stops."""
    buffers = Watched()
    disk = await open_disk(io=faults, buffers=buffers)
    held, paces, ends = faults.hold("pwritev", 512), writes(), list[str]()
    async with trio.open_nursery() as nursery:

        async def attempt() -> None:
            ends.append(await end_of(disk.carry_out(paces.plan)))

        nursery.start_soon(attempt)
        await held.entered()
        clock.jump(TIMEOUT_S)
        held.let_go()
        assert buffers.given_back.wait(WAIT_S)  # the trio thread stands still meanwhile
    assert ends == [f"Writing 512 bytes at byte 512 of {lease_file} did not end within 10 s."]
    await disk.close()
    await all_threads_ended()
    assert lease_file.read_bytes()[512:2048] == FIRST + sector(2) + sector(3)
    assert paces.closed and not paces.seen


async def test_without_time_a_later_step_does_not_begin(open_disk: OpenDisk, lease_file: Path) -> None:
    disk = await open_disk()
    paces = Paces(ToWrite(512, FIRST, LONG_S), ToWrite(1024, SECOND, 0.0))
    with pytest.raises(DiskTimeout, match=r"at byte 1024 .* did not begin within 0 s"):
        await disk.carry_out(paces.plan)
    assert lease_file.read_bytes()[512:1536] == FIRST + sector(2)


# --- cancellation


async def cancelled_between_two_steps(
    open_disk: OpenDisk, lease_file: Path, faults: FaultyIO, clock: MockClock
) -> None:
    """What is under way lands; the plan is closed when the call has returned, and nothing of it follows."""
    disk = await open_disk(io=faults)
    held, paces = faults.hold("pwritev", 512), writes()
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(disk.carry_out, paces.plan)
            await held.entered()
            scope.cancel()
    assert paces.closed
    assert disk.stuck == 1
    held.let_go()
    assert await disk.read(512, 512, LONG_S) == FIRST
    await disk.close()
    await all_threads_ended()
    assert lease_file.read_bytes()[512:2048] == FIRST + sector(2) + sector(3)
    assert not paces.seen


async def test_cancelled_before_its_thread_came(open_disk: OpenDisk, lease_file: Path) -> None:
    """Nothing begins, and nothing is left in the order of writes."""
    disk, paces = await open_disk(), writes()
    with trio.CancelScope() as scope:
        scope.cancel()
        await disk.carry_out(paces.plan)
    assert scope.cancelled_caught and paces.closed
    assert await disk.read(512, 512, LONG_S) == sector(1)


async def test_given_up_before_the_thread_takes_it(open_disk: OpenDisk, lease_file: Path) -> None:
    """A thread that finds nobody waiting does nothing."""
    disk, paces = await open_disk(), writes()
    turn = Turn(paces.plan, disk._means)
    turn.begin()
    assert turn.enter() is None
    turn.give_up()
    await trio.to_thread.run_sync(turn.run)
    turn.leave()
    assert await disk.read(512, 512, LONG_S) == sector(1)


# --- order


async def a_step_waits_for_a_late_write(
    open_disk: OpenDisk, lease_file: Path, faults: FaultyIO, clock: MockClock
) -> None:
    """Also one in the middle of a plan; its thread does not stand still for it."""
    disk = await open_disk(io=faults, places=2)
    held, paces = faults.hold("pwritev", 1024), writes(LONG_S)
    async with trio.open_nursery() as nursery:

        async def late() -> None:
            with pytest.raises(DiskTimeout):
                await disk.write(1024, OTHER, TIMEOUT_S)

        nursery.start_soon(late)
        await held.entered()
        clock.jump(TIMEOUT_S)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(disk.carry_out, paces.plan)
        while not paces.seen:
            await trio.sleep(0)
        assert await disk.read(0, 512, LONG_S) == sector(0)  # in the other place
        held.let_go()
    assert lease_file.read_bytes()[512:2048] == FIRST + SECOND + THIRD


async def test_it_waits_in_vain(
    open_disk: OpenDisk, lease_file: Path, faults: FaultyIO, mock_clock: MockClock
) -> None:
    disk = await open_disk(io=faults)
    held, paces = faults.hold("pwritev", 1024), writes()
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(disk.write, 1024, OTHER, LONG_S)
            await held.entered()
            scope.cancel()
    async with trio.open_nursery() as nursery:

        async def attempt() -> None:
            with pytest.raises(DiskTimeout, match=r"at byte 1024 .* waited in vain for an earlier write"):
                await disk.carry_out(paces.plan)

        nursery.start_soon(attempt)
        while not paces.seen:
            await trio.sleep(0)
        await wait_all_tasks_blocked()
        mock_clock.jump(TIMEOUT_S)
    assert paces.closed
    held.let_go()


# --- others


async def others_have_their_turn(
    open_disk: OpenDisk, lease_file: Path, faults: FaultyIO, clock: MockClock
) -> None:
    """A turn gives its place up between two I/Os to a call that waits for one."""
    disk = await open_disk(io=faults, places=1)
    held, paces, seen = faults.hold("pwritev", 512), writes(LONG_S), list[int]()
    async with trio.open_nursery() as nursery:

        async def other() -> None:
            await disk.write(4096, OTHER, LONG_S)
            seen.append(len(paces.seen))

        nursery.start_soon(disk.carry_out, paces.plan)
        await held.entered()
        nursery.start_soon(other)
        await wait_all_tasks_blocked()
        held.let_go()
    assert seen[0] < len(paces.steps)
    assert lease_file.read_bytes()[512:2048] == FIRST + SECOND + THIRD


async def test_what_a_plan_raises_comes_out(open_disk: OpenDisk, lease_file: Path) -> None:
    disk = await open_disk()

    def refuses() -> Plan[None]:
        yield ToWrite(512, FIRST, LONG_S)
        raise LookupError("changed its mind")

    with pytest.raises(LookupError, match="changed its mind"):
        await disk.carry_out(refuses())
    assert lease_file.read_bytes()[512:1536] == FIRST + sector(2)


async def test_a_refused_step_ends_the_plan(open_disk: OpenDisk, lease_file: Path) -> None:
    disk = await open_disk(writable=False)
    paces = Paces(ToRead(512, 512, LONG_S), ToWrite(512, FIRST, LONG_S))
    with pytest.raises(DiskError, match=r"Writing 512 bytes at byte 512 .* opened for reading only"):
        await disk.carry_out(paces.plan)
    assert paces.closed


async def test_a_disk_that_is_closed_meanwhile(
    open_disk: OpenDisk, lease_file: Path, faults: FaultyIO
) -> None:
    """The turn under way goes on to its end, and the file stays open as long."""
    disk = await open_disk(io=faults)
    held, paces = faults.hold("pwritev", 512), writes(LONG_S)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(disk.carry_out, paces.plan)
        await held.entered()
        await disk.close()
        assert descriptors_of(lease_file) == 1
        held.let_go()
    await all_threads_ended()
    assert descriptors_of(lease_file) == 0
    assert lease_file.read_bytes()[512:2048] == FIRST + SECOND + THIRD


# --- the rules and turns that break them


def _never_looks_at_the_clock(turn: Turn[Any]) -> float:
    return TIMEOUT_S


def _only_the_first_deadline(turn: Turn[Any]) -> None:
    return None


def _goes_on_without_a_caller(turn: Turn[Any]) -> None:
    """Nothing stops it."""


def _keeps_no_order(order: Order, mine: object) -> None:
    return None


RULES: dict[str, tuple[Check, tuple[object, str, object]]] = {
    "late": (late_ends_the_turn, (Turn, "give_up", _goes_on_without_a_caller)),
    "own time": (each_io_has_its_own_time, (Turn, "goes_on", _only_the_first_deadline)),
    "too late": (
        too_late_is_late_whoever_looks_first,
        (Turn, "left", property(_never_looks_at_the_clock)),
    ),
    "cancelled": (cancelled_between_two_steps, (Turn, "give_up", _goes_on_without_a_caller)),
    "order": (a_step_waits_for_a_late_write, (Order, "_earlier", _keeps_no_order)),
    "others": (others_have_their_turn, (Workers, "crowded", property(lambda self: False))),
}


@pytest.mark.parametrize("rule", RULES)
async def test_the_rule_is_kept(
    rule: str, open_disk: OpenDisk, lease_file: Path, faults: FaultyIO, mock_clock: MockClock
) -> None:
    check, _ = RULES[rule]
    await check(open_disk, lease_file, faults, mock_clock)


@pytest.mark.parametrize("rule", RULES)
async def test_a_turn_that_breaks_it_is_noticed(
    rule: str,
    open_disk: OpenDisk,
    lease_file: Path,
    faults: FaultyIO,
    mock_clock: MockClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check, (owner, attribute, broken) = RULES[rule]
    monkeypatch.setattr(owner, attribute, broken)
    with pytest.RaisesGroup(AssertionError, allow_unwrapped=True, flatten_subgroups=True):
        await check(open_disk, lease_file, faults, mock_clock)
    faults.let_all_go()
