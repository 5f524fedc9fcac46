"""What one mount was asked to be; the command line is turned into this by lockfs.cli.options."""

from __future__ import annotations

from dataclasses import dataclass, field

from lockfs.backends.fcntl_options import FcntlOptions
from lockfs.backends.paxos.options import PaxosOptions
from lockfs.keeper.policy import Policy
from lockfs.mirror.modes import IoMode

BACKENDS = ("fcntl", "paxos", "nop")


@dataclass(frozen=True)
class MountOptions:
    """One mount.

    `source` and `mountpoint` are paths as given until lockfs.cli.main made them absolute; `mountpoint` may
    be `/dev/fd/N`, a FUSE device that somebody else has mounted already. `fsname` is the first field of the
    mount table and `subtype` its type (`fuse.SUBTYPE`). `mount_flags` are MS_* bits of mount(2), and
    `kernel_options` are appended to its data string. `host` is this machine's name as other hosts see it.
    `read_only` repeats the MS_RDONLY bit. `log` is a file that gets the log too.
    `watchdog` is "none", "wdmd" or a device.
    """

    source: str
    mountpoint: str
    fsname: str
    host: str
    io: IoMode = IoMode.AUTO
    backend: str = "fcntl"
    policy: Policy = field(default_factory=Policy)
    fcntl: FcntlOptions = field(default_factory=FcntlOptions)
    paxos: PaxosOptions = field(default_factory=PaxosOptions)
    subtype: str = "lockfs"
    read_only: bool = False
    mount_flags: int = 0
    kernel_options: tuple[str, ...] = ()
    foreground: bool = False
    debug: bool = False
    log: str | None = None
    watchdog: str = "none"
