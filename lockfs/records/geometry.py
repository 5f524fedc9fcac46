"""The five geometries of a lease area: sector size, area size, and how many hosts fit.

A sector is the unit of atomic write; an area is one lockspace or one resource. Sizes are in bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from lockfs.records.results import RecordError, Result

MIB = 1 << 20
HOSTS_MAX = 2000


@dataclass(frozen=True)
class Geometry:
    """One legal combination; `flag` stands for the area size in a leader record's flags."""

    sector_size: int
    area_size: int
    hosts_max: int
    flag: int

    @property
    def index_flag(self) -> int:
        """The same in the header of a resource index, which counts from another base."""
        return self.flag >> 4

    @property
    def index_resources_max(self) -> int:
        """The most resources that an index of this geometry can name (64 bytes an entry after sector 0)."""
        return {  # the limits sanlock enforces
            (512, MIB): 16000,
            (4096, MIB): 16000,
            (4096, 2 * MIB): 32000,
            (4096, 4 * MIB): 64000,
            (4096, 8 * MIB): 128000,
        }[self.sector_size, self.area_size]

    def __str__(self) -> str:
        return f"sectors of {self.sector_size}, areas of {self.area_size // MIB} MiB"


GEOMETRIES = (
    Geometry(512, MIB, 2000, 0x10),
    Geometry(4096, MIB, 250, 0x10),
    Geometry(4096, 2 * MIB, 500, 0x20),
    Geometry(4096, 4 * MIB, 1000, 0x40),
    Geometry(4096, 8 * MIB, 2000, 0x80),
)
ALIGN_FLAGS = 0xF0
FILE_GEOMETRY = GEOMETRIES[0]
"""What sanlock assumes of a regular file, whatever the file system needs."""


def geometry(sector_size: int, area_size: int) -> Geometry:
    """The geometry of these sizes.

    Raises:
        RecordError: BAD_GEOMETRY, there is none.
    """
    for candidate in GEOMETRIES:
        if (candidate.sector_size, candidate.area_size) == (sector_size, area_size):
            return candidate
    raise RecordError(
        Result.BAD_GEOMETRY, f"sectors of {sector_size} bytes and areas of {area_size} do not go together"
    )


def geometry_of_flags(sector_size: int, flags: int) -> Geometry:
    """The geometry a leader record states; writers before sanlock 3.7 left the flags out.

    Raises:
        RecordError: LEADER_SECTOR_SIZE or BAD_GEOMETRY.
    """
    if sector_size not in (512, 4096):
        raise RecordError(Result.LEADER_SECTOR_SIZE, f"a sector size of {sector_size} is stated")
    flag = flags & ALIGN_FLAGS or (0x10 if sector_size == 512 else 0x80)
    for candidate in GEOMETRIES:
        if (candidate.sector_size, candidate.flag) == (sector_size, flag):
            return candidate
    raise RecordError(
        Result.BAD_GEOMETRY, f"flags {flags:#x} state no area size for sectors of {sector_size}"
    )
