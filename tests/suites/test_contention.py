"""Many processes want one image at once: never two writers."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.suites.contention import DEADLINE_S
from tests.support.mounts import mounted, needs_mount

FULL = "LOCKFS_SUITES_FULL"
ROUNDS = 10_000 if os.environ.get(FULL) else 2_000
CONTROL_ROUNDS = 200
IMAGE = "image.raw"
HOSTS = ("a", "b", "c")
REPOSITORY = Path(__file__).resolve().parents[2]

pytestmark = [needs_mount, pytest.mark.slow]


def contend(base: Path, options: str, rounds: int) -> dict[str, Any]:
    """Run the contenders over one mount of one store for each of HOSTS."""
    store, witness = base / "store", base / "witness"
    store.mkdir()
    witness.mkdir()
    (store / IMAGE).write_bytes(bytes(4096))
    with contextlib.ExitStack() as stack:
        paths = [
            stack.enter_context(mounted(store, base / host, f"host={host},{options}")).path for host in HOSTS
        ]
        command = [sys.executable, "-m", "tests.suites.contention", "--rounds", str(rounds)]
        done = subprocess.run(
            [*command, "--image", IMAGE, "--witness", str(witness), *map(str, paths)],
            cwd=REPOSITORY, check=True, capture_output=True, text=True, timeout=DEADLINE_S + 60,
        )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("io", ["passthrough", "guarded", "daemon"])
def test_never_two_writers(tmp_path: Path, io: str) -> None:
    """64 processes on three mounts have the image in turns, each mount some, and no two at a time."""
    found = contend(tmp_path, f"io={io},wait=0", ROUNDS)
    assert found["second writers"] == found["foreign stamps"] == 0, found
    assert not found["errors"] and not found["crashed"], found
    assert found["wins"] >= ROUNDS, found
    assert all(found["wins by mount"]), found
    assert found["refusals"] > 0, found


def test_the_witness_sees_two_writers(tmp_path: Path) -> None:
    """With nothing that excludes, the same witness tells of second writers: it would have seen them above."""
    found = contend(tmp_path, "backend=nop,local=host", CONTROL_ROUNDS)
    assert found["second writers"] > 0, found
    assert found["foreign stamps"] > 0, found
