"""The mount table of this process: which file systems are mounted where (proc(5), /proc/PID/mountinfo).

Read instead of asking the paths themselves: a path under a dead or stuck mount may not answer.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

_MOUNTINFO = "/proc/self/mountinfo"
_DEVICE = re.compile(rb"([0-9]{1,9}):([0-9]{1,9})")
_ESCAPED = re.compile(rb"\\([0-7]{3})")


@dataclass(frozen=True)
class Mounted:
    """One mount: its id, the file system's root it shows, where, the type ("fuse.lockfs") and source.

    `parent` is the id of the mount it is mounted on, `device` the file system's st_dev, and `data` its own
    options (proc(5), "super options").
    """

    identity: int
    root: str
    point: str
    fstype: str
    source: str
    parent: int = 0
    device: int = 0
    data: tuple[str, ...] = ()

    @property
    def is_lockfs(self) -> bool:
        """Whether lockfs serves it."""
        return self.fstype == "fuse.lockfs"


def _unescaped(field: bytes) -> str:
    return os.fsdecode(_ESCAPED.sub(lambda found: bytes([int(found[1], 8) & 0xFF]), field))


def parse(data: bytes) -> list[Mounted]:
    """The mounts of a mountinfo file in its order: a later one at the same point covers an earlier one."""
    mounts = []
    for line in data.splitlines():
        left, separator, right = line.partition(b" - ")
        before, after = left.split(b" "), right.split(b" ")
        if not separator or len(before) < 6 or len(after) < 2 or not before[0].isdigit():
            continue
        device = _DEVICE.fullmatch(before[2])
        mounts.append(
            Mounted(
                int(before[0]),
                _unescaped(before[3]),
                _unescaped(before[4]),
                after[0].decode("ascii", "replace"),
                _unescaped(after[1]),
                int(before[1]) if before[1].isdigit() else 0,
                os.makedev(int(device[1]), int(device[2])) if device else 0,
                tuple(_unescaped(word) for word in after[2].split(b",")) if len(after) > 2 else (),
            )
        )
    return mounts


def read() -> list[Mounted]:
    """The mounts that this process sees."""
    return parse(Path(_MOUNTINFO).read_bytes())


def mount_of(descriptor: int, mounts: list[Mounted]) -> Mounted | None:
    """The mount that an open file is reached through; None for a detached or unknown one."""
    text = Path(f"/proc/self/fdinfo/{descriptor}").read_text(encoding="ascii")
    found = re.search(r"^mnt_id:\s*([0-9]+)$", text, re.MULTILINE)
    identity = int(found[1]) if found else -1
    return next((mount for mount in mounts if mount.identity == identity), None)


def at(path: str, mounts: list[Mounted]) -> Mounted | None:
    """The topmost mount whose mount point is exactly `path`."""
    return next((mount for mount in reversed(mounts) if mount.point == path), None)


def is_below(path: str, directory: str) -> bool:
    """Whether absolute `path` lies strictly inside `directory`."""
    return path != directory and path.startswith(directory.rstrip("/") + "/")


def below(path: str, mounts: list[Mounted]) -> list[Mounted]:
    """The mounts whose mount points lie strictly inside `path`."""
    return [mount for mount in mounts if is_below(mount.point, path)]
