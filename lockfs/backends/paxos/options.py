"""What an administrator decides about paxos leases."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from lockfs.paxos.timing import IO_TIMEOUT_DEFAULT, WATCHDOG_DEFAULT, Timing

LOCKSPACE_DEFAULT = "lockfs"
LIBVIRT_LOCKSPACE = "__LIBVIRT__DISKS__"
STATE_DIR_DEFAULT = "/var/lib/lockfs"


class LayoutKind(enum.Enum):
    """Where the leases lie. FILES: a directory with one file for each. INDEX: one file or device with
    sanlock's resource index. LIBVIRT: the directory of libvirt's sanlock plugin. AUTO: by what is there."""

    AUTO = "auto"
    FILES = "files"
    INDEX = "index"
    LIBVIRT = "libvirt"


@dataclass(frozen=True)
class PaxosOptions:
    """One host's part in a lockspace.

    `host_id` None: a free one is found, and kept in `state_dir`. `lease_area` None: a hidden directory of
    the store. `lockspace` None: LOCKSPACE_DEFAULT, libvirt's with its layout, or what an area made by hand
    has. `sector` and `align` in bytes, None: by what the storage needs; only for what is yet to be made.
    `lock_path` is the store's path as libvirt's domains have it. `join_wait`: mounting waits for the join.
    """

    host_id: int | None = None
    lease_area: str | None = None
    lockspace: str | None = None
    io_timeout: int = IO_TIMEOUT_DEFAULT
    watchdog_timeout: int = WATCHDOG_DEFAULT
    sector: int | None = None
    align: int | None = None
    layout: LayoutKind = LayoutKind.AUTO
    lock_path: str | None = None
    join_wait: bool = False
    state_dir: str = STATE_DIR_DEFAULT

    @property
    def timing(self) -> Timing:
        """The protocol's times that follow."""
        return Timing(self.io_timeout, self.watchdog_timeout)
