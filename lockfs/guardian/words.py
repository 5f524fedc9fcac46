"""What the family knows of itself: numbers in the journal's header, each written in one store.

A pidfd of each member is open in the shared table and noted here, so that whoever becomes guardian has it.
Two rules keep a takeover simple. While `sweeping` is set the worker alone opens and closes descriptors, and
it alone names a spare; the others wait. And a member's pid is written after all else that belongs to it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from lockfs.journal.memory import Header, SharedMemory
from lockfs.linux import cloning

HEARTBEAT_S = 0.5
"""How often a worker's loop has to show that it turns, seconds."""
HEARTBEAT_LIMIT_S = 5.0
"""A worker that has not shown it for so long is killed and replaced."""
POLL_S = 0.5
"""How often the guardian looks; it hears of deaths at once."""
START_LIMIT_S = 30.0
"""A worker that takes over has so long until its loop turns for the first time."""
LOOP_DEATHS = 5
LOOP_STEADY_S = 10.0
"""Workers that serve for less than this, LOOP_DEATHS one after the other, are a crash loop."""
LOOP_KILLED_S = 0.25
"""The same for workers that were killed from outside (SIGKILL)."""
FENCED_RETRY_S = 10.0
"""In a crash loop a worker is started so often at most."""
CLONE_RETRY_S = 1.0
"""After a twin or a spare could not be made, or died at once, the next attempt is made so much later."""
KILL_LIMIT_S = 10.0
"""How long the end of a killed process is waited for where there is something else to be done."""

LINGERING = 4
"""So many workers may be replaced before they are wholly dead; the next one's whole death is waited for."""
_LINGERING_FIRST = 21


@dataclass(frozen=True)
class Limits:
    """The times above, for tests to shorten."""

    heartbeat: float = HEARTBEAT_LIMIT_S
    poll: float = POLL_S
    start: float = START_LIMIT_S
    loop_deaths: int = LOOP_DEATHS
    loop_steady: float = LOOP_STEADY_S
    loop_killed: float = LOOP_KILLED_S
    fenced_retry: float = FENCED_RETRY_S
    clone_retry: float = CLONE_RETRY_S
    kill: float = KILL_LIMIT_S


def _word(index: int, meaning: str) -> property:
    at = Header.FREE_FIRST + index

    def read(words: Words) -> int:
        return words.header.words[at]

    def write(words: Words, value: int) -> None:
        words.header.words[at] = value

    return property(read, write, doc=meaning)


class Words:
    """The family's numbers. Pidfds and eventfds are 0 where there is none (0 to 2 are standard streams)."""

    def __init__(self, memory: SharedMemory) -> None:
        self.header = memory.header

    guardian_fd = _word(0, "Pidfd of the guardian.")
    twin_fd = _word(1, "Pidfd of the twin.")
    worker_fd = _word(2, "Pidfd of the worker.")
    spare_fd = _word(3, "Pidfd of the spare.")
    bell = _word(4, "Eventfd that wakes the guardian.")
    order = _word(5, "Eventfd that wakes the spare.")
    family = _word(6, "Process id of the first guardian, by which the mount is known.")
    sweeping = _word(7, "1 from the order to take over until the worker has closed what nobody named.")
    listening = _word(8, "1 once the worker takes signals.")
    ready_ns = _word(9, "When the worker became ready, CLOCK_MONOTONIC; 0: it is not. The worker's.")
    ended = _word(10, "The worker's exit code + 1, written as its last deed; 0: it goes on.")
    death = _word(11, "How the last worker ended (Death).")
    deaths = _word(12, "How many workers died one after the other that served for less than LOOP_STEADY_S.")
    fenced = _word(13, "1: the worker was started in a crash loop.")
    ordered_ns = _word(14, "When the worker was told to take over, CLOCK_MONOTONIC.")
    unmount = _word(15, "The signal that asks for the mount's end and was not passed on yet; 0: none.")
    oom = _word(16, "The oom_score_adj that the guardian was started with.")
    spares_lost = _word(17, "How many spares ended without having been needed.")
    hung = _word(19, "Process id of a worker that was killed because its loop stood still.")
    upgrades_refused = _word(18, "How many times the program as it is installed could not take over.")

    canary_fd = _word(20, "Pidfd of the thread whose death tells of the worker's (canary). The worker's.")

    def lingering(self) -> list[int]:
        """Workers that were replaced before they were wholly dead and are not reaped yet; 0: a free place."""
        first = Header.FREE_FIRST + _LINGERING_FIRST
        return list(self.header.words[first : first + LINGERING])

    def set_lingering(self, index: int, pid: int) -> None:
        """Fill a place of `lingering`, with 0 to free it."""
        self.header.words[Header.FREE_FIRST + _LINGERING_FIRST + index] = pid

    def descriptors(self) -> set[int]:
        """The descriptors that belong to the family itself."""
        known = (
            self.guardian_fd, self.twin_fd, self.worker_fd, self.spare_fd, self.bell, self.order,
            self.canary_fd,
        )  # fmt: skip
        return {int(number) for number in known if number}

    def ring(self) -> None:
        """Wake the guardian."""
        os.eventfd_write(self.bell, 1)

    def unwatched(self) -> bool:
        """Whether guardian and twin are both dead; instant.

        The twin names itself guardian before it stops being the twin, and that is looked at last.
        """
        guardian, twin = self.guardian_fd, self.twin_fd
        if not guardian or not cloning.is_dead(guardian) or (twin and not cloning.is_dead(twin)):
            return False
        return bool(self.guardian_fd == guardian)
