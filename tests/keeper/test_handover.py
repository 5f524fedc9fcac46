"""Handing a lease from a stopped guest to its successor."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from lockfs.errors import ImageBusy, LeaseUnavailable
from lockfs.keeper.gate import GateState
from lockfs.keeper.keeper import Access, Grant, Kind
from lockfs.keeper.openers import Role
from lockfs.keeper.policy import Policy, Readers
from tests.conftest import ExpectLog

from .world import DISK, Host, World, opener

READ, WRITE = Access.READ, Access.WRITE
SOURCE, TARGET = opener(1, Role.GUEST), opener(2, Role.INCOMING)


@asynccontextmanager
async def keepers_run(*hosts: Host) -> AsyncIterator[None]:
    """The keepers' own loops, for the time of the block."""
    async with trio.open_nursery() as nursery:
        for host in hosts:
            await nursery.start(host.keeper.run)
        yield
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def migration(a: Host, b: Host) -> AsyncIterator[tuple[Grant, Grant]]:
    """A guest that runs on a and was seen to, its successor on b with a provisional handle."""
    async with keepers_run(a, b):
        source = await a.keeper.open(DISK, SOURCE, WRITE)
        a.mount.bytes[1].add(1)
        await a.write(source)
        await trio.sleep(0.5)
        target = await b.keeper.open(DISK, TARGET, WRITE)
        yield source, target
        for host, grant in ((a, source), (b, target)):
            if grant.gate.state is not GateState.SHUT:
                await host.keeper.close(grant)


async def test_successor_gets_a_provisional_handle_at_once(a: Host, b: Host) -> None:
    """An incoming guest's early writable open neither waits nor fails while the source holds the image."""
    async with migration(a, b) as (source, target):
        assert (source.kind, source.may_yield) == (Kind.LEASED, True)
        assert (target.kind, target.gate.state) == (Kind.PROVISIONAL, GateState.ASK)
        assert b.state() == "provisional"
        assert b.backend.count("acquire") == 1


async def test_first_write_takes_over_from_a_stopped_guest(a: Host, b: Host) -> None:
    """When the source has dropped its write byte, the successor's first write gets the lease quickly."""
    async with migration(a, b) as (source, target):
        a.mount.bytes[1].clear()
        b.mount.bytes[1].add(2)
        start = trio.current_time()
        await b.write(target)
        assert trio.current_time() - start < 0.35
        assert (target.kind, target.gate.state) == (Kind.LEASED, GateState.OPEN)
        assert (source.kind, source.gate.state) == (Kind.PROVISIONAL, GateState.ASK)
        assert b.mount.calls.count("taken") == 1
        assert not b.storage.wanted[1]


async def test_a_successor_is_bound_before_it_writes(a: Host, b: Host) -> None:
    """Where the storage can refuse what is written, it is told of the successor's opens under the lease,
    while their gates are shut; of a source that comes back too."""
    a.backend.ties = b.backend.ties = True
    async with migration(a, b) as (source, target):
        a.mount.bytes[1].clear()
        b.mount.bytes[1].add(2)
        a.mount.unbound[1], b.mount.unbound[1] = [70], [80, 81]
        await b.write(target)
        assert b.backend.bound == [80, 81] and not a.backend.bound
        await trio.sleep(0.5)
        b.mount.bytes[1].clear()
        await a.write(source)
        assert a.backend.bound == [70]


async def test_a_successor_that_cannot_be_bound_does_not_write(
    a: Host, b: Host, expect_log: ExpectLog
) -> None:
    """It fails as if there were no lease; one that was closed meanwhile is no obstacle."""
    b.backend.ties = True
    async with migration(a, b) as (_, target):
        a.mount.bytes[1].clear()
        b.mount.unbound[1] = [80, 81]
        b.backend.unbindable = {80: errno.EBADF, 81: errno.EIO}
        with pytest.raises(LeaseUnavailable, match="cannot be bound: Input/output error"):
            await b.write(target)
        assert target.gate.state is GateState.ASK
        b.backend.unbindable = {80: errno.EBADF}
        await b.write(target)
        assert b.backend.bound == [81]


async def test_a_running_guest_yields_nothing(a: Host, b: Host) -> None:
    """While the source's guest may write, the successor's write fails and the source never notices."""
    async with migration(a, b) as (source, target):
        start = trio.current_time()
        with pytest.raises(LeaseUnavailable, match=r"held by qemu-system-x86_64 \(pid 1\) on a"):
            await b.write(target)
        assert trio.current_time() - start == pytest.approx(10.0, abs=0.1)
        assert (source.kind, source.gate.state) == (Kind.LEASED, GateState.OPEN)
        assert not b.storage.wanted[1]


async def test_lease_comes_back_to_a_source_that_runs_on(a: Host, b: Host) -> None:
    """A source that resumes after a failed migration claims the lease from the successor that stopped."""
    async with migration(a, b) as (source, target):
        a.mount.bytes[1].clear()
        b.mount.bytes[1].add(2)
        await b.write(target)
        await trio.sleep(0.5)
        b.mount.bytes[1].clear()
        a.mount.bytes[1].add(1)
        await a.write(source)
        assert source.gate.state is GateState.OPEN
        assert target.gate.state is GateState.ASK


async def test_a_guest_never_seen_with_its_byte_yields_nothing(a: Host, b: Host) -> None:
    """A guest that takes no lock bytes (locking=off, or a cold start) is never believed to have stopped."""
    async with keepers_run(a, b):
        source = await a.keeper.open(DISK, SOURCE, WRITE)
        target = await b.keeper.open(DISK, TARGET, WRITE)
        with pytest.raises(LeaseUnavailable):
            await b.write(target)
        assert source.gate.state is GateState.OPEN
        assert a.backend.count("requested") == 0
        assert a.mount.calls.count("still_written") < 15
        await a.keeper.close(source)
        await b.keeper.close(target)


async def test_another_guests_byte_is_no_sight_of_the_owner(a: Host) -> None:
    """A byte that a provisional guest on the same host holds does not prove the owner's."""
    async with keepers_run(a):
        source = await a.keeper.open(DISK, SOURCE, WRITE)
        target = await a.keeper.open(DISK, TARGET, WRITE)
        a.mount.bytes[1].add(2)
        await trio.sleep(5)
        assert not source.seen
        await a.keeper.close(source)
        await a.keeper.close(target)


async def test_a_successor_finds_the_image_free(a: Host) -> None:
    """With the image free an incoming guest has the lease at once; its first write costs no attempt."""
    target = await a.keeper.open(DISK, TARGET, WRITE)
    assert (target.kind, target.may_yield) == (Kind.LEASED, True)
    await a.write(target)
    assert target.gate.state is GateState.OPEN
    assert a.backend.count("acquire") == 1
    await a.keeper.close(target)


async def test_a_successor_that_never_ran_lets_go(a: Host, b: Host) -> None:
    """Two incoming guests, neither of which ran: the one that writes first gets the lease from the other."""
    async with keepers_run(a, b):
        idle = await a.keeper.open(DISK, opener(1, Role.INCOMING), WRITE)
        target = await b.keeper.open(DISK, TARGET, WRITE)
        await b.write(target)
        assert idle.kind is Kind.PROVISIONAL
        await a.keeper.close(idle)
        await b.keeper.close(target)


async def test_who_read_first_does_not_yield(a: Host) -> None:
    """A guest with a read-only descriptor (auto-read-only=on) closes to hand over; others never yield."""
    reader = await a.keeper.open(DISK, SOURCE, READ)
    grant = await a.keeper.open(DISK, SOURCE, WRITE)
    assert not grant.may_yield
    await a.keeper.close(grant)
    grant = await a.keeper.open(DISK, opener(5), WRITE)
    assert not grant.may_yield
    await a.keeper.close(grant)
    await a.keeper.close(reader)
    grant = await a.keeper.open(DISK, SOURCE, WRITE)
    assert grant.may_yield
    await a.keeper.close(grant)


async def test_policy_can_forbid_yielding() -> None:
    """With yielding=False nothing may yield, and a successor's lease is an ordinary one."""
    world = World(policy=Policy(yielding=False))
    a = world.hosts[0]
    for who in (SOURCE, TARGET):
        grant = await a.keeper.open(DISK, who, WRITE)
        assert not grant.may_yield and grant.gate.state is GateState.OPEN
        await a.keeper.close(grant)


async def test_a_cold_start_is_never_deferred(a: Host, b: Host) -> None:
    """A guest without -incoming gets no provisional handle, and its waiting asks nobody to let go."""
    async with migration(a, b):
        a.mount.bytes[1].clear()
        with pytest.raises(ImageBusy):
            await b.keeper.open(DISK, opener(9, Role.GUEST), WRITE)
        assert b.backend.count("request") == 0


async def test_an_incoming_open_that_waits_asks_too(a: Host, b: Host) -> None:
    """A successor with auto-read-only=on is let in by a stopped source that keeps its handle."""
    async with migration(a, b) as (source, target):
        a.mount.bytes[1].clear()
        reader = await b.keeper.open(DISK, TARGET, READ)
        start = trio.current_time()
        grant = await b.keeper.open(DISK, TARGET, WRITE)
        assert 0.5 <= trio.current_time() - start < 0.9
        await b.keeper.close(grant)
        await b.keeper.close(reader)
        assert (source.kind, target.kind) == (Kind.PROVISIONAL, Kind.PROVISIONAL)


async def test_writes_under_way_end_before_the_lease_goes(a: Host, b: Host) -> None:
    """A yield waits for changes under way; none starts after; data is flushed before the lease is free."""
    async with migration(a, b) as (source, target), trio.open_nursery() as nursery:
        nursery.start_soon(a.write, source, 1.0)
        await trio.sleep(0.01)
        a.mount.bytes[1].clear()
        start = trio.current_time()
        await b.write(target)
        assert trio.current_time() - start >= 0.98
        assert a.mount.calls.count("settle") == 1


async def test_a_write_that_does_not_end_stops_the_yield(a: Host, b: Host, expect_log: ExpectLog) -> None:
    """If a change stays under way for too long the gates open again and the lease stays."""
    expect_log("WARNING.*under way for long", None)
    async with migration(a, b) as (source, target):
        assert source.gate.enter() is GateState.OPEN
        a.mount.bytes[1].clear()
        with pytest.raises(LeaseUnavailable):
            await b.write(target)
        await trio.sleep(2.5)
        assert (source.kind, source.gate.state) == (Kind.LEASED, GateState.OPEN)
        source.gate.leave()


@pytest.mark.parametrize("call", ["settle", "still_written"])
async def test_no_yield_if_the_mount_cannot_help(a: Host, b: Host, call: str, expect_log: ExpectLog) -> None:
    """Where data cannot be flushed, or locks cannot be read, the lease stays where it is."""
    expect_log("WARNING.*locks cannot be read|ERROR.*cannot be flushed", None)
    async with migration(a, b) as (source, target):
        a.mount.bytes[1].clear()
        a.mount.broken.add(call)
        with pytest.raises(LeaseUnavailable):
            await b.write(target)
        assert (source.kind, source.gate.state) == (Kind.LEASED, GateState.OPEN)
        a.mount.broken.clear()


async def test_a_byte_taken_again_stops_the_yield(a: Host, b: Host) -> None:
    """A source that resumes while its writes drain keeps the lease."""
    async with migration(a, b) as (source, target):
        assert source.gate.enter() is GateState.OPEN
        a.mount.bytes[1].clear()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_unavailable, b, target)
            await trio.sleep(0.5)
            assert a.state() == "yielding"
            a.mount.bytes[1].add(1)
            source.gate.leave()
            await trio.sleep(0.05)
            assert (source.kind, source.gate.state) == (Kind.LEASED, GateState.OPEN)


async def test_a_write_during_a_yield_that_fails_goes_on(a: Host, b: Host, expect_log: ExpectLog) -> None:
    """A data thread told ASK by a yield that is then given up is let in again, with no lease to fetch."""
    expect_log("WARNING.*under way for long", None)
    async with migration(a, b) as (source, target), trio.open_nursery() as nursery:
        assert source.gate.enter() is GateState.OPEN
        a.mount.bytes[1].clear()
        nursery.start_soon(_unavailable, b, target)
        await trio.sleep(0.3)
        assert source.gate.state is GateState.ASK
        start = trio.current_time()
        await a.write(source)
        assert trio.current_time() - start < 2.0
        a.mount.bytes[1].add(1)
        source.gate.leave()
    assert a.backend.count("acquire") == 1


async def test_close_during_a_yield(a: Host, b: Host) -> None:
    """A source that closes while its lease is being yielded leaves it free."""
    async with migration(a, b) as (source, target):
        second = await a.keeper.open(DISK, SOURCE, WRITE)
        assert second.gate.enter() is GateState.OPEN
        a.mount.bytes[1].clear()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(b.write, target)
            await trio.sleep(0.3)
            assert a.state() == "yielding"
            nursery.start_soon(a.keeper.close, source)
            second.gate.leave()
            nursery.start_soon(a.keeper.close, second)
        assert target.gate.state is GateState.OPEN
        assert a.state() is None


async def test_open_during_a_yield_waits_for_its_end(a: Host, b: Host) -> None:
    """An open that comes during a yield does not snatch the lease from the host that it is yielded to."""
    async with migration(a, b) as (source, target):
        assert source.gate.enter() is GateState.OPEN
        a.mount.bytes[1].clear()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(b.write, target)
            await trio.sleep(0.3)
            nursery.start_soon(_busy, a, SOURCE)
            await trio.sleep(0.1)
            source.gate.leave()


async def test_claims_of_one_process_join(a: Host, b: Host) -> None:
    """Many writes that ask at once cost one claim, and every handle of the process may write then."""
    async with migration(a, b) as (_, target):
        second = await b.keeper.open(DISK, TARGET, WRITE)
        a.mount.bytes[1].clear()
        before = b.backend.count("acquire")
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(b.write, target)
        assert b.backend.count("acquire") - before <= 12
        assert second.gate.state is GateState.OPEN
        await b.keeper.close(second)


async def test_a_claim_is_for_its_own_process(a: Host, b: Host) -> None:
    """Of two successors on one host only the one that claimed may write."""
    async with migration(a, b) as (_, target):
        stranger = await b.keeper.open(DISK, opener(6, Role.INCOMING), WRITE)
        a.mount.bytes[1].clear()
        await b.write(target)
        assert (stranger.kind, stranger.gate.state) == (Kind.PROVISIONAL, GateState.ASK)
        await b.keeper.close(stranger)


async def test_joined_claims_fail_together(a: Host, b: Host) -> None:
    """When a claim fails, all writes that joined it fail in the same way."""
    async with migration(a, b) as (_, target), trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(_unavailable, b, target)


async def test_a_cancelled_claim_leaves_the_others_waiting(a: Host, b: Host) -> None:
    """If the write that leads a claim is cancelled, one that joined takes over."""
    async with migration(a, b) as (_, target):
        async with trio.open_nursery() as outer:
            async with trio.open_nursery() as inner:
                inner.start_soon(b.write, target)
                await trio.sleep(0.05)
                outer.start_soon(b.write, target)
                await trio.sleep(0.05)
                inner.cancel_scope.cancel()
            a.mount.bytes[1].clear()
        assert target.gate.state is GateState.OPEN


async def test_a_claim_bears_with_the_storage(a: Host, b: Host, expect_log: ExpectLog) -> None:
    """Storage errors during a claim are tried again; at the end they are a paused guest, not an I/O error."""
    expect_log("WARNING.*could not be asked", None)
    async with migration(a, b) as (_, target):
        a.mount.bytes[1].clear()
        b.backend.fail("acquire", 1, 2)
        b.backend.fail("request", 1)
        await b.write(target)
    async with migration(a, b) as (_, target):
        b.backend.fail("acquire")
        with pytest.raises(LeaseUnavailable):
            await b.write(target)
        b.backend.failing.clear()


async def test_requests_that_cannot_be_read(a: Host, b: Host, expect_log: ExpectLog) -> None:
    """Errors of the request mailbox are survived on the holder's side and do not end its loop."""
    expect_log("WARNING.*cannot be read", 1)
    async with migration(a, b) as (_, target):
        a.mount.bytes[1].clear()
        a.backend.fail("requested", 1, 2, 3, 4)
        await b.write(target)


async def test_a_failed_withdrawal_is_survived(a: Host, b: Host, expect_log: ExpectLog) -> None:
    """A request that cannot be taken back does not spoil the claim it was made for."""
    expect_log("WARNING.*could not be taken back", 1)
    async with migration(a, b) as (_, target):
        a.mount.bytes[1].clear()
        b.backend.fail("withdraw", 1)
        await b.write(target)
        b.storage.wanted[1].clear()


async def test_no_yield_during_a_removal(a: Host, b: Host) -> None:
    """While the image is being unlinked here the lease goes nowhere."""
    async with migration(a, b) as (source, target):
        a.mount.bytes[1].clear()
        async with a.keeper.removing(DISK, opener(5)):
            with pytest.raises(LeaseUnavailable):
                await b.write(target)
        assert source.kind is Kind.LEASED


async def test_handover_within_one_host(a: Host) -> None:
    """A successor on the same mount gets the stopped source's lease; the storage never sees it free."""
    async with keepers_run(a):
        source = await a.keeper.open(DISK, SOURCE, WRITE)
        a.mount.bytes[1].add(1)
        await trio.sleep(0.5)
        target = await a.keeper.open(DISK, TARGET, WRITE)
        assert target.kind is Kind.PROVISIONAL
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.write, target)
            await trio.sleep(1)
            assert target.kind is Kind.PROVISIONAL
            a.mount.bytes[1].clear()
        assert (source.kind, target.kind) == (Kind.PROVISIONAL, Kind.LEASED)
        assert dict(a.backend.counts).get("release") is None
        await a.keeper.close(source)
        await a.keeper.close(target)


async def test_polling_stops_with_its_reason(a: Host) -> None:
    """Requests are looked for every 0.1 s while a grant could yield, and not at all otherwise."""
    async with keepers_run(a):
        source = await a.keeper.open(DISK, SOURCE, WRITE)
        a.mount.bytes[1].add(1)
        await trio.sleep(2.05)
        assert 17 <= a.backend.count("requested") <= 20
        await a.keeper.close(source)
        before = a.backend.count("requested")
        plain = await a.keeper.open(DISK, opener(5), WRITE)
        await trio.sleep(5)
        assert a.backend.count("requested") <= before + 1
        await a.keeper.close(plain)


async def test_readers_under_the_lease_stop_a_yield() -> None:
    """With readers=shared a reader here would keep the other host out anyway, so nothing is yielded."""
    world = World(policy=Policy(readers=Readers.SHARED))
    a, b = world.hosts
    async with migration(a, b) as (source, target):
        reader = await a.keeper.open(DISK, opener(7), READ)
        a.mount.bytes[1].clear()
        with pytest.raises(LeaseUnavailable):
            await b.write(target)
        assert source.kind is Kind.LEASED
        await a.keeper.close(reader)
    world.check_nothing_left()


async def test_closing_a_handle_that_claims(a: Host, b: Host) -> None:
    """A provisional handle closed while another task claims for it ends the claim and takes nothing."""
    async with migration(a, b) as (_, target):
        async with trio.open_nursery() as nursery:
            extra = await b.keeper.open(DISK, opener(6, Role.INCOMING), WRITE)
            nursery.start_soon(_unavailable, b, extra)
            await trio.sleep(0.2)
            await b.keeper.close(extra)
            await trio.lowlevel.checkpoint()
        assert target.kind is Kind.PROVISIONAL


async def _unavailable(host: Host, grant: Grant) -> None:
    with pytest.raises(LeaseUnavailable):
        await host.write(grant)


async def _busy(host: Host, who: object) -> None:
    with pytest.raises(ImageBusy, match="on b"):
        await host.keeper.open(DISK, who, WRITE)  # type: ignore[arg-type]
