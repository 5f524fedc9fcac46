"""Seeds of the simulation (docs/simulation.md): the engine as it is must be clean, and each seed must replay.

LOCKFS_SIM_SEEDS is the number of seeds (300 if not set), LOCKFS_SIM_FIRST the first of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial

import pytest

from tests.engine.simulation.faults import Faults
from tests.engine.simulation.machine import DriftingClock
from tests.engine.simulation.regressions import REGRESSIONS
from tests.engine.simulation.run import STEPS, Outcome, World, simulate
from tests.engine.simulation.scheduler import Scheduler

SEEDS = int(os.environ.get("LOCKFS_SIM_SEEDS", "300"))
FIRST = int(os.environ.get("LOCKFS_SIM_FIRST", "0"))
CHUNK = 25
HALTS = int(os.environ.get("LOCKFS_SIM_HALTS", "100"))
"""Seeds in which hosts stand still together with their clocks."""
SUCCESSORS = int(os.environ.get("LOCKFS_SIM_SUCCESSORS", "100"))
"""Seeds in which processes are killed while they take, hold or release leases, and others go on."""
MODEST = 50
"""Seeds that are enough for every kind of event to have come up."""
REPLAYED = (3, 17, 42)


def _clean(outcome: Outcome) -> Outcome:
    if outcome.violations:
        pytest.fail(outcome.story(), pytrace=False)
    return outcome


@pytest.mark.parametrize("first", range(FIRST, FIRST + SEEDS, CHUNK))
def test_no_seed_shows_a_violation(first: int) -> None:
    for seed in range(first, min(first + CHUNK, FIRST + SEEDS)):
        outcome = _clean(simulate(seed))
        assert outcome.steps >= STEPS


def test_hosts_that_stood_still_with_their_clocks_notice() -> None:
    """They write on for a bounded time only, and what they can keep they keep."""
    outcomes = [_clean(simulate(seed, make=partial(World, halts=True))) for seed in range(HALTS)]
    assert any(outcome.stale_after_halts for outcome in outcomes)
    assert any(outcome.confirmed for outcome in outcomes)


def test_processes_that_go_on_for_killed_ones() -> None:
    """They know nothing but what lies on the storage."""
    outcomes = [_clean(simulate(seed, make=partial(World, successors=True))) for seed in range(SUCCESSORS)]
    assert sum(outcome.succeeded for outcome in outcomes) > len(outcomes)


@pytest.mark.parametrize("seed", sorted(REGRESSIONS))
def test_what_failed_once_does_not_fail_again(seed: int) -> None:
    _clean(simulate(seed))


def test_only_hosts_that_froze_with_their_writes_are_excused() -> None:
    """What only a watchdog could have prevented comes up, and nowhere but where the fault model says."""
    frozen = [seed for seed in range(1000) if Faults.draw(Scheduler(seed).random).frozen][:40]
    thawed = [seed for seed in range(200) if seed not in frozen][:40]
    outcomes = [_clean(simulate(seed)) for seed in frozen]
    assert any(outcome.late_image_writes for outcome in outcomes)
    assert any(outcome.excused for outcome in outcomes)
    for outcome in outcomes:
        assert not outcome.excused or outcome.late_image_writes or outcome.faulted
    for outcome in (simulate(seed) for seed in thawed):
        assert not outcome.excused and not outcome.late_image_writes and not outcome.faulted


def test_the_seeds_do_much() -> None:
    """A simulation in which nothing happens is clean as well."""
    outcomes = [simulate(seed) for seed in range(min(MODEST, SEEDS))]
    assert sum(outcome.holds for outcome in outcomes) > 10 * len(outcomes)
    assert sum(outcome.image_writes for outcome in outcomes) > 10 * len(outcomes)


def test_a_seed_replays_exactly() -> None:
    """The same events at the same moments, here and in another process with other hashes."""
    expected = "".join(f"{seed} {simulate(seed).trace}\n" for seed in REPLAYED)
    assert expected == "".join(f"{seed} {simulate(seed).trace}\n" for seed in REPLAYED)
    for hash_seed in ("1", "77"):
        again = subprocess.run(
            [sys.executable, "-m", "tests.engine.simulation", "--trace", *map(str, REPLAYED)],
            env=os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert again.stdout == expected


def test_seeds_differ() -> None:
    assert len({simulate(seed, steps=50).trace for seed in range(10)}) == 10


def test_a_failure_tells_how_to_see_it_again() -> None:
    outcome = Outcome(
        7, ["at 1.000: something"], [], "", 1, 1.0, 0, 0, 0, 0, 0, False, ["    1.0000 last event"]
    )
    assert "something" in outcome.story() and "last event" in outcome.story()
    assert "python -m tests.engine.simulation 7 -v" in outcome.story()
    outcome.kind = " --successors"
    assert "python -m tests.engine.simulation 7 --successors -v" in outcome.story()


def test_a_clock_never_steps_back() -> None:
    scheduler = Scheduler(1)
    clock, last = DriftingClock(scheduler), 0.0
    for _ in range(100):
        scheduler.now += scheduler.random.random()
        if scheduler.random.random() < 0.5:
            clock.drift()
        assert clock.now() >= last
        last = clock.now()
