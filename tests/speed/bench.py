"""The measurement as one command: see `scripts/bench --help`."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from tests.speed import chart, fio, names, qemu
from tests.speed.cases import Case, CaseFailed
from tests.speed.report import Figures, Verdict, judge, ratio_table, verdict_table
from tests.speed.targets import BARE, Field, Target, lockfs_name

LOAD_ALLOWED = 0.5
QUIET = 0.1
QUIET_SAMPLE_S = 0.2


class Terminated(Exception):
    """SIGTERM came."""


@dataclass(frozen=True)
class Plan:
    """How long to measure: rounds, the seconds of a cell in one, and those to wait for a quiet machine."""

    rounds: int
    seconds: float
    patience: float = 0.0


FULL = Plan(rounds=5, seconds=0.6)
QUICK = Plan(rounds=2, seconds=0.5)


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench",
        description="Measure lockfs, mode by mode, against the bare directory, plain pyfuse3 and bindfs.",
    )
    parser.add_argument("--quick", action="store_true", help="two short rounds: about 8 minutes and not 25")
    parser.add_argument("--rounds", type=int, help="how many rounds, whatever the mode says")
    only, target = (
        "only cases with NAME in their name; may repeat",
        "only this target beside bare; may repeat",
    )
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help=only)
    parser.add_argument("--target", action="append", default=[], metavar="NAME", help=target)
    parser.add_argument(
        "--patience", type=float, default=0.0, metavar="SECONDS",
        help="before each case wait at most this long until the machine does little else",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="write the chart there, as SVG")
    parser.add_argument("--cache", type=Path, help="where pyfuse3's source package is kept between runs")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and end")
    parser.add_argument("directory", nargs="?", type=Path, help="a directory on the disk to measure")
    return parser.parse_args(argv)


def _machine() -> dict[str, object]:
    facts: dict[str, object] = {
        "kernel": platform.release().partition("-")[0],
        "architecture": platform.machine(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "load before": round(os.getloadavg()[0], 2),
    }
    return facts


def _measure(case: Case, target: Target, seconds: float, figures: Figures) -> None:
    try:
        found = case.measure(target, seconds) if target.alive() else None
        if found is None or not target.alive():
            raise CaseFailed("its server has ended")
    except (CaseFailed, OSError, RuntimeError) as error:
        for metric in case.metrics:
            figures.failed.setdefault(metric, {})[target.name] = str(error)
        return
    for metric, value in found.items():
        figures.add(metric, target.name, value)


def _busy() -> float:
    """The share of all processors' time that was used in the next QUIET_SAMPLE_S (0 to 1)."""

    def times() -> tuple[int, int]:
        with open("/proc/stat") as file:
            fields = [int(word) for word in file.readline().split()[1:9]]
        return sum(fields), fields[3] + fields[4]

    before, idle_before = times()
    time.sleep(QUIET_SAMPLE_S)
    after, idle_after = times()
    return 1 - (idle_after - idle_before) / max(1, after - before)


def _wait_for_quiet(seconds: float) -> None:
    """Return when the machine does little, or after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and _busy() > QUIET:
        pass


def _round(cases: list[Case], field: Field, number: int, plan: Plan, figures: Figures) -> None:
    """One pass over every case; who goes first changes from case to case and from round to round."""
    backends = {lockfs_name("passthrough", "nop")}
    for index, case in enumerate(cases):
        figures.metrics.update(case.metrics)
        _wait_for_quiet(plan.patience)
        field.revive()
        chosen = [target for target in field.targets if case.backends or target.name not in backends]
        turn = (number + index) % len(chosen)
        order = chosen[turn:] + chosen[:turn]
        if number % 2:
            order.reverse()
        for target in order:
            if target.name in figures.failed.get(next(iter(case.metrics)), {}):
                continue
            _measure(case, target, plan.seconds, figures)
        progress = f"\rround {number + 1} of {plan.rounds}: {index + 1} of {len(cases)} cases"
        print(progress, end="", file=sys.stderr)
    print(file=sys.stderr)


def _document(figures: Figures, field: Field, verdicts: list[Verdict], machine: object, plan: Plan) -> object:
    results: dict[str, object] = {}
    for metric, kind in figures.metrics.items():
        row: dict[str, object] = {}
        for target, values in figures.values.get(metric, {}).items():
            ratios = figures.ratios(metric, target)
            row[target] = {
                "median": statistics.median(values),
                "least": min(values),
                "most": max(values),
                "ratio to bare": round(statistics.median(ratios), 4) if ratios else None,
            }
        noise = figures.noise(metric)
        results[metric] = {
            "unit": kind.unit,
            "better": kind.better,
            "noise": None if noise is None else round(noise, 4),
            "targets": row,
            "failed": figures.failed.get(metric, {}),
        }
    judged = [
        {
            "bar": verdict.bar.what, "case": verdict.bar.metric, "limit": verdict.bar.limit,
            "found": None if verdict.found is None else round(verdict.found, 4), "passed": verdict.passed,
        }
        for verdict in verdicts
    ]  # fmt: skip
    return {
        "machine": machine,
        "rounds": plan.rounds,
        "seconds a cell": plan.seconds,
        "targets": {target.name: target.note for target in field.targets},
        "absent": field.absent,
        "results": results,
        "bars": judged,
    }


def _all_cases(store: Path, plan: Plan) -> list[Case]:
    opens = names.Opens(plan.rounds)
    return [*fio.cases(store), *qemu.cases(), *names.cases(opens)]


def _wanted(cases: list[Case], only: list[str]) -> list[Case]:
    if not only:
        return cases
    return [case for case in cases if any(word in case.name for word in only)]


def run(arguments: argparse.Namespace, directory: Path, plan: Plan) -> int:
    """Measure in `directory`, print, write what was asked for; 0 if every bar was met."""
    with tempfile.TemporaryDirectory(prefix="lockfs-bench-store-", dir=directory) as made:
        store = Path(made)
        cases = _wanted(_all_cases(store, plan), arguments.only)
        work = Path(tempfile.mkdtemp(prefix="lockfs-bench-"))
        field = Field(store, work)
        figures = Figures()
        machine = _machine()
        interrupted = False
        try:
            fio.prepare(store)
            field.open(arguments.cache or work / "cache", frozenset(arguments.target))
            for name, reason in field.absent.items():
                print(f"not measured: {name}: {reason}", file=sys.stderr)
            for number in range(plan.rounds):
                _round(cases, field, number, plan, figures)
        except (KeyboardInterrupt, Terminated):
            print("\ninterrupted; what follows is what was measured until then", file=sys.stderr)
            interrupted = True
        finally:
            field.close()
            shutil.rmtree(work, ignore_errors=True)
    met = _publish(arguments, figures, field, machine, plan)
    return 0 if met and not interrupted else 1


def _publish(
    arguments: argparse.Namespace, figures: Figures, field: Field, machine: dict[str, object], plan: Plan
) -> bool:
    verdicts = judge(figures)
    document = _document(figures, field, verdicts, machine, plan)
    print(ratio_table(figures, [target.name for target in field.targets if target.name != BARE]))
    print()
    print(verdict_table([one for one in verdicts if one.found is not None or not arguments.target]))
    for metric, row in figures.failed.items():
        for target, reason in row.items():
            print(f"failed: {metric} on {target}: {reason}")
    before = os.getloadavg()[0]
    if isinstance(machine["load before"], float) and machine["load before"] > LOAD_ALLOWED:
        print(f"note: the machine was busy when this began (load {machine['load before']}, now {before:.1f})")
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    if arguments.chart:
        arguments.chart.write_text(chart.draw(document))
    return all(verdict.passed for verdict in verdicts)


def main(argv: list[str] | None = None) -> int:
    """The command."""
    arguments = _arguments(sys.argv[1:] if argv is None else argv)
    plan = QUICK if arguments.quick else FULL
    plan = replace(plan, rounds=arguments.rounds or plan.rounds, patience=arguments.patience)
    directory = arguments.directory or Path(tempfile.gettempdir())
    if arguments.list:
        print("\n".join(case.name for case in _all_cases(directory, plan)))
        return 0
    if not directory.is_dir():
        print(f"bench: {directory} is not a directory", file=sys.stderr)
        return 2
    if os.geteuid() != 0:
        print("bench: root is needed, to mount", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, _terminated)
    return run(arguments, directory, plan)


def _terminated(number: int, _frame: object) -> NoReturn:
    # As an exception, so that every mount is taken down on the way out.
    raise Terminated(number)


if __name__ == "__main__":
    raise SystemExit(main())
