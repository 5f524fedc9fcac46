"""The engine with one step left out or done wrong, again and again another one; the witness must see each.

A variant replaces attributes of the engine's classes and modules while it runs. `seeds` is the number of
seeds within which it must be caught."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

from lockfs.paxos import contest, liveness, lockspace, recall, resource
from lockfs.paxos.ballot import Ballot, Pen, Value
from lockfs.paxos.contest import Bid, Contest, Go, Survey
from lockfs.paxos.liveness import OwnerCheck, Verdict
from lockfs.paxos.lockspace import Lockspace, Standing
from lockfs.paxos.pace import Pace
from lockfs.paxos.resource import Begun, Resource
from lockfs.paxos.seams import Plan
from lockfs.paxos.timing import Timing
from lockfs.records import sectors
from lockfs.records.geometry import HOSTS_MAX
from lockfs.records.sectors import Dblock, HostRecord, Leader, ModeBlock
from tests.engine.simulation.run import Outcome, World, simulate

Patch = tuple[Any, str, Any]


@dataclass(frozen=True)
class Variant:
    """One broken engine."""

    name: str
    seeds: int
    patches: tuple[Patch, ...]
    ordered: bool = True
    halts: bool = False
    successors: bool = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The engine is this one."""
        with ExitStack() as stack:
            for target, attribute, value in self.patches:
                stack.enter_context(mock.patch.object(target, attribute, value, create=True))
            yield

    def first_caught(self, first: int = 0) -> Outcome | None:
        """The first of its seeds from `first` on that shows a violation."""
        make = partial(World, ordered=self.ordered, halts=self.halts, successors=self.successors)
        with self.installed():
            for seed in range(first, first + self.seeds):
                outcome = simulate(seed, make=make)
                if outcome.violations:
                    return outcome
        return None


# What a former process had begun


_begun = recall._begun


def _whatever_is_owned(lockspace: Lockspace, now: Leader, own: HostRecord, sharers: frozenset[int]) -> Begun:
    us = (lockspace.host_id, lockspace.generation)
    owns = now.timestamp and (now.owner_id, now.owner_generation) == us
    return Begun(now if owns else None, sharers)


def _beside_nobody(
    lockspace: Lockspace, now: Leader, own: HostRecord, sharers: frozenset[int]
) -> Begun | None:
    return _begun(lockspace, now, own, frozenset())


# Ballots


def _no_phase_2(self: Ballot, pen: Pen) -> Plan[tuple[Value, set[int]]]:
    yield from pen.inscribe(Dblock(mbal=self.mbal, lver=self.lver).summed(), self.mode)
    others = yield from self._read()
    self._compare(others)
    value = self._choose(others)
    return value, {host_id for host_id, record in others.items() if record.mode.shared}


def _no_reading_before_phase_2(self: Ballot, pen: Pen) -> Plan[tuple[Value, set[int]]]:
    value = self.proposal
    proposed = Dblock(self.mbal, self.mbal, value.host_id, value.generation, value.timestamp, self.lver)
    yield from pen.inscribe(proposed.summed(), self.mode)
    others = yield from self._read()
    self._compare(others)
    return value, {host_id for host_id, record in others.items() if record.mode.shared}


def _no_reading_after_phase_2(self: Ballot, pen: Pen) -> Plan[tuple[Value, set[int]]]:
    yield from pen.inscribe(Dblock(mbal=self.mbal, lver=self.lver).summed(), self.mode)
    others = yield from self._read()
    self._compare(others)
    value = self._choose(others)
    proposed = Dblock(self.mbal, self.mbal, value.host_id, value.generation, value.timestamp, self.lver)
    yield from pen.inscribe(proposed.summed(), self.mode)
    return value, {host_id for host_id, record in others.items() if record.mode.shared}


def _own_value_always(self: Ballot, records: dict[int, HostRecord]) -> Value:
    return self.proposal


def _mode_forgotten(self: Contest, survey: Survey, mode: ModeBlock, *, short: bool) -> Bid:
    return _bid(self, survey, sectors.NOT_SHARED, short=short)


_bid = Contest.bid


class _NumbersOfNobody(Ballot):
    """Every host takes the same number of each round."""

    def run(self, pen: Pen) -> Plan[tuple[Value, set[int]]]:
        step = HOSTS_MAX
        return (yield from Ballot.run(replace(self, mbal=self.mbal // step * step + 1), pen))


def _next_from_a_later_reading(self: Contest, bid: Bid, *, in_hand: bool) -> Plan[Go]:
    """The version is the one after whatever the leader says now."""
    now = yield from self.read_leader()
    return (yield from _go(self, replace(bid, survey=replace(bid.survey, leader=now)), in_hand=in_hand))


_go = Contest.go


def _after_the_leader(self: Any) -> int:
    """However far others are."""
    version: int = self.leader.lver + 1
    return version


# Membership


async def _no_reading_after_join(self: Lockspace) -> Leader:
    """What was written is taken to be there."""
    if self._landed and not self._joined and self._last is not None:
        return self._last
    return await _read_own(self)


_read_own = Lockspace._read_own
_never = property(lambda self: math.inf, lambda self, value: None)


def _same_generation(record: Any, **changes: Any) -> Any:
    """As dataclasses.replace, for the module that joins."""
    if "owner_generation" in changes:
        changes["owner_generation"] = max(1, record.owner_generation)
    return replace(record, **changes)


async def _no_wait_for_a_silent_id(self: Lockspace, found: Leader, before: Timing) -> float:
    return self.clock.now()


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


def _only_eight(self: Timing) -> int:
    return self.fails


# Giving back


async def _nobody_shares(self: Resource, sharers: frozenset[int]) -> list[tuple[int, int]]:
    return []


def _mark_left_out(dblock: Dblock) -> Dblock:
    return dblock


async def _not_settled(self: Resource) -> None:
    self._contest.unsettled = False


def _settled_without_waiting(self: Resource) -> Plan[None]:
    """Settling lets go without having waited for what it wrote to the leader."""
    mode = sectors.NOT_SHARED
    if self.hold is resource.Hold.SHARED:
        mode = ModeBlock(sectors.SHARED, self._lockspace.generation)
    written = replace(self._contest.written.dblock, flags=sectors.RELEASED)
    yield from self._contest.write_own(written, mode)
    self._contest.unsettled = False


def _leader_freed_first(self: Resource, mine: Leader, mode: ModeBlock) -> Plan[None]:
    yield from self._release_leader(mine)
    self._contest.unsettled = False


# Hosts that stood still


def _never_ahead(self: Pace, timestamp: int, old: Any, now: float) -> float:
    return -1.0


VARIANTS = (
    Variant("no phase 2", 100, ((Ballot, "run", _no_phase_2),)),
    Variant("nothing read before phase 2", 100, ((Ballot, "run", _no_reading_before_phase_2),)),
    Variant("nothing read after phase 2", 100, ((Ballot, "run", _no_reading_after_phase_2),)),
    Variant("a value proposed by others is not taken over", 100, ((Ballot, "_choose", _own_value_always),)),
    Variant("ballot numbers of nobody", 100, ((contest, "Ballot", _NumbersOfNobody),)),
    Variant("version from a later reading", 100, ((Contest, "go", _next_from_a_later_reading),)),
    Variant("version of the leader alone", 500, ((Survey, "next", property(_after_the_leader)),)),
    Variant("nothing read after the join", 100, ((Lockspace, "_read_own", _no_reading_after_join),)),
    Variant("a join however slow", 500, ((Lockspace, "_overlaps_until", _never),)),
    Variant("no delay for an id that is silent", 500, ((Lockspace, "_outwait", _no_wait_for_a_silent_id),)),
    Variant("the same generation again", 500, ((lockspace, "replace", _same_generation),)),
    Variant(
        "own lease not given up",
        500,
        ((Lockspace, "standing", _always_good), (Lockspace, "write_until", math.inf)),
    ),
    Variant(
        "a renewal counts however late",
        500,
        (
            (Lockspace, "_settle_renewal", _renewed_late_is_renewed),
            (Lockspace, "standing", _never_lost_by_time),
        ),
    ),
    Variant("no delay for a dead owner", 100, ((OwnerCheck, "verdict", _silent_is_dead),)),
    Variant("the watchdog's time not waited for", 500, ((Timing, "dead", property(_only_eight)),)),
    Variant("sharers not looked for", 100, ((Resource, "_living", _nobody_shares),)),
    Variant("mode block dropped while converting", 100, ((Contest, "bid", _mode_forgotten),)),
    Variant("release without the mark", 100, ((contest, "released", _mark_left_out),)),
    Variant("own sector not marked when giving back", 500, ((Resource, "_give_back", _leader_freed_first),)),
    Variant("nothing settled", 100, ((Resource, "settle", _not_settled),)),
    Variant(
        "leader left as it is when settling", 100, ((Resource, "_put_in_order", _settled_without_waiting),)
    ),
    Variant("writes of one sector in any order", 500, (), ordered=False),
    Variant(
        "all that is owned is gone on with", 2000, ((recall, "_begun", _whatever_is_owned),), successors=True
    ),
    Variant(
        "gone on with though sharers were not looked for",
        500,
        ((recall, "_begun", _beside_nobody),),
        successors=True,
    ),
    Variant("pace not compared with others'", 200, ((Pace, "_ahead", _never_ahead),), halts=True),
    Variant(
        "written under what was not confirmed",
        300,
        ((Resource, "proven", property(lambda self: True)),),
        halts=True,
    ),
    Variant(
        "not looked at where hosts come and go",
        500,
        ((Pace, "look_due", property(lambda self: False)),),
        halts=True,
    ),
)
