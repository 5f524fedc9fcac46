"""The rigs themselves: a check that cannot fail checks nothing."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tests.opponents.watch import Watch
from tests.support import guest, mounts
from tests.support.qemu import Build, Fleet, disk, eventually


@pytest.fixture
def written(two_mounts, fleet: Fleet, own: Build) -> tuple[Path, int]:
    """An image on which a guest has written, and the last number acknowledged to it."""
    pair = two_mounts("")
    image = guest.make_image(pair.store / "i.img", "raw")
    machine = fleet.start(own, disk("drive", "raw", image))
    machine.wait_written(100)
    acknowledged = machine.halt()
    machine.quit()
    return image, acknowledged


def _sector(number: int) -> int:
    return (guest.FIRST + number % guest.SLOTS * guest.STRIDE) * guest.SECTOR


def _put(image: Path, number: int, data: bytes) -> None:
    with open(image, "r+b") as file:
        file.seek(_sector(number))
        file.write(data)


def test_guest_record(written: tuple[Path, int]) -> None:
    """The check accepts what a guest wrote, and finds one lost, one stale, one torn and one failed write."""
    image, acknowledged = written
    record = guest.read_record(image, "raw")
    guest.check(record, acknowledged)
    for wrong in (record.last + 1, record.last - 2):
        with pytest.raises(AssertionError, match="was told"):
            guest.check(record, wrong)
    victim = record.last - 20
    with open(image, "rb") as file:
        file.seek(_sector(victim))
        good = file.read(guest.SECTOR)
    stale = struct.pack("<II", victim - 5, 0) * 64
    for bad, message in (
        (bytes(guest.SECTOR), "must hold"), (stale, "must hold"), (good[:256] + stale[256:], "torn"),
        (struct.pack("<II", victim, 1) * 64, "counted 1 errors"),
    ):  # fmt: skip
        _put(image, victim, bad)
        with pytest.raises(AssertionError, match=message):
            guest.check(guest.read_record(image, "raw"), acknowledged)
    _put(image, victim, good)
    guest.check(guest.read_record(image, "raw"), acknowledged)


@pytest.mark.usefixtures("needs_lockfs")
def test_watch_sees_two_writers(tmp_path: Path) -> None:
    """The watcher notices when both hosts hold an image: without leases (backend=nop) that is so."""
    with mounts.two_mounts(tmp_path, "backend=nop") as pair:
        (pair.store / "i.img").write_bytes(bytes(4096))
        watch = Watch(pair.a, pair.b)
        with (
            pytest.raises(AssertionError, match="both hosts held"),
            watch,
            open(pair.a.path / "i.img", "r+b"),
            open(pair.b.path / "i.img", "r+b"),
        ):
            eventually(lambda: watch.overlaps, "the watcher notices", timeout=10)
    assert watch.rounds
