"""The lock files of virtlockd's indirect mode, against rivals that come and go at the worst moment."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lockfs.backends import virtlockd
from lockfs.backends.base import Mode
from lockfs.backends.virtlockd import REPLACED_TRIES, LockDirectory, LockFile, lock_file_name
from lockfs.linux import ofd


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[LockDirectory]:
    opened = LockDirectory(str(tmp_path), "/vm")
    yield opened
    opened.close()


def taken(directory: LockDirectory, mode: Mode = Mode.EXCLUSIVE) -> LockFile:
    lock_file = directory.take(b"a.img", mode)
    assert lock_file is not None
    return lock_file


_PATHS = [(b"/vm", b"a.img"), (b"/vm/", b"a.img"), (b"//x/..", b"d/\xff")]


@pytest.mark.parametrize(("prefix", "path"), _PATHS)
def test_name_is_the_hash_of_the_path_as_written(prefix: bytes, path: bytes) -> None:
    """The name is the hex SHA-256 of prefix, slash and path, with nothing normalised inside."""
    full = prefix.removesuffix(b"/") + b"/" + path
    assert lock_file_name(prefix, path) == hashlib.sha256(full).hexdigest().encode()


def test_file_lives_as_long_as_its_lock(directory: LockDirectory, tmp_path: Path) -> None:
    """The file is made with mode 0600, refuses a second taker without a change, and goes with the lock."""
    lock_file = taken(directory)
    (path,) = tmp_path.iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    assert directory.take(b"a.img", Mode.SHARED) is None
    assert path.exists()
    lock_file.give_back()
    assert list(tmp_path.iterdir()) == []


def test_last_sharer_removes_the_file(directory: LockDirectory, tmp_path: Path) -> None:
    """Of two sharers the first to leave keeps the file, the last removes it."""
    one, two = taken(directory, Mode.SHARED), taken(directory, Mode.SHARED)
    assert not one.convert(Mode.EXCLUSIVE)
    one.give_back()
    assert len(list(tmp_path.iterdir())) == 1
    assert two.convert(Mode.EXCLUSIVE)
    two.give_back()
    assert list(tmp_path.iterdir()) == []


def lock_on_a_removed_file_is_not_kept(
    directory: LockDirectory, tmp_path: Path, patch: pytest.MonkeyPatch
) -> None:
    """If the file is replaced between open and lock, the taker ends with a lock on the file of that name."""
    real = ofd.try_lock
    rivals = [taken(directory)]

    def rival_leaves_first(fd: int, kind: int, start: int, length: int = 1) -> bool:
        if rivals:
            rivals.pop().give_back()
        return real(fd, kind, start, length)

    patch.setattr(virtlockd.ofd, "try_lock", rival_leaves_first)
    lock_file = taken(directory)
    try:
        (path,) = tmp_path.iterdir()
        assert path.stat().st_ino == os.fstat(lock_file.descriptor).st_ino
    finally:
        lock_file.give_back()


def test_lock_on_a_removed_file_is_not_kept(
    directory: LockDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """See lock_on_a_removed_file_is_not_kept."""
    lock_on_a_removed_file_is_not_kept(directory, tmp_path, monkeypatch)


def test_endless_replacement_ends_as_held(
    directory: LockDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the file is replaced at every try, the taker gives up after a bounded number and leaks nothing."""
    tries = []

    def replace(self: LockDirectory, name: bytes, fd: int) -> bool:
        tries.append(fd)
        return False

    monkeypatch.setattr(LockDirectory, "_still_named", replace)
    assert directory.take(b"a.img", Mode.EXCLUSIVE) is None
    assert len(tries) == REPLACED_TRIES


def test_file_removed_by_hand_does_not_stop_the_release(directory: LockDirectory, tmp_path: Path) -> None:
    """Giving back a lock whose file somebody removed is no error."""
    lock_file = taken(directory)
    (path,) = tmp_path.iterdir()
    path.unlink()
    lock_file.give_back()
    taken(directory).give_back()


def test_release_frees_a_duplicated_descriptor_too(directory: LockDirectory) -> None:
    """Giving back frees the lock though a duplicate of its descriptor, as holders() makes one, is open."""
    one = taken(directory, Mode.SHARED)
    two = taken(directory, Mode.SHARED)
    duplicate = os.dup(one.descriptor)
    one.give_back()
    assert two.convert(Mode.EXCLUSIVE)
    os.close(duplicate)
    two.give_back()


def test_link_in_the_files_place_is_refused(directory: LockDirectory, tmp_path: Path) -> None:
    """A symbolic link named like a lock file is an error, not a way to other files."""
    (tmp_path / lock_file_name(b"/vm", b"a.img").decode()).symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic"):
        directory.take(b"a.img", Mode.EXCLUSIVE)
    assert not (tmp_path / "victim").exists()
