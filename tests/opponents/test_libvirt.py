"""Two real libvirt hosts with stock settings, each on its own mount of one store.

Stock means: QEMU runs as an ordinary user, libvirt changes and remembers owners, locks byte 1 for that and
opens images for writing itself, also on the host that does not have the lease.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.opponents.conftest import BARE
from tests.support import guest
from tests.support.libvirt import IMAGES, Host, VirshError
from tests.support.qemu import Build, eventually

LABELS_S = 20.0
NAME = "guest"


class Site:
    """Hosts A and B and one image; `image` is on the store itself."""

    def __init__(self, a: Host, b: Host, build: Build, image: Path, image_format: str) -> None:
        self.a, self.b, self.build = a, b, build
        self.image, self.image_format = image, image_format

    def start(self, host: Host, *flags: str) -> None:
        host.create(NAME, self.image.name, self.image_format, self.build, *flags)

    def migrate(self, source: Host, target: Host, *flags: str) -> None:
        source.virsh("migrate", "--live", "--unsafe", *flags, NAME, target.uri, "tcp://127.0.0.1")

    def finish(self, host: Host, image: Path | None = None, image_format: str | None = None) -> None:
        """End the guest and check every write it made."""
        host.wait_written(NAME, 10)
        host.virsh("suspend", NAME)
        acknowledged = host.written(NAME)
        host.virsh("destroy", NAME)
        record = guest.read_record(image or self.image, image_format or self.image_format)
        guest.check(record, acknowledged)


@pytest.fixture
def site(two_mounts, libvirt_hosts: Callable[..., Host], own: Build) -> Callable[..., Site]:
    """site(format, options) makes mounts, hosts and an image."""

    def make(image_format: str = "qcow2", options: str = "") -> Site:
        pair = two_mounts(f"wait=0.5{options}")
        image = guest.make_image(pair.store / "i.img", image_format)
        a, b = libvirt_hosts("hostA", pair.a), libvirt_hosts("hostB", pair.b)
        return Site(a, b, own, image, image_format)

    return make


@pytest.mark.parametrize("io", ["auto", "daemon"])
@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_migration_there_and_back(site: Callable[..., Site], image_format: str, io: str) -> None:
    """A guest migrates live to the other host and back; meanwhile the other host cannot start it."""
    on = site(image_format, f",io={io}")
    on.start(on.a)
    on.a.wait_written(NAME, 10)
    with pytest.raises(VirshError, match="lock" if BARE else "busy"):
        on.start(on.b)
    on.a.wait_written(NAME, 10)
    on.migrate(on.a, on.b)
    assert on.a.state(NAME) == "gone"
    on.b.wait_written(NAME, 10)
    with pytest.raises(VirshError, match="lock" if BARE else "busy"):
        on.start(on.a)
    on.migrate(on.b, on.a)
    on.finish(on.a)


@pytest.mark.skipif(
    Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() != "1",
    reason="QEMU as an ordinary user needs vm.unprivileged_userfaultfd=1 for postcopy",
)
def test_postcopy_migration(site: Callable[..., Site]) -> None:
    """A postcopy migration ends with the guest writing at the destination."""
    on = site()
    on.start(on.a)
    on.a.wait_written(NAME, 10)
    on.migrate(on.a, on.b, "--postcopy", "--postcopy-after-precopy")
    on.finish(on.b)


def test_refused_destination(site: Callable[..., Site]) -> None:
    """A migration whose destination cannot listen leaves the guest writing on the source."""
    on = site()
    on.start(on.a)
    on.a.wait_written(NAME, 10)
    with pytest.raises(VirshError):
        on.a.virsh("migrate", "--live", "--unsafe", NAME, on.b.uri, "tcp://127.0.0.1:1")
    on.finish(on.a)


@pytest.mark.parametrize("place", ["local", "store"])
def test_save_and_restore(site: Callable[..., Site], tmp_path: Path, place: str) -> None:
    """A guest saved on one host is restored on the other, the saved state in a local file or on the mount."""
    on = site()
    state = tmp_path / "saved" if place == "local" else IMAGES / "saved"
    on.start(on.a)
    on.a.wait_written(NAME, 10)
    on.a.virsh("save", NAME, state)
    assert on.a.state(NAME) == "gone"
    on.b.virsh("restore", state)
    on.finish(on.b)


def test_managed_save(site: Callable[..., Site]) -> None:
    """A guest with a managed save goes on where it was when it is started again."""
    on = site()
    on.a.virsh("define", on.a.define_xml(NAME, on.image.name, on.image_format, on.build))
    on.a.virsh("start", NAME)
    on.a.wait_written(NAME, 10)
    on.a.virsh("managedsave", NAME)
    on.a.virsh("start", NAME)
    on.finish(on.a)


def test_snapshot_and_blockcommit(site: Callable[..., Site]) -> None:
    """An external snapshot, a migration on the overlay, and a commit with pivot keep every write."""
    on = site()
    on.start(on.a)
    on.a.wait_written(NAME, 10)
    on.a.virsh("snapshot-create-as", NAME, "s1", "--disk-only", "--atomic", "--no-metadata")
    assert on.image.with_suffix(".s1").exists()
    on.a.wait_written(NAME, 10)
    on.migrate(on.a, on.b)
    on.b.wait_written(NAME, 10)
    on.b.virsh("blockcommit", NAME, "vda", "--active", "--pivot", "--wait")
    on.finish(on.b, on.image)


def test_blockcopy_and_blockpull(site: Callable[..., Site]) -> None:
    """A copy with pivot moves the guest to the copy; a pull makes an overlay stand alone."""
    on = site()
    on.start(on.a)
    on.a.wait_written(NAME, 10)
    on.a.virsh(
        "blockcopy", NAME, "vda", IMAGES / "copy", "--transient-job", "--wait", "--pivot", "--format", "qcow2"
    )
    on.a.virsh("snapshot-create-as", NAME, "s1", "--disk-only", "--atomic", "--no-metadata")
    on.a.wait_written(NAME, 10)
    on.a.virsh("blockpull", NAME, "vda", "--wait")
    on.finish(on.a, on.image.with_name("copy.s1"))


def test_blockresize(site: Callable[..., Site]) -> None:
    """A guest's disk can be resized."""
    on = site("raw")
    on.start(on.a)
    on.a.virsh("blockresize", NAME, "vda", f"{guest.DISK_BYTES + (64 << 20)}B")
    assert on.image.stat().st_size == guest.DISK_BYTES + (64 << 20)
    on.finish(on.a)


def test_owner_is_given_back(site: Callable[..., Site]) -> None:
    """libvirt's labels: the image is QEMU's user's while the guest runs, its owner's afterwards."""
    on = site()
    assert on.image.stat().st_uid == 0
    on.start(on.a)
    assert on.image.stat().st_uid != 0
    on.finish(on.a)
    eventually(lambda: on.image.stat().st_uid == 0, "the owner is restored", LABELS_S)


def test_storage_pool(site: Callable[..., Site]) -> None:
    """A directory pool on the mount makes, grows, fills and deletes volumes of either format."""
    on = site()
    on.a.virsh("pool-create-as", "p", "dir", "--target", IMAGES)
    for image_format in ("raw", "qcow2"):
        volume = f"v.{image_format}"
        on.a.virsh("vol-create-as", "p", volume, "8M", "--format", image_format)
        on.a.virsh("vol-resize", volume, "16M", "--pool", "p")
        on.a.virsh("vol-clone", volume, f"c.{image_format}", "--pool", "p")
        on.a.virsh("vol-delete", volume, "--pool", "p")
    source = on.a.home / "upload"
    source.write_bytes(b"x" * 100_000)
    on.a.virsh("vol-upload", "c.raw", source, "--pool", "p")
    assert (on.image.with_name("c.raw")).read_bytes()[:100_000] == source.read_bytes()
