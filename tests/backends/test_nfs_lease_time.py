"""How long an NFS server keeps locks, as the kernel's tables tell it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lockfs.backends import storecheck
from lockfs.backends.file_lease import COUNTS_MAX_S, Looks
from lockfs.linux import nfs

MOUNTSTATS = rb"""device /dev/vda1 mounted on / with fstype ext4
device 10.0.0.1:/a\040b mounted on /srv with fstype nfs4 statvers=1.1
	opts:	rw,vers=4.2,namlen=255,clientaddr=10.0.0.2,lease_time=1x
	age:	100
	nfsv4:	bm0=0xfdffbfff,acl=0x3,sessions,pnfs=not configured,lease_time=20,lease_expired=0
	bytes:	1 2 3 4
device 10.0.0.1:/b mounted on /old with fstype nfs statvers=1.1
	nfsv4:	lease_time=30
device 10.0.0.1:/c mounted on /before with fstype nfs4 statvers=1.1
	nfsv4:	bm0=0xfdffbfff,acl=0x3
device 10.0.0.1:/e mounted on /last with fstype nfs4 statvers=1.1
	nfsv4:	bm0=0x1,lease_time=90
"""


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's table, made up."""
    (tmp_path / "mountstats").write_bytes(MOUNTSTATS)
    monkeypatch.setattr(nfs, "_MOUNTSTATS", tmp_path / "mountstats")


@pytest.mark.parametrize(
    ("source", "seconds"),
    [
        (r"10.0.0.1:/a\040b", 20),
        ("10.0.0.1:/b", None),
        ("10.0.0.1:/c", None),
        ("10.0.0.1:/e", 90),
        ("/dev/vda1", None),
        ("10.0.0.1:/nowhere", None),
    ],
    ids=["stated", "NFS 3", "not stated", "the last", "another file system", "no mount"],
)
def test_lease_time(tables: None, source: str, seconds: int | None) -> None:
    """As stated for that mount, and for no other."""
    assert nfs.lease_time(source) == seconds


def test_no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it cannot be read, nothing is known."""
    monkeypatch.setattr(nfs, "_MOUNTSTATS", tmp_path / "none")
    assert nfs.lease_time("10.0.0.1:/e") is None


@pytest.mark.parametrize(("source", "counts_s"), [(r"10.0.0.1:/a\040b", 10.0), ("10.0.0.1:/c", COUNTS_MAX_S)])
def test_looks_at_a_store(
    tables: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, counts_s: float
) -> None:
    """A look counts for half of the time that the server of the store's mount states."""
    device = tmp_path.stat().st_dev
    line = f"40 22 {os.major(device)}:{os.minor(device)} / /srv rw shared:9 - nfs4 {source} rw,vers=4.2\n"
    (tmp_path / "mountinfo").write_text(f"41 22 0:9999 / /x rw - nfs4 10.0.0.1:/e rw\n{line}")
    monkeypatch.setattr(storecheck, "_MOUNTINFO", tmp_path / "mountinfo")
    store = os.open(tmp_path, os.O_PATH)
    try:
        assert Looks.at_store(store).counts_s == counts_s
    finally:
        os.close(store)


def test_this_machine(tmp_path: Path) -> None:
    """A store that is on no NFS."""
    store = os.open(tmp_path, os.O_PATH)
    try:
        assert Looks.at_store(store).counts_s == COUNTS_MAX_S
    finally:
        os.close(store)
