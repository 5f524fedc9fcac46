"""What is written through a mount is what is read, in every data mode."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.suites import fsx
from tests.support.mounts import Mount, mounted, needs_mount

FULL = "LOCKFS_SUITES_FULL"
OPERATIONS = 100_000 if os.environ.get(FULL) else 20_000
CLASSIC_FSX = "FSX_BIN"
SEED = 20_240_229
DEADLINE_S = 900

pytestmark = [needs_mount, pytest.mark.slow]


@pytest.fixture(params=["passthrough", "guarded", "daemon"])
def mount(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Mount]:
    """A mount in each data mode."""
    store = tmp_path / "store"
    store.mkdir()
    with mounted(store, tmp_path / "mount", f"io={request.param}") as made:
        yield made


def run(*command: str | Path) -> str:
    """Run a program that must succeed, and return what it said."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run(
        [str(word) for word in command], check=False, capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def test_random_operations_match_a_model(mount: Mount, tmp_path: Path) -> None:
    """No operation gives a content or a size that the model has not, nor is one refused that the disk has."""
    bare = fsx.exercise(tmp_path / "bare", SEED, 2_000)
    done = fsx.exercise(mount.path / "exercised", SEED, OPERATIONS, mount.source / "exercised")
    assert done.unsupported == bare.unsupported
    assert sum(done.count.values()) == OPERATIONS or done.unsupported


def test_classic_fsx(mount: Mount) -> None:
    """The classic exerciser, where it is given, finds no difference."""
    program = os.environ.get(CLASSIC_FSX)
    if not program:
        pytest.skip(f"${CLASSIC_FSX} does not name an fsx")
    run(program, "-q", "-N", str(OPERATIONS), "-S", "1", mount.path / "classic")


@pytest.mark.parametrize("direct", [1, 0])
def test_fio_verifies(mount: Mount, direct: int) -> None:
    """What 16 random writes at a time left is what their checksums say."""
    arguments = {
        "name": "verify", "filename": mount.path / "verified", "size": "96m", "rw": "randwrite",
        "bsrange": "4k-64k", "ioengine": "libaio", "iodepth": 16, "direct": direct, "verify": "crc32c",
        "verify_fatal": 1, "do_verify": 1, "verify_state_save": 0, "randseed": SEED,
    }  # fmt: skip
    run("fio", "--thread", *(f"--{key}={value}" for key, value in arguments.items()))


def test_qemu_img_converts_without_a_difference(mount: Mount, tmp_path: Path) -> None:
    """An image with data and holes, turned into qcow2 and back on the mount, is the image it was."""
    original = tmp_path / "original.raw"
    with original.open("wb") as file:
        for piece in range(24):
            file.seek(piece * (4 << 20))
            file.write(os.urandom(1 << 20))
        file.truncate(100 << 20)
    first, middle, last = (mount.path / name for name in ("first.raw", "middle.qcow2", "last.raw"))
    run("qemu-img", "convert", "-O", "raw", "-t", "none", original, first)
    run("qemu-img", "convert", "-O", "qcow2", "-t", "none", "-T", "none", "-W", first, middle)
    run("qemu-img", "convert", "-O", "raw", "-t", "writeback", middle, last)
    for copy in (first, middle, last):
        run("qemu-img", "compare", "-s" if copy != middle else "-p", original, copy)
    run("qemu-img", "check", middle)
    assert last.stat().st_size == original.stat().st_size
    assert last.stat().st_blocks * 512 < 40 << 20, "the holes were filled"
    shutil.copy(mount.source / "last.raw", tmp_path / "around.raw")
    run("qemu-img", "compare", original, tmp_path / "around.raw")
