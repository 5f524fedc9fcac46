"""A membership that a later process of the same machine goes on with, after the former one was killed.

It is one life of one host, for everybody else: same id, generation and name. That the later process must know
for certain: the former one has wholly ended, its I/Os included, and the clock is the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from lockfs.records.sectors import Leader


@dataclass(frozen=True)
class Kept:
    """What the later process must know. Times are the host's clock (seams.Clock), seconds.

    `timestamp`: of the last record that is known to have landed; `renewed_at`, `entered_at`: as in Lockspace.
    `longest_io`: the largest io_timeout seen of any host; `strangers`: as in Lockspace.
    """

    host_id: int
    host_name: bytes
    generation: int
    io_timeout: int
    timestamp: int
    renewed_at: float
    entered_at: float
    longest_io: int
    strangers: tuple[int, ...] = ()

    def matches(self, record: Leader, until: int) -> bool:
        """Whether an intact record is one that the former process may have written by the second `until`.

        A timestamp of 0 is none: the former process had left.
        """
        return (
            (record.owner_id, record.owner_generation) == (self.host_id, self.generation)
            and record.resource_name == self.host_name
            and record.io_timeout == self.io_timeout
            and self.timestamp <= record.timestamp <= until
        )
