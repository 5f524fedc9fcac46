"""A paxos host that stands still with its clock while others take its leases; what it has after that."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio
import trio.testing

from lockfs.backends.base import Lease, LeaseState, Mode
from lockfs.backends.paxos.backend import PaxosBackend
from lockfs.backends.paxos.options import LayoutKind
from lockfs.backends.paxos.proof import PaxosLease
from lockfs.errors import BackendError, ImageBusy
from lockfs.paxos.seams import Clock, DiskError
from tests.conftest import ExpectLog

from .makers import PaxosMaker, StoreHost

IDLE_S = 0.02
LONG_S = 100.0
LATE_S = 300.0


@pytest.fixture(autouse=True)
def _clock(autojump_clock: trio.testing.MockClock, expect_log: ExpectLog) -> None:
    autojump_clock.autojump_threshold = IDLE_S
    expect_log("(WARNING|ERROR) lockfs.paxos:", None)


class HaltableClock(Clock):
    """Trio's time, but for the time in which it stood still."""

    def __init__(self) -> None:
        self._trio = trio.lowlevel.current_clock()  # plans ask in their threads
        self._behind = 0.0
        self._stopped: float | None = None

    def now(self) -> float:
        return (self._trio.current_time() if self._stopped is None else self._stopped) - self._behind

    async def sleep(self, seconds: float) -> None:
        await trio.sleep(max(0.0, seconds))

    def stop(self) -> None:
        self._stopped = self._trio.current_time()

    def go(self) -> None:
        assert self._stopped is not None
        self._behind += self._trio.current_time() - self._stopped
        self._stopped = None


class Wall:
    """A real-time clock that can be set."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.ahead = 0.0

    def now(self) -> float:
        return self._clock.now() + self.ahead


@dataclass
class Hosts:
    """Two hosts; the first can stand still."""

    maker: PaxosMaker
    clock: HaltableClock
    a: StoreHost
    b: StoreHost

    @contextlib.contextmanager
    def halted(self):  # type: ignore[no-untyped-def]
        """The first neither renews nor sees time pass during the block; what it reads, it reads after it."""
        backend = self.a.backend
        assert isinstance(backend, PaxosBackend) and backend._membership._area is not None
        disk, thawed = backend._membership._area.disk, trio.Event()
        read, write = disk.read, disk.write

        async def late_read(*words: object) -> object:
            await thawed.wait()
            return await read(*words)  # type: ignore[arg-type]

        async def late_write(*words: object) -> None:
            await thawed.wait()
            await write(*words)  # type: ignore[arg-type]

        disk.read, disk.write = late_read, late_write  # type: ignore[method-assign,assignment]
        self.clock.stop()
        try:
            yield
        finally:
            self.clock.go()
            disk.read, disk.write = read, write  # type: ignore[method-assign]
            thawed.set()


@pytest.fixture
async def hosts(tmp_path: Path) -> AsyncIterator[Hosts]:
    """They know one another for a while."""
    maker, clock = PaxosMaker(tmp_path, LayoutKind.FILES), HaltableClock()
    maker.changes = {number: {"watchdog_timeout": 10} for number in range(2)}
    maker.clocks[0] = clock
    async with maker.hosts(2) as (a, b):
        for host in (a, b):
            await host.backend.release(await acquire(host))
        await trio.sleep(30)
        yield Hosts(maker, clock, a, b)


async def acquire(host: StoreHost, mode: Mode = Mode.EXCLUSIVE, image: str = "a.img") -> Lease:
    """Acquire as soon as it is free, or the holder is dead."""
    end = trio.current_time() + LATE_S
    while True:
        try:
            return await host.backend.acquire(host.image(image), mode, host.owner, trio.current_time() + 5)
        except (ImageBusy, BackendError):
            if trio.current_time() > end:
                raise
        await trio.sleep(1)


async def until(what: str, condition) -> None:  # type: ignore[no-untyped-def]
    with trio.fail_after(LATE_S):
        while not condition():
            await trio.sleep(0.1)


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("let_go", [False, True])
async def test_what_another_host_took_is_lost(hosts: Hosts, mode: Mode, let_go: bool) -> None:
    """And only that; the other lease is confirmed, without the keeper's having been told of a doubt."""
    taken, kept = await acquire(hosts.a, mode), await acquire(hosts.a, mode, "b.img")
    hosts.a.changes.clear()
    with hosts.halted():
        theirs = await acquire(hosts.b)
        if let_go:
            await hosts.b.backend.release(theirs)
        assert taken.in_time(), "it cannot know"
    await until("lost", lambda: taken.state is LeaseState.LOST)
    assert not taken.in_time()
    await until("confirmed", kept.in_time)
    assert kept.state is LeaseState.HELD
    assert {id(one) for one in hosts.a.changes} == {id(taken), id(kept)}
    await hosts.a.backend.release(taken)
    if not let_go:
        with pytest.raises(ImageBusy):
            await hosts.a.backend.acquire(hosts.a.image("a.img"), mode, hosts.a.owner, trio.current_time())
        await hosts.b.backend.release(theirs)
    again = await acquire(hosts.a)
    assert not again.follows(taken)
    await hosts.a.backend.release(again)
    await hosts.a.backend.release(kept)


async def test_the_only_other_host_came_while_it_stood_still(hosts: Hosts) -> None:
    """There is no pace to compare with; that somebody came is reason enough to look."""
    taken = await acquire(hosts.a)
    await hosts.maker.kill(hosts.b)  # type: ignore[arg-type]
    await trio.sleep(LONG_S)
    with hosts.halted():
        newcomer = await hosts.maker.open(2)
        async with trio.open_nursery() as nursery:
            await nursery.start(newcomer.run)
            theirs = await acquire(newcomer)
            await newcomer.backend.release(theirs)
            nursery.cancel_scope.cancel()
    await until("lost", lambda: taken.state is LeaseState.LOST)
    await hosts.a.backend.release(taken)


async def test_it_is_confirmed_as_soon_as_the_storage_answers(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A doubt that lasts is told, and ends."""
    lease = await acquire(hosts.a)
    assert isinstance(lease, PaxosLease)
    confirm, fails = lease.resource.confirm, [True]

    async def flaky(give_up_at: float = 0.0) -> None:
        if fails[0]:
            raise DiskError(5, "away")
        await confirm(give_up_at)

    monkeypatch.setattr(lease.resource, "confirm", flaky)
    with hosts.halted():
        await trio.sleep(LONG_S)
    await until("in doubt", lambda: lease.state is LeaseState.DOUBT)
    assert not lease.in_time()
    fails[0] = False
    await until("confirmed", lambda: lease.state is LeaseState.HELD)
    assert lease.in_time()
    await hosts.a.backend.release(lease)


async def test_a_lease_that_cannot_be_looked_at_is_confirmed(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where hosts come and go."""
    lease = await acquire(hosts.a)
    assert isinstance(lease, PaxosLease)
    version = lease.resource.leader

    async def away() -> bool:
        raise DiskError(5, "away")

    monkeypatch.setattr(lease.resource, "is_there", away)
    await hosts.maker.kill(hosts.b)  # type: ignore[arg-type]
    lease.epoch.lockspace.pace._look_due = True
    await until("confirmed", lambda: lease.resource.leader != version)
    await until("in time", lease.in_time)
    monkeypatch.undo()
    await hosts.a.backend.release(lease)
