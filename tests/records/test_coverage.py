"""No branch of the records is without a test here."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.coverage import branch_gaps, is_measured_run


@pytest.mark.skipif(is_measured_run(), reason="this is the run that is measured")
def test_every_branch_is_reached(tmp_path: Path) -> None:
    """Of lockfs/records, by the tests of this folder alone."""
    assert not (gaps := branch_gaps("lockfs/records", "tests/records", tmp_path)), gaps
