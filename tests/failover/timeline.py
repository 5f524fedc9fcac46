"""Which request waited how long over which kill."""

from __future__ import annotations

import bisect
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tests.failover.recording import Request


@dataclass(frozen=True)
class Kill:
    """One kill: when the signal was sent, when the next worker had answered a request asked after it."""

    number: int
    whom: str
    pids: tuple[int, ...]
    at: int
    served: int


def sort_out(
    kills: Sequence[Kill], requests: Iterable[Request]
) -> tuple[list[Request | None], list[Request]]:
    """The longest request over each kill (under way at some moment between it and its repair), and the rest.

    The rest are those that no kill can have delayed. Kills are in order and do not overlap.
    """
    ends = [kill.served for kill in kills]
    worst: list[Request | None] = [None] * len(kills)
    rest = []
    for request in requests:
        place = bisect.bisect_left(ends, request.begun)
        delayed = False
        while place < len(kills) and kills[place].at <= request.ended:
            delayed = True
            known = worst[place]
            if known is None or request.ms > known.ms:
                worst[place] = request
            place += 1
        if not delayed:
            rest.append(request)
    return worst, rest


def rows(
    kills: Sequence[Kill], worst: Sequence[Request | None], of_guests: Sequence[Request | None]
) -> list[dict[str, Any]]:
    """For every kill its longest request, in milliseconds, and what it was.

    Those of guests stand apart: they are told by a guest's progress, which has rests of its own.
    """
    return [
        {
            "number": kill.number,
            "whom": kill.whom,
            "pids": list(kill.pids),
            "repaired_ms": round((kill.served - kill.at) / 1e6, 1),
            "stall_ms": round(request.ms, 1) if request else 0.0,
            "stall_of": f"{request.load}: {request.what}" if request else None,
            "guests_ms": round(guest.ms, 1) if guest else 0.0,
        }
        for kill, request, guest in zip(kills, worst, of_guests, strict=True)
    ]


def summary(table: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The longest and the median of the stalls over all kills, milliseconds."""
    values = [float(row["stall_ms"]) for row in table]
    if not values:
        return {}
    return {
        "longest_ms": max(values),
        "median_ms": round(statistics.median(values), 1),
        "guests_longest_ms": max(float(row["guests_ms"]) for row in table),
        "longest_repair_ms": max(float(row["repaired_ms"]) for row in table),
    }


def latencies(requests: Iterable[Request]) -> dict[str, dict[str, float]]:
    """Number, median, 99th percentile and maximum (milliseconds) for each kind of request."""
    kinds: dict[str, list[float]] = {}
    for request in requests:
        kinds.setdefault(f"{request.load}: {request.what}", []).append(request.ms)
    found = {}
    for kind, values in sorted(kinds.items()):
        values.sort()
        found[kind] = {
            "count": len(values),
            "median_ms": round(values[len(values) // 2], 2),
            "p99_ms": round(values[min(len(values) - 1, len(values) * 99 // 100)], 2),
            "max_ms": round(values[-1], 2),
        }
    return found
