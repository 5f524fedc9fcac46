"""A worker's turn at serving: what it is told when it begins, and what it tells the guardian."""

from __future__ import annotations

import logging
import os
import time

from lockfs.guardian import death, long_values
from lockfs.guardian.words import Words
from lockfs.journal.memory import SharedMemory
from lockfs.linux import cloning

FAILURE = "guardian:failure"
"""The value in the journal that says why the first worker did not get ready."""
SENTENCE_CHARS_MAX = 4096

_log = logging.getLogger(__name__)


class Turn:
    """One worker's turn. `number` counts from 1. `first`: nobody served before. `fenced`: workers keep dying,
    serve reading only. `died` says how the worker before it ended, for the log; empty on the first turn;
    `upgraded`: it ended to make room for a new version.
    """

    def __init__(self, memory: SharedMemory) -> None:
        self._memory = memory
        self._words = words = Words(memory)
        self.number: int = memory.header.turns
        self.first = self.number == 1
        self.fenced = bool(words.fenced)
        self.died = "" if self.first else death.in_words(words.death)
        self.upgraded = not self.first and words.death == death.UPGRADED
        self.deaths: int = words.deaths
        self._guardian: int = words.guardian_fd
        self._unwatched = 0
        self._spares_lost: int = words.spares_lost
        self._upgrades_refused: int = words.upgrades_refused

    @property
    def family(self) -> int:
        """The process id that the user knows the mount by: that of the first guardian."""
        return int(self._words.family)

    @property
    def guardian(self) -> int:
        """The guardian's process id."""
        return int(self._memory.header.guardian_pid)

    @property
    def is_ready(self) -> bool:
        """Whether `ready` was called."""
        return bool(self._words.ready_ns)

    def listening(self) -> None:
        """Tell the guardian that this process now handles the signals that ask for the mount's end."""
        self._words.listening = 1
        self._words.ring()

    def ready(self) -> None:
        """Tell the guardian that requests are answered: from here on the mount outlives this process."""
        cloning.die_with_parent(0)
        self.beat()
        self._memory.header.served = 1
        self._words.ready_ns = time.monotonic_ns()
        self._words.ring()

    def failed(self, code: int, sentence: str) -> None:
        """Leave word why this process cannot serve: it exits with `code` next."""
        value = {"code": code, "sentence": sentence[:SENTENCE_CHARS_MAX]}
        long_values.put(self._memory.facts, FAILURE, value)

    def beat(self) -> None:
        """Show that the loop turns. To be called by it every HEARTBEAT_S, from its first moment on."""
        self._memory.header.heartbeat_ns = time.monotonic_ns()

    def upgrade(self) -> None:
        """Ask for the next worker to be of the program as it is installed now."""
        self._memory.header.upgrade = 1
        self._words.ring()

    def look_around(self) -> None:
        """Log what became of the rest of the family; instant, to be called as often as `beat`."""
        words = self._words
        if words.guardian_fd != self._guardian:
            self._guardian = words.guardian_fd
            _log.warning("The guardian was killed; process %d has taken its place.", self.guardian)
        self._unwatched = self._unwatched + 1 if words.unwatched() else 0
        if self._unwatched == 4:  # the spare may be about to take over
            _log.critical(
                "Guardian and twin were killed: nobody would replace this process (%d).", os.getpid()
            )
        if words.spares_lost != self._spares_lost:
            self._spares_lost = words.spares_lost
            _log.warning("The spare process of this mount was killed; another one is made.")
        if words.upgrades_refused != self._upgrades_refused:
            self._upgrades_refused = words.upgrades_refused
            _log.error("The program as it is installed now cannot take this mount over: the old one goes on.")
