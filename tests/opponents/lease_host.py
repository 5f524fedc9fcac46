"""One host of a lockspace as a process of its own, so that it can be killed, stopped, and run beside others.

    python -m tests.opponents.lease_host engine  FILE --host-id N --name NAME
    python -m tests.opponents.lease_host sanlock FILE --host-id N --socket SOCKET
    python -m tests.opponents.lease_host nothing FILE --host-id N

FILE is a tests.support.sanlock.LeaseFile. `engine` joins with lockfs's engine on an O_DIRECT disk, `sanlock`
takes its leases through a daemon that has joined, `nothing` takes none, to try the witness. Commands are JSON
objects, one a line, on standard input, each answered by one on standard output; see `Host`. At the end of the
input the host leaves.

While it holds a lease the host works on the witness, a sector beside the lease file that no lock protects.
Who holds the lease exclusive writes that it is at work, and that it is done; nobody may see another at work.
Each hold is appended to the log with its times, CLOCK_MONOTONIC, taken right after it was acquired and right
before it was let go.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any, Protocol

import trio

from lockfs.paxos.area import Area
from lockfs.paxos.errors import EngineError, IdInUse, LockspaceFailed
from lockfs.paxos.lockspace import Lockspace, Standing
from lockfs.paxos.resource import Resource
from lockfs.paxos.seams import DiskError
from lockfs.paxos.timing import Timing
from lockfs.records.geometry import FILE_GEOMETRY
from lockfs.records.results import RecordError, Result
from lockfs.storage.clock import BootClock
from lockfs.storage.disk import RENEWAL_PLACES, DirectDisk
from tests.support import sanlock_client
from tests.support.sanlock import AREA
from tests.support.sanlock_client import SanlockClient, SanlockError

HOLD_S = 0.001  # at most, at random
PATIENCE_S = 5.0  # of one attempt while contending
RENEWAL_RETRY_S = 0.5
RETRY_S = 0.05
EXIT_LOST = 3  # the lockspace was lost

_WITNESS = struct.Struct("<QQ")  # finished exclusive holds; the host at work, or 0

# The lease is somebody else's, now: sanlock's codes, which the engine uses as well.
_BUSY = {
    sanlock_client.OWNER_ALIVE, sanlock_client.OWNER_DYING, sanlock_client.AGAIN, sanlock_client.LOST_VERSION,
    sanlock_client.COMMITTED_OTHER, sanlock_client.SHARED_RETRIES, int(Result.DBLOCK_MBAL),
}  # fmt: skip


class Refusal(Exception):
    """The lease was not to be had; `code` is sanlock's."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class Side(Protocol):
    """How a host takes the lease with the given number."""

    async def acquire(self, number: int, *, shared: bool, patience: float) -> int:
        """Take it; returns its version, 0 where that is not known. Raises Refusal."""

    async def convert(self, number: int, *, shared: bool) -> None:
        """Change the mode of what is held. Raises Refusal."""

    async def release(self, number: int) -> None:
        """Give it back."""

    def may_write(self) -> str:
        """Why nothing may be written under a lease now, or empty."""


class EngineSide:
    """A host that is lockfs's engine."""

    def __init__(self, lockspace: Lockspace, leases: DirectDisk, num_hosts: int) -> None:
        self._lockspace = lockspace
        self._leases = leases
        self._num_hosts = num_hosts
        self._resources: dict[int, Resource] = {}

    def _resource(self, number: int) -> Resource:
        if number not in self._resources:
            area = Area(self._leases, AREA * (1 + number), FILE_GEOMETRY, self._lockspace.area.timeout)
            self._resources[number] = Resource(
                area, self._lockspace, b"res%d" % number, Random(), self._num_hosts
            )
        return self._resources[number]

    async def acquire(self, number: int, *, shared: bool, patience: float) -> int:
        resource = self._resource(number)
        try:
            await resource.acquire(shared=shared, give_up_at=self._lockspace.clock.now() + patience)
        except EngineError as error:
            await resource.settle()
            raise Refusal(int(error.result), str(error)) from error
        return resource.leader.lver if resource.leader is not None and not shared else 0

    async def convert(self, number: int, *, shared: bool) -> None:
        resource = self._resource(number)
        try:
            await resource.convert(shared=shared)
        except EngineError as error:
            await resource.settle()
            raise Refusal(int(error.result), str(error)) from error

    async def release(self, number: int) -> None:
        await self._resource(number).release()

    def may_write(self) -> str:
        standing = self._lockspace.standing()
        fine = standing in (Standing.GOOD, Standing.LATE)
        return "" if fine else f"{standing.value}: {self._lockspace.why_lost}"


@asynccontextmanager
async def engine_side(arguments: argparse.Namespace) -> AsyncIterator[Side]:
    """Join, and renew until the block is left; leaves the lockspace then.

    Raises:
        IdInUse: somebody else has the host id.
    """
    path, io_timeout = str(arguments.file), float(arguments.io_timeout)
    renewals = await DirectDisk.open(path, places=RENEWAL_PLACES)
    leases = await DirectDisk.open(path)
    try:
        lockspace = Lockspace(
            Area(renewals, 0, FILE_GEOMETRY, io_timeout), arguments.space.encode(), arguments.host_id,
            arguments.name.encode(), clock=BootClock(), timing=Timing(arguments.io_timeout),
        )  # fmt: skip
        await lockspace.join()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_renew, lockspace)
            yield EngineSide(lockspace, leases, arguments.num_hosts)
            nursery.cancel_scope.cancel()
        await lockspace.leave()
    finally:
        with trio.CancelScope(shield=True):
            await leases.close()
            await renewals.close()


async def _renew(lockspace: Lockspace) -> None:
    while True:
        await lockspace.clock.sleep(lockspace.renewal_due - lockspace.clock.now())
        try:
            await lockspace.renew()
        except DiskError as error:
            print(f"not renewed: {error}", file=sys.stderr, flush=True)
            await lockspace.clock.sleep(RENEWAL_RETRY_S)
        except (LockspaceFailed, RecordError) as error:
            print(f"lost: {error}", file=sys.stderr, flush=True)
            return


class SanlockSide:
    """A host that is a sanlock daemon; one registration holds everything."""

    def __init__(self, registration: sanlock_client.Registration, file: Path, space: bytes) -> None:
        self._registration = registration
        self._file = file
        self._space = space

    def _resource(self, number: int) -> sanlock_client.Resource:
        return sanlock_client.Resource(self._space, b"res%d" % number, self._file, AREA * (1 + number))

    async def acquire(self, number: int, *, shared: bool, patience: float) -> int:
        # The daemon has no patience to set: it does not wait, or as long as it takes an owner to be dead.
        nowait, timeout = patience <= PATIENCE_S, max(patience, sanlock_client.CALL_S)
        try:
            await self._registration.acquire(
                self._resource(number), shared=shared, nowait=nowait, timeout=timeout
            )
        except SanlockError as error:
            raise Refusal(error.code, str(error)) from error
        return 0 if shared else (await self._registration.inquire())[-1].lver or 0

    async def convert(self, number: int, *, shared: bool) -> None:
        try:
            await self._registration.convert(self._resource(number), shared=shared)
        except SanlockError as error:
            raise Refusal(error.code, str(error)) from error

    async def release(self, number: int) -> None:
        await self._registration.release(self._resource(number))

    def may_write(self) -> str:
        killed = self._registration.killed_by
        return "" if killed is None else f"killed by signal {killed}"


@asynccontextmanager
async def sanlock_side(arguments: argparse.Namespace) -> AsyncIterator[Side]:
    """A registration with the daemon."""
    async with SanlockClient(arguments.socket).register() as registration:
        yield SanlockSide(registration, arguments.file, arguments.space.encode())


class NoSide:
    """A host that believes to hold whatever it wants."""

    async def acquire(self, number: int, *, shared: bool, patience: float) -> int:
        return 0

    async def convert(self, number: int, *, shared: bool) -> None:
        pass

    async def release(self, number: int) -> None:
        pass

    def may_write(self) -> str:
        return ""


@asynccontextmanager
async def no_side(_: argparse.Namespace) -> AsyncIterator[Side]:
    """Nobody to ask."""
    yield NoSide()


_SIDES = {"engine": engine_side, "sanlock": sanlock_side, "nothing": no_side}


class Witness:
    """The sector that only the lease protects, and the log of holds."""

    def __init__(self, file: Path, host_id: int) -> None:
        self._host_id = host_id
        self._sector = os.open(file.with_suffix(".witness"), os.O_RDWR | os.O_CREAT, 0o600)
        self._log = os.open(file.with_suffix(".holds"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self.violations: list[str] = []

    def _read(self) -> tuple[int, int]:
        return _WITNESS.unpack(os.pread(self._sector, _WITNESS.size, 0).ljust(_WITNESS.size, b"\0"))

    def _write(self, count: int, at_work: int) -> None:
        os.pwrite(self._sector, _WITNESS.pack(count, at_work), 0)

    def _expect(self, expected: tuple[int, int], when: str) -> None:
        if (found := self._read()) != expected:
            self.violations.append(f"{when}: {found} rather than {expected} at {time.monotonic():.6f}")

    async def hold(self, number: int, seconds: float, *, shared: bool, lver: int) -> None:
        """Testify to a hold that has just begun and ends when this returns."""
        entered = time.monotonic()
        count, at_work = self._read()
        if at_work:
            self.violations.append(f"host {at_work} is at work at {entered:.6f}")
        if not shared:
            self._write(count, self._host_id)
        await trio.sleep(seconds)
        if shared:
            self._expect((count, 0), "shared")
        else:
            self._expect((count, self._host_id), "exclusive")
            self._write(count + 1, 0)
        left = time.monotonic()
        who = {"host": self._host_id, "lease": number, "shared": shared, "lver": lver}
        entry = {**who, "enter": entered, "leave": left}
        os.write(self._log, json.dumps(entry).encode() + b"\n")


class Host:
    """The commands: each method is one, called with the fields of the JSON object behind "do"."""

    def __init__(self, side: Side, witness: Witness) -> None:
        self._side = side
        self._witness = witness
        self._random = Random()

    async def acquire(
        self, lease: int = 0, shared: bool = False, patience: float = 0.0, retry: float = 0.0
    ) -> dict[str, Any]:
        """Take a lease: waiting `patience` s for a silent owner, and trying anew for `retry` s if refused."""
        began = time.monotonic()
        refusals: Counter[int] = Counter()
        while True:
            try:
                lver = await self._side.acquire(lease, shared=shared, patience=patience)
                return {"held": lver, "at": time.monotonic(), "refusals": refusals}
            except Refusal as refusal:
                refusals[refusal.code] += 1
                if refusal.code not in _BUSY or time.monotonic() > began + retry:
                    text = str(refusal)
                    return {
                        "refused": refusal.code,
                        "why": text,
                        "at": time.monotonic(),
                        "refusals": refusals,
                    }
            await trio.sleep(RETRY_S)

    async def convert(self, lease: int = 0, shared: bool = False) -> dict[str, Any]:
        """Change the mode of a lease."""
        try:
            await self._side.convert(lease, shared=shared)
        except Refusal as refusal:
            return {"refused": refusal.code, "why": str(refusal)}
        return {"converted": True}

    async def release(self, lease: int = 0) -> dict[str, Any]:
        """Give a lease back."""
        await self._side.release(lease)
        return {"released": True}

    async def write(self, lease: int = 0) -> dict[str, Any]:
        """Work on the witness, if that is allowed."""
        if reason := self._side.may_write():
            return {"fenced": reason}
        await self._witness.hold(lease, 0.0, shared=False, lver=0)
        return {"written": True, "violations": self._witness.violations}

    async def contend(
        self, seconds: float, rest: float, refused: float, lease: int = 0, shared: float = 0.0
    ) -> dict[str, Any]:
        """Take and give back the lease, over and over, a part of the times shared.

        `rest` and `refused` are how long to pause, at most, after a hold and after a refusal.
        """
        end = time.monotonic() + seconds
        holds, refusals, errors = Counter[str](), Counter[int](), Counter[str]()
        while time.monotonic() < end:
            mode = self._random.random() < shared
            try:
                lver = await self._side.acquire(lease, shared=mode, patience=PATIENCE_S)
            except Refusal as refusal:
                if refusal.code in _BUSY:
                    refusals[refusal.code] += 1
                else:
                    errors[str(refusal)] += 1
                await trio.sleep(self._random.random() * refused)
                continue
            if reason := self._side.may_write():
                return {"error": f"may not write: {reason}"}
            await self._witness.hold(lease, self._random.random() * HOLD_S, shared=mode, lver=lver)
            await self._side.release(lease)
            holds["shared" if mode else "exclusive"] += 1
            await trio.sleep(self._random.random() * rest)
        return {
            "holds": holds, "refusals": refusals, "errors": errors, "violations": self._witness.violations
        }  # fmt: skip


async def _commands() -> AsyncIterator[dict[str, Any]]:
    """The lines of standard input."""
    async with trio.lowlevel.FdStream(os.dup(0)) as stream:
        rest = b""
        async for part in stream:
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                yield json.loads(line)


def _answer(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


async def run(arguments: argparse.Namespace) -> int:
    """Be a host until the commands end."""
    began = time.monotonic()
    async with AsyncExitStack() as stack:
        try:
            side = await stack.enter_async_context(_SIDES[arguments.side](arguments))
        except IdInUse as error:
            _answer({"refused": int(error.result), "why": str(error), "seconds": time.monotonic() - began})
            return 0
        _answer({"joined": time.monotonic(), "seconds": time.monotonic() - began})
        host = Host(side, Witness(arguments.file, arguments.host_id))
        async for command in _commands():
            _answer(await getattr(host, command.pop("do"))(**command))
    return 0


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("side", choices=[*_SIDES])
    parser.add_argument("file", type=Path)
    parser.add_argument("--host-id", type=int, required=True)
    parser.add_argument("--space", default="LS", help="the lockspace's name")
    parser.add_argument("--name", default="", help="of the host, for the engine")
    parser.add_argument("--socket", type=Path, help="of the daemon, for sanlock")
    parser.add_argument("--io-timeout", type=int, default=1)
    parser.add_argument("--num-hosts", type=int, default=0, help="of the resources, for the engine; 0: all")
    return trio.run(run, parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
