"""The fuzzer, for a moment: that its target works, and that it finds nothing near the vectors."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.coverage import ROOT, is_measured_run

RUNS = 4000
DEADLINE_S = 120.0


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed")
@pytest.mark.skipif(is_measured_run(), reason="its branches are not this process's")
def test_nothing_is_found(tmp_path: Path) -> None:
    """A few thousand inputs, guided by the branches they reach."""
    corpus, output = tmp_path / "corpus", tmp_path / "found-"
    corpus.mkdir()
    command = [sys.executable, "-m", "tests.records.fuzz_records"]
    options = [f"-runs={RUNS}", "-seed=1", f"-artifact_prefix={output}", str(corpus)]
    ran = subprocess.run(
        [*command, *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert f"Done {RUNS} runs" in ran.stderr, ran.stderr
