"""The service manager that the mount runs under, if any: what it is told and what it is given to keep.

Its store of descriptors (systemd: FileDescriptorStoreMax=) is what is left of a mount when every process of
the family is killed. A mount without a service manager, or with one that has no store, goes without.
"""

from __future__ import annotations

import logging
import os

from lockfs.journal.handing import INODES_MAX, Handing, given_names
from lockfs.journal.memory import SharedMemory
from lockfs.linux import notify

_INODES_SHARE = 4
"""No more than this part of the store is for inodes that nothing open needs."""

_log = logging.getLogger(__name__)


def ready() -> None:
    """The guardian: the mount is served."""
    manager = notify.manager(os.environ)
    if manager is not None:
        notify.say(manager.address, f"READY=1\nMAINPID={os.getpid()}")


def hand_over(memory: SharedMemory) -> None:
    """A worker, when its turn begins: from here on the store has what the journal names."""
    manager = notify.manager(os.environ)
    if manager is None or not manager.store_max:
        return
    try:
        outbox = notify.Outbox(manager.address)
    except OSError as error:
        _log.error("The service manager does not listen (%s): it keeps nothing.", error.strerror)
        return
    Handing(memory, outbox, min(INODES_MAX, manager.store_max // _INODES_SHARE)).begin()


def farewell(memory: SharedMemory) -> None:
    """The guardian, when the mount has ended: nothing of it is to be brought back."""
    manager = notify.manager(os.environ)
    if manager is None:
        return
    names = given_names(memory) if manager.store_max else []
    notify.say(manager.address, "STOPPING=1", *forget(names))


def forget(names: list[str]) -> list[str]:
    """The messages that take descriptors out of the store."""
    return [f"FDSTOREREMOVE=1\nFDNAME={name}" for name in names]
