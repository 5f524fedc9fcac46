"""The harness sees what it is there to see: tried on a family of processes that does it wrong."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.failover import kills, servers, timeline
from tests.failover.recording import Record, Request
from tests.failover.timeline import Kill

DEADLINE_S = 120.0


def run(base: Path, *words: str) -> dict[str, Any]:
    """The report of a run on the fake."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.failover.fake_rig", f"--base={base}", *words],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE_S, check=False,
    )  # fmt: skip
    assert done.stdout, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == bool(report["failures"])
    return report


@pytest.mark.parametrize("whom", kills.WHOM)
def test_a_family_that_repairs_itself_is_good(tmp_path: Path, whom: str) -> None:
    """Every kill hits another process of the right role, and nothing is complained of."""
    report = run(tmp_path, "--count=3", f"--whom={whom}", "--only=names,kept,append")
    assert report["failures"] == []
    pids = [pid for row in report["kills"] for pid in row["pids"]]
    assert len(set(pids)) == len(pids) == 3 * (2 if whom == "both" else 1)
    assert report["facts"]["servers"]["guardian"] not in pids
    assert all(row["stall_of"] for row in report["kills"])


def test_nobody_replaced_is_told(tmp_path: Path) -> None:
    """A worker that nobody replaces ends the run with a failure."""
    report = run(tmp_path, "--fault=abandons", "--count=1")
    assert any("not replaced" in failure for failure in report["failures"])


def test_a_leaked_descriptor_is_told(tmp_path: Path) -> None:
    """One descriptor more is a failure, named."""
    report = run(tmp_path, "--fault=leaks", "--count=1")
    assert any("/dev/null" in failure for failure in report["failures"])


def test_an_unburied_process_is_told(tmp_path: Path) -> None:
    """A dead child that its parent never collects is a failure."""
    report = run(tmp_path, "--fault=unburied", "--count=1")
    assert any("dead process" in failure for failure in report["failures"])


def test_a_lease_that_keeps_nobody_out_is_told(tmp_path: Path) -> None:
    """The second host opens what is held, finds no lock, and both write at once: each is a failure."""
    report = run(tmp_path, "--backend=fcntl", "--count=0", "--only=kept")
    text = " ".join(report["failures"])
    assert "the second host opened kept/" in text or "no lock is on image" in text
    assert "both hosts write" in text


def test_each_load_notices(tmp_path: Path) -> None:
    """What a load did not do itself it complains of."""
    loads = (
        "append", "kept", "listing", "names", "directories", "attributes", "truncate", "links", "opens",
        "unlinks", "fio-direct",
    )  # fmt: skip
    report = run(tmp_path, "--count=0", f"--only={','.join(loads)}", f"--spoil={','.join(loads)}")
    complaining = {failure.split(":")[0] for failure in report["failures"]}
    assert complaining == set(loads)


def test_the_longest_request_over_a_kill() -> None:
    """Requests count for the kills that they overlap; the rest show the machine."""
    shape = [(0, 5), (8, 30), (12, 13), (41, 49), (100, 101), (45, 120)]
    requests = [Request("load", f"{begun}", begun, ended) for begun, ended in shape]
    made = [
        Kill(1, "worker", (1,), 10, 20),
        Kill(2, "worker", (2,), 40, 50),
        Kill(3, "worker", (3,), 99, 110),
    ]
    worst, rest = timeline.sort_out(made, requests)
    assert [request.what if request else None for request in worst] == ["8", "45", "45"]
    assert [request.what for request in rest] == ["0"]
    assert timeline.sort_out([Kill(1, "worker", (1,), 200, 300)], requests)[0] == [None]


def test_limits_are_judged() -> None:
    """Stalls beyond a limit are complaints; none without kills."""
    report = kills.Report(plan={})
    assert kills.judge(report) == []
    report.stalls = {"longest_ms": kills.LONGEST_MS, "median_ms": kills.MEDIAN_MS - 1}
    assert len(kills.judge(report)) == 1


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    """What a load writes is what the harness reads."""
    record = Record("load", [Request("load", what, at, at + 1) for at, what in enumerate("abca")])
    record.write(tmp_path / "load.json")
    assert Record.read(tmp_path / "load.json") == record


def test_roles_of_the_journal() -> None:
    """A journal tells the roles to whoever may look into the process that has it."""
    assert servers.journal_words(os.getpid()) is None
    descriptor = os.memfd_create("lockfs-journal")
    try:
        os.write(descriptor, struct.pack("=qqqqqq", 1, 2, 11, 12, 13, 14))
        assert servers.journal_words(os.getpid()) == (11, 12, 13, 14)
    finally:
        os.close(descriptor)


def test_roles_without_a_family() -> None:
    """One process alone is both: it serves, and nobody guards it."""
    alone = servers._Process(7, 1, 5, "S", imported=True)
    assert servers._roles([alone]) == servers.Servers(7, 7, None, None)
