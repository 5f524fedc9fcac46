"""Size, owner, mode and times."""

from __future__ import annotations

import errno
import os
import stat

import pytest

from lockfs.keeper.grants import Kind
from lockfs.keeper.policy import Policy

from .conftest import ROOT, Bench, fails, needs_root
from .fakes import Caller

NOBODY = Caller(uid=65534, gid=65534, pid=0)


async def test_truncation_by_path_holds_the_lease(bench: Bench) -> None:
    """truncate(2) grows and shrinks under a lease and gives the new attributes, far beyond 4 GiB."""
    path = bench.write("image", b"data")
    number = await bench.number("image")
    for size in (0, 10, (1 << 40) + 1, 3):
        assert (await bench.setattr(number, size=size)).st_size == size
        assert path.stat().st_size == size
    assert [purpose for purpose, _ in bench.keeper.asked] == ["change"] * 4
    assert bench.mirror.statistics().backings == 0


async def test_sparse_files_stay_sparse(bench: Bench) -> None:
    """Growing a file allocates nothing."""
    bench.write("image")
    entry = await bench.setattr(await bench.number("image"), size=1 << 33)
    assert (entry.st_size, entry.st_blocks) == (1 << 33, 0)


async def test_truncating_what_another_host_holds_is_ebusy(bench: Bench, expect_log) -> None:
    """The image keeps its data and the error leaves nothing open."""
    expect_log("WARNING lockfs.mirror: .* was refused truncation of 'image': .* on otherhost")
    path = bench.write("image", b"data")
    bench.keeper.elsewhere.add(path.stat().st_ino)
    number = await bench.number("image")
    with fails(errno.EBUSY):
        await bench.setattr(number, size=0)
    assert path.read_bytes() == b"data"
    assert bench.mirror.statistics().backings == 0
    assert (await bench.setattr(number, mode=0o600)).st_mode == 0o100600


async def test_truncation_through_a_handle_passes_its_gate(bench: Bench) -> None:
    """ftruncate(2) goes through the handle's own gate, claims a provisional lease, and leaves the gate."""
    path = bench.write("image", b"data")
    bench.keeper.kind = Kind.PROVISIONAL
    fh = await bench.open("image", os.O_RDWR)
    handle = bench.handles.find(fh)
    bench.keeper.refuses_claims = True
    with fails(errno.ENOSPC):
        await bench.setattr(handle.nodeid, fh, size=1)
    bench.keeper.refuses_claims = False
    assert (await bench.setattr(handle.nodeid, fh, size=1)).st_size == 1
    assert path.read_bytes() == b"d"
    assert handle.gate.inside == 0
    assert [purpose for purpose, _ in bench.keeper.asked] == ["write"]
    await bench.mirror.release(fh)


async def test_only_regular_files_have_a_size(bench: Bench) -> None:
    """Truncating a directory is EISDIR, a pipe EINVAL."""
    os.mkfifo(bench.path / "pipe")
    with fails(errno.EISDIR):
        await bench.setattr(ROOT, size=0)
    with fails(errno.EINVAL):
        await bench.setattr(await bench.number("pipe"), size=0)


async def test_mode_and_times_are_set(bench: Bench) -> None:
    """Mode bits, and times to the nanosecond, before 1970 too; one time leaves the other as it is."""
    path = bench.write("file")
    number = await bench.number("file")
    assert (await bench.setattr(number, mode=0o100751)).st_mode == 0o100751
    await bench.setattr(number, atime_ns=1_500_000_001, mtime_ns=-1_500_000_001)
    assert (path.stat().st_atime_ns, path.stat().st_mtime_ns) == (1_500_000_001, -1_500_000_001)
    await bench.setattr(number, mtime_ns=7)
    await bench.setattr(number, atime_ns=8)
    assert (path.stat().st_atime_ns, path.stat().st_mtime_ns) == (8, 7)
    assert bench.keeper.asked == []


async def test_symbolic_links_have_times_of_their_own(bench: Bench) -> None:
    """Times and owner of a link are the link's, not its target's; its mode cannot be set."""
    target = bench.write("target")
    before = target.stat()
    (bench.path / "link").symlink_to("target")
    number = await bench.number("link")
    await bench.setattr(number, mtime_ns=5)
    assert (bench.path / "link").lstat().st_mtime_ns == 5
    if os.geteuid() == 0:
        await bench.setattr(number, uid=12, gid=34)
        assert ((bench.path / "link").lstat().st_uid, (bench.path / "link").lstat().st_gid) == (12, 34)
    assert target.stat().st_mtime_ns == before.st_mtime_ns
    assert target.stat().st_uid == before.st_uid


@needs_root
async def test_owner_and_mode_together(bench: Bench) -> None:
    """A mode sent along with an owner is set after it, so that set-id bits are as the caller wants them."""
    path = bench.write("file", mode=0o4755)
    entry = await bench.setattr(await bench.number("file"), uid=1000, gid=1000, mode=0o4755)
    assert (entry.st_uid, entry.st_gid, stat.S_IMODE(path.stat().st_mode)) == (1000, 1000, 0o4755)
    entry = await bench.setattr(await bench.number("file"), gid=7)
    assert (entry.st_uid, entry.st_gid) == (1000, 7)


@needs_root
async def test_a_writer_who_is_not_the_owner_may_set_the_time(bench: Bench) -> None:
    """What the kernel permitted (the current time, by a writer) is done though the bare identity may not."""
    path = bench.write("file", mode=0o666)
    await bench.setattr(await bench.number("file"), caller=NOBODY, mtime_ns=99)
    assert path.stat().st_mtime_ns == 99


@needs_root
async def test_set_group_id_follows_the_caller(bench: Bench) -> None:
    """An owner outside the file's group cannot keep its set-group-id bit."""
    path = bench.write("file")
    os.chown(path, 65534, 7)
    await bench.setattr(await bench.number("file"), caller=NOBODY, mode=0o2755)
    assert stat.S_IMODE(path.stat().st_mode) == 0o755


@needs_root
async def test_a_manager_does_not_relabel_another_host_s_image(make_bench) -> None:
    """libvirt's daemons get EPERM for a change of an image held elsewhere, and success for no change."""
    me = os.path.basename(os.readlink("/proc/self/exe"))
    bench = make_bench(policy=Policy(managers=(me,)))
    path = bench.write("image", mode=0o600)
    number = await bench.number("image")
    await bench.setattr(number, uid=1000, gid=1000)
    bench.keeper.elsewhere.add(number)
    for values in ({"uid": 0}, {"gid": 0}, {"mode": 0o644}, {"uid": 1000, "gid": 0}):
        with fails(errno.EPERM):
            await bench.setattr(number, **values)
    await bench.setattr(number, uid=1000, gid=1000, mode=0o100600)
    assert (path.stat().st_uid, path.stat().st_gid, path.stat().st_mode) == (1000, 1000, 0o100600)
    bench.keeper.elsewhere.clear()
    await bench.setattr(number, uid=0)
    assert path.stat().st_uid == 0
    bench.mirror.close()


async def test_others_may_relabel(bench: Bench) -> None:
    """Who is no manager changes labels as on the bare directory, whoever holds the image."""
    bench.keeper.elsewhere.add(bench.write("image").stat().st_ino)
    assert (await bench.setattr(await bench.number("image"), mode=0o600)).st_mode == 0o100600


async def test_statfs_is_that_of_the_store(bench: Bench) -> None:
    """The figures are the file system's below."""
    figures, below = await bench.mirror.statfs(bench.me), os.statvfs(bench.path)
    for name in ("f_bsize", "f_frsize", "f_blocks", "f_files", "f_namemax"):
        assert getattr(figures, name) == getattr(below, name)


@pytest.mark.parametrize(("mode", "allowed"), [(os.R_OK, True), (os.R_OK | os.W_OK, False)])
@needs_root
async def test_access_answers_for_the_caller(bench: Bench, mode: int, allowed: bool) -> None:
    """access checks the caller's permissions, not the daemon's."""
    bench.write("file", mode=0o644)
    assert await bench.mirror.access(await bench.number("file"), mode, NOBODY) is allowed
