"""Who has files of a file system open, whatever state it is in: told by /proc alone, never by the files.

A program may see the file system through another mount than we do (libvirt gives each QEMU a mount namespace
of its own), so mounts are looked up by the file system's device number in every namespace. Not seen:
descriptors on their way through a socket, files that are only registered with io_uring, and files reached
through a mount that is in no namespace (umount -l).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

from lockfs.linux import proc

_FDINFO_BYTES_MAX = 4096
_INIT = 1
"""A machine's or container's first process, which some keep even from root, does not open images."""
_READER, _WRITER = "reader", "writer"


@dataclass(frozen=True)
class FileUser:
    """A process with files of the file system open: its id and start time (proc.start_time).

    `writable` are its descriptors that are open for writing. `maps`: it has files mapped so that a store
    into memory reaches them.
    """

    pid: int
    started: int
    writable: tuple[int, ...]
    maps: bool


@dataclass(frozen=True)
class Users:
    """Who uses a file system, and how many processes, but for init, did not let themselves be looked at."""

    found: tuple[FileUser, ...]
    unseen: int


def mount_ids(mountinfo: Iterable[bytes], device: int) -> set[int]:
    """The ids of a file system's mounts in a mountinfo file (proc(5)); `device` is its st_dev."""
    wanted = f"{os.major(device)}:{os.minor(device)}".encode()
    found = set()
    for line in mountinfo:
        words = line.split(b" ", 3)
        if len(words) == 4 and words[2] == wanted and words[0].isdigit():
            found.add(int(words[0]))
    return found


def kind_of(fdinfo: bytes, mounts: set[int]) -> str | None:
    """What a descriptor is by its /proc/PID/fdinfo/N: "writer" or "reader" of a file on one of the mounts.

    None for files elsewhere, for directories, and for O_PATH, by which no data can be reached.
    """
    fields = dict(line.split(b":", 1) for line in fdinfo.splitlines() if b":" in line)
    try:
        mount, flags = int(fields[b"mnt_id"]), int(fields[b"flags"], 8)
    except (KeyError, ValueError):
        return None
    if mount not in mounts or flags & (os.O_PATH | os.O_DIRECTORY):
        return None
    return _READER if flags & os.O_ACCMODE == os.O_RDONLY else _WRITER


def users_of(device: int) -> Users:
    """The processes, but this one, that have files of the file system open, or mapped to be written."""
    own = os.getpid()
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != own]
    mounts = _mounts_everywhere([own, *pids], device)
    mappers = set().union(*proc.shared_mappers({device}).values()) - {own}
    found, unseen = [], 0
    for pid in pids:
        started = proc.start_time(pid)
        try:
            kinds = _kinds(pid, mounts)
        except PermissionError:
            unseen += pid != _INIT
            continue
        except OSError:
            continue  # it ended
        if kinds or pid in mappers:
            writable = tuple(sorted(number for number, kind in kinds.items() if kind == _WRITER))
            found.append(FileUser(pid, started, writable, pid in mappers))
    return Users(tuple(found), unseen)


def _mounts_everywhere(pids: list[int], device: int) -> set[int]:
    """The file system's mounts in the namespaces of all processes; each namespace is read once."""
    known: set[str] = set()
    found: set[int] = set()
    for pid in pids:
        try:
            namespace = os.readlink(f"/proc/{pid}/ns/mnt")
            if namespace in known:
                continue
            with open(f"/proc/{pid}/mountinfo", "rb") as mountinfo:
                found |= mount_ids(mountinfo, device)
        except OSError:
            continue  # it ended, or cannot be looked at and is counted by users_of
        known.add(namespace)
    return found


def _kinds(pid: int, mounts: set[int]) -> dict[int, str]:
    found = {}
    for name in os.listdir(f"/proc/{pid}/fdinfo"):
        try:
            descriptor = os.open(f"/proc/{pid}/fdinfo/{name}", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # closed meanwhile
        try:
            kind = kind_of(os.read(descriptor, _FDINFO_BYTES_MAX), mounts)
        except ProcessLookupError:
            continue
        finally:
            os.close(descriptor)
        if kind is not None:
            found[int(name)] = kind
    return found
