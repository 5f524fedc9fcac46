"""Two sanlock daemons and two lockfs hosts want one lease, all the time: never two holds that conflict.

LOCKFS_CONTENTION_S is how long each run takes, in seconds (default 10; 60 is the full run). What comes of it
goes to the output, to be read with -s.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio

from tests.opponents.hosts import (
    Answer,
    Hold,
    LeaseHost,
    conflicts,
    disorder,
    engine_host,
    holds,
    lawless_host,
    sanlock_host,
)
from tests.support import sanlock
from tests.support.sanlock import LeaseFile, SanlockDaemon
from tests.support.sanlock_client import LIVE, SanlockError

SECONDS = float(os.environ.get("LOCKFS_CONTENTION_S", "10"))
FULL_S = 60.0
REST_S = 0.02  # how long a host pauses at most after a hold, and after a refusal
REFUSED_S = 0.02
SETTLE_S = 30.0
LAWLESS_S = 2.0
SHARE_MIN = 0.10  # of all holds, for each side, in a full run: in a short one luck has too large a part
HOLDS_PER_S_MIN = 3  # far below what is usual: the machine may be busy, and a daemon backs off for a second
# Of two hosts that begin at once, the one with the higher id wins the ballot: so each side has one such pair.
SANLOCK_IDS, ENGINE_IDS = (1, 4), (2, 3)

pytestmark = pytest.mark.slow


@asynccontextmanager
async def _four_hosts(
    directory: Path, num_hosts: int
) -> AsyncIterator[tuple[LeaseFile, dict[int, LeaseHost]]]:
    """Four hosts by id, all joined: daemons and engines."""
    file = LeaseFile(directory / "leases", 1)
    async with AsyncExitStack() as stack:
        daemons = {
            host_id: await stack.enter_async_context(SanlockDaemon(directory, f"sanlock{host_id}"))
            for host_id in SANLOCK_IDS
        }
        await file.init(daemons[SANLOCK_IDS[0]].client, num_hosts=num_hosts)
        found = {}
        async with trio.open_nursery() as nursery:
            for host_id, daemon in daemons.items():
                nursery.start_soon(_join, daemon, file, host_id)
        for host_id in ENGINE_IDS:
            host = engine_host(file, host_id, num_hosts=num_hosts)
            found[host_id] = await stack.enter_async_context(host)
        for host_id, daemon in daemons.items():
            found[host_id] = await stack.enter_async_context(sanlock_host(file, host_id, daemon))
        for daemon in daemons.values():
            await _knows(daemon, file, set(found))
        yield file, found


async def _knows(daemon: SanlockDaemon, file: LeaseFile, host_ids: set[int]) -> None:
    """Wait until a daemon has seen all of them renew: before, it takes those that share a lease for dead."""
    with trio.fail_after(SETTLE_S):
        while True:
            with contextlib.suppress(SanlockError):
                hosts = await daemon.client.hosts(file.lockspace)
                if {host_id for host_id, host in hosts.items() if host.state == LIVE} >= host_ids:
                    return
            await trio.sleep(sanlock.POLL_S)


async def _join(daemon: SanlockDaemon, file: LeaseFile, host_id: int) -> None:
    await daemon.client.add_lockspace(file.lockspace, host_id, io_timeout=1)


async def _contend(hosts: dict[int, LeaseHost], shared: float, seconds: float = SECONDS) -> dict[int, Answer]:
    answers = {}

    async def one(host_id: int, host: LeaseHost) -> None:
        answers[host_id] = await host.ask(
            "contend", seconds=seconds, rest=REST_S, refused=REFUSED_S, shared=shared, timeout=seconds + 60
        )

    async with trio.open_nursery() as nursery:
        for host_id, host in hosts.items():
            nursery.start_soon(one, host_id, host)
    return answers


def _report(found: list[Hold], answers: dict[int, Answer]) -> str:
    count = Counter(hold.host for hold in found)
    waits: dict[int, list[float]] = {}
    last: dict[int, float] = {}
    for hold in found:
        if hold.host in last:
            waits.setdefault(hold.host, []).append(hold.enter - last[hold.host])
        last[hold.host] = hold.leave
    lines = [f"{len(found)} holds in {SECONDS:g} s, {sum(hold.shared for hold in found)} of them shared"]
    for host_id in sorted(answers):
        share = count[host_id] / max(1, len(found))
        side = "sanlock" if host_id in SANLOCK_IDS else "lockfs"
        longest = max(waits.get(host_id, [0.0]))
        lines.append(
            f"host {host_id} ({side}): {share:.0%}, longest pause {longest:.2f} s; {answers[host_id]}"
        )
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("shared", "num_hosts"), [(0.0, 0), (0.5, 64)], ids=["exclusive, 2000 hosts", "mixed, 64 hosts"]
)
async def test_never_two_holds_that_conflict(tmp_path: Path, shared: float, num_hosts: int) -> None:
    """Daemons and engines have the lease by turns, and none sees another at work under it."""
    if reason := sanlock.why_not_sanlock(tmp_path):
        pytest.skip(reason)
    async with _four_hosts(tmp_path, num_hosts) as (file, hosts):
        answers = await _contend(hosts, shared)
        found = holds(file)
        report = _report(found, answers)
        print(report)
        assert not any(answer.get("error") or answer["errors"] for answer in answers.values()), report
    assert not conflicts(found), report
    assert not disorder(found), report
    assert not any(answer["violations"] for answer in answers.values()), report
    assert len(found) >= HOLDS_PER_S_MIN * SECONDS, report
    _check_shares(found, report)
    if shared:
        modes = {(hold.host in SANLOCK_IDS, hold.shared) for hold in found}
        assert len(modes) == 4, report


def _check_shares(found: list[Hold], report: str) -> None:
    """Both sides had the lease; in a full run each often enough, and every host."""
    count = Counter(hold.host for hold in found)
    least = SHARE_MIN * len(found) if SECONDS >= FULL_S else 1
    for side in (SANLOCK_IDS, ENGINE_IDS):
        assert sum(count[host_id] for host_id in side) >= least, report
        assert SECONDS < FULL_S or all(count[host_id] for host_id in side), report


async def test_hosts_without_leases_are_caught(tmp_path: Path) -> None:
    """The log and the witness both tell of hosts that do as they please, as they would have done above."""
    file = LeaseFile(tmp_path / "leases", 1)
    async with lawless_host(file, 1) as one, lawless_host(file, 2) as other:
        answers = await _contend({1: one, 2: other}, 0.5, LAWLESS_S)
    assert conflicts(holds(file))
    assert any(answer["violations"] for answer in answers.values())


def test_conflicts_are_seen() -> None:
    """The check of the log finds an overlap and a version out of order, and accepts shared holds together."""

    def hold(host: int, enter: float, leave: float, lver: int = 0) -> Hold:
        return Hold(host, 0, not lver, lver, enter, leave)

    fine = [hold(1, 0, 2, 1), hold(2, 3, 9), hold(3, 4, 5), hold(1, 9, 10, 2), hold(1, 10.5, 11, 3)]
    assert not conflicts(fine)
    assert not disorder(fine)
    within = [hold(1, 0, 9, 1), hold(2, 1, 2), hold(3, 8, 10, 2)]
    assert [(a.host, b.host) for a, b in conflicts(within)] == [(1, 2), (1, 3)]
    assert [(a.host, b.host) for a, b in disorder([hold(1, 0, 1, 2), hold(2, 2, 3, 2)])] == [(1, 2)]
