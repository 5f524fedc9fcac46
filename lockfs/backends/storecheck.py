"""Whether the locks of a store reach the other hosts, found out before it is mounted.

A lock that the kernel grants without telling the server is worse than none: both hosts believe they hold
the image. What can be known is read from /proc/self/mountinfo (proc(5)); the rest is tried on a file.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from dataclasses import dataclass

from lockfs.backends.image_locks import OWN_BYTE
from lockfs.backends.state import STATE_DIR, closing
from lockfs.errors import SetupError
from lockfs.linux import calls, nfs, ofd

_PROBE_PREFIX = STATE_DIR + b"/probe."
_MOUNTINFO = "/proc/self/mountinfo"
_UNWRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

# File system type: options that make byte-range locks known to this host alone.
_LOCAL_LOCK_OPTIONS: dict[str, tuple[str, ...]] = {
    "nfs": ("nolock", "local_lock=all", "local_lock=posix"),
    "nfs4": ("nolock", "local_lock=all", "local_lock=posix"),
    "gfs2": ("localflocks", "lockproto=lock_nolock"),
    "ocfs2": ("localflocks",),
    "lustre": ("localflock", "noflock"),
    "cifs": ("nobrl", "nolock"),
    "smb3": ("nobrl", "nolock"),
}

_UNTRIED = frozenset({"cifs", "smb3"})
"""File systems whose clients keep locks to themselves while the server lets them; they were not tried."""

_ALONE = "use backend=nop if no other host has the store"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MountEntry:
    """A line of mountinfo: device as "major:minor", file system type, source, all options."""

    device: str
    fstype: str
    source: str
    options: tuple[str, ...]


def parse_mountinfo(text: str) -> list[MountEntry]:
    """The entries of a mountinfo file; lines that are not of its format are left out."""
    entries = []
    for line in text.splitlines():
        left, separator, right = line.partition(" - ")
        before, after = left.split(" "), right.split(" ")
        if not separator or len(before) < 6 or len(after) < 3:
            continue
        options = (*before[5].split(","), *after[2].split(","))
        entries.append(MountEntry(before[2], after[0], after[1], options))
    return entries


def mount_entries(store_fd: int) -> list[MountEntry]:
    """The mounts, as this process sees them, of the file system that the store is on."""
    device = os.fstat(store_fd).st_dev
    name = f"{os.major(device)}:{os.minor(device)}"
    with open(_MOUNTINFO, encoding="utf-8", errors="surrogateescape") as table:
        return [entry for entry in parse_mountinfo(table.read()) if entry.device == name]


def local_lock_option(entry: MountEntry) -> str | None:
    """The mount option for which locks on this file system stay on this host, or None."""
    harmful = _LOCAL_LOCK_OPTIONS.get(entry.fstype, ())
    return next((option for option in entry.options if option in harmful), None)


def check_store(store_fd: int) -> None:
    """Refuse a store on which locks do not work or do not reach other hosts; blocks.

    `store_fd` is the store's root directory (O_PATH suffices). A store that cannot be written is not tried,
    only its mount options are looked at: nothing can be changed through it either.

    Raises:
        SetupError: locks do not work; the sentence says what to do.
    """
    entries = mount_entries(store_fd)
    for entry in entries:
        option = local_lock_option(entry)
        if option is not None:
            raise SetupError(
                f"The store is on {entry.fstype} ({entry.source}) mounted with {option}, which keeps locks "
                f"from the other hosts: mount it without {option}, or {_ALONE}."
            )
        if entry.fstype == nfs.TYPE and nfs.recovers_lost_locks():
            raise SetupError(
                f"The store is on NFS ({entry.source}), and this kernel takes locks that the server gave to "
                "others anew without a word: write N to /sys/module/nfs/parameters/recover_lost_locks, and "
                "leave nfs.recover_lost_locks out of the kernel's options."
            )
    for fstype in {entry.fstype for entry in entries} & _UNTRIED:
        _log.warning(
            "The store is on %s: a client of it may answer for the server whether locks are still there, so "
            "a host that was cut off may write for longer than it should.",
            fstype,
        )
    _try_locks(store_fd)


def _try_locks(store_fd: int) -> None:
    name = _PROBE_PREFIX + os.urandom(8).hex().encode()
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(STATE_DIR, 0o700, dir_fd=store_fd)
        new = os.O_RDWR | os.O_CREAT | os.O_EXCL
        first = calls.openat2(store_fd, name, new, 0o600, calls.RESOLVE_NO_SYMLINKS | calls.RESOLVE_BENEATH)
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise SetupError(f"No file can be made in the store: {error.strerror}.") from error
        _log.warning("The store cannot be written (%s), so its locks were not tried.", error.strerror)
        return
    with closing(first):
        try:
            second = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=store_fd)
            with closing(second):
                refused = ofd.try_lock(first, ofd.WRITE, OWN_BYTE) and not ofd.try_lock(
                    second, ofd.WRITE, OWN_BYTE
                )
        except OSError as error:
            raise _no_locks(error) from error
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=store_fd)
    if not refused:
        raise SetupError(
            f"The store grants one lock to two holders at once: use another file system, or {_ALONE}."
        )


def _no_locks(error: OSError) -> SetupError:
    if error.errno in _NO_LOCKS:
        return SetupError(
            f"Locks do not work on the store ({error.strerror}): on NFS version 3 start rpc.statd here and "
            f"the lock manager on the server, or mount with NFS version 4; or {_ALONE}."
        )
    return SetupError(f"Locks could not be tried on the store: {error.strerror}.")
