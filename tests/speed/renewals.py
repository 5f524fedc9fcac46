"""How late a mount renews its host's lease while image I/O through the very mount saturates the store.

    python -m tests.speed.renewals [--seconds N] [--json FILE] DIRECTORY

In DIRECTORY, on the storage to measure, lies a store with its leases inside. Eight threads of fio write to an
image through a mount of it, in each data mode and with each kind of load in turn. Meanwhile the host's sector
of the lockspace is looked at every few milliseconds, through the page cache, so that looking costs the
storage one read for each renewal. How late a renewal is: the time since the one before it was seen, less the
2 io_timeout that they are to be apart; the looking's own delay counts as well. Ends with 1 if a bar was
missed, with 2 if nothing can be measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

from lockfs.paxos.timing import Timing
from lockfs.records import sectors
from tests.speed import fio
from tests.speed.cases import CaseFailed
from tests.speed.fio import BIG_BLOCK, BLOCK, Cell
from tests.speed.targets import Target, TargetUnavailable, start_lockfs
from tests.support.mounts import why_not_mount

THREADS = 8
IO_TIMEOUT = 1
MODES = ("daemon", "guarded")
LOADS = (
    Cell("randwrite", BLOCK, True, "psync", THREADS),
    Cell("write", BIG_BLOCK, True, "psync", THREADS),
    Cell("randwrite", BLOCK, False, "psync", THREADS, fdatasync=True),
)
LATE_BAR_S = 1.0
LOOK_S = 0.004
JOIN_S = 20.0
SECTOR = 512


class Unmeasured(Exception):
    """Nothing can be measured; the message says why."""


@dataclass
class Run:
    """One load in one data mode: how late each renewal was, in seconds, and how much fio moved."""

    mode: str
    load: str
    late: list[float] = field(default_factory=list)
    moved: float = 0.0
    unit: str = ""

    def line(self) -> str:
        """The row of the table."""
        late = "".join(f"{1e3 * value:9.0f}" for value in (statistics.median(self.late), p99(self.late)))
        what = f"{self.mode:8} {self.load:40} {len(self.late):4d}"
        return f"{what}{late}{1e3 * max(self.late):9.0f}{self.moved:10.0f} {self.unit}"


_HEAD = f"{'milliseconds late':47} {'number':>6}{'median':>9}{'p99':>9}{'most':>9}{'fio':>10}"


def p99(values: Sequence[float]) -> float:
    """The 99th percentile."""
    return sorted(values)[min(len(values) - 1, len(values) * 99 // 100)]


class Probe:
    """Looks at the sector of the only host that has joined a lockspace."""

    def __init__(self, lockspace: Path) -> None:
        self._descriptor = os.open(lockspace, os.O_RDONLY)
        self._at = self._find()

    def _find(self) -> int:
        end = time.monotonic() + JOIN_S
        while time.monotonic() < end:
            whole = os.pread(self._descriptor, 1 << 20, 0)
            for at in range(0, len(whole) - SECTOR + 1, SECTOR):
                if sectors.decode_leader(whole[at : at + SECTOR]).timestamp:
                    return at
            time.sleep(LOOK_S)
        raise Unmeasured(f"the mount did not join its lockspace within {JOIN_S:.0f} s")

    def stamp(self) -> int:
        """When the host says to have renewed, in whole seconds of its clock."""
        return sectors.decode_leader(os.pread(self._descriptor, SECTOR, self._at)).timestamp

    def watch(self, until: Future[float]) -> list[float]:
        """The moments at which a renewal was seen, until fio has ended and then one more."""
        seen: list[float] = []
        stamp, more = self.stamp(), True
        limit = float("inf")
        while more and time.monotonic() < limit:
            time.sleep(LOOK_S)
            more = not until.done() or len(seen) < 2
            if until.done() and limit == float("inf"):
                limit = time.monotonic() + JOIN_S
            if (now := self.stamp()) != stamp:
                stamp = now
                seen.append(time.monotonic())
        return seen

    def close(self) -> None:
        """Close the lockspace's file."""
        os.close(self._descriptor)


def measure(target: Target, probe: Probe, mode: str, load: Cell, seconds: float) -> Run:
    """Play one load and watch the renewals meanwhile."""
    run = Run(mode, load.name, unit="MB/s" if load.block == BIG_BLOCK else "op/s")
    with ThreadPoolExecutor(1) as pool:
        playing = pool.submit(fio.run_cell, load, target, seconds)
        seen = probe.watch(playing)
        run.moved = playing.result()
    due = Timing(IO_TIMEOUT).renew_every
    run.late = [after - before - due for before, after in pairwise(seen)]
    if not run.late:
        raise Unmeasured(f"{mode}, {load.name}: fewer than two renewals were seen in {seconds:.0f} s")
    return run


def measure_all(directory: Path, seconds: float) -> list[Run]:
    """Every load in every mode, each mode with a mount of its own."""
    store, work = directory / "store", directory / "work"
    store.mkdir()
    work.mkdir()
    fio.prepare(store)
    found = []
    for mode in MODES:
        options = f"io_timeout={IO_TIMEOUT},state_dir={work}/state"
        target = start_lockfs(mode, store, work, "paxos", options)
        try:
            probe = Probe(store / ".lockfs" / "leases" / "lockspace")
            try:
                for load in LOADS:
                    found.append(measure(target, probe, mode, load, seconds))
                    print(found[-1].line(), flush=True)
                    fio.settle(store)
            finally:
                probe.close()
        finally:
            target.stop()
        if target.log is not None and "renewed" in (log := target.log.read_text(errors="replace")):
            print(log)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="renewals", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="how long each load runs (20)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every lateness, in seconds, there")
    parser.add_argument("directory", type=Path)
    arguments = parser.parse_args(argv)
    if reason := why_not_mount():
        print(reason, file=sys.stderr)
        return 2
    try:
        with tempfile.TemporaryDirectory(prefix="bench-renewals-", dir=arguments.directory) as scratch:
            print(_HEAD)
            found = measure_all(Path(scratch), arguments.seconds)
    except (Unmeasured, CaseFailed, TargetUnavailable, OSError) as error:
        print(f"nothing was measured: {error}", file=sys.stderr)
        return 2
    late = [value for run in found for value in run.late]
    met = max(late) <= LATE_BAR_S
    words = f"{len(late)} renewals, the latest by {max(late):.3f} s, p99 {p99(late):.3f} s"
    print(f"{'met' if met else 'MISSED':7}{words}; none late by more than {LATE_BAR_S:g} s")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(run) for run in found], indent=1))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
