"""Loads the vectors: what sanlock wrote, trimmed to the sectors that matter, and what it means."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockfs.records.geometry import Geometry, geometry
from lockfs.records.sectors import Dblock, HostRecord, Leader, Request, name_in

FOLDER = Path(__file__).with_name("vectors")
TRACE = "io-trace-512-1M"
NAMES = tuple(sorted(path.stem for path in FOLDER.glob("*.bin")))
RECORD_RANGES = {
    "delta": ((0, 200), (256, 512)),
    "leader": ((0, 200),),
    "request": ((0, 20),),
    "dblock": ((0, 56), (128, 132), (136, 144)),
}
"""The bytes of a sector that carry meaning; padding is left out."""


@dataclass(frozen=True)
class Vector:
    """One vector: `kept` are its sectors one after another, `about` what the file beside them says."""

    name: str
    kept: bytes
    about: dict[str, Any]

    @property
    def sector_size(self) -> int:
        """In bytes."""
        return int(self.about["sector_size"])

    @property
    def shape(self) -> Geometry:
        """The geometry; only of whole areas."""
        return geometry(self.sector_size, int(self.about["align_size"]))

    @property
    def is_area(self) -> bool:
        """Whether it stands for a whole area."""
        return "area_sha256" in self.about

    def sector(self, number: int) -> bytes:
        """The kept sector of this number within the file, not the area."""
        return self.kept[number * self.sector_size : (number + 1) * self.sector_size]

    def area(self) -> bytes:
        """The whole area, rebuilt."""
        area = bytearray(self.shape.area_size)
        size = self.sector_size
        places = {entry["sector"]: entry for entry in self.about["sectors"]}
        if repeat := self.about.get("repeat"):
            start = places[repeat["same_as_sector"]]["bin_offset"]
            for number in range(repeat["first_sector"], repeat["end_sector"]):
                area[number * size : (number + 1) * size] = self.kept[start : start + size]
        for entry in places.values():
            start = entry["bin_offset"]
            area[entry["offset"] : entry["offset"] + entry["length"]] = self.kept[
                start : start + entry["length"]
            ]
        return bytes(area)


@functools.cache
def load(name: str) -> Vector:
    """The vector of this name."""
    about = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return Vector(name, (FOLDER / f"{name}.bin").read_bytes(), about)


def trace() -> list[dict[str, Any]]:
    """The steps of the recorded two-host run."""
    steps = json.loads((FOLDER / f"{TRACE}.json").read_text(encoding="utf-8"))["steps"]
    assert isinstance(steps, list)
    return steps


def fields_of_leader(leader: Leader) -> dict[str, Any]:
    """A leader in the words of the vectors."""
    fields = {name: getattr(leader, name) for name in Leader.__dataclass_fields__}
    fields["space_name"] = name_in(fields.pop("space_field")).decode()
    fields["resource_name"] = name_in(fields.pop("resource_field")).decode()
    return {**fields, "checksum_ok": leader.intact}


def fields_of_host(record: HostRecord) -> dict[str, Any]:
    """A host's sector in the words of the vectors."""
    fields = {name: getattr(record.dblock, name) for name in Dblock.__dataclass_fields__}
    mode = {"mode_flags": record.mode.flags, "mode_generation": record.mode.generation}
    return {**fields, "checksum_ok": record.dblock.intact, **mode}


def fields_of_request(request: Request) -> dict[str, Any]:
    """A request in the words of the vectors."""
    return {name: getattr(request, name) for name in Request.__dataclass_fields__}
