"""Open, create, unnamed files, release, and undoing all of it."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from pathlib import Path

import pyfuse3
import pytest
import trio

from lockfs.errors import BackendError, LeaseUnavailable, WriteRefused
from lockfs.keeper.gate import GateState
from lockfs.keeper.grants import Kind

from .conftest import ROOT, Bench, fails, needs_root, open_descriptors
from .fakes import Caller

NOBODY = Caller(uid=65534, gid=65534, pid=0)
CREATE = os.O_RDWR | os.O_CREAT


async def test_a_reader_asks_to_read(bench: Bench) -> None:
    """A read-only open is told to the keeper as such, on a description that could write."""
    bench.write("image", b"data")
    fh = await bench.open("image")
    handle = bench.handles.find(fh)
    (purpose, image), inode = bench.keeper.asked[0], (bench.path / "image").stat().st_ino
    assert (purpose, image.inode, image.path) == ("read", inode, b"image")
    assert fcntl.fcntl(image.descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
    assert os.read(handle.descriptor, 10) == b"data"
    assert handle.gate is None
    assert not handle.writable
    await bench.mirror.release(fh)
    assert bench.mirror.statistics().backings == 0


async def test_all_opens_of_an_inode_share_one_description(bench: Bench) -> None:
    """The keeper sees one descriptor for all names and opens of an image, until the last release."""
    bench.write("one")
    os.link(bench.path / "one", bench.path / "two")
    fhs = [await bench.open(name, flags) for name in ("one", "two") for flags in (os.O_RDONLY, os.O_RDWR)]
    assert len({image.descriptor for _, image in bench.keeper.asked}) == 1
    assert len({bench.handles.find(fh).backing_id for fh in fhs}) == 1
    assert len(bench.kernel.registered) == 1
    for fh in fhs:
        assert len(bench.kernel.registered) == 1
        await bench.mirror.release(fh)
    assert not bench.kernel.registered


async def test_concurrent_opens_share_one_description(bench: Bench) -> None:
    """Opens that race for a fresh inode end up with one description and one backing id."""
    bench.write("image")
    number = await bench.number("image")
    async with trio.open_nursery() as nursery:
        for _ in range(16):
            nursery.start_soon(bench.mirror.open, number, os.O_RDWR, bench.me)
    assert len({image.descriptor for _, image in bench.keeper.asked}) == 1
    assert list(bench.kernel.registered) == [1]
    await bench.mirror.release_all()


@pytest.mark.parametrize("flag", [os.O_APPEND, os.O_DIRECT, os.O_SYNC, os.O_DSYNC, os.O_NOATIME])
async def test_a_handle_has_the_flags_of_its_open(bench: Bench, flag: int) -> None:
    """What the caller asked for is what the handle's own descriptor does, after open and after create."""
    bench.write("image")
    info, _ = await bench.mirror.create(ROOT, b"new", 0o644, CREATE | flag, bench.me)
    for fh in (await bench.open("image", os.O_RDWR | flag | 0o100000), info.fh):
        flags = fcntl.fcntl(bench.handles.find(fh).descriptor, fcntl.F_GETFL)
        assert flags & flag == flag
        assert flags & os.O_ACCMODE == os.O_RDWR
        await bench.mirror.release(fh)


async def test_truncation_comes_after_the_lease(bench: Bench) -> None:
    """O_TRUNC, even with O_RDONLY, asks for writing first and then empties the file."""
    path = bench.write("image", b"data")
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY):
        path.write_bytes(b"data")
        fh = await bench.open("image", flags | os.O_TRUNC)
        assert path.read_bytes() == b""
        await bench.mirror.release(fh)
    assert [purpose for purpose, _ in bench.keeper.asked] == ["write"] * 3
    assert bench.keeper.sizes == [4] * 3


async def test_a_refused_truncation_leaves_the_data(bench: Bench, expect_log) -> None:
    """O_TRUNC of an image that another host holds is EBUSY and changes nothing; reading it is free."""
    expect_log("WARNING lockfs.mirror: .* was refused writing of 'image': .* on otherhost")
    path = bench.write("image", b"data")
    bench.keeper.elsewhere.add(path.stat().st_ino)
    with fails(errno.EBUSY):
        await bench.open("image", os.O_RDWR | os.O_TRUNC)
    assert path.read_bytes() == b"data"
    assert bench.mirror.statistics().backings == 0
    await bench.mirror.release(await bench.open("image"))


async def test_a_manager_may_not_truncate(bench: Bench) -> None:
    """O_TRUNC through a manager's grant that gets no lease is refused, and the grant is given back."""
    path = bench.write("image", b"data")
    bench.keeper.kind = Kind.MANAGED
    bench.keeper.refuses_claims = True
    with fails(errno.ENOSPC):
        await bench.open("image", os.O_RDWR | os.O_TRUNC)
    assert path.read_bytes() == b"data"
    assert not bench.keeper.grants
    await bench.mirror.release(await bench.open("image", os.O_RDWR))


async def test_a_provisional_truncation_asks_for_the_lease(bench: Bench) -> None:
    """O_TRUNC through a provisional grant claims the lease; without it, it is ENOSPC and nothing changes."""
    path = bench.write("image", b"data")
    bench.keeper.kind = Kind.PROVISIONAL
    bench.keeper.refuses_claims = True
    with fails(errno.ENOSPC):
        await bench.open("image", os.O_RDWR | os.O_TRUNC)
    assert path.read_bytes() == b"data"
    bench.keeper.refuses_claims = False
    await bench.mirror.release(await bench.open("image", os.O_RDWR | os.O_TRUNC))
    assert path.read_bytes() == b""


async def test_claim_opens_a_gate(bench: Bench) -> None:
    """The channel's claim reaches the keeper with the handle's grant; a closed handle is EBADF."""
    bench.write("image")
    bench.keeper.kind = Kind.PROVISIONAL
    fh = await bench.open("image", os.O_RDWR)
    handle = bench.handles.find(fh)
    assert handle.gate.state is GateState.ASK
    await bench.mirror.claim(handle)
    assert handle.gate.state is GateState.OPEN
    bench.keeper.refuses_claims = True
    with pytest.raises(LeaseUnavailable):
        await bench.mirror.claim(handle)
    await bench.mirror.release(fh)
    with pytest.raises(OSError, match="closed"):
        await bench.mirror.claim(handle)


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC])
async def test_a_failed_open_leaves_nothing(bench: Bench, flags: int, expect_log) -> None:
    """An error of the keeper is passed on as its number, its sentence is logged; descriptors, ids and
    grants are as before."""
    expect_log("WARNING lockfs.mirror: .* was refused .* of 'image': the storage is silent")
    bench.write("image")
    number = await bench.number("image")
    before = open_descriptors()
    bench.keeper.failure = BackendError("the storage is silent")
    with fails(errno.EIO):
        await bench.mirror.open(number, flags, bench.me)
    assert open_descriptors() == before
    assert not bench.kernel.registered
    assert bench.mirror.statistics().backings == 0


async def test_an_open_that_fails_after_the_lease_gives_it_back(bench: Bench, monkeypatch) -> None:
    """When the truncating writer's own descriptor cannot be had, the grant is closed."""
    bench.write("image")
    number = await bench.number("image")
    before = open_descriptors()

    def lose_the_inode(image: object) -> None:
        monkeypatch.setattr(bench.mirror._store.inodes.get(number), "descriptor", 10**6)

    bench.keeper.during = lose_the_inode
    with fails(errno.ENOENT):
        await bench.mirror.open(number, os.O_RDWR | os.O_TRUNC, bench.me)
    monkeypatch.undo()
    assert not bench.keeper.grants
    assert open_descriptors() == before


async def test_a_cancelled_open_leaves_nothing(bench: Bench) -> None:
    """Cancellation while the keeper lets it wait leaves no descriptor and no backing."""
    bench.write("image")
    number = await bench.number("image")
    before = open_descriptors()

    async def wait(*arguments: object) -> None:
        scope.cancel()
        await trio.sleep_forever()

    bench.keeper.open = wait
    with trio.CancelScope() as scope:
        await bench.mirror.open(number, os.O_RDWR, bench.me)
    assert scope.cancelled_caught
    assert open_descriptors() == before
    assert bench.mirror.statistics().backings == 0


async def test_an_interrupt_reaches_a_waiting_open(bench: Bench) -> None:
    """Only a thread that waits is told of its signal."""
    bench.write("image")
    number = await bench.number("image")
    waiting = trio.Event()

    async def wait(*arguments: object) -> None:
        waiting.set()
        await trio.sleep_forever()

    bench.keeper.open = wait
    assert not bench.mirror.interrupt(bench.me.pid)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.mirror.open, number, os.O_RDWR, bench.me)
        await waiting.wait()
        assert bench.mirror.interrupt(bench.me.pid)
        assert not bench.mirror.interrupt(1)
        assert bench.keeper.asked_to_interrupt == bench.me.pid
        nursery.cancel_scope.cancel()
    assert not bench.mirror.interrupt(bench.me.pid)


async def test_the_lease_ends_before_its_description(bench: Bench) -> None:
    """release closes the grant while the description is open (the fake checks), and tolerates a stranger."""
    bench.write("image")
    fh = await bench.open("image", os.O_RDWR)
    descriptor = bench.handles.find(fh).descriptor
    await bench.mirror.release(fh)
    assert bench.handles.find(fh) is None
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(descriptor)


async def test_a_stranger_s_release_is_told(bench: Bench, expect_log) -> None:
    """Releasing a handle that is not open does nothing but say so."""
    expect_log("ERROR lockfs.mirror: handle 99 was released")
    await bench.mirror.release(99)


def wait_until_closed(descriptor: int) -> None:
    """Return once the descriptor is closed, by a thread that nobody can wait for otherwise."""
    end = time.monotonic() + 5.0
    while time.monotonic() < end:
        try:
            os.fstat(descriptor)
        except OSError:
            return
        time.sleep(0.001)
    pytest.fail("the description was not closed")


async def test_a_description_stays_while_the_storage_keeps_the_lease(bench: Bench) -> None:
    """A lease that the storage has not taken back keeps its description, for the next open too."""
    bench.write("image")
    number = await bench.number("image")
    bench.keeper.late.add(number)
    fh = await bench.open("image", os.O_RDWR)
    image = bench.keeper.asked[0][1]
    await bench.mirror.release(fh)
    os.fstat(image.descriptor)
    await bench.mirror.forget([(number, 2)])
    assert bench.mirror.statistics().inodes == 1
    again = await bench.open("image", os.O_RDWR)
    assert bench.keeper.asked[1][1].descriptor == image.descriptor
    await bench.mirror.release(again)
    bench.keeper.late.clear()
    bench.mirror.freed(image)
    await trio.to_thread.run_sync(wait_until_closed, image.descriptor)
    bench.mirror.freed(image)
    assert bench.mirror.statistics().backings == 0


async def test_a_forgotten_inode_goes_with_its_last_handle(bench: Bench) -> None:
    """Forgetting an inode that is open leaves its descriptor to the release."""
    bench.write("image")
    before = open_descriptors()
    number = await bench.number("image")
    fh = (await bench.mirror.open(number, os.O_RDWR, bench.me)).fh
    await bench.mirror.forget([(number, 1)])
    await bench.mirror.release(fh)
    assert open_descriptors() == before


# Creating


async def test_create_makes_and_opens(bench: Bench) -> None:
    """create gives attributes and a handle, asks for writing, and counts one lookup."""
    info, entry = await bench.mirror.create(ROOT, b"new", 0o100666, CREATE | os.O_EXCL, bench.me)
    status = (bench.path / "new").stat()
    assert (entry.st_ino, entry.st_mode) == (status.st_ino, stat.S_IFREG | 0o644)
    assert os.write(bench.handles.find(info.fh).descriptor, b"data") == 4
    assert (bench.path / "new").read_bytes() == b"data"
    assert [purpose for purpose, _ in bench.keeper.asked] == ["write"]
    assert bench.mirror.statistics().lookups == 1
    with fails(errno.EEXIST):
        await bench.mirror.create(ROOT, b"new", 0o644, CREATE | os.O_EXCL, bench.me)
    await bench.mirror.release(info.fh)


@pytest.mark.parametrize("access", [os.O_RDONLY, os.O_WRONLY, os.O_RDWR])
async def test_a_new_file_may_forbid_what_its_maker_does(bench: Bench, access: int) -> None:
    """A file made with mode 0 or read-only is open for its maker as asked, and has a description."""
    for name, mode in ((b"none", 0), (b"reading", 0o444)):
        info, _ = await bench.mirror.create(ROOT, name, mode, os.O_CREAT | access, bench.me)
        assert bench.handles.find(info.fh).writable == (access != os.O_RDONLY)
        assert stat.S_IMODE((bench.path / os.fsdecode(name)).stat().st_mode) == mode
        await bench.mirror.release(info.fh)


async def test_create_opens_what_another_host_made(bench: Bench) -> None:
    """Without O_EXCL an existing file is opened, truncated if asked, lease included."""
    path = bench.write("image", b"data")
    info, entry = await bench.mirror.create(ROOT, b"image", 0o644, CREATE, bench.me)
    assert entry.st_size == 4
    await bench.mirror.release(info.fh)
    info, entry = await bench.mirror.create(ROOT, b"image", 0o644, CREATE | os.O_TRUNC, bench.me)
    assert (entry.st_size, path.stat().st_size) == (0, 0)
    await bench.mirror.release(info.fh)
    assert [purpose for purpose, _ in bench.keeper.asked] == ["write", "write"]


async def test_create_of_what_another_host_holds_is_ebusy(bench: Bench, expect_log) -> None:
    """The existing file keeps its data and the lookup that its create began is taken back."""
    expect_log("WARNING lockfs.mirror: .* was refused writing of 'image'")
    path = bench.write("image", b"data")
    bench.keeper.elsewhere.add(path.stat().st_ino)
    with fails(errno.EBUSY):
        await bench.mirror.create(ROOT, b"image", 0o644, CREATE | os.O_TRUNC, bench.me)
    assert path.read_bytes() == b"data"
    assert bench.mirror.statistics().inodes == 1


async def test_a_failed_create_leaves_no_inode(bench: Bench, expect_log) -> None:
    """If the keeper fails, the new file is forgotten again, with all descriptors."""
    expect_log("WARNING lockfs.mirror: .* was refused writing of 'new': the storage is silent")
    bench.keeper.failure = BackendError("the storage is silent")
    before = open_descriptors()
    with fails(errno.EIO):
        await bench.mirror.create(ROOT, b"new", 0o644, CREATE, bench.me)
    assert open_descriptors() == before
    assert bench.mirror.statistics().inodes == 1


async def test_create_over_anything_else_makes_the_kernel_look_again(bench: Bench) -> None:
    """A name that turned out to be a link, a pipe or a directory is ESTALE."""
    (bench.path / "link").symlink_to("nowhere")
    (bench.path / "sub").mkdir()
    os.mkfifo(bench.path / "pipe")
    for name in (b"link", b"sub", b"pipe"):
        with fails(errno.ESTALE):
            await bench.mirror.create(ROOT, name, 0o644, CREATE, bench.me)
    assert bench.mirror.statistics().inodes == 1


@needs_root
async def test_create_does_not_open_what_the_caller_may_not(bench: Bench) -> None:
    """For a file that is there the caller's own permissions count, though lockfs could open it."""
    path = bench.write("image", b"data", 0o600)
    for flags in (CREATE, CREATE | os.O_TRUNC, os.O_RDONLY | os.O_CREAT):
        with fails(errno.EACCES):
            await bench.mirror.create(ROOT, b"image", 0o644, flags, NOBODY)
    assert path.read_bytes() == b"data"
    assert not bench.keeper.grants
    assert bench.mirror.statistics().backings == 0


async def test_an_abandoned_open_is_undone(bench: Bench) -> None:
    """abandon releases, and takes back the lookup that only a create's reply would have told."""
    bench.write("image")
    fh = await bench.open("image", os.O_RDWR)
    await bench.mirror.abandon(fh)
    assert bench.mirror.statistics().lookups == 1
    info, _ = await bench.mirror.create(ROOT, b"new", 0o644, CREATE, bench.me)
    await bench.mirror.abandon(info.fh)
    assert bench.mirror.statistics().lookups == 1
    assert not len(bench.handles)


async def test_unnamed_files_are_made_and_named(bench: Bench) -> None:
    """O_TMPFILE gives an inode without a name that link can name, unless made with O_EXCL."""
    flags = os.O_RDWR | os.O_TMPFILE
    try:
        entry, info = await bench.mirror.tmpfile(ROOT, 0o100666, flags, 0o027, bench.me)
    except pyfuse3.FUSEError as error:
        pytest.skip(f"no unnamed files here: {error}")
    assert (entry.st_nlink, stat.S_IMODE(entry.st_mode)) == (0, 0o640)
    assert list(bench.path.iterdir()) == []
    os.write(bench.handles.find(info.fh).descriptor, b"data")
    named = await bench.mirror.link(entry.st_ino, ROOT, b"named", bench.me)
    assert (named.st_ino, (bench.path / "named").read_bytes()) == (entry.st_ino, b"data")
    await bench.mirror.release(info.fh)
    entry, info = await bench.mirror.tmpfile(ROOT, 0o600, flags | os.O_EXCL, 0o027, bench.me)
    with fails(errno.ENOENT):
        await bench.mirror.link(entry.st_ino, ROOT, b"never", bench.me)
    await bench.mirror.abandon(info.fh)


async def test_settle_and_surroundings(bench: Bench, tmp_path: Path) -> None:
    """The keeper's questions about locks and descriptors are answered for this mount's device."""
    path = bench.write("image")
    inode, ask = path.stat().st_ino, bench.mirror.surroundings
    fh = await bench.open("image", os.O_RDWR)
    ask.settle(inode)
    assert not ask.still_written(inode)
    assert not ask.has_open(os.getpid(), inode)
    bench.mirror.device = path.stat().st_dev
    assert ask.has_open(os.getpid(), inode)
    await bench.mirror.release(fh)
    assert not ask.has_open(os.getpid(), inode)
    with path.open("r+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 100)
        assert not ask.still_written(inode)
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 2, 100)
        assert ask.still_written(inode)


async def test_settling_takes_no_error_from_a_guest(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel tells an error once through each open file: the image is flushed through one of its own."""
    path, flushed = bench.write("image"), []
    fh = await bench.open("image", os.O_RDWR)
    own = [handle.descriptor for handle in bench.mirror.surroundings._handles.all()]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: flushed.append((fd, os.fstat(fd).st_ino)))
        bench.mirror.surroundings.settle(path.stat().st_ino)
    assert [inode for _, inode in flushed] == [path.stat().st_ino]
    assert not {fd for fd, _ in flushed} & set(own)
    await bench.mirror.release(fh)


async def test_refusals_of_a_shut_gate_are_passed_on(bench: Bench) -> None:
    """A truncation through a handle whose gate is shut fails with the gate's own error."""
    path = bench.write("image", b"data")
    fh = await bench.open("image", os.O_RDWR)
    handle = bench.handles.find(fh)
    for refusal, number in ((WriteRefused("no"), errno.EROFS), (LeaseUnavailable("lost"), errno.ENOSPC)):
        handle.gate.set(GateState.SHUT, refusal)
        with fails(number):
            await bench.setattr(handle.nodeid, fh, size=0)
    assert path.read_bytes() == b"data"
    await bench.mirror.release(fh)
