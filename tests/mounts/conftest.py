"""Mounts shared by the tests of this folder: one in each data mode, and two hosts of one store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.mounts import Mount, TwoMounts, mounted, two_mounts, why_not_mount


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Nothing in this folder works without a real mount."""
    reason = why_not_mount()
    here = str(Path(__file__).parent)
    for item in items:
        if reason and str(item.path).startswith(here):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(params=["auto", "guarded", "daemon"])
def mount(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Mount]:
    """A mount of an empty store, in each data mode."""
    store = tmp_path / "store"
    store.mkdir()
    with mounted(store, tmp_path / "mount", f"io={request.param},wait=0.3") as made:
        before = made.descriptors()
        yield made
        made.settles_at(before)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[TwoMounts]:
    """Two hosts' mounts of one store."""
    with two_mounts(tmp_path, "wait=0.3") as made:
        before = made.a.descriptors(), made.b.descriptors()
        yield made
        made.a.settles_at(before[0])
        made.b.settles_at(before[1])
