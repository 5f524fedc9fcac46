"""The lock files of virtlockd's indirect mode: one file per image in a directory that all hosts share.

The file is named by the lower-case hex SHA-256 of the image's path, byte for byte as the other hosts write
it in their domain XML, and byte 0 of it is locked. Files are made on demand with mode 0600 and unlinked by
an exclusive holder *while it holds the lock*; so whoever got the lock must look again whether the name
still leads to the inode it locked, or it holds a lock that excludes nobody.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass

from lockfs.backends.base import Mode
from lockfs.linux import ofd

LOCK_BYTE = 0
REPLACED_TRIES = 16
_OPEN_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


def lock_file_name(prefix: bytes, path: bytes) -> bytes:
    """The lock file's name for the image `path` of a store that other hosts know as `prefix`."""
    return hashlib.sha256(prefix.rstrip(b"/") + b"/" + path).hexdigest().encode()


def _kind(mode: Mode) -> int:
    return ofd.WRITE if mode is Mode.EXCLUSIVE else ofd.READ


@dataclass
class LockFile:
    """A locked lock file. `descriptor` carries the lock and is nobody else's."""

    directory: int
    name: bytes
    descriptor: int

    def convert(self, mode: Mode) -> bool:
        """Change the lock's kind; False, with the old kind kept, if another holder is in the way."""
        return ofd.try_lock(self.descriptor, _kind(mode), LOCK_BYTE)

    def give_back(self, closing: Callable[[], None] = lambda: None) -> None:
        """Unlink the file if we hold, or can now have, the exclusive lock; then unlock and close it.

        `closing` is called right before, while the descriptor's number cannot be another file's yet.

        Raises:
            OSError: the file could not be unlinked or unlocked; the descriptor is closed all the same.
        """
        try:
            try:
                if ofd.try_lock(self.descriptor, ofd.WRITE, LOCK_BYTE):
                    os.unlink(self.name, dir_fd=self.directory)
            except FileNotFoundError:
                pass  # somebody cleaned the directory up; nothing of ours is left in it
            finally:
                closing()
                # Not by closing alone: a look for holders may have a duplicate open.
                ofd.unlock(self.descriptor, LOCK_BYTE)
        finally:
            os.close(self.descriptor)


class LockDirectory:
    """virtlockd's lockspace directory. Methods block and belong on worker threads."""

    def __init__(self, path: str, prefix: str) -> None:
        """Open the directory `path`; raises OSError. `prefix` is the store's path on the other hosts."""
        self._prefix = os.fsencode(prefix)
        self._fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def close(self) -> None:
        """Close the directory; every lock file was given back before."""
        os.close(self._fd)

    def name_of(self, path: bytes) -> bytes:
        """The name of the image's lock file."""
        return lock_file_name(self._prefix, path)

    def take(self, path: bytes, mode: Mode) -> LockFile | None:
        """Lock the image's lock file; None if somebody holds it.

        Raises:
            OSError: the storage failed, or the file belongs to another user.
        """
        return self._take(self.name_of(path), mode)

    def _take(self, name: bytes, mode: Mode) -> LockFile | None:
        for _ in range(REPLACED_TRIES):
            fd = os.open(name, os.O_RDWR | os.O_CREAT | _OPEN_FLAGS, 0o600, dir_fd=self._fd)
            keep = False
            try:
                if not ofd.try_lock(fd, _kind(mode), LOCK_BYTE):
                    return None
                keep = self._still_named(name, fd)
            finally:
                if not keep:
                    os.close(fd)
            if keep:
                return LockFile(self._fd, name, fd)
        return None  # every time somebody else came and went in between: as good as held

    def locked(self, name: bytes, descriptor: int) -> LockFile:
        """A lock file that a former worker had open, and perhaps locked."""
        return LockFile(self._fd, name, descriptor)

    def give_back_former(self, file: LockFile, closing: Callable[[], None]) -> None:
        """Do what LockFile.give_back does, wherever the former worker had come with it.

        It may have unlinked the file already: then the name is another holder's, and stays.
        """
        try:
            try:
                ours = ofd.try_lock(file.descriptor, ofd.WRITE, LOCK_BYTE)
                if ours and self._still_named(file.name, file.descriptor):
                    os.unlink(file.name, dir_fd=self._fd)
            finally:
                closing()
                ofd.unlock(file.descriptor, LOCK_BYTE)
        finally:
            os.close(file.descriptor)

    def clean(self, name: bytes) -> None:
        """Remove a file that a former worker made and did not come to lock, or to remove; raises OSError."""
        file = self._take(name, Mode.EXCLUSIVE)
        if file is not None:
            file.give_back()

    def _still_named(self, name: bytes, fd: int) -> bool:
        """Whether `name` leads to the inode of `fd`.

        By open and not by stat: on NFS an open asks the server, a stat may be answered from a stale cache.
        Closing the second description does not touch the lock of the first.
        """
        try:
            again = os.open(name, os.O_RDONLY | _OPEN_FLAGS, dir_fd=self._fd)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ESTALE):
                return False
            raise
        try:
            return os.path.samestat(os.fstat(again), os.fstat(fd))
        finally:
            os.close(again)

    def locked_by(self, path: bytes, held: int | None) -> ofd.Conflict | None:
        """Somebody else's lock on the image's lock file; `held` is our own descriptor, if we have one."""
        if held is not None:
            return ofd.conflict(held, ofd.WRITE, LOCK_BYTE)
        try:
            fd = os.open(lock_file_name(self._prefix, path), os.O_RDONLY | _OPEN_FLAGS, dir_fd=self._fd)
        except FileNotFoundError:
            return None
        try:
            return ofd.conflict(fd, ofd.WRITE, LOCK_BYTE)
        finally:
            os.close(fd)
