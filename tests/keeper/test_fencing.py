"""Fencing on a virtual clock: in what order what is open of a lost image dies, and who may go on."""

from __future__ import annotations

import pytest
import trio

from lockfs.backends.base import LeaseState, Mode
from lockfs.errors import ImageBusy, LeaseUnavailable
from lockfs.keeper.gate import GateState
from lockfs.keeper.keeper import Access, Grant, Kind
from lockfs.keeper.openers import Role
from lockfs.keeper.policy import Local, OnLost, Policy, Readers
from lockfs.linux.proc import Process
from tests.conftest import ExpectLog

from .test_handover import keepers_run
from .world import DISK, OTHER, Host, World, opener

READ, WRITE = Access.READ, Access.WRITE
MAPPER = Process(70, 700, "mapper", ())


@pytest.fixture(autouse=True)
def _said(expect_log: ExpectLog) -> None:
    """Everything here is about what is logged as an error; what each test needs it looks at itself."""
    expect_log("(WARNING|ERROR|CRITICAL) lockfs.keeper", None)


def resumable(world: World) -> None:
    """Let the storage's leases tell which follows which."""
    world.storage.resumable = True


async def test_what_passes_no_gate_is_fenced_in_doubt(a: Host, b: Host) -> None:
    """A handle that writes past lockfs is revoked as soon as its lease is in doubt; the lease goes back."""
    async with keepers_run(a, b):
        grant = await a.keeper.open(DISK, opener(1), WRITE)
        a.mount.unguarded.add(1)
        a.mount.maps[1] = {MAPPER}
        a.backend.turn_to(LeaseState.DOUBT)
        assert grant.gate.state is GateState.SHUT
        await trio.sleep(0.5)
        assert a.storage.held[1], "given back with writes under way"
        await trio.sleep(1)
        assert a.mount.calls[-4:] == ["taken", "revoke", "mappers", "settle"]
        assert a.mount.killed == [(70, 700)]
        assert grant.kind is Kind.FENCED and a.state() == "fenced"
        assert not a.storage.held[1]
        other = await b.keeper.open(DISK, opener(2), WRITE)
        await b.keeper.close(other)
        await a.keeper.close(grant)


async def test_what_passes_gates_is_not_fenced_in_doubt(a: Host) -> None:
    """A guarded handle waits out a doubt; only those who map the image cannot."""
    async with keepers_run(a):
        grant = await a.keeper.open(DISK, opener(1), WRITE)
        a.mount.maps[1] = {MAPPER}
        a.backend.turn_to(LeaseState.DOUBT)
        await trio.sleep(0.5)
        assert "revoke" not in a.mount.calls and a.mount.killed == [(70, 700)]
        a.backend.turn_to(LeaseState.HELD)
        await a.write(grant)
        await a.keeper.close(grant)


async def test_lost_without_memory_is_fenced_for_good(a: Host, b: Host) -> None:
    """A lease of which nobody can tell whether it was taken meanwhile is never taken up again."""
    async with keepers_run(a, b):
        grant = await a.keeper.open(DISK, opener(1), WRITE)
        a.backend.turn_to(LeaseState.LOST)
        await trio.sleep(0.5)
        assert "revoke" in a.mount.calls and grant.kind is Kind.FENCED
        await unavailable(a, grant)
        await a.keeper.close(grant)


async def test_the_same_process_opens_anew_while_its_dead_handles_are_open(a: Host) -> None:
    """After fencing the image can be had again at once, dead handles or not."""
    async with keepers_run(a):
        dead = await a.keeper.open(DISK, opener(1), WRITE)
        reader = await a.keeper.open(DISK, opener(1), READ)
        a.mount.unguarded.add(1)
        a.backend.turn_to(LeaseState.LOST)
        fresh = await a.keeper.open(DISK, opener(1), WRITE)
        assert trio.current_time() < 1
        await a.write(fresh)
        await unavailable(a, dead)
        assert a.state() == "held"
        for grant in (dead, reader, fresh):
            await a.keeper.close(grant)


async def test_the_lease_goes_back_last(a: Host, b: Host) -> None:
    """By hand: not before the handles are revoked, mappers gone, writes ended and data on the storage."""
    order: list[str] = []
    async with keepers_run(a, b):
        grant = await a.keeper.open(DISK, opener(1), WRITE)
        a.mount.unguarded.add(1)
        a.mount.maps[1] = {MAPPER}
        a.mount.revoke_lasts = 0.2

        def released(inode: int) -> None:
            order.append("released")
            assert grant.kind is Kind.FENCED and grant.gate.state is GateState.SHUT
            assert not grant.gate.inside and not a.mount.unguarded and not a.mount.maps[1]
            assert a.mount.calls[-3:] == ["revoke", "mappers", "settle"]

        a.backend.before_release = released
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.write, grant, 3.0)
            await trio.sleep(1)
            with pytest.raises(ImageBusy):
                await b.keeper.open(DISK, opener(2), WRITE)
            assert await a.keeper.fence(1) == 1
            order.append("answered")
        assert order == ["released", "answered"]
        assert trio.current_time() == pytest.approx(4.0, abs=0.3)
        await b.keeper.close(await b.keeper.open(DISK, opener(2), WRITE))
        await a.keeper.close(grant)


async def test_a_write_that_hangs_keeps_the_lease(a: Host, b: Host) -> None:
    """However long a change is under way, the lease is not given back before it has ended."""
    async with keepers_run(a, b):
        grant = await a.keeper.open(DISK, opener(1), WRITE)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.write, grant, 500.0)
            await trio.sleep(1)
            nursery.start_soon(a.keeper.fence, 1)
            await trio.sleep(400)
            assert a.storage.held[1]
        assert not a.storage.held[1]
        await a.keeper.close(grant)


async def test_a_mapper_that_does_not_end_keeps_the_lease(a: Host) -> None:
    """What cannot be killed can write: the lease stays, and the fence goes on trying."""
    async with keepers_run(a):
        grant = await a.keeper.open(DISK, opener(1), WRITE)
        a.mount.maps[1] = {MAPPER}
        a.mount.immortal.add(70)
        with trio.move_on_after(30):
            await a.keeper.fence(1)
        assert a.storage.held[1]
        a.mount.immortal.clear()
        await trio.sleep(2)
        assert not a.storage.held[1] and not a.mount.maps[1]
        await a.keeper.close(grant)


async def test_openers_are_killed_if_handles_cannot_be_revoked(a: Host) -> None:
    """What still writes past lockfs after the time for revoking is killed; what passes gates is not."""
    async with keepers_run(a):
        first = await a.keeper.open(DISK, opener(1), WRITE)
        second = await a.keeper.open(OTHER, opener(2), WRITE)
        a.mount.unguarded.add(1)
        a.mount.broken.add("revoke")
        a.mount.immortal.add(1)
        for inode in (1, 2):
            a.backend.turn_to(LeaseState.LOST, inode)
        await trio.sleep(5)
        assert set(a.mount.killed) == {(1, 10)}
        assert a.state() == "lost" and a.state(2) == "fenced"
        a.mount.broken.clear()
        await trio.sleep(2)
        assert a.state() == "fenced"
        for grant in (first, second):
            await a.keeper.close(grant)


async def test_a_closed_handle_need_not_be_revoked(a: Host) -> None:
    """If the handle that could not be revoked is closed, the fence ends."""
    async with keepers_run(a):
        grant = await a.keeper.open(DISK, opener(1), WRITE)
        a.mount.unguarded.add(1)
        a.mount.revoke_lasts = 1e6
        a.mount.immortal.add(1)
        with trio.move_on_after(20):
            await a.keeper.fence(1)
        a.mount.unguarded.clear()
        await a.keeper.close(grant)
        await trio.sleep(10)
        assert a.state() is None and not a.storage.held[1]


async def test_openers_are_killed_if_mappers_cannot_be_found(a: Host) -> None:
    """If nobody can tell who maps the image, whoever could have mapped it goes."""
    async with keepers_run(a):
        grant = await a.keeper.open(DISK, opener(1), WRITE)
        a.mount.broken.add("mappers")
        a.backend.turn_to(LeaseState.LOST)
        await trio.sleep(1)
        assert a.mount.killed == [(1, 10)]
        await a.keeper.close(grant)


async def test_a_mapping_by_a_dead_handle_is_found(a: Host) -> None:
    """The kernel lets a dead handle be mapped: as long as there is one, mappers are looked for and killed."""
    async with keepers_run(a):
        grant = await a.keeper.open(DISK, opener(1), WRITE)
        a.mount.unguarded.add(1)
        a.backend.turn_to(LeaseState.LOST)
        await trio.sleep(5)
        a.mount.maps[1] = {MAPPER}
        await trio.sleep(1.1)
        assert a.mount.killed == [(70, 700)]
        fresh = await a.keeper.open(DISK, opener(1), WRITE)
        a.mount.maps[1] = {MAPPER}
        await trio.sleep(5)
        assert a.mount.maps[1], "who has the lease may map the image"
        await a.keeper.close(fresh)
        await trio.sleep(2)
        assert not a.mount.maps[1]
        await a.keeper.close(grant)


async def test_on_lost_kill() -> None:
    """on_lost=kill ends the writers besides."""
    world = World(policy=Policy(on_lost=OnLost.KILL))
    resumable(world)
    (a, _) = world.hosts
    async with keepers_run(a):
        grant = await a.keeper.open(DISK, opener(1), WRITE)
        reader = await a.keeper.open(DISK, opener(2), READ)
        a.backend.turn_to(LeaseState.LOST)
        await trio.sleep(1)
        assert a.mount.killed == [(1, 10)] and grant.kind is Kind.FENCED
        for one in (grant, reader):
            await a.keeper.close(one)
    world.check_nothing_left()


async def test_by_hand_without_writers_nothing_happens(a: Host) -> None:
    """Readers, and images nobody has, are left alone."""
    async with keepers_run(a):
        assert await a.keeper.fence(1) == 0
        reader = await a.keeper.open(DISK, opener(1), READ)
        assert await a.keeper.fence(1) == 0
        assert reader.kind is Kind.READER and "revoke" not in a.mount.calls
        await a.keeper.close(reader)


async def test_by_hand_without_a_lease(a: Host, b: Host) -> None:
    """Handles that have no lease yet are fenced as well, and the image can be had afterwards."""
    async with keepers_run(a, b):
        holder = await b.keeper.open(DISK, opener(9), WRITE)
        grant = await a.keeper.open(DISK, opener(1, Role.INCOMING), WRITE)
        assert grant.kind is Kind.PROVISIONAL
        assert await a.keeper.fence(1) == 1
        await b.keeper.close(holder)
        await unavailable(a, grant)
        fresh = await a.keeper.open(DISK, opener(1), WRITE)
        await a.write(fresh)
        for one in (grant, fresh):
            await a.keeper.close(one)


async def test_shared_readers_go_with_the_lease() -> None:
    """A covered reader of a fenced image holds no lease any more."""
    world = World(policy=Policy(readers=Readers.SHARED))
    resumable(world)
    (a, b) = world.hosts
    async with keepers_run(a, b):
        reader = await a.keeper.open(DISK, opener(1), READ)
        a.backend.turn_to(LeaseState.LOST)
        await trio.sleep(1)
        assert reader.kind is Kind.FENCED and not reader.covered and "revoke" in a.mount.calls
        other = await b.keeper.open(DISK, opener(2), WRITE)
        assert b.storage.held[1]["b"].mode is Mode.EXCLUSIVE
        await b.keeper.close(other)
        await a.keeper.close(reader)
    world.check_nothing_left()


# Suspended: lost, then back


async def test_a_lost_lease_comes_back_to_a_guest_if_nobody_had_it(a: Host, world: World) -> None:
    """Lost, not taken by anybody, free again: the paused guest's repeated write claims it."""
    resumable(world)
    async with keepers_run(a):
        grant = await a.keeper.open(DISK, opener(1, Role.GUEST), WRITE)
        a.backend.turn_to(LeaseState.LOST)
        await trio.sleep(1)
        assert grant.kind is Kind.SUSPENDED and a.state() == "suspended"
        assert "revoke" not in a.mount.calls
        await a.write(grant)
        assert grant.kind is Kind.LEASED and a.storage.held[1]
        await a.keeper.close(grant)


async def test_not_if_another_host_had_it(a: Host, b: Host, world: World) -> None:
    """If another host had the lease meanwhile, for however short a time, the guest never writes again."""
    resumable(world)
    async with keepers_run(a, b):
        grant = await a.keeper.open(DISK, opener(1, Role.GUEST), WRITE)
        a.backend.turn_to(LeaseState.LOST)
        await trio.sleep(1)
        other = await b.keeper.open(DISK, opener(2, Role.GUEST), WRITE)
        with pytest.raises(LeaseUnavailable):
            await a.write(grant)
        assert grant.kind is Kind.SUSPENDED
        assert not b.storage.wanted[1], "who has it by right is not asked for it"
        await b.keeper.close(other)
        for _ in range(2):
            await unavailable(a, grant)
        assert grant.kind is Kind.FENCED and not a.storage.held[1]
        await a.keeper.close(grant)


async def test_not_if_another_process_had_it(a: Host, world: World) -> None:
    """A program of the same host that wrote in between is as bad as another host."""
    resumable(world)
    async with keepers_run(a):
        grant = await a.keeper.open(DISK, opener(1, Role.GUEST), WRITE)
        a.backend.turn_to(LeaseState.LOST)
        await trio.sleep(1)
        program = await a.keeper.open(DISK, opener(2), WRITE)
        assert grant.kind is Kind.FENCED
        await unavailable(a, grant)
        await a.keeper.close(program)
        await unavailable(a, grant)
        await a.keeper.close(grant)


async def test_the_same_process_goes_on_with_all_its_handles(a: Host, world: World) -> None:
    """A second handle of the guest's own process is no stranger."""
    resumable(world)
    async with keepers_run(a):
        grant = await a.keeper.open(DISK, opener(1, Role.GUEST), WRITE)
        a.backend.turn_to(LeaseState.LOST)
        await trio.sleep(1)
        second = await a.keeper.open(DISK, opener(1, Role.GUEST), WRITE)
        await a.write(second)
        await a.write(grant)
        for one in (grant, second):
            await a.keeper.close(one)


async def test_lost_twice(a: Host, b: Host, world: World) -> None:
    """What counts is who had the lease since the last loss."""
    resumable(world)
    async with keepers_run(a, b):
        grant = await a.keeper.open(DISK, opener(1, Role.GUEST), WRITE)
        for _ in range(3):
            a.backend.turn_to(LeaseState.LOST)
            await trio.sleep(1)
            await a.write(grant)
        a.backend.turn_to(LeaseState.LOST)
        await trio.sleep(1)
        await b.keeper.close(await b.keeper.open(DISK, opener(2), WRITE))
        await unavailable(a, grant)
        await a.keeper.close(grant)


async def test_a_write_that_waits_through_the_loss(a: Host, world: World) -> None:
    """A write that began to wait in doubt gets its answer from the lease that follows, or ENOSPC in time."""
    resumable(world)
    async with keepers_run(a):
        grant = await a.keeper.open(DISK, opener(1, Role.GUEST), WRITE)
        a.backend.turn_to(LeaseState.DOUBT)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.write, grant)
            await trio.sleep(2)
            a.backend.turn_to(LeaseState.LOST)
        assert trio.current_time() < 4
        assert a.storage.written[1] == [("a", 1)]
        await a.keeper.close(grant)


async def test_a_suspended_image_that_maps_is_not_taken_up_before_the_mapper_is_gone(
    a: Host, world: World
) -> None:
    """Whoever maps a suspended image is killed first."""
    resumable(world)
    async with keepers_run(a):
        grant = await a.keeper.open(DISK, opener(1, Role.GUEST), WRITE)
        a.mount.maps[1] = {MAPPER}
        a.mount.immortal.add(70)
        a.backend.turn_to(LeaseState.LOST)
        with pytest.raises(LeaseUnavailable):
            await a.write(grant)
        await trio.sleep(10)
        a.mount.immortal.clear()
        await trio.sleep(2)
        await a.write(grant)
        await a.keeper.close(grant)


async def test_local_host_shares_what_comes_back() -> None:
    """With local=host the processes of the host are one writer, before the loss and after."""
    world = World(policy=Policy(local=Local.HOST))
    resumable(world)
    world.storage.processes = False
    (a, _) = world.hosts
    async with keepers_run(a):
        first = await a.keeper.open(DISK, opener(1), WRITE)
        second = await a.keeper.open(DISK, opener(2), WRITE)
        a.backend.turn_to(LeaseState.LOST)
        await trio.sleep(1)
        for one in (first, second, first):
            await a.write(one)
        for one in (first, second):
            await a.keeper.close(one)
    world.check_nothing_left()


async def test_the_watchdog_is_told(a: Host) -> None:
    """The fences hold unless something may still change an image whose lease is not sure."""
    async with keepers_run(a):
        grant = await a.keeper.open(DISK, opener(1), WRITE)
        a.mount.unguarded.add(1)
        a.mount.maps[1] = {MAPPER}
        a.mount.immortal.add(70)
        assert a.keeper.fences_hold
        a.backend.turn_to(LeaseState.DOUBT)
        assert not a.keeper.fences_hold
        await trio.sleep(20)
        assert not a.keeper.fences_hold
        a.mount.immortal.clear()
        await trio.sleep(2)
        assert a.keeper.fences_hold
        await a.keeper.close(grant)


@pytest.mark.parametrize("ends", [LeaseState.HELD, LeaseState.LOST])
async def test_the_watchdog_is_told_in_doubt(a: Host, world: World, ends: LeaseState) -> None:
    """A doubt that passes, or ends in a loss, leaves nothing that starves the watchdog."""
    resumable(world)
    async with keepers_run(a):
        grant = await a.keeper.open(DISK, opener(1), WRITE)
        a.mount.maps[1] = {MAPPER}
        a.mount.immortal.add(70)
        a.backend.turn_to(LeaseState.DOUBT)
        await trio.sleep(5)
        assert not a.keeper.fences_hold
        a.backend.turn_to(ends)
        await trio.sleep(5)
        assert a.keeper.fences_hold is (ends is LeaseState.HELD)
        a.mount.immortal.clear()
        await trio.sleep(2)
        assert a.keeper.fences_hold
        await a.keeper.close(grant)


async def test_the_watchdog_is_told_of_a_write_that_hangs(a: Host, world: World) -> None:
    """What was begun in time may land later than the lease lasts: the fences hold when it has ended."""
    resumable(world)
    async with keepers_run(a), trio.open_nursery() as nursery:
        grant = await a.keeper.open(DISK, opener(1), WRITE)
        nursery.start_soon(a.write, grant, 9.0)
        await trio.sleep(1)
        assert a.keeper.fences_hold
        a.backend.turn_to(LeaseState.DOUBT)
        assert not a.keeper.fences_hold
        await trio.sleep(3)
        assert not a.keeper.fences_hold
        a.backend.turn_to(LeaseState.HELD)
        assert a.keeper.fences_hold
        a.backend.turn_to(LeaseState.DOUBT)
        await trio.sleep(1)
        a.backend.turn_to(LeaseState.LOST)
        await trio.sleep(2)
        assert not a.keeper.fences_hold
        await trio.sleep(4)
        assert a.keeper.fences_hold
        await a.keeper.close(grant)


@pytest.mark.parametrize("bypassed", [False, True])
async def test_the_watchdog_is_told_of_a_flush(a: Host, world: World, bypassed: bool) -> None:
    """In doubt an image is flushed; what passed no gate is awaited so. Until then the fences do not hold."""
    resumable(world)
    async with keepers_run(a):
        grant = await a.keeper.open(DISK, opener(1), WRITE)
        if bypassed:
            a.mount.unguarded.add(1)
        a.mount.flush_fails = 3
        a.backend.turn_to(LeaseState.DOUBT)
        await trio.sleep(2.5)
        assert not a.keeper.fences_hold
        await trio.sleep(2)
        assert a.keeper.fences_hold
        assert a.mount.calls.count("settle") == 4
        await a.keeper.close(grant)


async def test_a_flush_that_fails_is_not_repeated_for_ever(a: Host) -> None:
    """The lease is gone, and the kernel has let the data go: nothing is left to wait for."""
    async with keepers_run(a):
        grant = await a.keeper.open(DISK, opener(1), WRITE)
        a.mount.unguarded.add(1)
        a.mount.flush_fails = 100
        a.backend.turn_to(LeaseState.LOST)
        await trio.sleep(5)
        assert a.keeper.fences_hold
        assert a.mount.calls.count("settle") == 1
        await a.keeper.close(grant)


async def test_many_at_once(a: Host) -> None:
    """What is lost together is looked for once."""
    images = [type(DISK)(number, b"disk%d" % number, -1) for number in range(10, 60)]
    async with keepers_run(a):
        grants = [await a.keeper.open(image, opener(image.inode), WRITE) for image in images]
        a.mount.unguarded |= {image.inode for image in images}
        for image in images:
            a.backend.turn_to(LeaseState.DOUBT, image.inode)
        await trio.sleep(2)
        assert all(grant.kind is Kind.FENCED for grant in grants)
        assert a.mount.calls.count("revoke") == a.mount.calls.count("mappers") == 1
        for grant in grants:
            await a.keeper.close(grant)


async def unavailable(host: Host, grant: Grant) -> None:
    """Write, and be refused."""
    with pytest.raises(LeaseUnavailable):
        await host.write(grant)
