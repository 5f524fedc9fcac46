"""What goes wrong: leases in doubt and lost, releases that fail, changes by path that are refused."""

from __future__ import annotations

import errno

import pytest
import trio

from lockfs.backends.base import LeaseState, Mode
from lockfs.errors import BackendError, ImageBusy, Interrupted, LeaseUnavailable, errno_of
from lockfs.keeper.gate import GateState
from lockfs.keeper.keeper import Access, Grant, Kind
from lockfs.keeper.openers import Role
from lockfs.keeper.policy import Policy, Readers
from tests.conftest import ExpectLog

from .test_handover import keepers_run
from .world import DISK, Host, World, opener

READ, WRITE = Access.READ, Access.WRITE


async def test_doubt_holds_writes_back_until_it_ends(a: Host, expect_log: ExpectLog) -> None:
    """While the lease is in doubt writes wait; when it is certain again they go on."""
    expect_log("WARNING.*in doubt", 1)
    grant = await a.keeper.open(DISK, opener(1), WRITE)
    a.backend.turn_to(LeaseState.DOUBT)
    assert grant.gate.state is GateState.ASK
    assert a.state() == "doubt"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(a.write, grant)
        await trio.sleep(4)
        a.backend.turn_to(LeaseState.HELD)
    assert trio.current_time() == pytest.approx(4.0)
    assert grant.gate.state is GateState.OPEN
    await a.keeper.close(grant)


async def test_doubt_that_lasts_pauses_the_guest(a: Host, expect_log: ExpectLog) -> None:
    """A write that waited for `handover_wait` in doubt fails; a later one may succeed."""
    expect_log("WARNING.*in doubt", 1)
    grant = await a.keeper.open(DISK, opener(1), WRITE)
    a.backend.turn_to(LeaseState.DOUBT)
    with pytest.raises(LeaseUnavailable):
        await a.write(grant)
    assert trio.current_time() == pytest.approx(10.0)
    a.backend.turn_to(LeaseState.HELD)
    await a.write(grant)
    await a.keeper.close(grant)


async def test_a_write_out_of_time_waits_before_anybody_told_of_the_doubt(
    a: Host, expect_log: ExpectLog
) -> None:
    """The lease's time is over, no event has come: writes wait, and go on when the lease is certain again."""
    expect_log("WARNING.*in doubt", 1)
    grant = await a.keeper.open(DISK, opener(1), WRITE)
    a.backend.set_overdue(True)
    assert grant.gate.state is GateState.OPEN
    assert not grant.gate.passable
    async with trio.open_nursery() as nursery:
        nursery.start_soon(a.write, grant)
        await trio.sleep(2)
        assert not a.storage.writing
        a.backend.turn_to(LeaseState.DOUBT)
        await trio.sleep(2)
        assert not a.storage.writing
        a.backend.set_overdue(False)
        a.backend.turn_to(LeaseState.HELD)
    assert trio.current_time() == pytest.approx(4.0)
    assert grant.gate.passable
    await a.keeper.close(grant)


async def test_a_write_out_of_time_fails_at_its_deadline(a: Host) -> None:
    """With no event at all it ends as in doubt: LeaseUnavailable (ENOSPC) after `handover_wait`."""
    grant = await a.keeper.open(DISK, opener(1), WRITE)
    a.backend.set_overdue(True)
    with pytest.raises(LeaseUnavailable) as raised:
        await a.write(grant)
    assert errno_of(raised.value) == errno.ENOSPC
    assert trio.current_time() == pytest.approx(10.0)
    a.backend.set_overdue(False)
    await a.write(grant)
    await a.keeper.close(grant)


async def test_a_lease_in_time_again_without_an_event(a: Host) -> None:
    """A write that waited goes on at its deadline at the latest, and later ones at once."""
    grant = await a.keeper.open(DISK, opener(1), WRITE)
    a.backend.set_overdue(True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(a.write, grant)
        await trio.sleep(1)
        a.backend.set_overdue(False)
        await a.write(grant)
        assert trio.current_time() == pytest.approx(1.0)
    assert trio.current_time() <= 10.0
    await a.keeper.close(grant)


async def test_nothing_is_granted_out_of_time(a: Host) -> None:
    """An open under a lease whose time is over waits, and fails with BackendError if it stays so."""
    grant = await a.keeper.open(DISK, opener(1), WRITE)
    a.backend.set_overdue(True)
    with pytest.raises(BackendError, match="in doubt"):
        await a.keeper.open(DISK, opener(1), WRITE)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_open_and_close, a, 1)
        await trio.sleep(1)
        a.backend.set_overdue(False)
    await a.keeper.close(grant)


async def test_a_lease_out_of_time_is_lost_like_any_other(a: Host, b: Host, expect_log: ExpectLog) -> None:
    """The write that waited is refused when the loss is told, not at its deadline."""
    expect_log("ERROR.*lost", 1)
    grant = await a.keeper.open(DISK, opener(1), WRITE)
    a.backend.set_overdue(True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_unavailable, a, grant)
        await trio.sleep(1)
        a.backend.turn_to(LeaseState.LOST)
    assert trio.current_time() == pytest.approx(1.0)
    other = await b.keeper.open(DISK, opener(2), WRITE)
    await a.keeper.close(grant)
    await b.keeper.close(other)


async def test_nothing_is_granted_in_doubt(a: Host, expect_log: ExpectLog) -> None:
    """An open under a lease in doubt waits for it and fails with BackendError if it stays so."""
    expect_log("WARNING.*in doubt", 1)
    grant = await a.keeper.open(DISK, opener(1), WRITE)
    a.backend.turn_to(LeaseState.DOUBT)
    with pytest.raises(BackendError, match="in doubt"):
        await a.keeper.open(DISK, opener(1), WRITE)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_open_and_close, a, 1)
        await trio.sleep(1)
        a.backend.turn_to(LeaseState.HELD)
    await a.keeper.close(grant)


async def test_a_lost_lease_shuts_its_gates_for_good(a: Host, b: Host, expect_log: ExpectLog) -> None:
    """After LOST no handle of that open writes any more, whatever the backend says later."""
    expect_log("WARNING.*in doubt|ERROR.*lost", 3)
    grant = await a.keeper.open(DISK, opener(1), WRITE)
    a.backend.turn_to(LeaseState.DOUBT)
    lease = a.storage.held[1]["a"]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_unavailable, a, grant)
        await trio.sleep(1)
        a.backend.turn_to(LeaseState.LOST)
        assert grant.gate.state is GateState.SHUT
        assert a.state() == "lost"
        await trio.lowlevel.checkpoint()
    other = await b.keeper.open(DISK, opener(2), WRITE)
    lease.state = LeaseState.HELD
    a.keeper.lease_changed(lease)
    assert grant.gate.state is GateState.SHUT
    lease.state = LeaseState.LOST
    with pytest.raises(LeaseUnavailable):
        await a.write(grant)
    await a.keeper.close(grant)
    await b.keeper.close(other)


async def test_a_lost_image_can_be_opened_again_after_its_close(a: Host, expect_log: ExpectLog) -> None:
    """While a handle from before the loss is open the image is refused; after its close it is not."""
    expect_log("ERROR.*is lost", 1)
    grant = await a.keeper.open(DISK, opener(1), WRITE)
    a.backend.turn_to(LeaseState.LOST)
    with pytest.raises(ImageBusy, match="lost"):
        await a.keeper.open(DISK, opener(1), WRITE)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_open_and_close, a, 1)
        await trio.sleep(1)
        await a.keeper.close(grant)
    assert trio.current_time() == pytest.approx(4.0)


async def test_events_of_strangers_are_ignored(a: Host) -> None:
    """An event of a lease that is not the image's present one changes nothing."""
    first = await a.keeper.open(DISK, opener(1), WRITE)
    old = a.storage.held[1]["a"]
    await a.keeper.close(first)
    grant = await a.keeper.open(DISK, opener(1), WRITE)
    old.state = LeaseState.LOST
    a.keeper.lease_changed(old)
    assert grant.gate.state is GateState.OPEN
    await a.keeper.close(grant)
    a.keeper.lease_changed(old)


async def test_a_release_that_fails_is_tried_again(a: Host, b: Host, expect_log: ExpectLog) -> None:
    """A lease that the storage does not take back stays visible, keeps others out, and is released later."""
    expect_log("ERROR.*could not be given back", 2)
    async with keepers_run(a):
        grant = await a.keeper.open(DISK, opener(1), WRITE)
        a.backend.fail("release", 1, 2)
        await a.keeper.close(grant)
        assert a.keeper.holds(1)
        assert a.state() == "releasing"
        assert a.storage.held[1] and not a.freed
        other = await b.keeper.open(DISK, opener(2), WRITE)
        assert a.freed == [1]
        assert not a.keeper.holds(1)
        await b.keeper.close(other)


async def test_an_open_first_finishes_a_failed_release(a: Host, expect_log: ExpectLog) -> None:
    """The next open gives the leftover lease back before it takes its own, in its own name."""
    expect_log("ERROR.*could not be given back", 1)
    grant = await a.keeper.open(DISK, opener(1), WRITE)
    a.backend.fail("release", 1, 2)
    await a.keeper.close(grant)
    with pytest.raises(BackendError):
        await a.keeper.open(DISK, opener(2), WRITE)
    second = await a.keeper.open(DISK, opener(2), WRITE)
    assert a.storage.held[1]["a"].owner.pid == 2
    await a.keeper.close(second)


async def test_a_close_does_not_wait_for_ever(a: Host, expect_log: ExpectLog) -> None:
    """If the storage hangs at a release the close returns in time, and the loop finishes the work."""
    expect_log("ERROR.*did not take its lease back in time", None)
    async with keepers_run(a):
        grant = await a.keeper.open(DISK, opener(1), WRITE)
        a.backend.delay = 1e6
        await a.keeper.close(grant)
        assert trio.current_time() <= 5.01
        assert a.state() == "releasing"
        a.backend.delay = 0.0
        await trio.sleep(2)
        assert a.state() is None


async def test_a_failed_downgrade_keeps_the_stronger_lease(expect_log: ExpectLog) -> None:
    """If the lease cannot be made shared it stays exclusive until the loop succeeds."""
    expect_log("ERROR.*could not be given back", 1)
    world = World(policy=Policy(readers=Readers.SHARED))
    a = world.hosts[0]
    async with keepers_run(a):
        writer = await a.keeper.open(DISK, opener(1), WRITE)
        reader = await a.keeper.open(DISK, opener(2), READ)
        a.backend.fail("convert", 1)
        await a.keeper.close(writer)
        assert a.storage.held[1]["a"].mode is Mode.EXCLUSIVE
        await trio.sleep(1)
        assert a.storage.held[1]["a"].mode is Mode.SHARED
        await a.keeper.close(reader)
    world.check_nothing_left()


async def test_a_cache_that_cannot_be_dropped_fails_the_open(a: Host) -> None:
    """If `taken` fails the lease is given back and the open fails: stale data must not be read."""
    a.mount.broken.add("taken")
    with pytest.raises(BackendError, match="cached"):
        await a.keeper.open(DISK, opener(1), WRITE)
    assert not a.storage.held[1]


async def test_a_lease_lost_while_it_was_taken(a: Host, expect_log: ExpectLog) -> None:
    """A lease that is lost before its open returned is not granted."""
    expect_log("ERROR.*is lost", 1)
    a.mount.on_taken = lambda inode: a.backend.turn_to(LeaseState.LOST)
    with pytest.raises(BackendError, match="lost"):
        await a.keeper.open(DISK, opener(1), WRITE)


async def test_change_by_path_holds_the_lease(a: Host, b: Host) -> None:
    """A truncate by path has the lease for its time, like an open for writing, and is refused like one."""
    async with a.keeper.changing(DISK, opener(1)) as grant:
        assert grant.kind is Kind.LEASED
        with pytest.raises(ImageBusy):
            await b.keeper.open(DISK, opener(2), WRITE)
    writer = await b.keeper.open(DISK, opener(2), WRITE)
    with pytest.raises(ImageBusy, match="on b"):
        async with a.keeper.changing(DISK, opener(1)):
            pytest.fail("changed an image that another host holds")
    await b.keeper.close(writer)


async def test_change_by_path_within_the_owner(a: Host) -> None:
    """The process that writes the image may change it by path; another process of the host may not."""
    writer = await a.keeper.open(DISK, opener(1), WRITE)
    async with a.keeper.changing(DISK, opener(1)):
        assert a.backend.count("acquire") == 1
    with pytest.raises(ImageBusy):
        async with a.keeper.changing(DISK, opener(2)):
            pytest.fail("changed an image that another process writes")
    assert writer.gate.state is GateState.OPEN
    await a.keeper.close(writer)


async def test_a_managers_change_by_path_is_an_ordinary_one(a: Host) -> None:
    """A manager may truncate a free image by path: it has the lease for that."""
    async with a.keeper.changing(DISK, opener(1, Role.MANAGER)) as grant:
        assert grant.gate.state is GateState.OPEN


async def test_change_by_path_can_be_interrupted(a: Host) -> None:
    """A signal ends the waiting of a change by path."""
    writer = await a.keeper.open(DISK, opener(1), WRITE)

    async def change() -> None:
        with pytest.raises(Interrupted):
            async with a.keeper.changing(DISK, opener(2)):
                pytest.fail("changed")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(change)
        await trio.sleep(1)
        a.keeper.interrupt(2)
    assert trio.current_time() == pytest.approx(1.0)
    await a.keeper.close(writer)


async def test_removal_is_refused_at_once_if_another_host_has_it(a: Host, b: Host) -> None:
    """An image that another host holds is not removed, and the refusal takes no time."""
    writer = await a.keeper.open(DISK, opener(1), WRITE)
    with pytest.raises(ImageBusy, match="on a"):
        async with b.keeper.removing(DISK, opener(2)):
            pytest.fail("removed")
    assert trio.current_time() == 0
    await a.keeper.close(writer)


async def test_removal_passes_local_holders_and_keeps_hosts_out(a: Host, b: Host) -> None:
    """A holder of this host is no obstacle; until the removal ended no other host gets the image."""
    writer = await a.keeper.open(DISK, opener(1), WRITE)
    async with a.keeper.removing(DISK, opener(2)):
        await a.keeper.close(writer)
        assert a.keeper.images()[0].openers == ((2, "qemu-img", "removing"),)
        with pytest.raises(ImageBusy):
            await b.keeper.open(DISK, opener(3), WRITE)
        again = await a.keeper.open(DISK, opener(4), WRITE)
    assert again.gate.state is GateState.OPEN
    await a.keeper.close(again)


async def test_removal_does_not_spare_a_later_open_the_cache_drop(a: Host) -> None:
    """A writer that comes in under a removal's lease still has stale caches dropped."""
    async with a.keeper.removing(DISK, opener(2)):
        assert a.mount.calls == []
        grant = await a.keeper.open(DISK, opener(1), WRITE)
        assert a.mount.calls == ["taken"]
    await a.keeper.close(grant)


async def _open_and_close(host: Host, pid: int) -> None:
    await host.keeper.close(await host.keeper.open(DISK, opener(pid), WRITE))


async def _unavailable(host: Host, grant: Grant) -> None:
    with pytest.raises(LeaseUnavailable):
        await host.write(grant)
