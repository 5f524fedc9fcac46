"""Cases that fio measures: the data path, with O_DIRECT and through the page cache."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.speed.cases import MORE, Case, CaseFailed, Metric
from tests.speed.targets import Target

FILE_MIB = 256
RAMP_S = 0.1
RUN_MARGIN_S = 60.0
BLOCK = 4096
BIG_BLOCK = 1 << 20
DIRECT_FILE = "bench-direct.img"
CACHED_FILE = "bench-cached.img"
ENGINES = ("psync", "libaio", "io_uring")
DEPTHS = (1, 16)


@dataclass(frozen=True)
class Cell:
    """One fio job. `depth` is a queue depth, or a number of threads where the engine is synchronous."""

    rw: str
    block: int
    direct: bool
    engine: str
    depth: int
    fdatasync: bool = False

    @property
    def name(self) -> str:
        """How the cell appears in tables: `direct 4k randread libaio 16`."""
        size = "4k" if self.block == BLOCK else "1m"
        cache = "direct" if self.direct else "buffered"
        sync = "+fdatasync" if self.fdatasync else ""
        return f"{cache} {size} {self.rw}{sync} {self.engine} {self.depth}"

    @property
    def writes(self) -> bool:
        """Whether the cell changes the file."""
        return "write" in self.rw

    def arguments(self, path: Path, seconds: float) -> list[str]:
        """fio's command line; threads and not processes, since an image has one writing process."""
        synchronous = self.engine == "psync"
        arguments = {
            "name": "cell",
            "filename": str(path),
            "size": f"{FILE_MIB}m",
            "rw": self.rw,
            "bs": str(self.block),
            "ioengine": self.engine,
            "iodepth": "1" if synchronous else str(self.depth),
            "numjobs": str(self.depth) if synchronous else "1",
            "direct": str(int(self.direct)),
            "fdatasync": "1" if self.fdatasync else "0",
            "runtime": f"{round(seconds * 1000)}ms",
            "ramp_time": f"{round(RAMP_S * 1000)}ms",
            "output-format": "json",
            "disk_util": "0",
            "randrepeat": "0",
            "invalidate": "0",
        }
        flags = ["--thread", "--time_based", "--group_reporting", "--norandommap"]
        return ["fio", *(f"--{key}={value}" for key, value in arguments.items()), *flags]


def _figure(cell: Cell, output: str) -> float:
    # fio prints warnings before the JSON document.
    start = output.find("{")
    if start < 0:
        raise CaseFailed(output.strip().splitlines()[-1] if output.strip() else "fio printed nothing")
    job = json.loads(output[start:])["jobs"][0]
    if job.get("error"):
        raise CaseFailed(os.strerror(int(job["error"])))
    side = job["write" if cell.writes else "read"]
    return float(side["bw_bytes"]) / 1e6 if cell.block == BIG_BLOCK else float(side["iops"])


def run_cell(cell: Cell, target: Target, seconds: float) -> float:
    """Operations per second, or MB/s for 1 MiB blocks; raises CaseFailed with fio's last words."""
    path = target.root / (DIRECT_FILE if cell.direct else CACHED_FILE)
    try:
        done = subprocess.run(
            cell.arguments(path, seconds), check=False, capture_output=True, text=True,
            timeout=seconds + RUN_MARGIN_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise CaseFailed(f"fio did not end within {seconds + RUN_MARGIN_S:.0f} s") from error
    if done.returncode != 0:
        words = (done.stderr or done.stdout).strip().splitlines()
        raise CaseFailed(words[0] if words else f"fio ended with {done.returncode}")
    return _figure(cell, done.stdout)


def prepare(store: Path) -> None:
    """Lay out the files that every cell works on, wholly written and on the disk."""
    if shutil.which("fio") is None:
        raise CaseFailed("fio is not installed")
    chunk = os.urandom(1 << 20)
    for name in (DIRECT_FILE, CACHED_FILE):
        with (store / name).open("wb") as file:
            for _ in range(FILE_MIB):
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())


def settle(store: Path) -> None:
    """Write back what a cell left dirty, so that the next does not pay for it, and keep it cached."""
    for name in (DIRECT_FILE, CACHED_FILE):
        descriptor = os.open(store / name, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def cells() -> list[Cell]:
    """Every fio cell of a run."""
    made = []
    for direct in (True, False):
        for rw in ("randread", "randwrite"):
            made += [Cell(rw, BLOCK, direct, engine, depth) for engine in ENGINES for depth in DEPTHS]
    for rw in ("read", "write"):
        made += [
            Cell(rw, BIG_BLOCK, True, engine, depth) for engine in ("libaio", "io_uring") for depth in DEPTHS
        ]
        made.append(Cell(rw, BIG_BLOCK, False, "psync", 1))
    made.append(Cell("randwrite", BLOCK, False, "psync", 1, fdatasync=True))
    made.append(Cell("randwrite", BLOCK, True, "psync", 1, fdatasync=True))
    return made


def cases(store: Path) -> list[Case]:
    """The fio cells as cases."""

    def case(cell: Cell) -> Case:
        def measure(target: Target, seconds: float) -> dict[str, float]:
            try:
                return {cell.name: run_cell(cell, target, seconds)}
            finally:
                if cell.writes:
                    settle(store)

        unit = "MB/s" if cell.block == BIG_BLOCK else "op/s"
        return Case(cell.name, {cell.name: Metric(unit, MORE)}, measure)

    return [case(cell) for cell in cells()]
