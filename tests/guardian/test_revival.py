"""What is counted of a family goes on when it is brought back."""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import closing
from pathlib import Path

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


def _far(descriptor: int) -> int:
    """A number that nothing else has, and that leads nowhere yet."""
    number = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 500)
    os.close(number)
    return number


def test_what_was_opened_until_the_last_moment_is_put_back(tmp_path: Path) -> None:
    """Who was left of the family named a descriptor after the journal was attached, and then was ended."""
    former = SharedMemory.create()
    file = os.open(tmp_path, os.O_RDONLY)
    journal, number = _far(former.descriptor), _far(former.descriptor) + 1
    names = {}
    for at, descriptor in ((journal, former.descriptor), (number, file)):
        names[f"fd{at}-{former.serials.renew(at)}"] = os.dup(descriptor)
    kept = revival.Kept(names, SharedMemory.attach(next(iter(names.values()))), journal)
    former.facts.set("handle:1", {"fd": number})
    restored = revival.restore(kept, set())
    try:
        assert os.path.sameopenfile(number, file)
        assert restored.facts.get("handle:1") == {"fd": number}
        os.close(number)
    finally:
        restored.close()
        former.close()
        os.close(file)
