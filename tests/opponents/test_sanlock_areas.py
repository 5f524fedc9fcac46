"""Areas made by lockfsctl are those that sanlock makes, byte for byte, and sanlock works with them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from lockfs.cli import ctl
from lockfs.errors import EXIT_SYSTEM
from lockfs.paxos.prepare import FIXED_AREAS
from lockfs.records import sectors
from lockfs.records.geometry import FILE_GEOMETRY, GEOMETRIES, MIB, Geometry
from tests.support import sanlock
from tests.support.sanlock import SanlockDaemon
from tests.support.sanlock_client import Lockspace

SPACE = "images"
COMMAND_S = 60.0
# Padding of the request record, which sanlock leaves as it was in its memory (vector rindex-internal-lease).
STALE = range(20, 24)

Init = Callable[..., None]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory in which sanlock can work."""
    if reason := sanlock.why_not_sanlock(tmp_path):
        pytest.skip(reason)
    return tmp_path


@pytest.fixture
def lockfsctl(capsys: pytest.CaptureFixture[str]) -> Init:
    """Runs lockfsctl, which has to succeed without a complaint."""

    def run(*words: str | Path) -> None:
        code = ctl.run([str(word) for word in words])
        assert (code, capsys.readouterr().err) == (0, "")

    return run


def sanlock_command(*words: str, run_directory: Path | None = None) -> str:
    """What sanlock prints; fails if it does."""
    program = sanlock.program()
    assert program is not None
    environment = {**os.environ, "SANLOCK_PRIVILEGED": "0"}
    if run_directory is not None:
        environment["SANLOCK_RUN_DIR"] = str(run_directory)
    ran = subprocess.run(
        [program, *words], env=environment, capture_output=True, text=True, timeout=COMMAND_S, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def without_stale(area: bytes, sector_size: int) -> bytes:
    """A resource's area with the padding of its request record zero."""
    at = sectors.REQUEST_SECTOR * sector_size
    return area[: at + STALE.start] + bytes(len(STALE)) + area[at + STALE.stop :]


@pytest.mark.parametrize("io_timeout", [1, 10, 60])
@pytest.mark.parametrize("shape", GEOMETRIES, ids=str)
def test_init(directory: Path, lockfsctl: Init, shape: Geometry, io_timeout: int) -> None:
    """The lockspace, the index and the index's lease, in every geometry."""
    mib = shape.area_size // MIB
    ours, theirs = directory / "ours", directory / "theirs"
    lockfsctl(
        "init", ours, "--lockspace", SPACE, "--sector", str(shape.sector_size), "--align", str(mib),
        "--io-timeout", str(io_timeout),
    )  # fmt: skip
    with open(theirs, "xb") as file:
        file.truncate(os.stat(ours).st_size)
    sizes = ("-Z", str(shape.sector_size), "-A", f"{mib}M")
    sanlock_command("direct", "init", "-s", f"{SPACE}:0:{theirs}:0", "-o", str(io_timeout), *sizes)
    sanlock_command("direct", "format", "-x", f"{SPACE}:{theirs}:{mib}M", *sizes)
    with open(ours, "rb") as a, open(theirs, "rb") as b:
        for number in range(FIXED_AREAS):
            mine, its = a.read(shape.area_size), b.read(shape.area_size)
            if number == FIXED_AREAS - 1:
                its = without_stale(its, shape.sector_size)
            assert mine == its, f"area {number}"
        assert a.read(1 << 16) == b.read(1 << 16) == bytes(1 << 16)


@pytest.mark.parametrize("num_hosts", [0, 16])
@pytest.mark.parametrize("shape", GEOMETRIES, ids=str)
def test_a_resource(directory: Path, shape: Geometry, num_hosts: int) -> None:
    """A lease made here and one that sanlock made."""
    path = directory / "lease"
    with open(path, "xb") as file:
        file.truncate(shape.area_size)
    words = ["-Z", str(shape.sector_size), "-A", f"{shape.area_size // MIB}M"]
    if num_hosts:
        words += ["-n", str(num_hosts)]
    sanlock_command("direct", "init", "-r", f"{SPACE}:disk-1:{path}:0", *words)
    made = sectors.new_resource(sectors.new_leader(shape, SPACE.encode(), b"disk-1", num_hosts))
    assert made == without_stale(path.read_bytes(), shape.sector_size)


@dataclass
class Shared:
    """A lease file that lockfsctl made and a daemon uses."""

    path: Path
    run_directory: Path

    def index(self, action: str, name: str) -> str:
        """Have the daemon change the index."""
        place = f"{SPACE}:{self.path}:1M"
        return sanlock_command("client", action, "-x", place, "-e", name, run_directory=self.run_directory)


async def _ctl(*words: str | Path) -> int:
    """Run lockfsctl in a thread, where it can have an event loop of its own."""
    return await trio.to_thread.run_sync(ctl.run, [str(word) for word in words])


async def test_sanlock_uses_it(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A daemon joins, makes leases through the index and removes one; dump shows it all undamaged."""
    path = directory / "area"
    assert await _ctl("init", path, "--lockspace", SPACE, "--leases", "4", "--io-timeout", "1") == 0
    async with SanlockDaemon(directory, "host1") as daemon:
        await daemon.client.add_lockspace(Lockspace(SPACE.encode(), path), 7, io_timeout=1)
        shared = Shared(path, daemon.socket.parent)
        changes = [("create", "disk-a"), ("create", "disk-b"), ("delete", "disk-a")]
        for action, name in [*changes, ("create", "c"), ("create", "d"), ("create", "e")]:
            await trio.to_thread.run_sync(shared.index, action, name)
        with pytest.raises(AssertionError):  # four and no more, as init was told
            await trio.to_thread.run_sync(shared.index, "create", "f")
        capsys.readouterr()
        code = await _ctl("dump", path)
        shown = capsys.readouterr().out
        refused = await _ctl("init", path, "--lockspace", SPACE)
        sentence = capsys.readouterr().err
    assert code == 0, shown
    lines = [line.split() for line in shown.splitlines()]
    assert ["7", "host1", "joined", "1"] in [line[:4] for line in lines]
    assert {line[1]: int(line[0]) for line in lines if SPACE in line[2:3]} == {
        "rindex_lease": 2 * MIB,
        **{
            name: sectors.entry_area(number, FILE_GEOMETRY, MIB)
            for number, name in enumerate(("c", "disk-b", "d", "e"))
        },
    }
    assert refused == EXIT_SYSTEM
    assert "in use: host id 7 ('host1') joined" in sentence
    assert await _ctl("init", path, "--lockspace", SPACE, "--leases", "4") == 0  # the daemon has left
