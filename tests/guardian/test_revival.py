"""What is counted of a family goes on when it is brought back."""

from __future__ import annotations

import time
from contextlib import closing

import pytest

from lockfs.guardian import revival
from lockfs.guardian.words import LOOP_KILLED_S, Words
from lockfs.journal.memory import SharedMemory


@pytest.mark.parametrize(
    ("served_s", "deaths"), [(None, 3), (LOOP_KILLED_S / 2, 3), (LOOP_KILLED_S * 2, 0)], ids=str
)
def test_who_served_long_enough_ends_a_loop(served_s: float | None, deaths: int) -> None:
    """A worker that was killed together with everybody who would have noted that it had served."""
    with closing(SharedMemory.create()) as memory:
        words = Words(memory)
        words.deaths = 3
        words.ready_ns = 0 if served_s is None else time.monotonic_ns() - int(served_s * 1e9)
        revival._vacate(memory)
        assert words.deaths == deaths
        assert words.ready_ns == 0
