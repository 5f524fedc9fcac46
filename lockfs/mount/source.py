"""Before anything is mounted: whether the source and the mount point can be what they were given as.

Each complaint is a SetupError that says what to do. Paths are absolute here. Everything blocks.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NoReturn

from lockfs.backends.storecheck import check_store
from lockfs.errors import SetupError
from lockfs.linux.calls import open_tree_clone
from lockfs.mount import table
from lockfs.mount.options import MountOptions

_SHOWN_MOUNTS_MAX = 5
_LINKS_MAX = 40  # MAXSYMLINKS of the kernel
_DEVICE_PATH = re.compile(r"/dev/fd/([0-9]{1,9})")
_INHERITED_FLAGS = os.ST_RDONLY | os.ST_NOSUID | os.ST_NODEV | os.ST_NOEXEC  # the values of MS_* too

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """The opened store: an O_PATH descriptor of its root directory.

    As root the descriptor belongs to a detached, non-recursive copy of the mount: nothing mounted over or
    below the store later, lockfs itself included, can come between. `mode` is the root's st_mode and
    `flags` the ST_RDONLY, ST_NOSUID, ST_NODEV and ST_NOEXEC bits of the mount it was taken from.
    """

    descriptor: int
    path: str
    device: int
    inode: int
    mode: int
    flags: int


def given_device(mountpoint: str) -> int | None:
    """The descriptor of a mount point given as `/dev/fd/N` (a device that is mounted already), else None."""
    found = _DEVICE_PATH.fullmatch(mountpoint)
    return int(found[1]) if found else None


def absolute(options: MountOptions) -> MountOptions:
    """The options with every path absolute and free of symbolic links; the daemon leaves its directory.

    Raises:
        SetupError: a relative path was given in a directory that is gone.
    """
    try:
        source = _resolved(options.source)
        mountpoint = options.mountpoint
        if given_device(mountpoint) is None:
            mountpoint = _resolved(mountpoint)
        log = os.path.abspath(options.log) if options.log else None
    except (OSError, ValueError) as error:
        raise SetupError(f"The paths cannot be resolved ({error}): give absolute ones.") from error
    fsname = source if options.fsname == options.source else options.fsname
    return replace(options, source=source, mountpoint=mountpoint, log=log, fsname=fsname)


def _resolved(path: str) -> str:
    """The path without symbolic links. A directory that is a mount point is not itself looked at.

    realpath(3) asks what is mounted there whether it is a link, and may wait for that forever.
    """
    mounts = table.read()
    for _ in range(_LINKS_MAX):
        directory, name = os.path.split(path.rstrip("/"))
        if name in ("", ".", ".."):
            break
        path = os.path.join(os.path.realpath(directory or "."), name)
        if table.at(path, mounts) is not None or not os.path.islink(path):
            return path
        path = os.path.join(os.path.dirname(path), os.readlink(path))
    return os.path.realpath(path)


@contextlib.contextmanager
def _explained(what: str, path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise SetupError(f"The {what} {path} does not exist: create the directory first.") from error
        if error.errno == errno.ENOTDIR:
            raise SetupError(f"The {what} {path} is not a directory: lockfs mirrors directories.") from error
        if error.errno in (errno.ENOTCONN, errno.ECONNABORTED):
            raise SetupError(
                f"The {what} {path} is a dead mount whose server is gone: run `umount {path}` first."
            ) from error
        raise SetupError(f"The {what} {path} cannot be used: {error.strerror}.") from error


def open_source(path: str, *, as_root: bool) -> Source:
    """Open the store at `path`.

    Raises:
        SetupError: it is missing, no directory, or on a lockfs mount itself.
    """
    with _explained("source", path):
        descriptor = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _refuse_lockfs(descriptor, path)
            status, flags = os.fstat(descriptor), os.fstatvfs(descriptor).f_flag & _INHERITED_FLAGS
            _warn_of_mounts_below(path)
            if as_root:
                clone = _clone(path)
                os.close(descriptor)
                descriptor = clone
        except BaseException:
            os.close(descriptor)
            raise
    return Source(descriptor, path, status.st_dev, status.st_ino, status.st_mode, flags)


def _clone(path: str) -> int:
    try:
        return open_tree_clone(path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EINVAL, errno.ENOSYS):
            raise
        raise SetupError(
            f"The kernel gives no private view of {path} ({error.strerror}): root needs CAP_SYS_ADMIN here, "
            "and Linux 5.2 or later; in a container allow it, or run lockfs as an ordinary user."
        ) from error


def _refuse_lockfs(descriptor: int, path: str) -> None:
    mount = table.mount_of(descriptor, table.read())
    if mount is None or not mount.is_lockfs:
        return
    if mount.point == path:
        raise SetupError(f"{path} is a lockfs mount of {mount.source} already: run `umount {path}` first.")
    raise SetupError(
        f"The source {path} is on the lockfs mount {mount.point}: give the directory that it mirrors, "
        f"which is {mount.source}, or a directory in it."
    )


def _warn_of_mounts_below(path: str) -> None:
    hidden = [mount.point for mount in table.below(path, table.read())]
    if hidden:
        more = ", ..." if len(hidden) > _SHOWN_MOUNTS_MAX else ""
        shown = ", ".join(hidden[:_SHOWN_MOUNTS_MAX]) + more
        _log.warning("Other file systems are mounted below %s and are not shown by lockfs: %s", path, shown)


def check_mountpoint(mountpoint: str, source: str, *, as_root: bool) -> None:
    """Refuse a mount point on which nothing can be, or need be, mounted.

    Raises:
        SetupError: it is missing, no directory, dead, or has a lockfs mount already.
    """
    if given_device(mountpoint) is not None:
        return
    covering = table.at(mountpoint, table.read())
    if covering is not None and covering.is_lockfs:
        _refuse_covered(covering)
    with _explained("mount point", mountpoint):
        status = os.stat(mountpoint)
        if not stat.S_ISDIR(status.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    if not as_root and table.is_below(mountpoint, source):
        raise SetupError(
            f"The mount point {mountpoint} lies inside the source {source}, which only root can mount: "
            "choose another mount point, or the source itself."
        )


def _refuse_covered(covering: table.Mounted) -> NoReturn:
    """Say why nothing can be mounted over a lockfs, in whatever state that is, without waiting for it."""
    from lockfs.mount import remains  # noqa: PLC0415  (as in prepare)

    state = remains.state_of(covering)
    if state is remains.State.SILENT:
        raise SetupError(remains.silence(covering))
    if state is remains.State.DEAD:
        raise SetupError(
            f"The mount point {covering.point} is a dead mount whose server is gone: mount it anew, which "
            f"clears it away, or run `umount {covering.point}` first."
        )
    raise SetupError(
        f"{covering.point} is a lockfs mount of {covering.source} already: "
        f"run `umount {covering.point}` first."
    )


def check_lock_directory(options: MountOptions) -> None:
    """Refuse a lock directory beneath the mount point: opening it would wait for the mount that needs it.

    Raises:
        SetupError: it lies there, by whatever name.
    """
    if options.fcntl.lock_dir is None or given_device(options.mountpoint) is not None:
        return
    locks, mountpoint = os.path.realpath(options.fcntl.lock_dir), os.path.realpath(options.mountpoint)
    if locks == mountpoint or table.is_below(locks, mountpoint):
        raise SetupError(
            f"The lock directory {options.fcntl.lock_dir} lies beneath the mount point {options.mountpoint}, "
            "where lockfs cannot reach it: choose a directory outside, on the same shared storage."
        )


def prepare(options: MountOptions, *, as_root: bool, clears: bool = True) -> Source:
    """All checks of one mount, and the opened source. `options` went through `absolute`.

    `clears`: a lockfs on the mount point whose processes were all killed is fenced and taken away.

    Raises:
        SetupError: it cannot be mounted; says what to do.
    """
    if clears and given_device(options.mountpoint) is None and table.at(options.mountpoint, table.read()):
        from lockfs.mount import remains  # noqa: PLC0415  (seldom needed, and the guardian is to stay small)

        remains.clear(options)
    check_mountpoint(options.mountpoint, options.source, as_root=as_root)
    check_lock_directory(options)
    source = open_source(options.source, as_root=as_root)
    try:
        if options.backend == "fcntl":
            check_store(source.descriptor)
    except BaseException:
        os.close(source.descriptor)
        raise
    return source
