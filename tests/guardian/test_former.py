"""What is left of a family is ended before another one begins with its journal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from lockfs.guardian import former
from lockfs.guardian.former import PLACES, StillAlive, end_family
from lockfs.journal.memory import SharedMemory
from lockfs.linux import cloning
from tests.guardian.conftest import DEADLINE_S, Family, alive, members


def _number(family: Family) -> int:
    return int(family.of("start")[0]["memory"])


def test_all_are_ended(family: Family) -> None:
    family.start()
    pids = family.complete()
    assert family.memory is not None
    end_family(family.memory, _number(family))
    family.process.wait(DEADLINE_S)
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
    family.process.wait(DEADLINE_S)
    assert len(everybody) >= len(PLACES)
    assert not any(map(alive, everybody))


def test_who_succeeds_while_others_are_killed_is_found(family: Family) -> None:
    """The twin takes the guardian's place and fills every other one again."""
    family.start()
    former_pids = family.complete()
    os.kill(former_pids["guardian"], signal.SIGKILL)
    assert family.memory is not None
    end_family(family.memory, _number(family))
    family.process.wait(DEADLINE_S)
    assert members(family.directory) == []


@contextmanager
def _bystander(descriptor: int, name: str = "python") -> Iterator[subprocess.Popen[bytes]]:
    """A process that is to survive the block; it has `descriptor` open and is called `name`."""
    program = (
        "import sys; open('/proc/self/comm', 'w').write(sys.argv[1]); print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=[descriptor],
    ) as process:
        assert process.stdout is not None and process.stdout.readline()
        yield process
        assert process.poll() is None, "a bystander was killed"
        process.communicate()


@pytest.mark.parametrize("name", ["python", "lockfs-worker"])
def test_others_are_left_alone(name: str) -> None:
    """Another mount's journal under the same number; a place whose process id is another's by now."""
    with (
        closing(SharedMemory.create()) as memory,
        closing(SharedMemory.create()) as other,
        _bystander(other.descriptor, name) as bystander,
    ):
        memory.header.worker_pid = bystander.pid
        end_family(memory, other.descriptor)


def test_a_lockfs_that_has_the_place_of_one_of_the_family_is_left_alone() -> None:
    """It has nothing open under the journal's number, as a dying one, but is not dying."""
    with (
        closing(SharedMemory.create()) as memory,
        closing(SharedMemory.create()) as other,
        _bystander(other.descriptor, "lockfs-worker") as bystander,
    ):
        memory.header.spare_pid = bystander.pid
        end_family(memory, memory.descriptor)


def test_a_service_manager_is_left_alone() -> None:
    """Its store has the journal open as well, at times under the very number."""
    with closing(SharedMemory.create()) as memory, _bystander(memory.descriptor):
        end_family(memory, memory.descriptor)


def test_who_may_not_be_killed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A journal must not be gone on with beside a process that has it."""

    def refused(pidfd: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(cloning, "send", refused)
    with (
        closing(SharedMemory.create()) as memory,
        _bystander(memory.descriptor, "lockfs-worker"),
        pytest.raises(StillAlive, match="cannot be ended"),
    ):
        end_family(memory, memory.descriptor)


def test_ever_more_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """A family that grows as fast as it is killed is told of, not fought for ever."""
    monkeypatch.setattr(former, "_end", lambda *arguments: True)
    with closing(SharedMemory.create()) as memory, pytest.raises(StillAlive, match="again and again"):
        end_family(memory, memory.descriptor)
