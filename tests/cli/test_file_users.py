"""Who has files of a mount open, as /proc tells it, and asking what may never answer."""

from __future__ import annotations

import os
import signal

import pytest

from lockfs.linux import users
from lockfs.linux.bounded import FAILED, in_child

_DEVICE = os.makedev(0, 40)
_MOUNTINFO = [
    b"22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n",
    b"31 22 0:40 / /mnt/a rw - fuse.lockfs /srv/a rw,user_id=0\n",
    b"garbage\n",
    b"47 22 0:40 /disk /run/bound rw - fuse.lockfs /srv/a rw,user_id=0\n",
    b"48 22 0:4 / /mnt/b rw - tmpfs none rw\n",
]


def fdinfo(mount: int, flags: int) -> bytes:
    """What fdinfo has of a file, as proc(5) shows it."""
    return f"pos:\t0\nflags:\t0{flags:o}\nmnt_id:\t{mount}\nino:\t7\nlock:\t1: OFDLCK  ADVISORY\n".encode()


def test_mounts_of_a_file_system() -> None:
    """Every mount of the device counts, bound ones too, and none of another one."""
    assert users.mount_ids(_MOUNTINFO, _DEVICE) == {31, 47}
    assert users.mount_ids(_MOUNTINFO, os.makedev(0, 41)) == set()


@pytest.mark.parametrize(
    ("flags", "kind"),
    [
        (os.O_RDONLY, "reader"),
        (os.O_RDONLY | os.O_DIRECT, "reader"),
        (os.O_WRONLY, "writer"),
        (os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC, "writer"),
        (os.O_RDONLY | os.O_DIRECTORY, None),
        (os.O_PATH, None),
        (os.O_RDWR | os.O_PATH, None),
    ],
)
def test_kinds_of_descriptors(flags: int, kind: str | None) -> None:
    """Writers are told from readers; directories and what reaches no data do not count."""
    assert users.kind_of(fdinfo(31, flags), {31, 47}) == kind
    assert users.kind_of(fdinfo(3, flags), {31, 47}) is None


@pytest.mark.parametrize(
    "text", [b"", b"garbage\n", b"flags:\t02\n", b"mnt_id:\t31\n", b"flags:\tx\nmnt_id:\t31\n"]
)
def test_broken_fdinfo(text: bytes) -> None:
    """What cannot be read is no file of the mount."""
    assert users.kind_of(text, {31}) is None


def test_a_child_answers() -> None:
    """Its answer comes back; an error in it is one, and so is its death."""
    assert in_child(lambda: 7, 20.0) == 7
    assert in_child(lambda: os.open("/nowhere/at/all", os.O_RDONLY), 20.0) == FAILED
    assert in_child(lambda: os.kill(os.getpid(), signal.SIGKILL) or 0, 20.0) == FAILED


def test_a_child_that_does_not_answer() -> None:
    """It is given up and gone, and had nothing open that somebody might wait for."""
    reading, writing = os.pipe()
    try:
        assert in_child(lambda: signal.pause() or 0, 0.1) is None
        assert in_child(lambda: int(os.path.exists(f"/proc/self/fd/{writing}")), 20.0) == 0
    finally:
        os.close(reading)
        os.close(writing)
