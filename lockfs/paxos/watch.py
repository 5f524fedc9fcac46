"""Watching the other hosts of a lockspace: who is alive, as seen by this host's own clock.

A pass over the lockspace follows each renewal. Proof of life is a change between two passes; a single look is
none, and clocks are never compared across hosts (section 11 of the format).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from lockfs.paxos.timing import Timing
from lockfs.records import sectors
from lockfs.records.geometry import Geometry

_CHUNK = 64 << 10
_NEVER = (0, 0, 0)


class HostState(enum.Enum):
    """FREE: not joined. UNKNOWN: seen once. FAIL: silent for long. DEAD: what it held may be taken."""

    UNKNOWN = "unknown"
    FREE = "free"
    LIVE = "live"
    FAIL = "fail"
    DEAD = "dead"


@dataclass
class Sight:
    """What is known of one host. Times are this host's clock, 0.0 for never."""

    last_live: float = 0.0
    owner_id: int = 0
    generation: int = 0
    timestamp: int = 0
    io_timeout: int = 0
    name: bytes = b""


class Watch:
    """The sights of all hosts; a pass looks at every one, so `first_check` and `last_check` are the same."""

    def __init__(self, space_name: bytes, host_id: int, timing: Timing, shape: Geometry) -> None:
        self._space_name = space_name
        self._host_id = host_id
        self._timing = timing
        self._shape = shape
        self._sights: dict[int, Sight] = {}
        self._former = b""
        self._unused = b""
        """What a sector was that nobody has used: a first pass meets as many as nobody has used of 2000."""
        self._callers: set[int] = set()
        self.first_check = 0.0
        self.last_check = 0.0

    def observe(self, area: bytes, now: float) -> list[tuple[int, Sight]]:
        """Take in one pass: the whole lockspace as read just now. Returns what it found changed."""
        self.last_check = now
        self.first_check = self.first_check or now
        changed = self._changed(area)
        for host_id in changed:
            self._look(host_id, area, now)
        self._former = area
        return [(host_id, self._sights[host_id]) for host_id in changed]

    def _changed(self, area: bytes) -> list[int]:
        """Hosts whose sector is not what it was; runs of unchanged sectors are skipped at once."""
        size, former = self._shape.sector_size, self._former
        end = self._shape.hosts_max * size
        changed = []
        for start in range(0, end, _CHUNK):
            stop = min(start + _CHUNK, end)
            if area[start:stop] != former[start:stop]:
                places = range(start, stop, size)
                changed += [at for at in places if area[at : at + size] != former[at : at + size]]
        return [at // size + 1 for at in changed]

    def _look(self, host_id: int, area: bytes, now: float) -> None:
        at = sectors.delta_sector(host_id) * self._shape.sector_size
        raw = area[at : at + self._shape.sector_size]
        sight = self._sights.setdefault(host_id, Sight())
        seen = (sight.owner_id, sight.generation, sight.timestamp)
        if raw == self._unused and seen == _NEVER:
            return
        record = sectors.decode_leader(raw)
        if (record.owner_id, record.owner_generation, record.timestamp) == seen:
            self._unused = raw if seen == _NEVER else self._unused
            return
        if record.magic == sectors.DELTA_MAGIC and record.space_name == self._space_name:
            sight.owner_id, sight.generation = record.owner_id, record.owner_generation
            sight.name, sight.io_timeout = record.resource_name, record.io_timeout
        # A damaged record still was written by somebody: a sign of life.
        sight.timestamp = record.timestamp
        sight.last_live = now
        if sectors.in_bitmap(sectors.bitmap_of(area, at), self._host_id):
            self._callers.add(host_id)

    def sight(self, host_id: int) -> Sight | None:
        """What was last seen of a host; None before the first pass."""
        return self._sights.get(host_id)

    def silent_since(self, sight: Sight) -> float:
        """From when on a host counts as silent."""
        return sight.last_live or self.first_check

    def dead_at(self, sight: Sight) -> float:
        """When the host will count as dead if it stays silent."""
        return self.silent_since(sight) + self._timing.of(sight.io_timeout).dead

    def state(self, host_id: int, now: float) -> HostState:
        """A host's state at `now`; UNKNOWN before the first pass."""
        if not self.first_check:
            return HostState.UNKNOWN
        sight = self._sights.get(host_id)
        if sight is None or sight.timestamp == 0:
            return HostState.FREE
        if host_id == self._host_id:
            return HostState.LIVE
        silent = now - self.silent_since(sight)
        if silent <= self._timing.of(sight.io_timeout).fails:
            return HostState.UNKNOWN if sight.last_live == self.first_check else HostState.LIVE
        return HostState.DEAD if now > self.dead_at(sight) else HostState.FAIL

    def may_be_alive(self, host_id: int, generation: int, now: float) -> bool:
        """Whether the host, in the life of that generation, may still be alive. Doubt means yes."""
        sight = self._sights.get(host_id)
        if not self.first_check or sight is None:
            return True
        if sight.timestamp == 0 or sight.generation > generation:
            return False
        return now <= self.dead_at(sight)

    def fresh(self, sight: Sight) -> bool:
        """Whether the last pass saw the host change."""
        return bool(sight.last_live) and self.last_check == sight.last_live

    def longest_io(self) -> int:
        """The largest io_timeout of any host that has joined, ours included."""
        # A copy: a plan may ask in its thread while a pass meets a host for the first time.
        joined = [sight.io_timeout for sight in self._sights.copy().values() if sight.timestamp]
        return max([self._timing.io_timeout, *joined])

    def hosts(self) -> dict[int, Sight]:
        """Every host that was ever seen, by id."""
        return dict(self._sights)

    def take_callers(self) -> set[int]:
        """The hosts that told this one to look at the requests since the last call."""
        callers, self._callers = self._callers, set()
        return callers
