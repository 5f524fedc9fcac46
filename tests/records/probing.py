"""Everything a reader does with a sector of unknown content, for the property tests and the fuzzer."""

from __future__ import annotations

import contextlib

from lockfs.records import sectors
from lockfs.records.describe import describe_area
from lockfs.records.geometry import FILE_GEOMETRY, GEOMETRIES, MIB
from lockfs.records.results import RecordError

HOST_ID = 7


def probe(sector: bytes) -> None:
    """Decode and check 512 bytes as every record there is; fails if anything but RecordError comes out."""
    leader = sectors.decode_leader(sector)
    names = {leader.space_name, b"images"}
    for space in names:
        _try(sectors.check_delta, leader, space)
        for name in (leader.resource_name, b"disk-1"):
            _try(sectors.check_paxos, leader, space, name, HOST_ID)
    with contextlib.suppress(RecordError):
        assert leader.geometry in GEOMETRIES
    record = sectors.decode_host(sector)
    _try(sectors.check_dblock, record.dblock)
    assert record.encode(512)[:56] == sector[:56]
    _try(sectors.check_request, sectors.decode_request(sector))
    header = sectors.decode_index(sector)
    _try(sectors.check_index, header, FILE_GEOMETRY, sectors.name_in(header.space_field), header.offset)
    bitmap = sectors.bitmap_of(sector)
    assert sectors.bitmap_with(frozenset(h for h in range(1, 2049) if sectors.in_bitmap(bitmap, h))) == bitmap
    for at in range(0, 512, sectors.INDEX_ENTRY_BYTES):
        sectors.decode_entry(sector, at)
    assert leader.encode() == sector[:200]
    _describe(sector)


def _try(check: object, *arguments: object) -> None:
    assert callable(check)
    with contextlib.suppress(RecordError):
        check(*arguments)


def _describe(sector: bytes) -> None:
    """The sector as the first of an area, and as one amid a right one of each kind."""
    describe_area(sector, 0)
    new = sectors.new_leader(FILE_GEOMETRY, b"images", b"disk-1")
    index = sectors.new_index(FILE_GEOMETRY, b"images", MIB, 4)
    for head in (
        sectors.encode_leader(new),
        index.encode(),
        sectors.encode_delta(sectors.new_delta(FILE_GEOMETRY, b"images", 10)),
    ):
        for place in (1, 2):
            area = head + bytes(512 * (place - 1)) + sector + bytes(512)
            found = describe_area(area, MIB)
            assert found is not None
            assert all(damage.sector < FILE_GEOMETRY.hosts_max + 2 for damage in found.damage)
