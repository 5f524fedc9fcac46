"""Runs the model checker: spin makes a C program of a model, which visits every state within the bounds.

The searches are exhaustive: no bit state hashing, and a search that did not end (depth, memory, time) is an
error, not a result. Assertions are the only properties; a state in which nobody moves is none.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MODELS = Path(__file__).parent
SEARCH_DEPTH = 1_000_000
TOOL_S = 120.0  # spin and gcc, each; they take a second


@dataclass(frozen=True)
class Outcome:
    """What the search found. `violated` is the text of the first assertion that failed, None if none did."""

    states: int
    violated: str | None


def why_not() -> str | None:
    """Why the checker cannot run here, or None."""
    missing = [tool for tool in ("spin", "gcc") if shutil.which(tool) is None]
    return f"needs {' and '.join(missing)} (Debian packages of that name)" if missing else None


def check(model: str, macros: Sequence[str], work: Path, search_s: float) -> Outcome:
    """Search all states of `model`.pml, built with `macros` (NAME or NAME=VALUE), in the directory `work`.

    Raises:
        RuntimeError: a tool failed, or the search did not reach its end.
        subprocess.TimeoutExpired: it took longer than `search_s`.
    """
    shutil.copy(MODELS / f"{model}.pml", work)
    _run(["spin", *(f"-D{macro}" for macro in macros), "-a", f"{model}.pml"], work, TOOL_S)
    options = ["-O1", "-w", "-DSAFETY", "-DCOLLAPSE", "-DVECTORSZ=512"]
    _run(["gcc", *options, "-o", "pan", "pan.c"], work, TOOL_S)
    return _outcome(_run(["./pan", "-E", f"-m{SEARCH_DEPTH}"], work, search_s))


def _run(command: list[str], work: Path, timeout: float) -> str:
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=timeout, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} answered {done.returncode}: {done.stdout}{done.stderr}")
    return done.stdout


def _outcome(report: str) -> Outcome:
    errors = re.search(r"errors: (\d+)", report)
    states = re.search(r"(\d+) states, stored", report)
    violated = re.search(r"assertion violated (.*) \(at depth", report)
    if errors is None or states is None or "max search depth too small" in report:
        raise RuntimeError(f"not a complete search: {report}")
    if (violated is None) != (errors[1] == "0") or (violated is None and "Search not completed" in report):
        raise RuntimeError(f"not a complete search: {report}")
    return Outcome(int(states[1]), violated[1] if violated else None)
