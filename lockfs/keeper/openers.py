"""Who opens an image: the process behind a thread, and the part it plays."""

from __future__ import annotations

import enum
import os
from dataclasses import dataclass
from fnmatch import fnmatchcase

from lockfs.keeper.policy import Policy
from lockfs.linux.proc import Process, process_of


class Role(enum.Enum):
    """ORDINARY opens what it writes, a MANAGER only sets labels, a GUEST runs, an INCOMING one takes over."""

    ORDINARY = "ordinary"
    MANAGER = "manager"
    GUEST = "guest"
    INCOMING = "incoming"


@dataclass(frozen=True)
class Opener:
    """The process that opens, the thread that waits in open(2) (0: unknown), and the process's role."""

    process: Process
    tid: int
    role: Role

    def same_process(self, other: Opener) -> bool:
        """Whether both are surely one process.

        A process outside our pid namespace (pid 0) or already gone (no start time) is never the same as
        another: taking two strangers for one would let both write.
        """
        mine = self.process
        return mine.pid > 0 and mine.started > 0 and mine.same_as(other.process)

    def __str__(self) -> str:
        return f"{self.process.program} (pid {self.process.pid})"


def identify(tid: int, policy: Policy) -> Opener:
    """The opener behind thread `tid`; reads /proc, so call it on a worker thread while the opener waits."""
    process = process_of(tid)
    return Opener(process, tid, role_of(process, policy))


def role_of(process: Process, policy: Policy) -> Role:
    """The part a process plays by its program's name and, for a guest, by its arguments."""
    if _matches(process.program, policy.managers):
        return Role.MANAGER
    if not _matches(process.program, policy.guests):
        return Role.ORDINARY
    marks = {os.fsencode(argument) for argument in policy.incoming}
    return Role.GUEST if marks.isdisjoint(process.arguments) else Role.INCOMING


def _matches(program: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(program, pattern) for pattern in patterns)
