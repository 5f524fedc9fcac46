"""A world for keepers: several hosts over one storage in memory, with faults on demand.

Fault model. The storage is always consistent: it grants EXCLUSIVE to one host or SHARED to several, and never
loses what it was told. Between a host and the storage every call may take time before and after its effect (a
pass through the scheduler at least, a random delay if the world is given one), may be refused with ImageBusy
because another host holds the image, and may fail with BackendError before its effect, at calls chosen by
name and number. An acquire cancelled after its effect undoes it, as backends must. A lease may come into
doubt and be lost: its time may be over before the host is told of the doubt; it is told of the loss before
the storage gives the image away, and writes in flight end within the margin in between. Not modelled, because
the keeper cannot survive it: a backend that breaks its contract. The world checks the keeper's part of that
contract: one call at a time for an image, no acquire while leased, a release only of what is held.
"""

from __future__ import annotations

import errno
import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from random import Random
from typing import TypeVar

import trio

from lockfs.backends.base import Backend, Holder, Image, Lease, LeaseEvent, LeaseState, Mode, Owner
from lockfs.errors import BackendError, ImageBusy
from lockfs.keeper.gate import GateState
from lockfs.keeper.keeper import Grant, Keeper, Kind
from lockfs.keeper.openers import Opener, Role
from lockfs.keeper.policy import Policy
from lockfs.linux.proc import NOBODY, Process

T = TypeVar("T")
DISK = Image(1, b"disk.img", -1)
OTHER = Image(2, b"other.img", -1)
ENTERS_MAX = 50


class Violation(AssertionError):
    """A promise was broken."""


@dataclass
class Storage:
    """What all hosts share. `writing` are the changes under way: (inode, host, pid).

    `versions` count the leases of an image; `resumable`: a lost lease can be told from one that follows it.
    `processes`: two processes of one host that write at once are a breach too.
    """

    processes: bool = True

    held: dict[int, dict[str, FakeLease]] = field(default_factory=lambda: defaultdict(dict))
    wanted: dict[int, set[str]] = field(default_factory=lambda: defaultdict(set))
    writing: list[tuple[int, str, int]] = field(default_factory=list)
    versions: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    resumable: bool = False
    written: dict[int, list[tuple[str, int]]] = field(default_factory=lambda: defaultdict(list))

    def rivals(self, inode: int, host: str, mode: Mode) -> list[FakeLease]:
        others = [lease for name, lease in self.held[inode].items() if name != host]
        return [x for x in others if mode is Mode.EXCLUSIVE or x.mode is Mode.EXCLUSIVE]

    def begin(self, inode: int, host: str, pid: int) -> None:
        for at, name, other in self.writing:
            if at == inode and (name != host or (self.processes and other != pid)):
                raise Violation(f"{name}/{other} and {host}/{pid} write image {inode} at once")
        self.writing.append((inode, host, pid))
        self.written[inode].append((host, pid))

    def end(self, inode: int, host: str, pid: int) -> None:
        self.writing.remove((inode, host, pid))


@dataclass(eq=False)
class FakeLease(Lease):
    """A lease in the storage; `overdue`: its time is over, of which no event has told yet. `version` is
    higher for each lease of an image, whoever has it; `lost_at`: how many writes there were when it was lost.
    """

    overdue: bool = False
    version: int = 0
    can_resume: bool = False
    lost_at: int = 0

    def in_time(self) -> bool:
        return not self.overdue

    @property
    def resumable(self) -> bool:
        return self.can_resume

    def follows(self, lost: Lease) -> bool:
        return isinstance(lost, FakeLease) and self.version == lost.version + 1


class FakeBackend(Backend):
    """One host's way to the storage; see the fault model above."""

    name = "fake"

    def __init__(self, host: str, storage: Storage, random: Random, delay: float) -> None:
        self.host = host
        self.storage = storage
        self.random = random
        self.delay = delay
        self.faults: dict[tuple[str, int], BackendError] = {}
        self.failing: dict[str, BackendError] = {}
        self.fault_rate = 0.0
        self.calls: list[tuple[str, int, float]] = []
        self.counts: dict[str, int] = defaultdict(int)
        self.listener: LeaseEvent = lambda lease: None
        self._inside: set[int] = set()
        self.before_release: Callable[[int], None] = lambda inode: None
        self.ties = False
        self.bound: list[int] = []
        self.unbindable: dict[int, int] = {}

    @property
    def binds(self) -> bool:
        """See Backend.binds."""
        return self.ties

    def bind(self, descriptor: int) -> None:
        """Note it; those that are `unbindable` fail with the error number there."""
        if descriptor in self.unbindable:
            number = self.unbindable[descriptor]
            raise OSError(number, os.strerror(number))
        self.bound.append(descriptor)

    def fail(self, call: str, *numbers: int) -> None:
        """Let the given calls by that name (1 is the next one) fail; without numbers all from now on."""
        error = BackendError(f"the storage does not answer {call}")
        if not numbers:
            self.failing[call] = error
        for number in numbers:
            self.faults[call, self.counts[call] + number] = error

    def count(self, call: str) -> int:
        """How often that call was made."""
        return self.counts[call]

    async def _step(self) -> None:
        await trio.sleep(self.random.uniform(0, self.delay))

    async def _begin(self, call: str, inode: int) -> None:
        self.counts[call] += 1
        self.calls.append((call, inode, trio.current_time()))
        number = self.counts[call]
        await self._step()
        error = self.faults.pop((call, number), None) or self.failing.get(call)
        if error or self.random.random() < self.fault_rate:
            raise BackendError(str(error or f"{call} fails by chance"))

    def _enter(self, inode: int) -> None:
        if inode in self._inside:
            raise Violation("two calls for one image at once")
        self._inside.add(inode)

    async def acquire(self, image: Image, mode: Mode, owner: Owner, deadline: float) -> FakeLease:
        if deadline <= trio.current_time():
            raise Violation("an attempt without time")
        if self.host in self.storage.held[image.inode]:
            raise Violation("acquired twice")
        self._enter(image.inode)
        try:
            await self._begin("acquire", image.inode)
            rivals = self.storage.rivals(image.inode, self.host, mode)
            if rivals:
                raise ImageBusy(f"image '{image.name}' is held by {rivals[0].owner}")
            self.storage.versions[image.inode] += 1
            lease = FakeLease(image, mode, owner)
            lease.version, lease.can_resume = self.storage.versions[image.inode], self.storage.resumable
            self.storage.held[image.inode][self.host] = lease
            try:
                await self._step()
            except trio.Cancelled:
                self.storage.held[image.inode].pop(self.host, None)
                raise
            return lease
        finally:
            self._inside.remove(image.inode)

    async def convert(self, lease: Lease, mode: Mode, deadline: float) -> None:
        inode = lease.image.inode
        self._enter(inode)
        try:
            await self._begin("convert", inode)
            if self.storage.rivals(inode, self.host, mode):
                raise ImageBusy(f"image '{lease.image.name}' is shared by others")
            lease.mode = mode
        finally:
            self._inside.remove(inode)

    async def release(self, lease: Lease) -> None:
        inode = lease.image.inode
        self.before_release(inode)
        if lease.state is LeaseState.RELEASED:
            raise Violation("released twice")
        self._enter(inode)
        try:
            await self._begin("release", inode)
            if self.storage.held[inode].get(self.host) is lease:
                del self.storage.held[inode][self.host]
            elif lease.state is not LeaseState.LOST:
                raise Violation("released what is not held")
            lease.state = LeaseState.RELEASED
            self.listener(lease)
            await self._step()
        finally:
            self._inside.remove(inode)

    async def holders(self, image: Image) -> list[Holder]:
        await self._begin("holders", image.inode)
        rivals = self.storage.rivals(image.inode, self.host, Mode.EXCLUSIVE)
        return [Holder(lease.mode, "lockfs", lease.owner) for lease in rivals]

    async def request(self, image: Image, owner: Owner) -> None:
        await self._begin("request", image.inode)
        self.storage.wanted[image.inode].add(self.host)

    async def withdraw(self, image: Image, owner: Owner) -> None:
        await self._begin("withdraw", image.inode)
        self.storage.wanted[image.inode].discard(self.host)

    async def requested(self, held: Iterable[int]) -> set[int]:
        held = set(held)
        await self._begin("requested", 0)
        return {inode for inode in held if self.storage.wanted[inode] - {self.host}}

    def set_overdue(self, overdue: bool, inode: int = DISK.inode) -> None:
        """Let this host's lease be out of time, or in time again, without telling anybody."""
        self.storage.held[inode][self.host].overdue = overdue

    def turn_to(self, state: LeaseState, inode: int = DISK.inode) -> None:
        """Change the state of this host's lease; when LOST, the storage may give it away after the event."""
        lease = self.storage.held[inode][self.host]
        lease.state = state
        lease.lost_at = len(self.storage.written[inode])
        self.listener(lease)
        if state is LeaseState.LOST:
            del self.storage.held[inode][self.host]


class Inline:
    """Workers without threads: a pass through the scheduler before and after, as a thread would take."""

    async def call(self, function: Callable[..., T], *arguments: object) -> T:
        await trio.lowlevel.checkpoint()
        result = function(*arguments)
        await trio.lowlevel.cancel_shielded_checkpoint()
        return result

    async def attempt(self, function: Callable[..., T], *arguments: object) -> T:
        return await self.call(function, *arguments)


class FakeMount:
    """The surroundings: who holds the write byte, who inherited what, and which calls were made.

    `unguarded` are images that a handle can change past its gate until they are revoked; `maps` who maps
    which; `immortal` are pids that do not end when killed; `unbound` the descriptors that are about to be
    written through. So many flushes as `flush_fails` says fail.
    """

    def __init__(self) -> None:
        self.flush_fails = 0
        self.wants_taken = True
        self.bytes: dict[int, set[int]] = defaultdict(set)
        self.inherited: set[tuple[int, int]] = set()
        self.broken: set[str] = set()
        self.calls: list[str] = []
        self.on_taken: Callable[[int], None] = lambda inode: None
        self.unguarded: set[int] = set()
        self.unbound: dict[int, list[int]] = defaultdict(list)
        self.maps: dict[int, set[Process]] = defaultdict(set)
        self.revoke_lasts = 0.0
        self.killed: list[tuple[int, int]] = []
        self.immortal: set[int] = set()

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if name in self.broken:
            raise OSError(5, "Input/output error")

    def still_written(self, inode: int) -> bool:
        self._called("still_written")
        return bool(self.bytes[inode])

    def has_open(self, pid: int, inode: int) -> bool:
        self._called("has_open")
        return (pid, inode) in self.inherited

    def bypassed(self, inode: int) -> bool:
        return inode in self.unguarded

    async def revoke(self, inodes: frozenset[int]) -> dict[int, str]:
        self.calls.append("revoke")
        await trio.sleep(self.revoke_lasts)
        if "revoke" in self.broken:
            return dict.fromkeys(inodes, "Transport endpoint is not connected")
        self.unguarded -= inodes
        return {}

    def mappers(self, inodes: frozenset[int]) -> dict[int, frozenset[Process]]:
        self._called("mappers")
        return {inode: frozenset(self.maps[inode]) for inode in inodes if self.maps[inode]}

    def kill(self, processes: frozenset[tuple[int, int]], deadline_s: float) -> set[tuple[int, int]]:
        self.killed += sorted(processes)
        gone = {identity for identity in processes if identity[0] not in self.immortal}
        for inode, there in self.maps.items():
            self.maps[inode] = {one for one in there if (one.pid, one.started) not in gone}
        return set(processes) - gone

    def settle(self, inode: int, *, revoked: bool = False) -> None:
        self._called("settle")
        if self.flush_fails:
            self.flush_fails -= 1
            raise OSError(errno.EIO, "Input/output error")

    def unwritten(self, inode: int) -> list[int]:
        return list(self.unbound[inode])

    def taken(self, inode: int) -> None:
        self._called("taken")
        self.on_taken(inode)


class Host:
    """One host: a keeper with its backend and its mount."""

    def __init__(self, name: str, storage: Storage, policy: Policy, random: Random, delay: float) -> None:
        self.name = name
        self.storage = storage
        self.mount = FakeMount()
        self.backend = FakeBackend(name, storage, random, delay)
        self.freed: list[int] = []
        self.keeper = Keeper(
            self.backend,
            policy,
            name,
            surroundings=self.mount,
            freed=lambda image: self.freed.append(image.inode),
            workers=Inline(),
            clock=lambda: 1000.0,
            random=Random(1),
        )
        self.backend.listener = self.keeper.lease_changed

    async def write(self, grant: Grant, lasts: float = 0.0) -> bool:
        """Change data as a data thread does: through the gate, asking the keeper where it says so.

        Returns whether the grant had lost its lease and has it back.
        """
        lost = grant.lost
        for _ in range(ENTERS_MAX):
            lost = grant.lost or lost
            state = grant.gate.enter()
            if state is GateState.OPEN:
                break
            if state is GateState.SHUT:
                raise grant.gate.refusal or Violation("shut without a reason")
            await self.keeper.claim(grant)
        else:
            raise Violation("a gate that never opens")
        key = (grant.image.inode, self.name, grant.opener.process.pid)
        if isinstance(lost, FakeLease):
            since = set(self.storage.written[grant.image.inode][lost.lost_at :])
            if self.storage.processes and since - {key[1:]}:
                raise Violation(f"{key[1:]} goes on although {since} wrote since it lost its lease")
        try:
            self.storage.begin(*key)
            with trio.CancelScope(shield=True):
                await trio.sleep(lasts)
            self.storage.end(*key)
        finally:
            grant.gate.leave()
        return lost is not None

    def state(self, inode: int = DISK.inode) -> str | None:
        """The image's state as reported, None if the keeper has nothing on it."""
        return {image.inode: image.state for image in self.keeper.images()}.get(inode)


class World:
    """Hosts "a", "b", ... over one storage."""

    def __init__(
        self,
        names: str = "ab",
        policy: Policy | None = None,
        *,
        seed: int = 0,
        delay: float = 0.0,
    ) -> None:
        self.storage = Storage()
        self.random = Random(seed)
        policy = policy or Policy()
        self.hosts = [Host(name, self.storage, policy, self.random, delay) for name in names]

    def check_nothing_left(self) -> None:
        """Nothing is held, wanted, waited for or remembered anywhere."""
        for host in self.hosts:
            if host.keeper.images():
                raise Violation(f"{host.name} remembers {host.keeper.images()}")
            if host.keeper._waiting._by_thread:
                raise Violation(f"{host.name} has threads that wait")
        if any(self.storage.held.values()):
            raise Violation(f"the storage has leases: {dict(self.storage.held)}")
        if any(self.storage.wanted.values()):
            raise Violation(f"the storage has requests: {dict(self.storage.wanted)}")

    def check_exclusion(self, *, processes: bool = True) -> None:
        """No image has an OPEN gate at two hosts, or two processes of a host, or without a lease."""
        opened: dict[int, set[tuple[str, int]]] = defaultdict(set)
        for host in self.hosts:
            for record in host.keeper._ledger.all():
                for grant in record.grants:
                    if grant.gate.state is GateState.OPEN:
                        pid = grant.opener.process.pid if processes else 0
                        opened[record.image.inode].add((host.name, pid))
                        if grant.kind is not Kind.LEASED:
                            raise Violation(f"the gate of a {grant.kind.value} grant is open")
                        lease = self.storage.held[record.image.inode].get(host.name)
                        if lease is None or lease.mode is not Mode.EXCLUSIVE:
                            raise Violation(f"a gate is open on {host.name} without a lease")
        for inode, who in opened.items():
            if len(who) > 1:
                raise Violation(f"image {inode} is open to {sorted(who)} at once")


def opener(
    pid: int, role: Role = Role.ORDINARY, *, started: int | None = None, tid: int | None = None
) -> Opener:
    """A process with that pid; threads and start times follow from it unless told otherwise."""
    program = {Role.MANAGER: "libvirtd", Role.ORDINARY: "qemu-img"}.get(role, "qemu-system-x86_64")
    started = pid * 10 if started is None else started
    return Opener(Process(pid, started, program, ()), pid if tid is None else tid, role)


def nobody() -> Opener:
    """A process that cannot be seen from here."""
    return Opener(NOBODY, 0, Role.ORDINARY)
