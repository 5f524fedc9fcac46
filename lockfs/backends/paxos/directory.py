"""A directory of lease files: what is done to it by name. Methods block and belong on worker threads."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import time

_PASSING = b".new-"
_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW
STALE_PASSING_S = 3600.0
"""The age, by the storage's times, at which an unfinished file of a host that died is removed, seconds."""


class Directory:
    """The directory behind a descriptor (O_PATH suffices), which it owns. Methods raise OSError."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def there(self, name: bytes) -> bool:
        """Whether a file has the name. By open: a network file system then asks its server."""
        try:
            os.close(os.open(name, os.O_RDONLY | _FLAGS, dir_fd=self.descriptor))
        except FileNotFoundError:
            return False
        return True

    def identity(self, name: bytes) -> tuple[int, int] | None:
        """Device and inode of the file that has the name now, None if there is none."""
        try:
            descriptor = os.open(name, os.O_RDONLY | _FLAGS, dir_fd=self.descriptor)
        except FileNotFoundError:
            return None
        try:
            status = os.fstat(descriptor)
        finally:
            os.close(descriptor)
        return status.st_dev, status.st_ino

    def publish(self, name: bytes, content: bytes, size: int) -> bool:
        """Make a file of `size` bytes that begins with `content` and is zero behind it, all at once.

        False, and nothing done, if the name is taken.
        """
        passing = self.passing(content, size)
        try:
            os.link(passing, name, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)
        except FileExistsError:
            return False
        finally:
            self.unlink(passing)
        self._sync()
        return True

    def passing(self, content: bytes, size: int) -> bytes:
        """Make a file under a passing name, on stable storage; returns the name."""
        name = _PASSING + secrets.token_hex(8).encode()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FLAGS
        descriptor = os.open(name, flags, 0o600, dir_fd=self.descriptor)
        try:
            self._resemble(descriptor)
            os.truncate(descriptor, size)
            _write_all(descriptor, content)
            os.fsync(descriptor)
        except BaseException:
            self.unlink(name)
            raise
        finally:
            os.close(descriptor)
        return name

    def _resemble(self, descriptor: int) -> None:
        """Give the file to the directory's owner and group, so that other programs of theirs can use it."""
        parent = os.stat(b".", dir_fd=self.descriptor)
        if os.geteuid() == 0 and (parent.st_uid, parent.st_gid) != (0, 0):
            # A root-squashed server refuses; then the file is its user's, and so is the directory.
            with contextlib.suppress(PermissionError):
                os.fchown(descriptor, parent.st_uid, parent.st_gid)
                os.fchmod(descriptor, 0o660)

    def _sync(self) -> None:
        descriptor = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | _FLAGS, dir_fd=self.descriptor)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def unlink(self, name: bytes) -> None:
        """Remove a name; one that is gone is no error."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.descriptor)

    def names(self) -> list[bytes]:
        """The names of all files. Unfinished ones that nobody can be at work on any more are removed."""
        descriptor = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | _FLAGS, dir_fd=self.descriptor)
        try:
            names = [os.fsencode(name) for name in os.listdir(descriptor)]
        finally:
            os.close(descriptor)
        for name in names:
            if name.startswith(_PASSING) and self._is_stale(name):
                self.unlink(name)
        return [name for name in names if not name.startswith(_PASSING)]

    def _is_stale(self, name: bytes) -> bool:
        try:
            status = os.stat(name, dir_fd=self.descriptor, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return stat.S_ISREG(status.st_mode) and time.time() - status.st_mtime > STALE_PASSING_S

    def close(self) -> None:
        """Close the descriptor."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def _write_all(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
