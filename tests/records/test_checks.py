"""What is no record, or not the right one, is refused for the first reason that sanlock would give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from lockfs.records import sectors
from lockfs.records.geometry import FILE_GEOMETRY, GEOMETRIES, MIB, Geometry, geometry, geometry_of_flags
from lockfs.records.results import RecordError, Result
from lockfs.records.sectors import Dblock, IndexHeader, Leader, Request

SPACE, NAME = b"space", b"res"
PAXOS = sectors.new_leader(FILE_GEOMETRY, SPACE, NAME)
DELTA = sectors.new_delta(FILE_GEOMETRY, SPACE, 10)
INDEX = sectors.new_index(FILE_GEOMETRY, SPACE, MIB, 4096)


def check_paxos(leader: Leader) -> None:
    """As host 7 would."""
    sectors.check_paxos(leader, SPACE, NAME, 7)


def check_delta(leader: Leader) -> None:
    """As a member of the lockspace would."""
    sectors.check_delta(leader, SPACE)


def check_index(header: IndexHeader) -> None:
    """Where it should be."""
    sectors.check_index(header, FILE_GEOMETRY, SPACE, MIB)


def code(check: Callable[[Any], None], record: object) -> Result | None:
    """What a check says of a record."""
    try:
        check(record)
    except RecordError as error:
        assert str(int(error.result)) in str(error)
        return error.result
    return None


_NAME_AND = {"space_field": sectors.name_field(b"other")}
# Each step of a chain is wrong in its own way and in all later ways; the earliest must be what is reported.
PAXOS_CHAIN: list[tuple[dict[str, Any], Result]] = [
    ({"magic": sectors.CLEARED_MAGIC}, Result.LEADER_MAGIC),
    ({"magic": sectors.DELTA_MAGIC}, Result.LEADER_MAGIC),
    ({"version": 0x00050004}, Result.LEADER_VERSION),
    (_NAME_AND, Result.LEADER_SPACE_NAME),
    ({"resource_field": sectors.name_field(b"other")}, Result.LEADER_RESOURCE_NAME),
    ({"num_hosts": 6}, Result.LEADER_NUM_HOSTS),
    ({"checksum": 1}, Result.LEADER_CHECKSUM),
]
DELTA_CHAIN: list[tuple[dict[str, Any], Result]] = [
    ({"magic": sectors.PAXOS_MAGIC}, Result.LEADER_MAGIC),
    ({"version": 0x00040004}, Result.LEADER_VERSION),
    (_NAME_AND, Result.LEADER_SPACE_NAME),
    ({"checksum": 1}, Result.LEADER_CHECKSUM),
]
INDEX_CHAIN: list[tuple[dict[str, Any], Result]] = [
    ({"magic": sectors.PAXOS_MAGIC}, Result.INDEX_MAGIC),
    ({"version": 0x00020002}, Result.INDEX_VERSION),
    (_NAME_AND, Result.LEADER_SPACE_NAME),
    ({"flags": 2}, Result.INDEX_DAMAGED),
    ({"max_resources": 0}, Result.INDEX_DAMAGED),
]
CHAINS = [
    pytest.param(check_paxos, PAXOS, PAXOS_CHAIN, id="paxos"),
    pytest.param(check_delta, DELTA, DELTA_CHAIN, id="delta"),
    pytest.param(check_index, INDEX, INDEX_CHAIN, id="index"),
]


@pytest.mark.parametrize(("check", "good", "chain"), CHAINS)
def test_order_of_checks(
    check: Callable[[Any], None], good: Any, chain: list[tuple[dict[str, Any], Result]]
) -> None:
    """A right record passes; of several things wrong the first in sanlock's order is named."""
    assert code(check, good) is None
    for at, (_, expected) in enumerate(chain):
        changes: dict[str, Any] = {}
        for change, _ in reversed(chain[at:]):
            changes |= change
        assert code(check, replace(good, **changes)) is expected
        assert code(check, replace(good, **chain[at][0])) is expected


def test_a_removed_lease_is_told_from_none() -> None:
    """Both are -223; the sentences differ."""
    with pytest.raises(RecordError, match="was removed"):
        check_paxos(replace(PAXOS, magic=sectors.CLEARED_MAGIC))
    with pytest.raises(RecordError, match="no paxos lease is there"):
        check_paxos(replace(PAXOS, magic=0))


def test_minor_versions_are_not_looked_at() -> None:
    """Only the major half counts."""
    check_paxos(replace(PAXOS, version=0x00060001).summed())
    check_delta(replace(DELTA, version=0x00030009).summed())
    check_index(replace(INDEX, version=0x00010000))
    sectors.check_request(Request(version=0x00010000))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_hosts": 2001}, Result.LEADER_INCONSISTENT),
        ({"num_hosts": 2001, "max_hosts": 2001}, Result.LEADER_INCONSISTENT),
        ({"max_hosts": 0}, Result.LEADER_INCONSISTENT),
        ({"num_hosts": 20, "max_hosts": 19}, Result.LEADER_INCONSISTENT),
        ({"sector_size": 4096}, Result.LEADER_INCONSISTENT),
        ({"sector_size": 513}, Result.LEADER_SECTOR_SIZE),
        ({"flags": 0x20}, Result.BAD_GEOMETRY),
        ({"flags": 0x11}, None),
        ({"flags": 0}, None),
        ({"num_hosts": 7}, None),
    ],
)
def test_what_a_right_checksum_does_not_excuse(changes: dict[str, Any], expected: Result | None) -> None:
    """No reader is led beyond the area: more hosts than sectors are refused, whatever wrote them."""
    assert code(check_paxos, replace(PAXOS, **changes).summed()) is expected


def test_host_sectors_stay_within_the_area() -> None:
    """In every geometry the last host's sector lies in the area, of lockspaces and resources."""
    for shape in GEOMETRIES:
        assert (sectors.host_sector(shape.hosts_max) + 1) * shape.sector_size <= shape.area_size
        assert (sectors.delta_sector(shape.hosts_max) + 1) * shape.sector_size <= shape.area_size
        last, byte = sectors.entry_place(shape.index_resources_max - 1, shape.sector_size)
        assert last * shape.sector_size + byte + sectors.INDEX_ENTRY_BYTES <= shape.area_size


def test_requests() -> None:
    """Magic before version."""
    assert code(sectors.check_request, Request()) is None
    assert code(sectors.check_request, Request(magic=1, version=0)) is Result.REQUEST_MAGIC
    assert code(sectors.check_request, Request(version=0x00020001)) is Result.REQUEST_VERSION


def test_ballots() -> None:
    """A block that was never used needs no checksum; flags are outside it."""
    used = Dblock(mbal=2007, bal=2007, inp=7, inp2=1, inp3=99, lver=3).summed()
    for block in (sectors.NO_DBLOCK, used, replace(used, flags=sectors.RELEASED)):
        assert code(sectors.check_dblock, block) is None
    assert replace(used, flags=sectors.RELEASED).released
    assert not used.released
    assert not used.unused
    for change in ({"lver": 4}, {"checksum": 0}, {"inp2": 2}):
        assert code(sectors.check_dblock, replace(used, **change)) is Result.DBLOCK_CHECKSUM
    for name in ("checksum", "mbal", "bal", "inp", "lver"):
        assert code(sectors.check_dblock, Dblock(**{name: 1})) is Result.DBLOCK_CHECKSUM


@pytest.mark.parametrize(
    "change",
    [{"sector_size": 4096}, {"offset": 2 * MIB}, {"flags": 8}, {"max_resources": 16001}],
    ids=lambda change: next(iter(change)),
)
def test_an_index_that_does_not_fit_its_place(change: dict[str, int]) -> None:
    """The header repeats the geometry and its own place."""
    assert code(check_index, replace(INDEX, **change)) is Result.INDEX_DAMAGED


def test_where_an_error_was_found() -> None:
    """The sentence names the sector and its area as soon as they are known."""
    error = RecordError(Result.LEADER_CHECKSUM, "the record is damaged")
    assert str(error) == "the record is damaged (-229)"
    placed = error.at("/dev/leases at byte 1048576", 3)
    assert str(placed) == "sector 3 of /dev/leases at byte 1048576: the record is damaged (-229)"
    assert (placed.result, placed.sector) == (Result.LEADER_CHECKSUM, 3)
    with pytest.raises(RecordError, match=r"'other\\xff', not 'space'"):
        check_delta(replace(DELTA, space_field=sectors.name_field(b"other\xff")))


# --- geometry


def test_geometries() -> None:
    """The five, by sizes and by flags, and no other."""
    for shape in GEOMETRIES:
        assert geometry(shape.sector_size, shape.area_size) is shape
        assert geometry_of_flags(shape.sector_size, shape.flag) is shape
        assert geometry_of_flags(shape.sector_size, shape.flag | sectors.SHORT_HOLD) is shape
        assert shape.index_flag == shape.area_size // MIB
    for sizes in ((512, 2 * MIB), (1024, MIB), (4096, 16 * MIB), (0, 0)):
        with pytest.raises(RecordError, match="do not go together") as caught:
            geometry(*sizes)
        assert caught.value.result is Result.BAD_GEOMETRY
    assert [str(shape) for shape in GEOMETRIES[:2]] == [
        "sectors of 512, areas of 1 MiB",
        "sectors of 4096, areas of 1 MiB",
    ]
    assert [shape.index_resources_max for shape in GEOMETRIES] == [16000, 16000, 32000, 64000, 128000]


def test_flags_of_older_writers() -> None:
    """Without an align flag the sector size decides."""
    assert geometry_of_flags(512, 0) is GEOMETRIES[0]
    assert geometry_of_flags(4096, 0) is GEOMETRIES[-1]


@pytest.mark.parametrize(
    ("sector_size", "flags", "expected"),
    [
        (512, 0x20, Result.BAD_GEOMETRY),
        (512, 0x80, Result.BAD_GEOMETRY),
        (4096, 0x30, Result.BAD_GEOMETRY),
        (4096, 0xF0, Result.BAD_GEOMETRY),
        (0, 0x10, Result.LEADER_SECTOR_SIZE),
        (1 << 31, 0, Result.LEADER_SECTOR_SIZE),
    ],
)
def test_flags_that_state_nothing_legal(sector_size: int, flags: int, expected: Result) -> None:
    """No size is guessed."""
    with pytest.raises(RecordError) as caught:
        geometry_of_flags(sector_size, flags)
    assert caught.value.result is expected


# --- names, bitmaps, used sectors


def test_names() -> None:
    """48 bytes at most, without a NUL when exactly 48; compared up to the first NUL."""
    full = bytes(range(1, 49))
    assert sectors.name_field(full) == full
    assert sectors.name_in(full) == full
    assert sectors.name_field(b"") == bytes(48)
    assert sectors.name_in(bytes(48)) == b""
    for wrong in (bytes(range(1, 50)), b"a\0b"):
        with pytest.raises(ValueError, match="no name"):
            sectors.name_field(wrong)


def test_the_tail_of_a_longer_former_name_stays() -> None:
    """As sanlock writes a host name over another; the name read is the new one."""
    former = sectors.name_field(b"a-rather-long-name")
    field = sectors.name_field(b"short", former)
    assert field == b"short\0" + b"-rather-long-name"[5:].ljust(42, b"\0")
    assert sectors.name_in(field) == b"short"
    assert sectors.name_field(b"x" * 48, former) == b"x" * 48
    assert sectors.name_field(b"x" * 47, b"y" * 48) == b"x" * 47 + b"\0"


def test_shown_names() -> None:
    """Bytes that are no text are escaped."""
    assert sectors.shown("hé".encode()) == "'hé'"
    assert sectors.shown(b"\xff") == "'\\xff'"


def test_bitmaps() -> None:
    """Bit h - 1, least significant first."""
    bitmap = sectors.bitmap_with(frozenset({1, 8, 9, 2000}))
    assert (bitmap[0], bitmap[1], bitmap[249]) == (0x81, 0x01, 0x80)
    assert [host_id for host_id in range(1, 2001) if sectors.in_bitmap(bitmap, host_id)] == [1, 8, 9, 2000]
    sector = sectors.encode_delta(DELTA, bitmap)
    assert len(sector) == 512
    assert sectors.bitmap_of(sector) == bitmap
    assert sectors.bitmap_of(memoryview(bytes(512) + sector), 512) == bitmap
    assert sectors.bitmap_of(sectors.encode_delta(DELTA)) == bytes(256)


@pytest.mark.parametrize("shape", GEOMETRIES, ids=str)
def test_used_hosts(shape: Geometry) -> None:
    """Only sectors with a record come, in order, first and last included; runs of zeros are skipped."""
    leader = sectors.new_leader(shape, SPACE, NAME)
    area = bytearray(sectors.new_resource(leader))
    assert list(sectors.used_hosts(bytes(area), shape.sector_size, shape.hosts_max)) == []
    record = sectors.HostRecord(Dblock(mbal=1).summed(), sectors.ModeBlock(sectors.SHARED, 5))
    run = (64 << 10) // shape.sector_size
    used = sorted({1, 2, run - 1, run, run + 1, shape.hosts_max - 1, shape.hosts_max})
    for host_id in used:
        at = sectors.host_sector(host_id) * shape.sector_size
        area[at : at + shape.sector_size] = record.encode(shape.sector_size)
    found = list(sectors.used_hosts(bytes(area), shape.sector_size, shape.hosts_max))
    assert found == [(host_id, record) for host_id in used]
    assert record.mode.shared
    few = list(sectors.used_hosts(bytes(area[: 4 * shape.sector_size]), shape.sector_size, 2))
    assert [host_id for host_id, _ in few] == [1, 2]


def test_junk_beside_the_records_is_no_host() -> None:
    """A sector in which only meaningless bytes are set counts as never used."""
    area = bytearray(sectors.new_resource(PAXOS))
    for at in (56, 127, 132, 144, 511):
        area[sectors.host_sector(3) * 512 + at] = 0xFF
    assert list(sectors.used_hosts(bytes(area), 512, 2000)) == []


def test_index_entries() -> None:
    """Sixty-four bytes each, from the sector after the header on."""
    assert [sectors.entry_place(number, 512) for number in (0, 7, 8)] == [(1, 0), (1, 448), (2, 0)]
    assert [sectors.entry_place(number, 4096) for number in (0, 63, 64)] == [(1, 0), (1, 4032), (2, 0)]
    assert sectors.entry_area(0, GEOMETRIES[-1], 8 * MIB) == 24 * MIB
    assert sectors.FREE_ENTRY.encode() == bytes(64)


def test_new_resource_for_few_hosts() -> None:
    """The number of hosts is stated; the ballot step stays the geometry's."""
    leader = sectors.new_leader(GEOMETRIES[2], SPACE, NAME, 16)
    assert (leader.num_hosts, leader.max_hosts) == (16, 500)
    assert leader.intact


@pytest.mark.parametrize("shape", GEOMETRIES, ids=str)
def test_the_part_of_a_resource_that_is_written(shape: Geometry) -> None:
    """Up to and with the last host's sector; all beyond it is zero."""
    for num_hosts in (1, 16, shape.hosts_max):
        leader = sectors.new_leader(shape, SPACE, NAME, num_hosts)
        prefix = sectors.resource_prefix(leader)
        assert len(prefix) == (2 + num_hosts) * shape.sector_size
        assert sectors.new_resource(leader) == prefix.ljust(shape.area_size, b"\0")
