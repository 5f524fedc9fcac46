"""A QEMU on the bare directory, without lockfs, against a QEMU on a mount: each keeps the other out."""

from __future__ import annotations

import pytest

from tests.support import guest
from tests.support.qemu import Build, Fleet, Style, disk

pytestmark = pytest.mark.usefixtures("needs_lockfs")
DISKS = pytest.mark.parametrize(
    ("style", "image_format"), [("drive", "raw"), ("auto", "qcow2"), ("rw", "raw")]
)
OPTIONS = "wait=0.5,virtlockd=off"


@DISKS
def test_lockfs_first(two_mounts, fleet: Fleet, build: Build, style: Style, image_format: str) -> None:
    """While a guest runs on a mount, QEMU refuses the image on the bare directory, with its usual hint."""
    pair = two_mounts(OPTIONS)
    image = guest.make_image(pair.a / "i.img", image_format)
    first = fleet.start(build, disk(style, image_format, image))
    first.wait_written(5)
    bare = disk("drive", image_format, pair.store / "i.img")
    text = fleet.refused(build, bare)
    assert "Is another process using the image" in text
    first.wait_written(5)
    first.quit()
    fleet.start(build, bare, "bare").wait_written(5)


@DISKS
def test_bare_qemu_first(two_mounts, fleet: Fleet, build: Build, style: Style, image_format: str) -> None:
    """While a guest runs on the bare directory, a mount refuses the image and its log says why."""
    pair = two_mounts(OPTIONS)
    guest.make_image(pair.store / "i.img", image_format)
    bare = fleet.start(build, disk("drive", image_format, pair.store / "i.img"), "bare")
    bare.wait_written(5)
    text = fleet.refused(build, disk(style, image_format, pair.a / "i.img"))
    assert "Device or resource busy" in text
    pair.log(pair.a, "QEMU")
    acknowledged = bare.halt()
    bare.quit()
    guest.check(guest.read_record(pair.store / "i.img", image_format), acknowledged)
    fleet.start(build, disk(style, image_format, pair.a / "i.img")).wait_written(5)


def test_paused_bare_guest_still_counts(two_mounts, fleet: Fleet, own: Build) -> None:
    """A guest paused on the bare directory keeps its image."""
    pair = two_mounts(OPTIONS)
    guest.make_image(pair.store / "i.img", "qcow2")
    bare = fleet.start(own, disk("auto", "qcow2", pair.store / "i.img"), "bare")
    bare.wait_written(5)
    bare.halt()
    assert "busy" in fleet.refused(own, disk("auto", "qcow2", pair.a / "i.img"))


def test_readers_on_the_bare_directory(two_mounts, fleet: Fleet, own: Build) -> None:
    """A tool that reads with --force-share is let through while the guest on the mount runs."""
    pair = two_mounts(OPTIONS)
    image = guest.make_image(pair.a / "i.img", "qcow2")
    fleet.start(own, disk("auto", "qcow2", image)).wait_written(5)
    own.img("info", "-U", pair.store / "i.img")
    assert "lock" in own.img("info", pair.store / "i.img", check=False)
    assert "lock" in own.img("resize", "-f", "qcow2", pair.store / "i.img", "+1M", check=False)


def test_qemu_bytes_can_be_turned_off(two_mounts, fleet: Fleet, own: Build) -> None:
    """With qemu=off lockfs neither sees nor stops a QEMU on the bare directory."""
    pair = two_mounts("wait=0.5,qemu=off")
    image = guest.make_image(pair.a / "i.img", "raw")
    fleet.start(own, disk("auto", "raw", image)).wait_written(5)
    own.run("qemu-io", "-f", "raw", "-c", "write 150M 4k", pair.store / "i.img")
