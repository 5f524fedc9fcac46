"""What the fcntl backend does beyond the conformance suite: its bytes, descriptors and failures."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path

import pytest
import trio

from lockfs.backends import image_locks
from lockfs.backends.base import Lease, LeaseState, Mode, Owner
from lockfs.backends.fcntl import FcntlBackend, FcntlOptions
from lockfs.backends.image_locks import OWN_BYTE
from lockfs.errors import BackendError, ImageBusy, SetupError
from lockfs.linux import ofd, proc

from .conformance import EXCLUSIVE, IMAGE, SHARED
from .makers import FcntlMaker, StoreHost

ALL = FcntlOptions(lock_dir="locks")
ATTEMPT_S = 5.0


@pytest.fixture
async def hosts(tmp_path: Path) -> AsyncIterator[list[StoreHost]]:
    """Three hosts with every kind of lock turned on."""
    async with FcntlMaker(tmp_path, [ALL]).hosts(3) as made:
        yield made


async def acquire(host: StoreHost, mode: Mode = EXCLUSIVE) -> Lease:
    return await host.backend.acquire(host.image(IMAGE), mode, host.owner, trio.current_time() + ATTEMPT_S)


def die(host: StoreHost) -> None:
    """Close what the death of the host's process closes, and release nothing."""
    for lease in host.backend._leases.values():  # type: ignore[attr-defined]
        os.close(lease.lock_file.descriptor)
    host.close()


def locked(host: StoreHost) -> list[tuple[int, int]]:
    """Every range that anybody has locked on the image."""
    image = os.fstat(host.image(IMAGE).descriptor)
    return sorted(proc.locked_bytes(image.st_dev, image.st_ino))


_QEMU_EXCLUSIVE, _QEMU_SHARED = [(100, 101), (103, 103), (201, 201), (203, 203)], [(100, 100), (201, 201)]


@pytest.mark.parametrize("virtlockd", [True, False])
@pytest.mark.parametrize("qemu", [True, False])
async def test_exactly_these_bytes_are_locked(tmp_path: Path, virtlockd: bool, qemu: bool) -> None:
    """A lease locks lockfs' own byte and those of the parties turned on, through every change of mode."""
    base = ([(0, 0)] if virtlockd else []) + [(OWN_BYTE, OWN_BYTE)]
    exclusive = sorted(base + (_QEMU_EXCLUSIVE if qemu else []))
    shared = sorted(base + (_QEMU_SHARED if qemu else []))
    async with FcntlMaker(tmp_path, [FcntlOptions(virtlockd, qemu)]).hosts(1) as (host,):
        lease = await acquire(host)
        for mode, expected in ((SHARED, shared), (EXCLUSIVE, exclusive), (SHARED, shared)):
            await host.backend.convert(lease, mode, trio.current_time() + ATTEMPT_S)
            assert locked(host) == expected
        await host.backend.release(lease)
        assert locked(host) == []


async def test_byte_one_stays_free(hosts: list[StoreHost]) -> None:
    """libvirt's metadata lock, a POSIX write lock on byte 1, goes with a lease in either order."""
    path = hosts[0].store / IMAGE
    hosts[0].image(IMAGE)
    with path.open("r+b") as libvirt:
        for mode in Mode:
            lease = await acquire(hosts[0], mode)
            fcntl.lockf(libvirt, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 1)
            await hosts[0].backend.release(lease)
            lease = await acquire(hosts[0], mode)
            fcntl.lockf(libvirt, fcntl.LOCK_UN, 1, 1)
            await hosts[0].backend.release(lease)


async def lease_outlives_other_descriptors(hosts: list[StoreHost]) -> None:
    """Closing another descriptor of the image in this process leaves the lease alone."""
    lease = await acquire(hosts[0])
    os.close(os.open(hosts[0].store / IMAGE, os.O_RDWR))
    before = locked(hosts[0])
    assert (OWN_BYTE, OWN_BYTE) in before
    with pytest.raises(ImageBusy):
        await acquire(hosts[1])
    await hosts[0].backend.release(lease)


async def test_lease_outlives_other_descriptors(hosts: list[StoreHost]) -> None:
    """See lease_outlives_other_descriptors."""
    await lease_outlives_other_descriptors(hosts)


async def test_lease_lives_as_long_as_the_description(hosts: list[StoreHost]) -> None:
    """A duplicate of the descriptor, like the kernel's own for passthrough, keeps the image's locks."""
    await acquire(hosts[0])
    duplicate = os.dup(hosts[0].image(IMAGE).descriptor)
    before = locked(hosts[1])
    die(hosts[0])
    assert locked(hosts[1]) == before
    with pytest.raises(ImageBusy):
        await acquire(hosts[1])
    os.close(duplicate)
    assert locked(hosts[1]) == []


async def test_reading_descriptor(hosts: list[StoreHost]) -> None:
    """On a descriptor open for reading only, EXCLUSIVE is a clear error; SHARED and holders() work."""
    writer, reader = hosts[0], hosts[1]
    lease = await acquire(writer)
    reader.flags = os.O_RDONLY
    with pytest.raises(BackendError, match="only be opened for reading"):
        await acquire(reader)
    (holder,) = await reader.backend.holders(reader.image(IMAGE))
    assert holder.owner == writer.owner
    await writer.backend.release(lease)
    lease = await acquire(reader, SHARED)
    with pytest.raises(BackendError, match="only be opened for reading"):
        await reader.backend.convert(lease, EXCLUSIVE, trio.current_time() + ATTEMPT_S)
    assert lease.mode is SHARED
    with pytest.raises(ImageBusy):
        await acquire(writer)
    await reader.backend.release(lease)


async def test_own_lease_is_nobody_else(hosts: list[StoreHost]) -> None:
    """A look through another descriptor of the same mount does not report the mount's own lease."""
    lease = await acquire(hosts[0])
    another = os.open(hosts[0].store / IMAGE, os.O_RDONLY)
    image = lease.image
    assert await hosts[0].backend.holders(type(image)(image.inode, image.path, another)) == []
    os.close(another)
    await hosts[0].backend.release(lease)


async def test_second_acquire_is_an_error_that_harms_nothing(hosts: list[StoreHost]) -> None:
    """Asking twice for one image is refused, and the first lease stays whole."""
    lease = await acquire(hosts[0])
    before = locked(hosts[0])
    with pytest.raises(BackendError, match="already"):
        await acquire(hosts[0])
    assert locked(hosts[0]) == before
    await hosts[0].backend.release(lease)
    await hosts[0].backend.release(lease)


def _fail_at(patch: pytest.MonkeyPatch, step: int, answer: Callable[[], bool]) -> list[int]:
    """Make the step-th lock call answer otherwise; returns a list that grows with each call."""
    real, calls = ofd.try_lock, list[int]()

    def sometimes(fd: int, kind: int, start: int, length: int = 1) -> bool:
        calls.append(start)
        return answer() if len(calls) == step else real(fd, kind, start, length)

    patch.setattr(ofd, "try_lock", sometimes)
    return calls


def _busy() -> bool:
    return False


def _no_locks() -> bool:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("answer", [_busy, _no_locks])
async def test_failure_at_each_step_of_acquire_takes_nothing(
    hosts: list[StoreHost], mode: Mode, answer: Callable[[], bool]
) -> None:
    """Whichever lock call is refused or fails, no byte stays locked and no descriptor open."""
    hosts[0].image(IMAGE)
    step = 0
    while True:
        step += 1
        with pytest.MonkeyPatch.context() as patch:
            calls = _fail_at(patch, step, answer)
            try:
                lease = await acquire(hosts[0], mode)
            except (ImageBusy, BackendError) as error:
                assert isinstance(error, BackendError) == (answer is _no_locks)
            else:
                assert len(calls) < step
                patch.undo()
                await hosts[0].backend.release(lease)
                break
        assert locked(hosts[0]) == []
    assert step > 4


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("answer", [_busy, _no_locks])
async def test_failure_at_each_step_of_convert_keeps_the_mode(
    hosts: list[StoreHost], mode: Mode, answer: Callable[[], bool]
) -> None:
    """Whichever lock call is refused or fails, the lease keeps its old mode and locks."""
    target = SHARED if mode is EXCLUSIVE else EXCLUSIVE
    step = 0
    changed = False
    while not changed:
        step += 1
        lease = await acquire(hosts[0], mode)
        before = locked(hosts[0])
        with pytest.MonkeyPatch.context() as patch:
            _fail_at(patch, step, answer)
            try:
                await hosts[0].backend.convert(lease, target, trio.current_time() + ATTEMPT_S)
                changed = lease.mode is target
            except (ImageBusy, BackendError):
                assert lease.state is LeaseState.HELD
                assert lease.mode is mode
                assert locked(hosts[0]) == before
        await hosts[0].backend.release(lease)
        assert locked(hosts[0]) == []
        assert step < 20
    assert step > 1


async def test_locks_that_cannot_be_had_back_make_the_lease_lost(
    hosts: list[StoreHost], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a change fails half-way and the old locks are gone, the keeper is told that the lease is lost."""
    lease = await acquire(hosts[0])
    monkeypatch.setattr(ofd, "try_lock", lambda *_: _no_locks())
    with pytest.raises(BackendError, match="lost"):
        await hosts[0].backend.convert(lease, SHARED, trio.current_time() + ATTEMPT_S)
    assert lease.state is LeaseState.LOST
    assert hosts[0].changes == [lease]
    monkeypatch.undo()
    await hosts[0].backend.release(lease)
    assert lease.state is LeaseState.RELEASED


async def test_failed_release_is_reported(hosts: list[StoreHost], monkeypatch: pytest.MonkeyPatch) -> None:
    """If the storage fails at release, the error is raised, the lock file is given back all the same."""
    lease = await acquire(hosts[0])

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(image_locks, "drop", fail)
    with pytest.raises(BackendError, match="unlocked"):
        await hosts[0].backend.release(lease)
    assert os.listdir(hosts[0].store.parent / "locks") == []
    hosts[0].close()  # as the keeper does next
    monkeypatch.undo()
    await hosts[1].backend.release(await acquire(hosts[1]))
    await hosts[0].backend.release(await acquire(hosts[0]))


async def test_failed_release_of_the_lock_file_is_reported(
    hosts: list[StoreHost], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the lock file cannot be unlinked, the error is raised, the image's own locks go all the same."""
    lease = await acquire(hosts[0])
    real = os.unlink

    def fail(path: bytes, *, dir_fd: int | None = None) -> None:
        if len(path) == 64:
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        real(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", fail)
    with pytest.raises(BackendError, match="unlocked"):
        await hosts[0].backend.release(lease)
    monkeypatch.undo()
    assert locked(hosts[0]) == []
    await hosts[1].backend.release(await acquire(hosts[1]))


async def test_record_of_the_dead_is_not_believed(hosts: list[StoreHost]) -> None:
    """After a crash the record stays, but who has no lock is no holder, and the next holder is named."""
    await acquire(hosts[0])
    die(hosts[0])
    assert len(list((hosts[0].store / ".lockfs" / "owners").iterdir())) == 1
    assert await hosts[1].backend.holders(hosts[1].image(IMAGE)) == []
    lease = await acquire(hosts[1])
    (holder,) = await hosts[2].backend.holders(hosts[2].image(IMAGE))
    assert holder.owner == hosts[1].owner
    await hosts[1].backend.release(lease)


async def test_holder_without_a_record_is_lockfs(hosts: list[StoreHost]) -> None:
    """If the record is missing or garbage, the refusal still says that a lockfs host holds the image."""
    lease = await acquire(hosts[0])
    record = hosts[0].store / ".lockfs" / "owners" / str(lease.image.inode)
    record.write_bytes(b'{"host": "a"')
    with pytest.raises(ImageBusy, match=r"a\.img is held by lockfs\."):
        await acquire(hosts[1])
    record.unlink()
    with pytest.raises(ImageBusy, match=r"a\.img is held by lockfs\."):
        await acquire(hosts[1])
    await hosts[0].backend.release(lease)


_LOCKER = """
import fcntl, sys
image = open(sys.argv[1], "r+b")
fcntl.lockf(image, fcntl.LOCK_EX, int(sys.argv[3]), int(sys.argv[2]))
print(flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(("start", "length"), [(0, 0), (0, 1), (OWN_BYTE, 1), (201, 1), (101, 3)])
async def test_another_program_is_named(hosts: list[StoreHost], start: int, length: int) -> None:
    """A program that locks bytes of ours, or the whole file, is refused by process id."""
    hosts[0].image(IMAGE)
    command = [sys.executable, "-c", _LOCKER, str(hosts[0].store / IMAGE), str(start), str(length)]
    async with trio.open_nursery() as nursery:
        run = partial(trio.run_process, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        program: trio.Process = await nursery.start(run)
        assert program.stdin is not None
        assert program.stdout is not None
        await program.stdout.receive_some(1)
        with pytest.raises(ImageBusy, match=rf"pid {program.pid}\).*another program"):
            await acquire(hosts[0])
        await program.stdin.aclose()
        await program.stdout.aclose()
    await hosts[0].backend.release(await acquire(hosts[0]))


async def test_death_of_the_holder_frees_the_image(hosts: list[StoreHost]) -> None:
    """When every descriptor of the holder is gone, the next host has the image at once."""
    await acquire(hosts[0])
    die(hosts[0])
    await hosts[1].backend.release(await acquire(hosts[1]))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (FcntlOptions(lock_dir="/nonexistent", lock_path="/vm"), "cannot be opened"),
        (FcntlOptions(lock_dir="/"), "lock_path"),
    ],
)
async def test_wrong_lock_directory_is_refused(tmp_path: Path, options: FcntlOptions, text: str) -> None:
    """A lock directory that is missing, or has no path to hash, is a SetupError that says so."""
    store = os.open(tmp_path, os.O_PATH)
    try:
        with pytest.raises(SetupError, match=text):
            await FcntlBackend(options, store, "host").start(lambda lease: None)
    finally:
        os.close(store)


async def test_hosts_of_one_name_are_told_apart(tmp_path: Path) -> None:
    """Two mounts on one machine see each other's requests and shared leases, whatever the host's name has."""
    (tmp_path / IMAGE).touch()
    store = os.open(tmp_path, os.O_PATH)
    made = [FcntlBackend(FcntlOptions(), store, "same/na\nme" * 50) for _ in range(2)]
    owners = [Owner("same", number, "qemu", 0.0) for number in (1, 2)]
    mounts = [StoreHost(made[n], owners[n], tmp_path) for n in range(2)]
    one, two = [await acquire(mount, SHARED) for mount in mounts]
    (holder,) = await made[0].holders(one.image)
    assert holder.owner == owners[1]
    assert await made[0].requested([one.image.inode]) == set()
    await made[1].request(two.image, owners[1])
    assert await made[0].requested([one.image.inode]) == {one.image.inode}
    for mount, lease in zip(mounts, (one, two), strict=True):
        await mount.backend.release(lease)
        mount.close()
    os.close(store)
