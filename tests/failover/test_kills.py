"""lockfs is killed while programs work on its mount, and none of them sees an error.

Short runs; `python -m tests.failover.kills --count 200 …` is the long one. A stall is not judged here.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.mounts import needs_mount

DEADLINE_S = 300.0

pytestmark = [needs_mount, pytest.mark.slow]


def run(base: Path, io: str, backend: str, *words: str) -> dict[str, Any]:
    """The report of a run, which must be a good one."""
    told = base / "report.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.failover.kills", f"--io={io}", f"--backend={backend}", f"--base={base}",
         f"--json={told}", "--keep", *words],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report: dict[str, Any] = json.loads(told.read_text())
    assert report["failures"] == []
    return report


def test_without_a_kill(tmp_path: Path) -> None:
    """The programs themselves see nothing wrong in a mount that nobody kills."""
    report = run(tmp_path, "guarded", "paxos", "--count=0", "--seconds=3")
    assert report["facts"]["rival"]["tries"] > 0
    assert report["facts"]["guest"]["writes"] > 0


@pytest.mark.parametrize(
    ("io", "backend"),
    [("auto", "fcntl"), ("guarded", "paxos"), ("daemon", "fcntl"), ("passthrough", "nop")],
)
def test_the_worker_is_killed(tmp_path: Path, io: str, backend: str) -> None:
    """Four kills in each data mode."""
    report = run(tmp_path, io, backend, "--count=4")
    assert len({pid for row in report["kills"] for pid in row["pids"]}) == 4


@pytest.mark.parametrize(
    ("whom", "io", "backend", "count"),
    [("guardian", "auto", "fcntl", 3), ("both", "guarded", "paxos", 3), ("stop", "daemon", "paxos", 1)],
)
def test_others_are_killed(tmp_path: Path, whom: str, io: str, backend: str, count: int) -> None:
    """The guardian, both at once, and a worker that only stands still."""
    report = run(tmp_path, io, backend, f"--count={count}", f"--whom={whom}", "--without-guests")
    assert len(report["kills"]) == count
