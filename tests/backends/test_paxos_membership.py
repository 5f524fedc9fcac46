"""A mount's membership of the lockspace: joined, renewed, in doubt, lost, joined anew, and left."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

import pytest
import trio
from trio.testing import MockClock

from lockfs.backends.base import LeaseState
from lockfs.backends.paxos.directory import Directory
from lockfs.backends.paxos.files import FileLayout, own_naming
from lockfs.backends.paxos.membership import (
    REJOIN_S,
    Epoch,
    Membership,
    host_of,
    made_by_lockfs,
    shortened,
    unique_name,
)
from lockfs.backends.paxos.options import PaxosOptions
from lockfs.errors import BackendError
from lockfs.records import sectors
from lockfs.records.geometry import MIB, geometry
from lockfs.records.sectors import NAME_BYTES, Leader
from lockfs.storage.clock import BootClock
from tests.conftest import ExpectLog

from .lease_io import LeaseIO, pace

EIO = OSError(errno.EIO, "Input/output error")
SPACE = b"lockfs"
SHAPE = geometry(512, MIB)
FAILS_S, COMEBACK_S, DEAD_S = 8.0, 38.0, 68.0
"""The protocol's times for an io_timeout of 1 and a watchdog_timeout of 60, seconds."""


class SuspendableClock:
    """Trio's clock on a machine that may be suspended: then this goes on and trio's does not."""

    def __init__(self) -> None:
        self._clock = trio.lowlevel.current_clock()
        self.suspended_s = 0.0

    def now(self) -> float:
        return self._clock.current_time() + self.suspended_s

    async def sleep(self, seconds: float) -> None:
        await trio.sleep(max(0.0, seconds))


@dataclass
class Host:
    """One mount's membership. `told` are the changes it told of, with the time and the epoch's number."""

    membership: Membership
    layout: FileLayout
    io: LeaseIO
    clock: SuspendableClock
    told: list[tuple[float, LeaseState]] = field(default_factory=list)
    epochs: list[Epoch] = field(default_factory=list)
    passes: int = 0
    life: trio.CancelScope = field(default_factory=trio.CancelScope)
    ended: trio.Event = field(default_factory=trio.Event)

    async def run(self) -> None:
        with self.life:
            await self.membership.run()
        self.ended.set()

    async def end(self) -> None:
        """Stop in good order."""
        self.life.cancel()
        await self.ended.wait()
        await self.membership.stop()
        await self.layout.stop()

    @property
    def states(self) -> list[LeaseState]:
        return [state for _, state in self.told]


class Hosts:
    """Hosts of one lockspace, each on a machine of its own unless told otherwise."""

    def __init__(self, directory: Path, nursery: trio.Nursery) -> None:
        self.directory = directory
        (directory / "leases").mkdir()
        self.made: list[Host] = []
        self._nursery = nursery

    async def add(self, *, machine: int | None = None, name: str = "", **options: object) -> Host:
        number = len(self.made) + 1
        state = self.directory / f"state{machine or number}"
        chosen = replace(PaxosOptions(io_timeout=1, state_dir=str(state)), **options)  # type: ignore[arg-type]
        io, clock = LeaseIO(), SuspendableClock()
        path = self.directory / "leases"
        descriptor = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        layout = FileLayout(Directory(descriptor), str(path), chosen, SPACE, own_naming(), io)
        membership = Membership(
            chosen,
            name or f"host{number}",
            clock,
            Random(number),
            lambda epoch: self._told(host, epoch),
            lambda epoch: self._passed(host),
        )
        host = Host(membership, layout, io, clock)
        self.made.append(host)
        membership.start(await layout.start(), SPACE)
        self._nursery.start_soon(host.run)
        return host

    def _told(self, host: Host, epoch: Epoch) -> None:
        host.told.append((trio.current_time(), epoch.state))
        host.epochs.append(epoch)

    def _passed(self, host: Host) -> None:
        host.passes += 1

    def sector(self, host_id: int) -> Leader:
        """What the storage has of a host."""
        with open(self.directory / "leases" / "lockspace", "rb") as file:
            file.seek(512 * (host_id - 1))
            return sectors.decode_leader(file.read(512))

    def overwrite(self, host_id: int, leader: Leader) -> None:
        """What another host does to a sector."""
        with open(self.directory / "leases" / "lockspace", "r+b") as file:
            file.seek(512 * (host_id - 1))
            file.write(sectors.encode_delta(leader))


@pytest.fixture
async def hosts(tmp_path: Path) -> AsyncIterator[Hosts]:
    """No host yet; all are ended in good order."""
    async with trio.open_nursery() as nursery:
        made = Hosts(tmp_path, nursery)
        nursery.start_soon(pace, lambda: [host.io for host in made.made])
        try:
            yield made
        finally:
            with trio.CancelScope(shield=True):
                for host in made.made:
                    host.io.heal()
                    await host.end()
        nursery.cancel_scope.cancel()


def stop_time() -> MockClock:
    clock = trio.lowlevel.current_clock()
    assert isinstance(clock, MockClock)
    return clock


# --- names


def test_names_are_unique_and_tell_the_host() -> None:
    """Two starts on one host never have one name; people see the host's own."""
    names = {unique_name("node-1") for _ in range(100)}
    assert len(names) == 100
    assert all(host_of(name.decode()) == "node-1" and made_by_lockfs(name.decode()) for name in names)
    long = unique_name("n" * 64)
    assert len(long) <= NAME_BYTES
    assert host_of(long.decode()) == shortened("n" * 64)
    assert len(unique_name("\u00e9" * 40)) <= NAME_BYTES
    for name in ("sanlock.host", "1234.host", "", "0123456789abcdef", "0123456789abcdef.", "f" * 40):
        assert host_of(name) == name
        assert not made_by_lockfs(name)


# --- joining


async def test_a_free_id_is_found_and_kept(hosts: Hosts) -> None:
    """Joining takes 2 io_timeout; after a stop the same machine has the same id again."""
    host = await hosts.add()
    epoch = await host.membership.ready()
    assert trio.current_time() == pytest.approx(2.0)
    host_id = epoch.lockspace.host_id
    assert hosts.sector(host_id).owner_generation == epoch.lockspace.generation == 1
    assert epoch.in_time()
    await host.end()
    assert hosts.sector(host_id).timestamp == 0
    again = await hosts.add(machine=1)
    epoch = await again.membership.ready()
    assert (epoch.lockspace.host_id, epoch.lockspace.generation) == (host_id, 2)


async def test_hosts_that_meet_have_different_ids(hosts: Hosts) -> None:
    """Also mounts of one machine, which share a state directory."""
    several = [await hosts.add(machine=number % 2 + 1) for number in range(6)]
    ids = [(await host.membership.ready()).lockspace.host_id for host in several]
    assert len(set(ids)) == 6
    for host in several:
        await trio.sleep(5.0)
        assert host.told == []
        assert host.passes > 0


async def test_a_host_id_in_use_is_reported_with_its_name(hosts: Hosts, expect_log: ExpectLog) -> None:
    """As soon as the other is seen to be alive, and once; when it has left, the id is joined."""
    expect_log("ERROR lockfs.paxos: lockspace 'lockfs' cannot be joined: host id 7 .*host1", 1)
    first = await hosts.add(host_id=7)
    await first.membership.ready()
    start = trio.current_time()
    second = await hosts.add(host_id=7)
    with pytest.raises(BackendError, match=r"host id 7 .*in use.*host1"):
        await second.membership.ready()
    assert trio.current_time() - start <= 6.0
    assert "host id 7" in second.membership.trouble
    await trio.sleep(4 * REJOIN_S)
    assert first.told == []
    await first.end()
    while second.membership.epoch is None:
        await trio.sleep(1.0)
    assert (await second.membership.ready()).lockspace.generation == 2
    assert second.membership.trouble == ""


async def two_starts_with_one_id(hosts: Hosts) -> None:
    """A second instance on the same host, with the same id, does not take it over from the one that lives."""
    first = await hosts.add(host_id=7, name="node")
    await first.membership.ready()
    second = await hosts.add(host_id=7, name="node", machine=1)
    with pytest.raises(BackendError, match="in use"):
        await second.membership.ready()
    await trio.sleep(10.0)
    assert first.told == []


async def test_two_starts_with_one_id(hosts: Hosts, expect_log: ExpectLog) -> None:
    expect_log("ERROR .*cannot be joined: host id 7", 1)
    await two_starts_with_one_id(hosts)


async def test_a_dead_hosts_id_is_waited_for(hosts: Hosts) -> None:
    """An id whose host did not leave is joined 8 io_timeout + watchdog after it was last looked at."""
    first = await hosts.add(host_id=7)
    await first.membership.ready()
    first.life.cancel()
    start = trio.current_time()
    second = await hosts.add(host_id=7)
    epoch = await second.membership.ready()
    assert trio.current_time() - start == pytest.approx(DEAD_S + 2.0, abs=0.5)
    assert epoch.lockspace.generation == 2


async def test_without_a_free_id_the_machines_own_is_waited_for(hosts: Hosts) -> None:
    """A machine that crashed does not need an administrator to come back when all ids have been used."""
    first = await hosts.add(machine=1)
    own = (await first.membership.ready()).lockspace.host_id
    first.life.cancel()
    await trio.testing.wait_all_tasks_blocked()
    assert first.membership._ids is not None
    first.membership._ids.let_go(own, keep=True)  # what a crash does to the lock
    for host_id in range(1, 251):
        if host_id != own:
            hosts.overwrite(host_id, replace(hosts.sector(host_id), timestamp=9, owner_id=host_id).summed())
    second = await hosts.add(machine=1)
    assert (await second.membership.ready()).lockspace.host_id == own
    assert trio.current_time() > DEAD_S


async def test_no_id_at_all_is_an_error(hosts: Hosts, expect_log: ExpectLog) -> None:
    expect_log("ERROR .*no host id is free", 1)
    host = await hosts.add()
    for host_id in range(1, 251):
        hosts.overwrite(host_id, replace(hosts.sector(host_id), timestamp=9, owner_id=host_id).summed())
    with pytest.raises(BackendError, match="no host id is free"):
        await host.membership.ready()


async def test_failures_to_join_are_reported_once(hosts: Hosts, expect_log: ExpectLog) -> None:
    """Whoever waits is told why; joining goes on, and succeeds when the storage is back."""
    expect_log("ERROR .*cannot be joined: .*Input/output error", 1)
    host = await hosts.add()
    host.io.refuse("r", EIO)
    for _ in range(3):
        with pytest.raises(BackendError, match=r"not joined: .*Input/output error"):
            await host.membership.ready()
    host.io.heal()
    while host.membership.epoch is None:
        await trio.sleep(1.0)
    await host.membership.ready()


async def test_a_join_that_hangs_is_an_answer(hosts: Hosts, expect_log: ExpectLog) -> None:
    """A storage that is silent is reported after an io_timeout."""
    expect_log("ERROR .*cannot be joined: .*did not end within 1 s", 1)
    host = await hosts.add()
    host.io.hold("r")
    with pytest.raises(BackendError, match="did not end"):
        await host.membership.ready()
    assert trio.current_time() <= 2.0


async def test_a_join_cut_short_gives_the_id_back(hosts: Hosts) -> None:
    """No trace of a mount that ended while it joined: nobody has to wait out its id."""
    host = await hosts.add(host_id=3)
    await trio.sleep(1.0)
    assert hosts.sector(3).timestamp != 0
    await host.end()
    assert hosts.sector(3).timestamp == 0


# --- doubt and loss


async def test_a_silent_storage_means_doubt_then_loss(hosts: Hosts, expect_log: ExpectLog) -> None:
    """At 8 io_timeout, and when no late renewal could count any more, whatever the renewal hangs on."""
    expect_log(
        "WARNING .*could not be renewed|ERROR .*is lost: no renewal for|ERROR .*cannot be joined", None
    )
    host = await hosts.add()
    epoch = await host.membership.ready()
    await trio.sleep(10.0)
    assert host.told == []
    host.io.hold("rw")
    renewed = epoch.lockspace.renewed_at
    await trio.sleep_until(renewed + FAILS_S - 0.1)
    assert epoch.in_time()
    await trio.sleep_until(renewed + COMEBACK_S + 1.0)
    assert host.states == [LeaseState.DOUBT, LeaseState.LOST]
    assert [time for time, _ in host.told] == pytest.approx(
        [renewed + FAILS_S, renewed + COMEBACK_S], abs=0.01
    )
    assert not epoch.in_time()


async def in_time_ends_by_itself(hosts: Hosts) -> None:
    """At 8 io_timeout the answer is no, though nobody has had the chance to look at the clock before."""
    host = await hosts.add()
    epoch = await host.membership.ready()
    host.life.cancel()
    left = epoch.lockspace.write_until - trio.current_time()
    stop_time().jump(left - 0.001)
    assert epoch.in_time()
    stop_time().jump(0.002)
    assert not epoch.in_time()
    assert epoch.state is LeaseState.HELD  # nobody has told anybody


async def test_in_time_ends_by_itself(hosts: Hosts) -> None:
    await in_time_ends_by_itself(hosts)


async def test_a_late_renewal_comes_back(hosts: Hosts, expect_log: ExpectLog) -> None:
    """Doubt ends when a renewal lands in time, and the epoch is the same."""
    expect_log("WARNING .*could not be renewed", 1)
    host = await hosts.add()
    epoch = await host.membership.ready()
    host.io.hold("r")
    await trio.sleep(20.0)
    assert host.states == [LeaseState.DOUBT]
    host.io.heal()
    await trio.sleep(2.0)
    assert host.states == [LeaseState.DOUBT, LeaseState.HELD]
    assert epoch.in_time()
    assert await host.membership.ready() is epoch


async def test_a_renewal_that_lands_too_late_does_not_count(hosts: Hosts, expect_log: ExpectLog) -> None:
    """It has landed, but others may have seen the host silent for long enough: lost for good."""
    expect_log("ERROR .*is lost", 1)
    host = await hosts.add()
    epoch = await host.membership.ready()
    held = host.io.hold("w")
    await trio.sleep(epoch.lockspace.renewed_at + COMEBACK_S + 0.5 - trio.current_time())
    assert epoch.state is LeaseState.LOST
    held.let_go()
    await trio.sleep(1.0)
    assert host.states == [LeaseState.DOUBT, LeaseState.LOST]
    assert not epoch.in_time()


async def test_a_suspended_machine_knows_that_it_slept(hosts: Hosts) -> None:
    """After a suspension of more than 8 io_timeout the doubt is told, though the next renewal ends it at
    once: gates have said no in between.
    """
    host = await hosts.add()
    epoch = await host.membership.ready()
    await trio.sleep(5.0)
    assert host.told == []
    host.clock.suspended_s += FAILS_S + 1.0
    assert not epoch.in_time()
    await trio.sleep(3.0)
    assert host.states == [LeaseState.DOUBT, LeaseState.HELD]
    assert epoch.in_time()


async def test_a_resumed_machine_renews_at_once(hosts: Hosts) -> None:
    """It does not sleep out what was left until the next renewal, which could cost the epoch."""
    host = await hosts.add(io_timeout=10)
    epoch = await host.membership.ready()
    await trio.sleep_until(epoch.lockspace.renewed_at + 1.0)
    host.clock.suspended_s += 85.0
    await trio.sleep(1.5)
    assert host.states == [LeaseState.DOUBT, LeaseState.HELD]
    assert epoch.in_time()


async def test_a_renewal_across_a_suspension_tells_of_the_doubt(hosts: Hosts) -> None:
    """Begun before and landed after it: who asked the gate meanwhile is woken."""
    host = await hosts.add()
    epoch = await host.membership.ready()
    await trio.sleep_until(epoch.lockspace.renewal_due - 0.01)
    held = host.io.hold("r", times=1)
    await trio.sleep(0.02)
    host.clock.suspended_s += FAILS_S - 0.5
    held.let_go()
    await trio.sleep(0.5)
    assert epoch.in_time()
    assert host.states == [LeaseState.DOUBT, LeaseState.HELD]


async def test_after_a_long_suspension_all_is_lost(hosts: Hosts, expect_log: ExpectLog) -> None:
    expect_log("ERROR .*is lost: no renewal for", 1)
    host = await hosts.add()
    epoch = await host.membership.ready()
    host.clock.suspended_s += 3600.0
    assert not epoch.in_time()
    await trio.sleep(3.0)
    assert host.states == [LeaseState.LOST]


def _taken(leader: Leader) -> Leader:
    return replace(
        leader, resource_field=sectors.name_field(b"other"), owner_generation=leader.owner_generation + 1
    ).summed()


def _damaged(leader: Leader) -> Leader:
    return replace(leader, checksum=leader.checksum ^ 1)


def _of_another_lockspace(leader: Leader) -> Leader:
    return replace(leader, space_field=sectors.name_field(b"anew")).summed()


@pytest.mark.parametrize("change", [_taken, _damaged, _of_another_lockspace])
async def test_an_id_that_was_overwritten_is_lost_at_once(
    hosts: Hosts, expect_log: ExpectLog, change: Callable[[Leader], Leader]
) -> None:
    """Gates say no from the moment on that the renewal found it."""
    expect_log("ERROR .*is lost: ", 1)
    host = await hosts.add()
    epoch = await host.membership.ready()
    await trio.sleep(5.5)
    hosts.overwrite(epoch.lockspace.host_id, change(hosts.sector(epoch.lockspace.host_id)))
    due = epoch.lockspace.renewal_due
    await trio.sleep_until(due + 0.01)
    assert host.states == [LeaseState.LOST]
    assert host.told[0][0] == pytest.approx(due)
    assert not epoch.in_time()


async def test_after_a_loss_the_host_joins_anew(hosts: Hosts, expect_log: ExpectLog) -> None:
    """With another id, for the lost one is another's or not free; what the old epoch lost stays lost."""
    expect_log("ERROR .*is lost: ", 1)
    host = await hosts.add()
    old = await host.membership.ready()
    await trio.sleep(5.5)
    old_id = old.lockspace.host_id
    hosts.overwrite(old_id, _taken(hosts.sector(old_id)))
    await trio.sleep(10.0)
    new = await host.membership.ready()
    assert new is not old
    assert new.lockspace.host_id != old_id
    assert new.in_time()
    assert (old.state, old.in_time()) == (LeaseState.LOST, False)
    assert host.states == [LeaseState.LOST]
    assert hosts.sector(old_id).resource_name == b"other"  # and is left alone


async def test_between_loss_and_join_nothing_can_be_taken(hosts: Hosts, expect_log: ExpectLog) -> None:
    """Who asks then waits for the new join, or is told why there is none."""
    expect_log("WARNING .*renewed|ERROR .*is lost|ERROR .*cannot be joined", None)
    host = await hosts.add()
    old = await host.membership.ready()
    host.io.refuse("rw", EIO)
    while old.state is not LeaseState.LOST:
        await trio.sleep(1.0)
    with pytest.raises(BackendError, match="Input/output error"):
        await host.membership.ready()
    host.io.heal()
    while host.membership.epoch is None:
        await trio.sleep(1.0)
    assert (await host.membership.ready()).in_time()


# --- leaving


async def test_a_stop_in_doubt_leaves_the_id_to_be_waited_out(hosts: Hosts) -> None:
    """By the time such a write landed, the id could be another's."""
    host = await hosts.add()
    epoch = await host.membership.ready()
    host.life.cancel()
    await trio.sleep(FAILS_S + 1.0)
    await host.membership.stop()
    assert hosts.sector(epoch.lockspace.host_id).timestamp != 0


async def test_a_stop_that_cannot_leave_says_so(hosts: Hosts, expect_log: ExpectLog) -> None:
    expect_log("WARNING .*could not be left", 1)
    host = await hosts.add()
    epoch = await host.membership.ready()
    host.io.refuse("w", EIO)
    await host.end()
    assert hosts.sector(epoch.lockspace.host_id).timestamp != 0


def test_the_area_is_not_open_before_it_is_named(tmp_path: Path) -> None:
    """A membership that was not started says so."""
    options = PaxosOptions(state_dir=str(tmp_path))
    made = Membership(options, "h", BootClock(), Random(0), lambda e: None, lambda e: None)

    async def attempt() -> None:
        with pytest.raises(BackendError, match="not open"):
            await made._attempt()

    trio.run(attempt)
