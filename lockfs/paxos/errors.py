"""What the engine answers when it cannot do what was asked."""

from __future__ import annotations

from lockfs.errors import BackendError
from lockfs.records.results import Result
from lockfs.records.sectors import Leader, shown


class EngineError(BackendError):
    """An outcome other than success; `result` is sanlock's number for it."""

    def __init__(self, result: Result, sentence: str) -> None:
        super().__init__(f"{sentence} ({int(result)})")
        self.result = result


class LockspaceFailed(EngineError):
    """This host's delta lease is not held (any more): nothing may be taken or written under it."""


class IdInUse(EngineError):
    """Another host has the host id that was to be joined."""

    def __init__(self, host_id: int, found: Leader) -> None:
        super().__init__(
            Result.ID_IN_USE,
            f"host id {host_id} of lockspace {shown(found.space_name)} is in use by host "
            f"{shown(found.resource_name)}",
        )
        self.host_id = host_id
        self.host_name = found.resource_name


class Refused(EngineError):
    """The lease is somebody else's, now or about to be. Trying again later may succeed.

    `owner_id` and `owner_generation` name the host in the way as far as known (0: several, or none by name).
    `free_at` is the clock time at which it will count as dead if nothing more is heard of it, where that
    was the reason.
    """

    def __init__(
        self,
        result: Result,
        sentence: str,
        *,
        leader: Leader | None = None,
        owner: tuple[int, int] | None = None,
        free_at: float | None = None,
    ) -> None:
        super().__init__(result, sentence)
        self.leader = leader
        if owner is None:
            owner = (leader.owner_id, leader.owner_generation) if leader is not None else (0, 0)
        self.owner_id, self.owner_generation = owner
        self.free_at = free_at
