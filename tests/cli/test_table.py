"""The mount table is read as proc(5) describes it."""

from __future__ import annotations

import os
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from lockfs.mount import table

_LINES = (
    rb"22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw" + b"\n"
    rb"31 22 0:40 / /mnt/with\040blank\011tab\134back rw - fuse.lockfs /srv/im\012ages rw,user_id=0" + b"\n"
    b"garbage\n"
    rb"32 22 0:41 /sub /mnt/low rw master:3 shared:9 - tmpfs none rw" + b"\n"
    rb"33 22 0:42 / /mnt/low rw - fuse.lockfs /srv/b rw" + b"\n"
)


def test_fields() -> None:
    """Blanks and the like are unescaped, optional fields skipped, broken lines left out."""
    mounts = table.parse(_LINES)
    assert [mount.point for mount in mounts] == ["/", "/mnt/with blank\ttab\\back", "/mnt/low", "/mnt/low"]
    assert mounts[1] == table.Mounted(
        31, "/", mounts[1].point, "fuse.lockfs", "/srv/im\nages", 22, os.makedev(0, 40), ("rw", "user_id=0")
    )
    assert (mounts[0].device, mounts[3].parent) == (os.makedev(8, 1), 22)
    assert [mount.is_lockfs for mount in mounts] == [False, True, False, True]


def test_topmost_and_below() -> None:
    """Of two mounts on one point the later counts; a directory is not below itself or its namesake."""
    mounts = table.parse(_LINES)
    topmost = table.at("/mnt/low", mounts)
    assert topmost is not None
    assert topmost.identity == 33
    assert table.at("/mnt", mounts) is None
    assert len(table.below("/mnt", mounts)) == 3
    assert table.below("/mnt/low", mounts) == []
    assert not table.is_below("/mnt/lower", "/mnt/low")
    assert table.is_below("/mnt", "/")


def test_mount_of_an_open_file(tmp_path: Path) -> None:
    """An open file leads to the mount that it was reached through."""
    descriptor = os.open(tmp_path, os.O_PATH)
    try:
        mount = table.mount_of(descriptor, table.read())
    finally:
        os.close(descriptor)
    assert mount is not None
    assert mount.point == "/" or str(tmp_path).startswith(mount.point)


@given(st.binary(max_size=300))
def test_any_bytes(data: bytes) -> None:
    """Whatever the file says, reading it does not fail."""
    table.parse(data)
    table.parse(b"1 1 1:1 / " + data.replace(b"\n", b"") + b" rw - " + data)
