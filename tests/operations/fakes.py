"""Stand-ins for what the mirror works with: the keeper, the kernel, and those who call."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from lockfs.backends.base import Holder, Image, Mode, Owner
from lockfs.channel import requests
from lockfs.errors import ImageBusy, LeaseUnavailable, LockfsError
from lockfs.keeper.gate import Gate, GateState
from lockfs.keeper.grants import Access, Grant, HeldImage, Kind, managed, reader
from lockfs.keeper.openers import Opener

ELSEWHERE = Owner("otherhost", 4711, "qemu-system-x86_64", 1_700_000_000.0)


@dataclass(frozen=True)
class Caller(requests.Caller):
    """A request's caller: this process, unless it is said otherwise."""

    uid: int = field(default_factory=os.geteuid)
    gid: int = field(default_factory=os.getegid)
    pid: int = field(default_factory=os.getpid)
    umask: int = 0o022


class FakeKernel:
    """Knows backing ids; `refusal` is what registering fails with."""

    def __init__(self, passthrough: bool = True) -> None:
        self.passthrough = passthrough
        self.refusal: OSError | None = None
        self.registered: dict[int, os.stat_result] = {}
        self.invalidated: list[int] = []
        self._ids = itertools.count(1)

    def knows(self, nodeid: int) -> bool:
        return True

    def register_backing(self, descriptor: int) -> int:
        if self.refusal is not None:
            raise self.refusal
        number = next(self._ids)
        self.registered[number] = os.fstat(descriptor)
        return number

    def unregister_backing(self, backing_id: int) -> None:
        del self.registered[backing_id]

    def invalidate(self, nodeid: int) -> None:
        self.invalidated.append(nodeid)


class FakeKeeper:
    """Grants every open unless told otherwise, and remembers what it was asked.

    Fault model: `elsewhere` are inodes that another host holds; `failure` ends every request with that
    error; `kind` and `may_yield` are what writers get; `late` are inodes whose lease is never given back.
    `binds`: the storage can refuse descriptors, and `bound` are those it was told of,
    each with its status then.
    """

    def __init__(self) -> None:
        self.elsewhere: set[int] = set()
        self.failure: LockfsError | None = None
        self.kind = Kind.LEASED
        self.may_yield = False
        self.late: set[int] = set()
        self.grants: list[Grant] = []
        self.asked: list[tuple[str, Image]] = []
        self.sizes: list[int] = []
        self.claimed = 0
        self.refuses_claims = False
        self.during = lambda image: None
        self.binds = False
        self.bound: list[tuple[int, os.stat_result]] = []

    def _check(self, purpose: str, image: Image) -> None:
        self.asked.append((purpose, image))
        self.sizes.append(os.fstat(image.descriptor).st_size)
        self.during(image)
        if self.failure is not None:
            raise self.failure
        if purpose != "read" and image.inode in self.elsewhere:
            raise ImageBusy(f"image '{image.name}' is held by {ELSEWHERE}")

    async def open(self, image: Image, opener: Opener, access: Access) -> Grant:
        self._check(access.value, image)
        grant = self._grant(image, opener, access)
        self.grants.append(grant)
        return grant

    def _grant(self, image: Image, opener: Opener, access: Access) -> Grant:
        now = time.time()
        if access is Access.READ:
            return reader(image, opener, now, covered=False)
        if self.kind is Kind.MANAGED:
            return managed(image, opener, now)
        gate = Gate(GateState.ASK if self.kind is Kind.PROVISIONAL else GateState.OPEN)
        return Grant(image, opener, access, self.kind, gate, may_yield=self.may_yield, since=now)

    def bind(self, descriptor: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "the description cannot carry a write lock")
        self.bound.append((descriptor, os.fstat(descriptor)))

    async def close(self, grant: Grant) -> None:
        os.fstat(grant.image.descriptor)
        self.grants.remove(grant)

    async def claim(self, grant: Grant) -> None:
        self.claimed += 1
        if self.refuses_claims:
            raise LeaseUnavailable("the holder does not let go")
        grant.kind = Kind.LEASED
        grant.gate.set(GateState.OPEN)

    @asynccontextmanager
    async def changing(self, image: Image, opener: Opener) -> AsyncIterator[Grant]:
        self._check("change", image)
        yield self._grant(image, opener, Access.WRITE)
        os.fstat(image.descriptor)

    @asynccontextmanager
    async def removing(self, image: Image, opener: Opener) -> AsyncIterator[None]:
        self._check("remove", image)
        yield
        os.fstat(image.descriptor)

    async def others(self, image: Image) -> list[Holder]:
        os.fstat(image.descriptor)
        return [Holder(Mode.EXCLUSIVE, "lockfs", ELSEWHERE)] if image.inode in self.elsewhere else []

    def holds(self, inode: int) -> bool:
        return inode in self.late

    def images(self) -> list[HeldImage]:
        return [
            HeldImage(
                inode=grant.image.inode,
                name=grant.image.name,
                state="held",
                mode=Mode.EXCLUSIVE,
                since=grant.since,
                openers=((grant.opener.process.pid, grant.opener.process.program, grant.kind.value),),
                waiting=(),
            )
            for grant in self.grants
            if grant.kind is Kind.LEASED
        ]

    def interrupt(self, tid: int) -> None:
        self.asked_to_interrupt = tid
