"""Handing every descriptor that the journal names to a service manager, and taking it back.

It watches the journal, so whatever names a descriptor is looked after. A store compares what comes with all
that it has, so of inodes that nothing but the kernel's memory of names needs it is given INODES_MAX at most:
the others are found again by their names.
"""

from __future__ import annotations

import os
import threading
from typing import Protocol

from lockfs.journal.facts import named_in
from lockfs.journal.memory import SharedMemory
from lockfs.journal.serials import NUMBERS_MAX, name_of
from lockfs.linux.descriptions import are_one

INODES_MAX = 1024
FORMER_SERIALS = 3
"""So many names that a number had before are taken back once more: a message of a process that was killed
right after may not have been heard."""
_INODE_WORDS = ("nodeid", "inode")
"""Under these a value has the node number of the inode that it cannot do without."""


class Out(Protocol):
    """Where messages go; notify.Outbox."""

    def send(self, text: str, descriptor: int = -1) -> None: ...


class Handing:
    """One worker's share. Thread-safe; instant."""

    def __init__(self, memory: SharedMemory, out: Out, inodes_max: int = INODES_MAX) -> None:
        self._memory = memory
        self._serials = memory.serials
        self._out = out
        self._inodes_max = inodes_max
        self._lock = threading.Lock()
        self._named: dict[str, set[int]] = {}  # by key
        self._holders: dict[int, int] = {}  # how many keys name a descriptor
        self._files: dict[int, tuple[int, int]] = {}  # st_dev and st_ino of what was handed over
        self._given: dict[tuple[int, int], set[int]] = {}  # which the store has, by that
        self._slots: dict[int, tuple[int, int]] = {}  # node number and descriptor
        self._slot_of: dict[int, int] = {}
        self._lone: set[int] = set()  # slots of inodes that are held although no value needs them

    def begin(self) -> None:
        """Bring the store in line with the journal, and keep it so from here on."""
        memory = self._memory
        former = {number for number in self._serials.used() if self._serials.latest(number)}
        with self._lock:
            needed = memory.named_descriptors() | {memory.descriptor}
            for number in sorted(former):
                last = self._serials.latest(number)
                if number in needed and self._serials.serial(number):
                    last -= 1
                for serial in range(max(1, last - FORMER_SERIALS + 1), last + 1):
                    self._take_back(number, serial)
            for number in former - needed:
                self._serials.end(number)
        memory.inodes.watcher = self.inode_changed
        memory.facts.watcher = self.changed
        self.changed("journal", {"fd": memory.descriptor}, again=True)
        for inode in memory.inodes.all():
            self.inode_changed(inode.slot, inode.number, inode.descriptor, again=True)
        for key, value in memory.facts.items("").items():
            self.changed(key, value, again=True)

    def changed(self, key: str, value: object, *, again: bool = False) -> None:
        """A value of the journal; None: it is gone. `again`: the store may have it under its name."""
        named = named_in(value)
        with self._lock:
            if isinstance(value, dict):
                for word in _INODE_WORDS:
                    slot = self._slot_of.get(value.get(word, 0))
                    if slot is not None and not self._named.get(f"inode:{slot}"):
                        self._name(f"inode:{slot}", {self._slots[slot][1]}, again)
            self._name(key, named, again)

    def inode_changed(self, slot: int, number: int, descriptor: int, *, again: bool = False) -> None:
        """An inode of the journal; number 0: the slot is free."""
        key = f"inode:{slot}"
        with self._lock:
            former = self._slots.pop(slot, None)
            if former is not None and self._slot_of.get(former[0]) == slot:
                del self._slot_of[former[0]]
            if number and descriptor >= 0:
                self._slots[slot] = number, descriptor
                self._slot_of[number] = slot
                if len(self._lone) < self._inodes_max:
                    self._lone.add(slot)
                    self._name(key, {descriptor}, again)
            else:
                self._lone.discard(slot)
                self._name(key, set(), again)

    def _name(self, key: str, named: set[int], again: bool) -> None:
        former = self._named.get(key, set())
        for number in named:
            if number not in former:
                self._holders[number] = self._holders.get(number, 0) + 1
                self._hand_over(number, again)
            elif self._files.get(number) != _file_of(number):
                self._hand_over(number, False)
        for number in former - named:
            self._holders[number] -= 1
            if not self._holders[number]:
                del self._holders[number]
                self._end(number)
        if named:
            self._named[key] = named
        else:
            self._named.pop(key, None)

    def _hand_over(self, number: int, again: bool) -> None:
        """Give the store what a number leads to, unless it has that by another number."""
        file = _file_of(number)
        if file is None or number >= NUMBERS_MAX:
            return
        if number in self._files:
            if again:
                return
            self._end(number)
        self._files[number] = file
        other = self._serials.same_as(number)
        if again and other >= 0 and self._serials.serial(other) and are_one(number, other):
            return  # the store has it by the other number, whichever of the two comes first
        given = self._given.setdefault(file, set())
        for other in given:
            if are_one(number, other):
                if serial := self._serials.serial(number):
                    self._take_back(number, serial)
                self._serials.share(number, other)
                return
        given.add(number)
        serial = (again and self._serials.serial(number)) or self._serials.renew(number)
        self._out.send(f"FDSTORE=1\nFDPOLL=0\nFDNAME={name_of(number, serial)}", number)

    def _end(self, number: int) -> None:
        """Take it back; the store gets another number that leads to the same."""
        file = self._files.pop(number, None)
        if file is None:
            return
        if serial := self._serials.serial(number):
            self._take_back(number, serial)
        self._serials.end(number)
        given = self._given.get(file, set())
        given.discard(number)
        if not given:
            self._given.pop(file, None)
        for other in [other for other in self._files if self._serials.same_as(other) == number]:
            del self._files[other]
            self._serials.end(other)
            self._hand_over(other, False)

    def _take_back(self, number: int, serial: int) -> None:
        self._out.send(f"FDSTOREREMOVE=1\nFDNAME={name_of(number, serial)}")


def given_names(memory: SharedMemory) -> list[str]:
    """The names that a store has, the journal's first."""
    serials = memory.serials
    numbers = sorted(serials.used(), key=lambda number: number != memory.descriptor)
    return [name_of(number, serial) for number in numbers if (serial := serials.serial(number))]


def _file_of(number: int) -> tuple[int, int] | None:
    try:
        status = os.fstat(number)
    except OSError:
        return None
    return status.st_dev, status.st_ino
