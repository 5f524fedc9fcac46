"""The hidden directory in the store in which hosts tell one another who holds and who wants an image.

Nothing in it decides who holds an image: files may be absent, stale, truncated or garbage, and the whole
directory may be impossible to make (a read-only or root-squashed store). Methods block and belong on
worker threads; several may use one object at once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from collections.abc import Iterator

from lockfs.linux import calls

STATE_DIR = b".lockfs"
OWNERS = b"owners"
REQUESTS = b"requests"
_KINDS = (OWNERS, REQUESTS)

FILE_BYTES_MAX = 1024
NAMES_MAX = 65536

_NO_SYMLINKS = calls.RESOLVE_NO_SYMLINKS | calls.RESOLVE_BENEATH
_FILE = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def closing(fd: int) -> Iterator[int]:
    """A descriptor that is closed at the end of a with statement."""
    try:
        yield fd
    finally:
        os.close(fd)


class StateDirectory:
    """Small files below STATE_DIR, by kind (OWNERS, REQUESTS) and name.

    Directories are made at the first write, all of them, so that a holder has the requests' directory in
    sight before anybody puts a request there. A planted symbolic link is never followed.
    """

    def __init__(self, store_fd: int) -> None:
        """`store_fd` is the store's root directory (O_PATH suffices); the caller keeps it open."""
        self._store = store_fd
        self._warned = False

    def write(self, kind: bytes, name: bytes, content: bytes) -> bool:
        """Make or overwrite a file; False, after one warning, if the store does not let us."""
        try:
            try:
                self._write(kind, name, content)
            except FileNotFoundError:
                self._make()
                self._write(kind, name, content)
        except OSError as error:
            self._warn(error)
            return False
        return True

    def _write(self, kind: bytes, name: bytes, content: bytes) -> None:
        """Overwrite in place, never truncating to nothing: file systems flush a file that is replaced so."""
        with closing(self._open(kind, os.O_PATH)) as directory:
            fd = os.open(name, os.O_WRONLY | os.O_CREAT | _FILE, 0o600, dir_fd=directory)
            with closing(fd):
                os.write(fd, content)
                if os.fstat(fd).st_size > len(content):
                    os.ftruncate(fd, len(content))

    def overwrite(self, kind: bytes, name: bytes, content: bytes) -> bool:
        """Overwrite a regular file that the kernel has in memory; False if only `write` can.

        On a local file system that is a look into the directory cache and a copy to the page cache, which
        may be done on any thread: it waits for no disk to find the file, nor for anybody's lease on it.
        """
        path = b"/".join((STATE_DIR, kind, name))
        resolve = _NO_SYMLINKS | calls.RESOLVE_CACHED
        try:
            with closing(calls.openat2(self._store, path, os.O_WRONLY | _FILE, 0, resolve)) as fd:
                status = os.fstat(fd)
                fits = stat.S_ISREG(status.st_mode) and status.st_size <= len(content)
                return fits and os.pwrite(fd, content, 0) == len(content)
        except OSError:
            return False

    def blank(self, kind: bytes, name: bytes) -> None:
        """Make a file say nothing; one that is gone is no error."""
        try:
            with (
                closing(self._open(kind, os.O_PATH)) as directory,
                closing(os.open(name, os.O_WRONLY | _FILE, dir_fd=directory)) as fd,
            ):
                os.write(fd, b" " * FILE_BYTES_MAX)
        except FileNotFoundError:
            return
        except OSError as error:
            self._warn(error)

    def remove(self, kind: bytes, name: bytes) -> None:
        """Remove a file; one that is gone, or was never made, is no error."""
        try:
            with closing(self._open(kind, os.O_PATH)) as directory:
                os.unlink(name, dir_fd=directory)
        except FileNotFoundError:
            return
        except OSError as error:
            self._warn(error)

    def read(self, kind: bytes, names: list[bytes]) -> dict[bytes, bytes]:
        """The first FILE_BYTES_MAX bytes of those files that can be read, as the storage has them now."""
        found: dict[bytes, bytes] = {}
        with contextlib.suppress(OSError), closing(self._open(kind, os.O_RDONLY)) as directory:
            for name in names:
                with contextlib.suppress(OSError), closing(os.open(name, _FILE, dir_fd=directory)) as fd:
                    found[name] = os.read(fd, FILE_BYTES_MAX)
        return found

    def names(self, kind: bytes) -> list[bytes]:
        """The names of all files of a kind, at most NAMES_MAX, as the storage has them now."""
        with contextlib.suppress(OSError), closing(self._open(kind, os.O_RDONLY)) as directory:
            return [os.fsencode(name) for name in os.listdir(directory)[:NAMES_MAX]]
        return []

    def _open(self, kind: bytes, how: int) -> int:
        """Open a kind's directory by name: with O_RDONLY an NFS client then asks the server what is in it."""
        flags = how | os.O_DIRECTORY | os.O_CLOEXEC
        return calls.openat2(self._store, STATE_DIR + b"/" + kind, flags, 0, _NO_SYMLINKS)

    def _make(self) -> None:
        with contextlib.suppress(FileExistsError):
            os.mkdir(STATE_DIR, 0o700, dir_fd=self._store)
        flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
        with closing(calls.openat2(self._store, STATE_DIR, flags, 0, _NO_SYMLINKS)) as parent:
            for kind in _KINDS:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(kind, 0o700, dir_fd=parent)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            _log.warning(
                "The store's directory %s cannot be used (%s): other hosts are not told who holds an image.",
                STATE_DIR.decode(),
                error.strerror,
            )
