"""A rig without lockfs: a bare directory, and a family of processes to kill. For tests of the harness.

    python -m tests.failover.fake_rig --count 3 --whom both [--fault FAULT] [--spoil LOADS] [--backend fcntl]

Faults are those of the fake family. `--spoil` changes what the loads named work on behind their backs, as a
server that loses or repeats a request would. A backend other than nop gives a second host that nothing
keeps out. Prints the report as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.failover import kills, rigs, servers
from tests.failover.rigs import RigError
from tests.support.qemu import eventually

SPOIL_S = 0.2
PATIENCE_S = 5.0


class FakeRig:
    """The first mount is the store itself; the second, where there is one, too."""

    def __init__(self, base: Path, backend: str, fault: str) -> None:
        self.store = self.near = base / "store"
        self.far = None if backend == "nop" else self.store
        self.backend = backend
        self.mark = uuid.uuid4().hex
        self._base = base
        self._fault = fault
        self._process: subprocess.Popen[bytes] | None = None
        self._killed = False
        self.store.mkdir()

    @property
    def started(self) -> int | None:
        return self._process.pid if self._process else None

    def started_is_killed(self) -> None:
        self._killed = True

    def bury(self) -> None:
        if self._process is not None:
            self._process.poll()

    def start(self) -> None:
        library = self._base / "pyfuse3-is-not-here"
        library.write_bytes(b"x" * 4096)
        command = [sys.executable, "-m", "tests.failover.fake_family", str(library), f"--fault={self._fault}"]
        with open(self._base / "family.log", "wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env={**os.environ, servers.MARK: self.mark},
            )  # fmt: skip
        try:
            eventually(lambda: servers.find(self.mark).complete, "a family", rigs.START_S)
        except AssertionError as error:
            raise RigError(f"{error}: {(self._base / 'family.log').read_text()}") from error

    def stop(self) -> list[str]:
        guardian = servers.find(self.mark).guardian
        if guardian is not None:
            os.kill(guardian, signal.SIGTERM)
        try:
            eventually(lambda: not servers.marked(self.mark), "the end of the family", 5.0)
        except AssertionError as error:
            self.abort()
            found = [str(error)]
        else:
            found = []
        code = self._process.wait(rigs.STOP_S) if self._process is not None else 0
        return found if not code or self._killed else [*found, f"the family ended with {code}"]

    def abort(self) -> None:
        self._killed = True
        for pid in servers.marked(self.mark):
            os.kill(pid, signal.SIGKILL)

    def status(self) -> Mapping[str, Any] | None:
        return None


def _spoilers(store: Path) -> dict[str, Callable[[], object]]:
    """What a server could do wrong, and which load must notice."""

    def flip() -> None:
        path = next((store / "kept/held").iterdir())
        path.write_bytes(bytes(path.stat().st_size))

    def repeat() -> None:
        with open(store / "append/turn0/log", "r+b") as log:
            last = log.read()[-32:]
            log.write(last)

    return {
        "append": repeat,
        "kept": flip,
        "listing": lambda: next((store / "listing/turn0").glob("entry-01*")).unlink(),
        "names": (store / "names/turn0/target").unlink,
        "directories": lambda: (store / "directories/turn0/outer").mkdir(exist_ok=True),
        "attributes": (store / "attributes/turn0/file").unlink,
        "truncate": lambda: os.truncate(store / "truncate/turn0/file", 5),
        "links": lambda: os.link(store / "links/turn0/file", store / "links/turn0/alias"),
        "opens": lambda: (store / "opens/turn0/1.img").write_bytes(bytes(4096)),
        "unlinks": (store / "unlinks/turn0/short-lived1").touch,
        "fio-direct": lambda: (store / "fio-direct/held/0.img").write_bytes(os.urandom(3 << 20)),
    }


def _spoil(actions: list[Callable[[], object]], ended: threading.Event) -> None:
    """Do it again and again: some moments are not the right ones."""
    while not ended.wait(SPOIL_S):
        for action in actions:
            with contextlib.suppress(OSError, StopIteration):
                action()


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--count", type=int, default=2)
    parser.add_argument("--whom", choices=kills.WHOM, default="worker")
    parser.add_argument("--backend", default="nop")
    parser.add_argument("--fault", default="")
    parser.add_argument("--spoil", default="")
    parser.add_argument("--only", default="beat")
    arguments = parser.parse_args()
    kills.adopt_orphans()
    rig = FakeRig(arguments.base, arguments.backend, arguments.fault)
    plan = kills.Plan(
        arguments.count,
        arguments.whom,
        seconds=3.0,
        pause_s=0.3,
        only=tuple(arguments.only.split(",")),
        repair_s=PATIENCE_S,
        settle_s=PATIENCE_S,
    )
    ended = threading.Event()
    actions = [action for load, action in _spoilers(rig.store).items() if load in arguments.spoil.split(",")]
    spoiler = threading.Thread(target=_spoil, args=(actions, ended))
    spoiler.start()
    try:
        report = kills.Run(rig, plan, arguments.base).go()
    finally:
        ended.set()
        spoiler.join()
    print(json.dumps(vars(report)))
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
