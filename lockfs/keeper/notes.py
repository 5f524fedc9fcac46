"""What the next worker must know of the keeper's books, should this one be killed.

One value for each grant, and one for each image that somebody writes or that this host has a lease of. They
say no more than is true: a lease that is about to be given back is struck out first, and a grant that may
write is noted as such only afterwards; the next worker then asks for the lease anew, as any open without one
does.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from lockfs.backends.base import Image, Lease, Memory, Mode, Owner
from lockfs.errors import WriteRefused
from lockfs.keeper.gate import Gate, GateState
from lockfs.keeper.grants import Access, Grant, Kind
from lockfs.keeper.images import Record
from lockfs.keeper.openers import Opener, Role
from lockfs.linux.proc import Process

GRANT, IMAGE = "grant:", "image:"


class Notes:
    """Keeps the notes of one keeper in step with its records. Trio thread."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._numbers = itertools.count(self.last + 1)
        self._grants: dict[int, dict[Grant, dict[str, Any]]] = {}
        self._images: dict[int, dict[str, Any]] = {}

    def note(self, record: Record, *, releasing: bool = False) -> None:
        """Note the record as it is; `releasing`: as if it had no lease, for that is about to be so."""
        lease = None if releasing else record.lease
        # A grant that is noted as leased is never without its image's note.
        if lease is not None:
            self._note_image(record, lease)
        self._note_grants(record)
        if lease is None and self._images.pop(record.image.inode, None) is not None:
            self._memory.remove(f"{IMAGE}{record.image.inode}")

    def _note_grants(self, record: Record) -> None:
        noted = self._grants.setdefault(record.image.inode, {})
        for grant in [grant for grant in noted if grant not in record.grants]:
            del noted[grant]
            self._memory.remove(f"{GRANT}{grant.number}")
        for grant in record.grants:
            grant.number = grant.number or next(self._numbers)
            value = _value_of(grant)
            if noted.get(grant) != value:
                self._memory.set(f"{GRANT}{grant.number}", value)
                noted[grant] = value
        if not noted:
            del self._grants[record.image.inode]

    def _note_image(self, record: Record, lease: Lease) -> None:
        inode, owner = record.image.inode, lease.owner
        value = {
            "mode": lease.mode.value,
            "owner": [owner.host, owner.pid, owner.program, owner.since],
            "lost": record.lost,
            "suspending": record.suspending,
        }
        if self._images.get(inode) != value:
            self._memory.set(f"{IMAGE}{inode}", value)
            self._images[inode] = value

    def forget_unknown(self, known: Iterable[Grant]) -> None:
        """Strike out what a former worker noted and nobody goes on with."""
        kept = {f"{GRANT}{grant.number}" for grant in known}
        for key in self._memory.items(GRANT):
            if key not in kept:
                self._memory.remove(key)
        for key in self._memory.items(IMAGE):
            if int(key.removeprefix(IMAGE)) not in self._images:
                self._memory.remove(key)

    def lease_of(self, inode: int) -> tuple[Mode, Owner, bool, bool] | None:
        """The lease that a former worker had of an image: its mode and owner, whether it was lost, and
        whether its opens were about to be suspended for it.
        """
        value = self._memory.get(f"{IMAGE}{inode}")
        if not isinstance(value, dict):
            return None
        return Mode(value["mode"]), Owner(*value["owner"]), value["lost"], value["suspending"]

    def grant_of(self, number: int, image: Image) -> Grant | None:
        """A grant that a former worker gave, its gate shut or asking; None if it had ended."""
        value = self._memory.get(f"{GRANT}{number}")
        if not isinstance(value, dict):
            return None
        access, kind = Access(value["access"]), Kind(value["kind"])
        refusal = WriteRefused(f"image '{image.name}' was opened for reading only")
        gate = Gate(GateState.ASK) if access is Access.WRITE else Gate(GateState.SHUT, refusal)
        pid, started, program, tid, role = value["opener"]
        # The arguments have served their purpose: they decided the role.
        opener = Opener(Process(pid, started, program, ()), tid, Role(role))
        grant = Grant(image, opener, access, kind, gate, value["may_yield"], value["since"])
        grant.covered, grant.active, grant.seen = value["covered"], value["active"], value["seen"]
        grant.number = number
        return grant

    @property
    def last(self) -> int:
        """The greatest number that a former worker gave to a grant."""
        return max((int(key.removeprefix(GRANT)) for key in self._memory.items(GRANT)), default=0)


def _value_of(grant: Grant) -> dict[str, Any]:
    process = grant.opener.process
    return {
        "access": grant.access.value,
        "kind": grant.kind.value,
        "may_yield": grant.may_yield,
        "since": grant.since,
        "covered": grant.covered,
        "active": grant.active,
        "seen": grant.seen,
        "opener": [process.pid, process.started, process.program, grant.opener.tid, grant.opener.role.value],
    }
