"""pjdfstest, where it can be had."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from tests.suites import pjdfstest
from tests.support.mounts import needs_mount

VARIABLE = "PJDFSTEST_DIR"

TAP = """1..4
ok 1
not ok 2 - tried 'open x', expected 0, got EPERM
not ok 3 # TODO known
"""


def test_a_planned_assertion_that_never_came_is_a_failure() -> None:
    """A file that dies half-way has its missing assertions counted as failed; those marked TODO are not."""
    outcome = pjdfstest.Outcome()
    pjdfstest.parse("open/00.t", TAP, outcome)
    assert outcome.assertions == 4
    assert set(outcome.failures) == {("open/00.t", 2), ("open/00.t", 4)}


def test_only_failures_beyond_the_bare_directory_count() -> None:
    """What fails on the disk as well is not held against the mount."""
    bare = pjdfstest.Outcome(2, {("a.t", 1): "x"})
    mounted = pjdfstest.Outcome(2, {("a.t", 1): "x", ("a.t", 2): "y"})
    assert mounted.beyond(bare) == {("a.t", 2): "y"}
    assert "`a.t` 2: y" in pjdfstest.summary({"bare": bare, "daemon": mounted})


@needs_mount
@pytest.mark.slow
def test_no_failure_beyond_the_bare_directory() -> None:
    """In passthrough and in daemon mode nothing fails that passes on the disk."""
    source = os.environ.get(VARIABLE)
    if not source:
        pytest.skip(f"${VARIABLE} does not name a built pjdfstest")
    # Not under tmp_path: the suite acts as users who may not enter that.
    outcomes = pjdfstest.compare(Path(source), Path(tempfile.gettempdir()))
    bare = outcomes["bare"]
    assert bare.assertions > 0
    assert not any(outcome.beyond(bare) for outcome in outcomes.values()), pjdfstest.summary(outcomes)
