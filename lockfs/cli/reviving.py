"""Going on with a mount of which all processes were killed, from what the service manager kept of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from lockfs.cli.resuming import go_on, is_gone, remembered
from lockfs.cli.serving import Serve, Served
from lockfs.guardian import revival, service
from lockfs.guardian.upgrade import Program
from lockfs.linux import notify


@dataclass(frozen=True)
class Revived:
    """A mount that waits for its next guardian."""

    served: Served

    @property
    def mountpoint(self) -> str:
        """Where it is mounted."""
        return self.served.mounted.mountpoint

    def run(self, program: Program) -> int:
        """Be its guardian until it ends; the exit code of the process."""
        if self.served.background:
            os.chdir("/")
        return go_on(self.served, program)


def revive(serve: Serve, raise_limit: Callable[[], None]) -> Revived | None:
    """The mount that the service manager kept; None if it kept none, or one that has ended.

    Must come before anything else is opened: every descriptor goes back to the number that it had.

    Raises:
        JournalError: it was kept by another version of lockfs, or in part.
        StillAlive: it is still served.
        OSError: too many descriptors.
    """
    listed = notify.take_listed(os.environ)
    if not listed:
        return None
    raise_limit()
    manager = notify.manager(os.environ)
    kept = revival.receive(listed)
    if kept is None:
        _forget(manager, [name for _, name in listed])
        return None
    served, _ = remembered(kept.memory, serve)
    device = kept.found(served.mounted.device_fd)
    if device is not None and is_gone(device):
        kept.memory.unmap()
        for descriptor in kept.names.values():
            os.close(descriptor)
        _forget(manager, list(kept.names))
        return None
    memory = revival.restore(kept, {served.source_fd, served.mounted.device_fd})
    _forget(manager, revival.superfluous(kept, memory))
    again, _ = remembered(memory, serve)
    return Revived(again)


def _forget(manager: notify.Manager | None, names: list[str]) -> None:
    if manager is not None:
        notify.say(manager.address, *service.forget(names))
