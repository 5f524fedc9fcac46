"""From the figures of all rounds to medians, ratios, and the verdict against the bars."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tests.speed.cases import LESS, Metric
from tests.speed.fio import BIG_BLOCK, BLOCK, Cell, cells
from tests.speed.names import OPEN_MEDIAN
from tests.speed.targets import BARE, BARE_AGAIN, PYFUSE3, lockfs_name

PASSTHROUGH = lockfs_name("passthrough")
DAEMON = lockfs_name("daemon")
NONE = "-"


@dataclass
class Figures:
    """What was measured: by metric and target, one figure a round; and what failed, with its reason."""

    metrics: dict[str, Metric] = field(default_factory=dict)
    values: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    failed: dict[str, dict[str, str]] = field(default_factory=dict)

    def add(self, metric: str, target: str, value: float) -> None:
        """Take one round's figure."""
        self.values.setdefault(metric, {}).setdefault(target, []).append(value)

    def median(self, metric: str, target: str) -> float | None:
        """The middle of the rounds; None where nothing was measured."""
        values = self.values.get(metric, {}).get(target)
        return statistics.median(values) if values else None

    def ratios(self, metric: str, target: str, against: str = BARE) -> list[float]:
        """How fast `target` was, round by round, as a multiple of `against` in the same round.

        The bare directory is measured twice a round; against it, the mean of both is taken.
        """
        row = self.values.get(metric, {})
        mine, other = row.get(target, []), row.get(against, [])
        if against == BARE and target != BARE_AGAIN and BARE_AGAIN in row:
            other = [(a + b) / 2 for a, b in zip(other, row[BARE_AGAIN], strict=False)]
        pairs = [(a, b) for a, b in zip(mine, other, strict=False) if a > 0 and b > 0]
        if self.metrics[metric].better == LESS:
            return [b / a for a, b in pairs]
        return [a / b for a, b in pairs]

    def ratio(self, metric: str, target: str, against: str = BARE) -> float | None:
        """The median of the ratios of all rounds."""
        found = self.ratios(metric, target, against)
        return statistics.median(found) if found else None

    def noise(self, metric: str) -> float | None:
        """How far apart the two measurements of the bare directory lay, median of the rounds (0.02: 2 %)."""
        found = self.ratios(metric, BARE_AGAIN)
        return statistics.median([abs(ratio - 1) for ratio in found]) if found else None


@dataclass(frozen=True)
class Bar:
    """A demand on one metric of one target: a least ratio against another, or a greatest figure."""

    what: str
    metric: str
    target: str
    against: str | None
    limit: float


@dataclass(frozen=True)
class Verdict:
    """A bar and what was measured; `passed` is None where there is no figure."""

    bar: Bar
    found: float | None
    spread: tuple[float, float] | None
    noise: float | None

    @property
    def passed(self) -> bool | None:
        """Whether the bar was met."""
        if self.found is None:
            return None
        return self.found < self.bar.limit if self.bar.against is None else self.found >= self.bar.limit


def _native(cell: Cell) -> bool:
    return cell.direct and cell.engine in ("libaio", "io_uring") and not cell.fdatasync


def bars() -> list[Bar]:
    """Every demand that a run is held against."""
    made = [
        Bar("passthrough against bare", cell.name, PASSTHROUGH, BARE, 0.97)
        for cell in cells()
        if _native(cell)
    ]
    made += [
        Bar("daemon against plain pyfuse3, 4 KiB", cell.name, DAEMON, PYFUSE3, 2.0)
        for cell in cells()
        if cell.block == BLOCK and not cell.fdatasync
    ]
    made += [
        Bar("daemon against plain pyfuse3, 1 MiB", cell.name, DAEMON, PYFUSE3, 1.0)
        for cell in cells()
        if cell.block == BIG_BLOCK
    ]
    made += [
        Bar("write and fdatasync against bare", cell.name, PASSTHROUGH, BARE, 0.8)
        for cell in cells()
        if cell.fdatasync
    ]
    made.append(Bar("open and close, fcntl, in µs", OPEN_MEDIAN, PASSTHROUGH, None, 1000.0))
    return made


def judge(figures: Figures) -> list[Verdict]:
    """Hold the figures against every bar whose metric was measured."""
    verdicts = []
    for bar in bars():
        if bar.metric not in figures.metrics:
            continue
        if bar.against is None:
            values = figures.values.get(bar.metric, {}).get(bar.target, [])
            found = figures.median(bar.metric, bar.target)
        else:
            values = figures.ratios(bar.metric, bar.target, bar.against)
            found = figures.ratio(bar.metric, bar.target, bar.against)
        spread = (min(values), max(values)) if values else None
        verdicts.append(Verdict(bar, found, spread, figures.noise(bar.metric)))
    return verdicts


def short(value: float | None) -> str:
    """A figure for a table, three digits that count."""
    if value is None:
        return NONE
    if value >= 10_000:
        return f"{value / 1000:.1f}k"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def _grid(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            text.ljust(width) if not column else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join(lines)


def ratio_table(figures: Figures, targets: Sequence[str]) -> str:
    """Every metric: the bare figure, the noise, and each target as a ratio to bare (more is faster)."""
    others = [name for name in targets if name not in (BARE, BARE_AGAIN)]
    rows = [["", "unit", "bare", "noise", *others]]
    for metric, kind in figures.metrics.items():
        noise = figures.noise(metric)
        row = [
            metric,
            kind.unit,
            short(figures.median(metric, BARE)),
            NONE if noise is None else f"{noise:.1%}",
        ]
        for name in others:
            ratio = figures.ratio(metric, name)
            failed = name in figures.failed.get(metric, {})
            row.append(_ratio(ratio) if ratio is not None else "failed" if failed else NONE)
        rows.append(row)
    return _grid(rows)


def verdict_table(verdicts: Sequence[Verdict]) -> str:
    """The bars, one a line, with pass or fail."""
    rows = [["bar", "case", "limit", "found", "spread", "noise", ""]]
    words: Mapping[bool | None, str] = {True: "pass", False: "FAIL", None: "no figure"}
    for verdict in verdicts:
        bar = verdict.bar
        spread = f"{short(verdict.spread[0])}-{short(verdict.spread[1])}" if verdict.spread else NONE
        noise = f"{verdict.noise:.1%}" if verdict.noise is not None else NONE
        limit = f"< {bar.limit:g}" if bar.against is None else f">= {bar.limit:g}"
        found = NONE if verdict.found is None else f"{verdict.found:.3g}"
        rows.append([bar.what, bar.metric, limit, found, spread, noise, words[verdict.passed]])
    return _grid(rows)
