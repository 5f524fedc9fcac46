"""Whether the tests of a folder reach every branch of a package: measured, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
DEADLINE_S = 300.0
MEASURED = "LOCKFS_TEST_MEASURED"
"""Set in the environment of the measured run, so that a test that measures does not start itself."""


def is_measured_run() -> bool:
    """Whether this process is the measured one."""
    return MEASURED in os.environ


def branch_gaps(package: str, tests: str, scratch: Path, *, without: Sequence[str] = ()) -> str:
    """What the tests in folder `tests` leave out of `package` (both relative to the checkout); "" if nothing.

    `scratch` is a directory for the data; `without` are files of the folder that are not run. Fails if the
    tests do, or if they take more than DEADLINE_S.
    """
    rules = scratch / "coverage.cfg"
    rules.write_text(f"[run]\nbranch = true\nsource = {ROOT / package}\ndata_file = {scratch / 'data'}\n")
    environment = {**os.environ, MEASURED: "1", "PYTHONPATH": str(ROOT)}
    environment.pop("CI", None)  # what the measured run skips is run by the one around it

    def coverage(*words: str) -> subprocess.CompletedProcess[str]:
        command: Sequence[str] = (sys.executable, "-m", "coverage", words[0], f"--rcfile={rules}", *words[1:])
        return subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )

    basetemp = f"--basetemp={scratch / 'pytest'}"
    ignored = [f"--ignore={tests}/{name}" for name in without]
    chosen = ("-m", "not slow", basetemp, *ignored, tests)
    ran = coverage("run", "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen)
    if ran.returncode:
        raise AssertionError(f"the measured tests failed:\n{ran.stdout}{ran.stderr}")
    report = coverage("report", "--show-missing", "--skip-covered", "--fail-under=100", "--precision=2")
    return "" if not report.returncode else report.stdout + report.stderr
