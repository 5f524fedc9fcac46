"""Lease areas as tables for people: hosts, indexes, leases and who holds them, damage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lockfs.cli.table import printable, render
from lockfs.records import sectors
from lockfs.records.describe import (
    Ballot,
    DescribedArea,
    HostEntry,
    IndexArea,
    LockspaceArea,
    ResourceArea,
    UnknownArea,
    text,
)
from lockfs.records.geometry import MIB, geometry

DAMAGE_LINES_MAX = 100
_HOST_HEADINGS = ("HOST ID", "NAME", "STATE", "GENERATION", "TIMESTAMP", "IO TIMEOUT", "SIGNALS TO")
_LEASE_HEADINGS = ("BYTE", "LEASE", "LOCKSPACE", "STATE", "HOLDER", "VERSION", "HOSTS", "NOTE")
_DAMAGE_HEADINGS = ("AREA AT BYTE", "SECTOR", "DAMAGE")
_FORCE = {0: "", sectors.FORCE_KILL: " by force", sectors.FORCE_GRACEFUL: ""}


def report(found: Sequence[DescribedArea], length: int) -> str:
    """Everything found in `length` bytes, in words and tables."""
    if not found:
        return f"There is nothing: {_size(length)} of zeros."
    lockspaces = [area for area in found if isinstance(area, LockspaceArea)]
    indexes = [area for area in found if isinstance(area, IndexArea)]
    leases = [area for area in found if isinstance(area, ResourceArea)]
    parts = [*map(_lockspace, lockspaces), *map(_index, indexes)]
    if leases:
        parts.append(render(_LEASE_HEADINGS, [_Names(lockspaces, indexes).row(lease) for lease in leases]))
    parts += [_unknown(area) for area in found if isinstance(area, UnknownArea)]
    damage = list(_damage_rows([area for area in found if not isinstance(area, UnknownArea)]))
    if damage:
        parts.append(render(_DAMAGE_HEADINGS, damage[:DAMAGE_LINES_MAX]))
    if len(damage) > DAMAGE_LINES_MAX:
        parts.append(f"{len(damage) - DAMAGE_LINES_MAX} more damaged sectors; --json names all.")
    return "\n\n".join(parts)


def _size(length: int) -> str:
    return f"{length // MIB} MiB" if length % MIB == 0 else f"{length} bytes"


def _shape(area: LockspaceArea | IndexArea) -> str:
    return str(geometry(area.sector_size, area.area_size))


def _lockspace(area: LockspaceArea) -> str:
    name = printable(area.lockspace)
    head = f"Lockspace {name} at byte {area.offset}: {_shape(area)}, {area.hosts_max} hosts"
    if area.io_timeout is not None:
        head += f", io_timeout {area.io_timeout} s"
    if not area.hosts:
        return f"{head}. No host was ever there."
    table = render(_HOST_HEADINGS, [_host(host) for host in area.hosts])
    return f"{head}. Whether a host that joined is alive cannot be told in one look.\n{table}"


def _host(host: HostEntry) -> list[str]:
    return [
        str(host.host_id),
        printable(host.name),
        "joined" if host.timestamp else "left",
        str(host.generation),
        str(host.timestamp) if host.timestamp else "-",
        f"{host.io_timeout} s",
        ", ".join(map(str, host.signals)) or "-",
    ]


def _index(area: IndexArea) -> str:
    head = f"Resource index of lockspace {printable(area.lockspace)} at byte {area.offset}: {_shape(area)}"
    return f"{head}, {len(area.entries)} of {area.max_resources} resources."


class _Names:
    """Who is meant by a host id, and which leases an index has, by what else was found in the place."""

    def __init__(self, lockspaces: Sequence[LockspaceArea], indexes: Sequence[IndexArea]) -> None:
        self._hosts = {area.lockspace: {host.host_id: host for host in area.hosts} for area in lockspaces}
        self._indexed = {area.lockspace: {entry.offset for entry in area.entries} for area in indexes}

    def row(self, lease: ResourceArea) -> list[str]:
        """A lease's line."""
        return [
            str(lease.offset),
            printable(lease.name),
            printable(lease.lockspace),
            lease.state,
            "; ".join(self._holders(lease)) or "-",
            str(lease.lver),
            str(lease.num_hosts),
            "; ".join(self._notes(lease)) or "-",
        ]

    def _holders(self, lease: ResourceArea) -> Iterator[str]:
        if lease.state in ("exclusive", "changing"):
            yield self._holder(lease.lockspace, lease.owner_id, lease.owner_generation)
        if lease.state in ("shared", "changing"):
            for ballot in self._sharers(lease):
                yield self._holder(lease.lockspace, ballot.host_id, ballot.shared_generation)

    @staticmethod
    def _sharers(lease: ResourceArea) -> list[Ballot]:
        return [ballot for ballot in lease.ballots if ballot.shared]

    def _holder(self, lockspace: str, host_id: int, generation: int) -> str:
        """The host by id and name; a hold in a generation that has ended, or of a host that left, is void."""
        if lockspace not in self._hosts:
            return f"host id {host_id}"
        host = self._hosts[lockspace].get(host_id)
        if host is None:
            return f"host id {host_id} (void: never joined)"
        if not host.timestamp or host.generation > generation:
            return f"{printable(host.name)} ({host_id}, void: it left)"
        return f"{printable(host.name)} ({host_id})"

    def _notes(self, lease: ResourceArea) -> Iterator[str]:
        if lease.request_lver > lease.lver:
            yield f"asked to be let go{_FORCE.get(lease.request_mode, '')}"
        indexed = self._indexed.get(lease.lockspace)
        is_guard = lease.name == text(sectors.INDEX_LEASE_NAME)
        if indexed is not None and lease.offset not in indexed and not is_guard and lease.state != "removed":
            yield "not in the index"


def _unknown(area: UnknownArea) -> str:
    return f"DAMAGE: {_size(area.area_size)} at byte {area.offset} are no lease area."


def _damage_rows(found: Sequence[DescribedArea]) -> Iterator[list[str]]:
    for area in found:
        for damage in area.damage:
            yield [str(area.offset), str(damage.sector), printable(damage.problem)]
