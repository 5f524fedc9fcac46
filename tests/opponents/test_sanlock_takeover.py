"""Hosts that die, hang, or want an id that is taken: lockfs beside sanlock daemons, either way round.

A dead host is waited for 8 * io_timeout + 60 s, so everything happens at once, each case in a lockspace and
with hosts of its own, io_timeout 1. How late a lease was taken goes to the output, to be read with -s.
"""

from __future__ import annotations

import mmap
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from lockfs.paxos.timing import Timing
from lockfs.records import sectors
from tests.opponents.hosts import Answer, LeaseHost, engine_host, starting_engine
from tests.support import sanlock
from tests.support.sanlock import LeaseFile, SanlockDaemon
from tests.support.sanlock_client import (
    AGAIN,
    ID_IN_USE,
    LIVE,
    OWNER_ALIVE,
    OWNER_DYING,
    Registration,
    Resource,
    SanlockError,
)

TIMING = Timing(io_timeout=1)
LATE_MAX_S = float(os.environ.get("LOCKFS_LATE_MAX_S", "15"))  # a busy machine is no failure; the bar is 2
ALL_S = 240.0
DEAD_CALL_S = 150.0
LOOK_S = 0.005
RETRY_S = 0.05
SECTOR = 512

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Takeover:
    """When a lease, or a host id, was had: seconds after the last renewal of the host that had it.

    `seen_s`: after the taker's own first renewal that followed. That is when a daemon looks at the others,
    and the rules have it count from there.
    """

    after_s: float
    seen_s: float | None = None
    detail: Answer | None = None


class Scene:
    """A lockspace of its own, and the hosts that a case starts in it."""

    def __init__(self, directory: Path, name: str, stack: AsyncExitStack) -> None:
        self._directory = directory
        self._name = name
        self._stack = stack
        self.file = LeaseFile(directory / name, 1, name.encode())
        self.lease = self.file.resources[0]

    async def daemon(self, suffix: str) -> SanlockDaemon:
        """A sanlock daemon that has joined nothing."""
        return await self._stack.enter_async_context(SanlockDaemon(self._directory, f"{self._name}-{suffix}"))

    async def joined_daemon(self, host_id: int) -> SanlockDaemon:
        """A sanlock daemon that has joined; it makes the lockspace if there is none."""
        daemon = await self.daemon(f"sanlock{host_id}")
        if not self.file.path.read_bytes()[:4].strip(b"\0"):
            await self.file.init(daemon.client)
        await self.join(daemon, host_id)
        return daemon

    async def join(self, daemon: SanlockDaemon, host_id: int) -> None:
        """Join; returns when that has worked."""
        await daemon.client.add_lockspace(self.file.lockspace, host_id, io_timeout=1, timeout=DEAD_CALL_S)

    async def engine(self, host_id: int) -> LeaseHost:
        """A lockfs host that has joined."""
        return await self._stack.enter_async_context(engine_host(self.file, host_id))

    async def joining_engine(self, host_id: int, name: str) -> LeaseHost:
        """A lockfs host that begins to join."""
        return await self._stack.enter_async_context(starting_engine(self.file, host_id, name=name))

    async def registered(self, daemon: SanlockDaemon) -> Registration:
        """A registration with a daemon."""
        return await self._stack.enter_async_context(daemon.client.register())

    async def seen(self, host_id: int, daemon: SanlockDaemon) -> None:
        """Wait until a daemon knows a host to be alive."""
        while True:
            try:
                if (await daemon.client.hosts(self.file.lockspace))[host_id].state == LIVE:
                    return
            except (SanlockError, KeyError):
                pass
            await trio.sleep(RETRY_S)

    async def renewal(self, host_id: int) -> float:
        """Wait for the next renewal; the time, CLOCK_MONOTONIC, at which it was not there yet."""
        looked = time.monotonic()
        first = self._delta(host_id)
        while True:
            await trio.sleep(LOOK_S)
            before, looked = looked, time.monotonic()
            if self._delta(host_id) != first:
                return before

    def _delta(self, host_id: int) -> bytes:
        """A host's delta lease, read past every cache."""
        descriptor = os.open(self.file.path, os.O_RDONLY | os.O_DIRECT)
        try:
            with mmap.mmap(-1, SECTOR) as buffer:
                os.preadv(descriptor, [buffer], sectors.delta_sector(host_id) * SECTOR)
                return buffer[:SECTOR]
        finally:
            os.close(descriptor)


async def _granted(registration: Registration, lease: Resource) -> float:
    """Take the lease from a daemon as soon as it is to be had; the time of that."""
    while True:
        try:
            await registration.acquire(lease, timeout=DEAD_CALL_S)
            return time.monotonic()
        except SanlockError as error:
            assert error.code in (OWNER_ALIVE, OWNER_DYING, AGAIN), error
        await trio.sleep(RETRY_S)


async def _engine_takes_a_dead_daemons_lease(scene: Scene, *, shared: bool = False) -> Takeover:
    daemon = await scene.joined_daemon(1)
    taker = await scene.engine(2)
    await (await scene.registered(daemon)).acquire(scene.lease, shared=shared)
    assert "refused" in await taker.ask("acquire")
    await scene.seen(2, daemon)  # a renewal or two of the taker: it knows the owner to be alive
    async with trio.open_nursery() as nursery:
        answers: list[Answer] = []
        nursery.start_soon(_ask_to_take, taker, answers)
        renewed = await scene.renewal(1)
        daemon.kill()
    assert "held" in answers[0], answers
    return Takeover(answers[0]["at"] - renewed, detail=answers[0])


async def _ask_to_take(taker: LeaseHost, answers: list[Answer]) -> None:
    answers.append(await taker.ask("acquire", patience=DEAD_CALL_S, retry=DEAD_CALL_S, timeout=ALL_S))


async def _engine_takes_a_dead_daemons_shared_lease(scene: Scene) -> Takeover:
    return await _engine_takes_a_dead_daemons_lease(scene, shared=True)


async def _daemon_takes_a_dead_engines_lease(scene: Scene, *, shared: bool = False) -> Takeover:
    taker = await scene.joined_daemon(2)
    owner = await scene.engine(1)
    await scene.seen(1, taker)
    assert "held" in await owner.ask("acquire", shared=shared)
    registration = await scene.registered(taker)
    with pytest.raises(SanlockError):
        await registration.acquire(scene.lease)
    renewed = await scene.renewal(1)
    owner.signal(signal.SIGKILL)
    seen = await scene.renewal(2)
    taken = await _granted(registration, scene.lease)
    return Takeover(taken - renewed, taken - seen)


async def _daemon_takes_a_dead_engines_shared_lease(scene: Scene) -> Takeover:
    return await _daemon_takes_a_dead_engines_lease(scene, shared=True)


async def _an_engine_that_hung_finds_its_lease_gone(scene: Scene) -> Takeover:
    """What it does when it goes on again, and the state of the new owner's lease after it."""
    taker = await scene.joined_daemon(2)
    owner = await scene.engine(1)
    assert "held" in await owner.ask("acquire")
    assert "written" in await owner.ask("write")
    registration = await scene.registered(taker)
    renewed = await scene.renewal(1)
    owner.signal(signal.SIGSTOP)
    try:
        seen = await scene.renewal(2)
        taken = await _granted(registration, scene.lease)
        before = scene.file.path.read_bytes()[sanlock.AREA :]
    finally:
        owner.signal(signal.SIGCONT)
    wrote = await owner.ask("write")
    await owner.ask("release")
    again = await owner.ask("acquire")
    await owner.close()
    after = scene.file.path.read_bytes()[sanlock.AREA :]
    assert before == after, "the former owner wrote to the lease"
    return Takeover(taken - renewed, taken - seen, {**wrote, "again": again})


async def _engine_wants_a_live_daemons_id(scene: Scene) -> Answer:
    await scene.joined_daemon(1)
    joiner = await scene.joining_engine(1, "stranger")
    return await joiner.answer()


async def _daemon_wants_a_live_engines_id(scene: Scene) -> int:
    await scene.joined_daemon(2)
    owner = await scene.engine(1)
    assert "held" in await owner.ask("acquire")
    stranger = await scene.daemon("stranger")
    try:
        await scene.join(stranger, 1)
        return 0
    except SanlockError as error:
        assert "written" in await owner.ask("write")
        return error.code


async def _engine_joins_as_a_dead_daemon(scene: Scene) -> Takeover:
    daemon = await scene.joined_daemon(1)
    renewed = await scene.renewal(1)
    daemon.kill()
    answer = await (await scene.joining_engine(1, "successor")).answer()
    assert "joined" in answer, answer
    return Takeover(answer["joined"] - renewed, detail=answer)


async def _daemon_joins_as_a_dead_engine(scene: Scene) -> Takeover:
    await scene.joined_daemon(2)
    owner = await scene.engine(1)
    renewed = await scene.renewal(1)
    owner.signal(signal.SIGKILL)
    await scene.join(await scene.daemon("successor"), 1)
    return Takeover(time.monotonic() - renewed)


_CASES: dict[str, Callable[[Scene], Awaitable[object]]] = {
    "x1": _engine_takes_a_dead_daemons_lease,
    "x2": _daemon_takes_a_dead_engines_lease,
    "s1": _engine_takes_a_dead_daemons_shared_lease,
    "s2": _daemon_takes_a_dead_engines_shared_lease,
    "h1": _an_engine_that_hung_finds_its_lease_gone,
    "c1": _engine_wants_a_live_daemons_id,
    "c2": _daemon_wants_a_live_engines_id,
    "j1": _engine_joins_as_a_dead_daemon,
    "j2": _daemon_joins_as_a_dead_engine,
}
Outcomes = dict[str, object]


async def _play(directory: Path) -> Outcomes:
    """Every case at the same time; what each returned or raised."""
    outcomes: Outcomes = {}

    async def one(name: str, case: Callable[[Scene], Awaitable[object]]) -> None:
        try:
            with trio.fail_after(ALL_S):
                async with AsyncExitStack() as stack:
                    outcomes[name] = await case(Scene(directory, name, stack))
        except (Exception, pytest.fail.Exception) as error:  # noqa: BLE001  (raised in the case's own test)
            outcomes[name] = error

    async with trio.open_nursery() as nursery:
        for name, case in _CASES.items():
            nursery.start_soon(one, name, case)
    return outcomes


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcomes]:
    base = tmp_path_factory.mktemp("takeover")
    if reason := sanlock.why_not_sanlock(base):
        pytest.skip(reason)
    yield trio.run(_play, base)


def _of(outcomes: Outcomes, case: Callable[[Scene], Awaitable[object]]) -> object:
    (name,) = (name for name, candidate in _CASES.items() if candidate is case)
    if isinstance(error := outcomes[name], BaseException):
        raise error
    return outcomes[name]


_TAKEOVERS = {
    "lockfs from sanlock": _engine_takes_a_dead_daemons_lease,
    "sanlock from lockfs": _daemon_takes_a_dead_engines_lease,
    "lockfs from sanlock, was shared": _engine_takes_a_dead_daemons_shared_lease,
    "sanlock from lockfs, was shared": _daemon_takes_a_dead_engines_shared_lease,
    "sanlock from a hung lockfs": _an_engine_that_hung_finds_its_lease_gone,
}


@pytest.mark.parametrize("what", _TAKEOVERS)
def test_a_dead_hosts_lease_is_taken(outcomes: Outcomes, what: str) -> None:
    """Not before its time, 8 * io_timeout + 60 s after the last renewal, and soon after that."""
    took = _of(outcomes, _TAKEOVERS[what])
    assert isinstance(took, Takeover)
    counted = took.after_s if took.seen_s is None else took.seen_s
    late = f"{counted - TIMING.dead:+.2f} s from the earliest moment"
    print(f"{what}: {late}, {took.after_s:.2f} s after the last renewal; {took.detail}")
    assert took.after_s >= TIMING.dead
    assert counted <= TIMING.dead + LATE_MAX_S


def test_a_host_that_hung_knows_that_its_lease_is_gone(outcomes: Outcomes) -> None:
    """It writes neither to the image nor to the lease, and can take no other until it has joined again."""
    took = _of(outcomes, _an_engine_that_hung_finds_its_lease_gone)
    assert isinstance(took, Takeover) and took.detail is not None
    assert "lost" in took.detail["fenced"]
    assert "refused" in took.detail["again"]


@pytest.mark.parametrize("who", ["lockfs", "sanlock"])
def test_a_dead_hosts_id_is_joined(outcomes: Outcomes, who: str) -> None:
    """A dead host's id is had by another, not before the old one counts as dead and 2 io_timeout more."""
    case = _engine_joins_as_a_dead_daemon if who == "lockfs" else _daemon_joins_as_a_dead_engine
    joined = _of(outcomes, case)
    assert isinstance(joined, Takeover)
    print(f"{who} joined {joined.after_s - TIMING.dead - TIMING.renewal:+.2f} s from the earliest moment")
    assert joined.after_s >= TIMING.dead + TIMING.renewal


def test_lockfs_is_refused_a_live_id(outcomes: Outcomes) -> None:
    """With the name of the host that has it, and as soon as that shows a sign of life."""
    answer = _of(outcomes, _engine_wants_a_live_daemons_id)
    assert isinstance(answer, dict)
    print(answer)
    assert answer["refused"] == ID_IN_USE
    assert "c1-sanlock1" in answer["why"]
    assert answer["seconds"] < TIMING.fails


def test_sanlock_is_refused_a_live_id_of_lockfs(outcomes: Outcomes) -> None:
    """And the lockfs host that has it is not disturbed."""
    assert _of(outcomes, _daemon_wants_a_live_engines_id) == ID_IN_USE
