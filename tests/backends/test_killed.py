"""Workers that are killed at every system call of a step, for each backend that guards anything.

Whatever the killed worker's keeper was told that it holds, the next one recalls, and no other host got it in
between. Whatever the killed worker had begun to take, or to give back, the next one's settling frees. No
descriptor is left, and none is closed that somebody else needs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lockfs.backends.fcntl import FcntlOptions
from lockfs.backends.paxos.options import LayoutKind

from .conformance import IMAGE, Maker
from .killed_host import DONE
from .makers import FcntlMaker, PaxosMaker

RUN_S_MAX = 280
STEPS = {
    "acquire-first": ("first", "exclusive", ""),
    "acquire-exclusive": ("acquire", "exclusive", ""),
    "acquire-shared": ("acquire", "shared", ""),
    "release-exclusive": ("release", "exclusive", ""),
    "release-shared": ("release", "shared", ""),
    "release-told-late": ("release-late", "exclusive", ""),
    "weaken": ("convert", "exclusive", "shared"),
    "strengthen": ("convert", "shared", "exclusive"),
}


def _maker(name: str, directory: Path) -> Maker:
    if name == "fcntl":
        return FcntlMaker(directory, [FcntlOptions()])
    if name == "fcntl-lock_dir":
        return FcntlMaker(directory, [FcntlOptions(lock_dir="locks")])
    return PaxosMaker(directory, LayoutKind(name.removeprefix("paxos-")))


def kills(maker: Maker, step: str, stride: int = 1) -> dict[str, Any]:
    """The report of killed_host.py for one step, of which every `stride`th call is tried."""
    what, mode, other = STEPS[step]
    task = {"maker": maker.contender(0), "rival": maker.contender(1), "image": IMAGE}
    task |= {"step": what, "mode": mode, "other": other or mode, "stride": stride}
    script = str(Path(__file__).with_name("killed_host.py"))
    ran = subprocess.run(
        [sys.executable, script, json.dumps(task)],
        capture_output=True,
        text=True,
        timeout=RUN_S_MAX,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout)
    assert isinstance(report, dict)
    return report | {"errors": ran.stderr}


@pytest.mark.slow
@pytest.mark.parametrize("step", sorted(STEPS))
@pytest.mark.parametrize("name", ["fcntl", "fcntl-lock_dir", "paxos-files", "paxos-index"])
def test_killed_at_every_call(name: str, step: str, tmp_path: Path) -> None:
    """Of one step: of all calls with LOCKFS_EVERY_CALL set (six minutes), else of every fourth."""
    stride = 1 if os.environ.get("LOCKFS_EVERY_CALL") else 4
    if (name, step) == ("paxos-index", "acquire-first"):
        stride = 9  # each first lease takes a place of its own for good, of which an index has few
    report = kills(_maker(name, tmp_path), step, stride)
    assert (report["status"], report["named"], report["rival"], report["errors"]) == (DONE, [], 0, "")
    assert report["killed"] > 1
