"""The lease protocol, every state of it within bounds. docs/model.md: what is modelled, what was found.

LOCKFS_MODEL_FULL=1 adds the larger bounds, which take minutes and some gigabytes.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.model import spin

SEARCH_S = 600.0
FULL_SEARCH_S = 3600.0

pytestmark = pytest.mark.skipif(spin.why_not() is not None, reason=spin.why_not() or "")

# The properties, by what only their assertions look at.
PROPERTY = {
    "one user": r"use",
    "one owner per version": r"committed\[|owner_of\[",
    "one live owner per id": r"\.pc!=5",
    "never stuck": r"block\[",
}

# Two hosts, two attempts each, one crash and one late write between them.
BALLOT = ("LVERS=3", "QUIET", "VERSIONS")
LATE_COMMITTER = ("ACQUIRES=3", "MBALS=14", "LVERS=3", "TIMEOUTS=0", "CRASHES=0")
THREE = ("HOSTS=3", "ACQUIRES=1", "MBALS=9", "TIMEOUTS=0", "CRASHES=0")

RIGHT = {
    "ballot, 2 hosts": ("ballot", BALLOT),
    "ballot, 3 hosts": ("ballot", (*THREE, "QUIET", "VERSIONS")),
    "ballot, 2 hosts, 3 attempts": ("ballot", LATE_COMMITTER),
    "shared, 2 hosts": ("ballot", ("SHARED", "TIMEOUTS=0", "QUIET", "VERSIONS")),
    "live": ("live", ()),
}

FULL = {
    "ballot, 2 hosts, 2 late writes": ("ballot", (*BALLOT, "TIMEOUTS=2")),
    "ballot, 2 hosts, 2 crashes": ("ballot", (*BALLOT, "CRASHES=2")),
    "ballot, 3 hosts, 2 attempts": ("ballot", ("HOSTS=3", "MBALS=9", "TIMEOUTS=0", "CRASHES=0")),
    "ballot, 3 hosts, late write": ("ballot", (*THREE[:2], "MBALS=9", "TIMEOUTS=1", "CRASHES=0", "VERSIONS")),
    "shared, 2 hosts, late write": ("ballot", ("SHARED", "QUIET", "VERSIONS")),
    "shared, 3 hosts": ("ballot", (*THREE, "SHARED", "QUIET")),
    "ballot, 3 hosts, crash": ("ballot", (*THREE[:2], "MBALS=9", "TIMEOUTS=0", "CRASHES=1", "VERSIONS")),
    "live, 2 joins each": ("live", ("JOINS=2",)),
}

# A step left out, and the property that goes first. SHARERS_FORGOTTEN needs a third host that shares.
BROKEN = {
    ("ballot", "NO_PHASE_2"): "one owner per version",
    ("ballot", "NO_READ_BACK"): "one owner per version",
    ("ballot", "CANDIDATES_IGNORED"): "one owner per version",
    ("ballot", "MBAL_NOT_UNIQUE"): "one owner per version",
    ("ballot", "BIGGER_LVER_IGNORED"): "one owner per version",
    ("ballot", "NEXT_FROM_REREAD"): "one user",
    ("ballot", "EARLIER_ATTEMPT_CLAIMED"): "one user",
    ("ballot", "NO_DEAD_DELAY"): "one user",
    ("ballot", "BACK_AT_ONCE"): "one owner per version",
    ("ballot", "GENERATION_KEPT"): "never stuck",
    ("ballot", "NO_RELEASED_MARK"): "never stuck",
    ("ballot", "LOST_ATTEMPT_UNMARKED"): "never stuck",
    ("ballot", "BLOCK_ZEROED"): "one owner per version",
    ("ballot", "LATE_WRITE_NOT_AWAITED"): "never stuck",
    ("ballot", "SHARERS_FORGOTTEN"): "one user",
    ("live", "NO_SHORT_DELAY"): "one user",
    ("live", "NO_REREAD_AFTER_JOIN"): "one user",
    ("live", "NO_REREAD_AFTER_LONG_DELAY"): "one user",
    ("live", "NO_DEAD_DELAY"): "one user",
    ("live", "NAME_REUSED"): "one user",
    ("live", "NOT_GIVEN_UP"): "one user",
    ("live", "TIMESTAMP_AFTER_WRITE"): "one user",
    ("live", "NOW_BEFORE_READ"): "one user",
    ("live", "WRITES_OUTLIVE_HOST"): "one user",
    ("live", "LEFT_IN_USE"): "one user",
}
SHARERS = ("SHARED", "HOSTS=3", "ACQUIRES=1", "LVERS=3", "MBALS=9", "TIMEOUTS=0", "CRASHES=0")

# What the rules do not give: a committer that stands still for long sets the leader back to an older version.
LIMITS = {"one owner per version": "VERSIONS", "never stuck": "QUIET"}


def _property(assertion: str) -> str:
    return next(name for name, pattern in PROPERTY.items() if re.search(pattern, assertion))


@pytest.mark.parametrize("name", RIGHT)
def test_the_rules_hold(name: str, tmp_path: Path) -> None:
    model, macros = RIGHT[name]
    found = spin.check(model, macros, tmp_path, SEARCH_S)
    assert found.violated is None
    assert found.states > 100_000  # else something keeps the hosts from moving


@pytest.mark.parametrize(("model", "step"), BROKEN)
def test_a_variant_that_lacks_a_step_is_caught(model: str, step: str, tmp_path: Path) -> None:
    bounds = {"live": (), "ballot": SHARERS if step == "SHARERS_FORGOTTEN" else BALLOT}[model]
    found = spin.check(model, (*bounds, f"BROKEN_{step}"), tmp_path, SEARCH_S)
    assert found.violated is not None
    assert _property(found.violated) == BROKEN[model, step]


def test_every_variant_of_the_models_is_tried() -> None:
    inside = {
        (model, step)
        for model in ("ballot", "live")
        for step in re.findall(r"\bBROKEN_([A-Z0-9_]+[A-Z0-9])", (spin.MODELS / f"{model}.pml").read_text())
    }
    assert inside == set(BROKEN) | {("live", "JOINER_UNWATCHED")}  # needs the larger bounds


@pytest.mark.parametrize("name", LIMITS)
def test_what_a_late_committer_can_do_is_as_documented(name: str, tmp_path: Path) -> None:
    found = spin.check("ballot", (*LATE_COMMITTER, LIMITS[name]), tmp_path, SEARCH_S)
    assert found.violated is not None
    assert _property(found.violated) == name


if os.environ.get("LOCKFS_MODEL_FULL"):

    @pytest.mark.slow
    @pytest.mark.parametrize("name", FULL)
    def test_the_rules_hold_in_larger_bounds(name: str, tmp_path: Path) -> None:
        model, macros = FULL[name]
        assert spin.check(model, macros, tmp_path, FULL_SEARCH_S).violated is None

    @pytest.mark.slow
    def test_a_joiner_without_a_watchdog_is_caught(tmp_path: Path) -> None:
        found = spin.check("live", ("JOINS=3", "BROKEN_JOINER_UNWATCHED"), tmp_path, FULL_SEARCH_S)
        assert found.violated is not None
