"""Snapshots, commits, streams, mirrors, resizes and discards of a guest that writes, on a mount."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.opponents.disks import Machine
from tests.support import guest
from tests.support.qemu import Build, Fleet, Qemu, disk

MIB = 1024 * 1024
MachineMaker = Callable[..., Machine]


SETTINGS = [  # which QEMU, io=, and how it is driven: with file names, or with nodes as libvirt does
    ("own", "auto", "drive"),
    ("own", "auto", "auto"),
    ("own", "daemon", "auto"),
    ("newer", "auto", "drive"),
    ("newer", "auto", "auto"),
]


@pytest.fixture(params=SETTINGS, ids="-".join)
def machine(request: pytest.FixtureRequest, two_mounts, fleet: Fleet) -> MachineMaker:
    """machine(format) boots a guest from a new image on host A."""
    which, io, style = request.param
    build: Build = request.getfixturevalue(which)

    def make(image_format: str = "qcow2") -> Machine:
        pair = two_mounts(f"io={io},wait=1")
        image = guest.make_image(pair.a / "i.img", image_format)
        return Machine(fleet, build, style, image, image_format)

    return make


def _backing(build: Build, image: Path) -> str | None:
    info = json.loads(build.img("info", "--output=json", image))
    return info.get("backing-filename")


def test_external_snapshot(machine: MachineMaker) -> None:
    """After a snapshot the overlay takes the writes and the old image stays as it was."""
    vm = machine()
    base = vm.image
    vm.snapshot(base.with_name("s1"))
    vm.qemu.wait_written(5)
    vm.snapshot(base.with_name("s2"))
    before = base.with_name("s1").stat()
    vm.qemu.wait_written(10)
    after = base.with_name("s1").stat()
    assert (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
    vm.finish()


def test_commit_of_the_active_layer(machine: MachineMaker) -> None:
    """An active commit makes the base the disk again, with every write in it."""
    vm = machine()
    base = vm.image
    vm.snapshot(base.with_name("s1"))
    vm.qemu.wait_written(10)
    vm.snapshot(base.with_name("s2"))
    vm.qemu.wait_written(10)
    arguments = {"device": vm.top} if vm.style == "drive" else {"device": vm.top, "base-node": "disk0"}
    if vm.style == "drive":
        arguments["base"] = str(base)
    job = vm.job("block-commit", ready=True, **arguments)
    vm.complete(job)
    vm.qemu.wait_written(10)
    if vm.style == "auto":
        for node in ("node2", "node1"):
            vm.qemu.command("blockdev-del", **{"node-name": node})
    vm.finish(base)


def test_commit_in_the_middle(machine: MachineMaker) -> None:
    """A commit of a middle layer into the base leaves a chain that reads the same."""
    vm = machine()
    base, middle, top = vm.image, vm.image.with_name("s1"), vm.image.with_name("s2")
    vm.snapshot(middle)
    vm.qemu.wait_written(10)
    vm.snapshot(top)
    vm.qemu.wait_written(10)
    if vm.style == "drive":
        vm.job("block-commit", device="disk0", top=str(middle), base=str(base))
    else:
        vm.job("block-commit", device="node2", **{"top-node": "node1", "base-node": "disk0"})
    vm.finish(top)
    assert _backing(vm.build, top) == str(base)


def test_stream(machine: MachineMaker) -> None:
    """A stream makes the top independent of its chain while the guest writes."""
    vm = machine()
    vm.snapshot(vm.image.with_name("s1"))
    vm.qemu.wait_written(10)
    vm.snapshot(vm.image.with_name("s2"))
    vm.qemu.wait_written(10)
    vm.job("block-stream", device=vm.top)
    vm.finish()
    assert _backing(vm.build, vm.image) is None


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_mirror(machine: MachineMaker, image_format: str) -> None:
    """A mirror that is completed moves the guest to its target with every write."""
    vm = machine(image_format)
    target = vm.image.with_name("target")
    if vm.style == "drive":
        job = vm.job(
            "drive-mirror", ready=True, device="disk0", target=str(target), format="qcow2", sync="full"
        )
    else:
        vm.add_node("target", target)
        job = vm.job("blockdev-mirror", ready=True, device="disk0", target="target", sync="full")
    vm.qemu.wait_written(5)
    vm.complete(job)
    vm.chain.append(("target", target))
    vm.finish()


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_resize(machine: MachineMaker, image_format: str) -> None:
    """A guest's disk grows while it writes, and both hosts see the new size."""
    vm = machine(image_format)
    size = guest.DISK_BYTES + 64 * MIB
    vm.qemu.command(
        "block_resize", **{"node-name": vm.top} if vm.style == "auto" else {"device": "disk0"}, size=size
    )
    if image_format == "raw":
        other = vm.image.parent.parent / "b" / vm.image.name
        assert vm.image.stat().st_size == other.stat().st_size == size
    vm.finish()
    assert json.loads(vm.build.img("info", "--output=json", vm.image))["virtual-size"] == size


def test_discard(machine: MachineMaker) -> None:
    """A discard by the guest gives storage back: the backing file has fewer blocks, and reads zeros there."""
    vm = machine("raw")
    backing = vm.image.parent.parent / "store" / vm.image.name
    at = guest.DISK_BYTES - 16 * MIB
    vm.qemu.halt()
    _io(vm, f"write -P 0x5a {at} 8M")
    os.sync()
    full = backing.stat().st_blocks
    assert full * 512 >= 8 * MIB
    _io(vm, f"discard {at} 8M")
    freed = (full - backing.stat().st_blocks) * 512
    assert freed >= 7 * MIB, f"{freed} bytes came back"
    vm.qemu.command("cont")
    vm.finish()
    with open(backing, "rb") as file:
        file.seek(at)
        assert not any(file.read(8 * MIB))


def test_write_zeroes_of_new_clusters(machine: MachineMaker) -> None:
    """Zeroes written with unmap leave a hole in a raw image, and zeroes without it read as zeroes."""
    vm = machine("raw")
    backing = vm.image.parent.parent / "store" / vm.image.name
    at = guest.DISK_BYTES - 16 * MIB
    vm.qemu.halt()
    _io(vm, f"write -P 0x5a {at} 8M")
    os.sync()
    full = backing.stat().st_blocks
    assert full * 512 >= 8 * MIB
    _io(vm, f"write -z {at + 4 * MIB} 4M")
    assert backing.stat().st_blocks >= full - 8, "zeroes written keep their place"
    _io(vm, f"write -z -u {at} 4M")
    assert (full - backing.stat().st_blocks) * 512 >= 3 * MIB, "zeroes unmapped give it back"
    vm.qemu.command("cont")
    vm.finish()
    with open(backing, "rb") as file:
        file.seek(at)
        assert not any(file.read(8 * MIB))


def test_shared_backing_file(machine: MachineMaker, fleet: Fleet) -> None:
    """Guests on two hosts run on overlays of one base at the same time."""
    vm = machine()
    base = vm.image
    vm.qemu.halt()
    vm.qemu.quit()
    here, there = base.with_name("top-a"), base.parent.parent / "b" / "top-b"
    vm.build.img("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", here)
    vm.build.img("create", "-q", "-f", "qcow2", "-b", there.with_name(base.name), "-F", "qcow2", there)
    machines: list[tuple[Qemu, Path]] = [
        (fleet.start(vm.build, disk(vm.style, "qcow2", image)), image) for image in (here, there)
    ]
    for machine_, _ in machines:
        machine_.wait_written(20)
    for machine_, image in machines:
        acknowledged = machine_.halt()
        machine_.quit()
        record = guest.read_record(image, "qcow2")
        assert record.errors == 0
        assert record.last >= acknowledged


def _io(vm: Machine, command: str) -> None:
    """Make the guest's own disk backend do something, as a request of the guest would."""
    name = "disk0" if vm.style == "drive" else "-d /machine/peripheral/dev0/virtio-backend"
    text = vm.qemu.hmp(f'qemu-io {name} "{command}"')
    assert "rror" not in text and "failed" not in text, text
