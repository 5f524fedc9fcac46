"""Hosts that share an NFS export with file locks: the server or a host dies, freezes or is cut off.

The locks are the server's, and it decides when a silent host has lost them. What that host writes then it
refuses if it was begun through a description with a lock of its own, as every write through lockfs is
(decision 23). A kernel that serves data in passthrough opens the file once more, without a lock: there A
writes until lockfs has asked about its locks (docs/fencing.md). How much that is, is measured; that it ends
is what these tests check.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import pytest

from tests.cluster.guests import Guest
from tests.cluster.rigs import NfsServer
from tests.cluster.scenes import PATIENCE_S, SETTLED, Figures, Scene, nothing_stale
from tests.cluster.witness import Term
from tests.support.qemu import eventually

pytestmark = pytest.mark.slow
_more = pytest.mark.cluster
_LOCKS_LOOKED_AT_S = 10.0
"""In so long a host surely asks whether it has its locks, which it does every 5 seconds at least."""

FAULTS: dict[str, tuple[Callable[[Guest], None], Callable[[Guest], None]]] = {
    "frozen": (partial(Guest.freeze, clocks=False), partial(Guest.thaw, clocks=False)),
    "frozen-with-clocks": (partial(Guest.freeze, clocks=True), partial(Guest.thaw, clocks=True)),
    "cut-off": (partial(Guest.link, up=False), partial(Guest.link, up=True)),
}
"""What happens to A, and how it ends."""


def _scene(nfs: NfsServer, io: str = "auto", *, asked: bool = True) -> Scene:
    return Scene(nfs, partial(nfs.host, options=f"io={io}"), asked=asked)


def _came_back(scene: Scene, figures: Figures, after: float) -> Term:
    """A is there again, `after` is how long B waited: note what it did with its old handle."""
    scene.aftermath()
    term = scene.judge()
    figures(takeover_s=round(after, 1), records=term.landed, stale=len(term.stale))
    return term


def test_the_server_restarts(nfs: NfsServer, figures: Figures) -> None:
    """A server without power comes back: A goes on without an error and keeps its image, then B has it."""
    scene = _scene(nfs)
    nfs.cut_power()
    cut_at = time.monotonic()
    nfs.start()
    back_at = time.monotonic()
    scene.first.wait_acknowledged(SETTLED, PATIENCE_S)
    goes_on_at = time.monotonic()
    time.sleep(_LOCKS_LOOKED_AT_S)
    scene.first.wait_acknowledged(SETTLED, PATIENCE_S)
    assert scene.second.status()["state"] == "waiting", "B has the image of a host that writes"
    ended = scene.first.end()
    assert not ended["errors"]
    scene.taken_over(time.monotonic())
    term = scene.judge()
    nothing_stale(term)
    assert term.landed == ended["number"]
    figures(server_away_s=round(back_at - cut_at, 1), a_goes_on_after_s=round(goes_on_at - back_at, 1))


@_more
@pytest.mark.parametrize("io", ["guarded", "passthrough"])
def test_power_is_cut_mid_write(nfs: NfsServer, figures: Figures, io: str) -> None:
    """What A was told is written is there, and B has the image once the server has given A up."""
    scene = _scene(nfs, io)
    acknowledged = scene.first.acknowledged()
    scene.a.cut_power()
    after = scene.taken_over(time.monotonic())
    term = scene.judge()
    nothing_stale(term)
    assert term.landed >= acknowledged
    figures(takeover_s=round(after, 1), records=term.landed)


@_more
@pytest.mark.parametrize("io", ["guarded", "passthrough"])
@pytest.mark.parametrize("asked", [True, False], ids=["asked-before", "not-asked-before"])
@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_host_that_comes_back_stops(
    nfs: NfsServer, figures: Figures, fault: str, asked: bool, io: str
) -> None:
    """Guarded, nothing that A writes lands once B has the image, whatever its clocks say; else that is
    measured.

    If nobody asked before, the server had delegated the image to A, whose kernel answers for the locks.
    """
    begin, end = FAULTS[fault]
    scene = _scene(nfs, io, asked=asked)
    begin(scene.a)
    gone_at = time.monotonic()
    if not asked:
        scene.ask()
    after = scene.taken_over(gone_at)
    end(scene.a)
    term = _came_back(scene, figures, after)
    if io == "guarded":
        nothing_stale(term)


@_more
def test_a_server_that_has_forgotten_its_clients(nfs: NfsServer, figures: Figures) -> None:
    """Nobody may reclaim: B gets the image, and A stops."""
    scene = _scene(nfs)
    nfs.cut_power()
    nfs.start(forget=True)
    back_at = time.monotonic()
    eventually(
        lambda: scene.first.failing() or scene.second.status()["state"] == "writing",
        "A has lost its image, or B has it", PATIENCE_S, 0.1,
    )  # fmt: skip
    nothing_stale(_came_back(scene, figures, scene.taken_over(back_at)))
