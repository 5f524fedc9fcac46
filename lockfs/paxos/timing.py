"""The protocol's times, all derived from a host's io_timeout and the watchdog time (section 9 of the format).

Seconds. `io_timeout` may differ from host to host and stands in each host's delta lease; the watchdog time
does not stand anywhere and must be the same on all hosts.
"""

from __future__ import annotations

from dataclasses import dataclass

IO_TIMEOUT_DEFAULT = 10
IO_TIMEOUT_MIN, IO_TIMEOUT_MAX = 1, 60
WATCHDOG_DEFAULT = 60
SAFETY_S = 5.0
"""What a renewal that comes late must leave, besides the longest I/O, before others may take over."""


@dataclass(frozen=True)
class Timing:
    """One host's times."""

    io_timeout: int = IO_TIMEOUT_DEFAULT
    watchdog: int = WATCHDOG_DEFAULT

    @property
    def renewal(self) -> int:
        """From one renewal to the next at most; also how long a joiner of a free id waits before it looks
        again.
        """
        return 2 * self.io_timeout

    @property
    def renew_every(self) -> int:
        """From one renewal to the next while all goes well: more often than the rules ask for, so that
        storage which is away for 6 io_timeout, from the worst moment on, is back before 8 have passed.
        """
        return self.io_timeout

    @property
    def late(self) -> int:
        """The age at which a lease that was not renewed is worth a warning."""
        return 6 * self.io_timeout

    @property
    def fails(self) -> int:
        """The age from which no I/O may be started under the lease."""
        return 8 * self.io_timeout

    @property
    def dead(self) -> int:
        """The age from which other hosts may take what this one holds."""
        return self.fails + self.watchdog

    def comeback(self, longest_io: int) -> float:
        """The age up to which a renewal that was late still counts, if it has landed by then.

        Another host's last look at our sector may be as old as its own longest I/O when it decides that we
        are dead; a renewal that landed earlier than that cannot have been missed.
        """
        return self.dead - max(self.watchdog / 2, longest_io + SAFETY_S)

    def of(self, io_timeout: int) -> Timing:
        """The times of a host whose delta lease states `io_timeout` (0: nothing, so ours are taken)."""
        return Timing(io_timeout or self.io_timeout, self.watchdog)
