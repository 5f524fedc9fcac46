"""Draws the chart of a run as SVG: for each case a bar for each target, as a ratio to the bare directory."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

ROWS = (
    ("direct 4k randread libaio 1", "4 KiB read, O_DIRECT, depth 1"),
    ("direct 4k randwrite libaio 1", "4 KiB write, O_DIRECT, depth 1"),
    ("direct 4k randread io_uring 16", "4 KiB read, O_DIRECT, depth 16"),
    ("direct 4k randwrite io_uring 16", "4 KiB write, O_DIRECT, depth 16"),
    ("direct 1m read libaio 16", "1 MiB read, O_DIRECT, depth 16"),
    ("direct 1m write libaio 16", "1 MiB write, O_DIRECT, depth 16"),
    ("buffered 4k randwrite psync 1", "4 KiB write, page cache"),
    ("buffered 4k randwrite+fdatasync psync 1", "4 KiB write, fdatasync"),
    ("qemu-img bench, 4k write, depth 16, native", "qemu-img bench, native"),
    ("qemu-img convert", "qemu-img convert"),
    ("stat", "stat"),
    ("create", "create"),
)
TARGETS = (
    ("lockfs passthrough", "#1b6ca8"),
    ("lockfs guarded", "#5aa9d6"),
    ("lockfs daemon", "#9fd0ea"),
    ("bindfs", "#8a8f98"),
    ("plain pyfuse3", "#c9ccd1"),
)
WIDTH = 860
LEFT = 250
PLOT = 520
BAR = 9
GAP = 12
TOP = 64
BOTTOM = 44
MOST = 1.2


def _text(x: float, y: float, words: str, anchor: str = "start", size: int = 12, fill: str = "#222") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{fill}">'
        f"{escape(words)}</text>"
    )


def _legend() -> list[str]:
    parts: list[str] = []
    x: float = LEFT
    for name, colour in TARGETS:
        parts.append(f'<rect x="{x:.1f}" y="36" width="11" height="11" fill="{colour}"/>')
        parts.append(_text(x + 15, 46, name, size=11))
        x += 24 + 6.2 * len(name)
    return parts


def _row(top: float, label: str, row: Mapping[str, Any]) -> tuple[list[str], float]:
    parts, y = [], top
    for name, colour in TARGETS:
        ratio = row.get(name, {}).get("ratio to bare")
        if ratio is None:
            continue
        width = min(ratio, MOST) / MOST * PLOT
        parts.append(f'<rect x="{LEFT}" y="{y:.1f}" width="{width:.1f}" height="{BAR}" fill="{colour}"/>')
        parts.append(_text(LEFT + width + 4, y + BAR - 1, f"{ratio:.2f}", size=9, fill="#555"))
        y += BAR + 1
    if y > top:
        parts.append(_text(LEFT - 10, (top + y) / 2 + 4, label, "end"))
        y += GAP
    return parts, y


def draw(document: Any) -> str:
    """The SVG text for a run's JSON document."""
    body: list[str] = []
    y: float = TOP
    for metric, label in ROWS:
        result = document["results"].get(metric)
        if result is not None:
            parts, y = _row(y, label, result["targets"])
            body += parts
    grid = []
    for step in range(0, 7):
        x = LEFT + step * 0.2 / MOST * PLOT
        colour = "#333" if step == 5 else "#ddd"
        grid.append(f'<line x1="{x:.1f}" y1="{TOP - 6}" x2="{x:.1f}" y2="{y:.1f}" stroke="{colour}"/>')
        grid.append(_text(x, y + 16, f"{step * 0.2:.1f}", "middle", 11, "#555"))
    machine = document["machine"]
    foot = f"Linux {machine['kernel']}, {machine['cpus']} CPUs; median of {document['rounds']} rounds"
    height = y + BOTTOM
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" '
        f'font-family="Helvetica, Arial, sans-serif">'
        f'<rect width="{WIDTH}" height="{height:.0f}" fill="#fff"/>'
    )
    title = _text(LEFT, 22, "Speed as a share of the bare directory's (1.0, more is better)", size=14)
    parts = [head, title, *_legend(), *grid, *body, _text(LEFT, y + 34, foot, size=10, fill="#777"), "</svg>"]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    import json

    Path(sys.argv[2]).write_text(draw(json.loads(Path(sys.argv[1]).read_text())))
