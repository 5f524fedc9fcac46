"""What this kernel's NFS client knows of a server."""

from __future__ import annotations

import os
import re
from pathlib import Path

TYPE = "nfs4"
"""The type under which the kernel's tables have file systems of NFS 4, of any minor version."""
_MOUNTSTATS = Path("/proc/self/mountstats")
_RECOVERS = Path("/sys/module/nfs/parameters/recover_lost_locks")
_LEASE_TIME = re.compile(rb"[\t,]lease_time=([0-9]{1,9})(?:,|$)", re.MULTILINE)


def lease_time(source: str) -> int | None:
    """For how many seconds the server of a mount keeps the locks of a client that is silent (RFC 8881, 8.3).

    `source` is what is mounted, as the kernel's tables write it. By /proc/self/mountstats, where the client's
    code writes it for NFS 4 (fs/nfs/super.c, show_lease); None where it does not.
    """
    name = os.fsencode(source)
    try:
        table = _MOUNTSTATS.read_bytes()
    except OSError:
        return None
    for entry in table.removeprefix(b"device ").split(b"\ndevice "):
        first, _, rest = entry.partition(b"\n")
        what, _, where = first.partition(b" mounted on ")
        if what == name and b" with fstype nfs4" in where:
            found = _LEASE_TIME.search(rest)
            return int(found[1]) if found is not None else None
    return None


def recovers_lost_locks() -> bool:
    """Whether the client takes locks anew that a server has dropped, without a word to who had them
    (nfs.recover_lost_locks in the kernel's admin-guide/kernel-parameters); not so by default.
    """
    try:
        return _RECOVERS.read_text().strip() in ("Y", "1")
    except OSError:
        return False
