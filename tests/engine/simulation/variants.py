"""The engine with one step left out or done wrong, again and again another one; the witness must see each.

A variant replaces attributes of the engine's classes and modules while it runs. `seeds` is the number of seeds
within which it must be caught.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

from lockfs.paxos import liveness, resource
from lockfs.paxos.area import Area
from lockfs.paxos.ballot import Ballot, Pen, Value
from lockfs.paxos.liveness import OwnerCheck, Verdict
from lockfs.paxos.lockspace import Lockspace, Standing, stamp
from lockfs.paxos.resource import Resource
from lockfs.paxos.timing import Timing
from lockfs.paxos.watch import Watch
from lockfs.records import sectors
from lockfs.records.geometry import HOSTS_MAX
from lockfs.records.sectors import Dblock, HostRecord, Leader, ModeBlock
from tests.engine.simulation.run import Outcome, World, simulate

# ruff: noqa: SLF001

Patch = tuple[Any, str, Any]


@dataclass(frozen=True)
class Variant:
    """One broken engine."""

    name: str
    seeds: int
    patches: tuple[Patch, ...]
    ordered: bool = True

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The engine is this one."""
        with ExitStack() as stack:
            for target, attribute, value in self.patches:
                stack.enter_context(mock.patch.object(target, attribute, value))
            yield

    def first_caught(self, first: int = 0) -> Outcome | None:
        """The first of its seeds from `first` on that shows a violation."""
        with self.installed():
            for seed in range(first, first + self.seeds):
                outcome = simulate(seed, make=partial(World, ordered=self.ordered))
                if outcome.violations:
                    return outcome
        return None


# Ballots


async def _no_phase_2(self: Ballot, pen: Pen) -> tuple[Value, set[int]]:
    await pen.inscribe(Dblock(mbal=self.mbal, lver=self.lver).summed(), self.mode)
    others = await self._read()
    self._compare(others)
    value = self._choose(others)
    return value, {host_id for host_id, record in others.items() if record.mode.shared}


async def _no_reading_before_phase_2(self: Ballot, pen: Pen) -> tuple[Value, set[int]]:
    value = self.proposal
    proposed = Dblock(self.mbal, self.mbal, value.host_id, value.generation, value.timestamp, self.lver)
    await pen.inscribe(proposed.summed(), self.mode)
    others = await self._read()
    self._compare(others)
    return value, {host_id for host_id, record in others.items() if record.mode.shared}


async def _no_reading_after_phase_2(self: Ballot, pen: Pen) -> tuple[Value, set[int]]:
    await pen.inscribe(Dblock(mbal=self.mbal, lver=self.lver).summed(), self.mode)
    others = await self._read()
    self._compare(others)
    value = self._choose(others)
    proposed = Dblock(self.mbal, self.mbal, value.host_id, value.generation, value.timestamp, self.lver)
    await pen.inscribe(proposed.summed(), self.mode)
    return value, {host_id for host_id, record in others.items() if record.mode.shared}


def _own_value_always(self: Ballot, records: dict[int, HostRecord]) -> Value:
    return self.proposal


def _mode_forgotten(
    contend: Callable[..., Awaitable[tuple[Leader, set[int]] | None]],
) -> Callable[..., Awaitable[tuple[Leader, set[int]] | None]]:
    def contended(self: Resource, survey: Any, mode: ModeBlock, give_up_at: float, **how: bool) -> Any:
        return contend(self, survey, sectors.NOT_SHARED, give_up_at, **how)

    return contended


class _NumbersOfNobody(Ballot):
    """Every host takes the same number of each round."""

    async def run(self, pen: Pen) -> tuple[Value, set[int]]:
        step = HOSTS_MAX
        return await Ballot.run(replace(self, mbal=self.mbal // step * step + 1), pen)


async def _next_from_a_later_reading(self: Resource, survey: Any, *rest: Any, **how: Any) -> Any:
    """The version is the one after whatever the leader says now."""
    now = await self._read_leader()
    return await _contend(self, replace(survey, leader=now), *rest, **how)


_contend = Resource._contend


# Membership


async def _no_reading_after_join(self: Lockspace) -> float:
    found = await self._read_own()
    before = self.timing.of(found.io_timeout)
    if found.timestamp and found.resource_name != self.host_name:
        await self._outwait(found, before)
    return await _write_joined(self, found, found.owner_generation + 1)


async def _write_joined(self: Lockspace, found: Leader, generation: int) -> float:
    written_at = self.clock.now()
    mine = replace(
        found,
        timestamp=stamp(written_at),
        io_timeout=self.timing.io_timeout,
        owner_id=self.host_id,
        owner_generation=generation,
        resource_field=sectors.name_field(self.host_name, found.resource_field),
    ).summed()
    self._last = mine
    await self.area.write(self._sector, sectors.encode_delta(mine))
    return written_at


async def _generation_stays(self: Lockspace) -> float:
    found = await self._read_own()
    before = self.timing.of(found.io_timeout)
    if found.timestamp and found.resource_name != self.host_name:
        await self._outwait(found, before)
    written_at = await _write_joined(self, found, max(1, found.owner_generation))
    await self.clock.sleep(before.renewal)
    again = await self._read_own()
    if again != self._last:
        raise liveness.Refused(liveness.Result.ID_IN_USE, "in use")
    return written_at


async def _no_wait_for_a_silent_id(self: Lockspace, found: Leader, before: Timing) -> float:
    return self.clock.now()


async def _join_however_slow(self: Lockspace) -> float:
    """The join does not mind how long ago it read the id as free."""
    self._overlaps_until = math.inf
    found = await self._read_own()
    before = self.timing.of(found.io_timeout)
    if found.timestamp and found.resource_name != self.host_name:
        await self._outwait(found, before)
    written_at = await _write_joined(self, found, found.owner_generation + 1)
    mine = self._last
    await self.clock.sleep(before.renewal)
    if await self._read_own() != mine:
        self._last = None
        raise liveness.Refused(liveness.Result.ID_IN_USE, "in use")
    return written_at


def _always_good(self: Lockspace) -> Standing:
    return Standing.LOST if self._lost or not self._joined else Standing.GOOD


def _renewed_late_is_renewed(self: Lockspace, written_at: float) -> None:
    self.renewed_at = written_at


def _never_lost_by_time(self: Lockspace) -> Standing:
    if self._lost or not self._joined:
        return Standing.LOST
    age = self.clock.now() - self.renewed_at
    return Standing.DOUBT if age >= self.timing.fails else Standing.GOOD


# Liveness of others


async def _silent_is_dead(self: OwnerCheck, read_leader: Any, read_owner: Any) -> Verdict:
    """The owner is dead if it does not renew within four of our looks."""
    seen = (await self._read_delta()).timestamp
    for _ in range(4):
        await self._lockspace.clock.sleep(liveness.LOOK_S)
        delta = await self._read_delta()
        if self._has_left(delta):
            return Verdict.GONE
        if delta.timestamp != seen:
            return await self._alive(delta, read_owner)
    return Verdict.GONE


async def _old_look_counts(self: OwnerCheck, read_leader: Any, read_owner: Any) -> Verdict:
    """Silence is measured to the end of the look at the owner, not to its beginning."""
    clock = self._lockspace.clock
    while True:
        delta = await self._read_delta()
        if self._has_left(delta):
            return Verdict.GONE
        if not self._seen:
            self._seen = delta.timestamp
        elif delta.timestamp != self._seen or self._fresh:
            return await self._alive(delta, read_owner)
        elif clock.now() > self._dead_at:
            return Verdict.GONE
        if clock.now() >= self._give_up_at:
            raise self._refusal(liveness.Result.OWNER_DYING, delta)
        await clock.sleep(liveness.LOOK_S)
        if await read_leader() != self._cur:
            return Verdict.CHANGED


async def _watch_alone(lockspace: Lockspace, host_id: int, generation: int) -> bool:
    return lockspace.watch.may_be_alive(host_id, generation, lockspace.clock.now())


def _only_eight(self: Timing) -> int:
    return self.fails


# Giving back


async def _nobody_shares(self: Resource, sharers: set[int]) -> list[tuple[int, int]]:
    return []


def _mark_left_out(dblock: Dblock) -> Dblock:
    return dblock


async def _not_settled(self: Resource) -> None:
    self.unsettled = False


async def _settled_without_waiting(self: Resource) -> None:
    """Settling lets go without having waited for what it wrote to the leader."""
    if not self.unsettled or self._lockspace.standing() is Standing.LOST:
        self.unsettled = False
        return
    mode = sectors.NOT_SHARED
    if self.hold is resource.Hold.SHARED:
        mode = ModeBlock(sectors.SHARED, self._lockspace.generation)
    await self._inscribe(replace(self._written.dblock, flags=sectors.RELEASED), mode)
    self.unsettled = False


async def _leader_freed_blindly(self: Resource, mine: Leader) -> None:
    await self._write_leader(resource._freed(mine))


async def _leader_freed_first(self: Resource, mine: Leader, mode: ModeBlock) -> None:
    await self._release_leader(mine)
    self.unsettled = False


def _of_any_version(self: Resource, survey: Any) -> bool:
    return False




VARIANTS = (
    Variant("no phase 2", 100, ((Ballot, "run", _no_phase_2),)),
    Variant("nothing read before phase 2", 100, ((Ballot, "run", _no_reading_before_phase_2),)),
    Variant("nothing read after phase 2", 100, ((Ballot, "run", _no_reading_after_phase_2),)),
    Variant("a value proposed by others is not taken over", 300, ((Ballot, "_choose", _own_value_always),)),
    Variant("ballot numbers of nobody", 300, ((resource, "Ballot", _NumbersOfNobody),)),
    Variant("version from a later reading", 300, ((Resource, "_contend", _next_from_a_later_reading),)),
    Variant("a let-go proposal that wins is held", 1000, ((Resource, "_stale", _of_any_version),)),
    Variant("nothing read after the join", 1000, ((Lockspace, "_enter", _no_reading_after_join),)),
    Variant("a join however slow", 1000, ((Lockspace, "_enter", _join_however_slow),)),
    Variant("no delay for an id that is silent", 100, ((Lockspace, "_outwait", _no_wait_for_a_silent_id),)),
    Variant("the same generation again", 300, ((Lockspace, "_enter", _generation_stays),)),
    Variant(
        "own lease not given up",
        100,
        ((Lockspace, "standing", _always_good), (Lockspace, "write_until", math.inf)),
    ),
    Variant(
        "a renewal counts however late",
        300,
        ((Lockspace, "_settle_renewal", _renewed_late_is_renewed), (Lockspace, "standing", _never_lost_by_time)),
    ),
    Variant("no delay for a dead owner", 100, ((OwnerCheck, "verdict", _silent_is_dead),)),
    Variant("the watchdog's time not waited for", 300, ((Timing, "dead", property(_only_eight)),)),
    Variant("silence measured to the end of a look", 1000, ((OwnerCheck, "verdict", _old_look_counts),)),
    Variant("sharers not looked for", 100, ((Resource, "_living", _nobody_shares),)),
    Variant("sharers declared dead by an old look", 2000, ((resource, "sharer_lives", _watch_alone),)),
    Variant("mode block dropped while converting", 300, ((Resource, "_contend", _mode_forgotten(_contend)),)),
    Variant("release without the mark", 300, ((resource, "_released", _mark_left_out),)),
    Variant("leader freed whoever wrote it", 300, ((Resource, "_release_leader", _leader_freed_blindly),)),
    Variant("own sector not marked when giving back", 300, ((Resource, "_give_back", _leader_freed_first),)),
    Variant("nothing settled", 100, ((Resource, "settle", _not_settled),)),
    Variant("leader left as it is when settling", 300, ((Resource, "settle", _settled_without_waiting),)),
    Variant("writes of one sector in any order", 1000, (), ordered=False),
)
