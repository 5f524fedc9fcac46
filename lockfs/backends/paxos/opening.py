"""From the options to the layout: where the lease area is, and what lies there."""

from __future__ import annotations

import contextlib
import os
import stat
from random import Random

import trio

from lockfs.backends.paxos.directory import Directory
from lockfs.backends.paxos.files import FileLayout, libvirt_naming, own_naming
from lockfs.backends.paxos.index import IndexLayout
from lockfs.backends.paxos.options import LIBVIRT_LOCKSPACE, LOCKSPACE_DEFAULT, LayoutKind, PaxosOptions
from lockfs.backends.paxos.places import Layout
from lockfs.backends.state import STATE_DIR
from lockfs.errors import SetupError
from lockfs.linux import calls
from lockfs.storage.rawio import RawIO

LEASES = b"leases"
_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


async def open_layout(
    options: PaxosOptions, store_fd: int, store: str, random: Random, io: RawIO | None = None
) -> tuple[Layout, bytes]:
    """The layout that the options mean, not started, and the lockspace's name (of an index: as given).

    `store` is the store's path on this machine; `io` reaches the lease area, the kernel's by default.

    Raises:
        SetupError: the area is not there, or is not what the layout needs.
    """
    given = options.lockspace.encode() if options.lockspace is not None else None
    kind = await trio.to_thread.run_sync(_kind, options)
    if kind is LayoutKind.INDEX:
        return IndexLayout(str(options.lease_area), options, given, random, io), given or b""
    directory, name = await trio.to_thread.run_sync(_open_directory, options, store_fd, store)
    if kind is LayoutKind.LIBVIRT:
        lockspace = given or LIBVIRT_LOCKSPACE.encode()
        naming = libvirt_naming(lockspace, options.lock_path or "")
    else:
        lockspace, naming = given or LOCKSPACE_DEFAULT.encode(), own_naming()
    return FileLayout(Directory(directory), name, options, lockspace, naming, io), lockspace


def _kind(options: PaxosOptions) -> LayoutKind:
    """The layout by what the lease area is; AUTO is resolved."""
    kind = options.layout
    if options.lease_area is None:
        if kind in (LayoutKind.INDEX, LayoutKind.LIBVIRT):
            raise SetupError(f"layout={kind.value} needs lease_area=, which says where its leases lie.")
        return LayoutKind.FILES
    try:
        mode = os.stat(options.lease_area).st_mode
    except OSError as error:
        raise SetupError(
            f"The lease area {options.lease_area} cannot be used: {error.strerror}; "
            "lease_area= names a directory, or a file or device prepared with `lockfsctl init`."
        ) from error
    is_directory = stat.S_ISDIR(mode)
    if kind is LayoutKind.AUTO:
        return LayoutKind.FILES if is_directory else LayoutKind.INDEX
    if is_directory is (kind is LayoutKind.INDEX):
        needed = "a file or a block device" if kind is LayoutKind.INDEX else "a directory"
        raise SetupError(f"layout={kind.value} needs {needed}, which {options.lease_area} is not.")
    return kind


def _open_directory(options: PaxosOptions, store_fd: int, store: str) -> tuple[int, str]:
    """The directory of the leases, made if it is the store's own, and its name for people."""
    name = options.lease_area
    try:
        if name is not None:
            return os.open(name, _DIRECTORY), name
        name = f"{store}/{STATE_DIR.decode()}/{LEASES.decode()}"
        resolve = calls.RESOLVE_NO_SYMLINKS | calls.RESOLVE_BENEATH
        with contextlib.suppress(FileExistsError):
            os.mkdir(STATE_DIR, 0o700, dir_fd=store_fd)
        parent = calls.openat2(store_fd, STATE_DIR, _DIRECTORY, 0, resolve)
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(LEASES, 0o700, dir_fd=parent)
            return calls.openat2(parent, LEASES, _DIRECTORY, 0, resolve), name
        finally:
            os.close(parent)
    except OSError as error:
        raise SetupError(
            f"The lease directory {name} cannot be used: {error.strerror}; "
            "make it writable for lockfs on every host, or give another place with lease_area=."
        ) from error
