"""The scripts are sound shell, quick when nothing is missing, and work from anywhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .conftest import ROOT

OVERHEAD_S = 0.3
_SHELL = ("lockfs", "test", "install", "_setup.sh")


def test_shellcheck() -> None:
    """shellcheck finds nothing."""
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    files = [f"scripts/{name}" for name in _SHELL] + [".ci/run"]
    done = subprocess.run(["shellcheck", "-x", *files], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == ""
    assert done.returncode == 0


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of this checkout whose environment is ready: the interpreter that runs this test."""
    made = tmp_path / "a checkout"
    made.mkdir()
    shutil.copytree(ROOT / "lockfs", made / "lockfs", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "scripts", made / "scripts", symlinks=True)
    shutil.copy(ROOT / "requirements.lock", made)
    environment = made / ".venv" / "bin"
    environment.mkdir(parents=True)
    python = environment / "python3"
    python.write_text(f"#!/bin/sh\nshift\nPYTHONPATH='{made}' exec {sys.executable} -P \"$@\"\n")
    python.chmod(0o755)
    key = 'source scripts/_setup.sh; environment_key "$root/requirements.lock" | sha256sum'
    stamp = subprocess.run(["bash", "-c", key], cwd=made, capture_output=True, text=True, check=True)
    (made / ".venv" / ".runtime").write_text(stamp.stdout.strip())
    (made / ".venv" / ".linked").touch()
    return made


def ran(command: Path, *arguments: str, cwd: str = "/") -> subprocess.CompletedProcess[str]:
    """Run a script from a directory that is not its own, without input."""
    return subprocess.run(
        [command, *arguments], cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )


def test_runs_from_anywhere(checkout: Path, tmp_path: Path) -> None:
    """By its path, by a link, from any directory; a module in the caller's directory is not taken."""
    if shutil.which("fusermount3") is None:
        pytest.skip("fusermount3 is not installed")
    (tmp_path / "lockfs.py").write_text("raise SystemExit('the wrong module')")
    links = {"lockfs": "lockfs 0", "lockfsctl": "lockfsctl 0", "mount.lockfs": "lockfs 0"}
    for name, words in links.items():
        link = tmp_path / name
        link.symlink_to(checkout / "scripts" / name)
        for command in (link, checkout / "scripts" / name):
            done = ran(command, "--version", cwd=str(tmp_path))
            assert (done.returncode, done.stderr) == (0, "")
            assert done.stdout.startswith(words)


def test_arguments_and_exit_code(checkout: Path) -> None:
    """Every argument arrives as it is, and the exit code comes back."""
    if shutil.which("fusermount3") is None:
        pytest.skip("fusermount3 is not installed")
    done = ran(checkout / "scripts" / "lockfs", "-o", "wait=a b'\"*", "", "/m")
    assert done.returncode == 1
    assert done.stderr.startswith("lockfs: wait='a b\\'\"*' is not a time")


def test_overhead(checkout: Path) -> None:
    """With nothing to install the script costs less than OVERHEAD_S on top of Python's own start."""
    quick = checkout / ".venv" / "bin" / "python3"
    quick.write_text("#!/bin/sh\nexit 0\n")
    ran(checkout / "scripts" / "lockfs")
    times = []
    for _ in range(5):
        begin = time.monotonic()
        assert ran(checkout / "scripts" / "lockfs").returncode == 0
        times.append(time.monotonic() - begin)
    assert min(times) < OVERHEAD_S


def test_links(checkout: Path, tmp_path: Path) -> None:
    """A link is made where the name is free or leads nowhere, and nothing else is replaced."""
    bin_directory = tmp_path / "bin"
    bin_directory.mkdir()
    command = f"source scripts/_setup.sh; program=test; link_command lockfs '{bin_directory}'"

    def link() -> str:
        done = subprocess.run(
            ["bash", "-c", command], cwd=checkout, capture_output=True, text=True, check=True
        )
        return done.stderr

    assert "now leads to" in link()
    assert os.path.samefile(bin_directory / "lockfs", checkout / "scripts" / "lockfs")
    assert link() == ""
    (bin_directory / "lockfs").unlink()
    (bin_directory / "lockfs").symlink_to("/none/such")
    assert "dead link" in link()
    (bin_directory / "lockfs").unlink()
    (bin_directory / "lockfs").write_text("other")
    assert "stays as it is" in link()
    assert (bin_directory / "lockfs").read_text() == "other"


def test_lock_files() -> None:
    """Every requirement is pinned to one version, and what lockfs runs on by checksum as well."""
    for name, checksums in (("requirements.lock", True), ("requirements-test.lock", False)):
        lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
        assert lines
        assert all("==" in line for line in lines)
        assert all(("--hash=sha256:" in line) == checksums for line in lines)
