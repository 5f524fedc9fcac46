"""Which files are in the store."""

from __future__ import annotations

import os

from lockfs.backends.state import STATE_DIR


def inodes_below(store_fd: int) -> frozenset[int]:
    """The inode numbers of everything in the store but lockfs' own directory; blocks, as long as it is large.

    Raises:
        OSError: a directory cannot be read, so that what is in it is not known.
    """
    found: set[int] = set()
    for path, directories, files, descriptor in os.fwalk(
        b".", onerror=_raise, follow_symlinks=False, dir_fd=store_fd
    ):
        if path == b"." and STATE_DIR in directories:
            directories.remove(STATE_DIR)
        for name in (*directories, *files):
            try:
                found.add(os.stat(name, dir_fd=descriptor, follow_symlinks=False).st_ino)
            except FileNotFoundError:
                continue
    return frozenset(found)


def _raise(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error
