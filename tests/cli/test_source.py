"""What cannot be mirrored or mounted on is refused before anything is mounted, with what to do."""

from __future__ import annotations

import logging
import os
import subprocess
from pathlib import Path

import pytest

from lockfs.cli import options as command_line
from lockfs.errors import SetupError
from lockfs.mount import kernelmount, remains, source
from lockfs.mount.options import MountOptions

from .conftest import Stub

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


def given(at: Path, mountpoint: Path, text: str = "backend=nop") -> MountOptions:
    """The options of a command line."""
    made = command_line.parse(["-o", text, str(at), str(mountpoint)]).options
    assert made is not None
    return source.absolute(made)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """An empty store."""
    made = tmp_path / "store"
    made.mkdir()
    return made


@pytest.fixture
def point(tmp_path: Path) -> Path:
    """An empty mount point."""
    made = tmp_path / "point"
    made.mkdir()
    return made


def refused(options: MountOptions, *, as_root: bool = False) -> str:
    """The sentence with which the options are refused."""
    with pytest.raises(SetupError) as raised:
        source.prepare(options, as_root=as_root)
    return str(raised.value)


def test_lock_directory_beneath_the_mount_point(store: Path, point: Path, tmp_path: Path) -> None:
    """A lock directory that the mount would cover is refused, also behind a link; one beside it is not."""
    beneath = store / "locks"
    beneath.mkdir()
    (tmp_path / "link").symlink_to(beneath)
    for locks in (beneath, store, tmp_path / "link"):
        text = f"lock_dir={locks},lock_path=/images"
        assert "beneath the mount point" in refused(given(store, store, text), as_root=False)
    source.check_lock_directory(given(store, point, f"lock_dir={beneath},lock_path=/images"))


def test_missing_and_wrong(store: Path, point: Path) -> None:
    """A missing directory or a file in its place is named, with what to do."""
    file = store / "file"
    file.touch()
    assert "create the directory" in refused(given(store / "none", point))
    assert "not a directory" in refused(given(file, point))
    assert "create the directory" in refused(given(store, point / "none"))
    assert "not a directory" in refused(given(store, file))


def test_ordinary_source(store: Path, point: Path) -> None:
    """An ordinary user's source is the directory itself."""
    made = source.prepare(given(store, point), as_root=False)
    try:
        assert (made.device, made.inode) == (store.stat().st_dev, store.stat().st_ino)
        assert os.fstat(made.descriptor).st_ino == made.inode
        assert made.mode == store.stat().st_mode
    finally:
        os.close(made.descriptor)


def test_fcntl_store_is_tried(store: Path, point: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With backend=fcntl a store on which locks do not work is refused, with nop it is not asked."""

    def refuse(descriptor: int) -> None:
        raise SetupError("No locks here.")

    monkeypatch.setattr(source, "check_store", refuse)
    assert refused(given(store, point, "backend=fcntl")) == "No locks here."
    os.close(source.prepare(given(store, point), as_root=False).descriptor)


def test_absolute(store: Path, point: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths become absolute, links resolved; a given fsname stays."""
    (store / "link").symlink_to(point)
    monkeypatch.chdir(store)
    made = command_line.parse(["-o", "log=x.log", ".", "link"]).options
    assert made is not None
    resolved = source.absolute(made)
    assert (resolved.source, resolved.fsname) == (str(store), str(store))
    assert (resolved.mountpoint, resolved.log) == (str(point), f"{store}/x.log")
    assert given(store, point, "fsname=images").fsname == "images"
    device = command_line.parse([".", "/dev/fd/7"]).options
    assert device is not None
    assert source.absolute(device).mountpoint == "/dev/fd/7"


def test_point_inside_source(store: Path) -> None:
    """Only root, whose view of the store has no mounts in it, may mount inside the store."""
    inside = store / "inside"
    inside.mkdir()
    assert "inside the source" in refused(given(store, inside))


@needs_root
def test_detached_view(store: Path, point: Path) -> None:
    """As root, what is mounted over or inside the store later is not reached through the source."""
    (store / "image").write_text("bare")
    made = source.prepare(given(store, point), as_root=True)
    try:
        subprocess.run(["mount", "-t", "tmpfs", "none", store], check=True)
        try:
            assert os.listdir(store) == []
            descriptor = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=made.descriptor)
            assert os.listdir(descriptor) == ["image"]
            os.close(descriptor)
        finally:
            subprocess.run(["umount", store], check=True)
    finally:
        os.close(made.descriptor)


@needs_root
def test_lockfs_on_lockfs(stub: Stub, tmp_path: Path) -> None:
    """A source on a lockfs mount and a mount point that has one are refused, with the directory behind."""
    assert stub.run().returncode == 0
    other = tmp_path / "other"
    other.mkdir()
    assert f"umount {stub.point}" in refused(given(stub.point, other), as_root=True)
    assert f"umount {stub.point}" in refused(given(other, stub.point), as_root=True)
    bound = tmp_path / "bound"
    bound.mkdir()
    subprocess.run(["mount", "--bind", stub.point, bound], check=True)
    try:
        sentence = refused(given(bound, other), as_root=True)
    finally:
        subprocess.run(["umount", bound], check=True)
    assert str(stub.source) in sentence


@needs_root
def test_dead_mount_point(store: Path, point: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A dead mount is cleared from the mount point, unless told not to, but not from the source."""
    mounted = kernelmount.mount(given(store, point), 0o40755, as_root=True)
    os.close(mounted.device_fd)
    try:
        with pytest.raises(SetupError, match=f"umount {point}"):
            source.prepare(given(store, point), as_root=True, clears=False)
        assert f"umount {point}" in refused(given(point, store), as_root=True)
        os.close(source.prepare(given(store, point), as_root=True).descriptor)
        assert not os.path.ismount(point)
        assert f"{point} has a lockfs of {store} whose processes are all gone" in caplog.text
    finally:
        if os.path.ismount(point) or str(point) in Path("/proc/self/mountinfo").read_text(encoding="utf-8"):
            mounted.unmount()


@needs_root
def test_silent_mount_point(store: Path, point: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mount that nobody answers for, but whose device is open, is neither dead nor waited for."""
    monkeypatch.setattr(remains, "ANSWER_S", 0.2)
    mounted = kernelmount.mount(given(store, point), 0o40755, as_root=True)
    try:
        assert "not known to be dead" in refused(given(store, point), as_root=True)
        (store / "link").symlink_to(point)
        assert "not known to be dead" in refused(given(store, store / "link"), as_root=True)
    finally:
        os.close(mounted.device_fd)
        mounted.unmount()


@needs_root
def test_mounts_below_are_told(store: Path, point: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Other file systems below the source are not shown by lockfs, which says so."""
    below = store / "below"
    below.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", below], check=True)
    try:
        with caplog.at_level(logging.WARNING):
            os.close(source.prepare(given(store, point), as_root=True).descriptor)
    finally:
        subprocess.run(["umount", below], check=True)
    assert str(below) in caplog.text


@needs_root
def test_flags_of_the_source(tmp_path: Path, point: Path) -> None:
    """What the source's mount forbids (ro, nosuid, nodev, noexec) is remembered for ours."""
    base = tmp_path / "base"
    base.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,nosuid,noexec", "none", base], check=True)
    try:
        made = source.prepare(given(base, point), as_root=True)
        os.close(made.descriptor)
    finally:
        subprocess.run(["umount", base], check=True)
    assert made.flags == os.ST_RDONLY | os.ST_NOSUID | os.ST_NOEXEC
