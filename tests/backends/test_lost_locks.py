"""Locks that the storage drops behind the holder's back: the probe notices, and says so once."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import trio
import trio.testing

from lockfs.backends import image_locks
from lockfs.backends.base import LeaseState, Mode
from lockfs.backends.fcntl import PROBE_S, FcntlOptions
from lockfs.backends.file_lease import COUNTS_MAX_S, STOOD_S, Looks, Probed, probe_all
from lockfs.linux import ofd
from lockfs.paxos.seams import Clock, WallClock
from tests.conftest import ExpectLog

from .makers import FcntlMaker, StoreHost

IDLE_S = 0.02


@pytest.fixture
def clock(autojump_clock: trio.testing.MockClock) -> trio.testing.MockClock:
    """Time passes when nothing has happened for a while, for probes are made on threads."""
    autojump_clock.autojump_threshold = IDLE_S
    return autojump_clock


async def _probed(host: StoreHost, seconds: float) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(host.backend.run)
        await trio.sleep(seconds)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("mode", list(Mode))
async def test_good_locks_stay_what_they_are(
    tmp_path: Path, clock: trio.testing.MockClock, mode: Mode
) -> None:
    """Many probes change nothing: no event, the same locks, shared ones still shared."""
    async with FcntlMaker(tmp_path, [FcntlOptions()]).hosts(2) as (host, other):
        lease = await host.backend.acquire(host.image("a"), mode, host.owner, trio.current_time() + 5)
        await _probed(host, 10 * PROBE_S)
        assert lease.state is LeaseState.HELD and not host.changes
        if mode is Mode.SHARED:
            both = await other.backend.acquire(other.image("a"), mode, other.owner, trio.current_time() + 5)
            await _probed(host, 3 * PROBE_S)
            await other.backend.release(both)
        await host.backend.release(lease)
        assert ofd.conflict(other.image("a").descriptor, ofd.WRITE, 0, 0) is None


async def test_a_lock_that_somebody_else_has_is_lost(
    tmp_path: Path, clock: trio.testing.MockClock, expect_log: ExpectLog
) -> None:
    """After the storage forgot our lock and gave it to another host, the lease is lost, once."""
    expect_log("ERROR.*has dropped its locks: somebody else", 1)
    async with FcntlMaker(tmp_path, [FcntlOptions()]).hosts(2) as (host, other):
        lease = await host.backend.acquire(
            host.image("a"), Mode.EXCLUSIVE, host.owner, trio.current_time() + 5
        )
        image_locks.drop(host.image("a").descriptor)  # as a server does that restarts
        taken = await other.backend.acquire(
            other.image("a"), Mode.EXCLUSIVE, other.owner, trio.current_time() + 5
        )
        await _probed(host, 4 * PROBE_S)
        assert lease.state is LeaseState.LOST and host.changes == [lease]
        await host.backend.release(lease)
        await other.backend.release(taken)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOLCK, errno.ESTALE])
async def test_a_lock_that_the_storage_says_is_lost(
    tmp_path: Path,
    clock: trio.testing.MockClock,
    expect_log: ExpectLog,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    """What NFS answers for a lock that it could not reclaim loses the lease."""
    expect_log("ERROR.*has dropped its locks", 1)
    async with FcntlMaker(tmp_path, [FcntlOptions()]).hosts(1) as (host,):
        lease = await host.backend.acquire(
            host.image("a"), Mode.EXCLUSIVE, host.owner, trio.current_time() + 5
        )

        def refuse(fd: int, mode: Mode) -> bool:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(image_locks, "still_ours", refuse)
            await _probed(host, 2 * PROBE_S)
        assert lease.state is LeaseState.LOST and host.changes == [lease]
        await host.backend.release(lease)


async def test_a_storage_that_does_not_say_loses_nothing(
    tmp_path: Path,
    clock: trio.testing.MockClock,
    expect_log: ExpectLog,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another error is told, and nothing follows from it."""
    expect_log("WARNING.*cannot be checked", None)
    async with FcntlMaker(tmp_path, [FcntlOptions()]).hosts(1) as (host,):
        lease = await host.backend.acquire(
            host.image("a"), Mode.EXCLUSIVE, host.owner, trio.current_time() + 5
        )

        def refuse(fd: int, mode: Mode) -> bool:
            raise OSError(errno.ETIMEDOUT, "timed out")

        monkeypatch.setattr(image_locks, "still_ours", refuse)
        await _probed(host, 2 * PROBE_S)
        assert lease.state is LeaseState.HELD
        await host.backend.release(lease)


async def test_a_probe_never_locks_what_was_released(tmp_path: Path) -> None:
    """A lease that is released while it waits to be probed is left alone."""
    async with FcntlMaker(tmp_path, [FcntlOptions()]).hosts(1) as (host,):
        lease = await host.backend.acquire(
            host.image("a"), Mode.EXCLUSIVE, host.owner, trio.current_time() + 5
        )
        await host.backend.release(lease)
        assert probe_all([lease]) == Probed()
        descriptor = os.open(tmp_path / "store" / "a", os.O_RDWR)
        assert ofd.conflict(descriptor, ofd.WRITE, 0, 0) is None
        os.close(descriptor)


class _Time(Clock, WallClock):
    """Two clocks that a test sets."""

    late = 1.0

    def __init__(self, now: float) -> None:
        self.time = now

    def now(self) -> float:
        """The time."""
        return self.time


@pytest.mark.parametrize("local", [True, False])
async def test_a_look_counts_for_a_while(tmp_path: Path, clock: trio.testing.MockClock, local: bool) -> None:
    """Where locks are a server's, a host that has not looked lately (frozen, cut off) starts no write before
    it has; on a local file system nothing has to be looked at."""
    now = _Time(1000.0)
    async with FcntlMaker(tmp_path, [FcntlOptions()]).hosts(1) as (host,):
        host.backend._looks = None if local else Looks(now, None)
        lease = await host.backend.acquire(
            host.image("a"), Mode.EXCLUSIVE, host.owner, trio.current_time() + 5
        )
        now.time += COUNTS_MAX_S - 1
        assert lease.in_time()
        now.time += 2
        assert lease.in_time() is local
        await _probed(host, 2 * PROBE_S)
        assert lease.in_time()
        assert host.changes == ([] if local else [lease]), "who waits to write is woken, once"
        await host.backend.release(lease)


@pytest.mark.parametrize("takes_s", [2.0, COUNTS_MAX_S + 1.0])
async def test_a_look_that_takes_long(
    tmp_path: Path, clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch, takes_s: float
) -> None:
    """The one before runs out meanwhile: whoever met that is woken by the first look that counts."""
    now, takes = _Time(1000.0), [takes_s, 0.0, 0.0]
    asked = image_locks.still_ours

    def slowly(fd: int, mode: Mode) -> bool:
        now.time += takes.pop(0)
        return asked(fd, mode)

    monkeypatch.setattr(image_locks, "still_ours", slowly)
    async with FcntlMaker(tmp_path, [FcntlOptions()]).hosts(1) as (host,):
        host.backend._looks = Looks(now, None)
        lease = await host.backend.acquire(
            host.image("a"), Mode.EXCLUSIVE, host.owner, trio.current_time() + 5
        )
        now.time += COUNTS_MAX_S - 1
        assert lease.in_time()
        await _probed(host, 2.5 * PROBE_S)
        assert lease.in_time() and lease in host.changes
        await host.backend.release(lease)


async def test_a_machine_that_stood_still_with_its_clocks(
    tmp_path: Path, clock: trio.testing.MockClock
) -> None:
    """The hardware's clock went on, so it has not looked; it may show up to a step less than it was."""
    boot, hardware = _Time(1000.0), _Time(5000.0)
    async with FcntlMaker(tmp_path, [FcntlOptions()]).hosts(1) as (host,):
        host.backend._looks = Looks(boot, hardware)
        lease = await host.backend.acquire(
            host.image("a"), Mode.EXCLUSIVE, host.owner, trio.current_time() + 5
        )
        hardware.time += STOOD_S + hardware.late
        assert lease.in_time()
        hardware.time += 0.1
        assert not lease.in_time()
        await _probed(host, 2 * PROBE_S)
        assert lease.in_time()
        hardware.time -= 100  # set back
        assert lease.in_time()
        await host.backend.release(lease)


async def test_a_look_counts_for_less_where_the_server_is_quick(
    tmp_path: Path, clock: trio.testing.MockClock
) -> None:
    """A server that drops a silent host's locks after 6 s: writes stop after 3, a look comes each second."""
    now = _Time(1000.0)
    looks = Looks(now, None, 6.0)
    assert (looks.counts_s, looks.every_s) == (3.0, 1.0)
    assert Looks(now, None, 90.0).counts_s == COUNTS_MAX_S
    async with FcntlMaker(tmp_path, [FcntlOptions()]).hosts(1) as (host,):
        host.backend._looks = looks
        lease = await host.backend.acquire(
            host.image("a"), Mode.EXCLUSIVE, host.owner, trio.current_time() + 5
        )
        now.time += 2.9
        assert lease.in_time()
        now.time += 0.1
        assert not lease.in_time()
        await _probed(host, 1.1)
        assert lease.in_time()
        await host.backend.release(lease)
