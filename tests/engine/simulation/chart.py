"""Draws the chart of docs/paxos-costs.md: what renewals cost, by the number of hosts, on logarithmic axes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 760, 400
LEFT, RIGHT, TOP, BOTTOM = 80, 740, 70, 340
HOSTS_AXIS = (1, 10, 100, 1000, 10_000)
VALUES_AXIS = (0.01, 0.1, 1, 10, 100, 1000)
MIB = 1 << 20
SERIES: tuple[tuple[str, str, Callable[[Any], float]], ...] = (
    ("I/Os per second", "#1b6ca8", lambda row: row["reads"] + row["writes"]),
    ("MiB read per second", "#c2571a", lambda row: row["reads bytes"] / MIB),
    ("MiB written per second", "#8a8f98", lambda row: row["writes bytes"] / MIB),
)


def _place(value: float, axis: tuple[float, ...], start: float, end: float) -> float:
    low, high = math.log10(axis[0]), math.log10(axis[-1])
    part = (math.log10(max(value, axis[0])) - low) / (high - low)
    return start + min(part, 1.0) * (end - start)


def _text(x: float, y: float, words: str, anchor: str = "start", size: int = 11, fill: str = "#444") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{fill}">'
        f"{escape(words)}</text>"
    )


def _grid() -> list[str]:
    parts = []
    for hosts in HOSTS_AXIS:
        x = _place(hosts, HOSTS_AXIS, LEFT, RIGHT)
        parts.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{BOTTOM}" stroke="#ddd"/>')
        parts.append(_text(x, BOTTOM + 18, f"{hosts:,}", "middle"))
    for value in VALUES_AXIS:
        y = _place(value, VALUES_AXIS, BOTTOM, TOP)
        parts.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{RIGHT}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(_text(LEFT - 8, y + 4, f"{value:g}", "end"))
    parts.append(_text((LEFT + RIGHT) / 2, BOTTOM + 38, "hosts that have joined", "middle", 12))
    return parts


def draw(document: Any) -> str:
    """The SVG text for the figures of costs.py."""
    title = f"What renewals cost the storage (io_timeout {document['io_timeout']}, sectors of 512 bytes)"
    body = [_text(LEFT, 24, title, size=14, fill="#222"), *_grid()]
    x: float = LEFT
    for name, colour, of in SERIES:
        points = [
            (
                _place(row["hosts"], HOSTS_AXIS, LEFT, RIGHT),
                _place(of(row), VALUES_AXIS, BOTTOM, TOP),
                of(row),
            )
            for row in document["membership"]
        ]
        line = " ".join(f"{px:.1f},{py:.1f}" for px, py, _ in points)
        body.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        body += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="{colour}"/>' for px, py, _ in points]
        last_x, last_y, last = points[-1]
        body.append(_text(last_x + 8, last_y + 4, f"{last:.3g}", fill=colour))
        body.append(f'<rect x="{x:.1f}" y="38" width="11" height="11" fill="{colour}"/>')
        body.append(_text(x + 15, 48, name))
        x += 30 + 6.4 * len(name)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="Helvetica, Arial, sans-serif">'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>'
    )
    return "\n".join([head, *body, "</svg>"]) + "\n"
