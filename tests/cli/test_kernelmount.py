"""Mounts are made and taken away by mount(2) as root and by fusermount3 otherwise."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from lockfs.errors import SetupError
from lockfs.mount import kernelmount, table
from lockfs.mount.kernelmount import KernelMount
from lockfs.mount.options import MountOptions

from .responder import respond

DEADLINE_S = 10.0

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


@pytest.fixture
def options(tmp_path: Path) -> MountOptions:
    """A mount of nothing on an empty directory."""
    point = tmp_path / "point"
    point.mkdir()
    return MountOptions("/s", str(point), "a,b\\c", "here")


@contextmanager
def served(mounted: KernelMount) -> Iterator[None]:
    """The mount is answered for the length of a block and unmounted at its end."""
    ready = threading.Event()
    turn = SimpleNamespace(first=True, beat=lambda: None, look_around=lambda: None)
    server = threading.Thread(target=respond, args=(mounted.device_fd, ready.set, turn))
    server.start()
    try:
        assert ready.wait(DEADLINE_S)
        yield
    finally:
        if table.at(mounted.mountpoint, table.read()) is not None:
            mounted.unmount(lazy=True)
        server.join(DEADLINE_S)
        os.close(mounted.device_fd)


def entry(options: MountOptions) -> str:
    """The mount's line in the mount table."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return next(line for line in lines if f" {options.mountpoint} " in line)


def test_as_root(options: MountOptions) -> None:
    """Type, name and flags are those that were asked for; others may use it, modes are checked."""
    made = replace(options, mount_flags=1 | 2 | 1024, kernel_options=("allow_other", "max_read=65536"))
    mounted = kernelmount.mount(made, 0o40755, as_root=True)
    with served(mounted):
        assert os.statvfs(made.mountpoint).f_blocks == 100
        line = entry(made)
        assert "ro,nosuid,noatime" in line
        assert " - fuse.lockfs a,b\\134c " in line
        assert "default_permissions,allow_other,max_read=65536" in line
        assert not os.get_inheritable(mounted.device_fd)
        mounted.unmount()
        assert table.at(made.mountpoint, table.read()) is None


def test_busy(options: MountOptions) -> None:
    """A mount in use is not taken away, and its users are named without touching it."""
    mounted = kernelmount.mount(options, 0o40755, as_root=True)
    with served(mounted):
        descriptor = os.open(options.mountpoint, os.O_PATH)
        try:
            with pytest.raises(OSError, match="busy"):
                mounted.unmount()
            users = kernelmount.users_of(options.mountpoint)
        finally:
            os.close(descriptor)
        assert any(f"(pid {os.getpid()})" in user for user in users)
        assert kernelmount.users_of(options.mountpoint) == []


def test_abandoned(options: MountOptions) -> None:
    """A mount that is given up uncovers its mount point."""
    kernelmount.mount(options, 0o40755, as_root=True).abandon()
    assert table.at(options.mountpoint, table.read()) is None
    assert os.listdir(options.mountpoint) == []


def test_given_device(options: MountOptions) -> None:
    """A mount point /dev/fd/N is a device that somebody mounted; it is neither mounted nor unmounted."""
    outer = kernelmount.mount(options, 0o40755, as_root=True)
    inner = kernelmount.mount(
        replace(options, mountpoint=f"/dev/fd/{os.dup(outer.device_fd)}"), 0, as_root=True
    )
    with served(outer):
        assert inner.device_fd != outer.device_fd
        with pytest.raises(OSError, match="another program"):
            inner.unmount()
        inner.abandon()
        assert os.statvfs(options.mountpoint).f_blocks == 100


def test_given_device_is_checked(options: MountOptions) -> None:
    """Only a descriptor of /dev/fuse will do."""
    with open("/dev/null", "rb") as null:
        for number in (null.fileno(), 999_999):
            with pytest.raises(SetupError, match="/dev/fuse"):
                kernelmount.mount(replace(options, mountpoint=f"/dev/fd/{number}"), 0, as_root=True)


def test_refusals(options: MountOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel without FUSE, a missing privilege and a bad mount point each have their sentence."""
    with pytest.raises(SetupError, match=r"Mounting on /none/such failed"):
        kernelmount.mount(replace(options, mountpoint="/none/such"), 0o40755, as_root=True)
    for number, words in ((errno.EPERM, "CAP_SYS_ADMIN"), (errno.ENODEV, "modprobe fuse")):

        def refuse(*_: object, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(kernelmount.calls, "mount", refuse)
        with pytest.raises(SetupError, match=words):
            kernelmount.mount(options, 0o40755, as_root=True)
    for device, words in (("/dev/none", "modprobe fuse"), ("/dev/null/x", "run as root")):
        monkeypatch.setattr(kernelmount, "_DEVICE", device)
        with pytest.raises(SetupError, match=words):
            kernelmount.mount(options, 0o40755, as_root=True)


def test_by_fusermount(options: MountOptions) -> None:
    """fusermount3 hands over a descriptor that works, with the name unharmed; -u takes the mount away."""
    if shutil.which("fusermount3") is None:
        pytest.skip("fusermount3 is not installed")
    mounted = kernelmount.mount(replace(options, mount_flags=1), 0o40755, as_root=False)
    with served(mounted):
        assert os.statvfs(options.mountpoint).f_blocks == 100
        line = entry(options)
        assert "fuse.lockfs a,b\\134c ro" in line
        assert "nosuid,nodev" in line
        mounted.unmount()
        assert table.at(options.mountpoint, table.read()) is None
        with pytest.raises(OSError, match=r"not found|not mounted|Invalid"):
            mounted.unmount()


def test_fusermount_refuses(options: MountOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fusermount3 says is passed on; without it, the package is named; with a wrong one, that it is."""
    if shutil.which("fusermount3") is not None:
        with pytest.raises(SetupError, match=r"refused to mount /none/such: .*fusermount3"):
            kernelmount.mount(replace(options, mountpoint="/none/such"), 0, as_root=False)
    program = tmp_path / "fusermount3"
    program.write_text("#!/bin/sh\nexit 0\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SetupError, match="without handing over"):
        kernelmount.mount(options, 0, as_root=False)
    program.unlink()
    with pytest.raises(SetupError, match="install the package fuse3"):
        kernelmount.mount(options, 0, as_root=False)


def test_command_of_fusermount(options: MountOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """A comma or a backslash in the name is escaped for fusermount3, and flags become its words."""
    commands: list[list[str]] = []

    def record(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, b"", b"")

    monkeypatch.setattr(kernelmount, "_fusermount", lambda: "fusermount3")
    monkeypatch.setattr(kernelmount.subprocess, "run", record)
    with pytest.raises(SetupError):
        kernelmount.mount(
            replace(options, mount_flags=8, kernel_options=("max_read=4096",)), 0, as_root=False
        )
    words = "noexec,fsname=a\\,b\\\\c,subtype=lockfs,default_permissions,max_read=4096"
    assert commands == [["fusermount3", "-o", words, "--", options.mountpoint]]


def test_no_descriptor_from_a_closed_socket() -> None:
    """A socket that was closed without a message is not a mount."""
    ours, theirs = socket.socketpair()
    theirs.close()
    with ours, pytest.raises(SetupError, match="without handing over"):
        kernelmount._received(ours)
