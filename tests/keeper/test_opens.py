"""Opens and closes: who gets a lease, who waits, who is refused, and by which sentence."""

from __future__ import annotations

import itertools
import math
import os
from dataclasses import replace

import pytest
import trio

from lockfs.backends.base import Mode
from lockfs.errors import BackendError, ImageBusy, Interrupted, UsageError, WriteRefused
from lockfs.keeper.gate import GateState
from lockfs.keeper.keeper import Access, Kind
from lockfs.keeper.openers import Role, identify, role_of
from lockfs.keeper.policy import Local, Policy, Readers
from lockfs.linux.proc import Process
from tests.conftest import ExpectLog

from .world import DISK, OTHER, Host, World, nobody, opener

READ, WRITE = Access.READ, Access.WRITE
SHARED = Policy(readers=Readers.SHARED)


async def test_lease_spans_first_open_to_last_close(a: Host) -> None:
    """The lease is taken before the first writing open returns and is free when the last close returns."""
    first = await a.keeper.open(DISK, opener(1), WRITE)
    assert a.storage.held[1]["a"].mode is Mode.EXCLUSIVE
    assert first.gate.state is GateState.OPEN
    second = await a.keeper.open(DISK, opener(1), WRITE)
    await a.keeper.close(first)
    assert a.storage.held[1]
    assert first.gate.state is GateState.SHUT
    await a.keeper.close(second)
    assert not a.storage.held[1]
    assert (a.backend.count("acquire"), a.backend.count("release")) == (1, 1)


async def test_readers_take_no_lease(a: Host, b: Host) -> None:
    """With readers=allow a reader is let in beside another host's writer, takes nothing, may not write."""
    writer = await a.keeper.open(DISK, opener(1), WRITE)
    reader = await b.keeper.open(DISK, opener(2), READ)
    assert reader.kind is Kind.READER
    assert b.backend.counts == {}
    assert b.state() == "reading"
    with pytest.raises(WriteRefused):
        await b.keeper.claim(reader)
    await b.keeper.close(reader)
    await a.keeper.close(writer)


async def test_uncontended_open_asks_nothing_else(a: Host) -> None:
    """An open and close without conflict cost one acquire and one release; `taken` only if it is wanted."""
    a.mount.wants_taken = False
    await a.keeper.close(await a.keeper.open(DISK, opener(1), WRITE))
    assert dict(a.backend.counts) == {"acquire": 1, "release": 1}
    assert a.mount.calls == []


async def test_cache_is_dropped_under_the_lease_before_the_open_returns(a: Host) -> None:
    """`taken` is called once for a new lease, while it is held and before anybody has a grant."""
    seen = []
    a.mount.on_taken = lambda inode: seen.append((inode, bool(a.storage.held[inode]), a.state(inode)))
    first = await a.keeper.open(DISK, opener(1), WRITE)
    second = await a.keeper.open(DISK, opener(1), WRITE)
    assert seen == [(1, True, "releasing")]
    await a.keeper.close(first)
    await a.keeper.close(second)


async def test_second_host_is_refused_by_the_holders_name(a: Host, b: Host) -> None:
    """A conflict with another host is retried for `wait` seconds, then refused naming the holder."""
    writer = await a.keeper.open(DISK, opener(1), WRITE)
    start = trio.current_time()
    with pytest.raises(ImageBusy, match=r"held by qemu-img \(pid 1\) on a"):
        await b.keeper.open(DISK, opener(2), WRITE)
    assert trio.current_time() - start == pytest.approx(3.0, abs=0.01)
    assert [str(holder) for holder in await b.keeper.others(DISK)] == ["qemu-img (pid 1) on a [lockfs]"]
    await a.keeper.close(writer)


async def test_retries_start_fast_and_stay_polite(a: Host, b: Host) -> None:
    """The first retry comes within 10 ms, later ones at most 100 ms apart, and never in a busy loop."""
    writer = await a.keeper.open(DISK, opener(1), WRITE)
    with pytest.raises(ImageBusy):
        await b.keeper.open(DISK, opener(2), WRITE)
    times = [at for call, _, at in b.backend.calls if call == "acquire"]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert gaps[0] <= 0.0101
    assert max(gaps) <= 0.1001
    assert len(gaps) < 3.0 / 0.05 + 20
    await a.keeper.close(writer)


async def test_wait_zero_tries_once() -> None:
    """With wait=0 a conflict is refused after exactly one attempt and no time."""
    a, b = World(policy=Policy(wait=0)).hosts
    writer = await a.keeper.open(DISK, opener(1), WRITE)
    start = trio.current_time()
    with pytest.raises(ImageBusy):
        await b.keeper.open(DISK, opener(2), WRITE)
    assert trio.current_time() == start
    assert b.backend.count("acquire") == 1
    await a.keeper.close(writer)


async def test_waiting_open_gets_a_lease_that_falls_free(a: Host, b: Host) -> None:
    """A waiting open succeeds soon after the other host let go."""
    writer = await a.keeper.open(DISK, opener(1), WRITE)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_close_after, a, writer, 1.0)
        grant = await b.keeper.open(DISK, opener(2), WRITE)
    assert 1.0 <= trio.current_time() <= 1.11
    await b.keeper.close(grant)


async def test_another_process_here_is_refused_by_name(a: Host) -> None:
    """With local=process a second process of the host is refused, the sentence naming the first."""
    writer = await a.keeper.open(DISK, opener(123, Role.GUEST), WRITE)
    sentence = r"^image 'disk.img' is open for writing by qemu-system-x86_64 \(pid 123\) on this host \(a\)$"
    with pytest.raises(ImageBusy, match=sentence):
        await a.keeper.open(DISK, opener(2), WRITE)
    assert trio.current_time() == pytest.approx(3.0)
    assert a.backend.count("acquire") == 1
    await a.keeper.close(writer)


async def test_local_close_wakes_the_waiter_at_once(a: Host) -> None:
    """A waiter behind a local writer has the image at the very moment that one closes it."""
    writer = await a.keeper.open(DISK, opener(1), WRITE)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_close_after, a, writer, 1.0)
        grant = await a.keeper.open(DISK, opener(2), WRITE)
    assert trio.current_time() == pytest.approx(1.0)
    assert a.storage.held[1]["a"].owner.pid == 2
    await a.keeper.close(grant)


async def test_a_reused_pid_is_another_process(a: Host) -> None:
    """A process that has the pid of a departed owner, whose handle lives on, is not taken for it."""
    writer = await a.keeper.open(DISK, opener(7, started=70), WRITE)
    with pytest.raises(ImageBusy):
        await a.keeper.open(DISK, opener(7, started=71), WRITE)
    await a.keeper.close(writer)


async def test_the_unknown_is_never_taken_for_another(a: Host) -> None:
    """A process that cannot be seen, or is gone already, never shares an image with its like."""
    for stranger in (nobody, lambda: opener(9, started=0)):
        writer = await a.keeper.open(DISK, stranger(), WRITE)
        with pytest.raises(ImageBusy):
            await a.keeper.open(DISK, stranger(), WRITE)
        await a.keeper.close(writer)


async def test_an_inherited_descriptor_makes_one_of_the_writers(a: Host) -> None:
    """A process that inherited a writer's descriptor writes beside it; it keeps the lease alone later."""
    parent = await a.keeper.open(DISK, opener(1), WRITE)
    a.mount.inherited.add((2, 1))
    child = await a.keeper.open(DISK, opener(2), WRITE)
    await a.keeper.close(parent)
    again = await a.keeper.open(DISK, opener(2), WRITE)
    with pytest.raises(ImageBusy, match="pid 2"):
        await a.keeper.open(DISK, opener(1), WRITE)
    await a.keeper.close(child)
    await a.keeper.close(again)


async def test_a_descriptor_without_lease_proves_nothing(a: Host) -> None:
    """A process whose own writable descriptor is provisional or managed is no heir of the writer."""
    for role in (Role.INCOMING, Role.MANAGER):
        writer = await a.keeper.open(DISK, opener(1), WRITE)
        lame = await a.keeper.open(DISK, opener(2, role), WRITE)
        a.mount.inherited.add((2, 1))
        with pytest.raises(ImageBusy):
            await a.keeper.open(DISK, opener(2), WRITE)
        await a.keeper.close(lame)
        await a.keeper.close(writer)


async def test_unreadable_proc_is_no_proof(a: Host) -> None:
    """If it cannot be known whether a process inherited the image, it is refused."""
    writer = await a.keeper.open(DISK, opener(1), WRITE)
    a.mount.broken.add("has_open")
    with pytest.raises(ImageBusy):
        await a.keeper.open(DISK, opener(2), WRITE)
    await a.keeper.close(writer)


async def test_local_host_lets_processes_share() -> None:
    """With local=host every process of the host writes under its one lease, another host none."""
    world = World(policy=Policy(local=Local.HOST))
    a, b = world.hosts
    one = await a.keeper.open(DISK, opener(1), WRITE)
    two = await a.keeper.open(DISK, opener(2), WRITE)
    with pytest.raises(ImageBusy):
        await b.keeper.open(DISK, opener(3), WRITE)
    await a.keeper.close(one)
    assert two.gate.state is GateState.OPEN
    await a.keeper.close(two)
    world.check_nothing_left()


async def test_waiters_are_served_in_order(a: Host) -> None:
    """Processes that wait for one image get it in the order they came."""
    served: list[int] = []

    async def take(pid: int) -> None:
        grant = await a.keeper.open(DISK, opener(pid), WRITE)
        served.append(pid)
        await trio.sleep(0.1)
        await a.keeper.close(grant)

    async with trio.open_nursery() as nursery:
        for pid in range(1, 9):
            nursery.start_soon(take, pid)
            await trio.sleep(0.001)
        assert a.keeper.images()[0].waiting[0] == (2, "qemu-img")
    assert served == list(range(1, 9))


async def test_the_owner_need_not_stand_in_line(a: Host) -> None:
    """The writing process opens the image again at once although others wait for it."""
    first = await a.keeper.open(DISK, opener(1), WRITE)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_refused, a, 2)
        await trio.sleep(0.5)
        start = trio.current_time()
        second = await a.keeper.open(DISK, opener(1), WRITE)
        assert trio.current_time() == start
    await a.keeper.close(first)
    await a.keeper.close(second)


async def test_one_who_never_came_to_the_head_is_told_the_reason(a: Host, b: Host) -> None:
    """Every waiter of a line is refused with the holder's name when its own time is over."""
    writer = await a.keeper.open(DISK, opener(1), WRITE)
    async with trio.open_nursery() as nursery:
        for pid in (2, 3):
            nursery.start_soon(_refused, b, pid)
    await a.keeper.close(writer)


async def test_images_are_independent(a: Host) -> None:
    """A wait for one image does not delay an open of another."""
    writer = await a.keeper.open(DISK, opener(1), WRITE)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_refused, a, 2)
        await trio.sleep(0.01)
        start = trio.current_time()
        other = await a.keeper.open(OTHER, opener(2), WRITE)
        assert trio.current_time() == start
        await a.keeper.close(other)
    await a.keeper.close(writer)


async def test_a_storage_that_does_not_answer_fails_the_open(a: Host) -> None:
    """BackendError ends an ordinary open at once; nothing stays behind."""
    a.backend.fail("acquire", 1)
    with pytest.raises(BackendError):
        await a.keeper.open(DISK, opener(1), WRITE)
    assert trio.current_time() == 0


async def test_a_guest_that_takes_over_bears_with_the_storage(a: Host) -> None:
    """An incoming guest's open survives storage errors and waits `handover_wait`: refused, it is lost."""
    guest = opener(1, Role.INCOMING)
    reader = await a.keeper.open(DISK, guest, READ)
    a.backend.fail("acquire", 1, 2, 3)
    grant = await a.keeper.open(DISK, guest, WRITE)
    assert grant.kind is Kind.LEASED and not grant.may_yield
    await a.keeper.close(grant)
    a.backend.fail("acquire")
    start = trio.current_time()
    with pytest.raises(BackendError):
        await a.keeper.open(DISK, guest, WRITE)
    assert trio.current_time() - start == pytest.approx(10.0)
    await a.keeper.close(reader)


async def test_a_manager_changes_nothing_of_a_held_image(a: Host, b: Host) -> None:
    """A manager's writable open succeeds beside any holder, takes no lease, and its changes are refused.

    It waits no longer than an open does, asks nobody to yield, and takes the lease once the image is free.
    """
    writer = await b.keeper.open(DISK, opener(1), WRITE)
    grant = await a.keeper.open(DISK, opener(2, Role.MANAGER), WRITE)
    assert (grant.kind, grant.gate.state) == (Kind.MANAGED, GateState.ASK)
    assert a.backend.counts == {}
    assert a.state() == "managed"
    with pytest.raises(WriteRefused, match="may not write without the lease"):
        await a.keeper.claim(grant)
    assert trio.current_time() == pytest.approx(3.0)
    assert "request" not in a.backend.counts
    assert grant.gate.state is GateState.ASK
    await b.keeper.close(writer)
    await a.keeper.claim(grant)
    assert (grant.kind, grant.gate.state) == (Kind.LEASED, GateState.OPEN)
    with pytest.raises(ImageBusy):
        await b.keeper.open(DISK, opener(1), WRITE)
    await a.keeper.close(grant)


async def test_a_manager_never_demotes_a_guest_of_its_host(a: Host) -> None:
    """Beside a guest that could yield, a manager's change is refused and the guest keeps its lease."""
    guest = await a.keeper.open(DISK, opener(1, Role.GUEST), WRITE)
    manager = await a.keeper.open(DISK, opener(2, Role.MANAGER), WRITE)
    with pytest.raises(WriteRefused):
        await a.keeper.claim(manager)
    assert (guest.kind, guest.gate.state) == (Kind.LEASED, GateState.OPEN)
    await a.keeper.close(manager)
    await a.keeper.close(guest)


async def test_interrupt_ends_the_wait(a: Host) -> None:
    """A signal ends the waiting open of its thread with Interrupted, and only that one."""
    writer = await a.keeper.open(DISK, opener(1), WRITE)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_refused, a, 2)
        nursery.start_soon(_interrupted, a, 3)
        await trio.sleep(0.5)
        for tid in (1, 3, 77, 0):
            a.keeper.interrupt(tid)
    assert trio.current_time() == pytest.approx(3.0)
    await a.keeper.close(writer)


async def test_shared_readers_keep_writers_away() -> None:
    """With readers=shared readers of all hosts share the image, and no host may write meanwhile."""
    world = World(policy=SHARED)
    a, b = world.hosts
    here = await a.keeper.open(DISK, opener(1), READ)
    there = await b.keeper.open(DISK, opener(2), READ)
    assert {lease.mode for lease in a.storage.held[1].values()} == {Mode.SHARED}
    with pytest.raises(ImageBusy):
        await b.keeper.open(DISK, opener(3), WRITE)
    assert b.storage.held[1]["b"].mode is Mode.SHARED
    await a.keeper.close(here)
    writer = await b.keeper.open(DISK, opener(3), WRITE)
    assert b.storage.held[1]["b"].mode is Mode.EXCLUSIVE
    with pytest.raises(ImageBusy):
        await a.keeper.open(DISK, opener(1), READ)
    await b.keeper.close(there)
    await b.keeper.close(writer)
    world.check_nothing_left()


async def test_writer_leaving_readers_behind_shares() -> None:
    """A reader is covered by this host's exclusive lease; when the writer leaves it becomes shared."""
    world = World(policy=SHARED)
    a, b = world.hosts
    writer = await a.keeper.open(DISK, opener(1), WRITE)
    reader = await a.keeper.open(DISK, opener(2), READ)
    assert a.backend.count("acquire") == 1
    await a.keeper.close(writer)
    assert a.storage.held[1]["a"].mode is Mode.SHARED
    other = await b.keeper.open(DISK, opener(3), READ)
    await a.keeper.close(reader)
    await b.keeper.close(other)
    world.check_nothing_left()


async def test_managers_and_successors_read_without_a_lease() -> None:
    """With readers=shared a manager and an incoming guest still read beside another host's writer."""
    world = World(policy=SHARED)
    a, b = world.hosts
    writer = await a.keeper.open(DISK, opener(1), WRITE)
    for role in (Role.MANAGER, Role.INCOMING):
        reader = await b.keeper.open(DISK, opener(2, role), READ)
        await b.keeper.close(reader)
    assert b.backend.counts == {}
    await a.keeper.close(writer)
    world.check_nothing_left()


async def test_closing_twice_is_harmless(a: Host, expect_log: ExpectLog) -> None:
    """A grant closed a second time changes nothing for the present owner."""
    expect_log("ERROR.*closed twice", 1)
    first = await a.keeper.open(DISK, opener(1), WRITE)
    await a.keeper.close(first)
    second = await a.keeper.open(DISK, opener(1), WRITE)
    await a.keeper.close(first)
    assert a.storage.held[1] and second.gate.state is GateState.OPEN
    await a.keeper.close(second)


async def test_reports_show_every_state(a: Host) -> None:
    """`images` names inode, path, mode, age and openers with their kind."""
    reader = await a.keeper.open(DISK, opener(1), READ)
    writer = await a.keeper.open(DISK, opener(2), WRITE)
    manager = await a.keeper.open(DISK, opener(3, Role.MANAGER), WRITE)
    (image,) = a.keeper.images()
    assert (image.inode, image.name, image.state, image.mode) == (1, "disk.img", "held", Mode.EXCLUSIVE)
    assert image.since == 1000.0
    assert [kind for _, _, kind in image.openers] == ["reader", "leased", "managed"]
    for grant in (reader, writer, manager):
        await a.keeper.close(grant)


def test_roles_follow_program_and_arguments() -> None:
    """Managers go by name, guests by name, an incoming guest by its argument; all is the policy's choice."""
    qemu = Process(1, 1, "qemu-system-x86_64", (b"qemu", b"-m", b"1G"))
    incoming = replace(qemu, arguments=(b"qemu", b"-incoming", b"defer"))
    policy = Policy()
    assert role_of(qemu, policy) is Role.GUEST
    assert role_of(incoming, policy) is Role.INCOMING
    assert role_of(replace(incoming, program="cp"), policy) is Role.ORDINARY
    assert role_of(replace(qemu, program="virtqemud"), policy) is Role.MANAGER
    assert role_of(qemu, Policy(guests=(), managers=("qemu-*",))) is Role.MANAGER
    assert role_of(incoming, Policy(incoming=())) is Role.GUEST


def test_identify_maps_a_thread_to_its_process() -> None:
    """The opener behind a thread of ours is this process."""
    mine = identify(os.getpid(), Policy())
    assert mine.process.pid == os.getpid()
    assert mine.same_process(identify(os.getpid(), Policy()))
    assert identify(0, Policy()).process.pid == 0


@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
def test_policy_refuses_waits_that_are_none(value: float) -> None:
    """A wait that is negative or no number is a usage error."""
    with pytest.raises(UsageError):
        Policy(wait=value)
    with pytest.raises(UsageError):
        Policy(handover_wait=value)


async def _close_after(host: Host, grant: object, delay: float) -> None:
    await trio.sleep(delay)
    await host.keeper.close(grant)  # type: ignore[arg-type]


async def _refused(host: Host, pid: int) -> None:
    with pytest.raises(ImageBusy, match="pid 1"):
        await host.keeper.open(DISK, opener(pid), WRITE)


async def _interrupted(host: Host, pid: int) -> None:
    with pytest.raises(Interrupted):
        await host.keeper.open(DISK, opener(pid), WRITE)
