"""The hosts of lease_host.py from the side of a test: start, ask, stop, kill; and what their log says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from tests.support.sanlock import LeaseFile, SanlockDaemon

REPOSITORY = Path(__file__).resolve().parents[2]
ANSWER_S = 30.0
END_S = 15.0
LINE_MAX = 1 << 20

Answer = dict[str, Any]


class HostEnded(Exception):
    """The process ended instead of answering; the text is what it wrote to standard error."""


class LeaseHost:
    """A running host. One question at a time."""

    def __init__(self, process: trio.Process, log_file: Path) -> None:
        self._process = process
        self._log_file = log_file
        self._rest = b""

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def log(self) -> str:
        """What it wrote to standard error."""
        return self._log_file.read_text(errors="replace")

    async def ask(self, do: str, *, timeout: float = ANSWER_S, **fields: Any) -> Answer:
        """Have it do one of lease_host.Host's commands, and return its answer.

        Raises:
            HostEnded, trio.TooSlowError.
        """
        assert self._process.stdin is not None
        with trio.fail_after(timeout):
            try:
                await self._process.stdin.send_all(json.dumps({"do": do, **fields}).encode() + b"\n")
            except trio.BrokenResourceError as error:
                raise HostEnded(self.log()) from error
            return await self.answer()

    async def answer(self) -> Answer:
        """Its next answer; the first one tells how joining went."""
        assert self._process.stdout is not None
        while b"\n" not in self._rest:
            part = await self._process.stdout.receive_some(LINE_MAX)
            if not part:
                raise HostEnded(self.log())
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\n")
        found: Answer = json.loads(line)
        return found

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal: SIGKILL is a crash, SIGSTOP a host that hangs."""
        os.kill(self.pid, number)

    async def close(self) -> None:
        """Let it leave the lockspace and end.

        Raises:
            AssertionError: it ended badly, or not in time; it is gone in any case.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        await self._process.stdin.aclose()
        with trio.move_on_after(END_S):
            await self._process.wait()
        code = self._process.poll()
        await self._gone()
        if code not in (0, -signal.SIGKILL):
            raise AssertionError(f"host ended with {code}:\n{self.log()}")

    async def _gone(self) -> None:
        with trio.CancelScope(shield=True):
            if self._process.poll() is None:
                self._process.kill()
            await self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    await stream.aclose()

    async def __aenter__(self) -> LeaseHost:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                await self.close()
        finally:
            await self._gone()
        if kind is not None:
            print(f"--- {self._log_file.name}:\n{self.log()}")


async def _start(arguments: Sequence[str | Path], log_file: Path) -> LeaseHost:
    command = [sys.executable, "-m", "tests.opponents.lease_host", *map(str, arguments)]
    with open(log_file, "wb") as log:
        process = await trio.lowlevel.open_process(
            command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
        )
    return LeaseHost(process, log_file)


@asynccontextmanager
async def engine_host(
    file: LeaseFile,
    host_id: int,
    *,
    name: str = "",
    io_timeout: int = 1,
    num_hosts: int = 0,
    join_s: float = ANSWER_S,
) -> AsyncIterator[LeaseHost]:
    """A host that is lockfs's engine, joined as `host_id` within `join_s`; it leaves with the block.

    Raises:
        AssertionError: it could not join.
    """
    async with starting_engine(file, host_id, name=name, io_timeout=io_timeout, num_hosts=num_hosts) as host:
        with trio.fail_after(join_s):
            answer = await host.answer()
        assert "joined" in answer, answer
        yield host


@asynccontextmanager
async def starting_engine(
    file: LeaseFile, host_id: int, *, name: str = "", io_timeout: int = 1, num_hosts: int = 0
) -> AsyncIterator[LeaseHost]:
    """The same while it still joins: its first answer tells how that went."""
    name = name or f"lockfs{host_id}"
    log_file = file.path.with_suffix(f".{name}.log")
    host = await _start(
        ["engine", file.path, "--space", file.lockspace.name.decode(), "--host-id", str(host_id),
         "--name", name, "--io-timeout", str(io_timeout), "--num-hosts", str(num_hosts)], log_file,
    )  # fmt: skip
    async with host:
        yield host


@asynccontextmanager
async def sanlock_host(file: LeaseFile, host_id: int, daemon: SanlockDaemon) -> AsyncIterator[LeaseHost]:
    """A process that takes leases through a daemon which has joined as `host_id`."""
    log_file = file.path.with_suffix(f".{daemon.name}.client.log")
    host = await _start(
        ["sanlock", file.path, "--space", file.lockspace.name.decode(), "--host-id", str(host_id),
         "--socket", daemon.socket], log_file,
    )  # fmt: skip
    async with host:
        with trio.fail_after(ANSWER_S):
            await host.answer()
        yield host


@asynccontextmanager
async def lawless_host(file: LeaseFile, host_id: int) -> AsyncIterator[LeaseHost]:
    """A host that takes no leases, to see that it is caught."""
    log_file = file.path.with_suffix(f".lawless{host_id}.log")
    async with await _start(["nothing", file.path, "--host-id", str(host_id)], log_file) as host:
        with trio.fail_after(ANSWER_S):
            await host.answer()
        yield host


@dataclass(frozen=True)
class Hold:
    """One hold of a lease, times in seconds of CLOCK_MONOTONIC; `lver` is 0 where not known."""

    host: int
    lease: int
    shared: bool
    lver: int
    enter: float
    leave: float


def holds(file: LeaseFile) -> list[Hold]:
    """Every finished hold of every host, in order of their beginnings."""
    lines = file.path.with_suffix(".holds").read_text().splitlines()
    return sorted((Hold(**json.loads(line)) for line in lines), key=lambda hold: hold.enter)


def conflicts(of: Sequence[Hold]) -> list[tuple[Hold, Hold]]:
    """Pairs of holds by different hosts that overlap, at least one of them exclusive. Sorted by beginning."""
    found = []
    open_holds: list[Hold] = []
    for hold in of:
        open_holds = [other for other in open_holds if other.leave > hold.enter]
        found += [
            (other, hold)
            for other in open_holds
            if other.host != hold.host and other.lease == hold.lease and not (other.shared and hold.shared)
        ]
        open_holds.append(hold)
    return found


def disorder(of: Sequence[Hold]) -> list[tuple[Hold, Hold]]:
    """Exclusive holds whose version is not larger than that of the one before, of the same lease."""
    found = []
    before: dict[int, Hold] = {}
    for hold in of:
        if hold.lver:
            former = before.get(hold.lease)
            if former is not None and former.lver >= hold.lver:
                found.append((former, hold))
            before[hold.lease] = hold
    return found
