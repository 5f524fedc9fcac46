"""libvirt with virtlockd on the bare directory against lockfs: both ways round each keeps the other out."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.opponents.conftest import Pair
from tests.support import guest
from tests.support.libvirt import IMAGES, NOBODY, Host, VirshError
from tests.support.qemu import Build, Fleet, disk, eventually

pytestmark = pytest.mark.usefixtures("needs_lockfs")
NAME = "guest"
ONLY_VIRTLOCKD = "wait=0.5,qemu=off"
BOTH = "wait=0.5"
LOCKED = "Lockspace resource|resource busy"


def _image(pair: Pair, image_format: str = "raw") -> Path:
    image = guest.make_image(pair.store / "i.img", image_format)
    os.chown(image, NOBODY, NOBODY)
    return image


@pytest.mark.parametrize("options", [BOTH, ONLY_VIRTLOCKD])
@pytest.mark.parametrize("user", [True, False], ids=["session", "system"])
def test_direct(
    two_mounts, fleet: Fleet, libvirt_hosts: Callable[..., Host], own: Build, options: str, user: bool
) -> None:
    """Byte 0 of the image keeps libvirt and lockfs apart, in either order."""
    pair = two_mounts(options)
    _image(pair)
    host = libvirt_hosts("plain", pair.store, user=user, lock_manager=True)
    machine = fleet.start(own, disk("auto", "raw", pair.a / "i.img"))
    machine.wait_written(5)
    with pytest.raises(VirshError, match=LOCKED if options == ONLY_VIRTLOCKD else "lock"):
        host.create(NAME, "i.img", "raw", own)
    machine.wait_written(5)
    machine.quit()
    host.create(NAME, "i.img", "raw", own)
    host.wait_written(NAME)
    assert "busy" in fleet.refused(own, disk("auto", "raw", pair.a / "i.img"))
    pair.log(pair.a, "virtlockd")
    host.wait_written(NAME)
    host.virsh("destroy", NAME)
    fleet.start(own, disk("auto", "raw", pair.a / "i.img")).wait_written(5)


@pytest.mark.slow
@pytest.mark.parametrize("options", [BOTH, ONLY_VIRTLOCKD])
def test_indirect(
    two_mounts, fleet: Fleet, libvirt_hosts: Callable[..., Host], own: Build, tmp_path: Path, options: str
) -> None:
    """virtlockd's file in its lockspace directory keeps libvirt and lockfs apart, in either order."""
    space = tmp_path / "space"
    space.mkdir()
    pair = two_mounts(f"{options},lock_dir={space},lock_path={IMAGES}")
    _image(pair)
    host = libvirt_hosts("plain", pair.store, lock_manager=True, lockspace=space, remember=False)
    machine = fleet.start(own, disk("auto", "raw", pair.a / "i.img"))
    machine.wait_written(5)
    assert len(os.listdir(space)) == 1
    with pytest.raises(VirshError, match=LOCKED if options == ONLY_VIRTLOCKD else "lock"):
        host.create(NAME, "i.img", "raw", own)
    machine.quit()
    eventually(lambda: not os.listdir(space), "the lock file is removed with the lease")
    host.create(NAME, "i.img", "raw", own)
    host.wait_written(NAME)
    assert len(os.listdir(space)) == 1
    assert "busy" in fleet.refused(own, disk("auto", "raw", pair.a / "i.img"))
    host.virsh("destroy", NAME)
    fleet.start(own, disk("auto", "raw", pair.a / "i.img")).wait_written(5)


def test_suspended_domain(two_mounts, fleet: Fleet, libvirt_hosts: Callable[..., Host], own: Build) -> None:
    """A suspended domain has no virtlockd lock any more; QEMU's own bytes still keep lockfs out."""
    pair = two_mounts(BOTH)
    _image(pair)
    host = libvirt_hosts("plain", pair.store, user=True, lock_manager=True)
    host.create(NAME, "i.img", "raw", own)
    host.wait_written(NAME)
    host.virsh("suspend", NAME)
    assert "busy" in fleet.refused(own, disk("auto", "raw", pair.a / "i.img"))
    host.virsh("resume", NAME)
    host.wait_written(NAME)


def test_migration_between_lockfs_and_plain(
    two_mounts, libvirt_hosts: Callable[..., Host], own: Build
) -> None:
    """A guest migrates from a lockfs host to a host with virtlockd only, and back, while it writes."""
    pair = two_mounts(BOTH)
    image = guest.make_image(pair.store / "i.img", "qcow2")
    with_lockfs = libvirt_hosts("hostA", pair.a, lock_manager=True)
    plain = libvirt_hosts("plain", pair.store, lock_manager=True)
    with_lockfs.create(NAME, "i.img", "qcow2", own)
    with_lockfs.wait_written(NAME)
    for source, target in ((with_lockfs, plain), (plain, with_lockfs)):
        source.virsh("migrate", "--live", "--unsafe", NAME, target.uri, "tcp://127.0.0.1")
        target.wait_written(NAME)
    with_lockfs.virsh("suspend", NAME)
    acknowledged = with_lockfs.written(NAME)
    with_lockfs.virsh("destroy", NAME)
    guest.check(guest.read_record(image, "qcow2"), acknowledged)
