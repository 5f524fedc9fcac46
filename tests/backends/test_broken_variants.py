"""The tests notice a backend that is broken in the ways that matter: each variant here must fail one."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path

import pytest
from _pytest.outcomes import Failed

from lockfs.backends import image_locks
from lockfs.backends.fcntl import FcntlOptions
from lockfs.backends.virtlockd import LockDirectory
from lockfs.errors import ImageBusy
from lockfs.linux import ofd

from . import conformance, opponents
from .conformance import Check
from .makers import FcntlMaker
from .opponents import Field
from .rig import needs_qemu, needs_virtlockd
from .test_fcntl import lease_outlives_other_descriptors
from .test_virtlockd_files import lock_on_a_removed_file_is_not_kept

NOTICED = (AssertionError, Failed)
Break = Callable[[pytest.MonkeyPatch], None]


def no_probe(patch: pytest.MonkeyPatch) -> None:
    """Lock QEMU's bytes without looking at their mirror bytes."""
    patch.setattr(image_locks, "qemu_in_the_way", lambda fd, mode: False)


def no_locks_for_qemu(patch: pytest.MonkeyPatch) -> None:
    """Look at QEMU's bytes without locking any."""
    patch.setattr(image_locks, "_EXCLUSIVE_LOCKS", ())
    patch.setattr(image_locks, "_SHARED_LOCKS", ())


def another_byte_than_virtlockd(patch: pytest.MonkeyPatch) -> None:
    """Lock byte 2 in place of byte 0."""
    patch.setattr(image_locks, "VIRTLOCKD_BYTE", 2)


def posix_locks(patch: pytest.MonkeyPatch) -> None:
    """Use the process's locks in place of the description's."""
    patch.setattr(ofd, "F_OFD_SETLK", fcntl.F_SETLK)
    patch.setattr(ofd, "F_OFD_GETLK", fcntl.F_GETLK)


def read_locked_own_byte(patch: pytest.MonkeyPatch) -> None:
    """Lock our own byte, and virtlockd's, for reading only."""
    patch.setattr(ofd, "WRITE", ofd.READ)


def no_unlock(patch: pytest.MonkeyPatch) -> None:
    """Leave the locks to the closing of the descriptor."""
    patch.setattr(image_locks, "drop", lambda fd: None)


def no_narrowing(patch: pytest.MonkeyPatch) -> None:
    """Keep the exclusive locks when the mode becomes SHARED."""
    patch.setattr(image_locks, "narrow", lambda fd, parties: None)


def no_inode_recheck(patch: pytest.MonkeyPatch) -> None:
    """Believe in the first lock file that could be locked."""
    patch.setattr(LockDirectory, "_still_named", lambda self, name, fd: True)


_CONFORMANCE: list[tuple[Break, Check]] = [
    (posix_locks, conformance.shares_only_shared),
    (read_locked_own_byte, conformance.racers_never_both_win),
    (no_unlock, conformance.frees_at_once),
    (no_narrowing, conformance.conversion_is_seen),
]


@pytest.mark.parametrize(("broken", "check"), _CONFORMANCE)
async def test_conformance_notices(
    broken: Break, check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The conformance suite fails for this variant."""
    monkeypatch.setattr("lockfs.backends.fcntl.check_store", lambda store_fd: None)
    broken(monkeypatch)
    with pytest.raises((*NOTICED, ImageBusy)):
        await check(FcntlMaker(tmp_path, [FcntlOptions()]))


async def test_closed_descriptor_notices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """POSIX locks fail the test that closes another descriptor of the image."""
    monkeypatch.setattr("lockfs.backends.fcntl.check_store", lambda store_fd: None)
    posix_locks(monkeypatch)
    async with FcntlMaker(tmp_path, [FcntlOptions()]).hosts(2) as hosts:
        with pytest.raises(NOTICED):
            await lease_outlives_other_descriptors(hosts)


def test_lock_file_notices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the inode's recheck the test with a rival that leaves in between fails."""
    no_inode_recheck(monkeypatch)
    directory = LockDirectory(str(tmp_path), "/vm")
    with pytest.raises((*NOTICED, ValueError)):
        lock_on_a_removed_file_is_not_kept(directory, tmp_path, monkeypatch)
    directory.close()


_WITH_QEMU: list[tuple[Break, opponents.Check]] = [
    (no_probe, opponents.writing_guests_stop_leases),
    (no_probe, opponents.reading_guests_stop_exclusive_leases),
    (no_locks_for_qemu, opponents.lease_stops_writing_guests),
    (no_locks_for_qemu, opponents.lease_stops_reading_guests),
]


@needs_qemu
@pytest.mark.parametrize(("broken", "check"), _WITH_QEMU)
async def test_qemu_notices(
    broken: Break, check: opponents.Check, field: Field, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests with a real QEMU fail for this variant."""
    broken(monkeypatch)
    with pytest.raises(NOTICED):
        await check(field)


@needs_virtlockd
@pytest.mark.parametrize("check", [opponents.lease_stops_virtlockd, opponents.virtlockd_stops_leases])
async def test_virtlockd_notices(
    check: opponents.Check, field: Field, virtlockd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests with a real virtlockd fail for a backend that leaves byte 0 alone."""
    another_byte_than_virtlockd(monkeypatch)
    field.socket = virtlockd
    with pytest.raises(NOTICED):
        await check(field)
