"""What every lease backend must do, as functions that are given a maker of linked hosts.

A `Maker` makes N hosts that share a store; each has a backend of its own and opens images itself, as on N
machines. BASIC, EXCLUSION, REQUESTS and FAILOVER list the functions; `offered` tells which make sense for a
maker.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest
import trio

from lockfs.backends.base import Backend, Image, Lease, LeaseState, Mode, Owner
from lockfs.errors import ImageBusy

EXCLUSIVE, SHARED = Mode.EXCLUSIVE, Mode.SHARED
IMAGE = "a.img"


@dataclass(frozen=True)
class Offers:
    """What a backend can do at all."""

    exclusion: bool = True
    requests: bool = True


class Host(Protocol):
    """One host: its backend, and itself as an owner."""

    backend: Backend
    owner: Owner

    def image(self, name: str) -> Image:
        """The image, opened by this host through a description of its own, once."""


class Maker(Protocol):
    """Makes linked hosts; `attempt_s` is how long one acquire may take, `races` how often hosts race."""

    offers: Offers
    attempt_s: float
    races: int

    def hosts(self, count: int) -> AbstractAsyncContextManager[list[Any]]:
        """`count` started hosts; on exit they are stopped and their descriptors closed."""

    def link(self, old: str, new: str) -> None:
        """Give the image `old` a second name, behind the hosts' backs."""

    async def succeed(self, host: Any) -> None:
        """Kill the host's worker, with nothing given back, and start another with the same memory and images.

        It has a new backend then, which has started and does not run yet.
        """

    async def go_on(self, host: Any) -> None:
        """Let the new worker run, after its recalls, and settle."""

    def contender(self, number: int) -> dict[str, object]:
        """What contender.py must know to be host `number` of this store."""


async def acquire(maker: Maker, host: Host, mode: Mode = EXCLUSIVE, name: str = IMAGE) -> Lease:
    """Acquire, or raise ImageBusy."""
    deadline = trio.current_time() + maker.attempt_s
    return await host.backend.acquire(host.image(name), mode, host.owner, deadline)


async def refused(maker: Maker, host: Host, mode: Mode = EXCLUSIVE, name: str = IMAGE) -> str:
    """The sentence of the refusal that must come."""
    with pytest.raises(ImageBusy) as caught:
        await acquire(maker, host, mode, name)
    return str(caught.value)


async def convert(maker: Maker, host: Host, lease: Lease, mode: Mode) -> None:
    """Convert, or raise ImageBusy."""
    await host.backend.convert(lease, mode, trio.current_time() + maker.attempt_s)


async def grants_and_releases(maker: Maker) -> None:
    """A free image is granted as asked, in either mode, and the lease tells its state."""
    async with maker.hosts(1) as (host,):
        for mode in Mode:
            lease = await acquire(maker, host, mode)
            assert (lease.image, lease.mode, lease.owner) == (host.image(IMAGE), mode, host.owner)
            assert lease.state is LeaseState.HELD
            assert await host.backend.holders(host.image(IMAGE)) == []
            await host.backend.release(lease)
            assert lease.state is LeaseState.RELEASED


async def converts_alone(maker: Maker) -> None:
    """A host alone with an image changes its lease's mode forth and back."""
    async with maker.hosts(1) as (host,):
        lease = await acquire(maker, host)
        for mode in (SHARED, SHARED, EXCLUSIVE, EXCLUSIVE, SHARED):
            await convert(maker, host, lease, mode)
            assert lease.mode is mode
        await host.backend.release(lease)


async def shares_only_shared(maker: Maker) -> None:
    """SHARED goes with SHARED, and nothing else with anything, in whichever order."""
    async with maker.hosts(2) as (one, two):
        for first in Mode:
            for second in Mode:
                lease = await acquire(maker, one, first)
                if (first, second) == (SHARED, SHARED):
                    await two.backend.release(await acquire(maker, two, second))
                else:
                    await refused(maker, two, second)
                await one.backend.release(lease)


async def frees_at_once(maker: Maker) -> None:
    """When release returned, the other host gets the image at its first attempt, many times over."""
    async with maker.hosts(2) as hosts:
        for turn in range(20):
            lease = await acquire(maker, hosts[turn % 2])
            await refused(maker, hosts[(turn + 1) % 2])
            await hosts[turn % 2].backend.release(lease)


async def refusal_leaves_nothing(maker: Maker) -> None:
    """A refused attempt takes nothing: the holder's lease stays whole, and free images stay free."""
    async with maker.hosts(3) as (one, two, three):
        lease = await acquire(maker, one)
        for _ in range(3):
            await refused(maker, two)
            await refused(maker, two, SHARED)
        await convert(maker, one, lease, SHARED)
        await convert(maker, one, lease, EXCLUSIVE)
        await one.backend.release(lease)
        await three.backend.release(await acquire(maker, three))


async def images_are_independent(maker: Maker) -> None:
    """Two hosts hold two images at once; each is refused the other's."""
    async with maker.hosts(2) as (one, two):
        first = await acquire(maker, one, name="a.img")
        second = await acquire(maker, two, name="b.img")
        await refused(maker, one, name="b.img")
        await refused(maker, two, name="a.img")
        await one.backend.release(first)
        await refused(maker, one, name="b.img")
        await two.backend.release(second)


async def names_of_one_file_are_one_image(maker: Maker) -> None:
    """A lease by one hard link excludes a host that comes by the other."""
    async with maker.hosts(2) as (one, two):
        one.image(IMAGE)
        maker.link(IMAGE, "hard.img")
        lease = await acquire(maker, one)
        await refused(maker, two, name="hard.img")
        await one.backend.release(lease)
        await two.backend.release(await acquire(maker, two, name="hard.img"))


async def conversion_is_seen(maker: Maker) -> None:
    """Weakened, others may share; strengthened, they may not."""
    async with maker.hosts(2) as (one, two):
        lease = await acquire(maker, one)
        await convert(maker, one, lease, SHARED)
        await refused(maker, two)
        await two.backend.release(await acquire(maker, two, SHARED))
        await convert(maker, one, lease, EXCLUSIVE)
        await refused(maker, two, SHARED)
        await one.backend.release(lease)


async def refused_conversion_keeps_the_mode(maker: Maker) -> None:
    """Two sharers both refused EXCLUSIVE stay sharers, until one leaves."""
    async with maker.hosts(3) as (one, two, three):
        first, second = await acquire(maker, one, SHARED), await acquire(maker, two, SHARED)
        for host, lease in ((one, first), (two, second), (one, first)):
            with pytest.raises(ImageBusy):
                await convert(maker, host, lease, EXCLUSIVE)
            assert lease.mode is SHARED
            assert lease.state is LeaseState.HELD
        await refused(maker, three)
        await three.backend.release(await acquire(maker, three, SHARED))
        await two.backend.release(second)
        await convert(maker, one, first, EXCLUSIVE)
        await refused(maker, three, SHARED)
        await one.backend.release(first)


async def holder_is_named(maker: Maker) -> None:
    """Refusals and holders() name program, process and host of the holder; nobody is named to itself."""
    async with maker.hosts(3) as (one, two, three):
        assert await two.backend.holders(two.image(IMAGE)) == []
        lease = await acquire(maker, one)
        sentence = await refused(maker, two)
        for part in (IMAGE, one.owner.host, str(one.owner.pid), one.owner.program):
            assert part in sentence
        (holder,) = await two.backend.holders(two.image(IMAGE))
        assert (holder.owner, holder.mode) == (one.owner, EXCLUSIVE)
        assert await one.backend.holders(one.image(IMAGE)) == []
        await convert(maker, one, lease, SHARED)
        other = await acquire(maker, two, SHARED)
        assert [h.owner for h in await one.backend.holders(one.image(IMAGE))] == [two.owner]
        found = await three.backend.holders(three.image(IMAGE))
        assert {h.owner for h in found} == {one.owner, two.owner}
        assert {h.mode for h in found} == {SHARED}
        await one.backend.release(lease)
        await two.backend.release(other)
        assert await three.backend.holders(three.image(IMAGE)) == []


async def cancelled_takes_nothing(maker: Maker) -> None:
    """An acquire that is cancelled, before or while it runs, returns a lease or leaves the image free."""
    async with maker.hosts(2) as (one, two):
        for delay in (0, 0, 1, 2, 3):
            leases: list[Lease] = []
            async with trio.open_nursery() as nursery:

                async def attempt(kept: list[Lease] = leases) -> None:
                    kept.append(await acquire(maker, one))

                nursery.start_soon(attempt)
                for _ in range(delay):
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
            for lease in leases:
                await refused(maker, two)
                await one.backend.release(lease)
            await two.backend.release(await acquire(maker, two))


async def racers_never_both_win(maker: Maker) -> None:
    """Of hosts that try at the same moment at most one gets the image, and it is not always none."""
    wins = 0
    async with maker.hosts(4) as hosts:
        for _ in range(maker.races):
            leases: list[tuple[Host, Lease]] = []

            async def race(host: Host, won: list[tuple[Host, Lease]] = leases) -> None:
                try:
                    won.append((host, await acquire(maker, host)))
                except ImageBusy:
                    return

            async with trio.open_nursery() as nursery:
                for host in hosts:
                    nursery.start_soon(race, host)
            assert len(leases) <= 1
            wins += len(leases)
            for host, lease in leases:
                await host.backend.release(lease)
    assert wins > 0


@asynccontextmanager
async def contending(maker: Maker, host: Host, mode: Mode = EXCLUSIVE) -> AsyncIterator[None]:
    """Let the host try for the image all the time; it must never get it."""

    async def contend() -> None:
        while True:
            await refused(maker, host, mode)
            await trio.sleep(0.01)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(contend)
        yield
        nursery.cancel_scope.cancel()


async def recall(host: Host, mode: Mode = EXCLUSIVE, name: str = IMAGE) -> Lease | None:
    """Ask the host's new worker for the lease that the former one had."""
    return await host.backend.recall(host.image(name), mode, host.owner)


async def _had(host: Host, mode: Mode) -> Lease:
    lease = await recall(host, mode)
    assert lease is not None
    assert (lease.image, lease.mode, lease.owner) == (host.image(IMAGE), mode, host.owner)
    assert lease.state is LeaseState.HELD
    return lease


async def leases_are_recalled(maker: Maker) -> None:
    """A lease of a worker that was killed is the next one's, as it was; what it does with it counts."""
    async with maker.hosts(1) as (host,):
        for mode in Mode:
            await acquire(maker, host, mode)
            await maker.succeed(host)
            lease = await _had(host, mode)
            await maker.go_on(host)
            await convert(maker, host, lease, SHARED)
            await convert(maker, host, lease, EXCLUSIVE)
            await host.backend.release(lease)
            await host.backend.release(await acquire(maker, host, mode))


async def recalled_leases_exclude(maker: Maker) -> None:
    """From the kill of one worker to the release by a later one no other host gets the image."""
    async with maker.hosts(2) as (one, two):
        for mode in Mode:
            lease = await acquire(maker, one, mode)
            async with contending(maker, two):
                for _ in range(3):
                    await maker.succeed(one)
                    lease = await _had(one, mode)
                    await maker.go_on(one)
                    await refused(maker, two)
            assert await one.backend.holders(one.image(IMAGE)) == []
            assert [holder.owner for holder in await two.backend.holders(two.image(IMAGE))] == [one.owner]
            await one.backend.release(lease)
            await two.backend.release(await acquire(maker, two))


async def converted_leases_are_recalled(maker: Maker) -> None:
    """A recalled lease has the mode that it was converted to."""
    async with maker.hosts(2) as (one, two):
        lease = await acquire(maker, one)
        for mode in (SHARED, EXCLUSIVE, SHARED):
            await convert(maker, one, lease, mode)
            await maker.succeed(one)
            lease = await _had(one, mode)
            await maker.go_on(one)
            if mode is SHARED:
                await two.backend.release(await acquire(maker, two, SHARED))
            await refused(maker, two)
        await one.backend.release(lease)
        await two.backend.release(await acquire(maker, two))


async def what_nobody_recalls_is_given_back(maker: Maker) -> None:
    """Once settled, what a killed worker held is free for all; the mount itself needs not wait for that."""
    async with maker.hosts(2) as (one, two):
        for mode in Mode:
            for name in ("a.img", "b.img"):
                await acquire(maker, one, mode, name)
            await maker.succeed(one)
            async with contending(maker, two):
                lease = await _had(one, mode)
                await maker.go_on(one)
            await two.backend.release(await acquire(maker, two, name="b.img"))
            await one.backend.release(lease)
            await maker.succeed(one)
            assert await recall(one, mode) is None
            await maker.go_on(one)
            await two.backend.release(await acquire(maker, two))
            await acquire(maker, one, mode)
            await maker.succeed(one)
            await maker.go_on(one)
            await one.backend.release(await acquire(maker, one))


async def nothing_is_recalled_that_was_not_held(maker: Maker) -> None:
    """Neither a lease that was never had, nor one that was refused, released, or settled before."""
    async with maker.hosts(2) as (one, two):
        lease = await acquire(maker, two)
        await refused(maker, one)
        await maker.succeed(one)
        assert await recall(one) is None
        await maker.go_on(one)
        await refused(maker, one)
        await two.backend.release(lease)
        await acquire(maker, one)
        await maker.succeed(one)
        await maker.go_on(one)
        await maker.succeed(one)
        assert await recall(one) is None
        await maker.go_on(one)
        await two.backend.release(await acquire(maker, two))


async def _asked(maker: Maker, holder: Host, asker: Host, inode: int) -> bool:
    """Whether the holder sees the request while the asker repeats it."""
    for _ in range(20):
        await asker.backend.request(asker.image(IMAGE), asker.owner)
        if inode in await holder.backend.requested({inode}):
            return True
        await trio.sleep(0.1)
    return False


async def requests_reach_the_holder(maker: Maker) -> None:
    """A request is seen by another host until it is withdrawn, and only for images it holds."""
    async with maker.hosts(2) as (one, two):
        inode = one.image(IMAGE).inode
        lease = await acquire(maker, one)
        assert await one.backend.requested({inode}) == set()
        assert await _asked(maker, one, two, inode)
        assert await one.backend.requested([inode + 1]) == set()
        assert await two.backend.requested([inode]) == set()
        await two.backend.withdraw(two.image(IMAGE), two.owner)
        assert await one.backend.requested([inode]) == set()
        await two.backend.withdraw(two.image(IMAGE), two.owner)
        assert await _asked(maker, one, two, inode)
        await one.backend.release(lease)
        other = await acquire(maker, two)
        await two.backend.withdraw(two.image(IMAGE), two.owner)
        await two.backend.release(other)


async def dead_requests_are_ignored(maker: Maker) -> None:
    """A request that its host stopped repeating is forgotten, and repeating revives it."""
    async with maker.hosts(2) as (one, two):
        inode = one.image(IMAGE).inode
        lease = await acquire(maker, one)
        assert await _asked(maker, one, two, inode)
        for _ in range(100):
            await trio.sleep(0.5)
            asked = await one.backend.requested([inode])
        assert asked == set()
        assert await _asked(maker, one, two, inode)
        await two.backend.withdraw(two.image(IMAGE), two.owner)
        await one.backend.release(lease)


CONTENDERS = 8
STRESS_SECONDS_MAX = 60


def processes_never_share(maker: Maker, directory: Path, rounds: int) -> None:
    """Processes that fight for one image are never inside together, and none of their work is lost.

    Each, while it holds the image, makes a marker file that must not exist and adds one to a counter by
    reading and writing it. One in four asks for SHARED and only looks that no marker is there. Each tries
    `rounds` times, and for some seconds, at least.
    """
    directory.mkdir(exist_ok=True)
    script = str(Path(__file__).with_name("contender.py"))
    crowd = []
    try:
        for number in range(CONTENDERS):
            mode = SHARED if number % 4 == 3 else EXCLUSIVE
            task = {"maker": maker.contender(number), "witness": str(directory), "rounds": rounds}
            argument = json.dumps({**task, "mode": mode.value, "image": IMAGE, "attempt_s": maker.attempt_s})
            command, pipe = [sys.executable, script, argument], subprocess.PIPE
            crowd.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True))
        for process in crowd:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        reports = []
        for process in crowd:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in crowd:
            output, _ = process.communicate(timeout=STRESS_SECONDS_MAX)
            assert process.returncode == 0
            reports.append(json.loads(output))
    finally:
        for process in crowd:
            process.kill()
            process.communicate()
    assert [report["trouble"] for report in reports] == [[]] * CONTENDERS
    writers = sum(report["wins"] for report in reports if report["mode"] == "exclusive")
    readers = sum(report["wins"] for report in reports if report["mode"] == "shared")
    assert writers == int((directory / "counter").read_text())
    assert writers > 0
    assert readers > 0


Check = Callable[[Maker], Awaitable[None]]

BASIC: tuple[Check, ...] = (grants_and_releases, converts_alone, leases_are_recalled)
EXCLUSION: tuple[Check, ...] = (
    shares_only_shared,
    frees_at_once,
    refusal_leaves_nothing,
    images_are_independent,
    names_of_one_file_are_one_image,
    conversion_is_seen,
    refused_conversion_keeps_the_mode,
    holder_is_named,
    cancelled_takes_nothing,
    racers_never_both_win,
)
REQUESTS: tuple[Check, ...] = (requests_reach_the_holder, dead_requests_are_ignored)
FAILOVER: tuple[Check, ...] = (
    recalled_leases_exclude,
    converted_leases_are_recalled,
    what_nobody_recalls_is_given_back,
    nothing_is_recalled_that_was_not_held,
)


def offered(offers: Offers, check: Check) -> bool:
    """Whether the check makes sense for a backend that offers this."""
    if check in (*EXCLUSION, *FAILOVER):
        return offers.exclusion
    return offers.requests or check not in REQUESTS
