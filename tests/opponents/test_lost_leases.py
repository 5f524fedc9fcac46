"""A real guest whose lease is lost: it pauses, loses nothing, and goes on where that is sound.

Host A's lease area is on storage that can be told to hang (tests.support.faulty), io_timeout 1 s, watchdog
time 10 s: in doubt after 8 s, lost after 12 s, and the host may be taken over after 18 s.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.opponents.conftest import BARE
from tests.support import guest, mounts, qemu
from tests.support.faulty import FaultyStorage, faulty

PAXOS = "backend=paxos,io_timeout=1,watchdog_timeout=10,join=wait,wait=0.5,handover_wait=3"
PATIENCE_S = 90.0


@dataclass
class Rig:
    """Hosts of one store; A reaches the lease area through `storage`."""

    base: Path
    storage: FaultyStorage

    @contextlib.contextmanager
    def host(self, name: str, io: str, *, faulty_way: bool = False) -> Iterator[mounts.Mount]:
        """A mount as that host."""
        area = self.storage.area if faulty_way else self.base / "area"
        state = self.base / f"state-{name}"
        state.mkdir(exist_ok=True)
        options = f"{PAXOS},host={name},io={io},lease_area={area},state_dir={state}"
        with mounts.mounted(self.base / "store", self.base / name, options) as mount:
            yield mount


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """A store with a bootable image, and a lease area."""
    if BARE:
        pytest.skip("the bare directory does not do this (LOCKFS_TEST_BARE=1)")
    (tmp_path / "store").mkdir()
    guest.make_image(tmp_path / "store" / "disk", "raw")
    command = [
        sys.executable,
        "-m",
        "lockfs.cli.ctl",
        "init",
        str(tmp_path / "area"),
        "--lockspace",
        "images",
    ]
    subprocess.run([*command, "--leases", "8", "--io-timeout", "1"], check=True, capture_output=True)
    with faulty(tmp_path / "area", tmp_path) as storage:
        yield Rig(tmp_path, storage)


@pytest.fixture
def ships() -> Iterator[qemu.Fleet]:
    """QEMUs of this test, which end before the mounts do."""
    fleet = qemu.Fleet()
    try:
        yield fleet
    finally:
        fleet.end()


def paused_for(machine: qemu.Qemu) -> str:
    """Wait until the guest is paused over a disk error; what it was."""
    machine.wait_status("io-error", timeout=PATIENCE_S)
    return str(machine.qmp.wait_event("BLOCK_IO_ERROR")["data"].get("reason"))


def compare(rig: Rig, machine: qemu.Qemu) -> None:
    """End the guest and check that its image holds all that was acknowledged to it, and no error."""
    acknowledged = machine.halt()
    machine.quit()
    guest.check(guest.read_record(rig.base / "store" / "disk", "raw"), acknowledged)


@pytest.mark.parametrize("io", ["guarded", "daemon"])
def test_lost_and_back(rig: Rig, ships: qemu.Fleet, own: qemu.Build, io: str) -> None:
    """In doubt writes wait, then ENOSPC pauses the guest; `cont` when the lease is back repeats the write."""
    with rig.host("A", io, faulty_way=True) as a:
        machine = ships.start(own, qemu.disk("auto", "raw", a.path / "disk", direct=True))
        machine.wait_written(20)
        rig.storage.set("hang")
        assert "space" in paused_for(machine)
        qemu.eventually(lambda: "suspended" in a.log(), "the lease is lost", timeout=PATIENCE_S)
        machine.command("cont")
        assert "space" in paused_for(machine), "the guest wrote although the lease is away"
        rig.storage.set("ok")

        def goes_on() -> bool:
            before = machine.written()
            machine.command("cont")
            time.sleep(1)
            return machine.written() > before

        qemu.eventually(goes_on, "the guest goes on", timeout=PATIENCE_S)
        machine.wait_written(50)
        compare(rig, machine)
        ships.end()


def test_lost_and_taken(rig: Rig, ships: qemu.Fleet, own: qemu.Build) -> None:
    """If another host had the image meanwhile the paused guest can never write again."""
    with rig.host("A", "guarded", faulty_way=True) as a, rig.host("B", "guarded") as b:
        machine = ships.start(own, qemu.disk("auto", "raw", a.path / "disk", direct=True))
        machine.wait_written(20)
        rig.storage.set("hang")
        paused_for(machine)

        def taken() -> int | None:
            with contextlib.suppress(OSError):
                return os.open(b.path / "disk", os.O_RDWR)
            return None

        descriptor = qemu.eventually(taken, "B has the image", timeout=PATIENCE_S)
        os.pwrite(descriptor, b"B" * 4096, 1 << 20)
        os.close(descriptor)
        rig.storage.set("ok")
        was = (rig.base / "store" / "disk").read_bytes()
        for _ in range(30):
            machine.command("cont")
            time.sleep(1)
            assert (rig.base / "store" / "disk").read_bytes() == was, "the guest wrote"
            if "somebody else has had it" in a.log():
                break
        a.logs("somebody else has had it")
        machine.command("cont")
        paused_for(machine)
        assert (rig.base / "store" / "disk").read_bytes() == was
        ships.end()


def test_passthrough_goes_on_after_its_image_is_reopened(
    rig: Rig, ships: qemu.Fleet, own: qemu.Build
) -> None:
    """With werror=stop the guest is paused, not dead; it goes on with an image opened anew."""
    with rig.host("A", "passthrough", faulty_way=True) as a:
        errors = ",werror=stop,rerror=stop"
        machine = ships.start(own, qemu.disk("auto", "raw", a.path / "disk", direct=True, options=errors))
        machine.wait_written(20)
        rig.storage.set("hang")
        paused_for(machine)
        rig.storage.set("ok")
        qemu.eventually(
            lambda: reopened(machine, a.path / "disk"), "the image is reopened", timeout=PATIENCE_S
        )
        machine.command("cont")
        machine.wait_written(50)
        compare(rig, machine)
        ships.end()


def reopened(machine: qemu.Qemu, path: Path) -> bool:
    """Put nodes opened anew under the disk (docs/fencing.md); False if the image cannot be had yet."""
    file = {
        "driver": "file", "node-name": "file1", "filename": str(path), "auto-read-only": True,
        "discard": "unmap", "cache": {"direct": True, "no-flush": False},
    }  # fmt: skip
    machine.command("blockdev-add", driver="raw", node_name="disk1", discard="unmap", file=file)
    try:
        machine.command("qom-set", path="/machine/peripheral/dev0", property="drive", value="disk1")
    except qemu.QmpError:
        machine.command("blockdev-del", node_name="disk1")
        return False
    machine.command("blockdev-del", node_name="disk0")
    return True
