"""Which readers wait at the device: all of them, or, while everything is served at once, one.

Small reads and writes of what is in memory take a few microseconds each. Readers that share such work get in
each other's way: the kernel wakes another one for each request, which then waits for the interpreter. So
after SOLO_AFTER requests in a row that were not expected to wait, one reader leads and the others sleep here;
before it does anything that may wait for a disk, it calls them back to the device. What was expected to be
quick may wait all the same (a write, for the journal), so one sleeper watches. Invariant: while a request is
served for longer than two of TICK_S, no reader sleeps here.
"""

from __future__ import annotations

import threading

SOLO_AFTER = 64
TICK_S = 0.005
"""How often a sleeper looks whether the leader gets on; it may meet what was not known to wait."""


class Door:
    """One relay's door. `serial` and `streak` are bare counters: a count lost to a race changes nothing."""

    def __init__(self, tick_s: float = TICK_S) -> None:
        self._tick_s = tick_s
        self._condition = threading.Condition()
        self._leader = 0
        self._watched = False
        self.serial = 0
        self.streak = 0

    def slow(self) -> None:
        """Say that the calling thread is about to do what may wait."""
        self.streak = 0
        if self._leader == threading.get_ident():
            self._open()

    def served(self) -> None:
        """Say that the calling reader has served a request, at once unless `slow` was called."""
        self.serial += 1
        self.streak += 1
        if self.streak > SOLO_AFTER and not self._leader:
            with self._condition:
                self._leader = self._leader or threading.get_ident()

    @property
    def sleepers(self) -> bool:
        """Whether somebody sleeps here."""
        return self._watched

    def leads(self) -> bool:
        """Whether the calling thread is the only one that reads the device."""
        return self._leader == threading.get_ident()

    def wait(self) -> None:
        """Sleep while another reader leads; cheap if none does, for it is called before each read."""
        if not self._leader or self._leader == threading.get_ident():
            return
        with self._condition:
            while self._leader:
                if self._watched:
                    self._condition.wait()
                else:
                    self._watch()

    def _watch(self) -> None:
        """Be the one sleeper that looks after the leader for a while; have the condition's lock."""
        self._watched = True
        serial = self.serial
        try:
            self._condition.wait(self._tick_s)
        finally:
            self._watched = False
        if self._leader and self.serial == serial:
            # Stuck, or out of work: either way more readers are better.
            self._leader = self.streak = 0
            self._condition.notify_all()

    def _open(self) -> None:
        with self._condition:
            self._leader = 0
            self._condition.notify_all()
