"""Hosts that share a disk with paxos leases: one dies, freezes or is cut off, and the other takes over.

What is promised is judged by what lies on the storage (witness.py). A takeover is measured from the last
renewal of the host that is gone, which stands on the disk: not sooner than the rules of docs/paxos.md allow.
"""

from __future__ import annotations

import time
from functools import partial

import pytest

from tests.cluster.rigs import DEAD, STOPS, SharedDisk
from tests.cluster.scenes import PATIENCE_S, Figures, Scene, nothing_stale
from tests.support.qemu import eventually

pytestmark = pytest.mark.slow
_more = pytest.mark.cluster
_WATCHED_S = 20.0
"""For how long the writes of a host that should not write are counted: several renewals."""


def _scene(disk: SharedDisk, io: str, *, detour: bool = False, watchdog: bool = False) -> Scene:
    return Scene(disk, partial(disk.host, options=f"io={io}", detour=detour, watchdog=watchdog))


def _taken_over(scene: Scene, disk: SharedDisk, gone_at: float) -> dict[str, float]:
    """Wait for B, and check that it was not early; returns figures, in seconds."""
    after = scene.taken_over(gone_at)
    renewed_before = scene.a.boot_at(gone_at) - disk.renewal("A")
    assert after + renewed_before >= DEAD, "B took over before A counts as dead"
    return {"takeover_s": round(after, 1), "after_last_renewal_s": round(after + renewed_before, 1)}


@pytest.mark.parametrize(
    "io", ["guarded", pytest.param("daemon", marks=_more), pytest.param("passthrough", marks=_more)]
)
def test_power_is_cut_mid_write(shared_disk: SharedDisk, figures: Figures, io: str) -> None:
    """What A was told is written is there, and B has the image once A's lease has run out."""
    scene = _scene(shared_disk, io)
    acknowledged = scene.first.acknowledged()
    scene.a.cut_power()
    measured = _taken_over(scene, shared_disk, time.monotonic())
    term = scene.judge()
    nothing_stale(term)
    assert term.landed >= acknowledged
    figures(**measured, records=term.landed)


@pytest.mark.parametrize("io", ["guarded", pytest.param("daemon", marks=_more)])
def test_a_host_that_was_frozen_writes_no_more(shared_disk: SharedDisk, figures: Figures, io: str) -> None:
    """A sees from its clock that its time was over; no write starts after it runs again."""
    scene = _scene(shared_disk, io)
    scene.a.freeze(clocks=False)
    measured = _taken_over(scene, shared_disk, time.monotonic())
    scene.a.thaw(clocks=False)
    scene.aftermath()
    term = scene.judge()
    figures(**measured, records=term.landed, stale=len(term.stale))
    nothing_stale(term, under_way=True)


@_more
def test_a_frozen_host_in_passthrough_is_revoked(shared_disk: SharedDisk, figures: Figures) -> None:
    """Not covered (docs/fencing.md): guests write until lockfs has run again. They do not go on."""
    scene = _scene(shared_disk, "passthrough")
    scene.a.freeze(clocks=False)
    measured = _taken_over(scene, shared_disk, time.monotonic())
    scene.a.thaw(clocks=False)
    scene.aftermath()
    figures(**measured, stale=len(scene.judge().stale))


@_more
@pytest.mark.parametrize("io", ["guarded", "passthrough"])
def test_a_host_that_was_frozen_with_its_clocks_stops(
    shared_disk: SharedDisk, figures: Figures, io: str
) -> None:
    """A's own clocks do not tell that time has passed; the hardware's does at its next write (decision 18).
    How much is written in passthrough is measured.
    """
    scene = _scene(shared_disk, io)
    scene.a.freeze(clocks=True)
    measured = _taken_over(scene, shared_disk, time.monotonic())
    scene.a.thaw(clocks=True)
    time.sleep(_WATCHED_S)
    still = not scene.first.failing()
    term = scene.judge()
    figures(**measured, stale=len(term.stale), watched_s=_WATCHED_S, still_writing=still)
    assert not still, "A writes on although B has had its image"
    if io == "guarded":
        nothing_stale(term, under_way=True)


@pytest.mark.parametrize(
    ("io", "store"),
    [
        ("guarded", False),
        pytest.param("guarded", True, marks=_more),
        pytest.param("daemon", False, marks=_more),
        pytest.param("passthrough", False, marks=_more),
    ],
)
def test_a_host_that_is_cut_off_stops_in_time(
    shared_disk: SharedDisk, figures: Figures, io: str, store: bool
) -> None:
    """A's leases hang, with `store` its images too: no write starts after its time, nor when all is back."""
    scene = _scene(shared_disk, io, detour=True)
    shared_disk.cut_off("A", store=store)
    cut_at = time.monotonic()
    measured = _taken_over(scene, shared_disk, cut_at)
    renewed = shared_disk.renewal("A")
    if not store:
        assert scene.first.failing(), "A writes although B has the image"
        last = scene.first.status()["acknowledged_at"]
        # Only whole seconds of the renewal stand on the disk.
        assert last - renewed < STOPS + 1, "A wrote after its time"
        measured["stopped_after_last_renewal_s"] = round(last - renewed, 1)
    shared_disk.reconnect("A")
    scene.aftermath()
    term = scene.judge()
    figures(**measured, records=term.landed, stale=len(term.stale))
    nothing_stale(term, under_way=store)


@_more
@pytest.mark.parametrize("io", ["guarded", "passthrough"])
def test_a_watchdog_resets_a_host_whose_last_write_hangs(
    shared_disk: SharedDisk, figures: Figures, io: str
) -> None:
    """A is cut off from leases and images in the middle of a write: it is reset before B has the image."""
    scene = _scene(shared_disk, io, detour=True, watchdog=True)
    renewed_before = scene.a.boot_at(time.monotonic()) - shared_disk.renewal("A")
    shared_disk.cut_off("A", store=True)
    cut_at = time.monotonic()
    eventually(scene.a.was_reset, "the watchdog resets A", DEAD + 5, 0.1)
    reset_after = time.monotonic() - cut_at
    assert scene.second.status()["state"] == "waiting", "B had the image before A was reset"
    scene.a.cut_power()
    measured = _taken_over(scene, shared_disk, cut_at)
    shared_disk.forget("A")
    shared_disk.reconnect("A")
    term = scene.judge()
    figures(
        **measured,
        reset_s=round(reset_after, 1),
        reset_after_last_renewal_s=round(reset_after + renewed_before, 1),
        records=term.landed,
        stale=len(term.stale),
    )
    nothing_stale(term)


@_more
def test_a_watchdog_resets_a_host_that_was_frozen(shared_disk: SharedDisk, figures: Figures) -> None:
    """In passthrough nothing holds its writes back; its watchdog's time is over when it runs again."""
    scene = _scene(shared_disk, "passthrough", watchdog=True)
    scene.a.freeze(clocks=False)
    measured = _taken_over(scene, shared_disk, time.monotonic())
    scene.a.thaw(clocks=False)
    eventually(scene.a.was_reset, "the watchdog resets A", PATIENCE_S, 0.1)
    term = scene.judge()
    figures(**measured, records=term.landed, stale=len(term.stale))
    nothing_stale(term, under_way=True)
