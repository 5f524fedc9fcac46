"""What is noted of a membership for the next worker of the mount, in the mount's memory.

One note, replaced as things go: the join that is under way, then the member. Without a note there is nothing
to go on with.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from lockfs.backends.base import Memory
from lockfs.paxos.kept import Kept

_KEY = "backend:member"


@dataclass(frozen=True)
class Joining:
    """A join under way, by the name that no other start has."""

    host_id: int
    host_name: bytes


class MemberNotes:
    """The note in the memory. Every method is instant."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory

    def joining(self, host_id: int, host_name: bytes) -> None:
        """Before the first write of a join."""
        self._memory.set(_KEY, {"joining": host_id, "name": host_name.hex()})

    def keep(self, kept: Kept, descriptor: int | None) -> None:
        """The member as it is; `descriptor` keeps the id's file locked and stays open (hostids.py)."""
        value = dataclasses.asdict(kept) | {"host_name": kept.host_name.hex()}
        if descriptor is not None:
            value["fd"] = [descriptor]
        self._memory.set(_KEY, value)

    def forget(self) -> None:
        """Nothing to go on with, and no descriptor is kept open."""
        self._memory.remove(_KEY)

    def former(self) -> tuple[Kept | Joining | None, int | None]:
        """What a former worker noted, and the descriptor."""
        value = self._memory.get(_KEY)
        if not isinstance(value, dict):
            return None, None
        if "joining" in value:
            return Joining(int(value["joining"]), bytes.fromhex(value["name"])), None
        facts = dict(value)
        descriptors = facts.pop("fd", [])
        facts |= {"host_name": bytes.fromhex(facts["host_name"]), "strangers": tuple(facts["strangers"])}
        return Kept(**facts), descriptors[0] if descriptors else None
