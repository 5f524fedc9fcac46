"""The journal: what one process wrote another one reads, whole, whenever the first was killed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator

import pytest

from lockfs.journal.facts import SMALL_BYTES, SMALL_MAX, VALUE_BYTES_MAX, Facts, JournalFull
from lockfs.journal.inodes import INODES_MAX, InodeSlots
from lockfs.journal.memory import JournalError, SharedMemory

KILLS = 20
DIRECTORY = 0o040000


Other = Callable[[SharedMemory], SharedMemory]


@pytest.fixture
def memory() -> Iterator[SharedMemory]:
    made = SharedMemory.create()
    yield made
    made.close()


@pytest.fixture
def other() -> Iterator[Other]:
    """The same memory as another process would see it."""
    made: list[SharedMemory] = []

    def attach(memory: SharedMemory) -> SharedMemory:
        made.append(SharedMemory.attach(os.dup(memory.descriptor)))
        return made[-1]

    yield attach
    for memory in made:
        memory.close()


def test_a_fact_is_there_for_another_process(memory: SharedMemory, other: Other) -> None:
    memory.facts.set("lease:7", {"mode": "exclusive", "names": ["ä", 1, None]})
    memory.facts.set("lease:8", 1)
    memory.facts.set("lease:8", 2)
    memory.facts.set("handle:1", {})
    assert other(memory).facts.items("lease:") == {
        "lease:7": {"mode": "exclusive", "names": ["ä", 1, None]},
        "lease:8": 2,
    }
    assert memory.facts.get("lease:8") == 2
    assert memory.facts.get("none") is None


def test_a_fact_that_was_removed_is_gone_and_its_slot_used_again(memory: SharedMemory, other: Other) -> None:
    for key in ("a", "b", "c"):
        memory.facts.set(key, key)
    memory.facts.remove("b")
    memory.facts.remove("b")
    seen = other(memory)
    assert seen.facts.items("") == {"a": "a", "c": "c"}
    seen.facts.set("d", "d")
    assert seen.facts._small._used == 3
    assert other(memory).facts.items("") == {"a": "a", "c": "c", "d": "d"}


def test_what_is_too_long_is_refused_and_changes_nothing(memory: SharedMemory, other: Other) -> None:
    memory.facts.set("key", "short")
    with pytest.raises(JournalFull):
        memory.facts.set("key", "x" * VALUE_BYTES_MAX)
    assert memory.facts.get("key") == other(memory).facts.get("key") == "short"
    memory.facts.set("key", "x" * (VALUE_BYTES_MAX - len("key") - 2))
    assert len(str(other(memory).facts.get("key"))) == VALUE_BYTES_MAX - 5


def test_a_value_that_grows_moves(memory: SharedMemory, other: Other) -> None:
    memory.facts.set("key", "small")
    memory.facts.set("key", "x" * SMALL_BYTES)
    memory.facts.set("next", "small")
    seen = other(memory)
    assert seen.facts.items("") == {"key": "x" * SMALL_BYTES, "next": "small"}
    seen.facts.set("key", "small again")
    assert other(memory).facts.get("key") == "small again"


def test_of_a_value_half_moved_the_new_one_counts(memory: SharedMemory, other: Other) -> None:
    memory.facts.set("key", "small")
    memory.facts._large.write(memory.facts._large.take(), b"key", b'"large"')
    seen = other(memory)
    assert seen.facts.get("key") == "large"
    seen.facts.remove("key")
    assert other(memory).facts.get("key") is None
    seen.facts.set("other", 1)
    assert other(memory).facts.items("") == {"other": 1}


def test_a_full_journal_says_so(memory: SharedMemory) -> None:
    memory.facts._small._used = SMALL_MAX
    with pytest.raises(JournalFull):
        memory.facts.set("one", 1)


def test_a_value_half_written_does_not_count(memory: SharedMemory, other: Other) -> None:
    memory.facts.set("key", {"old": 1})
    # Everything that a write does before the word says so: the other copy holds rubbish.
    half = (SMALL_BYTES - 16) // 2
    memory.facts._small._memory[16 + half : 16 + 2 * half] = b"\xff" * half
    assert other(memory).facts.get("key") == {"old": 1}


def test_facts_are_whole_after_a_kill_at_any_moment(memory: SharedMemory, other: Other) -> None:
    for _ in range(KILLS):
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            _write_for_ever(other(memory).facts, writing)
        os.close(writing)
        assert os.read(reading, 1)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reading)
        for value in other(memory).facts.items("key").values():
            assert isinstance(value, dict)
            assert value["text"] == str(value["number"]) * 50, json.dumps(value)


def _write_for_ever(facts: Facts, told: int) -> None:
    try:
        number = 0
        while True:
            number += 1
            facts.set(f"key{number % 7}", {"number": number, "text": str(number) * 50})
            if number == 50:
                os.write(told, b"x")
            if number % 3 == 0:
                facts.remove(f"key{number % 7}")
    finally:
        os._exit(1)


def test_inodes_are_there_for_another_process(memory: SharedMemory, other: Other) -> None:
    slot = memory.inodes.add(42, 7, DIRECTORY, (1 << 63, (1 << 64) - 1), 3)
    memory.inodes.count(slot, 5)
    memory.inodes.generation(slot, 4)
    (seen,) = other(memory).inodes.all()
    assert (seen.number, seen.descriptor, seen.kind) == (42, 7, DIRECTORY)
    assert (seen.device, seen.file) == (1 << 63, (1 << 64) - 1)
    assert (seen.generation, seen.lookups) == (4, 5)


def test_an_inode_forgotten_leaves_its_slot(memory: SharedMemory, other: Other) -> None:
    first = memory.inodes.add(1, 3, 0, (1, 1), 0)
    second = memory.inodes.add(2, 4, 0, (1, 2), 0)
    memory.inodes.remove(first)
    taken_over = other(memory)
    assert [inode.number for inode in taken_over.inodes.all()] == [2]
    assert taken_over.inodes.add(3, 5, 0, (1, 3), 0) == first
    assert taken_over.inodes.descriptors() == {4, 5}
    assert second == 1


def test_without_a_slot_an_inode_is_merely_not_remembered(memory: SharedMemory) -> None:
    inodes: InodeSlots = memory.inodes
    inodes._used = INODES_MAX
    slot = inodes.add(1, 3, 0, (1, 1), 0)
    assert slot == -1
    inodes.count(slot, 1)
    inodes.generation(slot, 1)
    inodes.remove(slot)
    inodes._used = 0


def test_the_descriptors_that_are_named(memory: SharedMemory) -> None:
    memory.inodes.add(1, 3, 0, (1, 1), 0)
    memory.facts.set("handle:1", {"fd": 5, "fds": [6, -1]})
    memory.facts.set("list", [9])
    memory.facts.set("none", {"fd": -1})
    memory.facts.set("several", {"fd": [7, -1]})
    assert memory.named_descriptors() == {3, 5, 6, 7}


def test_what_is_no_journal_is_refused(memory: SharedMemory) -> None:
    descriptor = os.memfd_create("other", os.MFD_CLOEXEC)
    with pytest.raises(JournalError):
        SharedMemory.attach(descriptor)
    os.close(descriptor)
    memory.header.magic = 1
    descriptor = os.dup(memory.descriptor)
    with pytest.raises(JournalError):
        SharedMemory.attach(descriptor)
    os.close(descriptor)


def test_the_header_is_shared(memory: SharedMemory, other: Other) -> None:
    memory.header.worker_pid = 123
    memory.header.turns += 1
    seen = other(memory).header
    assert (seen.worker_pid, seen.turns, seen.served) == (123, 1, 0)
