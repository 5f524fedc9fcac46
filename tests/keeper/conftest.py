"""Two hosts, and a clock of its own for every test here, which jumps whenever nothing else can happen."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from .world import Host, World


def run_jumping(*arguments: Any, **options: Any) -> Any:
    """trio.run, from time 0 on a clock that never waits."""
    return trio.run(*arguments, **{**options, "clock": MockClock(autojump_threshold=0)})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give the async tests of this directory that clock."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents and inspect.iscoroutinefunction(getattr(item, "obj", None)):
            item.add_marker(pytest.mark.trio(run=run_jumping), append=False)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    """Hosts a and b with the default policy; a test that closes what it opened leaves nothing."""
    made = World()
    yield made
    made.check_exclusion()
    made.check_nothing_left()


@pytest.fixture
def a(world: World) -> Host:
    """The first host."""
    return world.hosts[0]


@pytest.fixture
def b(world: World) -> Host:
    """The second host."""
    return world.hosts[1]
