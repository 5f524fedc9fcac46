"""What an administrator decides about opens: how long to wait, who counts as what, how strict to be."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from lockfs.errors import UsageError


class Readers(enum.Enum):
    """ALLOW: read-only opens need no lease. SHARED: they take a shared one, so nobody writes meanwhile."""

    ALLOW = "allow"
    SHARED = "shared"


class Local(enum.Enum):
    """Who may write together on this host: the handles of one PROCESS, or every process of the HOST."""

    PROCESS = "process"
    HOST = "host"


class OnLost(enum.Enum):
    """What is done to those who have an image open when its lease is lost: REVOKE their handles, or KILL
    them.
    """

    REVOKE = "revoke"
    KILL = "kill"


@dataclass(frozen=True)
class Policy:
    """The rules of one mount.

    `wait` is how long, in seconds, an open waits for an image that somebody else holds; `handover_wait` the
    same for an opener that takes over a guest, and for a write that needs a lease first. `guests` and
    `managers` are fnmatch patterns on the base name of a program; `incoming` are arguments that mark a
    guest taking over. `yielding` allows a stopped guest's lease to go to its successor on request.
    """

    wait: float = 3.0
    handover_wait: float = 10.0
    readers: Readers = Readers.ALLOW
    local: Local = Local.PROCESS
    on_lost: OnLost = OnLost.REVOKE
    yielding: bool = True
    guests: tuple[str, ...] = ("qemu-system-*", "qemu-kvm", "kvm")
    managers: tuple[str, ...] = ("libvirtd", "virtqemud", "virtlockd", "virtstoraged", "virtlogd")
    incoming: tuple[str, ...] = ("-incoming", "--incoming")

    def __post_init__(self) -> None:
        """Refuse waits that are not a number of seconds from zero up."""
        for name, value in (("wait", self.wait), ("handover_wait", self.handover_wait)):
            if not 0 <= value < float("inf"):
                raise UsageError(f"{name}={value} is not a number of seconds; give 0 or more")
