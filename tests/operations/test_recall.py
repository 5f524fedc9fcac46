"""A mirror that goes on where a killed one stopped: what was open, and requests that are sent again.

The first mirror is simply left, nothing of it released or closed, as after SIGKILL in a family of processes
that share their descriptors. The second one knows what the shared memory tells it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pyfuse3
import pytest
import trio

from lockfs.backends.nop import NopBackend
from lockfs.channel.handles import HandleTable
from lockfs.journal.memory import SharedMemory
from lockfs.keeper.gate import GateState
from lockfs.keeper.keeper import Keeper
from lockfs.keeper.policy import Policy
from lockfs.mirror import recalling
from lockfs.mirror.mirror import Mirror
from lockfs.mirror.modes import IoMode
from lockfs.mirror.store import Past

from .conftest import ROOT, fails, open_descriptors
from .fakes import Caller, FakeKernel

POLICY = Policy(wait=0.0, managers=("nothing",), guests=("nothing",))


class Kernel(FakeKernel):
    """Outlives workers, and knows what inodes it still has."""

    def __init__(self) -> None:
        super().__init__()
        self.unknown: set[int] = set()

    def knows(self, nodeid: int) -> bool:
        return nodeid not in self.unknown


@dataclass
class Life:
    """A mount whose workers come and go."""

    path: Path
    memory: SharedMemory
    kernel: Kernel = field(default_factory=Kernel)
    turn: int = 0
    mirror: Mirror = field(init=False)
    handles: HandleTable = field(init=False)
    left: list[SharedMemory] = field(default_factory=list)

    async def worker(self, *, reading_only: bool = False) -> None:
        """The next worker takes over."""
        self.turn += 1
        if self.turn > 1:
            self.left.append(self.memory)
            self.memory = SharedMemory.attach(os.dup(self.memory.descriptor))
        past = Past(self.memory.facts, self.memory.inodes, self.turn)
        self.handles = HandleTable(self.turn)
        descriptor = os.open(self.path, os.O_PATH | os.O_DIRECTORY)
        self.mirror = Mirror(
            descriptor, self.handles, self.kernel, io=IoMode.AUTO, policy=POLICY, host="thishost", past=past
        )
        os.close(descriptor)
        backend = NopBackend()
        keeper = self.mirror.keeper = Keeper(
            backend,
            POLICY,
            "thishost",
            surroundings=self.mirror.surroundings,
            freed=self.mirror.freed,
            memory=self.memory.facts,
        )
        await backend.start(keeper.lease_changed, self.memory.facts)
        images = self.mirror.recalling.images()
        await self.mirror.recalling.opens(await keeper.recall(images))
        keeper.resume(reading_only=reading_only)

    async def number(self, name: str) -> int:
        """A name's node number."""
        return (await self.mirror.lookup(ROOT, os.fsencode(name), Caller())).st_ino

    async def open(self, name: str, flags: int, caller: Caller | None = None) -> int:
        """Open a file and have the answer arrive."""
        number = (await self.mirror.open(await self.number(name), flags, caller or Caller())).fh
        self.mirror.answered(caller.unique if caller else 0, number)
        return number


@pytest.fixture
async def life(store: Path) -> AsyncIterator[Life]:
    """A mount with its first worker; in the end nothing may be left that anybody opened."""
    before = open_descriptors()
    made = Life(store, SharedMemory.create())
    await made.worker()
    yield made
    await made.mirror.release_all()
    made.mirror.close()
    assert not len(made.handles)
    assert not made.kernel.registered
    assert [key for key in made.memory.facts.items("") if not key.startswith("op:")] == []
    assert made.memory.inodes.all() == []
    for memory in (*made.left, made.memory):
        memory.close()
    assert open_descriptors() == before


def asks(unique: int, resent: bool = False) -> Caller:
    """A request of that number, for the first time or again."""
    return Caller(unique=unique, resent=resent)


async def test_an_open_goes_on_under_its_number_and_its_lease(life: Life) -> None:
    (life.path / "image").write_bytes(b"before")
    number = await life.open("image", os.O_RDWR)
    reader = await life.open("image", os.O_RDONLY)
    handle = life.handles.find(number)
    await life.worker()
    again = life.handles.find(number)
    assert again is not None and handle is not None and again is not handle
    assert (again.descriptor, again.flags, again.open_flags, again.backing_id) == (
        handle.descriptor,
        handle.flags,
        handle.open_flags,
        handle.backing_id,
    )
    assert again.gate is not None and again.gate.enter() is GateState.OPEN
    os.pwrite(again.descriptor, b"after!", 0)
    again.gate.leave()
    assert life.mirror.keeper.holds(os.stat(life.path / "image").st_ino)
    await life.mirror.release(number)
    await life.mirror.release(reader)
    assert not life.mirror.keeper.holds(os.stat(life.path / "image").st_ino)
    assert (life.path / "image").read_bytes() == b"after!"


async def test_several_workers_in_a_row(life: Life) -> None:
    (life.path / "image").write_bytes(b"")
    numbers = []
    for _ in range(4):
        numbers.append(await life.open("image", os.O_RDWR))
        await life.worker()
    assert len(set(numbers)) == 4
    for number in numbers:
        await life.mirror.release(number)
    assert not life.mirror.keeper.images()


async def test_an_open_sent_again_is_the_one_that_was_granted(life: Life) -> None:
    (life.path / "image").write_bytes(b"")
    inode = await life.number("image")
    first = (await life.mirror.open(inode, os.O_RDWR, asks(7))).fh
    await life.worker()
    assert (await life.mirror.open(inode, os.O_RDWR, asks(7, resent=True))).fh == first
    life.mirror.answered(7, first)
    assert len(life.handles) == 1
    await life.worker()
    assert life.handles.find(first) is not None
    await life.mirror.release(first)


async def test_an_open_that_nobody_was_told_of_ends(life: Life, autojump_clock: object) -> None:
    """Its opener was killed before the request could be sent again; one that has the file is left alone."""
    (life.path / "image").write_bytes(b"")
    inode = await life.number("image")
    gone = Caller(pid=_ended(), unique=8)
    number = (await life.mirror.open(inode, os.O_RDWR, gone)).fh
    await life.worker()
    assert life.handles.find(number) is not None
    with trio.move_on_after(recalling.UNTOLD_S + 1):
        await life.mirror.recalling.settle()
    assert life.handles.find(number) is None
    assert not life.mirror.keeper.images()


def _ended() -> int:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


async def test_an_open_is_kept_whose_opener_has_the_file(life: Life, autojump_clock: object) -> None:
    (life.path / "image").write_bytes(b"")
    number = (await life.mirror.open(await life.number("image"), os.O_RDWR, asks(8))).fh
    await life.worker()
    descriptor = os.open(life.path / "image", os.O_RDWR)
    with trio.move_on_after(recalling.UNTOLD_S + 1):
        await life.mirror.recalling.settle()
    os.close(descriptor)
    assert life.handles.find(number) is not None
    await life.mirror.release(number)


@pytest.mark.parametrize("exclusive", [0, os.O_EXCL])
async def test_a_create_sent_again_opens_what_it_made(life: Life, exclusive: int) -> None:
    flags = os.O_RDWR | os.O_CREAT | exclusive
    info, _ = await life.mirror.create(ROOT, b"new", 0o400, flags, asks(9))
    await life.worker()
    again, entry = await life.mirror.create(ROOT, b"new", 0o400, flags, asks(9, resent=True))
    assert again.fh == info.fh
    assert entry.st_mode & 0o777 == 0o400
    life.mirror.answered(9, again.fh)
    await life.mirror.release(again.fh)


async def test_a_create_cut_short_after_the_file_was_made(life: Life) -> None:
    """The intent is noted, the file is there, and nothing is known of an open."""
    life.memory.facts.set("op:10", {"absent": True})
    (life.path / "new").write_bytes(b"")
    await life.worker()
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
    info, _ = await life.mirror.create(ROOT, b"new", 0o600, flags, asks(10, resent=True))
    life.mirror.answered(10, info.fh)
    assert life.memory.facts.get("op:10") is None
    await life.mirror.release(info.fh)
    with fails(errno.EEXIST):
        await life.mirror.create(ROOT, b"new", 0o600, flags, asks(11, resent=True))


Operation = Callable[[Mirror, Caller], object]


async def _rename(mirror: Mirror, caller: Caller) -> None:
    await mirror.rename(ROOT, b"a", ROOT, b"b", 0, caller)


async def _unlink(mirror: Mirror, caller: Caller) -> None:
    await mirror.unlink(ROOT, b"a", caller)


async def _rmdir(mirror: Mirror, caller: Caller) -> None:
    await mirror.rmdir(ROOT, b"d", caller)


async def _mkdir(mirror: Mirror, caller: Caller) -> None:
    await mirror.mkdir(ROOT, b"m", 0o755, caller)


async def _symlink(mirror: Mirror, caller: Caller) -> None:
    await mirror.symlink(ROOT, b"s", b"target", caller)


async def _mknod(mirror: Mirror, caller: Caller) -> None:
    await mirror.mknod(ROOT, b"p", stat.S_IFIFO | 0o600, 0, caller)


async def _link(mirror: Mirror, caller: Caller) -> None:
    inode = (await mirror.lookup(ROOT, b"c", caller)).st_ino
    await mirror.link(inode, ROOT, b"l", caller)


async def _removexattr(mirror: Mirror, caller: Caller) -> None:
    inode = (await mirror.lookup(ROOT, b"c", caller)).st_ino
    await mirror.removexattr(inode, b"user.x", caller)


@pytest.mark.parametrize(
    "operation", [_rename, _unlink, _rmdir, _mkdir, _symlink, _mknod, _link, _removexattr]
)
@pytest.mark.parametrize("noted", ["done", "begun", "not begun"])
async def test_what_was_done_is_not_done_twice(life: Life, operation: Operation, noted: str) -> None:
    """Sent again after it had been done, or half noted, or never begun: answered as if done once."""
    (life.path / "a").write_bytes(b"a")
    (life.path / "c").write_bytes(b"c")
    (life.path / "d").mkdir()
    os.setxattr(life.path / "c", b"user.x", b"1")
    if noted != "not begun":
        await operation(life.mirror, asks(12))
        said = life.memory.facts.get("op:12")
        assert isinstance(said, dict) and said["done"]
        if noted == "begun":
            life.memory.facts.set("op:12", {**said, "done": False})
    after = sorted(os.listdir(life.path))
    await life.worker()
    await operation(life.mirror, asks(12, resent=True))
    if noted != "not begun":
        assert sorted(os.listdir(life.path)) == after
    life.mirror.answered(12, 0)
    assert life.memory.facts.get("op:12") is None


@pytest.mark.parametrize("operation", [_rename, _unlink, _rmdir])
async def test_without_the_notes_it_would_fail(life: Life, operation: Operation) -> None:
    """The broken variant: who forgets what was done fails when it is asked again."""
    (life.path / "a").write_bytes(b"a")
    (life.path / "d").mkdir()
    await operation(life.mirror, asks(13))
    life.mirror.answered(13, 0)
    await life.worker()
    with fails(errno.ENOENT):
        await operation(life.mirror, asks(13, resent=True))


async def test_an_attribute_that_must_be_new_is_made_once(life: Life) -> None:
    """pyfuse3 looks whether it is there before it has it set: what this request made does not count."""
    (life.path / "c").write_bytes(b"c")
    inode = await life.number("c")
    await life.mirror.setxattr(inode, b"user.new", b"1", asks(16))
    await life.worker()
    with fails(errno.ENODATA):
        await life.mirror.getxattr(inode, b"user.new", asks(16, resent=True))
    await life.mirror.setxattr(inode, b"user.new", b"1", asks(16, resent=True))
    life.mirror.answered(16, 0)
    assert await life.mirror.getxattr(inode, b"user.new", asks(17, resent=True)) == b"1"


async def test_another_file_of_that_name_is_not_removed(life: Life) -> None:
    """Removed, answered to nobody, and somebody made a file of the same name meanwhile."""
    (life.path / "a").write_bytes(b"old")
    keep = os.open(life.path / "a", os.O_RDONLY)  # so that its number is not used again
    await _unlink(life.mirror, asks(14))
    (life.path / "a").write_bytes(b"new")
    await life.worker()
    await _unlink(life.mirror, asks(14, resent=True))
    os.close(keep)
    assert (life.path / "a").read_bytes() == b"new"


async def test_a_directory_goes_on_where_its_listing_was(life: Life, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[bytes] = []

    def reply(room: list[int], name: bytes, entry: object, position: int) -> bool:
        if not room[0]:
            return False
        room[0] -= 1
        told.append(name)
        return True

    monkeypatch.setattr(pyfuse3, "readdir_reply", reply)
    for number in range(9):
        (life.path / f"file{number}").write_bytes(b"")
    directory = await life.mirror.opendir(ROOT, asks(15))
    await life.mirror.readdir(directory, 0, [5])
    await life.worker()
    (life.path / "later").write_bytes(b"")
    assert await life.mirror.opendir(ROOT, asks(15, resent=True)) == directory
    await life.mirror.readdir(directory, 5, [100])
    assert sorted(told) == sorted([b".", b"..", *(b"file%d" % number for number in range(9))])
    await life.mirror.releasedir(directory)


def _read_to_its_end(descriptor: int) -> None:
    """As os.listdir does, which rewinds it afterwards, if it comes to that."""
    room = ctypes.create_string_buffer(4096)
    while ctypes.CDLL(None).getdents64(descriptor, room, len(room)) > 0:
        pass


async def test_a_listing_that_a_killed_worker_had_begun_is_whole(
    life: Life, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[bytes] = []
    monkeypatch.setattr(pyfuse3, "readdir_reply", lambda room, name, entry, position: not told.append(name))
    (life.path / "file").touch()
    directory = await life.mirror.opendir(ROOT, asks(15))
    (value,) = life.memory.facts.items("directory:").values()
    assert isinstance(value, dict)
    _read_to_its_end(value["fd"])
    await life.worker()
    await life.mirror.readdir(directory, 0, [])
    assert sorted(told) == [b".", b"..", b"file"]
    await life.mirror.releasedir(directory)


async def test_an_inode_that_the_kernel_does_not_know_is_forgotten(
    life: Life, autojump_clock: object
) -> None:
    """It was counted for an answer that never arrived; one that the kernel knows, or that is open, stays."""
    numbers = {}
    for name in ("lost", "known", "open"):
        (life.path / name).write_bytes(b"")
        numbers[name] = await life.number(name)
    handle = await life.open("open", os.O_RDONLY)
    await life.worker()
    life.kernel.unknown = {numbers["lost"], numbers["open"]}
    with trio.move_on_after(2 * recalling.FORGET_S):
        await life.mirror.recalling.settle()
    table = life.mirror._store.inodes
    assert table.known(numbers["lost"]) is None
    assert table.known(numbers["known"]) is not None
    assert table.known(numbers["open"]) is not None
    await life.mirror.release(handle)


async def test_an_inode_that_is_told_anew_meanwhile_stays(life: Life, autojump_clock: object) -> None:
    (life.path / "image").write_bytes(b"")
    number = await life.number("image")
    await life.worker()
    life.kernel.unknown = {number}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(life.mirror.recalling.settle)
        await trio.sleep(recalling.FORGET_S / 2)
        assert await life.number("image") == number
        await trio.sleep(5 * recalling.FORGET_S)
        nursery.cancel_scope.cancel()
    assert life.mirror._store.inodes.known(number) is not None


async def test_an_inode_that_was_counted_too_often_is_forgotten_with_its_last_lookup(
    life: Life, autojump_clock: object
) -> None:
    """The kernel knows it, and gives it up later: with one lookup less than it was counted for."""
    (life.path / "image").write_bytes(b"")
    number = await life.number("image")
    await life.number("image")
    await life.worker()
    table = life.mirror._store.inodes
    async with trio.open_nursery() as nursery:
        nursery.start_soon(life.mirror.recalling.settle)
        await trio.sleep(3 * recalling.FORGET_S)
        await life.mirror.forget([(number, 1)])
        assert table.known(number) is not None
        life.kernel.unknown = {number}
        await trio.sleep(2 * recalling.FORGET_S)
        nursery.cancel_scope.cancel()
    assert table.known(number) is None


async def test_a_close_that_was_done_may_come_again(life: Life) -> None:
    (life.path / "image").write_bytes(b"")
    number = await life.open("image", os.O_RDWR)
    await life.mirror.release(number)
    await life.worker()
    await life.mirror.release(number)


async def test_a_fenced_open_stays_dead(life: Life, expect_log: Callable[..., None]) -> None:
    expect_log("ERROR lockfs.keeper: ", None)
    (life.path / "image").write_bytes(b"")
    number = await life.open("image", os.O_RDWR)
    handle = life.handles.find(number)
    assert handle is not None
    handle.dead = True
    life.handles.changed(handle)
    await life.worker()
    again = life.handles.find(number)
    assert again is not None and again.dead
    await life.mirror.release(number)


async def test_after_a_crash_loop_nobody_writes(life: Life) -> None:
    """What is open for writing is fenced, reading goes on, and nothing can be changed any more."""
    (life.path / "image").write_bytes(b"data")
    writer = await life.open("image", os.O_RDWR)
    reader = await life.open("image", os.O_RDONLY)
    await life.worker(reading_only=True)
    handle = life.handles.find(writer)
    assert handle is not None and handle.gate is not None
    assert handle.gate.enter() is GateState.SHUT
    other = await life.open("image", os.O_RDONLY)
    for flags in (os.O_RDWR, os.O_RDONLY | os.O_TRUNC):
        with fails(errno.EROFS):
            await life.open("image", flags)
    with fails(errno.EROFS):
        await life.mirror.unlink(ROOT, b"image", Caller())
    for number in (writer, reader, other):
        await life.mirror.release(number)
    assert (life.path / "image").read_bytes() == b"data"
