"""Runs pjdfstest on the bare directory and on lockfs, and compares what fails.

The suite is not part of lockfs: the caller gives the directory of its sources, in which it has been built as
its README says. Nothing is fetched, and nothing is written there.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tests.speed.targets import Target, TargetUnavailable, start_lockfs

FILE_DEADLINE_S = 300.0
WORKERS = 2
WORDS = 160
MODES = ("passthrough", "daemon")
_LINE = re.compile(r"^(not )?ok (\d+)(.*)$", re.MULTILINE)
_PLAN = re.compile(r"^1\.\.(\d+)", re.MULTILINE)


class SuiteUnusable(Exception):
    """The suite cannot run; the message is a sentence that says what to do."""


@dataclass
class Outcome:
    """How many assertions one run had, and the words of each that failed, by file and number."""

    assertions: int = 0
    failures: dict[tuple[str, int], str] = field(default_factory=dict)

    def beyond(self, other: Outcome) -> dict[tuple[str, int], str]:
        """The failures that `other` does not have."""
        return {key: words for key, words in self.failures.items() if key not in other.failures}


def shorten(words: str) -> str:
    """The words of a failure for a table: some try paths of thousands of bytes."""
    return words if len(words) <= WORDS else f"{words[: WORDS // 2]} … {words[-WORDS // 2 :]}"


def parse(name: str, output: str, outcome: Outcome) -> None:
    """Count one file's TAP output into `outcome`; planned assertions that never came are failures."""
    seen = set()
    for failed, number, words in _LINE.findall(output):
        seen.add(int(number))
        if failed and "# TODO" not in words:
            outcome.failures[name, int(number)] = shorten(words.strip(" -"))
    plan = _PLAN.search(output)
    planned = int(plan[1]) if plan else 0
    if not plan:
        outcome.failures[name, 0] = "no plan was printed"
    for number in range(1, planned + 1):
        if number not in seen:
            outcome.failures[name, number] = "did not run"
    outcome.assertions += max(planned, len(seen))


def copy(source: Path, work: Path, file_system: str) -> Path:
    """A copy of the built suite in `work` that takes `file_system` for the type under test.

    The suite asks for the type to know what to expect; so that the same is expected of lockfs as of the disk
    below, its own setting for a type that it cannot find out is used. Raises SuiteUnusable.
    """
    if not (source / "tests" / "conf").is_file():
        raise SuiteUnusable(f"{source} is not a directory of pjdfstest: it has no tests/conf")
    if not os.access(source / "pjdfstest", os.X_OK):
        raise SuiteUnusable(f"pjdfstest is not built in {source}: build it there as its README says")
    suite = work / "suite"
    shutil.copytree(source / "tests", suite / "tests")
    shutil.copy2(source / "pjdfstest", suite / "pjdfstest")
    with (suite / "tests" / "conf").open("a") as conf:
        conf.write(f'\nfs="{file_system}"\n')
    return suite


def type_of(directory: Path) -> str:
    """The type of the file system of a directory, in capitals, as df names it."""
    done = subprocess.run(
        ["df", "--output=fstype", str(directory)], check=True, capture_output=True, text=True
    )
    return done.stdout.split()[-1].upper()


def run(suite: Path, root: Path, names: Sequence[str] = ()) -> Outcome:
    """Run the suite's files in `root`, each in its own directory; of `names`, a path must hold one."""
    files = sorted((suite / "tests").rglob("*.t"))
    if names:
        files = [file for file in files if any(name in str(file) for name in names)]

    def one(file: Path) -> tuple[str, str]:
        name = str(file.relative_to(suite / "tests"))
        place = Path(tempfile.mkdtemp(prefix=name.replace("/", "-") + "-", dir=root))
        # The suite also acts as users without rights.
        place.chmod(0o755)
        try:
            done = subprocess.run(
                ["sh", str(file)], cwd=place, check=False, stdin=subprocess.DEVNULL, capture_output=True,
                timeout=FILE_DEADLINE_S,
            )  # fmt: skip
            return name, done.stdout.decode(errors="replace")
        except subprocess.TimeoutExpired as error:
            return name, (error.stdout or b"").decode(errors="replace")
        finally:
            shutil.rmtree(place, ignore_errors=True)

    outcome = Outcome()
    with ThreadPoolExecutor(WORKERS) as workers:
        for name, output in workers.map(one, files):
            parse(name, output, outcome)
    return outcome


def compare(
    source: Path,
    directory: Path,
    options: str = "",
    *,
    names: Sequence[str] = (),
    modes: Sequence[str] = MODES,
    tell: Callable[[str], None] = lambda _: None,
) -> Mapping[str, Outcome]:
    """Run the suite on a new store in `directory`, bare and through each mode; raises SuiteUnusable."""
    outcomes: dict[str, Outcome] = {}
    with (
        tempfile.TemporaryDirectory(prefix="lockfs-pjdfstest-") as made,
        tempfile.TemporaryDirectory(prefix="lockfs-pjdfstest-store-", dir=directory) as store_name,
    ):
        work, store = Path(made), Path(store_name)
        work.chmod(0o755)
        store.chmod(0o755)
        suite = copy(source, work, type_of(store))
        outcomes["bare"] = run(suite, store, names)
        tell(f"bare: {len(outcomes['bare'].failures)} of {outcomes['bare'].assertions} failed")
        for mode in modes:
            try:
                target: Target = start_lockfs(mode, store, work, options=options)
            except TargetUnavailable as reason:
                raise SuiteUnusable(str(reason)) from reason
            try:
                outcomes[mode] = run(suite, target.root, names)
            finally:
                target.stop()
            tell(f"lockfs io={mode}: {len(outcomes[mode].failures)} of {outcomes[mode].assertions} failed")
            for (file, number), words in outcomes[mode].beyond(outcomes["bare"]).items():
                tell(f"  {file} {number}: {words}")
    return outcomes


def summary(outcomes: Mapping[str, Outcome]) -> str:
    """A table of the runs as Markdown, and each failure that the bare directory does not have."""
    lines = ["| run | assertions | failures | not on the bare directory |", "| --- | --- | --- | --- |"]
    bare = outcomes["bare"]
    for name, outcome in outcomes.items():
        shown = name if name == "bare" else f"lockfs, io={name}"
        lines.append(
            f"| {shown} | {outcome.assertions} | {len(outcome.failures)} | {len(outcome.beyond(bare))} |"
        )
    for name, outcome in outcomes.items():
        beyond = outcome.beyond(bare)
        if beyond:
            lines += ["", f"io={name}:", ""]
            lines += [f"* `{file}` {number}: {words}" for (file, number), words in beyond.items()]
    return "\n".join(lines) + "\n"


def main() -> int:
    """The command; 0 if lockfs fails nowhere where the bare directory passes."""
    parser = argparse.ArgumentParser(prog="pjdfstest", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", type=Path, help="the directory of pjdfstest, built there")
    parser.add_argument("options", nargs="?", default="", help="mount options beside io=")
    parser.add_argument(
        "--directory", type=Path, default=Path(tempfile.gettempdir()), help="where the store is"
    )
    parser.add_argument("--only", action="append", default=[], help="only files with this in their path")
    parser.add_argument(
        "--mode", action="append", default=[], help=f"io modes; {' and '.join(MODES)} if none"
    )
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        print("pjdfstest: root is needed", file=sys.stderr)
        return 2
    try:
        outcomes = compare(
            arguments.source,
            arguments.directory,
            arguments.options,
            names=arguments.only,
            modes=arguments.mode or MODES,
            tell=lambda words: print(words, file=sys.stderr),
        )
    except SuiteUnusable as reason:
        print(f"pjdfstest: {reason}", file=sys.stderr)
        return 2
    print(summary(outcomes))
    return 1 if any(outcome.beyond(outcomes["bare"]) for outcome in outcomes.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
