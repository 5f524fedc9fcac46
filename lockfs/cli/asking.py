"""Asking the mounts that run here, by their control sockets."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lockfs.errors import LockfsError
from lockfs.mount import control
from lockfs.mount.control import ControlError, Message, ServerGone
from lockfs.mount.table import is_below

TIMEOUT_S = 15.0


@dataclass(frozen=True)
class Mount:
    """A running mount: its socket and what it said of itself."""

    socket: Path
    status: Message

    @property
    def mountpoint(self) -> str:
        """Where it is mounted, or "" if it did not say."""
        return str(self.status.get("mountpoint") or "")

    @property
    def source(self) -> str:
        """What it mirrors, or "" if it did not say."""
        return str(self.status.get("source") or "")


@dataclass
class Found:
    """What was gathered, and the sentences about what was not."""

    rows: list[Message] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


def running_mounts(complaints: list[str], folder: Path | None = None) -> list[Mount]:
    """The mounts that answer, by mount point; adds a sentence for each that should and does not."""
    mounts = []
    for socket in control.find_sockets(folder):
        try:
            mounts.append(Mount(socket, control.request(socket, {"op": "status"}, TIMEOUT_S)))
        except ServerGone:
            continue
        except ControlError as error:
            complaints.append(str(error))
    return sorted(mounts, key=lambda mount: mount.mountpoint)


def locate(path: str, mounts: Sequence[Mount]) -> tuple[Mount, str | None] | None:
    """The mount that `path` is on, and its place there (None: the mount point itself).

    The longest mount point wins; a path in a mount's source counts as on the mount.
    """
    best: tuple[int, Mount, str | None] | None = None
    for mount in mounts:
        for root in (mount.mountpoint, mount.source):
            if not root or not (path == root or is_below(path, root)):
                continue
            if best is None or len(root) > best[0]:
                relative = os.path.relpath(path, root)
                best = (len(root), mount, None if relative == "." else relative)
    return best[1:] if best else None


def located(place: str, folder: Path | None, found: Found) -> tuple[Mount, str | None] | None:
    """The mount that `place` is on, and where on it; None, and a sentence in `found`, if it is on none."""
    path = os.path.realpath(place)
    try:
        at = locate(path, running_mounts(found.complaints, folder))
    except LockfsError as error:
        found.complaints.append(str(error))
        return None
    if at is None:
        found.complaints.append(f"{path} is on no lockfs mount that runs here.")
    return at
