"""Leases as files: names, geometry, and files that others make, fill or remove at the same moment."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import trio

from lockfs.backends.base import Image
from lockfs.backends.paxos.directory import Directory
from lockfs.backends.paxos.files import FileLayout, Naming, geometry_for, libvirt_naming, own_naming
from lockfs.backends.paxos.options import PaxosOptions
from lockfs.backends.paxos.places import HOSTS_DEFAULT
from lockfs.errors import BackendError, SetupError
from lockfs.paxos.seams import DiskError
from lockfs.records import sectors
from lockfs.records.geometry import MIB, geometry

from .lease_io import LeaseIO, pace

IMAGE = Image(0x1234ABCD, b"sub/vm1.qcow2", -1)
SPACE = b"lockfs"
SMALL, BIG = geometry(512, MIB), geometry(4096, MIB)

MakeLayout = Callable[..., FileLayout]


@pytest.fixture
def io() -> LeaseIO:
    return LeaseIO()


@pytest.fixture
async def layout_of(tmp_path: Path, io: LeaseIO) -> AsyncIterator[MakeLayout]:
    """Makes layouts, one for each host, over a directory (`tmp_path`), and stops them."""
    made: list[FileLayout] = []

    def make(
        options: PaxosOptions | None = None,
        naming: Naming | None = None,
        at: Path = tmp_path,
        lockspace: bytes = SPACE,
    ) -> FileLayout:
        directory = Directory(os.open(at, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
        options = options or PaxosOptions(io_timeout=1)
        made.append(FileLayout(directory, str(at), options, lockspace, naming or own_naming(), io))
        return made[-1]

    async with trio.open_nursery() as nursery:
        nursery.start_soon(pace, lambda: [io])
        try:
            yield make
        finally:
            io.heal()
            with trio.CancelScope(shield=True):
                for layout in made:
                    await layout.stop()
        nursery.cancel_scope.cancel()


def soon() -> float:
    return trio.current_time() + 5.0


# --- names and geometry


def test_own_names_are_of_inodes() -> None:
    """Renames and hard links change nothing; other files of the directory are no leases."""
    naming = own_naming()
    assert naming.resource(IMAGE) == b"i000000001234abcd"
    assert naming.resource(Image(IMAGE.inode, b"other", -1)) == naming.resource(IMAGE)
    assert naming.inode_of(b"i000000001234abcd") == IMAGE.inode
    for name in (b"lockspace", b"i1", b"x000000001234abcd", b"i00000000123 abcd", b"i000000001234abcd0"):
        assert naming.inode_of(name) is None


@pytest.mark.parametrize("lock_path", ["/var/lib/libvirt/images", "/var/lib/libvirt/images/"])
def test_libvirts_names(lock_path: str) -> None:
    """The MD5 of the path in the domain's XML, as libvirt's own plugin names the lease."""
    naming = libvirt_naming(b"__LIBVIRT__DISKS__", lock_path)
    assert naming.resource(Image(1, b"vm1.qcow2", -1)) == b"ef8e4732a13f4574306f8aac7caf0980"
    assert naming.resource(Image(2, b"vm2.qcow2", -1)) != naming.resource(Image(2, b"vm1.qcow2", -1))
    assert naming.inode_of(b"ef8e4732a13f4574306f8aac7caf0980") is None
    assert libvirt_naming(b"x", "/").resource(Image(1, b"a", -1)) == b"0639767f3e9eaad729b54037a7e2abf5"


@pytest.mark.parametrize(
    ("options", "storage", "expected"),
    [
        (PaxosOptions(), 512, SMALL),
        (PaxosOptions(), 4096, BIG),
        (PaxosOptions(sector=4096), 512, BIG),
        (PaxosOptions(align=8 * MIB), 4096, geometry(4096, 8 * MIB)),
        (PaxosOptions(sector=4096, align=2 * MIB), 512, geometry(4096, 2 * MIB)),
    ],
)
def test_geometry_by_options_and_storage(options: PaxosOptions, storage: int, expected: object) -> None:
    assert geometry_for(options, storage) == expected


@pytest.mark.parametrize(
    ("options", "storage", "names"),
    [
        (PaxosOptions(sector=512), 4096, "sector=512.*4096"),
        (PaxosOptions(sector=512, align=8 * MIB), 512, "sector=512 goes with align=1 "),
        (PaxosOptions(align=8 * MIB), 512, "align=1 "),
    ],
)
def test_a_geometry_that_does_not_fit_is_refused(options: PaxosOptions, storage: int, names: str) -> None:
    with pytest.raises(SetupError, match=names):
        geometry_for(options, storage)


# --- the lockspace


async def test_the_lockspace_is_made_once(layout_of: MakeLayout, tmp_path: Path) -> None:
    """Hosts that start together make one lockspace, which equals sanlock's byte for byte."""
    layouts = [layout_of() for _ in range(4)]
    async with trio.open_nursery() as nursery:
        for layout in layouts:
            nursery.start_soon(layout.start)
    assert os.listdir(tmp_path) == ["lockspace"]
    assert (tmp_path / "lockspace").read_bytes() == sectors.new_lockspace(SMALL, SPACE, 1)


async def test_another_lockspace_is_refused(layout_of: MakeLayout) -> None:
    await layout_of(lockspace=b"others").start()
    with pytest.raises(SetupError, match=r"'others', not 'lockfs'.*lockspace="):
        await layout_of().start()


@pytest.mark.parametrize(
    ("changes", "names"),
    [({"sector": 4096}, "sector="), ({"align": 8 * MIB}, "align="), ({"host_id": 2001}, "2000")],
)
async def test_options_that_contradict_what_is_there(
    layout_of: MakeLayout, changes: dict[str, int], names: str
) -> None:
    await layout_of().start()
    with pytest.raises(SetupError, match=names):
        await layout_of(PaxosOptions(io_timeout=1, **changes)).start()  # type: ignore[arg-type]


async def test_a_file_that_is_no_lockspace_is_refused(layout_of: MakeLayout, tmp_path: Path) -> None:
    """Nothing is written over it."""
    (tmp_path / "lockspace").write_bytes(b"\x5a" * MIB)
    with pytest.raises(SetupError, match="no delta lease"):
        await layout_of().start()
    assert (tmp_path / "lockspace").read_bytes() == b"\x5a" * MIB


# --- leases


async def test_a_lease_is_found_where_it_was_made(layout_of: MakeLayout, tmp_path: Path) -> None:
    """No file before it is needed; then one, for 250 hosts, mostly a hole, the same for all hosts."""
    one, other = layout_of(), layout_of()
    for layout in (one, other):
        await layout.start()
    assert await one.find(IMAGE) is None
    made = await one.make(IMAGE, soon())
    found = await other.find(IMAGE)
    assert found is not None
    assert (found.name, found.hosts, found.area.shape) == (b"i000000001234abcd", HOSTS_DEFAULT, SMALL)
    content = (tmp_path / "i000000001234abcd").read_bytes()
    leader = sectors.new_leader(SMALL, SPACE, found.name, HOSTS_DEFAULT)
    assert content == sectors.new_resource(leader)
    assert await one.still(made, IMAGE)
    assert await one.listing() == [IMAGE.inode]
    await made.close()
    await found.close()


async def test_hosts_that_meet_make_one_lease(layout_of: MakeLayout) -> None:
    """They all open the same file."""
    layouts = [layout_of() for _ in range(4)]
    identities = set()

    async def make(layout: FileLayout) -> None:
        await layout.start()
        place = await layout.make(IMAGE, soon())
        assert place.own_disk is not None
        identities.add(place.own_disk.identity)
        await place.close()

    async with trio.open_nursery() as nursery:
        for layout in layouts:
            nursery.start_soon(make, layout)
    assert len(identities) == 1


async def test_a_high_host_id_makes_leases_for_all(layout_of: MakeLayout) -> None:
    layout = layout_of(PaxosOptions(io_timeout=1, host_id=HOSTS_DEFAULT + 1))
    await layout.start()
    place = await layout.make(IMAGE, soon())
    assert place.hosts == SMALL.hosts_max
    await place.close()


async def test_a_lease_removed_between_found_and_taken(layout_of: MakeLayout) -> None:
    """`still` says no, also when a new file has the name."""
    one, other = layout_of(), layout_of()
    for layout in (one, other):
        await layout.start()
    place = await one.make(IMAGE, soon())
    again = await other.make(IMAGE, soon())
    await other.remove(again, IMAGE)
    assert not await one.still(place, IMAGE)
    await other.remove(again, IMAGE)  # again is no error
    new = await other.make(IMAGE, soon())
    assert not await one.still(place, IMAGE)
    assert await one.still(new, IMAGE)
    for opened in (place, again, new):
        await opened.close()


# --- libvirt's habit


@pytest.mark.parametrize("begun", [b"", bytes(MIB)])
async def test_a_file_that_libvirt_just_makes_is_waited_for(
    layout_of: MakeLayout, tmp_path: Path, begun: bytes
) -> None:
    """libvirt makes an empty file, then fills it: in between it is neither an error nor a free lease."""
    naming = libvirt_naming(SPACE, "/images")
    layout = layout_of(naming=naming)
    await layout.start()
    name = naming.resource(IMAGE)
    path = tmp_path / os.fsdecode(name)
    path.write_bytes(begun)

    async def fill() -> None:
        await trio.sleep(1.0)
        path.write_bytes(sectors.new_resource(sectors.new_leader(SMALL, SPACE, name)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fill)
        place = await layout.make(IMAGE, soon())
    assert trio.current_time() >= 1.0
    leader = sectors.decode_leader(await place.area.read(0))
    assert leader.resource_name == name
    await place.close()


async def test_a_file_that_is_never_filled_is_left_alone(layout_of: MakeLayout, tmp_path: Path) -> None:
    """At the deadline what is there is handed on, for the engine to refuse; nothing is written to it."""
    naming = libvirt_naming(SPACE, "/images")
    layout = layout_of(naming=naming)
    await layout.start()
    file = tmp_path / os.fsdecode(naming.resource(IMAGE))
    file.write_bytes(bytes(MIB))
    place = await layout.make(IMAGE, soon())
    assert trio.current_time() >= 5.0
    assert file.read_bytes() == bytes(MIB)
    await place.close()


async def test_own_files_are_not_waited_for(layout_of: MakeLayout, io: LeaseIO, tmp_path: Path) -> None:
    """They are whole from the moment they have a name: damage is the engine's to find, at once."""
    layout = layout_of()
    await layout.start()
    (tmp_path / "i000000001234abcd").write_bytes(bytes(MIB))
    io.log.clear()
    place = await layout.make(IMAGE, soon())
    assert trio.current_time() < 5.0
    assert not [name for call, name, _ in io.log if call == "r" and name != "lockspace"]
    await place.close()


async def test_a_name_that_never_stays_ends_at_the_deadline(layout_of: MakeLayout, tmp_path: Path) -> None:
    """A directory that shows a name to link(2), but not to open(2), is not asked for ever."""
    layout = layout_of()
    await layout.start()
    os.symlink("nowhere", tmp_path / "i000000001234abcd")  # there for link, not there for open
    with pytest.raises(BackendError, match="in time"):
        await layout.make(IMAGE, soon())


async def test_a_failing_look_closes_the_file(layout_of: MakeLayout, io: LeaseIO, tmp_path: Path) -> None:
    """A lease file that cannot be read is an error that names it; no descriptor stays open."""
    naming = libvirt_naming(SPACE, "/images")
    layout = layout_of(naming=naming)
    await layout.start()
    await (await layout.make(IMAGE, soon())).close()
    file = os.fsdecode(naming.resource(IMAGE))
    io.refuse("r", OSError(errno.EIO, "Input/output error"), file)
    with pytest.raises(DiskError, match=file):
        await layout.make(IMAGE, soon())


async def test_a_directory_that_is_gone_is_an_error(layout_of: MakeLayout, tmp_path: Path) -> None:
    directory = tmp_path / "leases"
    directory.mkdir()
    layout = layout_of(at=directory)
    await layout.start()
    (directory / "lockspace").unlink()
    directory.rmdir()
    with pytest.raises(BackendError, match="cannot be used"):
        await layout.make(IMAGE, soon())


# --- storage with large sectors


@pytest.fixture
def large_sectors(tmp_path: Path) -> Iterator[Path]:
    """A file system on a device with sectors of 4096 bytes."""
    if os.geteuid() != 0:
        pytest.skip("only root can make a device with sectors of 4096 bytes")
    backing, point = tmp_path / "backing", tmp_path / "point"
    with open(backing, "wb") as file:
        file.truncate(64 << 20)
    made = subprocess.run(
        ["losetup", "-f", "--show", "--sector-size", "4096", backing],
        check=False,
        capture_output=True,
        text=True,
    )
    if made.returncode:
        pytest.skip(f"no loop device can be made: {made.stderr.strip()}")
    device = made.stdout.strip()
    try:
        subprocess.run(["mkfs.ext4", "-q", device], check=True)
        point.mkdir()
        subprocess.run(["mount", device, point], check=True)
        try:
            yield point
        finally:
            # Lazily: a test that failed may still have files open there.
            subprocess.run(["umount", "-l", point], check=True)
    finally:
        subprocess.run(["losetup", "-d", device], check=True)


async def test_storage_with_large_sectors(large_sectors: Path, layout_of: MakeLayout) -> None:
    """The lockspace has sectors of 4096 bytes by itself, and so have the leases."""
    with pytest.raises(SetupError, match="sector=512"):
        await layout_of(PaxosOptions(io_timeout=1, sector=512), at=large_sectors).start()
    layout = layout_of(at=large_sectors)
    area = await layout.start()
    assert area.shape == BIG
    place = await layout.make(IMAGE, soon())
    assert (place.hosts, place.area.shape) == (BIG.hosts_max, BIG)
    assert (await place.area.read(sectors.REQUEST_SECTOR)) == sectors.Request().encode(4096)
    assert sorted(os.listdir(large_sectors)) == ["i000000001234abcd", "lockspace", "lost+found"]
    await place.close()
