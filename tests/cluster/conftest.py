"""Fixtures for guests. What they need is looked for once; without it the tests are skipped, with the reason.

The tests marked `cluster` run only with LOCKFS_CLUSTER=1 (scripts/test --cluster sets it); those that are
not, one of each kind, run always.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster import root
from tests.cluster.guests import Cluster
from tests.cluster.rigs import NfsServer, SharedDisk, virtiofsd
from tests.support import backports, qemu

ALL = os.environ.get("LOCKFS_CLUSTER") == "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is for `scripts/test --cluster` only."""
    if ALL:
        return
    left_out = [item for item in items if item.get_closest_marker("cluster")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def _why_not() -> str | None:
    if os.geteuid() != 0:
        return "the guests' root is made by root"
    if qemu.installed() is None:
        return "qemu-system-x86_64 is not installed"
    if missing := root.missing():
        return f"not installed: {', '.join(missing)}"
    if virtiofsd() is None:
        return "virtiofsd is not installed"
    return None


@pytest.fixture(scope="session")
def guest_root(tmp_path_factory: pytest.TempPathFactory) -> root.Root:
    """What the guests boot."""
    if reason := _why_not():
        pytest.skip(reason)
    kernel = backports.backported_kernel()
    if isinstance(kernel, backports.Unavailable):
        pytest.skip(kernel.reason)
    return root.build(kernel, tmp_path_factory.mktemp("guest"))


@pytest.fixture
def cluster(guest_root: root.Root) -> Iterator[Cluster]:
    """Where guests are started; all have ended when the test has."""
    build = qemu.installed()
    assert build is not None
    machines = Cluster(build, guest_root, qemu.Fleet(Path(tempfile.mkdtemp(prefix="lockfs-cluster-"))))
    try:
        yield machines
        for guest in machines.guests:
            print(guest.report())
        print(machines.fleet.report())
    finally:
        machines.end()
        machines.fleet.end()


@pytest.fixture
def shared_disk(cluster: Cluster) -> Iterator[SharedDisk]:
    """A disk with paxos leases beside a store."""
    rig = SharedDisk(cluster)
    try:
        yield rig
    finally:
        rig.end()


@pytest.fixture
def nfs(cluster: Cluster) -> NfsServer:
    """An NFS server in a guest of its own."""
    return NfsServer(cluster)


@pytest.fixture
def figures(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """figures(name=value, …): what was measured; printed, and kept with the test's result.

    With LOCKFS_CLUSTER_FIGURES=FILE also appended there.
    """

    def note(**values: object) -> None:
        line = ", ".join(f"{name} {value}" for name, value in values.items())
        print(f"figures: {line}")
        for name, value in values.items():
            record_property(name, value)
        if place := os.environ.get("LOCKFS_CLUSTER_FIGURES"):
            test = os.environ.get("PYTEST_CURRENT_TEST", "").split("::")[-1].split(" ")[0]
            with contextlib.suppress(OSError), open(Path(place), "a") as file:
                file.write(f"{test}: {line}\n")

    return note
