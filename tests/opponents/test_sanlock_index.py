"""One resource index, changed by a sanlock daemon and by lockfs at the same time, in real time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from lockfs.backends.paxos.options import LayoutKind
from lockfs.errors import ImageBusy
from lockfs.records import sectors
from lockfs.records.geometry import MIB
from tests.backends.conformance import acquire
from tests.backends.makers import PaxosMaker, make_index_area
from tests.support import sanlock
from tests.support.sanlock import SanlockDaemon
from tests.support.sanlock_client import Lockspace, Resource

from .test_sanlock_areas import sanlock_command

SPACE = "images"
INDEX = MIB


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory in which sanlock can work."""
    if reason := sanlock.why_not_sanlock(tmp_path):
        pytest.skip(reason)
    return tmp_path


@dataclass(frozen=True)
class Index:
    """The index as sanlock's own commands see it; with `run` a daemon does it."""

    path: Path
    run: Path | None = None

    @property
    def name(self) -> str:
        return f"{SPACE}:{self.path}:{INDEX}"

    def direct(self, *words: str) -> str:
        return sanlock_command("direct", words[0], "-x", self.name, *words[1:])

    def client(self, action: str, name: str) -> str:
        return sanlock_command("client", action, "-x", self.name, "-e", name, run_directory=self.run)

    def offset(self, name: str) -> int:
        """Where sanlock finds a lease; fails if it does not."""
        return int(self.direct("lookup", "-e", name).split("offset")[1].split()[0])

    def entries(self) -> dict[str, list[int]]:
        """What the index has, by name."""
        found: dict[str, list[int]] = {}
        with open(self.path, "rb") as file:
            file.seek(INDEX + 512)
            table = file.read(64 * 32)
        for at in range(0, len(table), 64):
            entry = sectors.decode_entry(table, at)
            if entry.offset:
                found.setdefault(entry.name.decode(), []).append(entry.offset)
        return found


def name_of(inode: int) -> str:
    return f"i{inode:016x}"


async def test_sanlock_finds_what_lockfs_made(directory: Path) -> None:
    """And lockfs what sanlock made; no daemon needed."""
    maker = PaxosMaker(directory, LayoutKind.INDEX)
    make_index_area(directory / "area")
    index = Index(directory / "area")
    async with maker.hosts(1) as (host,):
        inode = host.image("theirs.img").inode
        offset = 5 * MIB
        index.direct("update", "-e", f"{name_of(inode)}:{offset}")
        resource = f"{SPACE}:{name_of(inode)}:{index.path}:{offset}"
        sanlock_command("direct", "init", "-r", resource)
        lease = await acquire(maker, host, name="theirs.img")
        await host.backend.release(lease)
        assert index.entries() == {name_of(inode): [offset]}
        ours = host.image("ours.img").inode
        lease = await acquire(maker, host, name="ours.img")
        assert index.offset(name_of(ours)) == 3 * MIB
        leader = sanlock_command(
            "direct", "read_leader", "-r", f"{SPACE}:{name_of(ours)}:{index.path}:{3 * MIB}"
        )
        assert "num_hosts 250" in leader
        await host.backend.release(lease)


async def test_both_change_one_index(directory: Path) -> None:
    """While the daemon makes and removes leases, lockfs makes its own: no slot is given twice, no name is
    twice, and each finds what the other made. What lockfs removes is gone for sanlock.
    """
    maker = PaxosMaker(directory, LayoutKind.INDEX)
    make_index_area(directory / "area")
    async with SanlockDaemon(directory, "host1") as daemon:
        await daemon.client.add_lockspace(Lockspace(SPACE.encode(), directory / "area"), 7, io_timeout=1)
        index = Index(directory / "area", daemon.socket.parent)
        async with maker.hosts(1) as (host,):
            names = [f"{number}.img" for number in range(6)]
            inodes = [host.image(name).inode for name in names]

            async def by_sanlock() -> None:
                for number in range(6):
                    await trio.to_thread.run_sync(index.client, "create", f"other-{number}")
                await trio.to_thread.run_sync(index.client, "delete", "other-2")

            async def by_lockfs() -> None:
                for name in names:
                    await host.backend.release(await acquire(maker, host, name=name))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(by_sanlock)
                nursery.start_soon(by_lockfs)
            entries = index.entries()
            wanted = {name_of(inode) for inode in inodes} | {f"other-{n}" for n in (0, 1, 3, 4, 5)}
            assert set(entries) == wanted
            offsets = [offset for found in entries.values() for offset in found]
            assert len(offsets) == len(set(offsets)) == len(wanted)

            removed, _ = await host.backend.collect(
                lambda inode: inode == inodes[0], trio.current_time() + 30
            )
            assert removed == [inodes[0]]
            with pytest.raises(AssertionError):
                index.offset(name_of(inodes[0]))
            await trio.to_thread.run_sync(index.client, "create", name_of(inodes[0]))
            async with daemon.client.register() as process:
                offset = index.offset(name_of(inodes[0]))
                resource = Resource(SPACE.encode(), name_of(inodes[0]).encode(), index.path, offset)
                await process.acquire(resource)
                with pytest.raises(ImageBusy, match="host1"):
                    await acquire(maker, host, name=names[0])
                await process.release(resource)
            await host.backend.release(await acquire(maker, host, name=names[0]))
