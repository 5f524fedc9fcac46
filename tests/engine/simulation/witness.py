"""Sees everything, and complains.

A hold counts while its host would still write under it: until it is released, the program dies, or the
host's own rules make it stop (`write_until` by its clock, a lost lockspace). What is judged:

* no two hosts are members under one id at once;
* no two holds of a lease overlap unless both are shared;
* each hold's version is higher than that of any earlier exclusive hold, and of any earlier hold if it is
  exclusive itself;
* no write to an image lands after a hold of a higher version began elsewhere.

A host that stands still together with its clock, or has so lately (Machine.unaware), is excused: it holds
what it believes to hold. It must not believe so for longer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lockfs.paxos.resource import Hold
from tests.engine.simulation.scheduler import Scheduler

if TYPE_CHECKING:
    from tests.engine.simulation.program import Session


class Witness:
    """The judge of one run. `faulted`: a lease write landed beyond the bound; from then on all is excused."""

    def __init__(self, scheduler: Scheduler, bound: float) -> None:
        self._scheduler = scheduler
        self._bound = bound
        self.violations: list[str] = []
        self.excused: list[str] = []
        self.faulted = ""
        self.sessions: list[Session] = []
        self.holds = 0
        self.image_writes = 0
        self.late_image_writes = 0
        self.stale_after_halts = 0
        self.confirmed = 0
        self._known: dict[tuple[int, int], tuple[Hold, int]] = {}
        self._newest: dict[int, tuple[int, int]] = {}
        self._newest_exclusive: dict[int, tuple[int, int]] = {}

    def beyond(self, what: str) -> None:
        """A lease write landed beyond the bound."""
        self._scheduler.note(f"beyond the bound: {what}")
        self.faulted = self.faulted or what

    def complain(self, what: str, *, excused: bool = False) -> None:
        """Record a violation, or a case that only a watchdog could have prevented."""
        excused = excused or bool(self.faulted)
        (self.excused if excused else self.violations).append(f"at {self._scheduler.now:.3f}: {what}")
        self._scheduler.note(("excused: " if excused else "VIOLATION: ") + what)

    def joined(self, session: Session) -> None:
        """A host has become a member."""
        for other in self.sessions:
            unaware = other.program.machine.unaware
            if other.lockspace.host_id == session.lockspace.host_id and other.may_write and not unaware:
                self.complain(f"{session.label} has joined while {other.label} is a member")
        self.sessions.append(session)

    def look(self) -> None:
        """Judge the holds as they are now."""
        holding: dict[int, list[tuple[Session, Hold]]] = {}
        for session in self.sessions:
            if session.holders:
                self._look_at(session, holding)
        for lease, holders in holding.items():
            if len(holders) > 1 and any(hold is Hold.EXCLUSIVE for _, hold in holders):
                names = " and ".join(f"{session.label} ({hold.value})" for session, hold in holders)
                self.complain(f"lease {lease} is held by {names}")
                for session, _ in holders:
                    session.holders.discard(lease)

    def _look_at(self, session: Session, holding: dict[int, list[tuple[Session, Hold]]]) -> None:
        for lease in sorted(session.holders):
            resource = session.resources[lease]
            key = (session.number, lease)
            if resource.hold is Hold.NONE or resource.leader is None:
                self._known.pop(key, None)
                continue
            state = (resource.hold, resource.leader.lver)
            if self._known.get(key) != state:
                self._known[key] = state
                self._began(session, lease, *state)
            if session.may_write_under(lease) and not session.program.machine.unaware:
                holding.setdefault(lease, []).append((session, resource.hold))

    def _began(self, session: Session, lease: int, hold: Hold, lver: int) -> None:
        self.holds += 1
        self._scheduler.note(f"{session.label} holds lease {lease} {hold.value}, version {lver}")
        exclusive = hold is Hold.EXCLUSIVE
        before, owner = (self._newest if exclusive else self._newest_exclusive).get(lease, (0, 0))
        if lver <= before and owner != session.number:
            what = f"{session.label} holds lease {lease} in version {lver} after version {before}"
            self.complain(what, excused=session.program.machine.unaware)
        for newest in (self._newest, self._newest_exclusive) if exclusive else (self._newest,):
            if lver > newest.get(lease, (0, 0))[0]:
                newest[lease] = (lver, session.number)

    def image_written(
        self, session: Session, lease: int, lver: int, called: float, *, unaware: bool = False
    ) -> None:
        """A write under a hold reached an image. Its host was `unaware` that it had stood still."""
        self.image_writes += 1
        late = self._scheduler.now > called + self._bound + 1e-6
        self.late_image_writes += late
        newest, owner = self._newest.get(lease, (0, 0))
        if newest > lver and owner != session.number:
            what = f"{session.label} wrote to image {lease} under version {lver} after version {newest}"
            self.stale_after_halts += unaware
            self.complain(what, excused=late or unaware)
