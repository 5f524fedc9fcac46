"""What a backend remembers of its leases for the next worker of its mount, should this one be killed.

One note for each inode, written before the step that it announces. So a note that speaks of a lease in hand
was true when the worker died, and whatever a step had begun is named by a note.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from lockfs.backends.base import Memory, Mode

_INSTANCE = "backend:instance"
_LEASES = "backend:lease:"


class Stage(enum.Enum):
    """TAKING: perhaps nothing, perhaps all of it is taken, and nobody was told. HELD: in the hands of the
    keeper. CONVERTING: held, and as strong as SHARED at every moment. ENDING: being given back, or lost.
    """

    TAKING = "taking"
    HELD = "held"
    CONVERTING = "converting"
    ENDING = "ending"


@dataclass(frozen=True)
class Note:
    """How far a lease had come. `facts` are the backend's own, of JSON."""

    stage: Stage
    mode: Mode
    facts: Mapping[str, object] = field(default_factory=dict)

    @property
    def in_hand(self) -> bool:
        """Whether the lease was held for certain."""
        return self.stage in (Stage.HELD, Stage.CONVERTING)

    def number(self, name: str) -> int | None:
        """One of the facts, if it is a whole number."""
        value = self.facts.get(name)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def text(self, name: str) -> str | None:
        """One of the facts, if it is text."""
        value = self.facts.get(name)
        return value if isinstance(value, str) else None

    @property
    def descriptors(self) -> list[int]:
        """The descriptors that the note keeps open."""
        value = self.facts.get("fd")
        return [fd for fd in value if isinstance(fd, int)] if isinstance(value, list) else []


class Ledger:
    """A backend's notes in the mount's memory. Every method is instant and may be called in any thread."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory

    def instance(self, fresh: bytes) -> tuple[bytes, bool]:
        """What names this mount's files in the store, of the first worker of all; whether there was one
        before. `fresh` is the name if this is the first.
        """
        former = self.memory.get(_INSTANCE)
        if isinstance(former, str):
            return former.encode(), True
        self.memory.set(_INSTANCE, fresh.decode())
        return fresh, False

    def note(self, inode: int, stage: Stage, mode: Mode, **facts: object) -> None:
        """Remember how far the lease of the inode has come, in place of what was remembered of it."""
        self.memory.set(f"{_LEASES}{inode}", {"stage": stage.value, "mode": mode.value, **facts})

    def forget(self, inode: int) -> None:
        """Nothing of the lease is left."""
        self.memory.remove(f"{_LEASES}{inode}")

    def notes(self) -> dict[int, Note]:
        """All notes, by inode; what is none is left out."""
        found = {}
        for key, value in self.memory.items(_LEASES).items():
            digits = key.removeprefix(_LEASES)
            note = _note(value)
            if digits.isdecimal() and note is not None:
                found[int(digits)] = note
        return found


def _note(value: object) -> Note | None:
    if not isinstance(value, dict):
        return None
    try:
        stage, mode = Stage(value.get("stage")), Mode(value.get("mode"))
    except ValueError:
        return None
    return Note(stage, mode, {name: fact for name, fact in value.items() if name not in ("stage", "mode")})
