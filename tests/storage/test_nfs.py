"""What the kernel's tables tell of an NFS server."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lockfs.linux import nfs

MOUNTINFO = rb"""22 1 254:1 / / rw shared:1 - ext4 /dev/vda1 rw
40 22 0:50 / /srv/a\040b rw shared:9 - nfs4 10.0.0.1:/a rw,vers=4.2
41 22 0:51 / /old rw shared:9 - nfs 10.0.0.1:/b rw,vers=3
42 22 0:52 / /before rw shared:9 - nfs4 10.0.0.1:/c rw,vers=4.2
43 22 0:53 / /nowhere rw shared:9 - nfs4 10.0.0.1:/d rw,vers=4.2
short line
"""
MOUNTSTATS = rb"""device /dev/vda1 mounted on / with fstype ext4
device 10.0.0.1:/a mounted on /srv/a\040b with fstype nfs4 statvers=1.1
	opts:	rw,vers=4.2,namlen=255,clientaddr=10.0.0.2,lease_time=1x
	age:	100
	nfsv4:	bm0=0xfdffbfff,acl=0x3,sessions,pnfs=not configured,lease_time=20,lease_expired=0
	bytes:	1 2 3 4
device 10.0.0.1:/b mounted on /old with fstype nfs statvers=1.1
	nfsv4:	lease_time=30
device 10.0.0.1:/c mounted on /before with fstype nfs4 statvers=1.1
	nfsv4:	bm0=0xfdffbfff,acl=0x3
device 10.0.0.1:/e mounted on /elsewhere with fstype nfs4 statvers=1.1
	nfsv4:	bm0=0x1,lease_time=90
"""


@pytest.mark.parametrize(
    ("minor", "seconds"),
    [(50, 20), (51, None), (52, None), (53, None), (99, None)],
    ids=["stated", "NFS 3", "an older kernel", "another namespace's", "no mount"],
)
def test_lease_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minor: int, seconds: int | None) -> None:
    """As stated for the mount of the device, and for no other."""
    for name, text in (("_MOUNTINFO", MOUNTINFO), ("_MOUNTSTATS", MOUNTSTATS)):
        (tmp_path / name).write_bytes(text)
        monkeypatch.setattr(nfs, name, tmp_path / name)
    assert nfs.lease_time(os.makedev(0, minor)) == seconds


def test_no_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they cannot be read, nothing is known."""
    monkeypatch.setattr(nfs, "_MOUNTINFO", tmp_path / "none")
    assert nfs.lease_time(1) is None


def test_this_machine(tmp_path: Path) -> None:
    """A directory that is on no NFS has no lease time."""
    assert nfs.lease_time(tmp_path.stat().st_dev) is None
