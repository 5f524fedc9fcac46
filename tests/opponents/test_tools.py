"""QEMU's tools, loop devices and export daemons on a mount: as on the bare directory, and exclusive."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.opponents.conftest import BARE, Pair
from tests.support import guest
from tests.support.qemu import Build, Fleet, disk, eventually

MIB = 1024 * 1024
TOOL_S = 30.0


@pytest.fixture(params=["auto", "daemon"])
def pair(request: pytest.FixtureRequest, two_mounts) -> Pair:
    """Two mounts whose opens wait half a second."""
    made: Pair = two_mounts(f"io={request.param},wait=0.5")
    return made


def _pattern(path: Path, size: int = 8 * MIB) -> bytes:
    """A raw file with data, a hole, data; returns its content."""
    data = os.urandom(size // 4)
    with open(path, "wb") as file:
        file.write(data)
        file.seek(size - len(data))
        file.write(data)
    return data + bytes(size - 2 * len(data)) + data


def _writes(build: Build, image: Path, image_format: str = "raw", pattern: int = 0x77) -> bool:
    """Whether qemu-io can write the image; anything but success or "busy" is an error."""
    ran = build.run("qemu-io", "-f", image_format, "-c", f"write -P {pattern:#x} 0 64k", image, check=False)
    if ran.code == 0:
        return True
    assert "busy" in ran.text or "lock" in ran.text, ran.text
    return False


def _serves(sock: Path) -> None:
    eventually(sock.exists, "the server listens")


def test_qemu_nbd(pair: Pair, fleet: Fleet, build: Build) -> None:
    """An NBD server owns its image from start to end; what clients write is there."""
    image = guest.make_image(pair.a / "i.img", "raw")
    sock = fleet.path("nbd")
    server = fleet.spawn(
        [build.program("qemu-nbd"), "-t", "-f", "raw", "-k", sock, image], env=build.environment
    )
    _serves(sock)
    if not BARE:
        assert not _writes(build, pair.b / "i.img")
    url = f"nbd+unix:///?socket={sock}"
    build.run("qemu-io", "-f", "raw", "-c", "write -P 0x31 1M 1M", "-c", "flush", url)
    build.run("qemu-io", "-f", "raw", "-c", "discard 4M 1M", "-c", "read -P 0x31 1M 1M", url)
    server.terminate()
    server.wait(TOOL_S)
    assert _writes(build, pair.b / "i.img"), "the image is free after the server's end"
    build.run("qemu-io", "-r", "-f", "raw", "-c", "read -P 0x31 1M 1M", pair.b / "i.img")


def test_qemu_nbd_read_only(pair: Pair, fleet: Fleet, own: Build) -> None:
    """A read-only NBD server leaves the image to the other host."""
    image = guest.make_image(pair.a / "i.img", "raw")
    sock = fleet.path("nbd")
    fleet.spawn([own.program("qemu-nbd"), "-r", "-t", "-f", "raw", "-k", sock, image])
    _serves(sock)
    if not BARE:
        assert _writes(own, pair.b / "i.img")


def test_storage_daemon(pair: Pair, fleet: Fleet, build: Build) -> None:
    """A storage daemon owns what it has open for writing, and serves it."""
    image = guest.make_image(pair.a / "i.img", "qcow2", build.program("qemu-img"))
    sock = fleet.path("nbd")
    nodes = (
        {"driver": "file", "node-name": "f", "filename": str(image)},
        {"driver": "qcow2", "node-name": "q", "file": "f"},
    )
    command = [build.program("qemu-storage-daemon")]
    for node in nodes:
        command += ["--blockdev", json.dumps(node)]
    command += ["--nbd-server", f"addr.type=unix,addr.path={sock}"]
    command += ["--export", "type=nbd,id=e,node-name=q,name=x,writable=on"]
    daemon = fleet.spawn(command, env=build.environment)
    _serves(sock)
    assert not _writes(build, pair.b / "i.img", "qcow2")
    url = f"nbd+unix:///x?socket={sock}"
    build.run("qemu-io", "-f", "raw", "-c", "write -P 0x32 1M 1M", "-c", "flush", url)
    daemon.terminate()
    daemon.wait(TOOL_S)
    build.run("qemu-io", "-f", "qcow2", "-c", "read -P 0x32 1M 1M", pair.b / "i.img")
    build.img("check", pair.b / "i.img")


@contextlib.contextmanager
def _loop(image: Path, *flags: str) -> Iterator[str]:
    done = subprocess.run(
        ["losetup", *flags, "--show", "-f", str(image)],
        capture_output=True,
        text=True,
        timeout=TOOL_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    device = done.stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "-d", device], timeout=TOOL_S, check=True)


@pytest.mark.usefixtures("loop_devices")
@pytest.mark.parametrize("direct", ["on", "off"])
def test_loop_device(pair: Pair, own: Build, direct: str) -> None:
    """A loop device holds its image until it is detached, though the process that made it is long gone."""
    image = guest.make_image(pair.a / "i.img", "raw")
    with _loop(image, f"--direct-io={direct}") as device:
        subprocess.run(
            ["dd", "if=/dev/urandom", f"of={device}", "bs=1M", "count=4", "seek=8", "oflag=direct"],
            check=True, timeout=TOOL_S, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        subprocess.run(
            ["blkdiscard", "-o", str(64 * MIB), "-l", str(MIB), device], check=True, timeout=TOOL_S
        )
        with open(device, "rb") as file:
            file.seek(8 * MIB)
            written = file.read(4 * MIB)
        if not BARE:
            assert not _writes(own, pair.b / "i.img")
    assert _writes(own, pair.b / "i.img"), "free after the detach"
    with open(pair.store / "i.img", "rb") as file:
        file.seek(8 * MIB)
        assert file.read(4 * MIB) == written


@pytest.mark.usefixtures("loop_devices")
def test_loop_device_read_only(pair: Pair, own: Build) -> None:
    """A read-only loop device leaves the image to the other host."""
    image = guest.make_image(pair.a / "i.img", "raw")
    with _loop(image, "-r"):
        assert _writes(own, pair.b / "i.img")


@pytest.mark.usefixtures("loop_devices")
def test_file_system_on_a_loop_device(pair: Pair, tmp_path: Path) -> None:
    """A file system made and mounted on an image is found whole through the other host."""
    image = pair.a / "fs.img"
    with open(image, "wb") as file:
        file.truncate(32 * MIB)
    point = tmp_path / "fs"
    point.mkdir()
    data = os.urandom(MIB)
    with _loop(image) as device:
        subprocess.run(["mkfs.ext4", "-q", device], check=True, timeout=TOOL_S)
        subprocess.run(["mount", device, str(point)], check=True, timeout=TOOL_S)
        try:
            (point / "f").write_bytes(data)
        finally:
            subprocess.run(["umount", str(point)], check=True, timeout=TOOL_S)
    with _loop(pair.b / "fs.img") as device:
        subprocess.run(["mount", device, str(point)], check=True, timeout=TOOL_S)
        try:
            assert (point / "f").read_bytes() == data
        finally:
            subprocess.run(["umount", str(point)], check=True, timeout=TOOL_S)


def test_convert_keeps_data_and_holes(pair: Pair, build: Build) -> None:
    """Conversions onto and off the mount lose nothing and stay sparse."""
    content = _pattern(pair.a / "in.raw")
    build.img("convert", "-f", "raw", "-O", "qcow2", pair.a / "in.raw", pair.a / "mid.qcow2")
    build.img("convert", "-f", "qcow2", "-O", "raw", pair.b / "mid.qcow2", pair.b / "out.raw")
    build.img("convert", "-C", "-f", "raw", "-O", "raw", pair.a / "in.raw", pair.a / "copied.raw")
    assert (pair.store / "out.raw").read_bytes() == content
    assert (pair.store / "copied.raw").read_bytes() == content
    for name in ("out.raw", "copied.raw"):
        assert (pair.store / name).stat().st_blocks * 512 < len(content) * 3 // 4, f"{name} is not sparse"
    build.img("compare", pair.a / "in.raw", pair.b / "mid.qcow2")
    extents = json.loads(build.img("map", "--output=json", "-f", "raw", pair.a / "in.raw"))
    assert [extent["data"] for extent in extents] == [True, False, True]
    build.img("check", pair.a / "mid.qcow2")


@pytest.mark.parametrize("preallocation", ["off", "metadata", "falloc", "full"])
def test_create(pair: Pair, own: Build, preallocation: str) -> None:
    """Creating an image, and creating over one that exists, gives what the bare directory gives."""
    bare = pair.store / "bare.qcow2"
    for image in (bare, pair.a / "new.qcow2", pair.a / "new.qcow2"):
        own.img("create", "-q", "-f", "qcow2", "-o", f"preallocation={preallocation}", image, "8M")
    seen = pair.store / "new.qcow2"
    assert seen.stat().st_size == bare.stat().st_size
    assert abs(seen.stat().st_blocks - bare.stat().st_blocks) <= 64
    assert _writes(own, pair.b / "new.qcow2", "qcow2")


def test_maintenance(pair: Pair, build: Build) -> None:
    """Internal snapshots, resize, rebase, commit, amend and check, alternately from both hosts."""
    base, top = pair.a / "base", pair.a / "top"
    build.img("create", "-q", "-f", "qcow2", base, "8M")
    build.run("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 1M", base)
    build.img("create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", top)
    build.run("qemu-io", "-f", "qcow2", "-c", "write -P 2 1M 1M", pair.b / "top")
    build.img("snapshot", "-c", "s", top)
    build.run("qemu-io", "-f", "qcow2", "-c", "write -P 3 1M 1M", pair.b / "top")
    build.img("snapshot", "-a", "s", top)
    build.run("qemu-io", "-f", "qcow2", "-c", "read -P 2 1M 1M", pair.b / "top")
    build.img("snapshot", "-d", "s", pair.b / "top")
    build.img("resize", "-f", "qcow2", top, "16M")
    build.img("amend", "-f", "qcow2", "-o", "compat=1.1", pair.b / "top")
    build.img("rebase", "-f", "qcow2", "-b", "base", "-F", "qcow2", top)
    build.img("commit", "-f", "qcow2", pair.b / "top")
    build.run("qemu-io", "-f", "qcow2", "-c", "read -P 1 0 1M", "-c", "read -P 2 1M 1M", base)
    build.img("check", "-r", "all", "-f", "qcow2", base)
    build.img("check", "-f", "qcow2", pair.b / "top")


@pytest.mark.usefixtures("needs_lockfs")
def test_tools_cannot_touch_a_running_guests_disk(pair: Pair, fleet: Fleet, own: Build) -> None:
    """From the other host a running guest's image can be read, and not overwritten, cut or removed."""
    image = guest.make_image(pair.a / "i.img", "qcow2")
    machine = fleet.start(own, disk("auto", "qcow2", image))
    machine.wait_written(10)
    there = pair.b / "i.img"
    for arguments in (
        ("create", "-f", "qcow2", there, "8M"), ("resize", "-f", "qcow2", there, "+1M"),
        ("snapshot", "-c", "s", there), ("convert", "-f", "raw", "-O", "raw", pair.b / "small", there),
    ):  # fmt: skip
        (pair.store / "small").write_bytes(bytes(4096))
        text = own.img(*arguments, check=False)
        assert "busy" in text, f"{arguments}: {text}"
    for change in (
        lambda: os.truncate(there, 0), lambda: os.unlink(there), lambda: os.rename(pair.b / "small", there),
        lambda: open(there, "wb").close(),
    ):  # fmt: skip
        with pytest.raises(OSError, match="busy"):
            change()
    own.img("info", there)
    machine.wait_written(10)
    acknowledged = machine.halt()
    machine.quit()
    guest.check(guest.read_record(image, "qcow2"), acknowledged)
