"""What a measurement is, and the list of all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tests.speed.targets import Target

MORE = "more is better"
LESS = "less is better"


class CaseFailed(Exception):
    """A case could not be measured on a target; the message says why."""


@dataclass(frozen=True)
class Metric:
    """One figure of a case: its unit, and whether more or less of it is better."""

    unit: str
    better: str


@dataclass(frozen=True)
class Case:
    """Something measured on each target in turn.

    `measure(target, seconds)` returns a figure for each of `metrics` and raises CaseFailed. `seconds` is
    the time one cell may take. `backends` also measures the mounts that exist to compare backends.
    """

    name: str
    metrics: Mapping[str, Metric]
    measure: Callable[[Target, float], Mapping[str, float]]
    backends: bool = False
