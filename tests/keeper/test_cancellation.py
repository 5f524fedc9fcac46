"""Whatever a keeper's operation is doing when it is cancelled or interrupted, nothing stays behind.

Each scenario is run again and again; in the n-th run its task is cancelled right after its n-th step, until a
run ends before that. After each run everybody else closes what they have, and the world must be empty.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from lockfs.errors import Interrupted, LeaseUnavailable
from lockfs.keeper.keeper import Access, Grant, Kind
from lockfs.keeper.openers import Role
from lockfs.keeper.policy import Policy, Readers
from tests.conftest import ExpectLog

from .test_handover import SOURCE, TARGET
from .world import DISK, Host, World, opener

READ, WRITE = Access.READ, Access.WRITE
STEPS_MAX = 400
ME = 42


class Striker(trio.abc.Instrument):
    """Strikes once, after a task's n-th step."""

    def __init__(self, task: trio.lowlevel.Task, step: int, strike: Callable[[], None]) -> None:
        self.task = task
        self.left = step
        self.strike = strike

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self.task:
            self.left -= 1
            if self.left == 0:
                self.strike()


@dataclass
class Stage:
    """A world with others in it, and what they opened."""

    world: World
    nursery: trio.Nursery
    grants: list[tuple[Host, Grant]] = field(default_factory=list)

    @property
    def a(self) -> Host:
        return self.world.hosts[0]

    @property
    def b(self) -> Host:
        return self.world.hosts[1]

    async def open(self, host: Host, who: Any, access: Access = WRITE) -> Grant:
        grant = await host.keeper.open(DISK, who, access)
        self.grants.append((host, grant))
        return grant

    def close_later(self, delay: float) -> None:
        """Let the grant opened last end by itself."""
        host, grant = self.grants.pop()

        async def close() -> None:
            with trio.CancelScope(shield=True):
                await trio.sleep(delay)
                await host.keeper.close(grant)

        self.nursery.start_soon(close)

    async def clear(self) -> None:
        for host, grant in self.grants:
            await host.keeper.close(grant)


Scenario = Callable[[Stage], Awaitable[Callable[[], Awaitable[None]]]]


def opens(host: str, who: Any, access: Access = WRITE) -> Callable[[Stage], Callable[[], Awaitable[None]]]:
    """The task under test: open, and close again."""

    def make(stage: Stage) -> Callable[[], Awaitable[None]]:
        keeper = getattr(stage, host).keeper

        async def task() -> None:
            grant = await keeper.open(DISK, who, access)
            await keeper.close(grant)

        return task

    return make


async def free(stage: Stage) -> Callable[[], Awaitable[None]]:
    """An open of a free image, and its close."""
    return opens("a", opener(ME))(stage)


async def held_elsewhere(stage: Stage) -> Callable[[], Awaitable[None]]:
    """An open that waits for another host, which lets go."""
    await stage.open(stage.b, opener(1))
    stage.close_later(0.05)
    return opens("a", opener(ME))(stage)


async def held_here(stage: Stage) -> Callable[[], Awaitable[None]]:
    """An open that waits for another process, with others in line, which lets go."""
    await stage.open(stage.a, opener(1))
    stage.close_later(0.05)

    async def also() -> None:
        with trio.CancelScope(shield=True):
            await stage.a.keeper.close(await stage.a.keeper.open(DISK, opener(2), WRITE))

    stage.nursery.start_soon(also)
    await trio.sleep(0.01)
    return opens("a", opener(ME))(stage)


async def successor(stage: Stage) -> Callable[[], Awaitable[None]]:
    """An incoming guest's open that becomes provisional."""
    await stage.open(stage.b, opener(1))
    return opens("a", opener(ME, Role.INCOMING))(stage)


async def shared(stage: Stage) -> Callable[[], Awaitable[None]]:
    """A shared reader beside another host's, made a writer when that one leaves."""
    await stage.open(stage.b, opener(1), READ)
    stage.close_later(0.05)
    await stage.open(stage.a, opener(2), READ)
    return opens("a", opener(ME))(stage)


async def changes(stage: Stage) -> Callable[[], Awaitable[None]]:
    """A change by path that has to wait."""
    await stage.open(stage.b, opener(1))
    stage.close_later(0.03)

    async def task() -> None:
        async with stage.a.keeper.changing(DISK, opener(ME)):
            await trio.sleep(0.01)

    return task


async def removes(stage: Stage) -> Callable[[], Awaitable[None]]:
    """A removal."""

    async def task() -> None:
        async with stage.a.keeper.removing(DISK, opener(ME)):
            await trio.sleep(0.01)

    return task


async def claims(stage: Stage) -> Callable[[], Awaitable[None]]:
    """A claim that another host yields to."""
    await stage.nursery.start(stage.b.keeper.run)
    await stage.open(stage.b, SOURCE)
    stage.b.mount.bytes[1].add(1)
    await trio.sleep(0.3)
    target = await stage.open(stage.a, TARGET)
    stage.b.mount.bytes[1].clear()
    return lambda: stage.a.keeper.claim(target)


async def claims_here(stage: Stage) -> Callable[[], Awaitable[None]]:
    """A claim that a process of the same host yields to."""
    await stage.nursery.start(stage.a.keeper.run)
    await stage.open(stage.a, SOURCE)
    stage.a.mount.bytes[1].add(1)
    await trio.sleep(0.3)
    target = await stage.open(stage.a, TARGET)
    stage.a.mount.bytes[1].clear()
    return lambda: stage.a.keeper.claim(target)


async def yields(stage: Stage) -> Callable[[], Awaitable[None]]:
    """The holder's side of a yield, with writes under way and one that waits."""
    source = await stage.open(stage.b, SOURCE)
    source.seen = True
    keeper = stage.b.keeper
    (record,) = keeper._ledger.all()
    stage.nursery.start_soon(stage.b.write, source, 0.01)
    stage.nursery.start_soon(stage.b.write, source, 0.02)
    await trio.sleep(0.001)
    return lambda: keeper._yielding._yield_away(record)


SCENARIOS: list[Scenario] = [
    free,
    held_elsewhere,
    held_here,
    successor,
    shared,
    changes,
    removes,
    claims,
    claims_here,
    yields,
]


@asynccontextmanager
async def staged(scenario: Scenario) -> AsyncIterator[tuple[Stage, Callable[[], Awaitable[None]]]]:
    """The scenario's world, empty again at the end."""
    policy = Policy(readers=Readers.SHARED) if scenario is shared else Policy()
    world = World(policy=policy)
    async with trio.open_nursery() as nursery:
        stage = Stage(world, nursery)
        yield stage, await scenario(stage)
        world.check_exclusion()
        await trio.sleep(20)
        await stage.clear()
        nursery.cancel_scope.cancel()
    world.check_nothing_left()


async def strike(scenario: Scenario, step: int, *, interrupt: bool) -> bool:
    """Run the scenario, its task struck after its `step`-th step; False if it ended before."""
    struck = False
    async with staged(scenario) as (stage, task):
        scope = trio.CancelScope()

        def hit() -> None:
            nonlocal struck
            struck = True
            if interrupt:
                stage.a.keeper.interrupt(ME)
            else:
                scope.cancel()

        striker = Striker(trio.lowlevel.current_task(), step, hit)
        trio.lowlevel.add_instrument(striker)
        try:
            with scope:
                await task()
        except (Interrupted, LeaseUnavailable):
            pass
        finally:
            trio.lowlevel.remove_instrument(striker)
    return struck


@pytest.mark.parametrize("interrupt", [False, True], ids=["cancelled", "interrupted"])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_nothing_stays_behind(scenario: Scenario, interrupt: bool, expect_log: ExpectLog) -> None:
    """Cancelled or interrupted after any step, an operation leaves no lease, request, waiter or record."""
    for step in range(1, STEPS_MAX):
        clock = MockClock(autojump_threshold=0)
        if not trio.run(lambda n=step: strike(scenario, n, interrupt=interrupt), clock=clock):
            assert step > 1, "the scenario has no steps"
            return
    pytest.fail("the scenario does not end")


async def test_a_cancelled_open_that_succeeded_is_the_callers(a: Host) -> None:
    """An open that has its lease when the cancellation comes returns it: it is never lost on the way."""
    with trio.CancelScope() as scope:
        a.mount.on_taken = lambda inode: scope.cancel()
        grant = await a.keeper.open(DISK, opener(1), WRITE)
    assert grant.kind is Kind.LEASED
    await a.keeper.close(grant)


async def test_a_close_in_a_cancelled_scope(a: Host) -> None:
    """A close is not cancelled by anything."""
    grant = await a.keeper.open(DISK, opener(1), WRITE)
    with trio.CancelScope() as scope:
        scope.cancel()
        await a.keeper.close(grant)
    assert not a.storage.held[1]
