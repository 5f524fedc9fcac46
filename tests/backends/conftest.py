"""Fixtures of the backend tests."""

from __future__ import annotations

import inspect
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from lockfs.backends.fcntl import FcntlOptions

from . import opponents, virtlockd_client
from .makers import FcntlMaker
from .opponents import Field


def run_mock(*arguments: Any, **options: Any) -> Any:
    """trio.run, from time 0 on a clock that stands still unless told otherwise (lease_io.pace does)."""
    return trio.run(*arguments, **{**options, "clock": MockClock()})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give the async tests of paxos leases that clock."""
    here = Path(__file__).parent
    for item in items:
        is_paxos = item.path.parent == here and item.path.name.startswith("test_paxos_")
        if is_paxos and inspect.iscoroutinefunction(getattr(item, "obj", None)):
            item.add_marker(pytest.mark.trio(run=run_mock), append=False)


@pytest.fixture(scope="module")
def virtlockd() -> Iterator[Path]:
    """The socket of a virtlockd that runs for all tests of the module."""
    with virtlockd_client.running_virtlockd() as path:
        yield path


@pytest.fixture
def ground() -> Iterator[Path]:
    """A directory that virtlockd's user may enter, which pytest's own are not."""
    directory = Path(tempfile.mkdtemp(prefix="lockfs-op-"))
    uid = virtlockd_client.UNPRIVILEGED if os.getuid() == 0 else os.getuid()
    directory.chmod(0o755)
    for name in ("store", "locks"):
        (directory / name).mkdir()
        os.chown(directory / name, uid, uid)
    opponents.make_images(directory / "store", uid)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
async def field(ground: Path) -> AsyncIterator[Field]:
    """A lockfs host without a lock directory."""
    maker = FcntlMaker(ground, [FcntlOptions()])
    async with maker.hosts(1) as (host,):
        yield Field(maker.store, maker.lock_dir, host)


@pytest.fixture
def same_user(ground: Path) -> Iterator[None]:
    """Make lockfs run as virtlockd's user, whose lock files (mode 0600) nobody else may open."""
    root = os.geteuid() == 0
    if root:
        os.setegid(virtlockd_client.UNPRIVILEGED)
        os.seteuid(virtlockd_client.UNPRIVILEGED)
    yield
    if root:
        os.seteuid(0)
        os.setegid(0)


@pytest.fixture
async def indirect_field(ground: Path, same_user: None) -> AsyncIterator[Field]:
    """A lockfs host with a lock directory."""
    maker = FcntlMaker(ground, [FcntlOptions(lock_dir="locks")])
    async with maker.hosts(1) as (host,):
        yield Field(maker.store, maker.lock_dir, host)
