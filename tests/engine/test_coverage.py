"""No branch of the engine is without a test here, but for what only the simulation meets by chance."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.coverage import branch_gaps, is_measured_run

BY_CHANCE = ("test_simulation.py", "test_simulation_variants.py", "test_garbage.py", "test_coverage.py")


@pytest.mark.skipif(is_measured_run(), reason="this is the run that is measured")
def test_every_branch_is_reached(tmp_path: Path) -> None:
    """Of lockfs/paxos."""
    gaps = branch_gaps("lockfs/paxos", "tests/engine", tmp_path, without=BY_CHANCE)
    assert not gaps, gaps
