"""Whether this host's clock has kept pace with time, as far as anything shows it.

A machine that its hypervisor stops together with all its clocks does not know that time passed: its lease
looks good while other hosts have counted it as dead and taken what it held. Three things show it afterwards:
the hardware's clock, at once, if the machine has one that its hypervisor lets run on; the real-time clock, if
somebody sets it right; and the renewals of other hosts, whose own clocks went on.

A suspicion proves nothing, and may be raised for nothing: nothing is to be written under a lease taken before
it until the storage has confirmed that lease (Resource.confirm). Where little can be said, for hosts come or
go or renewals failed for long, the leases are to be looked at (Resource.is_there), with nobody held up.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lockfs.paxos.seams import Clock, WallClock
from lockfs.paxos.timing import Timing
from lockfs.paxos.watch import Sight

WATCHDOG_PART = 8
"""A clock may be behind by this part of the watchdog time unnoticed: of that time, which is for writes that
are under way, enough is left."""
TOLERANCE = 0.05
"""By so much two clocks' rates may differ."""
_STAMP_S = 1.0
_KEPT = 2
"""A renewal that took long to land has an old stamp; the one before it tells it from a standstill."""


@dataclass(frozen=True)
class _Stamp:
    """A timestamp of another host, and the time by our clock before which it had not landed."""

    timestamp: int
    not_before: float


@dataclass
class _Track:
    """One life of another host, and its last stamps, oldest first."""

    identity: tuple[int, int, bytes]
    stamps: list[_Stamp]


class Pace:
    """The suspicions against this host's clock. `suspicions` counts them, `why` tells of the last one."""

    def __init__(self, timing: Timing, clock: Clock, walls: Sequence[WallClock] = ()) -> None:
        """Without `walls`, other hosts alone are compared with."""
        self.suspicions = 0
        self.why = ""
        self._timing = timing
        self._clock = clock
        self._walls = tuple(walls)
        self._margin = timing.watchdog / WATCHDOG_PART
        self._offsets = self._offsets_now()
        self._renewed = 0
        self._pass_began: float | None = None
        self._tracks: dict[int, _Track] = {}
        self._look_due = False
        self._look_until = 0.0

    # Suspicions

    def suspect(self, why: str) -> None:
        """This host may have stood still: everything that it holds must be confirmed."""
        self.suspicions += 1
        self.why = why

    @property
    def renewed(self) -> bool:
        """Whether a renewal has landed since the last suspicion: others see from then on that we live."""
        return self._renewed == self.suspicions

    # The clocks of the real time

    def is_kept(self) -> bool:
        """Whether real time is where it should be since the last renewal; asked from any thread, for every
        write.
        """
        return not any(self._leaps(self._offsets_now()))

    def look_at_walls(self) -> None:
        """Raise a suspicion if a clock of the real time went further than ours; it is taken as right then."""
        now = self._offsets_now()
        leaps = self._leaps(now)
        if any(leaps):
            self.suspect(f"the real-time clock went {max(leaps):.0f} s further than this host's own")
            self._offsets = [
                new if leap else old for new, leap, old in zip(now, leaps, self._offsets, strict=True)
            ]

    def _leaps(self, offsets: list[float]) -> list[float]:
        """By how much each clock went further than ours, 0 where that is no more than it may."""
        leaps = [new - old for new, old in zip(offsets, self._offsets, strict=True)]
        return [
            leap if leap > self._margin + wall.late else 0.0
            for leap, wall in zip(leaps, self._walls, strict=True)
        ]

    def _offsets_now(self) -> list[float]:
        # In this order: what comes between the two readings makes real time look late, which harms nobody.
        return [wall.now() - self._clock.now() for wall in self._walls]

    # Renewals

    def renewing(self) -> tuple[int, list[float]]:
        """What is true just before a renewal is written, for `landed`."""
        self.look_at_walls()
        return self.suspicions, self._offsets_now()

    def landed(self, before: tuple[int, list[float]], age: float) -> None:
        """The renewal has landed, and others can tell it from the one before, `age` seconds ago.

        A standstill too short for others' pace to show it is enough on top of renewals that failed for long.
        """
        self._renewed, self._offsets = before
        if age >= self._timing.late:
            self._want_looks(self._clock.now())

    # Other hosts

    def observe(self, began: float, now: float, changed: Iterable[tuple[int, Sight]]) -> None:
        """Take in a pass, read between `began` and `now`: the sights of other hosts that it found changed."""
        former = began if self._pass_began is None else self._pass_began
        slow, news = "", False
        for host_id, sight in changed:
            track = self._tracks.get(host_id)
            identity = (sight.owner_id, sight.generation, sight.name)
            stamp = _Stamp(sight.timestamp, former)
            if track is None or track.identity != identity or sight.timestamp < track.stamps[-1].timestamp:
                self._tracks[host_id] = _Track(identity, [stamp])
                news = True
            elif sight.timestamp > track.stamps[-1].timestamp:
                ahead = min(self._ahead(sight.timestamp, old, now) for old in track.stamps)
                if ahead > 0 and len(track.stamps) == _KEPT:
                    slow = f"host id {host_id} went {ahead:.0f} s further than this host's own clock allows"
                # One that was silent for long may have stood still as well: its own stamps tell too little.
                silent = now - track.stamps[-1].not_before > self._timing.of(sight.io_timeout).fails
                news = news or ahead > 0 or silent
                track.stamps = [*track.stamps[1 - _KEPT :], stamp]
        self._pass_began = began
        if slow:
            self.suspect(slow)
        if news:
            self._want_looks(now)

    def _want_looks(self, now: float) -> None:
        # A host that was taking a lease when we came back has done so, or given up, by then.
        self._look_due, self._look_until = True, now + self._timing.fails

    def _ahead(self, timestamp: int, old: _Stamp, now: float) -> float:
        ours = (now - old.not_before) * (1.0 + TOLERANCE)
        return timestamp - old.timestamp - ours - _STAMP_S - self._margin

    @property
    def look_due(self) -> bool:
        """Whether the leases in hand are to be looked at after this pass."""
        return self._look_due or self._clock.now() < self._look_until

    def looked(self) -> None:
        """They were, or are in doubt."""
        self._look_due = False
