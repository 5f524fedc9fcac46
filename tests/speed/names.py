"""Cases measured in this process: names and attributes, and the cost of an open for writing."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.speed.cases import LESS, MORE, Case, Metric
from tests.speed.targets import Target

NAMES = 10_000
OPENS = 2_000
OPEN_MEDIAN = "open+close for writing, median"
OPEN_P99 = "open+close for writing, p99"


def _create(path: bytes) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))


def _each(act: Callable[[bytes], object], paths: list[bytes]) -> float:
    begun = time.perf_counter()
    for path in paths:
        act(path)
    return len(paths) / (time.perf_counter() - begun)


def _list(root: Path) -> float:
    begun = time.perf_counter()
    found = len(os.listdir(root))
    rate = found / (time.perf_counter() - begun)
    if found != NAMES:
        raise RuntimeError(f"{found} of {NAMES} names were listed")
    return rate


def measure_names(target: Target, _seconds: float) -> Mapping[str, float]:
    """Names per second for create, stat, readdir and unlink of NAMES empty files in one directory."""
    root = target.root / "bench-names"
    root.mkdir()
    try:
        paths = [os.fsencode(root / f"name-{number:05}") for number in range(NAMES)]
        return {
            "create": _each(_create, paths),
            "stat": _each(os.stat, paths),
            "readdir": _list(root),
            "unlink": _each(os.unlink, paths),
        }
    finally:
        shutil.rmtree(root, ignore_errors=True)


class Opens:
    """Times opens for writing, and keeps every time, so that the 99th percentile is one of all rounds."""

    def __init__(self, rounds: int) -> None:
        self.times: dict[str, list[float]] = {}
        self._count = -(-OPENS // rounds)

    def measure(self, target: Target, _seconds: float) -> Mapping[str, float]:
        """Median and 99th percentile, in microseconds, of opens with their closes; OPENS in all rounds."""
        path = os.fsencode(target.root / f"bench-open-{target.name.replace(' ', '-')}.img")
        times = []
        if not Path(os.fsdecode(path)).exists():
            _create(path)
        os.close(os.open(path, os.O_RDWR))
        for _ in range(self._count):
            begun = time.perf_counter_ns()
            descriptor = os.open(path, os.O_RDWR)
            os.close(descriptor)
            times.append((time.perf_counter_ns() - begun) / 1000)
        self.times.setdefault(target.name, []).extend(times)
        return {OPEN_MEDIAN: percentile(times, 50), OPEN_P99: percentile(times, 99)}


def percentile(values: list[float], percent: float) -> float:
    """The value below which `percent` of the sorted values lie, the nearest of them."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(percent / 100 * (len(ordered) - 1)))]


def cases(opens: Opens) -> list[Case]:
    """The cases of this module."""
    rate = Metric("names/s", MORE)
    micros = Metric("µs", LESS)
    return [
        Case("names", dict.fromkeys(("create", "stat", "readdir", "unlink"), rate), measure_names),
        Case("open", {OPEN_MEDIAN: micros, OPEN_P99: micros}, opens.measure, backends=True),
    ]
