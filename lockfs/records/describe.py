"""Lease areas in words and numbers: what every record says, and which sectors are damaged.

For people and programs that look, not for the engine: nothing here refuses a record, everything wrong becomes
a `Damage`. Bytes outside the records are not looked at, since sanlock leaves stale memory there. Names are
text with undecodable bytes escaped; timestamps are seconds of the writing host's own clock. Whether a host
that is recorded as owner is alive cannot be seen in one look (docs/paxos-format.md, section 11).
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from lockfs.records import sectors
from lockfs.records.geometry import ALIGN_FLAGS, FILE_GEOMETRY, GEOMETRIES, Geometry, geometry_of_flags
from lockfs.records.results import RecordError
from lockfs.records.sectors import HostRecord, Leader

SECTOR_SIZES = (512, 4096)
LEAST_BYTES = 512
"""No record is told from less than this."""
_MAGIC = struct.Struct("<I")


@dataclass(frozen=True)
class Damage:
    """A sector, counted from the start of its area, that does not hold what belongs there, and why."""

    sector: int
    problem: str


@dataclass(frozen=True)
class HostEntry:
    """A delta lease that a host has or had. `timestamp` 0: it is free; `io_timeout` is in seconds.

    `event` is the host's last message to another (generation, event, data), `signals` the hosts told to look.
    """

    host_id: int
    name: str
    generation: int
    timestamp: int
    io_timeout: int
    event: tuple[int, int, int]
    signals: tuple[int, ...]


@dataclass(frozen=True)
class LockspaceArea:
    """A lockspace. `hosts` are the intact delta leases that were ever used, in order of host ids.

    `io_timeout` is that of the first delta lease that nobody ever had, as the lockspace was made with it; it
    decides how long the join of such a host id takes (None: there is none).
    """

    kind: str
    offset: int
    sector_size: int
    area_size: int
    lockspace: str
    hosts_max: int
    io_timeout: int | None
    hosts: tuple[HostEntry, ...]
    damage: tuple[Damage, ...]


@dataclass(frozen=True)
class Ballot:
    """What one host's sector of a lease says; `proposed` is an owner: host id, generation, timestamp."""

    host_id: int
    mbal: int
    bal: int
    proposed: tuple[int, int, int]
    lver: int
    released: bool
    shared: bool
    shared_generation: int


@dataclass(frozen=True)
class ResourceArea:
    """A paxos lease.

    `state` is one of "free", "exclusive" (by owner_id), "shared" (by the hosts whose ballots say so),
    "changing" (a shared acquire or a conversion is under way), "removed".
    """

    kind: str
    offset: int
    sector_size: int
    area_size: int
    lockspace: str
    name: str
    state: str
    num_hosts: int
    owner_id: int
    owner_generation: int
    lver: int
    timestamp: int
    written_by: tuple[int, int, int]
    request_lver: int
    request_mode: int
    ballots: tuple[Ballot, ...]
    damage: tuple[Damage, ...]


@dataclass(frozen=True)
class EntryInfo:
    """A used entry of an index: `offset` is the byte on the device at which the lease `name` lies."""

    number: int
    name: str
    offset: int


@dataclass(frozen=True)
class IndexArea:
    """The first area of a resource index; behind it lie its own lease and the areas it hands out."""

    kind: str
    offset: int
    sector_size: int
    area_size: int
    lockspace: str
    max_resources: int
    entries: tuple[EntryInfo, ...]
    damage: tuple[Damage, ...]


@dataclass(frozen=True)
class UnknownArea:
    """Bytes that are not zero and no lease area."""

    kind: str
    offset: int
    area_size: int
    damage: tuple[Damage, ...]


DescribedArea = LockspaceArea | ResourceArea | IndexArea | UnknownArea


@dataclass(frozen=True)
class Kind:
    """What an area's first sectors tell it to be, and its geometry as far as that can be told."""

    name: str
    shape: Geometry


def text(name: bytes) -> str:
    """A name as text."""
    return name.decode("utf-8", "backslashreplace")


def kind_of(head: bytes, guess: Geometry | None = None) -> Kind | None:
    """What kind of area begins with `head` (8 KiB tell most); None if none that is known.

    When the first sector is damaged the second one tells. `guess` stands in for sizes that are not readable.
    """
    magic = _magic(head, 0)
    if magic in (sectors.DELTA_MAGIC, sectors.PAXOS_MAGIC, sectors.CLEARED_MAGIC):
        leader = sectors.decode_leader(head)
        shape = _shape(leader.sector_size, leader.flags, _second(head), guess)
        return Kind("lockspace" if magic == sectors.DELTA_MAGIC else "resource", shape)
    if magic == sectors.INDEX_MAGIC:
        header = sectors.decode_index(head)
        return Kind("index", _shape(header.sector_size, header.flags << 4, None, guess))
    second = _second(head)
    if second is None:
        return None
    is_resource = _magic(head, second) == sectors.REQUEST_MAGIC
    leader = sectors.decode_leader(head if is_resource else head[second:])
    return Kind("resource" if is_resource else "lockspace", _shape(second, leader.flags, second, guess))


def _magic(data: bytes, at: int) -> int:
    return int(_MAGIC.unpack_from(data, at)[0])


def _second(head: bytes) -> int | None:
    """The sector size, told by where the second sector's record begins."""
    for size in SECTOR_SIZES:
        if len(head) >= size + LEAST_BYTES and _magic(head, size) in (
            sectors.DELTA_MAGIC,
            sectors.REQUEST_MAGIC,
        ):
            return size
    return None


def _shape(sector_size: int, flags: int, second: int | None, guess: Geometry | None) -> Geometry:
    """What is stated, if legal and as the second sector has it; else the guess likewise; else the usual."""
    if flags & ALIGN_FLAGS or guess is None:
        with contextlib.suppress(RecordError):
            stated = geometry_of_flags(sector_size, flags)
            if second in (None, stated.sector_size):
                return stated
    if guess is not None and second in (None, guess.sector_size):
        return guess
    return GEOMETRIES[-1] if second == GEOMETRIES[-1].sector_size else FILE_GEOMETRY


def describe_area(data: bytes, offset: int, guess: Geometry | None = None) -> DescribedArea | None:
    """What the area says whose bytes are `data`; None if all are zero.

    `offset` is its place on the device in bytes, `guess` the geometry where it states none that is legal.
    Fewer bytes than an area has are described as far as they go, and what is missing is a damage.

    Raises:
        ValueError: less than 512 bytes, or no multiple of it.
    """
    if not data or len(data) % LEAST_BYTES:
        raise ValueError(f"{len(data)} bytes are no sectors")
    kind = kind_of(data, guess)
    if kind is None:
        if not any(data):
            return None
        problem = "it begins neither a lockspace nor a lease nor a resource index"
        return UnknownArea("unknown", offset, len(data), (Damage(0, problem),))
    data = data[: kind.shape.area_size]
    if kind.name == "lockspace":
        return _lockspace(data, offset, kind.shape)
    return (_resource if kind.name == "resource" else _index)(data, offset, kind.shape)


def _cut(data: bytes, shape: Geometry) -> Iterator[Damage]:
    if len(data) < shape.area_size:
        yield Damage(len(data) // shape.sector_size, "the file or device ends within this area")


def _problem(error: RecordError) -> str:
    return f"{error.problem} ({int(error.result)})"


# --- lockspaces


def _lockspace(data: bytes, offset: int, shape: Geometry) -> LockspaceArea:
    size = shape.sector_size
    whole = min(len(data) // size, shape.hosts_max)
    leaders = [sectors.decode_leader(data[at : at + 256]) for at in range(0, whole * size, size)]
    space = _space_of(leaders)
    hosts, damage, io_timeout = [], [], None
    for number, leader in enumerate(leaders):
        host_id = number + 1
        try:
            sectors.check_delta(leader, space)
        except RecordError as error:
            damage.append(Damage(number, _problem(error)))
            continue
        damage += [Damage(number, problem) for problem in _misplaced(leader, host_id, shape)]
        entry = _host_entry(leader, host_id, sectors.bitmap_of(data, number * size))
        if leader.timestamp or leader.owner_id or leader.owner_generation or entry.signals:
            hosts.append(entry)
        elif io_timeout is None:
            io_timeout = leader.io_timeout
    damage += _cut(data, shape)
    name = text(space)
    return LockspaceArea(
        "lockspace",
        offset,
        size,
        shape.area_size,
        name,
        shape.hosts_max,
        io_timeout,
        tuple(hosts),
        tuple(damage),
    )


def _space_of(leaders: list[Leader]) -> bytes:
    """The lockspace's name: of the first intact delta lease, or else of the first at all."""
    for leader in leaders:
        if leader.magic == sectors.DELTA_MAGIC and leader.intact:
            return leader.space_name
    return leaders[0].space_name if leaders else b""


def _misplaced(leader: Leader, host_id: int, shape: Geometry) -> Iterator[str]:
    try:
        if leader.geometry != shape:
            yield f"it states {leader.geometry}, unlike the rest of the lockspace"
    except RecordError as error:
        yield _problem(error)
    if leader.owner_id not in (0, host_id):
        yield f"it is the delta lease of host id {host_id}, and names host id {leader.owner_id}"


def _host_entry(leader: Leader, host_id: int, bitmap: bytes) -> HostEntry:
    told = range(1, sectors.BITMAP_HOSTS + 1) if any(bitmap) else range(0)
    return HostEntry(
        host_id,
        text(leader.resource_name),
        leader.owner_generation,
        leader.timestamp,
        leader.io_timeout,
        (leader.write_id, leader.write_generation, leader.write_timestamp),
        tuple(other for other in told if sectors.in_bitmap(bitmap, other)),
    )


# --- paxos leases


def _resource(data: bytes, offset: int, shape: Geometry) -> ResourceArea:
    size = shape.sector_size
    leader = sectors.decode_leader(data)
    damage = [Damage(sectors.LEADER_SECTOR, problem) for problem in _leader_problems(leader, shape)]
    request = sectors.Request()
    if len(data) >= (sectors.REQUEST_SECTOR + 1) * size:
        request = sectors.decode_request(data[sectors.REQUEST_SECTOR * size :])
        try:
            sectors.check_request(request)
        except RecordError as error:
            damage.append(Damage(sectors.REQUEST_SECTOR, _problem(error)))
    num_hosts = min(leader.num_hosts, shape.hosts_max) if leader.num_hosts else shape.hosts_max
    there = max(0, min(num_hosts, len(data) // size - sectors.host_sector(0) - 1))
    hosts = dict(sectors.used_hosts(data, size, there))
    for host_id, record in hosts.items():
        try:
            sectors.check_dblock(record.dblock)
        except RecordError as error:
            damage.append(Damage(sectors.host_sector(host_id), _problem(error)))
    damage += _cut(data, shape)
    return ResourceArea(
        "resource", offset, size, shape.area_size, text(leader.space_name), text(leader.resource_name),
        state_of(leader, hosts), leader.num_hosts, leader.owner_id, leader.owner_generation, leader.lver,
        leader.timestamp, (leader.write_id, leader.write_generation, leader.write_timestamp), request.lver,
        request.force_mode, tuple(_ballot(*host) for host in hosts.items()), tuple(damage),
    )  # fmt: skip


def _leader_problems(leader: Leader, shape: Geometry) -> Iterator[str]:
    try:
        sectors.check_leader(leader)
        if leader.geometry != shape:
            yield f"it states {leader.geometry}, and its sectors lie as with {shape}"
    except RecordError as error:
        yield _problem(error)


def state_of(leader: Leader, hosts: dict[int, HostRecord]) -> str:
    """What a lease's records together say (docs/paxos-format.md, section 7): see ResourceArea."""
    if leader.magic == sectors.CLEARED_MAGIC:
        return "removed"
    owner = hosts.get(leader.owner_id, sectors.UNUSED_HOST)
    shared = any(record.mode.shared for record in hosts.values())
    committed_late = leader.write_id != leader.owner_id and owner.dblock.released
    if not leader.timestamp or committed_late:
        return "shared" if shared else "free"
    return "changing" if shared or leader.flags & sectors.SHORT_HOLD else "exclusive"


def _ballot(host_id: int, record: HostRecord) -> Ballot:
    dblock, mode = record.dblock, record.mode
    proposed = (dblock.inp, dblock.inp2, dblock.inp3)
    return Ballot(
        host_id, dblock.mbal, dblock.bal, proposed, dblock.lver, dblock.released, mode.shared, mode.generation
    )


# --- resource indexes


def _index(data: bytes, offset: int, shape: Geometry) -> IndexArea:
    header = sectors.decode_index(data)
    space = sectors.name_in(header.space_field)
    damage = []
    try:
        sectors.check_index(header, shape, space, offset)
    except RecordError as error:
        damage.append(Damage(0, _problem(error)))
    room = (len(data) - shape.sector_size) // sectors.INDEX_ENTRY_BYTES
    count = min(header.max_resources, shape.index_resources_max, max(room, 0))
    entries: dict[str, EntryInfo] = {}
    for number in range(count):
        sector, byte = sectors.entry_place(number, shape.sector_size)
        entry = sectors.decode_entry(data, sector * shape.sector_size + byte)
        if not entry.offset:
            continue
        info = EntryInfo(number, text(entry.name), entry.offset)
        if entry.offset != sectors.entry_area(number, shape, offset):
            damage.append(
                Damage(sector, f"entry {number}, {info.name!r}, names byte {entry.offset}, not its own")
            )
        if info.name in entries:
            first = entries[info.name].number
            damage.append(Damage(sector, f"entries {first} and {number} have the same name, {info.name!r}"))
        entries.setdefault(info.name, info)
    damage += _cut(data, shape)
    return IndexArea(
        "index", offset, shape.sector_size, shape.area_size, text(space), header.max_resources,
        tuple(entries.values()), tuple(damage),
    )  # fmt: skip
