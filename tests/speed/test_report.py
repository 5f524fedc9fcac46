"""The arithmetic of the benchmark, without measuring anything."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from tests.speed import chart
from tests.speed.cases import LESS, MORE, Metric
from tests.speed.names import OPEN_MEDIAN, percentile
from tests.speed.report import PASSTHROUGH, Figures, judge, ratio_table, verdict_table
from tests.speed.targets import BARE, BARE_AGAIN

CASE = "direct 4k randread libaio 1"


@pytest.fixture
def figures() -> Figures:
    """Two rounds of one rate and one duration."""
    made = Figures(metrics={CASE: Metric("op/s", MORE), OPEN_MEDIAN: Metric("µs", LESS)})
    for bare, again, mine in ((100.0, 110.0, 105.0), (200.0, 180.0, 95.0)):
        made.add(CASE, BARE, bare)
        made.add(CASE, BARE_AGAIN, again)
        made.add(CASE, PASSTHROUGH, mine)
        made.add(OPEN_MEDIAN, BARE, 10.0)
        made.add(OPEN_MEDIAN, PASSTHROUGH, 40.0)
    return made


def test_ratios_are_of_the_same_round(figures: Figures) -> None:
    """Each round is divided by the mean of that round's two bare figures, so that drift cancels out."""
    assert figures.ratios(CASE, PASSTHROUGH) == pytest.approx([1.0, 0.5])
    assert figures.ratio(CASE, PASSTHROUGH) == pytest.approx(0.75)
    assert figures.noise(CASE) == pytest.approx(0.1)


def test_durations_are_turned_round(figures: Figures) -> None:
    """A ratio is always speed: four times the time is a quarter."""
    assert figures.ratio(OPEN_MEDIAN, PASSTHROUGH) == pytest.approx(0.25)


def test_bars_are_judged_both_ways(figures: Figures) -> None:
    """A least ratio fails below it, a greatest figure passes below it, no figure is neither."""
    verdicts = {(one.bar.metric, one.bar.target): one.passed for one in judge(figures)}
    assert verdicts[CASE, PASSTHROUGH] is False
    assert verdicts[OPEN_MEDIAN, PASSTHROUGH] is True
    assert verdicts[CASE, "lockfs daemon"] is None


def test_tables_name_every_case(figures: Figures) -> None:
    """Both tables print, with the failing bar marked."""
    assert CASE in ratio_table(figures, [PASSTHROUGH])
    assert "FAIL" in verdict_table(judge(figures))


def test_percentile_takes_a_measured_value() -> None:
    """The 99th percentile of a hundred and one values is the hundredth of them."""
    assert percentile([float(value) for value in range(101)], 99) == 99.0


def test_chart_is_well_formed() -> None:
    """The chart is XML and shows the ratio of every target that has one."""
    document = {
        "machine": {"kernel": "6.18", "cpus": 2},
        "rounds": 1,
        "results": {CASE: {"targets": {PASSTHROUGH: {"ratio to bare": 0.98}, BARE: {"ratio to bare": 1.0}}}},
    }
    text = chart.draw(document)
    ElementTree.fromstring(text)
    assert "0.98" in text
