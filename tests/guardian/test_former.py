"""What is left of a family is ended before another one begins with its journal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import closing

import pytest

from lockfs.guardian import former
from lockfs.guardian.former import PLACES, StillAlive, end_family
from lockfs.journal.memory import SharedMemory
from tests.guardian.conftest import Family, alive, members


def _number(family: Family) -> int:
    return int(family.of("start")[0]["memory"])


def test_all_are_ended(family: Family) -> None:
    family.start()
    pids = family.complete()
    assert family.memory is not None
    end_family(family.memory, _number(family))
    family.process.wait()
    assert not any(map(alive, pids.values()))


def test_who_has_no_place_is_found(family: Family) -> None:
    """As one that goes from one place to another while they are read."""
    family.start()
    family.complete()
    assert family.memory is not None
    everybody = members(family.directory)
    for pid in everybody:
        os.kill(pid, signal.SIGSTOP)  # nobody fills a place anew
    for place in PLACES:
        setattr(family.header, f"{place}_pid", 0)
    end_family(family.memory, _number(family))
    family.process.wait()
    assert len(everybody) >= len(PLACES)
    assert not any(map(alive, everybody))


def test_who_succeeds_while_others_are_killed_is_found(family: Family) -> None:
    """The twin takes the guardian's place and fills every other one again."""
    family.start()
    former_pids = family.complete()
    os.kill(former_pids["guardian"], signal.SIGKILL)
    assert family.memory is not None
    end_family(family.memory, _number(family))
    family.process.wait()
    assert members(family.directory) == []


def test_others_are_left_alone() -> None:
    """Another mount's journal under the same number; a place whose process id is another's by now."""
    with closing(SharedMemory.create()) as memory, closing(SharedMemory.create()) as other:
        number = os.dup(other.descriptor)
        bystander = subprocess.Popen(
            [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE, pass_fds=[number]
        )
        memory.header.worker_pid = bystander.pid
        try:
            end_family(memory, number)
            assert bystander.poll() is None
        finally:
            os.close(number)
            bystander.communicate()


def test_a_service_manager_is_left_alone() -> None:
    """Its store has the journal open as well, at times under the very number."""
    with closing(SharedMemory.create()) as memory:
        number = os.dup(memory.descriptor)
        manager = subprocess.Popen(
            [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE, pass_fds=[number]
        )
        try:
            end_family(memory, number)
            assert manager.poll() is None
        finally:
            os.close(number)
            manager.communicate()


def test_ever_more_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """A family that grows as fast as it is killed is told of, not fought for ever."""
    monkeypatch.setattr(former, "_end", lambda *arguments: True)
    with closing(SharedMemory.create()) as memory, pytest.raises(StillAlive, match="again and again"):
        end_family(memory, memory.descriptor)
