"""Paxos leases that are lost, and what follows them; leases taken from the dead, and by force.

A host's storage fails as a whole when it is told to: every read and write of its membership raises DiskError.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from lockfs.backends.base import Lease, LeaseState, Mode
from lockfs.backends.paxos.backend import PaxosBackend
from lockfs.backends.paxos.options import LayoutKind
from lockfs.errors import BackendError, ImageBusy
from lockfs.paxos.seams import DiskError
from tests.conftest import ExpectLog

from .makers import PaxosMaker, StoreHost

IDLE_S = 0.02
LATE_S = 300.0


@pytest.fixture(autouse=True)
def _clock(autojump_clock: trio.testing.MockClock, expect_log: ExpectLog) -> None:
    autojump_clock.autojump_threshold = IDLE_S
    expect_log("(WARNING|ERROR) lockfs.paxos: lockspace", None)


@pytest.fixture
async def hosts(tmp_path: Path) -> AsyncIterator[tuple[StoreHost, StoreHost]]:
    """Two hosts of one store, in doubt after 8 s without their storage, lost after 12 s, dead after 18 s."""
    maker = PaxosMaker(tmp_path, LayoutKind.FILES)
    maker.changes = {number: {"watchdog_timeout": 10} for number in range(2)}
    async with maker.hosts(2) as (a, b):
        yield a, b


@contextlib.contextmanager
def sick(host: StoreHost) -> Iterator[None]:
    """The host cannot reach the lockspace during the block."""
    backend = host.backend
    assert isinstance(backend, PaxosBackend) and backend._membership._area is not None
    disk = backend._membership._area.disk
    read, write = disk.read, disk.write

    async def fail(*_: object) -> bytes:
        await trio.lowlevel.checkpoint()
        raise DiskError(5, "the storage is away")

    disk.read = disk.write = fail  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        disk.read, disk.write = read, write  # type: ignore[method-assign]


async def acquire(host: StoreHost, mode: Mode = Mode.EXCLUSIVE) -> Lease:
    """Acquire as soon as it is free, or the holder is dead."""
    end = trio.current_time() + LATE_S
    while True:
        try:
            return await host.backend.acquire(host.image("a.img"), mode, host.owner, trio.current_time() + 5)
        except (ImageBusy, BackendError):
            if trio.current_time() > end:
                raise
        await trio.sleep(1)


async def lose(host: StoreHost) -> Lease:
    """Take the lease and lose it; the host joins anew."""
    lease = await acquire(host)
    with sick(host):
        while lease.state is not LeaseState.LOST:
            await trio.sleep(0.5)
    await host.backend.release(lease)
    return lease


async def test_a_lease_follows_the_lost_one_if_nobody_had_it(hosts: tuple[StoreHost, StoreHost]) -> None:
    """The next owner of the image is the same mount, in a new life."""
    a, _ = hosts
    lost = await lose(a)
    assert lost.resumable
    again = await acquire(a)
    assert again.follows(lost) and not lost.follows(again)
    await a.backend.release(again)
    later = await acquire(a)
    assert not later.follows(lost), "it was used in between"
    await a.backend.release(later)


@pytest.mark.parametrize("mode", list(Mode))
async def test_not_if_somebody_had_it(hosts: tuple[StoreHost, StoreHost], mode: Mode) -> None:
    """Another host, even as a reader that shared it, breaks the line."""
    a, b = hosts
    lost = await lose(a)
    await b.backend.release(await acquire(b, mode))
    again = await acquire(a)
    assert not again.follows(lost)
    await a.backend.release(again)


async def test_not_if_it_was_taken_by_force(hosts: tuple[StoreHost, StoreHost]) -> None:
    """A lease that was marked free by another host is not as it was left."""
    a, b = hosts
    lost = await lose(a)
    await b.backend.force(b.image("a.img"))
    again = await acquire(a)
    assert not again.follows(lost)
    await a.backend.release(again)


async def test_an_attempt_that_failed_does_not_break_the_line(
    hosts: tuple[StoreHost, StoreHost], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version that this host won and gave back unused is passed over; several are, too."""
    a, b = hosts
    backend = a.backend
    assert isinstance(backend, PaxosBackend)
    lost = await lose(a)
    failures = 3
    still = backend._opened().still

    async def failing(*arguments: object) -> bool:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise BackendError("the storage stuttered")
        return await still(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(backend._opened(), "still", failing)
    again = await acquire(a)
    assert failures < 0 and again.follows(lost)
    await a.backend.release(again)

    lost, failures = await lose(a), 2
    with contextlib.suppress(BackendError):
        while failures > 0:
            await acquire_once(a)
    await b.backend.release(await acquire(b))
    again = await acquire(a)
    assert not again.follows(lost)
    await a.backend.release(again)


async def acquire_once(host: StoreHost) -> None:
    """One attempt; that the holder is not dead yet is no failure."""
    try:
        await host.backend.acquire(host.image("a.img"), Mode.EXCLUSIVE, host.owner, trio.current_time() + 5)
    except ImageBusy:
        await trio.sleep(1)


async def test_a_lease_given_back_in_doubt_is_free_when_the_doubt_ends(
    hosts: tuple[StoreHost, StoreHost],
) -> None:
    """In doubt it cannot be given back; when the storage is back it can, and another host has it."""
    a, b = hosts
    lease = await acquire(a)
    with sick(a):
        while lease.state is not LeaseState.DOUBT:
            await trio.sleep(0.5)
        with pytest.raises(BackendError):
            await a.backend.release(lease)
        with pytest.raises(ImageBusy):
            await b.backend.acquire(b.image("a.img"), Mode.EXCLUSIVE, b.owner, trio.current_time() + 5)
    await trio.sleep(5)
    await a.backend.release(lease)
    other = await b.backend.acquire(b.image("a.img"), Mode.EXCLUSIVE, b.owner, trio.current_time() + 5)
    await b.backend.release(other)


async def test_evidence(hosts: tuple[StoreHost, StoreHost]) -> None:
    """Free, alive, silent, dead: each is said, with where it stands."""
    a, b = hosts
    image = b.image("a.img")
    assert (await b.backend.evidence(image)).free
    lease = await acquire(a)
    await trio.sleep(3)
    alive = await b.backend.evidence(image)
    assert "may be alive" in " ".join(alive.sentences) and alive.forcible and alive.dead_in_s is None
    with sick(a):
        await trio.sleep(9)
        silent = await b.backend.evidence(image)
        assert silent.dead_in_s is not None and 0 < silent.dead_in_s < 18
        await trio.sleep(13)
        dead = await b.backend.evidence(image)
        assert "it is dead" in " ".join(dead.sentences)
        await a.backend.release(lease)
        await b.backend.release(await acquire(b))
    assert "is free" in " ".join((await b.backend.evidence(image)).sentences)


async def test_force_frees_what_is_shared(hosts: tuple[StoreHost, StoreHost]) -> None:
    """Sharers are forgotten; the own lease is not forced."""
    a, b = hosts
    lease = await acquire(a, Mode.SHARED)
    await b.backend.force(b.image("a.img"))
    taken = await b.backend.acquire(b.image("a.img"), Mode.EXCLUSIVE, b.owner, trio.current_time() + 5)
    with pytest.raises(BackendError, match="held by this mount"):
        await b.backend.force(b.image("a.img"))
    await b.backend.release(taken)
    with contextlib.suppress(BackendError):
        await a.backend.release(lease)
