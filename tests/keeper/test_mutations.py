"""Broken keepers: each breaks one rule, and the tests of this directory must notice.

A mutant is a patch of one method. Its detectors are tests from here, run on the broken keeper in a world of
their own; the mutant counts as caught if any of them fails.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from lockfs.backends.base import LeaseState, Mode
from lockfs.keeper import fencing as fencing_module
from lockfs.keeper.fencing import Fencing, Processes
from lockfs.keeper.gate import Gate, GateState
from lockfs.keeper.grants import Grant, Kind
from lockfs.keeper.handover import Claims, Yielding
from lockfs.keeper.images import Record, Turn
from lockfs.keeper.keeper import Keeper
from lockfs.keeper.landings import Landing, Landings
from lockfs.keeper.leases import Leases
from lockfs.keeper.openers import Opener
from lockfs.keeper.rivals import Rivals
from lockfs.keeper.waiting import Waiting
from lockfs.keeper.wishes import Wish

from . import test_cancellation as cancellation
from . import test_failures as failures
from . import test_fencing as fencing
from . import test_handover as handover
from . import test_opens as opens
from .simulation import simulate
from .world import World

Detector = Callable[..., Any]
SEEDS = 4


async def release_on_first_close(self: Keeper, grant: Grant) -> None:
    """Gives the lease back when the first of several handles is closed."""
    record = self._ledger.find(grant.image.inode)
    if record is None or grant not in record.grants:
        return
    grant.gate.set(GateState.SHUT)
    with self._ledger.use(grant.image), trio.CancelScope(shield=True):
        del record.grants[grant]
        async with record.turn:
            if grant.kind is Kind.LEASED:
                await self._leases._give_back(record)


async def cancellable_close(self: Keeper, grant: Grant) -> None:
    """Lets a cancellation end a close half-way."""
    record = self._ledger.find(grant.image.inode)
    if record is None:
        return
    with self._ledger.use(grant.image):
        del record.grants[grant]
        async with record.turn:
            await self._leases._lower(record)
        record.wake()


async def nothing_under_way(self: Yielding, record: Record) -> bool:
    """Does not wait for writes under way before it yields."""
    return True


async def never_written(self: Yielding, record: Record) -> bool:
    """Yields although the guest holds its write byte."""
    return False


async def no_turn(self: Turn, *arguments: object) -> None:
    """Lets several tasks work on one image at once."""


async def no_rollback(self: Leases, record: Record) -> None:
    """Does not give back what a failed or cancelled attempt took."""


def same_pid(self: Opener, other: Opener) -> bool:
    """Takes a process for another because of its pid alone."""
    return self.process.pid == other.process.pid


def no_rival(self: Rivals, record: Record, opener: Opener) -> None:
    """Lets every process of the host in."""


async def always_inherited(self: Rivals, record: Record, opener: Opener) -> bool:
    """Takes any writable descriptor for an inherited one."""
    return await self._workers.call(self._surroundings.has_open, opener.process.pid, record.image.inode)


def ready_unseen(self: Yielding, record: Record) -> bool:
    """Believes a guest to have stopped whose byte was never seen."""
    return self._could_yield(record)


def deaf_to_events(self: Leases, record: Record, lease: object) -> None:
    """Ignores that leases come into doubt or are lost."""


def gates_follow_kind(self: Record, grant: Grant) -> None:
    """Opens the gate of every leased grant, whatever happens to the lease."""
    grant.gate.set(GateState.OPEN)


def deaf_to_time(self: Gate, state: GateState, refusal: object = None, in_time: object = None) -> None:
    """Lets changes in until somebody tells of the doubt."""
    with self._lock:
        self.state, self.refusal = state, None


def sure_without_time(self: Record) -> bool:
    """Believes a lease until somebody tells of the doubt."""
    return self.lease is not None and not self.lost and self.lease.state is LeaseState.HELD


def last_come_first_served(self: Record, wish: Wish) -> None:
    """Serves the latest waiter first."""
    self.queue.insert(0, wish)


def sleeping_waiters(self: Record) -> None:
    """Wakes nobody."""


def deaf_to_signals(self: Waiting, tid: int) -> None:
    """Ignores interrupts."""


def shared_is_enough(self: Record) -> Mode | None:
    """Thinks that removals and readers need no lease."""
    return Mode.EXCLUSIVE if any(grant.kind is Kind.LEASED for grant in self.grants) else None


def promote_all(self: Claims, record: Record, grant: Grant) -> None:
    """Lets every process write when one has claimed the lease."""
    for other in record.grants:
        if other.kind is Kind.PROVISIONAL:
            other.kind = Kind.LEASED
        other.active = True
    record.refresh_gates()


async def never_withdrawn(self: Waiting, record: Record, wish: Wish) -> None:
    """Leaves its requests on the storage."""


async def nobody_maps(self: Fencing, records: set[Record]) -> dict[Record, Processes]:
    """Does not look for those who map an image."""
    return {record: {} for record in records}


async def all_harmless(self: Fencing, records: set[Record], live: set[Record]) -> set[Record]:
    """Kills nobody, and goes on as if all had ended."""
    return records


async def trusts_revoking(self: Fencing, records: set[Record]) -> set[Record]:
    """Takes what could not be revoked for revoked."""
    await self._surroundings.revoke(frozenset(record.image.inode for record in records))
    return records


async def no_waiting_for_writes(record: Record, grants: list[Grant], *, while_unsure: bool = False) -> None:
    """Gives a lease back while a change is under way."""


async def no_flush(self: Fencing, record: Record, landing: Landing) -> None:
    """Gives a good lease back before the data are on the storage."""


def blind_to_landings(self: Landings) -> bool:
    """Feeds the watchdog while a write that began in time is still under way."""
    return True


def doubts_gently(self: Fencing, record: Record) -> None:
    """Takes every handle for one that can be held back."""
    self._doubted.append(record)
    self._something.set()


def always_suspends(self: Fencing, record: Record) -> None:
    """Suspends also what writes past lockfs."""
    record.lost = record.suspending = True
    record.refresh_gates()
    self._suspended.append(record)
    self._something.set()


async def blind_to_the_dead(self: Fencing) -> None:
    """Does not look after dead handles."""
    await trio.sleep_forever()


def forgives(self: Claims, record: Record, grant: Grant) -> None:
    """Lets a guest go on whoever had its image in between."""


def forgives_at_home(self: Rivals, record: Record, opener: Opener) -> None:
    """Lets a guest go on although another process here wrote in between."""


MUTANTS: list[tuple[type, str, Any, list[Detector]]] = [
    (Keeper, "close", release_on_first_close, [opens.test_lease_spans_first_open_to_last_close]),
    (Keeper, "close", cancellable_close, [cancellation.test_a_close_in_a_cancelled_scope]),
    (Yielding, "_drained", nothing_under_way, [handover.test_writes_under_way_end_before_the_lease_goes]),
    (Yielding, "_written", never_written, [handover.test_a_running_guest_yields_nothing]),
    (Yielding, "_ready", ready_unseen, [handover.test_a_guest_never_seen_with_its_byte_yields_nothing]),
    (Turn, "__aenter__", no_turn, []),
    (Leases, "relax", no_rollback, [failures.test_a_cache_that_cannot_be_dropped_fails_the_open]),
    (Opener, "same_process", same_pid, [opens.test_a_reused_pid_is_another_process]),
    (Opener, "same_process", same_pid, [opens.test_the_unknown_is_never_taken_for_another]),
    (Rivals, "within", no_rival, []),
    (Rivals, "_inherited", always_inherited, [opens.test_a_descriptor_without_lease_proves_nothing]),
    (Leases, "changed", deaf_to_events, []),
    (Record, "_set_leased", gates_follow_kind, []),
    (Gate, "set", deaf_to_time, [failures.test_a_write_out_of_time_fails_at_its_deadline]),
    (Record, "sure", property(sure_without_time), [failures.test_a_write_out_of_time_fails_at_its_deadline]),
    (Record, "enqueue", last_come_first_served, [opens.test_waiters_are_served_in_order]),
    (Record, "wake", sleeping_waiters, [opens.test_local_close_wakes_the_waiter_at_once]),
    (Waiting, "interrupt", deaf_to_signals, [opens.test_interrupt_ends_the_wait]),
    (Record, "needed", shared_is_enough, [failures.test_removal_passes_local_holders_and_keeps_hosts_out]),
    (Claims, "_activate", promote_all, [handover.test_a_claim_is_for_its_own_process]),
    (Waiting, "_withdraw", never_withdrawn, [handover.test_first_write_takes_over_from_a_stopped_guest]),
    (Fencing, "_mappers", nobody_maps, [fencing.test_what_passes_no_gate_is_fenced_in_doubt]),
    (Fencing, "_end_writers", all_harmless, [fencing.test_a_mapper_that_does_not_end_keeps_the_lease]),
    (Fencing, "_revoke", trusts_revoking, [fencing.test_openers_are_killed_if_handles_cannot_be_revoked]),
    (fencing_module, "drained", no_waiting_for_writes, [fencing.test_a_write_that_hangs_keeps_the_lease]),
    (Fencing, "_settled", no_flush, [fencing.test_the_lease_goes_back_last]),
    (
        Landings,
        "over",
        property(blind_to_landings),
        [fencing.test_the_watchdog_is_told_of_a_write_that_hangs],
    ),
    (Fencing, "doubt", doubts_gently, [fencing.test_what_passes_no_gate_is_fenced_in_doubt]),
    (Fencing, "lost", always_suspends, [fencing.test_lost_without_memory_is_fenced_for_good]),
    (
        Fencing,
        "_watch_the_dead",
        blind_to_the_dead,
        [fencing.test_a_mapping_by_a_dead_handle_is_found],
    ),
    (Claims, "_check_lineage", forgives, [fencing.test_not_if_another_host_had_it]),
    (Claims, "_check_lineage", forgives, []),
    (Rivals, "outlive", forgives_at_home, [fencing.test_not_if_another_process_had_it]),
]


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing that a broken keeper logs is of interest."""
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def run_detector(detector: Detector) -> None:
    """Run a test of this directory in a world of its own, which must be empty afterwards."""

    async def run() -> None:
        world = World()
        fixtures = {"world": world, "a": world.hosts[0], "b": world.hosts[1], "expect_log": lambda *_: None}
        wanted = inspect.signature(detector).parameters
        with trio.fail_after(1000):
            await detector(**{name: fixtures[name] for name in wanted})
        world.check_exclusion()
        world.check_nothing_left()

    trio.run(run, clock=MockClock(autojump_threshold=0))


def caught(detectors: list[Detector]) -> bool:
    """Whether any detector, or the simulation where there is none, notices."""
    try:
        for detector in detectors:
            run_detector(detector)
        for seed in range(0 if detectors else SEEDS):
            simulate(seed, faults=seed % 2 == 1)
    except (Exception, BaseExceptionGroup, pytest.fail.Exception):  # noqa: BLE001  (whatever breaks, it was noticed)
        return True
    return False


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: getattr(mutant[2], "fget", mutant[2]).__name__)
def test_a_broken_keeper_is_caught(
    monkeypatch: pytest.MonkeyPatch, mutant: tuple[type | ModuleType, str, Any, list[Detector]]
) -> None:
    """The detectors pass on the sound keeper (the simulation in test_exclusion) and fail on the mutant."""
    owner, method, patch, detectors = mutant
    with quiet():
        assert not (detectors and caught(detectors)), "the detector fails without the defect"
        if owner is Turn:
            monkeypatch.setattr(owner, "__aexit__", patch)
        monkeypatch.setattr(owner, method, patch)
        assert caught(detectors), "nobody noticed the defect"
