"""Whatever bytes a sector holds, it is decoded, and accepted or refused; nothing else ever happens."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lockfs.records import sectors
from lockfs.records.geometry import FILE_GEOMETRY, GEOMETRIES, MIB
from lockfs.records.results import RecordError
from lockfs.records.sectors import (
    Dblock,
    HostRecord,
    IndexEntry,
    IndexHeader,
    Leader,
    ModeBlock,
    Request,
)
from tests.records.loading import load
from tests.records.probing import probe

U16, U32, U64 = (st.integers(0, (1 << bits) - 1) for bits in (16, 32, 64))
NAME_FIELDS = st.binary(min_size=48, max_size=48)
SIZES = st.sampled_from([512, 4096])


def _record(kind: type, **special: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.builds(kind, **{field.name: special.get(field.name, U64) for field in fields(kind)})


LEADERS = _record(
    Leader, magic=U32, version=U32, flags=U32, sector_size=SIZES, space_field=NAME_FIELDS,
    resource_field=NAME_FIELDS, checksum=U32, unused2=U16, io_timeout=U16,
)  # fmt: skip
DBLOCKS = _record(Dblock, checksum=U32, flags=U32)
HOSTS = st.builds(HostRecord, DBLOCKS, _record(ModeBlock, flags=U32))
REQUESTS = _record(Request, magic=U32, version=U32, force_mode=U32)
HEADERS = _record(
    IndexHeader, magic=U32, version=U32, flags=U32, sector_size=SIZES, max_resources=U32, unused=U32,
    space_field=NAME_FIELDS,
)  # fmt: skip
ENTRIES = _record(IndexEntry, flags=U32, name_field=NAME_FIELDS)


@given(LEADERS, st.binary(max_size=256))
def test_leaders_come_back(leader: Leader, bitmap: bytes) -> None:
    """A leader, alone or with a bitmap behind it."""
    sector = sectors.encode_leader(leader)
    assert len(sector) == leader.sector_size
    assert sectors.decode_leader(sector) == leader
    delta = sectors.encode_delta(leader, bitmap)
    assert len(delta) == leader.sector_size
    assert sectors.decode_leader(delta) == leader
    assert sectors.bitmap_of(delta) == bitmap.ljust(256, b"\0")
    assert leader.summed().intact
    assert sectors.decode_leader(leader.summed().encode()).intact


@given(HOSTS, SIZES)
def test_host_records_come_back(record: HostRecord, size: int) -> None:
    """A ballot and a mode block."""
    sector = record.encode(size)
    assert len(sector) == size
    assert sectors.decode_host(sector) == record
    assert sectors.decode_host(memoryview(bytes(size) + sector), size) == record
    assert record.dblock.summed().intact


@given(REQUESTS, SIZES)
def test_requests_come_back(request: Request, size: int) -> None:
    """A request."""
    assert len(request.encode(size)) == size
    assert sectors.decode_request(request.encode(size)) == request


@given(HEADERS, ENTRIES)
def test_index_records_come_back(header: IndexHeader, entry: IndexEntry) -> None:
    """A header and an entry."""
    assert len(header.encode()) == header.sector_size
    assert sectors.decode_index(header.encode()) == header
    assert sectors.decode_entry(b"x" * 64 + entry.encode(), 64) == entry
    assert entry.name == entry.name_field.split(b"\0")[0]


@given(st.frozensets(st.integers(1, 2000)))
def test_bitmaps_come_back(host_ids: frozenset[int]) -> None:
    """A set of hosts."""
    bitmap = sectors.bitmap_with(host_ids)
    assert {host_id for host_id in range(1, 2001) if sectors.in_bitmap(bitmap, host_id)} == host_ids


@given(st.binary(max_size=48).filter(lambda name: b"\0" not in name), NAME_FIELDS)
def test_names_come_back(name: bytes, former: bytes) -> None:
    """A name, whatever was in its field before."""
    field = sectors.name_field(name, former)
    assert len(field) == 48
    assert sectors.name_in(field) == name


_HEADS = [load(name).kept[:512] for name in ("ls-joined-512-1M", "res-shared-h1-h2-512-1M", "rindex-512-1M")]


_CHANGES = st.lists(st.tuples(st.integers(0, 511), st.integers(0, 255)), max_size=4)


@settings(max_examples=300, deadline=None)
@example(b"\xff" * 512, [])
@example(b"\0" * 512, [])
@given(st.one_of(st.binary(min_size=512, max_size=512), st.sampled_from(_HEADS)), _CHANGES)
def test_random_bytes_are_accepted_or_refused(sector: bytes, changes: list[tuple[int, int]]) -> None:
    """No error but RecordError comes out of a check, whatever a sector holds."""
    changed = bytearray(sector)
    for at, value in changes:
        changed[at] = value
    probe(bytes(changed))


def _flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.mark.parametrize("shape", GEOMETRIES, ids=str)
def test_one_wrong_bit_of_a_leader_is_noticed(shape: Any) -> None:
    """Every bit that the checksum covers, and the checksum's own."""
    space, name = b"images", b"disk-1"
    held = replace(
        sectors.new_leader(shape, space, name), owner_id=3, owner_generation=2, lver=9, timestamp=5
    ).summed()
    delta = replace(
        sectors.new_delta(shape, space, 10), owner_id=3, owner_generation=2, timestamp=77,
        resource_field=sectors.name_field(b"host3"),
    ).summed()  # fmt: skip
    for bit in range(172 * 8):
        with pytest.raises(RecordError):
            sectors.check_paxos(sectors.decode_leader(_flipped(held.encode(), bit)), space, name, 3)
        with pytest.raises(RecordError):
            sectors.check_delta(sectors.decode_leader(_flipped(delta.encode(), bit)), space)


def test_one_wrong_bit_of_a_ballot_is_noticed() -> None:
    """Every bit that the checksum covers, and the checksum's own."""
    encoded = Dblock(mbal=2003, bal=2003, inp=3, inp2=2, inp3=5, lver=9).summed().encode()
    for bit in range(52 * 8):
        changed = sectors.decode_host(_flipped(encoded, bit).ljust(512, b"\0")).dblock
        with pytest.raises(RecordError):
            sectors.check_dblock(changed)


def test_one_set_bit_of_an_unused_ballot() -> None:
    """It is noticed too, but for the two words that mean nothing without a proposed owner, as in sanlock."""
    meaningless = range(24 * 8, 40 * 8)
    for bit in range(52 * 8):
        record = sectors.decode_host(_flipped(bytes(512), bit))
        assert record.dblock.intact is (bit in meaningless)


@settings(max_examples=300)
@given(st.integers(0, 171), st.integers(1, 255), st.integers(0, 4))
def test_one_wrong_byte_of_a_leader_is_noticed(at: int, change: int, which: int) -> None:
    """Bursts of up to eight bits, which a CRC finds too."""
    encoded = bytearray(sectors.new_leader(GEOMETRIES[which], b"images", b"disk-1").encode())
    encoded[at] ^= change
    with pytest.raises(RecordError):
        sectors.check_paxos(sectors.decode_leader(bytes(encoded)), b"images", b"disk-1", 1)


@given(st.integers(0, 80 * 8 - 1))
def test_one_wrong_bit_of_an_index_header(bit: int) -> None:
    """It has no checksum: what is still accepted differs only in what nobody relies on, or is refused."""
    header = sectors.new_index(FILE_GEOMETRY, b"images", MIB, 4096)
    changed = sectors.decode_index(_flipped(header.encode(), bit))
    try:
        sectors.check_index(changed, FILE_GEOMETRY, b"images", MIB)
    except RecordError:
        return
    free = {"version": changed.version, "unused": changed.unused, "max_resources": changed.max_resources}
    assert replace(header, space_field=changed.space_field, **free) == changed
    assert sectors.name_in(changed.space_field) == b"images"
    assert changed.version >> 16 == 1
    assert 0 < changed.max_resources <= FILE_GEOMETRY.index_resources_max
