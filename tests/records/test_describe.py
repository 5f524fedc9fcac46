"""Areas in words: what sanlock wrote comes out as it is, and damaged sectors, and only these, are named."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from lockfs.records import sectors
from lockfs.records.describe import (
    Damage,
    DescribedArea,
    IndexArea,
    LockspaceArea,
    ResourceArea,
    UnknownArea,
    describe_area,
    kind_of,
)
from lockfs.records.geometry import FILE_GEOMETRY, GEOMETRIES, MIB, Geometry
from tests.records.loading import NAMES, load

AREAS = [name for name in NAMES if load(name).is_area]
LARGEST = GEOMETRIES[-1]


def lockspace(area: bytes, offset: int = 0) -> LockspaceArea:
    """The area, which is a lockspace."""
    found = describe_area(area, offset)
    assert isinstance(found, LockspaceArea)
    return found


def resource(area: bytes, guess: Geometry | None = None) -> ResourceArea:
    """The area, which is a lease."""
    found = describe_area(area, MIB, guess)
    assert isinstance(found, ResourceArea)
    return found


def index(area: bytes, offset: int = MIB) -> IndexArea:
    """The area, which is an index."""
    found = describe_area(area, offset)
    assert isinstance(found, IndexArea)
    return found


def with_sector(area: bytes, number: int, sector: bytes) -> bytes:
    """The area with one sector replaced."""
    size = len(sector)
    return area[: number * size] + sector + area[(number + 1) * size :]


def damaged(area: bytes, number: int, size: int, at: int = 50) -> bytes:
    """The area with one bit of a sector turned."""
    sector = bytearray(area[number * size : (number + 1) * size])
    sector[at] ^= 1
    return with_sector(area, number, bytes(sector))


@pytest.mark.parametrize("name", AREAS)
def test_what_sanlock_wrote_is_undamaged(name: str) -> None:
    """Every vector is told for what it is, in its geometry, and goes through JSON."""
    vector = load(name)
    found = describe_area(vector.area(), 0)
    assert found is not None
    assert (found.kind, found.area_size) == (vector.about["kind"], vector.shape.area_size)
    assert found.damage == ()
    assert json.loads(json.dumps(asdict(found)))["kind"] == found.kind


def test_hosts_of_a_lockspace() -> None:
    """Those that were there, with or without being there now."""
    joined = lockspace(load("ls-joined-4096-8M").area())
    assert (joined.sector_size, joined.hosts_max, joined.io_timeout) == (4096, 2000, 2)
    assert [(host.host_id, host.name, host.generation) for host in joined.hosts] == [
        (1, "host1", 1),
        (2, "host2", 1),
    ]
    assert all(host.timestamp for host in joined.hosts)
    left = lockspace(load("ls-left-512-1M").area())
    assert [(host.host_id, host.timestamp, host.generation) for host in left.hosts] == [(1, 0, 1), (2, 0, 1)]
    assert lockspace(load("libvirt-lockspace-512-1M").area()).lockspace == "__LIBVIRT__DISKS__"


def test_signals_and_events() -> None:
    """Who is told to look, and at what."""
    area = with_sector(sectors.new_lockspace(FILE_GEOMETRY, b"ev", 1), 0, load("delta-event-512").kept)
    (host,) = lockspace(area).hosts
    assert (host.signals, host.event) == ((2,), (1, 0x1122, 0x3344))
    only_bit = sectors.encode_delta(
        sectors.new_delta(FILE_GEOMETRY, b"ev", 1), sectors.bitmap_with(frozenset({9}))
    )
    assert lockspace(with_sector(area, 4, only_bit)).hosts[1].signals == (9,)


@pytest.mark.parametrize("shape", GEOMETRIES, ids=str)
def test_damaged_delta_leases(shape: Geometry) -> None:
    """Each by its sector; the first one too, whose neighbour then tells what this is."""
    size = shape.sector_size
    area = sectors.new_lockspace(shape, b"images", 10)
    last = shape.hosts_max - 1
    found = lockspace(damaged(damaged(area, 3, size), last, size))
    assert [damage.sector for damage in found.damage] == [3, last]
    for at, word in (
        (0, "no delta lease"),
        (4, "checksum"),
        (6, "version"),
        (60, "lockspace"),
        (100, "checksum"),
    ):
        found = lockspace(damaged(area, 0, size, at))
        assert [damage.sector for damage in found.damage] == [0], at
        assert word in found.damage[0].problem
        assert (found.lockspace, found.sector_size, found.hosts_max) == ("images", size, shape.hosts_max)
    assert lockspace(bytes(size) + area[size:]).damage == (Damage(0, "no delta lease is there (-223)"),)


def test_a_delta_lease_in_the_wrong_place() -> None:
    """A right record of another host or another geometry does not belong there."""
    area = sectors.new_lockspace(FILE_GEOMETRY, b"images", 10)
    new = sectors.new_delta(FILE_GEOMETRY, b"images", 10)
    wrong = {
        4: replace(new, owner_id=9, owner_generation=1, timestamp=5),
        5: replace(new, flags=0x80, sector_size=4096),
        6: replace(new, flags=0x20),
    }
    for number, leader in wrong.items():
        sector = leader.summed().encode().ljust(512, b"\0")
        area = with_sector(area, number, sector)
    assert [(damage.sector, damage.problem.split(",")[0]) for damage in lockspace(area).damage] == [
        (4, "it is the delta lease of host id 5"),
        (5, "it states sectors of 4096"),
        (6, "flags 0x20 state no area size for sectors of 512 (-230)"),
    ]


def test_a_lockspace_without_one_right_record() -> None:
    """Its name is then the first record's; every sector is damaged."""
    area = b"".join(
        sectors.encode_delta(replace(sectors.new_delta(FILE_GEOMETRY, b"images", 10), checksum=1))
        for _ in range(2000)
    ).ljust(MIB, b"\0")
    found = lockspace(area)
    assert (found.lockspace, found.io_timeout) == ("images", None)
    assert len(found.damage) == 2000


@pytest.mark.parametrize(
    ("name", "state", "owner"),
    [
        ("res-init-512-1M", "free", (0, 0)),
        ("res-init-4096-2M", "free", (0, 0)),
        ("res-released-4096-8M", "free", (1, 1)),
        ("res-ex-host1-512-1M", "exclusive", (1, 1)),
        ("res-shared-h1-h2-4096-8M", "shared", (2, 1)),
        ("res-cleared-512-1M", "removed", (0, 0)),
    ],
)
def test_states_of_leases(name: str, state: str, owner: tuple[int, int]) -> None:
    """As the records together say."""
    found = resource(load(name).area())
    assert (found.state, (found.owner_id, found.owner_generation)) == (state, owner)


def test_ballots() -> None:
    """What each host proposed, and who shares."""
    found = resource(load("res-shared-h1-h2-512-1M").area())
    assert [
        (one.host_id, one.mbal, one.shared, one.shared_generation, one.released) for one in found.ballots
    ] == [
        (1, 1, True, 1, True),
        (2, 2002, True, 1, True),
    ]
    assert found.ballots[1].proposed == (2, 1, 1757)
    assert found.written_by == (2, 1, 1757)


def test_states_in_between() -> None:
    """A shared acquire under way; an owner that had let go before somebody committed it."""
    head = sectors.new_resource(sectors.new_leader(FILE_GEOMETRY, b"trspace", b"resB"))
    short = with_sector(head, 0, load("leader-short-hold-512").kept)
    assert resource(short).state == "changing"
    held = load("res-ex-host1-512-1M").area()
    sharer = sectors.HostRecord(mode=sectors.ModeBlock(sectors.SHARED, 1)).encode(512)
    assert resource(with_sector(held, sectors.host_sector(2), sharer)).state == "changing"
    leader = sectors.decode_leader(held)
    owner = sectors.decode_host(held, 2 * 512)
    released = replace(owner, dblock=replace(owner.dblock, flags=sectors.RELEASED)).encode(512)
    late = with_sector(held, 0, sectors.encode_leader(replace(leader, write_id=2)))
    assert resource(late).state == "exclusive"
    assert resource(with_sector(held, 2, released)).state == "exclusive"
    assert resource(with_sector(late, 2, released)).state == "free"


def test_a_request() -> None:
    """The version that is asked for, and how."""
    area = load("res-request-512").kept.ljust(MIB, b"\0")
    found = resource(area)
    assert (found.state, found.request_lver, found.request_mode, found.damage) == ("exclusive", 2, 2, ())


@pytest.mark.parametrize("shape", GEOMETRIES, ids=str)
def test_damaged_leases(shape: Geometry) -> None:
    """Leader, request and ballots, by sector, first and last."""
    size = shape.sector_size
    area = sectors.new_resource(sectors.new_leader(shape, b"images", b"disk-1"))
    last = sectors.host_sector(shape.hosts_max)
    bad = damaged(damaged(damaged(area, 1, size, 0), 2, size, 0), last, size, 0)
    assert [damage.sector for damage in resource(bad).damage] == [1, 2, last]
    for at in (4, 6, 20, 60, 169):
        found = resource(damaged(area, 0, size, at))
        assert [damage.sector for damage in found.damage] == [0], at
        assert found.sector_size == size
    for at in (0, 8, 12):  # magic, geometry flag, sector size: the neighbour and the guess tell
        found = resource(damaged(area, 0, size, at), shape)
        assert [damage.sector for damage in found.damage] == [0], at
        assert (found.sector_size, found.area_size) == (size, shape.area_size)


def test_geometry_of_a_damaged_lease() -> None:
    """Without a guess the request record's place decides; a guess that it contradicts is not taken."""
    for shape in (FILE_GEOMETRY, LARGEST):
        area = sectors.new_resource(sectors.new_leader(shape, b"images", b"disk-1"))
        for guess in (None, FILE_GEOMETRY, LARGEST):
            found = resource(damaged(area, 0, shape.sector_size, 0), guess)
            assert (found.sector_size, found.area_size) == (shape.sector_size, shape.area_size)
    area = sectors.new_resource(sectors.new_leader(LARGEST, b"images", b"disk-1"))
    wrong = replace(sectors.decode_leader(area), sector_size=512, flags=0x10).summed().encode()
    found = resource(wrong + area[len(wrong) :])
    assert (found.sector_size, found.damage[0].sector) == (4096, 0)
    assert "its sectors lie as with sectors of 4096, areas of 8 MiB" in found.damage[0].problem


@pytest.mark.parametrize("shape", GEOMETRIES, ids=str)
def test_a_lease_whose_leader_was_wiped(shape: Geometry) -> None:
    """The request record tells that a lease is there, and the guess how large it is."""
    area = sectors.new_resource(sectors.new_leader(shape, b"images", b"disk-1"))
    found = resource(bytes(shape.sector_size) + area[shape.sector_size :], shape)
    assert found.damage == (Damage(0, "no paxos lease is there (-223)"),)
    assert (found.sector_size, found.area_size) == (shape.sector_size, shape.area_size)


def test_number_of_hosts() -> None:
    """More than fit is a damage, and no reason to read on."""
    new = sectors.new_leader(FILE_GEOMETRY, b"images", b"disk-1", 16)
    assert resource(sectors.new_resource(new)).num_hosts == 16
    for wrong in (0, 1 << 63):
        area = sectors.new_resource(new)
        found = resource(with_sector(area, 0, sectors.encode_leader(replace(new, num_hosts=wrong).summed())))
        assert [damage.sector for damage in found.damage] == [0]
        assert found.num_hosts == wrong


def _index_area(*entries: sectors.IndexEntry, shape: Geometry = FILE_GEOMETRY, offset: int = MIB) -> bytes:
    header = sectors.new_index(shape, b"images", offset, 4096).encode()
    return (header + b"".join(entry.encode() for entry in entries)).ljust(shape.area_size, b"\0")


def _entry(
    number: int, name: bytes, shape: Geometry = FILE_GEOMETRY, offset: int = MIB
) -> sectors.IndexEntry:
    return sectors.IndexEntry(sectors.entry_area(number, shape, offset), 0, sectors.name_field(name))


def test_an_index() -> None:
    """sanlock's own, and one of the largest geometry."""
    found = index(load("rindex-512-1M").kept.ljust(MIB, b"\0"))
    assert (found.lockspace, found.max_resources, found.damage) == ("rxls", 4096, ())
    assert [(entry.number, entry.name, entry.offset) for entry in found.entries] == [(1, "imageB", 4 * MIB)]
    place = 8 * MIB
    area = _index_area(_entry(0, b"a", LARGEST, place), shape=LARGEST, offset=place)
    assert [entry.name for entry in index(area, place).entries] == ["a"]
    assert index(area, place).sector_size == 4096


def test_a_damaged_index() -> None:
    """The header's sector, or that of the entry."""
    area = _index_area(_entry(0, b"a"), *[sectors.FREE_ENTRY] * 7, _entry(8, b"a"), _entry(8, b"b"))
    found = index(area)
    assert [(damage.sector, damage.problem) for damage in found.damage] == [
        (2, "entries 0 and 8 have the same name, 'a'"),
        (2, "entry 9, 'b', names byte 11534336, not its own"),
    ]
    assert [(entry.number, entry.name) for entry in found.entries] == [(0, "a"), (9, "b")]
    assert [damage.sector for damage in index(area, 0).damage][:2] == [0, 1]
    odd_flags = bytearray(area)
    odd_flags[8] = 7
    assert index(bytes(odd_flags)).damage[0].sector == 0


def test_areas_that_are_cut_off() -> None:
    """What is there is described; what is missing is a damage, by its first sector."""
    area = load("ls-joined-512-1M").area()
    found = lockspace(area[:1024])
    assert len(found.hosts) == 2
    assert found.damage == (Damage(2, "the file or device ends within this area"),)
    assert lockspace(load("ls-init-4096-8M").area()[:512]).damage[0].sector == 0
    leased = load("res-ex-host1-512-1M").area()
    for length, ballots in ((512, 0), (1024, 0), (1536, 1)):
        cut = resource(leased[:length])
        assert (len(cut.ballots), cut.damage) == (
            ballots,
            (Damage(length // 512, "the file or device ends within this area"),),
        )
    assert index(load("rindex-512-1M").kept[:512]).damage[0].sector == 1
    assert [one.name for one in index(load("rindex-512-1M").kept).entries] == ["imageB"]


def test_what_is_no_area() -> None:
    """Zeros are nothing; anything else is something unknown."""
    assert describe_area(bytes(MIB), 0) is None
    found: DescribedArea | None = describe_area(bytes(5000 * 512) + b"x" * 512, MIB)
    assert isinstance(found, UnknownArea)
    assert (found.offset, found.area_size, found.damage[0].sector) == (MIB, 5001 * 512, 0)
    assert kind_of(bytes(512)) is None
    for wrong in (b"", b"x", bytes(513)):
        with pytest.raises(ValueError, match="no sectors"):
            describe_area(wrong, 0)


def test_names_that_are_no_text() -> None:
    """They come out escaped."""
    area = sectors.new_resource(sectors.new_leader(FILE_GEOMETRY, b"\xff", "ü".encode()))
    assert (resource(area).lockspace, resource(area).name) == ("\\xff", "ü")
