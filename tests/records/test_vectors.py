"""What sanlock wrote is understood as it meant it, and would be written here byte for byte the same."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from lockfs.records import sectors
from lockfs.records.geometry import GEOMETRIES, MIB
from lockfs.records.sectors import (
    INDEX_ENTRY_BYTES,
    bitmap_of,
    check_dblock,
    check_delta,
    check_index,
    check_paxos,
    check_request,
    decode_entry,
    decode_host,
    decode_index,
    decode_leader,
    decode_request,
    encode_delta,
    encode_leader,
    in_bitmap,
    new_index,
    new_leader,
    new_lockspace,
    new_resource,
    uncommitted,
)
from tests.records.loading import (
    NAMES,
    RECORD_RANGES,
    Vector,
    fields_of_host,
    fields_of_leader,
    fields_of_request,
    load,
    trace,
)

AREAS = tuple(name for name in NAMES if load(name).is_area)
JUNK = "dblock-convert-garbage-512"
# Padding of the request record that sanlock did not clear when it made the lease of an index.
STALE_PADDING = {("rindex-internal-lease-512-1M", "request"): [20, 21, 22, 23]}
PIECES = ("delta-event-512", JUNK, "leader-short-hold-512", "res-request-512", "rindex-512-1M")


def records_of(data: bytes, kind: str) -> bytes:
    """The sector with everything outside its records zero."""
    kept = bytearray(len(data))
    for start, end in RECORD_RANGES[kind]:
        kept[start:end] = data[start:end]
    return bytes(kept)


def hosts_of(bitmap: bytes) -> list[int]:
    """The hosts that a bitmap names."""
    return [host_id for host_id in range(1, 2001) if in_bitmap(bitmap, host_id)]


def again(data: bytes, kind: str) -> tuple[dict[str, Any], bytes]:
    """A sector's fields, and the sector encoded anew from what was decoded."""
    if kind == "request":
        request = decode_request(data)
        check_request(request)
        return fields_of_request(request), request.encode(len(data))
    if kind == "dblock":
        record = decode_host(data)
        check_dblock(record.dblock)
        return fields_of_host(record), record.encode(len(data))
    leader = decode_leader(data)
    fields = fields_of_leader(leader)
    if kind == "leader":
        return fields, encode_leader(leader)
    check_delta(leader, leader.space_name)
    bitmap = bitmap_of(data)
    return {**fields, "bitmap_hosts": hosts_of(bitmap)}, encode_delta(leader, bitmap)


def test_every_vector_is_looked_at() -> None:
    """A vector that no test knows is an omission."""
    assert {*AREAS, *PIECES} == set(NAMES)


@pytest.mark.parametrize("name", AREAS)
def test_area(name: str) -> None:
    """Every kept sector of an area has the documented fields, and encodes to the same bytes."""
    vector = load(name)
    stated = {entry["sector"]: entry["fields"] for entry in vector.about["decoded"]}
    assert len(stated) == len(vector.about["sectors"])
    for number, entry in enumerate(vector.about["sectors"]):
        data = vector.sector(number)
        assert hashlib.sha256(data).hexdigest() == entry["sha256"]
        fields, encoded = again(data, entry["kind"])
        assert fields == stated[entry["sector"]]
        assert encoded == records_of(data, entry["kind"])
        junk = [at for at in range(len(data)) if encoded[at] != data[at]]
        assert set(junk) <= set(STALE_PADDING.get((name, entry["kind"]), []))


@pytest.mark.parametrize("name", AREAS)
def test_area_is_rebuilt(name: str) -> None:
    """The sectors put in their places are the area that sanlock wrote."""
    vector = load(name)
    assert hashlib.sha256(vector.area()).hexdigest() == vector.about["area_sha256"]


@pytest.mark.parametrize("name", AREAS)
def test_leader_as_sanlock_prints_it(name: str) -> None:
    """Where sanlock itself prints a leader, it says the same (its extra1..3 are write_*)."""
    vector = load(name)
    area = vector.area()
    for printed in vector.about["sanlock_read_leader"]:
        number = sectors.delta_sector(printed["host_id"]) if "host_id" in printed else sectors.LEADER_SECTOR
        fields = fields_of_leader(decode_leader(area[number * vector.sector_size :]))
        extra = {"extra1": "write_id", "extra2": "write_generation", "extra3": "write_timestamp"}
        for name_there, value in printed["fields"].items():
            assert fields[extra.get(name_there, name_there)] == value


@pytest.mark.parametrize("name", [name for name in AREAS if load(name).about["kind"] == "resource"])
def test_used_hosts_of_a_resource(name: str) -> None:
    """Exactly the hosts with a kept sector are found, with the same records."""
    vector = load(name)
    stated = {
        entry["host_id"]: entry["fields"] for entry in vector.about["decoded"] if entry["kind"] == "dblock"
    }
    hosts = sectors.used_hosts(vector.area(), vector.sector_size, vector.shape.hosts_max)
    assert {host_id: fields_of_host(record) for host_id, record in hosts} == stated


def _expected_new(vector: Vector) -> bytes:
    fields = vector.about["decoded"][0]["fields"]
    space = fields["space_name"].encode()
    if vector.about["kind"] == "lockspace":
        return new_lockspace(vector.shape, space, fields["io_timeout"])
    cleared = fields["write_timestamp"] if fields["magic"] == sectors.CLEARED_MAGIC else None
    name = fields["resource_name"].encode()
    return new_resource(new_leader(vector.shape, space, name, fields["num_hosts"], cleared_at=cleared))


@pytest.mark.parametrize(
    "name", [name for name in AREAS if "-init-" in name or name.startswith(("libvirt", "res-cleared"))]
)
def test_new_areas(name: str) -> None:
    """A lockspace and a resource made here are those that sanlock and libvirt make."""
    assert _expected_new(load(name)) == load(name).area()


def test_new_areas_in_every_geometry() -> None:
    """The vectors have each geometry, both as a lockspace and as a resource."""
    for kind in ("ls", "res"):
        assert {load(name).shape for name in AREAS if name.startswith(f"{kind}-init")} == set(GEOMETRIES)


def test_uncommitted_lockspace() -> None:
    """The first of the two writes lacks nothing but the magic number of the first sector."""
    area = load("ls-init-512-1M").area()
    assert uncommitted(area)[:4] == bytes(4)
    assert uncommitted(area)[4:] == area[4:]


def test_delta_sector_with_an_event() -> None:
    """A host event and the bit that announces it."""
    vector = load("delta-event-512")
    fields, encoded = again(vector.kept, "delta")
    assert fields == {**vector.about["decoded"], "bitmap_hosts": vector.about["bitmap_hosts"]}
    assert encoded == vector.kept
    assert bitmap_of(vector.kept) == sectors.bitmap_with(frozenset(vector.about["bitmap_hosts"]))


def test_leader_in_the_middle_of_a_shared_acquire() -> None:
    """The flag that tells it from an exclusive one."""
    vector = load("leader-short-hold-512")
    fields, encoded = again(vector.kept, "leader")
    assert fields == vector.about["decoded"]
    assert encoded == vector.kept
    assert decode_leader(vector.kept).flags & sectors.SHORT_HOLD


def test_junk_outside_the_records() -> None:
    """Stale memory beside a ballot is no damage; the same records are written without it."""
    vector = load(JUNK)
    fields, encoded = again(vector.kept, "dblock")
    assert fields == vector.about["decoded"]
    assert encoded == records_of(vector.kept, "dblock")
    junk = [at for at in range(vector.sector_size) if vector.kept[at] != encoded[at]]
    assert junk == vector.about["nonzero_outside_records"]


def test_request() -> None:
    """A lease whose owner is asked to let go."""
    vector = load("res-request-512")
    leader, encoded = again(vector.sector(0), "leader")
    assert leader == {**vector.about["leader"], "checksum_ok": vector.about["leader_checksum_ok"]}
    assert encoded == vector.sector(0)
    request, encoded = again(vector.sector(1), "request")
    assert request == vector.about["request"]
    assert encoded == vector.sector(1)
    for number in (2, 3):
        assert again(vector.sector(number), "dblock")[1] == vector.sector(number)


def test_index() -> None:
    """A resource index after two creations and a deletion, its entries, and where their leases lie."""
    vector = load("rindex-512-1M")
    shape = GEOMETRIES[0]
    stated = vector.about["header"]
    header = decode_index(vector.sector(0))
    check_index(header, shape, stated["lockspace_name"].encode(), stated["rx_offset"])
    assert header.encode() == vector.sector(0)
    made = new_index(shape, stated["lockspace_name"].encode(), stated["rx_offset"], stated["max_resources"])
    assert made == header
    for entry in vector.about["entries"]:
        sector, byte = sectors.entry_place(entry["index"], shape.sector_size)
        data = vector.sector(sector)
        found = decode_entry(data, byte)
        assert (found.offset, found.flags, found.name.decode()) == (
            entry["res_offset"],
            entry["flags"],
            entry["name"],
        )
        assert found.encode() == data[byte : byte + INDEX_ENTRY_BYTES]
        if found.offset:
            assert found.offset == sectors.entry_area(entry["index"], shape, MIB)


def test_internal_lease_of_an_index() -> None:
    """The lease that guards an index is an ordinary one with a name of its own."""
    leader = decode_leader(load("rindex-internal-lease-512-1M").sector(0))
    check_paxos(leader, b"rxls", sectors.INDEX_LEASE_NAME, 1)


def _writes() -> list[Any]:
    operations = [operation for step in trace() for operation in step["ops"] if operation["op"] == "write"]
    return [pytest.param(one, id=f"{number}-{one['record']}") for number, one in enumerate(operations)]


@pytest.mark.parametrize("write", _writes())
def test_every_write_of_a_recorded_run(write: dict[str, Any]) -> None:
    """Each write of two sanlock hosts has the documented fields, and its records encode to the same bytes."""
    data = bytes.fromhex(write["data_hex"]).ljust(write["length"], b"\0")
    fields, encoded = again(data, write["record"])
    assert {name: fields[name] for name in write["decoded"]} == write["decoded"]
    assert encoded == records_of(data, write["record"])
