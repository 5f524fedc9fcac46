"""Cases that qemu-img measures."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Mapping

from tests.speed.cases import MORE, Case, CaseFailed, Metric
from tests.speed.fio import DIRECT_FILE, FILE_MIB
from tests.speed.targets import Target

DEADLINE_S = 120.0
REQUESTS_PER_S = 15_000
AIO = ("threads", "native", "io_uring")
_COMPLETED = re.compile(r"Run completed in ([0-9.]+) seconds")


def _qemu_img(*arguments: str) -> str:
    if shutil.which("qemu-img") is None:
        raise CaseFailed("qemu-img is not installed")
    try:
        done = subprocess.run(
            ["qemu-img", *arguments], check=False, capture_output=True, text=True, timeout=DEADLINE_S
        )
    except subprocess.TimeoutExpired as error:
        raise CaseFailed(f"qemu-img did not end within {DEADLINE_S:.0f} s") from error
    if done.returncode != 0:
        raise CaseFailed(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "qemu-img failed")
    return done.stdout


def _bench(aio: str, target: Target, seconds: float) -> Mapping[str, float]:
    # qemu-img has no time limit, so the number of requests is fixed: what a fast disk does in the time.
    count = max(2000, round(seconds * REQUESTS_PER_S))
    image = str(target.root / DIRECT_FILE)
    output = _qemu_img(
        "bench", "-w", "-f", "raw", "-c", str(count), "-d", "16", "-s", "4096", "-S", "4096", "-t", "none",
        "-i", aio, image,
    )  # fmt: skip
    found = _COMPLETED.search(output)
    if found is None:
        raise CaseFailed("qemu-img bench gave no time")
    return {_bench_name(aio): count / max(float(found[1]), 1e-3)}


def _bench_name(aio: str) -> str:
    return f"qemu-img bench, 4k write, depth 16, {aio}"


def _convert(target: Target, _seconds: float) -> Mapping[str, float]:
    source, copy = target.root / DIRECT_FILE, target.root / "bench-copy.img"
    begun = time.perf_counter()
    try:
        _qemu_img(
            "convert", "-f", "raw", "-O", "raw", "-t", "none", "-T", "none", "-W", str(source), str(copy)
        )
        return {"qemu-img convert": FILE_MIB * (1 << 20) / 1e6 / (time.perf_counter() - begun)}
    finally:
        copy.unlink(missing_ok=True)


def cases() -> list[Case]:
    """The cases of this module."""

    def bench(aio: str) -> Case:
        return Case(
            _bench_name(aio),
            {_bench_name(aio): Metric("op/s", MORE)},
            lambda target, seconds: _bench(aio, target, seconds),
        )

    convert = Case("qemu-img convert", {"qemu-img convert": Metric("MB/s", MORE)}, _convert)
    return [*(bench(aio) for aio in AIO), convert]
