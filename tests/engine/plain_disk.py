"""A disk in memory that does as it is told, for tests in which nothing is simultaneous.

Fault model: none, but that it breaks off at a chosen write (`writes_left`), of which a chosen part
(`torn_bytes`) still lands, and that one may change its bytes between two calls. It notes every write.
"""

from __future__ import annotations

import errno

from lockfs.paxos.seams import Disk, DiskError, DiskTimeout


class PlainDisk(Disk):
    """Starts with `data`; grows as it is written."""

    def __init__(self, data: bytes = b"") -> None:
        self.data = bytearray(data)
        self.writes: list[tuple[int, int]] = []
        self.reads: list[tuple[int, int]] = []
        self.writes_left: int | None = None
        self.torn_bytes = 0

    @property
    def name(self) -> str:
        """As the sentences call it."""
        return "/dev/leases"

    async def read(self, offset: int, length: int, timeout: float) -> bytes:
        """What is there."""
        assert timeout > 0
        self.reads.append((offset, length))
        if offset + length > len(self.data):
            raise DiskError(errno.EMSGSIZE, "too short")
        return bytes(self.data[offset : offset + length])

    async def write(self, offset: int, data: bytes, timeout: float) -> None:
        """Now, and in the order of the calls."""
        assert timeout > 0
        if self.writes_left == 0:
            self._land(offset, data[: self.torn_bytes])
            raise DiskTimeout(errno.ETIMEDOUT, "broke off")
        if self.writes_left is not None:
            self.writes_left -= 1
        self.writes.append((offset, len(data)))
        self._land(offset, data)

    def _land(self, offset: int, data: bytes) -> None:
        self.data.extend(bytes(max(0, offset + len(data) - len(self.data))))
        self.data[offset : offset + len(data)] = data
