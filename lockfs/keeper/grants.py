"""What an opener is given: the grant, and the frozen picture of an image's grants for reports."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from lockfs.backends.base import Image, Lease, Mode
from lockfs.errors import WriteRefused
from lockfs.keeper.gate import Gate, GateState
from lockfs.keeper.openers import Opener


class Access(enum.Enum):
    """What an open asks for; WRITE is any open that may change data, whatever else it does."""

    READ = "read"
    WRITE = "write"


class Kind(enum.Enum):
    """READER never writes; LEASED writes under the host's lease; PROVISIONAL asks for the lease at its first
    change; MANAGED holds a writable descriptor only for labels, so far, and needs a free image to
    change it. SUSPENDED lost the lease and may have it back if nobody else has had it since. FENCED lost it
    for good, and counts for nothing any more."""

    READER = "reader"
    LEASED = "leased"
    PROVISIONAL = "provisional"
    MANAGED = "managed"
    SUSPENDED = "suspended"
    FENCED = "fenced"


@dataclass(eq=False)
class Grant:
    """One open of an image, from the keeper's yes to its close. Only the keeper changes it.

    `may_yield`: the lease may be taken from it while its guest is stopped, so its data must pass the gate
    (never kernel passthrough); so must that of a PROVISIONAL or MANAGED grant. `since` is in seconds of
    the epoch. `covered`: a reader that the host's lease counts. `active`: it may have changed data under
    the lease, that is, its gate opened. `seen`: while active, its guest was seen to hold QEMU's write byte,
    so the byte's absence later says that the guest has stopped. A guest with locking off is never seen.
    `lost`: of a SUSPENDED grant, the lease it had. `number`: under which the next worker knows it.
    """

    image: Image
    opener: Opener
    access: Access
    kind: Kind
    gate: Gate
    may_yield: bool
    since: float
    covered: bool = False
    active: bool = False
    seen: bool = False
    lost: Lease | None = None
    number: int = 0

    @property
    def writes(self) -> bool:
        """Whether the open asked for write access."""
        return self.access is Access.WRITE


@dataclass(frozen=True)
class HeldImage:
    """An image in the keeper's books.

    `state`: "held", "doubt", "lost", "yielding", "releasing" (nobody needs the lease, the storage has not
    taken it back yet), "provisional", "managed", "reading", "waiting". `mode` is the lease's, None without
    one. `since` is the epoch second of the lease, or of the oldest open without one (0.0 without either).
    `openers` are (pid, program, kind), "removing" being the kind of an unlink or rename under way;
    `waiting` are (pid, program) in the order they will be served.
    """

    inode: int
    name: str
    state: str
    mode: Mode | None
    since: float
    openers: tuple[tuple[int, str, str], ...]
    waiting: tuple[tuple[int, str], ...]


def reader(image: Image, opener: Opener, since: float, *, covered: bool) -> Grant:
    """The grant of a read-only open."""
    gate = Gate(GateState.SHUT, WriteRefused(f"image '{image.name}' was opened for reading only"))
    return Grant(image, opener, Access.READ, Kind.READER, gate, may_yield=False, since=since, covered=covered)


def managed(image: Image, opener: Opener, since: float) -> Grant:
    """The grant of a manager's writable open: without a lease, until it changes data of a free image."""
    gate = Gate(GateState.ASK)
    return Grant(image, opener, Access.WRITE, Kind.MANAGED, gate, may_yield=False, since=since)
