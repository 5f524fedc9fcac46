"""JSON values by key, each whole at any moment at which its writer may be killed.

A slot holds two copies and a word that says which one counts (0: none). A value is written into the other
copy and then the word is changed, in one store: whoever reads sees the old value or the new one. Slots are
used again, the lowest first, so that memory stays as small as what was held at the busiest moment.
"""

from __future__ import annotations

import heapq
import json
import threading
from struct import Struct

from lockfs.errors import LockfsError

VALUE_BYTES_MAX = 2000
"""The length of a key and its value in JSON, together."""
SLOT_BYTES = 4096
FACTS_MAX = 1 << 18
FACTS_BYTES = SLOT_BYTES * FACTS_MAX
_WORD_BYTES = 8
_COPY_BYTES = (SLOT_BYTES - 2 * _WORD_BYTES) // 2
_LENGTHS = Struct("=HH")  # of the key and of the value, in bytes


class JournalFull(LockfsError):
    """More is to be remembered than there is room for: what wanted it is refused."""


class Facts:
    """All values of one journal. Thread-safe within the process that writes."""

    def __init__(self, memory: memoryview, words: memoryview) -> None:
        """`memory`: FACTS_BYTES of them, zeros or what another process wrote (`reload`); `words`: the same as
        numbers of 8 bytes.
        """
        self._memory = memory
        self._words = words
        self._lock = threading.Lock()
        self._slots: dict[str, int] = {}
        self._values: dict[str, object] = {}
        self._free: list[int] = []
        self._used = 0  # slots from here on were never used; the first slot's second word keeps it

    def set(self, key: str, value: object) -> None:
        """Remember a value, which JSON can express, in place of the key's last one.

        Raises:
            JournalFull: no slot is free, or the value is too long.
        """
        name, data = key.encode(), json.dumps(value, separators=(",", ":")).encode()
        if len(name) + len(data) > VALUE_BYTES_MAX:
            raise JournalFull(f"What is to be remembered of {key} takes {len(data)} bytes.")
        with self._lock:
            slot = self._slots.get(key)
            fresh = slot is None
            if slot is None:
                slot = self._take()
            word = slot * (SLOT_BYTES // _WORD_BYTES)
            copy = 2 if self._words[word] == 1 else 1
            at = slot * SLOT_BYTES + 2 * _WORD_BYTES + (copy - 1) * _COPY_BYTES
            _LENGTHS.pack_into(self._memory, at, len(name), len(data))
            at += _LENGTHS.size
            self._memory[at : at + len(name) + len(data)] = name + data
            self._words[word] = copy
            if fresh:
                self._slots[key] = slot
            self._values[key] = value

    def _take(self) -> int:
        if self._free:
            return heapq.heappop(self._free)
        if self._used >= FACTS_MAX:
            raise JournalFull("The journal is full: too many files are open.")
        self._used += 1
        self._words[1] = self._used
        return self._used - 1

    def remove(self, key: str) -> None:
        """Forget a key's value, if it has one."""
        with self._lock:
            slot = self._slots.pop(key, None)
            if slot is None:
                return
            del self._values[key]
            self._words[slot * (SLOT_BYTES // _WORD_BYTES)] = 0
            heapq.heappush(self._free, slot)

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
            self._slots.clear()
            self._values.clear()
            self._free = []
            self._used = self._words[1]
            for slot in range(self._used):
                copy = self._words[slot * (SLOT_BYTES // _WORD_BYTES)]
                if copy not in (1, 2):
                    self._free.append(slot)  # in order, hence a heap
                    continue
                at = slot * SLOT_BYTES + 2 * _WORD_BYTES + (copy - 1) * _COPY_BYTES
                name, length = _LENGTHS.unpack_from(self._memory, at)
                at += _LENGTHS.size
                key = bytes(self._memory[at : at + name]).decode()
                self._slots[key] = slot
                self._values[key] = json.loads(bytes(self._memory[at + name : at + name + length]))
