"""Every record of a lease area: encoded, decoded and checked. No other module knows an offset.

The formats are sanlock 3.8's (docs/paxos-format.md); all integers are little-endian. Decoding checks nothing
but lengths; `check_*` raises. Bytes outside the records carry no meaning and need not be zero.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter

import crc32c

from lockfs.records.geometry import Geometry, geometry_of_flags
from lockfs.records.results import RecordError, Result
from lockfs.records.zeros import used_sectors

NAME_BYTES = 48
DELTA_MAGIC, DELTA_VERSION = 0x12212010, 0x00030004
PAXOS_MAGIC, PAXOS_VERSION = 0x06152010, 0x00060004
CLEARED_MAGIC = 0x11282016
REQUEST_MAGIC, REQUEST_VERSION = 0x08292011, 0x00010001
INDEX_MAGIC, INDEX_VERSION = 0x01042018, 0x00010002
SHORT_HOLD = 0x1
RELEASED = 0x1
SHARED = 0x1
FORCE_KILL, FORCE_GRACEFUL = 1, 2
INDEX_LEASE_NAME = b"rindex_lease"
INDEX_RESOURCES_DEFAULT = 4096

LEADER_SECTOR = 0
REQUEST_SECTOR = 1

_LEADER = struct.Struct("<IIIIQQQQQ48s48sQQIHHQQQ")
_LEADER_SUMMED = 168
_DBLOCK = struct.Struct("<QQQQQQII")
_DBLOCK_SUMMED = 48
_MODE = struct.Struct("<I4xQ")
_MODE_OFFSET = 128
HOST_RECORD_BYTES = _MODE_OFFSET + _MODE.size
_REQUEST = struct.Struct("<IIQI")
_BITMAP_OFFSET, _BITMAP_BYTES = 256, 256
BITMAP_HOSTS = 8 * _BITMAP_BYTES
_INDEX_HEADER = struct.Struct("<IIIIIIQ48s")
_INDEX_ENTRY = struct.Struct("<QI4x48s")


def checksum(data: bytes) -> int:
    """CRC-32C from the register 0xFFFFFFFE without the final inversion: sanlock's own variety."""
    return ~crc32c.crc32c(data, 1) & 0xFFFFFFFF


def name_field(name: bytes, former: bytes = b"") -> bytes:
    """A name in its 48 bytes. What a longer former name left behind the final NUL stays, as sanlock has it.

    Raises:
        ValueError: too long, or with a NUL inside.
    """
    if len(name) > NAME_BYTES or b"\0" in name:
        raise ValueError(f"{name!r} is no name of at most {NAME_BYTES} bytes")
    return (name + b"\0" + former[len(name) + 1 :].ljust(NAME_BYTES, b"\0"))[:NAME_BYTES]


def name_in(field: bytes) -> bytes:
    """The name in a field: up to the first NUL."""
    return field.split(b"\0", 1)[0]


def host_sector(host_id: int) -> int:
    """The index, in a resource's area, of a host's sector; host ids count from 1."""
    return 1 + host_id


def delta_sector(host_id: int) -> int:
    """The index, in a lockspace's area, of a host's delta lease."""
    return host_id - 1


@dataclass(frozen=True)
class Leader:
    """The record of a delta lease, and of sector 0 of a paxos lease (200 bytes).

    In a delta lease `resource_field` has the owning host's name, and `write_*` a host event. `timestamp` is
    in whole seconds of the writer's own clock, 0 meaning free. `io_timeout` is in seconds.
    """

    magic: int
    version: int
    flags: int
    sector_size: int
    num_hosts: int
    max_hosts: int
    owner_id: int
    owner_generation: int
    lver: int
    space_field: bytes
    resource_field: bytes
    timestamp: int
    unused1: int = 0
    checksum: int = 0
    unused2: int = 0
    io_timeout: int = 0
    write_id: int = 0
    write_generation: int = 0
    write_timestamp: int = 0

    @property
    def space_name(self) -> bytes:
        """The lockspace's name."""
        return name_in(self.space_field)

    @property
    def resource_name(self) -> bytes:
        """The resource's name, or the owning host's in a delta lease."""
        return name_in(self.resource_field)

    @property
    def geometry(self) -> Geometry:
        """What the record states of its area; raises RecordError if that is nothing legal."""
        return geometry_of_flags(self.sector_size, self.flags)

    def encode(self) -> bytes:
        """The 200 bytes as they are, with the checksum the record carries."""
        return _LEADER.pack(*_leader_values(self))

    def summed(self) -> Leader:
        """The record with the checksum that its bytes have."""
        values = list(_leader_values(self))
        values[_LEADER_CHECKSUM] = checksum(_LEADER.pack(*values)[:_LEADER_SUMMED])
        return Leader(*values)

    @property
    def intact(self) -> bool:
        """Whether the checksum is right."""
        return self.checksum == checksum(self.encode()[:_LEADER_SUMMED])


_LEADER_FIELDS = tuple(Leader.__dataclass_fields__)
_LEADER_CHECKSUM = _LEADER_FIELDS.index("checksum")
_leader_values = attrgetter(*_LEADER_FIELDS)  # once for all fields: an acquisition makes a dozen of these


def decode_leader(sector: bytes | memoryview) -> Leader:
    """The leader record at the start of a sector."""
    return Leader(*_LEADER.unpack_from(sector))


def check_delta(leader: Leader, space_name: bytes) -> None:
    """Refuse what is no delta lease of this lockspace, in sanlock's order of checks.

    Raises:
        RecordError: magic, version, lockspace name, checksum.
    """
    if leader.magic != DELTA_MAGIC:
        raise RecordError(Result.LEADER_MAGIC, "no delta lease is there")
    _check_version(leader, DELTA_VERSION)
    _check_space(leader, space_name)
    _check_sum(leader)


def check_paxos(leader: Leader, space_name: bytes, resource_name: bytes, host_id: int) -> None:
    """Refuse what is no paxos lease of this name for this host, in sanlock's order of checks.

    Last comes what sanlock leaves out: more hosts than the area has sectors for would make a reader take the
    neighbouring area's records for ballots.

    Raises:
        RecordError: magic (also of a lease that was cleared), version, names, number of hosts, checksum,
            geometry.
    """
    if leader.magic == CLEARED_MAGIC:
        raise RecordError(Result.LEADER_MAGIC, "the lease there was removed")
    if leader.magic != PAXOS_MAGIC:
        raise RecordError(Result.LEADER_MAGIC, "no paxos lease is there")
    _check_version(leader, PAXOS_VERSION)
    _check_space(leader, space_name)
    if leader.resource_name != resource_name:
        raise RecordError(
            Result.LEADER_RESOURCE_NAME,
            f"the lease there is of {shown(leader.resource_name)}, not of {shown(resource_name)}",
        )
    if leader.num_hosts < host_id:
        raise RecordError(
            Result.LEADER_NUM_HOSTS, f"the lease is for host ids up to {leader.num_hosts}, not {host_id}"
        )
    _check_sum(leader)
    _check_hosts(leader)


def check_leader(leader: Leader) -> None:
    """Refuse what is no intact paxos lease, whosever it is; one that was removed passes.

    Raises:
        RecordError: magic, version, checksum, geometry, number of hosts.
    """
    if leader.magic not in (PAXOS_MAGIC, CLEARED_MAGIC):
        raise RecordError(Result.LEADER_MAGIC, "no paxos lease is there")
    _check_version(leader, PAXOS_VERSION)
    _check_sum(leader)
    _check_hosts(leader)


def _check_hosts(leader: Leader) -> None:
    if not leader.num_hosts <= leader.max_hosts <= leader.geometry.hosts_max or not leader.num_hosts:
        raise RecordError(
            Result.LEADER_INCONSISTENT, f"{leader.num_hosts} of {leader.max_hosts} hosts are stated"
        )


def _check_version(leader: Leader, ours: int) -> None:
    if leader.version >> 16 != ours >> 16:
        raise RecordError(
            Result.LEADER_VERSION, f"its format is version {leader.version >> 16}, not {ours >> 16}"
        )


def _check_space(leader: Leader, space_name: bytes) -> None:
    if leader.space_name != space_name:
        raise RecordError(
            Result.LEADER_SPACE_NAME,
            f"it belongs to lockspace {shown(leader.space_name)}, not {shown(space_name)}",
        )


def _check_sum(leader: Leader) -> None:
    if not leader.intact:
        raise RecordError(Result.LEADER_CHECKSUM, "the record is damaged: its checksum is wrong")


def shown(name: bytes) -> str:
    """A name for people, quoted, undecodable bytes escaped."""
    return "'" + name.decode("utf-8", "backslashreplace") + "'"


@dataclass(frozen=True)
class Dblock:
    """A host's ballot in a lease (56 bytes); `inp*` are the proposed owner: id, generation, timestamp."""

    mbal: int = 0
    bal: int = 0
    inp: int = 0
    inp2: int = 0
    inp3: int = 0
    lver: int = 0
    checksum: int = 0
    flags: int = 0

    def encode(self) -> bytes:
        """The 56 bytes as they are, with the checksum the record carries."""
        return _DBLOCK.pack(
            self.mbal, self.bal, self.inp, self.inp2, self.inp3, self.lver, self.checksum, self.flags
        )

    def summed(self) -> Dblock:
        """The record with the checksum that its bytes have; the flags are outside it."""
        summed = checksum(self.encode()[:_DBLOCK_SUMMED])
        return Dblock(self.mbal, self.bal, self.inp, self.inp2, self.inp3, self.lver, summed, self.flags)

    @property
    def unused(self) -> bool:
        """Whether it was never written: then it needs no checksum."""
        return not (self.checksum or self.mbal or self.bal or self.inp or self.lver)

    @property
    def intact(self) -> bool:
        """Whether the checksum is right, or the block was never used."""
        return self.unused or self.checksum == checksum(self.encode()[:_DBLOCK_SUMMED])

    @property
    def released(self) -> bool:
        """Whether the host says that it has let go of what this ballot won."""
        return bool(self.flags & RELEASED)


NO_DBLOCK = Dblock()


@dataclass(frozen=True)
class ModeBlock:
    """A host's shared hold of a paxos lease (16 bytes), with the generation it holds it in."""

    flags: int = 0
    generation: int = 0

    @property
    def shared(self) -> bool:
        """Whether the host holds the lease shared."""
        return bool(self.flags & SHARED)


NOT_SHARED = ModeBlock()


@dataclass(frozen=True)
class HostRecord:
    """What a host's sector in a resource holds."""

    dblock: Dblock = NO_DBLOCK
    mode: ModeBlock = NOT_SHARED

    def encode(self, sector_size: int) -> bytes:
        """The whole sector, zero outside the two records."""
        head = self.dblock.encode().ljust(_MODE_OFFSET, b"\0")
        return (head + _MODE.pack(self.mode.flags, self.mode.generation)).ljust(sector_size, b"\0")


UNUSED_HOST = HostRecord()


def decode_host(sector: bytes | memoryview, offset: int = 0) -> HostRecord:
    """The two records of a host's sector that starts at `offset` of the given bytes."""
    dblock = Dblock(*_DBLOCK.unpack_from(sector, offset))
    return HostRecord(dblock, ModeBlock(*_MODE.unpack_from(sector, offset + _MODE_OFFSET)))


def check_dblock(dblock: Dblock) -> None:
    """Refuse a damaged ballot.

    Raises:
        RecordError: DBLOCK_CHECKSUM.
    """
    if not dblock.intact:
        raise RecordError(Result.DBLOCK_CHECKSUM, "the ballot record is damaged: its checksum is wrong")


def used_hosts(
    area: bytes | memoryview, sector_size: int, num_hosts: int
) -> Iterator[tuple[int, HostRecord]]:
    """Those host records of a resource's first sectors that are not all zero, by host id.

    `area` starts at the leader and holds at least 2 + num_hosts sectors.
    """
    for sector in used_sectors(area, sector_size, host_sector(1), host_sector(num_hosts) + 1):
        record = decode_host(area, sector * sector_size)
        if record != UNUSED_HOST:
            yield sector - host_sector(0), record


@dataclass(frozen=True)
class Request:
    """The record by which a host asks the owner to let go of version `lver` - 1 (20 bytes)."""

    magic: int = REQUEST_MAGIC
    version: int = REQUEST_VERSION
    lver: int = 0
    force_mode: int = 0

    def encode(self, sector_size: int) -> bytes:
        """The whole sector."""
        packed = _REQUEST.pack(self.magic, self.version, self.lver, self.force_mode)
        return packed.ljust(sector_size, b"\0")


def decode_request(sector: bytes) -> Request:
    """The request record at the start of a sector."""
    return Request(*_REQUEST.unpack_from(sector))


def check_request(request: Request) -> None:
    """Refuse what is no request record.

    Raises:
        RecordError: REQUEST_MAGIC, REQUEST_VERSION.
    """
    if request.magic != REQUEST_MAGIC:
        raise RecordError(Result.REQUEST_MAGIC, "no request record is there")
    if request.version >> 16 != REQUEST_VERSION >> 16:
        raise RecordError(Result.REQUEST_VERSION, f"its format is version {request.version >> 16}, not 1")


def encode_delta(leader: Leader, bitmap: bytes = b"") -> bytes:
    """A whole delta sector: the record, the bitmap, zeros."""
    tail = bitmap.ljust(_BITMAP_BYTES, b"\0")
    return (leader.encode().ljust(_BITMAP_OFFSET, b"\0") + tail).ljust(leader.sector_size, b"\0")


def encode_leader(leader: Leader) -> bytes:
    """A whole sector 0 of a paxos lease."""
    return leader.encode().ljust(leader.sector_size, b"\0")


def bitmap_of(sector: bytes | memoryview, offset: int = 0) -> bytes:
    """The bitmap of a delta sector that starts at `offset` of the given bytes."""
    return bytes(sector[offset + _BITMAP_OFFSET : offset + _BITMAP_OFFSET + _BITMAP_BYTES])


def bitmap_with(host_ids: frozenset[int]) -> bytes:
    """A bitmap in which these hosts are told to look."""
    bitmap = bytearray(_BITMAP_BYTES)
    for host_id in host_ids:
        bitmap[(host_id - 1) // 8] |= 1 << (host_id - 1) % 8
    return bytes(bitmap)


def in_bitmap(bitmap: bytes, host_id: int) -> bool:
    """Whether a bitmap tells this host to look."""
    return bool(bitmap[(host_id - 1) // 8] >> (host_id - 1) % 8 & 1)


# Whole areas, as they are before any host used them


def new_delta(shape: Geometry, space_name: bytes, io_timeout: int) -> Leader:
    """The delta lease of every host in a new lockspace."""
    return Leader(
        magic=DELTA_MAGIC, version=DELTA_VERSION, flags=shape.flag, sector_size=shape.sector_size,
        num_hosts=0, max_hosts=1, owner_id=0, owner_generation=0, lver=0,
        space_field=name_field(space_name), resource_field=name_field(b""), timestamp=0,
        io_timeout=io_timeout,
    ).summed()  # fmt: skip


def new_lockspace(shape: Geometry, space_name: bytes, io_timeout: int) -> bytes:
    """A whole lockspace area. Written first with `uncommitted`, then its sector 0 as it is here."""
    sector = encode_delta(new_delta(shape, space_name, io_timeout))
    return (sector * shape.hosts_max).ljust(shape.area_size, b"\0")


def uncommitted(area: bytes) -> bytes:
    """The area with the magic number of its first sector missing, so that a torn write shows."""
    return bytes(4) + area[4:]


def new_leader(
    shape: Geometry,
    space_name: bytes,
    resource_name: bytes,
    num_hosts: int = 0,
    *,
    cleared_at: int | None = None,
) -> Leader:
    """The leader of a new resource for `num_hosts` hosts (0: all that fit), or of one that is removed."""
    return Leader(
        magic=PAXOS_MAGIC if cleared_at is None else CLEARED_MAGIC, version=PAXOS_VERSION, flags=shape.flag,
        sector_size=shape.sector_size, num_hosts=num_hosts or shape.hosts_max, max_hosts=shape.hosts_max,
        owner_id=0, owner_generation=0, lver=0, space_field=name_field(space_name),
        resource_field=name_field(resource_name), timestamp=0, write_timestamp=cleared_at or 0,
    ).summed()  # fmt: skip


def new_resource(leader: Leader) -> bytes:
    """A whole resource area with this leader, which nobody holds and nobody asks for."""
    head = encode_leader(leader) + Request().encode(leader.sector_size)
    return head.ljust(leader.geometry.area_size, b"\0")


def resource_prefix(leader: Leader) -> bytes:
    """As much of a new resource's area as its hosts will ever write; the rest may stay a hole."""
    return new_resource(leader)[: (host_sector(leader.num_hosts) + 1) * leader.sector_size]


@dataclass(frozen=True)
class IndexHeader:
    """The header of a resource index (80 bytes); `offset` is the index's own place on the device."""

    magic: int
    version: int
    flags: int
    sector_size: int
    max_resources: int
    unused: int
    offset: int
    space_field: bytes

    def encode(self) -> bytes:
        """The whole sector."""
        packed = _INDEX_HEADER.pack(*(getattr(self, name) for name in _INDEX_FIELDS))
        return packed.ljust(self.sector_size, b"\0")


_INDEX_FIELDS = tuple(IndexHeader.__dataclass_fields__)


def new_index(shape: Geometry, space_name: bytes, offset: int, max_resources: int) -> IndexHeader:
    """The header of a new index."""
    return IndexHeader(
        INDEX_MAGIC, INDEX_VERSION, shape.index_flag, shape.sector_size, max_resources, 0, offset,
        name_field(space_name),
    )  # fmt: skip


def decode_index(sector: bytes) -> IndexHeader:
    """The index header at the start of a sector."""
    return IndexHeader(*_INDEX_HEADER.unpack_from(sector))


def check_index(header: IndexHeader, shape: Geometry, space_name: bytes, offset: int) -> None:
    """Refuse what is no resource index of this lockspace at this place.

    Raises:
        RecordError: INDEX_MAGIC, INDEX_VERSION, LEADER_SPACE_NAME, INDEX_DAMAGED.
    """
    if header.magic != INDEX_MAGIC:
        raise RecordError(Result.INDEX_MAGIC, "no resource index is there")
    if header.version >> 16 != INDEX_VERSION >> 16:
        raise RecordError(Result.INDEX_VERSION, f"its format is version {header.version >> 16}, not 1")
    if name_in(header.space_field) != space_name:
        problem = f"it belongs to lockspace {shown(name_in(header.space_field))}, not {shown(space_name)}"
        raise RecordError(Result.LEADER_SPACE_NAME, problem)
    stated = (header.flags, header.sector_size, header.offset)
    if stated != (shape.index_flag, shape.sector_size, offset):
        raise RecordError(Result.INDEX_DAMAGED, f"it states {stated}, which does not fit its place")
    if not 0 < header.max_resources <= shape.index_resources_max:
        raise RecordError(Result.INDEX_DAMAGED, f"it states {header.max_resources} resources")


@dataclass(frozen=True)
class IndexEntry:
    """One resource in an index (64 bytes): where its area starts (0: the entry is free), and its name."""

    offset: int = 0
    flags: int = 0
    name_field: bytes = bytes(NAME_BYTES)

    def encode(self) -> bytes:
        """The 64 bytes."""
        return _INDEX_ENTRY.pack(self.offset, self.flags, self.name_field)

    @property
    def name(self) -> bytes:
        """The resource's name."""
        return name_in(self.name_field)


INDEX_ENTRY_BYTES = _INDEX_ENTRY.size
FREE_ENTRY = IndexEntry()


def decode_entry(data: bytes, at: int) -> IndexEntry:
    """The index entry at a byte offset."""
    return IndexEntry(*_INDEX_ENTRY.unpack_from(data, at))


def entry_place(number: int, sector_size: int) -> tuple[int, int]:
    """Where in the index area entry `number` (from 0) lies: its sector, and the byte within it."""
    byte = sector_size + number * INDEX_ENTRY_BYTES
    return byte // sector_size, byte % sector_size


def entry_area(number: int, shape: Geometry, index_offset: int) -> int:
    """The byte offset on the device of the resource of entry `number`: behind the index and its own lease."""
    return index_offset + (2 + number) * shape.area_size
