"""Fixtures for real hypervisors on lockfs mounts.

With LOCKFS_TEST_BARE=1 the mounts are bind mounts of the store without lockfs: then the rigs themselves
are under test, and what only lockfs can do is skipped.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.opponents.watch import Watch
from tests.support import backports, libvirt, mounts, qemu

BARE = os.environ.get("LOCKFS_TEST_BARE") == "1"
_TOOL_S = 20.0


@dataclass
class Pair:
    """A store and two mounts of it that play two hosts, hostA and hostB."""

    store: Path
    a: Path
    b: Path
    running: mounts.TwoMounts | None = None

    def log(self, mount: Path, *words: str) -> str:
        """What the lockfs behind `mount` has logged, once that has the words; fail if it does not."""
        if self.running is None:
            return ""
        return (self.running.a if mount == self.a else self.running.b).logs(*words)


class Hosts:
    """Makes the mounts that a test asks for, at most once."""

    def __init__(self, base: Path, stack: contextlib.ExitStack) -> None:
        self._base = base
        self._stack = stack
        self.pair: Pair | None = None
        self.watch: Watch | None = None

    def __call__(self, options: str = "") -> Pair:
        if BARE:
            self.pair = self._bare()
            return self.pair
        running = self._stack.enter_context(mounts.two_mounts(self._base, options))
        self.pair = Pair(running.store, running.a.path, running.b.path, running)
        self.watch = self._stack.enter_context(Watch(running.a, running.b))
        return self.pair

    def _bare(self) -> Pair:
        store, *points = (self._base / name for name in ("store", "a", "b"))
        store.mkdir()
        for point in points:
            point.mkdir()
            subprocess.run(["mount", "--bind", str(store), str(point)], check=True, timeout=_TOOL_S)
            self._stack.callback(subprocess.run, ["umount", str(point)], check=True, timeout=_TOOL_S)
        return Pair(store, points[0], points[1])


@pytest.fixture
def two_mounts(tmp_path: Path) -> Iterator[Hosts]:
    """two_mounts(options) -> Pair. Throughout the test nobody may see both hosts hold an image."""
    with contextlib.ExitStack() as stack:
        hosts = Hosts(tmp_path, stack)
        yield hosts
        if hosts.pair is not None and hosts.pair.running is not None:
            for mount in (hosts.pair.a, hosts.pair.b):
                print(f"--- lockfs at {mount.name}:\n{hosts.pair.log(mount)}")


@pytest.fixture
def needs_lockfs() -> None:
    """For tests of what the bare directory does not do."""
    if BARE:
        pytest.skip("the bare directory does not do this (LOCKFS_TEST_BARE=1)")


@pytest.fixture
def fleet(two_mounts: object) -> Iterator[qemu.Fleet]:
    """QEMUs and helper processes of this test; they end before the mounts do."""
    ships = qemu.Fleet()
    try:
        yield ships
    finally:
        print(ships.report())
        ships.end()


@pytest.fixture(scope="session")
def _newer() -> qemu.Build | backports.Unavailable:
    return backports.backported_qemu()


@pytest.fixture
def newer(_newer: qemu.Build | backports.Unavailable) -> qemu.Build:
    """QEMU from backports."""
    if isinstance(_newer, backports.Unavailable):
        pytest.skip(_newer.reason)
    return _newer


@pytest.fixture(params=["installed", "newer"])
def build(request: pytest.FixtureRequest) -> qemu.Build:
    """The machine's own QEMU, and the one from backports."""
    found: qemu.Build = request.getfixturevalue("own" if request.param == "installed" else "newer")
    return found


@pytest.fixture
def own() -> qemu.Build:
    """The machine's own QEMU, for what does not depend on the release."""
    return _installed()


def _installed() -> qemu.Build:
    found = qemu.installed()
    if found is None:
        pytest.skip("qemu-system-x86_64 is not installed")
    return found


@pytest.fixture
def loop_devices() -> None:
    """Skip where the kernel gives no loop devices."""
    done = subprocess.run(["losetup", "-f"], capture_output=True, text=True, timeout=20, check=False)
    if done.returncode:
        pytest.skip(f"no loop devices: {done.stderr.strip()}")


@pytest.fixture(scope="session")
def libvirt_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What libvirt found out about QEMU, kept for the next host: it takes seconds."""
    return tmp_path_factory.mktemp("libvirt-cache")


@pytest.fixture
def libvirt_hosts(fleet: qemu.Fleet, libvirt_cache: Path) -> Iterator[Callable[..., libvirt.Host]]:
    """libvirt_hosts(name, images, **settings) starts a host; user=True one of an ordinary user."""
    reason = libvirt.why_not_libvirt()
    if reason:
        pytest.skip(reason)
    fleet.work.chmod(0o755)
    running: list[libvirt.Host] = []

    def start(name: str, images: Path, *, user: bool = False, **settings: Any) -> libvirt.Host:
        maker = libvirt.unprivileged if user else libvirt.privileged
        running.append(maker(fleet.work, name, images, libvirt.Settings(cache=libvirt_cache, **settings)))
        return running[-1]

    try:
        yield start
    finally:
        for host in reversed(running):
            host.end()
        for host in running:
            print(host.log())
