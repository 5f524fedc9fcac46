"""The exerciser itself: that it would notice."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.suites import fsx

OPERATIONS = 3_000


def test_same_seed_same_file(tmp_path: Path) -> None:
    """A seed gives the same operations and the same file, whatever it is called."""
    one = fsx.exercise(tmp_path / "one", 5, OPERATIONS)
    other = fsx.exercise(tmp_path / "other", 5, OPERATIONS)
    assert one.count == other.count
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_a_lost_write_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that tells success and does nothing is a difference."""
    real, calls = os.pwrite, iter(range(OPERATIONS))

    def lossy(descriptor: int, data: bytes, offset: int) -> int:
        return len(data) if next(calls) % 100 == 99 else real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", lossy)
    with pytest.raises(fsx.Difference, match="seed 5, operation"):
        fsx.exercise(tmp_path / "file", 5, OPERATIONS)


def test_a_stale_size_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A truncate that does not take is a difference at once."""
    monkeypatch.setattr(os, "ftruncate", lambda descriptor, size: None)
    with pytest.raises(fsx.Difference, match="size"):
        fsx.exercise(tmp_path / "file", 6, OPERATIONS)
