"""What a lease backend is: the protocol between the keeper and whatever guards an image on the storage.

A backend knows nothing of opens, processes' rules or FUSE. It takes, converts and gives back one lease
per image for this host, tells who holds an image, carries a host's wish for an image to its holder, and
reports when a lease it granted is in doubt or lost.
"""

from __future__ import annotations

import enum
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from lockfs.errors import BackendError

if TYPE_CHECKING:  # the guardian imports this module for its values, and must not import trio
    import trio


class Mode(enum.Enum):
    """How a lease shares the image: EXCLUSIVE with nobody, SHARED with other SHARED leases."""

    EXCLUSIVE = "exclusive"
    SHARED = "shared"


class LeaseState(enum.Enum):
    """HELD is certain, DOUBT means renewal is late (writes wait), LOST means another host may hold it."""

    HELD = "held"
    DOUBT = "doubt"
    LOST = "lost"
    RELEASED = "released"


@dataclass(frozen=True)
class Image:
    """An image as a backend sees it.

    `inode` is the file's inode number on the storage: it survives renames and hard links and is the same
    on every host that mounts the store. `path` is a current name relative to the store's root, without a
    leading slash, for people and for path-based lock managers. `descriptor` is the open file description
    that carries locks; it is the one that backs a passthrough, so that locks live as long as the data
    path does. It is open for reading, and for writing when the image can be written at all. The caller
    keeps it open until the lease was released.
    """

    inode: int
    path: bytes
    descriptor: int

    @property
    def name(self) -> str:
        """The path for people, undecodable bytes escaped."""
        return self.path.decode("utf-8", "backslashreplace")


@dataclass(frozen=True)
class Owner:
    """Who a lease is taken for, as told to other hosts. `since` is in seconds of the epoch."""

    host: str
    pid: int
    program: str
    since: float

    def __str__(self) -> str:
        return f"{self.program} (pid {self.pid}) on {self.host}"


@dataclass(frozen=True)
class Holder:
    """Somebody who holds an image; `owner` is None where the storage does not tell who.

    `description` says how it is held, for people: "lockfs", "virtlockd", "QEMU without lockfs".
    """

    mode: Mode
    description: str
    owner: Owner | None = None

    def __str__(self) -> str:
        return f"{self.owner} [{self.description}]" if self.owner else self.description


@dataclass
class Lease:
    """A lease in hand. Backends subclass it for what they must remember; only they change `state`."""

    image: Image
    mode: Mode
    owner: Owner
    state: LeaseState = field(default=LeaseState.HELD)

    def in_time(self) -> bool:
        """Whether a write under this lease may be started at this very moment; callable from any thread.

        It says no as soon as the lease's time is over, whether or not anybody has changed `state` by then.
        """
        return True

    @property
    def resumable(self) -> bool:
        """Whether it can be told of a later lease that it follows this one, should this one be lost."""
        return False

    def follows(self, lost: Lease) -> bool:
        """Whether nobody has had the image between the lease `lost`, of this backend, and this one."""
        return False


@dataclass(frozen=True)
class Peer:
    """A host that takes part in the same leases. `silent_s`: how long it was not seen to do anything.

    `leases`: how many it holds, None where that is not known. `own`: it is this mount.
    """

    host_id: int
    name: str
    generation: int
    state: str
    silent_s: float
    io_timeout: int
    leases: int | None
    own: bool


@dataclass(frozen=True)
class Evidence:
    """What the storage tells of who has an image, in sentences. `free`: nobody has it; or somebody, and no
    lease is to be had from here (False); None if taking it will tell. `dead_in_s`: after how long a
    silent holder counts as dead, None if none is silent. `forcible`: it can be taken from a living holder.
    """

    sentences: tuple[str, ...]
    free: bool | None = None
    dead_in_s: float | None = None
    forcible: bool = False


LeaseEvent = Callable[[Lease], None]


class Memory(Protocol):
    """What must be known again after this process was killed: small JSON values by key, in shared memory.

    Each value is whole at any moment of a SIGKILL. Every method is instant, and may be called in any thread.
    Lists of descriptors under the name "fd" in a value stay open for the next worker; all others are closed.
    """

    def set(self, key: str, value: object) -> None:
        """Remember a value of at most some 2000 bytes in place of the one there was; raises LockfsError."""

    def remove(self, key: str) -> None:
        """Forget a key; one that is not there is no error."""

    def get(self, key: str) -> object | None:
        """The value, None if there is none."""

    def items(self, prefix: str) -> dict[str, object]:
        """All values whose keys begin so, by their whole keys."""


class Forgetful:
    """A Memory that ends with the process: for mounts that nobody goes on with, and for tests."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}

    def set(self, key: str, value: object) -> None:
        """See Memory."""
        self._values[key] = json.dumps(value)

    def remove(self, key: str) -> None:
        """See Memory."""
        self._values.pop(key, None)

    def get(self, key: str) -> object | None:
        """See Memory."""
        text = self._values.get(key)
        return None if text is None else json.loads(text)

    def items(self, prefix: str) -> dict[str, object]:
        """See Memory."""
        found = list(self._values.items())
        return {key: json.loads(text) for key, text in found if key.startswith(prefix)}


class _Unheard:
    """A task status that nobody waits for."""

    def started(self, value: None = None) -> None:
        """Nothing."""


_UNHEARD = _Unheard()


class Backend(ABC):
    """One way to guard images. All methods run on the trio thread and never block it.

    One task at a time calls acquire, convert or release for a given image; different images run
    concurrently. Every method may raise BackendError when the storage does not answer.
    """

    name: str
    patience: float = 0.0
    """How long at least, in seconds, a write waits for a lease that is held but in doubt."""

    @property
    def binds(self) -> bool:
        """Whether `bind` does anything."""
        return False

    def bind(self, descriptor: int) -> None:  # noqa: B027  (optional)
        """Have the storage itself refuse what is written through a description, as soon as it has given this
        host's leases away. The description may have been bound before; it ends with it. Called on a worker
        thread, while nothing is written through it.

        Raises:
            OSError: the storage refused that.
        """

    async def start(  # noqa: B027  (optional)
        self, on_change: LeaseEvent, memory: Memory | None = None
    ) -> None:
        """Make ready. `on_change` is called, on the trio thread, whenever a granted lease's state changes.

        `memory` may hold what a former worker of this mount knew, which was killed and has wholly ended: the
        backend goes on from there. What it must know again itself it keeps there.

        Raises:
            SetupError: the storage cannot carry this backend's leases; says what to do.
        """

    async def recall(self, image: Image, mode: Mode, owner: Owner) -> Lease | None:
        """The lease that a former worker of this mount held, as it is on the storage; None: it held none, or
        lost it.

        No other host could take the image at any moment in between. `image` is as it was when the lease was
        taken, with the same descriptor; `mode` is what the former worker's keeper believed: a conversion that
        was cut short leaves SHARED. Called after `start` and before `run`, once for each image.

        Raises:
            BackendError: the storage does not say. It may be called again.
        """
        return None

    async def settle(self) -> None:  # noqa: B027  (optional)
        """Give back what a former worker held, or was about to take, and nobody recalled. Called once, after
        all recalls and while `run` is running; `acquire` of such an image waits for its own part only.
        """

    async def run(self, *, task_status: trio.TaskStatus[None] = _UNHEARD) -> None:
        """Do what must go on while leases are held, from `start` until cancelled before `stop`.

        Raises:
            SetupError: before `task_status.started()`, leases cannot be taken and that was asked to be known.
        """
        import trio  # noqa: PLC0415  (see above)

        task_status.started()
        await trio.sleep_forever()

    async def stop(self) -> None:  # noqa: B027  (optional)
        """End cleanly; every lease was released before."""

    @abstractmethod
    async def acquire(self, image: Image, mode: Mode, owner: Owner, deadline: float) -> Lease:
        """Take the lease in one attempt; a conflict is an answer, not a reason to wait.

        `deadline` is trio time by which the attempt must have ended, for backends whose attempt takes
        several I/Os. Cancelled or failed, nothing stays taken.

        Raises:
            ImageBusy: somebody holds it; the sentence names them as far as the storage tells.
            BackendError: the storage did not answer.
        """

    @abstractmethod
    async def convert(self, lease: Lease, mode: Mode, deadline: float) -> None:
        """Change the mode of a held lease. If it fails, the lease keeps its old mode.

        Raises:
            ImageBusy: another host shares it.
        """

    @abstractmethod
    async def release(self, lease: Lease) -> None:
        """Give the lease back; when this returns another host can take it. Shielded by the caller."""

    @abstractmethod
    async def holders(self, image: Image) -> list[Holder]:
        """Everybody *else* who holds the image now, empty if it is free or only this host's."""

    async def known_paths(self) -> list[bytes]:
        """Paths, relative to the store, of images that some host may hold: a hint for reports, bounded."""
        return []

    async def peers(self) -> list[Peer]:
        """The hosts that take part in the same leases, as far as the backend knows hosts at all."""
        return []

    async def collect(self, gone: Callable[[int], bool], deadline: float) -> tuple[list[int], bool]:
        """Remove what is kept on the storage for images that are gone, never of one that is held.

        `gone` tells whether no file of that inode number is in the store. Returns the inode numbers whose
        leases were removed by trio time `deadline`, and whether that was all.
        """
        return [], True

    async def evidence(self, image: Image) -> Evidence:
        """What can be said of the holder's being alive, before its lease is taken or left to it."""
        return Evidence(("This backend has no leases that could be broken.",), free=False)

    async def force(self, image: Image) -> None:
        """Free the image's lease whoever has it: two hosts may write then. Only where `forcible`.

        Raises:
            BackendError: it could not be freed.
        """
        raise BackendError(f"The lease of {image.name} cannot be taken by force.")

    async def request(self, image: Image, owner: Owner) -> None:  # noqa: B027  (optional)
        """Ask whoever holds the image to let it go if they can; repeating it is harmless."""

    async def withdraw(self, image: Image, owner: Owner) -> None:  # noqa: B027  (optional)
        """Take the request back, after it was granted or given up."""

    async def requested(self, held: Iterable[int]) -> set[int]:
        """Of the inode numbers `held` by this host, those that another host asks for."""
        return set()
