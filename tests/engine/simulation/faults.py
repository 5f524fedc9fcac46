"""The fault model: what the world may do to the engine, and what it is assumed not to do.

**I/O.** Every I/O takes some time, mostly milliseconds, sometimes seconds; any two on different sectors may
end in either order. The writes of one program to one sector land in the order of their calls, and no call on
a sector begins before that program's earlier writes of it have ended (the contract of `Disk`). A sector is
atomic. A read of several sectors may be torn: each part of it shows the state of some moment of its own
between the call and the end, so it may be as stale as the read is slow. An I/O may time out: a read is then
lost; a write is lost, or lands late, at most LATEST of the watchdog time after its call. An I/O may fail
with EIO; a write that failed may have landed nevertheless. Both come singly and in outages, for one host,
for all, or for one part of the storage, for up to some tens of seconds.

**Hosts.** A program may crash at any await; what it has under way still lands within the same bound, or
never. It is started again with a new host name, and joins its former id or another that is free. A host may
pause at any moment, for up to several times the time after which it counts as dead, and go on as if nothing
had happened: its clock counts the pause, its sleeps may or may not. Its I/O goes on meanwhile, so a result
may be as old as the pause when the program sees it. A task may be cancelled at any await; the program then
settles the lease. A program may stop in good order: it releases its leases and leaves.

**Standstills.** In worlds with halts, members are stopped for up to three times the time after which a host
counts as dead, each together with its clock: it does not know that time passed. What it had handed over lands
within the same bound. Not one that is about to join: between its look at the id and its write nothing shows
that others have joined with it.

**Clocks.** They start anywhere, never step back, leap ahead only by time that really passes (a suspension),
and run fast or slow by up to DRIFT, which changes now and then. With the rate r of the holder's clock and R
of the taker's, what a holder starts at the last moment is out of the way when another takes over if 8
io_timeout / r + LATEST watchdog < (8 io_timeout + watchdog) / R. For io_timeout up to 3 and a watchdog time
of 10 or more that holds up to a drift of 2 %, for the defaults (10 and 60) as well.

**The watchdog's part.** In some seeds a paused host is frozen with everything it has handed over: I/O that
was checked and issued before the pause lands after it, later than the bound. Nothing on the host can prevent
that; a watchdog that resets the host would. An image write that lands beyond the bound is counted, not
judged. After a write to the leases beyond the bound, which may undo the ballots of others, the rest of the
seed is counted, not judged. Nothing else is excused.

**Not modelled.** Storage that loses, duplicates or invents sectors; leases damaged from outside; another
program that does not keep the protocol; clocks that leap without time passing; hosts that differ in the
watchdog time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

LATEST = 0.8
"""How late a write may land, as a part of the watchdog time, counted from its call."""
DRIFT = 0.01
FROZEN_SEEDS = 8
"""One seed in so many freezes paused hosts with their I/O."""


@dataclass(frozen=True)
class Faults:
    """One seed's world. Times are seconds, the rest probabilities; `calm` has no faults at all."""

    hosts: int
    leases: int
    io_timeouts: tuple[int, ...]
    watchdog: int
    thinking: float
    """The longest pause between two uses of a lease: short makes contention, long makes time pass."""
    chaos_every: float
    """From one outage, crash or pause to the next, on average."""
    latency: float
    slow: float
    late: float
    error: float
    cancel: float
    torn: float
    shared: float
    frozen: bool
    collide: bool
    """All hosts want the same id at first."""

    @classmethod
    def draw(cls, random: Random) -> Faults:
        """A world for a seed."""
        hosts = random.choice((2, 3, 3, 4))
        busy = random.random() < 0.45
        uniform = random.random() < 0.5
        timeouts = tuple(random.choice((1, 2, 3)) for _ in range(hosts))
        return cls(
            hosts=hosts,
            leases=1 if busy or random.random() < 0.5 else 2,
            io_timeouts=(timeouts[0],) * hosts if uniform else timeouts,
            watchdog=random.choice((10, 10, 20, 60)),
            thinking=random.choice((0.02, 0.3)) if busy else random.choice((2.0, 10.0)),
            chaos_every=random.choice((1.0, 4.0, 15.0)) if busy else random.choice((8.0, 20.0, 60.0)),
            latency=random.choice((0.003, 0.01, 0.05)),
            slow=random.choice((0.0, 0.02, 0.15)),
            late=random.choice((0.0, 0.002, 0.02)),
            error=random.choice((0.0, 0.002, 0.02)),
            cancel=random.choice((0.0, 0.05, 0.3)),
            torn=random.choice((0.0, 0.3, 0.6)),
            shared=random.choice((0.0, 0.3, 0.7)),
            frozen=random.randrange(FROZEN_SEEDS) == 0,
            collide=random.random() < 0.25,
        )

    def with_halts(self) -> Faults:
        """For hosts that stand still: leases are held for as long as that takes, and not all is chaos."""
        quieter = max(self.chaos_every, 20.0)
        return replace(self, thinking=2.0, chaos_every=quieter, shared=min(self.shared, 0.3))

    @property
    def bound(self) -> float:
        """How long after its call a write may land."""
        return LATEST * self.watchdog

    @property
    def dead(self) -> int:
        """The longest time after which a silent host counts as dead."""
        return 8 * max(self.io_timeouts) + self.watchdog
