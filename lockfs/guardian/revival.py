"""Beginning anew with the journal and the descriptors that a service manager kept of a killed family.

The descriptors come under numbers of the service manager's choice, and go back to those that the journal
knows them by. One that was sent too late is replaced by one that nothing can be done with (O_PATH): a read or
write of its file fails with EBADF, while what is noted of it, as leases, is taken over as it is.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from lockfs.guardian import death
from lockfs.guardian.former import PLACES, end_family
from lockfs.guardian.words import LOOP_KILLED_S, Words
from lockfs.journal.facts import named_in
from lockfs.journal.memory import JournalError, SharedMemory
from lockfs.journal.serials import parsed
from lockfs.linux import cloning

_JOURNAL = f"/memfd:{SharedMemory.NAME} (deleted)"


@dataclass
class Kept:
    """What the service manager kept, out of the way of the numbers that it goes to: descriptors by their
    names in the store. `number` is the journal's own descriptor.
    """

    names: dict[str, int]
    memory: SharedMemory
    number: int

    def found(self, number: int) -> int | None:
        """The descriptor that the journal knows by a number."""
        serials = self.memory.serials
        other = serials.same_as(number)
        number = other if other >= 0 else number
        return self.names.get(f"fd{number}-{serials.serial(number)}")


def receive(listed: list[tuple[int, str]]) -> Kept | None:
    """Take descriptors with their names; None if no journal is among them, and they are closed then.

    Raises:
        JournalError: the journal is of another version.
        OSError: too many descriptors.
    """
    greatest = max([number for number, _ in listed] + [at[0] for _, name in listed if (at := parsed(name))])
    names = {name: _moved(number, greatest + 1) for number, name in listed}
    for name, descriptor in names.items():
        at = parsed(name)
        if at is not None and os.readlink(f"/proc/self/fd/{descriptor}") == _JOURNAL:
            return Kept(names, SharedMemory.attach(descriptor), at[0])
    for descriptor in names.values():
        os.close(descriptor)
    return None


def _moved(number: int, least: int) -> int:
    import fcntl  # noqa: PLC0415  (the guardian is to stay small)

    try:
        return fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, least)
    finally:
        os.close(number)


def restore(kept: Kept, needed: set[int]) -> SharedMemory:
    """Put everything back to its number; the journal, from which nothing was taken yet.

    `needed`: without these there is no going on.

    Raises:
        JournalError: one of those is missing.
        former.StillAlive: a process of the former family does not end.
    """
    memory = kept.memory
    end_family(memory, kept.number)
    memory.reload()  # who was left may have gone on for a while
    in_values = {number for value in memory.facts.items("").values() for number in named_in(value)}
    targets = in_values | memory.inodes.descriptors() | needed
    found = {number: at for number in targets if (at := kept.found(number)) is not None}
    found[kept.number] = memory.descriptor
    missing = targets - found.keys()
    if missing & needed:
        raise JournalError("The service manager has not kept the mount itself: unmount and mount again.")
    for inode in memory.inodes.all():
        if inode.descriptor in missing:
            memory.inodes.remove(inode.slot)
    memory.unmap()  # a mapping keeps a descriptor of its own, of whatever number
    clear = max(*kept.names.values(), *targets, kept.number) + 1
    # Once more out of the way: the journal may speak of greater numbers than any name did.
    moved = {descriptor: _moved(descriptor, clear) for descriptor in kept.names.values()}
    nothing = _moved(os.open("/", os.O_PATH | os.O_CLOEXEC), clear)
    for number, descriptor in found.items():
        os.dup2(moved[descriptor], number, inheritable=False)
    for number in missing & in_values:
        os.dup2(nothing, number, inheritable=False)
    for descriptor in (nothing, *moved.values()):
        os.close(descriptor)
    restored = SharedMemory.attach(kept.number)
    _vacate(restored)
    return restored


def superfluous(kept: Kept, memory: SharedMemory) -> list[str]:
    """Names in the store that nothing in the journal speaks of."""
    left = []
    for name in kept.names:
        at = parsed(name)
        if at is None or memory.serials.serial(at[0]) != at[1]:
            left.append(name)
    return left


def _vacate(memory: SharedMemory) -> None:
    """Nobody is in any place; what the family counted goes on."""
    header, words = memory.header, Words(memory)
    served = (time.monotonic_ns() - words.ready_ns) / 1e9 if words.ready_ns else 0.0
    if served >= LOOP_KILLED_S:  # nobody was left to note that the last worker did not end early
        words.deaths = 0
    for place in PLACES:
        setattr(header, f"{place}_pid", 0)
        setattr(words, f"{place}_fd", 0)
    words.bell = words.order = words.sweeping = words.listening = words.ready_ns = 0
    words.ended = words.hung = words.unmount = words.canary_fd = 0
    for index in range(len(words.lingering())):
        words.set_lingering(index, 0)
    words.death = death.UNKNOWN
    words.family, words.oom = os.getpid(), cloning.oom_adjustment()
    header.served = header.upgrade = header.heartbeat_ns = 0
