"""The codes with which sanlock names an outcome, and the errors that carry them."""

from __future__ import annotations

import enum
import errno

from lockfs.errors import BackendError


class Result(enum.IntEnum):
    """Outcomes by sanlock's numbers (docs/paxos-format.md, section 19), so that both can be compared."""

    GENERAL = -201
    IO_TIMEOUT = -202
    DBLOCK_READ = -210
    DBLOCK_WRITE = -211
    DBLOCK_LVER = -212
    DBLOCK_MBAL = -213
    DBLOCK_CHECKSUM = -214
    LEADER_READ = -220
    LEADER_WRITE = -221
    LEADER_INCONSISTENT = -222
    LEADER_MAGIC = -223
    LEADER_VERSION = -224
    LEADER_SECTOR_SIZE = -225
    LEADER_SPACE_NAME = -226
    LEADER_RESOURCE_NAME = -227
    LEADER_NUM_HOSTS = -228
    LEADER_CHECKSUM = -229
    BAD_GEOMETRY = -230
    HOST_ID_TOO_LARGE = -231
    LVER_MISMATCH = -240
    LOCKSPACE_NOT_JOINED = -241
    OWNER_ALIVE = -243
    LOST_VERSION = -244
    COMMITTED_OTHER = -245
    SHARED_RETRIES = -246
    OWNER_DYING = -247
    RELEASE_LVER = -250
    RELEASE_OWNER = -251
    RENEWAL_OWNER = -260
    RENEWAL_CHANGED = -261
    ID_IN_USE = -262
    REQUEST_MAGIC = -270
    REQUEST_VERSION = -271
    REQUEST_OLD = -272
    REQUEST_NEWER = -273
    INDEX_MAGIC = -274
    INDEX_VERSION = -275
    INDEX_DAMAGED = -276
    SHARED_ELSEWHERE = -errno.EAGAIN
    LOCKSPACE_FAILED = -errno.ENOSPC
    SHORT_IO = -errno.EMSGSIZE


class RecordError(BackendError):
    """A sector does not hold the record that belongs there. Nothing was overwritten.

    `sector` is its index in the area `area`, as far as known where the error arose.
    """

    def __init__(self, result: Result, problem: str, area: str = "", sector: int | None = None) -> None:
        where = "" if sector is None else f"sector {sector} of {area}: "
        super().__init__(f"{where}{problem} ({int(result)})")
        self.result = result
        self.problem = problem
        self.area = area
        self.sector = sector

    def at(self, area: str, sector: int) -> RecordError:
        """The same error with the place it was found at."""
        return RecordError(self.result, self.problem, area, sector)
