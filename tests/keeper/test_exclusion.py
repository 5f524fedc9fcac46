"""The one promise that may not give way: never two writers, whatever else happens."""

from __future__ import annotations

from collections import Counter

import pytest

from lockfs.keeper.policy import Local
from tests.conftest import ExpectLog

from .simulation import simulate


@pytest.mark.parametrize("faults", [False, True], ids=["sound", "faulty"])
def test_never_two_writers(faults: bool, expect_log: ExpectLog) -> None:
    """In seeded runs of three hosts no two processes ever write one image, and nothing is left behind."""
    expect_log("lockfs.keeper", None)
    events: Counter[str] = Counter()
    for seed in range(6):
        events += simulate(seed, faults=faults)
    refusals = ("ImageBusy", "Interrupted", "WriteRefused")
    for event in ("opened", "cancelled", "written", "claimed", "removed", *refusals):
        assert events[event] > 3, f"{event} is hardly ever seen: {events}"
    assert not faults or (events["lost"] > 3 and events["doubted"] > 3 and events["BackendError"] > 3)


def test_never_two_hosts_with_local_host(expect_log: ExpectLog) -> None:
    """With local=host processes share, hosts do not."""
    expect_log("lockfs.keeper", None)
    for seed in range(3):
        simulate(seed, faults=True, local=Local.HOST)
