"""JSON values by key, each whole at any moment at which its writer may be killed.

A slot holds two copies and a word that says which one counts (0: none). A value is written into the other
copy and then the word is changed, in one store: whoever reads sees the old value or the new one. There are
small slots and large ones; a value that outgrows a small one moves to a large one, and if both are there the
large one counts. Slots are used again, the lowest first, so that memory stays as small as what was held at
the busiest moment.
"""

from __future__ import annotations

import heapq
import json
import threading
from collections.abc import Callable, Iterator
from struct import Struct

from lockfs.errors import LockfsError

SMALL_BYTES, LARGE_BYTES = 1024, 4096
SMALL_MAX, LARGE_MAX = 1 << 19, 1 << 16
FACTS_BYTES = SMALL_BYTES * SMALL_MAX + LARGE_BYTES * LARGE_MAX
_WORD_BYTES = 8
_HEAD_BYTES = 2 * _WORD_BYTES  # the word, and in a region's first slot how many slots were ever used
_LENGTHS = Struct("=HH")  # of the key and of the value, in bytes
VALUE_BYTES_MAX = (LARGE_BYTES - _HEAD_BYTES) // 2 - _LENGTHS.size
"""The length of a key and its value in JSON, together."""


Watcher = Callable[[str, object], None]
"""Told of each change of a value, None: it is gone; called in order, must be instant and raise nothing."""


def named_in(value: object) -> set[int]:
    """The descriptors that a value names, in its `fd` and `fds`."""
    named: set[int] = set()
    if isinstance(value, dict):
        for numbers in (value.get("fd", -1), value.get("fds", ())):
            named.update([numbers] if isinstance(numbers, int) else numbers)
    return {number for number in named if number >= 0}


class JournalFull(LockfsError):
    """More is to be remembered than there is room for: what wanted it is refused."""


class _Region:
    """Slots of one size."""

    def __init__(self, memory: memoryview, words: memoryview, slot_bytes: int, count: int) -> None:
        self._memory = memory
        self._words = words
        self._slot_bytes = slot_bytes
        self._slot_words = slot_bytes // _WORD_BYTES
        self._copy_bytes = (slot_bytes - _HEAD_BYTES) // 2
        self._count = count
        self._free: list[int] = []
        self._used = 0
        self.value_bytes = self._copy_bytes - _LENGTHS.size

    def take(self) -> int:
        """A slot that is free.

        Raises:
            JournalFull: there is none.
        """
        if self._free:
            return heapq.heappop(self._free)
        if self._used >= self._count:
            raise JournalFull("The journal is full: too many files are open.")
        self._used += 1
        self._words[1] = self._used
        return self._used - 1

    def write(self, slot: int, name: bytes, data: bytes) -> None:
        """Put a value in the place of the last one."""
        word = slot * self._slot_words
        copy = 2 if self._words[word] == 1 else 1
        at = slot * self._slot_bytes + _HEAD_BYTES + (copy - 1) * self._copy_bytes
        _LENGTHS.pack_into(self._memory, at, len(name), len(data))
        at += _LENGTHS.size
        self._memory[at : at + len(name) + len(data)] = name + data
        self._words[word] = copy

    def give_back(self, slot: int) -> None:
        """The slot says nothing any more."""
        self._words[slot * self._slot_words] = 0
        heapq.heappush(self._free, slot)

    def read_all(self) -> Iterator[tuple[int, str, object]]:
        """Every slot that counts: which one, the key and the value; finds out anew which are free."""
        self._free = []
        self._used = self._words[1]
        for slot in range(self._used):
            copy = self._words[slot * self._slot_words]
            if copy not in (1, 2):
                self._free.append(slot)  # in order, hence a heap
                continue
            at = slot * self._slot_bytes + _HEAD_BYTES + (copy - 1) * self._copy_bytes
            name, length = _LENGTHS.unpack_from(self._memory, at)
            at += _LENGTHS.size
            key = bytes(self._memory[at : at + name]).decode()
            yield slot, key, json.loads(bytes(self._memory[at + name : at + name + length]))


class Facts:
    """All values of one journal. Thread-safe within the process that writes."""

    def __init__(self, memory: memoryview, words: memoryview) -> None:
        """`memory`: FACTS_BYTES of them, zeros or what another process wrote (`reload`); `words`: the same as
        numbers of 8 bytes.
        """
        border = SMALL_BYTES * SMALL_MAX
        large_memory, large_words = memory[border:], words[border // _WORD_BYTES :]
        self._views = [large_memory, large_words]
        self._small = _Region(memory, words, SMALL_BYTES, SMALL_MAX)
        self._large = _Region(large_memory, large_words, LARGE_BYTES, LARGE_MAX)
        self._lock = threading.Lock()
        self.watcher: Watcher | None = None
        self._places: dict[str, tuple[_Region, int]] = {}
        self._values: dict[str, object] = {}

    def close(self) -> None:
        """Give the memory back."""
        for view in self._views:
            view.release()

    def set(self, key: str, value: object) -> None:
        """Remember a value, which JSON can express, in place of the key's last one.

        Raises:
            JournalFull: no slot is free, or the value is too long; the last one stays.
        """
        name, data = key.encode(), json.dumps(value, separators=(",", ":")).encode()
        size = len(name) + len(data)
        if size > VALUE_BYTES_MAX:
            raise JournalFull(f"What is to be remembered of {key} takes {len(data)} bytes.")
        with self._lock:
            place = self._places.get(key)
            if place is not None and size <= place[0].value_bytes:
                place[0].write(place[1], name, data)
            else:
                region = self._small if size <= self._small.value_bytes else self._large
                slot = region.take()
                region.write(slot, name, data)
                self._places[key] = region, slot
                if place is not None:
                    place[0].give_back(place[1])
            self._values[key] = value
            if self.watcher is not None:
                self.watcher(key, value)

    def remove(self, key: str) -> None:
        """Forget a key's value, if it has one."""
        with self._lock:
            place = self._places.pop(key, None)
            if place is not None:
                del self._values[key]
                place[0].give_back(place[1])
                if self.watcher is not None:
                    self.watcher(key, None)

    def get(self, key: str) -> object | None:
        """A key's value, None if it has none. Not to be changed in place."""
        return self._values.get(key)

    def items(self, prefix: str) -> dict[str, object]:
        """The values of all keys that begin so."""
        with self._lock:
            return {key: value for key, value in self._values.items() if key.startswith(prefix)}

    def reload(self) -> None:
        """Read everything from the memory."""
        with self._lock:
            self._places.clear()
            self._values.clear()
            for region in (self._small, self._large):
                for slot, key, value in list(region.read_all()):
                    former = self._places.get(key)
                    if former is not None:  # its writer was killed between the two halves of a move
                        former[0].give_back(former[1])
                    self._places[key] = region, slot
                    self._values[key] = value
