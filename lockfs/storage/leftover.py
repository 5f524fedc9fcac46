"""Writes that a killed process of this machine may have left under way.

A process that was killed waits for its direct I/O before it has wholly ended, on block devices and file
systems on them. On NFS it does not (nfs_direct_wait): the client goes on with what it has begun. But buffered
reading waits there, in the kernel, until all direct I/O of the file has ended (nfs_start_io_read).
"""

from __future__ import annotations

import os

from lockfs.linux import calls

_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK


def wait_for_writes(path: str | bytes, directory: int | None = None) -> bool:
    """Return when no direct I/O that this machine began on a file before is under way any more; may block.
    The answer is whether that could have been, on a file system like this.

    `path` is relative to the descriptor `directory` if there is one. Raises OSError.
    """
    descriptor = os.open(path, _FLAGS, dir_fd=directory)
    try:
        outlive = calls.on_nfs(descriptor)
        if outlive:
            os.pread(descriptor, 1, 0)
        return outlive
    finally:
        os.close(descriptor)
