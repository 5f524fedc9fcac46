"""A store on which locks do not work, or do not reach other hosts, is refused with a sentence that helps."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockfs.backends import storecheck
from lockfs.backends.storecheck import check_store, local_lock_option, parse_mountinfo
from lockfs.errors import SetupError
from lockfs.linux import calls, ofd

NFS3 = (
    "98 29 0:52 / /srv/images rw,relatime shared:41 - nfs filer:/vm rw,vers=3,rsize=1048576,hard,{extra}"
    "proto=tcp,timeo=600,sec=sys,mountaddr=10.0.0.1,mountvers=3,mountproto=udp,local_lock={local},addr=10.0.0.1"
)
NFS4 = (
    "99 29 0:53 / /srv/four rw - nfs4 filer:/vm rw,vers=4.2,rsize=262144,hard,proto=tcp,"
    "clientaddr=10.0.0.2,local_lock=none,addr=10.0.0.1"
)


@pytest.mark.parametrize(
    ("line", "option"),
    [
        (NFS3.format(extra="", local="none"), None),
        (NFS3.format(extra="", local="flock"), None),
        (NFS3.format(extra="nolock,", local="all"), "nolock"),
        (NFS3.format(extra="", local="all"), "local_lock=all"),
        (NFS3.format(extra="", local="posix"), "local_lock=posix"),
        (NFS4, None),
        ("40 29 8:16 / /srv/g rw - gfs2 /dev/sdb rw,localflocks", "localflocks"),
        ("40 29 8:16 / /srv/g rw,noatime - gfs2 /dev/sdb rw", None),
        ("41 29 8:17 / /srv/o rw - ocfs2 /dev/sdc rw,heartbeat=local,localflocks", "localflocks"),
        ("42 29 0:60 / /srv/l rw - lustre mgs:/l rw,localflock", "localflock"),
        ("43 29 0:61 / /srv/c rw - cifs //nas/vm rw,nobrl", "nobrl"),
        ("44 29 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,discard", None),
        ("45 29 0:62 / /a\\040b rw opt1 opt2:3 - nfs filer:/x\\040y rw,nolock", "nolock"),
    ],
)
def test_option_that_keeps_locks_local_is_found(line: str, option: str | None) -> None:
    """Of each file system's mount options, those that make locks local are known, and no others."""
    (entry,) = parse_mountinfo(line + "\n")
    assert local_lock_option(entry) == option


@given(st.text())
def test_malformed_mountinfo_is_skipped(text: str) -> None:
    """Lines that are not of mountinfo's format are left out, never an error."""
    for entry in parse_mountinfo(text):
        local_lock_option(entry)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def test_good_store_passes_and_stays_clean(store: int, tmp_path: Path) -> None:
    """A store with working locks is accepted, twice, and the file it was tried on is gone."""
    check_store(store)
    check_store(store)
    assert [path.name for path in tmp_path.rglob("*")] == [".lockfs"]


def test_local_locks_are_refused(store: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store whose own mount has such an option is refused, naming file system, source and option."""
    device = os.stat(tmp_path).st_dev
    table = tmp_path / "mountinfo"
    line = NFS3.format(extra="nolock,", local="all")
    monkeypatch.setattr(storecheck, "_MOUNTINFO", str(table))
    table.write_text(line + "\n")
    check_store(store)  # another mount's options do not matter
    table.write_text(line.replace("0:52", f"{os.major(device)}:{os.minor(device)}") + "\n")
    with pytest.raises(SetupError, match=r"nfs \(filer:/vm\) mounted with nolock.*backend=nop"):
        check_store(store)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_failing_locks_are_refused(
    store: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """An error from the lock call is a SetupError, and nothing is left in the store."""

    def fail(*_: object) -> bool:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(ofd, "try_lock", fail)
    with pytest.raises(SetupError, match=os.strerror(number)):
        check_store(store)
    assert [path.name for path in tmp_path.rglob("*")] == [".lockfs"]


def test_locks_that_exclude_nobody_are_refused(store: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that grants everything is refused."""
    monkeypatch.setattr(ofd, "try_lock", lambda *_: True)
    with pytest.raises(SetupError, match="two holders"):
        check_store(store)


def test_unwritable_store_is_only_warned_about(
    store: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where no file can be made, the locks are not tried, which is said once."""

    def refuse(*_: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(calls, "openat2", refuse)
    with caplog.at_level(logging.WARNING):
        check_store(store)
    assert "Read-only file system" in caplog.text
