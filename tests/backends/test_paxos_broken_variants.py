"""The tests of the paxos backend notice one that is broken in a way that matters: each variant fails one."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import trio
from _pytest.outcomes import Failed

from lockfs.backends.base import Image
from lockfs.backends.paxos import membership
from lockfs.backends.paxos.backend import PaxosBackend
from lockfs.backends.paxos.files import FileLayout
from lockfs.backends.paxos.membership import Epoch
from lockfs.backends.paxos.options import LayoutKind
from lockfs.backends.paxos.places import Place
from lockfs.backends.paxos.unsettled import Hand, Unsettled
from lockfs.errors import LockfsError
from tests.conftest import ExpectLog

from . import test_paxos_backend, test_paxos_membership
from .lease_io import pace
from .makers import PaxosMaker
from .test_paxos_membership import Hosts

NOTICED = (AssertionError, Failed, LockfsError, trio.TooSlowError)
Break = Callable[[pytest.MonkeyPatch], None]
ANY_LOG = "lockfs"


def no_look_after_acquire(patch: pytest.MonkeyPatch) -> None:
    """Keep a lease without asking whether it still is where the next host will look."""

    async def still(self: FileLayout, place: Place, image: Image) -> bool:
        return True

    patch.setattr(FileLayout, "still", still)


def leases_outlive_the_membership(patch: pytest.MonkeyPatch) -> None:
    """Tell nobody that a membership is in doubt or lost."""
    patch.setattr(PaxosBackend, "_epoch_changed", lambda self, epoch: None)


def always_in_time(patch: pytest.MonkeyPatch) -> None:
    """Let writes be started whatever the clock says."""
    patch.setattr(Epoch, "in_time", lambda self: True)


def one_name_for_all_starts(patch: pytest.MonkeyPatch) -> None:
    """Join under the host's name alone."""
    patch.setattr(membership, "unique_name", lambda host: host.encode())


def cancelled_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    """Close a lease that was not had, and leave on the storage what is there."""

    async def put_back(self: Unsettled, inode: int, hand: Hand) -> None:
        await hand.place.close()

    patch.setattr(Unsettled, "put_back", put_back)


def no_turns(patch: pytest.MonkeyPatch) -> None:
    """Let several tasks work on one lease."""

    @contextlib.asynccontextmanager
    async def turn(self: Unsettled, inode: int) -> AsyncIterator[None]:
        yield

    class Forgiving(dict[int, Hand]):
        def __delitem__(self, inode: int) -> None:
            self.pop(inode, None)

    def __init__(
        self: Unsettled, still: Callable[[Place, Image], Awaitable[bool]], settled: Callable[..., None]
    ) -> None:
        made(self, still, settled)
        self._hands = Forgiving()

    made = Unsettled.__init__
    patch.setattr(Unsettled, "__init__", __init__)
    patch.setattr(Unsettled, "turn", turn)


_BACKEND: list[tuple[Break, Callable[[PaxosMaker], Awaitable[None]]]] = [
    (no_look_after_acquire, test_paxos_backend.removed_is_not_held),
    (leases_outlive_the_membership, test_paxos_backend.loss_ends_leases),
    (always_in_time, test_paxos_backend.loss_ends_leases),
    (cancelled_is_forgotten, test_paxos_backend.cancelled_takes_nothing),
    (no_turns, test_paxos_backend.settling_frees_no_lease),
    (no_turns, test_paxos_backend.collect_and_acquire_are_apart),
]


@pytest.mark.parametrize(("broken", "check"), _BACKEND)
async def test_the_backends_tests_notice(
    broken: Break,
    check: Callable[[PaxosMaker], Awaitable[None]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    expect_log: ExpectLog,
) -> None:
    """The scenario fails for this variant."""
    expect_log(ANY_LOG, None)
    broken(monkeypatch)
    with pytest.raises(NOTICED):
        await check(PaxosMaker(tmp_path, LayoutKind.FILES))


_MEMBERSHIP: list[tuple[Break, Callable[[Hosts], Awaitable[None]]]] = [
    (always_in_time, test_paxos_membership.in_time_ends_by_itself),
    (one_name_for_all_starts, test_paxos_membership.two_starts_with_one_id),
]


@pytest.mark.parametrize(("broken", "check"), _MEMBERSHIP)
async def test_the_memberships_tests_notice(
    broken: Break,
    check: Callable[[Hosts], Awaitable[None]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    expect_log: ExpectLog,
) -> None:
    """The scenario fails for this variant."""
    expect_log(ANY_LOG, None)
    broken(monkeypatch)
    async with trio.open_nursery() as nursery:
        hosts = Hosts(tmp_path, nursery)
        nursery.start_soon(pace, lambda: [host.io for host in hosts.made])
        with pytest.raises(NOTICED):
            await check(hosts)
        for host in hosts.made:
            await host.end()
        nursery.cancel_scope.cancel()
