"""What this kernel's NFS client knows of a server."""

from __future__ import annotations

import os
import re
from pathlib import Path

_MOUNTINFO = Path("/proc/self/mountinfo")
_MOUNTSTATS = Path("/proc/self/mountstats")
_LEASE_TIME = re.compile(rb"[\t,]lease_time=([0-9]{1,9})(?:,|$)", re.MULTILINE)


def lease_time(device: int) -> int | None:
    """For how many seconds the server of a mount keeps the locks of a client that is silent (RFC 8881, 8.3).

    `device` is the mount's st_dev. As /proc/self/mountstats has it for NFS 4 (kernels since 5.5); None where
    it does not. Paths are compared as the two tables write them, which is the same way.
    """
    try:
        points = _points(device, _MOUNTINFO.read_bytes())
        return _stated(points, _MOUNTSTATS.read_bytes()) if points else None
    except OSError:
        return None


def _points(device: int, mountinfo: bytes) -> set[bytes]:
    """Where the file system is mounted."""
    name = b"%d:%d" % (os.major(device), os.minor(device))
    lines = (line.split(b" ") for line in mountinfo.splitlines())
    return {words[4] for words in lines if len(words) > 4 and words[2] == name}


def _stated(points: set[bytes], mountstats: bytes) -> int | None:
    for entry in mountstats.split(b"\ndevice "):
        first, _, rest = entry.partition(b"\n")
        at, mark, fstype = first.partition(b" mounted on ")[2].partition(b" with fstype nfs")
        if mark and at in points and fstype.startswith(b"4"):
            found = _LEASE_TIME.search(rest)
            return int(found[1]) if found is not None else None
    return None
