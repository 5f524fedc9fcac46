"""Descriptions that a server ties to locks of their own, and how it is asked about a lease's.

What the server makes of it is seen in tests/cluster (test_nfs). Here a local file system plays it.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from lockfs.backends import bound, image_locks, storecheck
from lockfs.backends.base import LeaseState, Mode
from lockfs.backends.fcntl import FcntlOptions
from lockfs.backends.file_lease import COUNTS_MAX_S, Looks, Probed, probe_all
from lockfs.backends.nop import NopBackend
from lockfs.errors import BackendError, SetupError
from lockfs.linux import nfs, ofd
from tests.conftest import ExpectLog

from .makers import FcntlMaker, StoreHost


class _Time:
    late = 0.0

    def __init__(self) -> None:
        self.seconds = 1000.0

    def now(self) -> float:
        return self.seconds


class Server:
    """Plays the server that is asked about locks, by a read or by locking once more.

    Fault model: `forgets` makes it refuse every read under a lock.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.forgets = False
        self.reads: list[int] = []
        self.locked_again = 0
        asked, again = bound.ask, image_locks.still_ours

        def ask(descriptor: int) -> None:
            self.reads.append(descriptor)
            if self.forgets:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            asked(descriptor)

        def still_ours(descriptor: int, mode: Mode) -> bool:
            self.locked_again += 1
            return again(descriptor, mode)

        monkeypatch.setattr(bound, "ask", ask)
        monkeypatch.setattr(image_locks, "still_ours", still_ours)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    return Server(monkeypatch)


@pytest.fixture
def image(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "image").write_bytes(b"x" * 10000)
    descriptor = os.open(tmp_path / "image", os.O_RDWR)
    yield descriptor
    os.close(descriptor)


def _again(descriptor: int, flags: int = os.O_RDWR) -> int:
    return os.open(f"/proc/self/fd/{descriptor}", flags)


def _on_nfs(host: StoreHost) -> None:
    host.backend._local = False
    host.backend._looks = Looks(_Time(), None, binds=True)


def test_descriptions_do_not_get_into_each_others_way(image: int) -> None:
    """Many are bound at once, those for writing only too, and whoever wants the image's locks has them."""
    descriptors = [image, *(_again(image, flags) for flags in (os.O_RDWR, os.O_WRONLY) for _ in range(8))]
    for descriptor in descriptors:
        bound.bind(descriptor)
    other = _again(image)
    assert image_locks.take(other, Mode.EXCLUSIVE, image_locks.Parties(virtlockd=True, qemu=True))
    assert ofd.conflict(other, ofd.WRITE, bound._FIRST, 0) is not None
    for descriptor in [other, *descriptors[1:]]:
        os.close(descriptor)


def test_bound_again_it_has_one_lock_and_the_leases_stay(image: int) -> None:
    """A lock that may be lost is given up for a new one; the lease's on the same description are not."""
    image_locks.take(image, Mode.EXCLUSIVE, image_locks.Parties(virtlockd=True, qemu=True))
    bound.bind(image)
    other = _again(image)
    first = ofd.conflict(other, ofd.WRITE, bound._FIRST, 0)
    bound.bind(image)
    second = ofd.conflict(other, ofd.WRITE, bound._FIRST, 0)
    assert first is not None and second is not None and first.start != second.start
    assert ofd.try_lock(other, ofd.WRITE, first.start)
    assert not ofd.try_lock(other, ofd.WRITE, image_locks.OWN_BYTE)
    os.close(other)


def test_what_nobody_locks_is_locked(image: int) -> None:
    """A description that cannot be bound is an error, not a description that the server does not know."""
    other = _again(image)
    assert ofd.try_lock(other, ofd.WRITE, 0, 0)
    with pytest.raises(BlockingIOError):
        bound.bind(image)
    os.close(other)


def test_asking_reads_past_the_caches(image: int) -> None:
    """And changes nothing but how the description reads."""
    assert bound.can_ask(image)
    bound.ask(image)
    bound.ask(image)
    assert fcntl.fcntl(image, fcntl.F_GETFL) & os.O_DIRECT
    assert os.fstat(image).st_size == 10000
    only_writes = _again(image, os.O_WRONLY)
    assert not bound.can_ask(only_writes)
    os.close(only_writes)


async def test_looks_read_and_lock_nothing_again(tmp_path: Path, server: Server) -> None:
    """A lock call is answered by the client itself, or takes the lock anew: it is not used on NFS 4."""
    async with FcntlMaker(tmp_path, [FcntlOptions()]).hosts(1) as (host,):
        _on_nfs(host)
        deadline = trio.current_time() + 5
        lease = await host.backend.acquire(host.image("a"), Mode.EXCLUSIVE, host.owner, deadline)
        assert server.reads == [lease.image.descriptor], "the server is asked before the lease is told"
        assert probe_all([lease]) == Probed()
        assert len(server.reads) == 2 and not server.locked_again
        server.forgets = True
        ((lost, reason),) = probe_all([lease]).lost
        assert lost is lease and "Input/output error" in reason
        await host.backend.release(lease)


async def test_a_lease_that_the_server_does_not_know_is_none(tmp_path: Path, server: Server) -> None:
    """A client that was away may grant locks by itself: the server must know them before anybody writes."""
    async with FcntlMaker(tmp_path, [FcntlOptions()]).hosts(1) as (host,):
        _on_nfs(host)
        server.forgets = True
        deadline = trio.current_time() + 5
        with pytest.raises(BackendError, match="could not be locked: Input/output error"):
            await host.backend.acquire(host.image("a"), Mode.EXCLUSIVE, host.owner, deadline)
        assert ofd.conflict(host.image("b").descriptor, ofd.WRITE, 0, 0) is None
        server.forgets = False
        lease = await host.backend.acquire(host.image("a"), Mode.EXCLUSIVE, host.owner, deadline)
        assert lease.state is LeaseState.HELD
        await host.backend.release(lease)


async def test_an_image_that_cannot_be_read_is_asked_for_by_its_lock(tmp_path: Path, server: Server) -> None:
    """A description for writing only cannot be read through."""
    async with FcntlMaker(tmp_path, [FcntlOptions(qemu=False)]).hosts(1) as (host,):
        _on_nfs(host)
        image = host.image("a")
        writes = _again(image.descriptor, os.O_WRONLY)
        os.dup2(writes, image.descriptor)
        os.close(writes)
        deadline = trio.current_time() + 5
        lease = await host.backend.acquire(image, Mode.EXCLUSIVE, host.owner, deadline)
        assert probe_all([lease]) == Probed()
        assert not server.reads and server.locked_again == 2
        await host.backend.release(lease)


async def test_only_an_nfs_4_server_ties_them(tmp_path: Path, image: int) -> None:
    """Elsewhere nothing is locked."""
    other = _again(image)
    NopBackend().bind(image)
    async with FcntlMaker(tmp_path, [FcntlOptions()]).hosts(1) as (host,):
        for looks in (None, Looks(_Time(), None)):
            host.backend._looks = looks
            assert not host.backend.binds
            host.backend.bind(image)
            assert ofd.conflict(other, ofd.WRITE, 0, 0) is None
        _on_nfs(host)
        assert host.backend.binds
        host.backend.bind(image)
        assert ofd.conflict(other, ofd.WRITE, 0, 0) is not None
    os.close(other)


@pytest.mark.parametrize("binds", [True, False])
async def test_a_server_that_was_away_while_the_locks_were_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, binds: bool
) -> None:
    """Whoever waited for it so long has the lease, and may write: the server was asked when it was back."""
    time, take = _Time(), image_locks.take

    def late(*arguments: Any) -> bool:
        time.seconds += 2 * COUNTS_MAX_S
        return take(*arguments)

    monkeypatch.setattr(image_locks, "take", late)
    async with FcntlMaker(tmp_path, [FcntlOptions()]).hosts(1) as (host,):
        host.backend._local = False
        host.backend._looks = Looks(time, None, binds=binds)
        deadline = trio.current_time() + 5
        lease = await host.backend.acquire(host.image("a"), Mode.EXCLUSIVE, host.owner, deadline)
        assert lease.in_time()
        await host.backend.release(lease)


@pytest.mark.parametrize(("fstype", "ties"), [("nfs4", True), ("nfs", False), ("ceph", False)])
def test_the_store_says_which_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fstype: str, ties: bool
) -> None:
    """By the type that the kernel's table of mounts has."""
    store = _table(tmp_path, monkeypatch, fstype)
    assert Looks.at_store(store).binds is ties
    os.close(store)


def _table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fstype: str) -> int:
    device = os.stat(tmp_path).st_dev
    where = f"{os.major(device)}:{os.minor(device)}"
    (tmp_path / "mountinfo").write_text(
        f"98 29 {where} / /srv rw - {fstype} filer:/vm rw,hard\n"
        f"99 29 {where} /a /mnt rw - {fstype} filer:/vm rw,hard\n"
    )
    monkeypatch.setattr(storecheck, "_MOUNTINFO", str(tmp_path / "mountinfo"))
    return os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)


@pytest.mark.parametrize("fstype", ["cifs", "smb3"])
def test_a_file_system_that_was_not_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expect_log: ExpectLog, fstype: str
) -> None:
    """Its clients may answer by themselves too: told, once, at the start, wherever else it is mounted."""
    expect_log(f"WARNING.*on {fstype}: .*may answer for the server", 1)
    store = _table(tmp_path, monkeypatch, fstype)
    storecheck.check_store(store)
    os.close(store)


@pytest.mark.parametrize(("said", "refused"), [("Y\n", True), ("N\n", False), (None, False)])
def test_a_kernel_that_takes_lost_locks_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str | None, refused: bool
) -> None:
    """It would tell nobody that another host has had the image: refused, with what is to be done."""
    parameter = tmp_path / "recover_lost_locks"
    if said is not None:
        parameter.write_text(said)
    monkeypatch.setattr(nfs, "_RECOVERS", parameter)
    store = _table(tmp_path, monkeypatch, "nfs4")
    try:
        if refused:
            with pytest.raises(SetupError, match="write N to /sys/module/nfs"):
                storecheck.check_store(store)
        else:
            storecheck.check_store(store)
    finally:
        os.close(store)
