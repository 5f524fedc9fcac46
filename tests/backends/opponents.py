"""What must hold between lockfs' fcntl backend and parties without lockfs on one image, as functions.

Each takes a `Field`: a store with one lockfs host, and whoever else is needed. They are apart from the
tests so that the tests of broken variants can show that they notice.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from lockfs.backends.base import Lease, Mode
from lockfs.backends.virtlockd import lock_file_name
from lockfs.errors import ImageBusy

from . import bare_qemu
from .bare_qemu import Refused, guest, tool
from .conformance import EXCLUSIVE, SHARED
from .makers import LOCK_PATH, StoreHost
from .virtlockd_client import CODE_BUSY, Client, VirtlockdError

RAW, QCOW2 = "raw.img", "disk.qcow2"
FORMATS = {RAW: "raw", QCOW2: "qcow2"}
RO, UNLOCKED = ",readonly=on", ",file.locking=off"
WANTS_WRITE = 'Failed to get "write" lock'
WANTS_NO_WRITER = 'Failed to get shared "write" lock'
_FOREIGN_PID = 2**22 - 1  # virtlockd must not kill the test when its connection closes
_ATTEMPT_S = 5.0
_RACES, _RACE_S = 10, 0.2


@dataclass
class Field:
    """A store directory with images, one lockfs host on it, and perhaps a virtlockd."""

    store: Path
    lock_dir: Path
    host: StoreHost
    socket: Path | None = None

    def path(self, name: str) -> Path:
        return self.store / name

    def guest(self, name: str, drive: str = "", *more: str) -> AbstractContextManager[None]:
        """A bare QEMU on the image."""
        return guest(self.path(name), FORMATS[name], drive, *more)

    def virtlockd(self) -> Client:
        assert self.socket is not None
        return Client(self.socket, _FOREIGN_PID)

    async def take(self, name: str, mode: Mode = EXCLUSIVE) -> Lease:
        image, owner = self.host.image(name), self.host.owner
        return await self.host.backend.acquire(image, mode, owner, trio.current_time() + _ATTEMPT_S)

    async def give(self, lease: Lease) -> None:
        await self.host.backend.release(lease)

    async def takes(self, name: str, mode: Mode = EXCLUSIVE) -> None:
        """lockfs gets the image, and nobody is seen to be in the way."""
        if mode is EXCLUSIVE:
            assert await self.host.backend.holders(self.host.image(name)) == []
        await self.give(await self.take(name, mode))

    async def is_refused(self, name: str, who: str, mode: Mode = EXCLUSIVE) -> str:
        """lockfs does not get the image, and says because of whom."""
        with pytest.raises(ImageBusy, match=who) as caught:
            await self.take(name, mode)
        holders = await self.host.backend.holders(self.host.image(name))
        assert who in {holder.description for holder in holders}
        return str(caught.value)


def _refused(text: str, *command: str) -> None:
    with pytest.raises(Refused, match=text):
        tool(*command)


def _busy(client: Client, *arguments: object, **options: object) -> None:
    with pytest.raises(VirtlockdError) as caught:
        client.acquire(*arguments, **options)  # type: ignore[arg-type]
    assert caught.value.code == CODE_BUSY


# lockfs holds.


async def lease_stops_virtlockd(field: Field) -> None:
    """virtlockd gets neither an exclusive nor a shared lock beside a lease, and both after it."""
    with field.virtlockd() as client:
        lease = await field.take(RAW)
        _busy(client, str(field.path(RAW)))
        _busy(client, str(field.path(RAW)), shared=True)
        await field.give(lease)
        for shared in (False, True):
            client.acquire(str(field.path(RAW)), shared=shared)
            client.release(str(field.path(RAW)))


async def shared_lease_stops_only_exclusive_virtlockd(field: Field) -> None:
    """Beside a SHARED lease virtlockd gets shared locks only."""
    with field.virtlockd() as client:
        lease = await field.take(RAW, SHARED)
        _busy(client, str(field.path(RAW)))
        client.acquire(str(field.path(RAW)), shared=True)
        client.release(str(field.path(RAW)))
        await field.give(lease)


def _indirect(field: Field, client: Client, name: str) -> tuple[str, str]:
    client.create_lockspace(field.lock_dir)
    return lock_file_name(LOCK_PATH.encode(), name.encode()).decode(), str(field.lock_dir)


async def lease_stops_indirect_virtlockd(field: Field) -> None:
    """With lock_dir, an indirect virtlockd gets nothing beside a lease, and the lock file goes with it."""
    with field.virtlockd() as client:
        target = _indirect(field, client, RAW)
        for mode in Mode:
            lease = await field.take(RAW, mode)
            _busy(client, *target)
            assert os.listdir(field.lock_dir) == [target[0]]
            await field.give(lease)
            assert os.listdir(field.lock_dir) == []
            client.acquire(*target)
            client.release(*target)


async def lease_stops_writing_guests(field: Field) -> None:
    """A bare QEMU that writes is refused beside a lease of either mode, with the message users know."""
    for name in FORMATS:
        for mode in Mode:
            lease = await field.take(name, mode)
            with pytest.raises(Refused, match=WANTS_WRITE), field.guest(name):
                pass
            await field.give(lease)
        with field.guest(name):
            pass


async def lease_stops_reading_guests(field: Field) -> None:
    """A bare QEMU with a read-only disk, which wants nobody to write, is refused beside EXCLUSIVE only."""
    for name in FORMATS:
        lease = await field.take(name)
        with pytest.raises(Refused, match=WANTS_NO_WRITER), field.guest(name, RO):
            pass
        await field.give(lease)
        lease = await field.take(name, SHARED)
        with field.guest(name, RO):
            pass
        await field.give(lease)


async def lease_lets_others_by(field: Field) -> None:
    """A QEMU told not to lock, and one that waits for a migration, start beside a lease."""
    lease = await field.take(QCOW2)
    with field.guest(QCOW2, UNLOCKED):
        pass
    with field.guest(QCOW2, "", "-incoming", "defer"):
        pass
    await field.give(lease)


async def lease_stops_tools(field: Field) -> None:
    """qemu-img and qemu-io that write or want a still image are refused; -U, info and overlays work."""
    raw, qcow2 = str(field.path(RAW)), str(field.path(QCOW2))
    copy = str(field.path("copy.img"))
    leases = [await field.take(RAW), await field.take(QCOW2)]
    for form, path in (("raw", raw), ("qcow2", qcow2)):
        _refused(WANTS_WRITE, "qemu-io", "-f", form, "-c", "write 0 512", path)
        _refused(WANTS_WRITE, "qemu-img", "resize", "-f", form, path, "8M")
        _refused(WANTS_NO_WRITER, "qemu-img", "convert", "-f", form, "-O", "raw", path, copy)
        tool("qemu-img", "convert", "-U", "-f", form, "-O", "raw", path, copy)
        tool("qemu-img", "info", "-U", path)
    tool("qemu-img", "info", "-f", "raw", raw)
    tool("qemu-io", "-r", "-f", "raw", "-c", "read 0 512", raw)
    _refused(WANTS_NO_WRITER, "qemu-img", "info", qcow2)
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-b", qcow2, "-F", "qcow2", str(field.path("over.qcow2")))
    for lease in leases:
        await field.give(lease)
    tool("qemu-img", "resize", "-q", "-f", "qcow2", qcow2, "8M")


# The others hold.


async def virtlockd_stops_leases(field: Field) -> None:
    """virtlockd's exclusive lock refuses both modes and its process is named; beside a shared one is room."""
    path = str(field.path(RAW))
    with field.virtlockd() as client:
        client.acquire(path)
        sentence = await field.is_refused(RAW, "virtlockd")
        assert "virtlockd (pid " in sentence
        await field.is_refused(RAW, "virtlockd", SHARED)
        client.release(path)
        client.acquire(path, shared=True)
        await field.is_refused(RAW, "virtlockd")
        await field.takes(RAW, SHARED)
        client.release(path)
    await field.takes(RAW)


async def indirect_virtlockd_stops_leases(field: Field) -> None:
    """virtlockd's lock file refuses a lease where lock_dir is set; a left-over, unlocked file does not."""
    with field.virtlockd() as client:
        target = _indirect(field, client, RAW)
        client.acquire(*target)
        await field.is_refused(RAW, "virtlockd")
        await field.is_refused(RAW, "virtlockd", SHARED)
        client.release(*target)
        client.acquire(*target, shared=True)
        await field.is_refused(RAW, "virtlockd")
        await field.takes(RAW, SHARED)
        client.release(*target)
    (field.lock_dir / target[0]).touch()
    await field.takes(RAW)
    assert os.listdir(field.lock_dir) == []


async def writing_guests_stop_leases(field: Field) -> None:
    """A bare QEMU with a writable disk refuses both modes, and its end frees the image at once."""
    for name in FORMATS:
        with field.guest(name):
            await field.is_refused(name, "QEMU without lockfs")
            await field.is_refused(name, "QEMU without lockfs", SHARED)
        await field.takes(name)


async def reading_guests_stop_exclusive_leases(field: Field) -> None:
    """A bare QEMU with a read-only disk refuses EXCLUSIVE, and goes with SHARED."""
    for name in FORMATS:
        with field.guest(name, RO):
            await field.is_refused(name, "QEMU without lockfs")
            await field.takes(name, SHARED)
        await field.takes(name)


async def unlocked_guests_are_not_seen(field: Field) -> None:
    """A QEMU told not to lock, or waiting for a migration, cannot be noticed."""
    with field.guest(RAW, UNLOCKED):
        await field.takes(RAW)
    with field.guest(QCOW2, "", "-incoming", "defer"):
        await field.takes(QCOW2)


async def racing_guests_never_both_win(field: Field) -> None:
    """Of a bare QEMU that starts and a lease that is tried meanwhile at most one gets the image."""
    leases: list[Lease] = []

    def start(stopped: threading.Event) -> bool:
        try:
            with field.guest(RAW):
                stopped.wait(_ATTEMPT_S)
                return not leases
        except Refused:
            return True

    async def try_later(delay: float, stopped: threading.Event) -> None:
        end = trio.current_time() + _RACE_S
        await trio.sleep(delay)
        while not leases and trio.current_time() < end:
            with contextlib.suppress(ImageBusy):
                leases.append(await field.take(RAW))
        await trio.sleep_until(end)
        stopped.set()

    for turn in range(_RACES):
        stopped = threading.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(try_later, turn * _RACE_S / 2 / _RACES, stopped)
            assert await trio.to_thread.run_sync(start, stopped)
        for lease in leases:
            await field.give(lease)
        leases.clear()


Check = Callable[[Field], Awaitable[None]]

WITH_VIRTLOCKD: tuple[Check, ...] = (
    lease_stops_virtlockd,
    shared_lease_stops_only_exclusive_virtlockd,
    virtlockd_stops_leases,
)
WITH_INDIRECT_VIRTLOCKD: tuple[Check, ...] = (lease_stops_indirect_virtlockd, indirect_virtlockd_stops_leases)
WITH_QEMU: tuple[Check, ...] = (
    lease_stops_writing_guests,
    lease_stops_reading_guests,
    lease_lets_others_by,
    lease_stops_tools,
    writing_guests_stop_leases,
    reading_guests_stop_exclusive_leases,
    unlocked_guests_are_not_seen,
    racing_guests_never_both_win,
)


def make_images(store: Path, uid: int) -> None:
    """The images of a Field, which user `uid` may open too."""
    for name, form in FORMATS.items():
        os.chown(bare_qemu.make(store / name, form), uid, uid)
