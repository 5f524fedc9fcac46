"""Kill lockfs again and again while programs work on its mount, and tell what they saw of it.

    python -m tests.failover.kills --count 200 --io guarded --backend paxos [--whom worker] [--json FILE]

The first mount of a store is the victim; a second mount, another host, tries all the time to get what is
held on the first. A kill comes at a random moment, about one a second, once the process killed before was
replaced and its successor has answered. Good is: no error of any program, no wrong data, no lease dropped,
no descriptor or process left. The stalls are told, and judged with --limits only.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.failover import catalogue, rigs, servers, timeline
from tests.failover.contended_loads import TARGETS
from tests.failover.loads import Load
from tests.failover.recording import FAILED, READY, Board, Record, Request
from tests.failover.rigs import MountRig, Rig, RigError
from tests.failover.timeline import Kill

WHOM = ("worker", "guardian", "both", "stop")
READY_S = 120.0
REPAIR_S = 40.0
END_S = 180.0
"""fio ends a run with a wholly verified file, which takes its time."""
SETTLE_S = 1.0
"""After the start of all programs, which keeps the machine busy."""
POLL_S = 0.01
LONGEST_MS, MEDIAN_MS = 500.0, 200.0
"""The limits of one request over a kill of the worker."""
FAULTS_SHOWN = 4
LAST_WORDS_S = 8.0
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Plan:
    """What to do: how many kills of whom, or with none how many seconds of work."""

    count: int = 0
    whom: str = "worker"
    seconds: float = 10.0
    pause_s: float = 1.0
    fio: bool = True
    guests: bool = True
    seed: int = 0
    only: tuple[str, ...] = ()
    repair_s: float = REPAIR_S
    settle_s: float = rigs.SETTLE_S

    def kinds(self) -> dict[str, type[Load]]:
        """The programs of the first mount; `only` names some, and without it all work."""
        kinds = dict(catalogue.ORDINARY)
        kinds |= catalogue.FIO if self.fio else {}
        kinds |= catalogue.GUESTS if self.guests else {}
        return {
            name: kind
            for name, kind in kinds.items()
            if not self.only or name in (*self.only, catalogue.BEAT)
        }


class Broken(Exception):
    """The run cannot go on; the text tells why."""


@dataclass
class _Running:
    name: str
    slot: int
    board: Board
    process: subprocess.Popen[bytes]
    record: Path
    log: Path

    @property
    def row(self) -> Any:
        return self.board.row(self.slot)


@dataclass
class Report:
    """What came of a run; `failures` is empty for a good one."""

    plan: dict[str, Any]
    kills: list[dict[str, Any]] = field(default_factory=list)
    stalls: dict[str, float] = field(default_factory=dict)
    quiet: dict[str, Any] = field(default_factory=dict)
    latencies: dict[str, dict[str, float]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


class Run:
    """One run on one rig. `base` is an empty directory outside the mounts."""

    def __init__(self, rig: Rig, plan: Plan, base: Path) -> None:
        self._rig = rig
        self._plan = plan
        self._bare = base / "bare"
        self._bare.mkdir()
        self._boards = {name: Board(self._bare / name, create=True) for name in ("near-board", "far-board")}
        self._random = random.Random(plan.seed or None)
        self._loads: list[_Running] = []
        self._kills: list[Kill] = []
        self._known: set[int] = set()
        self._since = 0
        self._aborted: int | None = None
        self._signals: list[tuple[int, int]] = []  # when, and of which kill
        self._scratch = tempfile.mkdtemp(prefix="lockfs-loads-")  # a short name: sockets lie in it
        self._held: list[Path] = []
        self.report = Report(plan=dict(vars(plan)))

    def go(self) -> Report:
        """Everything from the first file to the last check. Never raises for what the victim did."""
        self._known.add(os.getpid())
        fail = self.report.failures.append
        kinds = self._plan.kinds()
        try:
            for name, kind in kinds.items():
                self._held += kind.seed(self._rig.store / name)
            self._rig.start()
            before = rigs.steady(self._rig.mark)
            self._work(list(kinds))
            self._settle(before)
        except (Broken, RigError) as error:
            fail(str(error))
            self._stop_in_time()
            self._aborted = time.monotonic_ns()
            self._rig.abort()
        finally:
            self._end_all()
            self._gather()
            self.report.failures += self._rig.stop()
            self._bury()
            for board in self._boards.values():
                board.close()
        return self.report

    # --- the programs

    def _work(self, names: list[str]) -> None:
        for name in names:
            self._launch(name, self._rig.near / name, "near-board")
        self._await_ready()
        if self._rig.far is not None:
            self._launch_rivals(self._rig.far)
            self._await_ready()
        self._rest(SETTLE_S)
        self._since = time.monotonic_ns()
        if self._plan.count == 0:
            self._rest(self._plan.seconds)
        for number in range(1, self._plan.count + 1):
            self._rest(self._random.uniform(0.5, 1.5) * self._plan.pause_s)
            self._kills.append(self._kill(number))
        if self._plan.count:
            self._rest(self._plan.pause_s)
        self._stop("far-board")
        self._stop("near-board")

    def _launch(self, name: str, directory: Path, board: str) -> None:
        slot = len(self._loads)
        record, log = self._bare / f"{name}.json", self._bare / f"{name}.log"
        command = [
            sys.executable, "-m", "tests.failover.loads", name, "--directory", str(directory),
            "--bare", str(self._bare), "--board", str(self._bare / board), "--slot", str(slot),
            "--record", str(record),
        ]  # fmt: skip
        with open(log, "wb") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
                env={**os.environ, "TMPDIR": self._scratch},
            )  # fmt: skip
        self._loads.append(_Running(name, slot, self._boards[board], process, record, log))

    def _launch_rivals(self, far: Path) -> None:
        (self._rig.store / "contended.img").write_bytes(bytes(4096))
        store = self._rig.store
        targets = {
            "paths": [str(far / path.relative_to(store)) for path in self._held],
            "locked": [str(path) for path in self._held] if self._rig.backend == "fcntl" else [],
        }
        (self._bare / TARGETS).write_text(json.dumps(targets))
        self._launch(catalogue.NEAR, self._rig.near, "far-board")
        self._launch(catalogue.FAR, far, "far-board")
        self._launch(catalogue.RIVAL, far, "far-board")

    def _await_ready(self) -> None:
        end = time.monotonic() + READY_S
        while waiting := [load.name for load in self._loads if load.row.state != READY]:
            self._see_alive()
            if time.monotonic() > end:
                raise Broken(f"not ready within {READY_S:.0f} s: {', '.join(waiting)}")
            time.sleep(POLL_S)

    def _see_alive(self) -> None:
        """Raise Broken if a load is over before its time."""
        for load in self._loads:
            if load.process.poll() is not None or load.row.state == FAILED:
                raise Broken(f"{load.name} ended early: {load.log.read_text(errors='replace')[-500:]}")

    def _rest(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._see_alive()
            time.sleep(min(left, 0.1))

    def _stop(self, board: str) -> None:
        self._boards[board].stop()
        end = time.monotonic() + END_S
        for load in self._loads:
            if load.board is self._boards[board]:
                try:
                    load.process.wait(max(0.0, end - time.monotonic()))
                except subprocess.TimeoutExpired:
                    waits = (time.monotonic_ns() - load.row.begun) / 1e9 if load.row.begun else 0.0
                    raise Broken(f"{load.name} does not end; its request waits for {waits:.1f} s") from None

    def _stop_in_time(self) -> None:
        """Let those that can end tell what they saw; for the others there is `_end_all`."""
        for board in self._boards.values():
            board.stop()
        end = time.monotonic() + LAST_WORDS_S
        while any(load.process.poll() is None for load in self._loads) and time.monotonic() < end:
            time.sleep(POLL_S)

    def _end_all(self) -> None:
        """End what still runs; the mounts are at their end or were aborted."""
        for load in self._loads:
            if load.process.poll() is None:
                load.process.terminate()
        for load in self._loads:
            try:
                load.process.wait(5.0)
            except subprocess.TimeoutExpired:
                load.process.kill()
                load.process.wait()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(load.process.pid, signal.SIGKILL)  # what it started, if that is left
        shutil.rmtree(self._scratch, ignore_errors=True)

    # --- the kills

    def _kill(self, number: int) -> Kill:
        before = servers.find(self._rig.mark)
        self._known |= set(before.all)
        victims = _victims(before, self._plan.whom)
        self._random.shuffle(victims)
        if self._rig.started in victims:
            self._rig.started_is_killed()
        sign = signal.SIGSTOP if self._plan.whom == "stop" else signal.SIGKILL
        at = time.monotonic_ns()
        self._signals.append((at, number))
        for pid in victims:
            os.kill(pid, sign)
        return Kill(number, self._plan.whom, tuple(victims), at, self._repaired(number, before, victims))

    def _repaired(self, number: int, before: servers.Servers, victims: list[int]) -> int:
        """When the victims were gone, replaced, and a request asked after that was answered."""
        beat = next(load for load in self._loads if load.name == catalogue.BEAT).row
        self._wait(number, lambda: not any(map(servers.alive, victims)), "the victims are not gone")
        gone = time.monotonic_ns()

        def replaced() -> bool:
            after = servers.find(self._rig.mark)
            worker = after.worker is not None and (
                before.worker not in victims or after.worker != before.worker
            )
            guardian = after.guardian is not None and (
                before.guardian not in victims or after.guardian != before.guardian
            )
            return worker and guardian

        self._wait(number, lambda: beat.served > gone, "no request was answered")
        served = time.monotonic_ns()
        self._wait(number, replaced, "the victims were not replaced")
        return served if before.worker in victims else time.monotonic_ns()

    def _wait(self, number: int, condition: Callable[[], bool], complaint: str) -> None:
        end = time.monotonic() + self._plan.repair_s
        while not condition():
            self._bury()
            self._see_alive()
            if time.monotonic() > end:
                family = servers.find(self._rig.mark)
                raise Broken(f"kill {number}: {complaint} within {self._plan.repair_s:.0f} s: {family}")
            time.sleep(POLL_S)

    def _bury(self) -> None:
        """Collect orphans that ended: this process is their parent in place of init."""
        self._rig.bury()
        foreign = self._known - {load.process.pid for load in self._loads} - {self._rig.started}
        for task in os.listdir("/proc/self/task"):
            children = map(int, Path(f"/proc/self/task/{task}/children").read_text().split())
            for pid in foreign.intersection(children):
                if not servers.alive(pid):
                    os.waitpid(pid, os.WNOHANG)

    # --- the end

    def _settle(self, before: list[str]) -> None:
        """The loads are gone: so must be what the mount had for them."""
        fail = self.report.failures.append
        for line in rigs.leaked(self._rig.mark, before, self._plan.settle_s):
            fail(f"descriptors: {line}")
        family = servers.find(self._rig.mark)
        end = time.monotonic() + self._plan.settle_s
        while (dead := servers.dead_children(self._known | set(family.all))) and time.monotonic() < end:
            self._bury()
            time.sleep(POLL_S)
        for line in dead:
            fail(f"a dead process is left: {line}")
        self.report.facts["descriptors"] = len(before)
        self.report.facts["servers"] = dict(vars(family))
        status = self._rig.status()
        if status is not None:
            self.report.facts["status"] = dict(status)
            for fault in _status_faults(status, family):
                fail(f"lockfsctl status: {fault}")

    def _gather(self) -> None:
        fail = self.report.failures.append
        requests: list[Request] = []
        for load in self._loads:
            try:
                record = Record.read(load.record)
            except FileNotFoundError:
                fail(f"{load.name} left no record: {load.log.read_text(errors='replace')[-500:]}")
                continue
            requests += [request for request in record.requests if request.begun >= self._since]
            self.report.facts[load.name] = {"answered": load.row.count, **record.facts}
            known = [fault for fault in record.faults if self._aborted is None or fault.at < self._aborted]
            for fault in known[:FAULTS_SHOWN]:
                fail(f"{fault.load}: {self._when(fault.at)}: {fault.what}")
            if len(known) > FAULTS_SHOWN:
                fail(f"{load.name}: {len(known) - FAULTS_SHOWN} more errors")
        guests = [request for request in requests if request.load in catalogue.GUESTS]
        exact = [request for request in requests if request.load not in catalogue.GUESTS]
        worst, rest = timeline.sort_out(self._kills, exact)
        of_guests, _ = timeline.sort_out(self._kills, guests)
        self.report.kills = timeline.rows(self._kills, worst, of_guests)
        self.report.stalls = timeline.summary(self.report.kills)
        slowest = max(rest, key=lambda request: request.ms, default=None)
        if slowest is not None:
            self.report.quiet = {"longest_ms": round(slowest.ms, 1), "of": f"{slowest.load}: {slowest.what}"}
        self.report.latencies = timeline.latencies([*rest, *guests])
        self.report.facts["requests"] = len(requests)

    def _when(self, at: int) -> str:
        earlier = [(sent, number) for sent, number in self._signals if sent <= at]
        if not earlier:
            return "before any kill"
        sent, number = earlier[-1]
        return f"{(at - sent) / 1e6:.0f} ms after kill {number}"


def _victims(family: servers.Servers, whom: str) -> list[int]:
    wanted = {
        "worker": (family.worker,), "stop": (family.worker,), "guardian": (family.guardian,),
        "both": (family.guardian, family.worker),
    }[whom]  # fmt: skip
    if None in wanted:
        raise Broken(f"there is no {whom} to kill: {family}")
    return list(dict.fromkeys(pid for pid in wanted if pid is not None))


def _status_faults(status: Any, family: servers.Servers) -> list[str]:
    if not status:
        return ["it does not tell of the mount"]
    found = [f"{status[name]} {name} are left" for name in ("images", "handles") if status.get(name)]
    for role in ("guardian", "twin", "worker", "spare"):
        told = status.get(role)
        if isinstance(told, int) and told != getattr(family, role):
            found.append(f"{role} is said to be {told}, and is {getattr(family, role)}")
    return found


def judge(report: Report) -> list[str]:
    """What of the stalls is beyond the limits of a kill of the worker."""
    found = []
    for name, limit in (
        ("longest_ms", LONGEST_MS),
        ("median_ms", MEDIAN_MS),
        ("guests_longest_ms", LONGEST_MS),
    ):
        if report.stalls.get(name, 0.0) >= limit:
            found.append(f"stalls: {name} is {report.stalls[name]}, must be below {limit:.0f}")
    return found


def adopt_orphans() -> None:
    """Become the parent of every descendant whose parent ends, so that none is lost sight of."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def show(report: Report) -> str:
    """The report for a reader."""
    lines = [f"plan: {report.plan}"]
    for row in report.kills:
        stall = f"longest request {row['stall_ms']} ms ({row['stall_of']})"
        lines.append(f"kill {row['number']}: repaired in {row['repaired_ms']} ms, {stall}")
    lines.append(f"stalls: {report.stalls or 'none'}; without a kill: {report.quiet or 'nothing'}")
    lines += [f"{name}: {value}" for name, value in report.facts.items()]
    lines += [f"FAILED {failure}" for failure in report.failures]
    lines.append("not good" if report.failures else "good")
    return "\n".join(lines)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=0, help="kills; 0: none, work for --seconds")
    parser.add_argument("--io", choices=("auto", "passthrough", "guarded", "daemon"), default="auto")
    parser.add_argument("--backend", choices=("fcntl", "paxos", "nop"), default="fcntl")
    parser.add_argument("--whom", choices=WHOM, default="worker")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--pause", type=float, default=1.0, help="seconds between kills on average")
    parser.add_argument("--seed", type=int, default=0, help="of the moments; 0: any")
    parser.add_argument("--without-guests", action="store_true")
    parser.add_argument("--without-fio", action="store_true")
    parser.add_argument("--only", default="", help="of the first mount's programs these, with commas between")
    parser.add_argument("--limits", action="store_true", help="stalls beyond the limits are a failure")
    parser.add_argument("--base", type=Path, help="a directory to work in; default: a temporary one")
    parser.add_argument("--keep", action="store_true", help="leave the directory, with all logs, behind")
    parser.add_argument("--json", type=Path, help="where to write the whole report")
    arguments = parser.parse_args()
    adopt_orphans()
    base = Path(tempfile.mkdtemp(prefix="lockfs-kills-", dir=arguments.base))
    plan = Plan(
        arguments.count, arguments.whom, arguments.seconds, arguments.pause,
        fio=not arguments.without_fio, guests=not arguments.without_guests, seed=arguments.seed,
        only=tuple(arguments.only.split(",")) if arguments.only else (),
    )  # fmt: skip
    try:
        report = Run(MountRig(base, arguments.io, arguments.backend), plan, base).go()
        report.plan |= {"io": arguments.io, "backend": arguments.backend}
        if arguments.limits:
            report.failures += judge(report)
    finally:
        if not arguments.keep and not os.path.ismount(base / "a") and not os.path.ismount(base / "b"):
            shutil.rmtree(base, ignore_errors=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(vars(report), indent=1))
    print(show(report))
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
