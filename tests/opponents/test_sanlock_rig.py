"""The rig for real sanlock daemons, and how they behave: two hosts on one file, io_timeout 1."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from lockfs.records import sectors
from lockfs.records.geometry import GEOMETRIES, Geometry
from tests.failover import servers
from tests.support import sanlock
from tests.support.sanlock import LeaseFile, SanlockDaemon
from tests.support.sanlock_client import (
    AGAIN,
    EXISTS,
    LIVE,
    OWNER_ALIVE,
    SECTOR_4K,
    SECTOR_512,
    Held,
    Lockspace,
    Registration,
    Resource,
    SanlockClient,
    SanlockError,
    SanlockGone,
)

EVENTUALLY_S = 20.0
LEASES = 8


@dataclass
class Pair:
    """Two daemons that have joined one lockspace as hosts 1 and 2."""

    file: LeaseFile
    a: SanlockDaemon
    b: SanlockDaemon
    join_s: float = 0.0
    taken: list[Resource] = field(default_factory=list)

    def lease(self) -> Resource:
        """One that no other test uses."""
        self.taken.append(self.file.resources[len(self.taken)])
        return self.taken[-1]

    async def start(self) -> None:
        await self.a.start()
        await self.b.start()
        await self.file.init(self.a.client)
        begun = time.monotonic()
        async with trio.open_nursery() as nursery:
            for host_id, daemon in enumerate((self.a, self.b), 1):
                nursery.start_soon(_join, daemon, self.file, host_id)
        self.join_s = time.monotonic() - begun

    async def stop(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.a.stop)
            nursery.start_soon(self.b.stop)


async def _join(daemon: SanlockDaemon, file: LeaseFile, host_id: int) -> None:
    await daemon.client.add_lockspace(file.lockspace, host_id, io_timeout=1)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    base = tmp_path_factory.mktemp("sanlock")
    if reason := sanlock.why_not_sanlock(base):
        pytest.skip(reason)
    found = Pair(
        LeaseFile(base / "leases", LEASES), SanlockDaemon(base, "host1"), SanlockDaemon(base, "host2")
    )
    try:
        trio.run(found.start)
        yield found
        trio.run(found.stop)
    finally:
        found.a.close()
        found.b.close()
        for daemon in (found.a, found.b):
            print(f"--- {daemon.name}:\n{daemon.log()}")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory in which a daemon can work."""
    if reason := sanlock.why_not_sanlock(tmp_path):
        pytest.skip(reason)
    return tmp_path


async def _refused(code: int, registration: Registration, lease: Resource, *, shared: bool = False) -> None:
    with pytest.raises(SanlockError) as caught:
        await registration.acquire(lease, shared=shared)
    assert caught.value.code == code


async def _acquired(registration: Registration, lease: Resource, *, shared: bool = False) -> None:
    """Acquire as soon as the other side has let go, which daemons do in the background."""
    with trio.fail_after(EVENTUALLY_S):
        while True:
            try:
                await registration.acquire(lease, shared=shared)
                return
            except SanlockError as error:
                if error.code not in (OWNER_ALIVE, AGAIN):
                    raise
            await trio.sleep(sanlock.POLL_S)


async def _names(client: SanlockClient, lease: Resource) -> tuple[bool, set[int]]:
    owners = await client.owners(lease)
    return owners.shared, {host.host_id for host in owners.hosts}


async def test_two_hosts_have_joined(pair: Pair) -> None:
    """Two daemons, of the release that the rules were taken from, share a lockspace and see each other."""
    assert pair.join_s >= 2  # the delay that the rules ask for, 2 * io_timeout
    for host_id, daemon in enumerate((pair.a, pair.b), 1):
        assert await daemon.client.version() >> 16 == 0x0308
        assert await daemon.client.lockspaces() == [(b"LS", host_id)]
    with trio.fail_after(EVENTUALLY_S):
        while True:
            try:
                hosts = await pair.a.client.hosts(pair.file.lockspace)
            except SanlockError as error:
                assert error.code == AGAIN
                hosts = {}
            if {host_id for host_id, host in hosts.items() if host.state == LIVE} == {1, 2}:
                break
            await trio.sleep(0.1)
    assert {host.io_timeout for host in hosts.values()} == {1}
    assert list(await pair.b.client.hosts(pair.file.lockspace, 1)) == [1]


async def test_exclusion(pair: Pair) -> None:
    """An exclusive lease is refused to the other host in either mode, and to the same host at once."""
    lease = pair.lease()
    async with (
        pair.a.client.register() as a,
        pair.b.client.register() as b,
        pair.a.client.register() as again,
    ):
        await a.acquire(lease, owner_name=b"guest")
        await _refused(OWNER_ALIVE, b, lease)
        await _refused(OWNER_ALIVE, b, lease, shared=True)
        await _refused(EXISTS, again, lease)
        assert await a.inquire() == [Held(lease.name, 1, False)]
        assert await b.inquire() == []
        assert await _names(pair.b.client, lease) == (False, {1})
        await a.release(lease)
        await b.acquire(lease)
        assert await b.inquire() == [Held(lease.name, 2, False)]


async def test_shared(pair: Pair) -> None:
    """Both hosts hold a lease shared; exclusive must wait until the last has let go."""
    lease = pair.lease()
    async with pair.a.client.register() as a, pair.b.client.register() as b:
        await a.acquire(lease, shared=True)
        await b.acquire(lease, shared=True)
        assert await a.inquire() == [Held(lease.name, None, True)]
        assert await _names(pair.a.client, lease) == (True, {1, 2})
        await a.release(lease)
        await _refused(AGAIN, a, lease)
        await b.release()
        assert await b.inquire() == []
        await a.acquire(lease)


async def test_convert(pair: Pair) -> None:
    """A lease becomes shared and exclusive again, but not exclusive while another host shares it."""
    lease = pair.lease()
    async with pair.a.client.register() as a, pair.b.client.register() as b:
        await a.acquire(lease)
        await a.convert(lease, shared=True)
        await b.acquire(lease, shared=True)
        with pytest.raises(SanlockError) as caught:
            await b.convert(lease, shared=False)
        assert caught.value.code == AGAIN
        await a.release(lease)
        await b.convert(lease, shared=False)
        assert [held.shared for held in await b.inquire()] == [False]
        await _refused(OWNER_ALIVE, a, lease)


async def test_closing_releases(pair: Pair) -> None:
    """A registration that closes gives its leases back."""
    lease = pair.lease()
    async with pair.b.client.register() as b:
        async with pair.a.client.register() as a:
            await a.acquire(lease)
            await _refused(OWNER_ALIVE, b, lease)
        await _acquired(b, lease)


async def test_a_request_ends_the_holder_and_nobody_else(pair: Pair) -> None:
    """When another host asks for a lease, the holder's stand-in gets the signal."""
    lease = pair.lease()
    async with pair.a.client.register() as a, pair.a.client.register() as bystander:
        await a.acquire(lease)
        await pair.b.client.request(lease, lver=2)
        with trio.fail_after(EVENTUALLY_S):
            while a.killed_by is None:
                await trio.sleep(0.05)
        assert a.killed_by == signal.SIGTERM
        assert bystander.killed_by is None


async def test_set_event(pair: Pair) -> None:
    """What one host tells another lies in its delta lease with its next renewal."""
    await pair.a.client.set_event(pair.file.lockspace, 2, 1, event=5, data=7)
    with trio.fail_after(EVENTUALLY_S):
        while True:
            sector = await trio.to_thread.run_sync(_sector, pair.file.path)
            leader = sectors.decode_leader(sector)
            if (leader.write_id, leader.write_generation, leader.write_timestamp) == (1, 5, 7):
                break
            await trio.sleep(0.1)
    assert sectors.in_bitmap(sectors.bitmap_of(sector), 2)


def _sector(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(512)


def _shape(geometry: Geometry) -> int:
    return geometry.flag | (SECTOR_512 if geometry.sector_size == 512 else SECTOR_4K)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
async def test_new_areas(pair: Pair, tmp_path: Path, geometry: Geometry) -> None:
    """A lockspace and a resource that the daemon writes are byte for byte those that lockfs makes."""
    path = tmp_path / "areas"
    path.touch()
    with open(path, "r+b") as file:
        file.truncate(2 * geometry.area_size)
    lockspace = Lockspace(b"images", path, 0, _shape(geometry))
    resource = Resource(b"images", b"disk", path, geometry.area_size, _shape(geometry))
    for num_hosts in (0, 16):
        await pair.a.client.init_lockspace(lockspace, io_timeout=5)
        await pair.a.client.init_resource(resource, num_hosts=num_hosts)
        written = path.read_bytes()
        assert written[: geometry.area_size] == sectors.new_lockspace(geometry, b"images", 5)
        leader = sectors.new_leader(geometry, b"images", b"disk", num_hosts)
        assert written[geometry.area_size :] == sectors.new_resource(leader)


async def test_crash_and_restart(directory: Path) -> None:
    """A killed daemon leaves no process and writes nothing more; the next of its name joins as a new life."""
    file = LeaseFile(directory / "leases", 1)
    async with SanlockDaemon(directory, "crashes") as daemon:
        await file.init(daemon.client)
        await _join(daemon, file, 3)
        async with daemon.client.register() as registration:
            await registration.acquire(file.resources[0])
            pid = daemon.pid
            daemon.kill()
            assert not daemon.is_running()
            assert not Path(f"/proc/{pid}").exists()
            with trio.fail_after(EVENTUALLY_S):
                await registration.ended()
            assert registration.killed_by is None
        with pytest.raises(OSError, match="refused"):
            await daemon.client.version()
        with pytest.raises(SanlockGone):
            async with daemon.client.register():
                pass
        before = file.path.read_bytes()
        assert sectors.decode_leader(before[sanlock.AREA :]).timestamp != 0
        await daemon.start()
        await _join(daemon, file, 3)
        after = sectors.decode_leader(file.path.read_bytes()[2 * 512 :])
        assert (after.owner_id, after.owner_generation) == (3, 2)
        async with daemon.client.register() as registration:
            await registration.acquire(file.resources[0])
    left = sectors.decode_leader(file.path.read_bytes()[2 * 512 :])
    assert left.timestamp == 0  # stopping left the lockspace


async def test_a_daemon_that_does_not_start(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rig tells what it said, and leaves nothing of it, its other processes included."""
    script = tmp_path / "broken"
    script.write_text("#!/bin/sh\nsleep 1000 &\necho $! out of order >&2\nexit 3\n")
    script.chmod(0o755)
    monkeypatch.setattr(sanlock, "program", lambda: str(script))
    monkeypatch.setattr(sanlock, "END_S", 0.1)
    with pytest.raises(AssertionError, match="broken_daemon left processes"):
        async with SanlockDaemon(directory, "broken_daemon"):
            pass
    stray = int((directory / "broken_daemon.log").read_text().split()[0])
    with trio.fail_after(EVENTUALLY_S):
        while servers.alive(stray):  # it was sent a SIGKILL just now
            await trio.sleep(sanlock.POLL_S)


async def test_calls_have_deadlines(directory: Path) -> None:
    """A daemon that does not answer is not waited for longer than asked."""
    async with SanlockDaemon(directory, "stopped") as daemon:
        os.kill(daemon.pid, signal.SIGSTOP)
        try:
            file = LeaseFile(directory / "leases", 1)
            with pytest.raises(trio.TooSlowError):
                await daemon.client.add_lockspace(file.lockspace, 1, io_timeout=1, timeout=0.2)
        finally:
            os.kill(daemon.pid, signal.SIGCONT)
