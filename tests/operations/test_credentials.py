"""Acting as the caller."""

from __future__ import annotations

import errno
import functools
import os
import stat
import threading
from pathlib import Path

import pytest
import trio

from lockfs.mirror.credentials import GROUPS_AGE_MAX_S, GROUPS_CACHED_MAX, Credentials

from .conftest import ROOT, Bench, fails, needs_root
from .fakes import Caller
from .test_xattrs import acl_of

SOMEBODY = Caller(uid=1234, gid=2345, pid=0)
CREATE = os.O_RDWR | os.O_CREAT


@needs_root
async def test_what_a_caller_makes_is_theirs(bench: Bench) -> None:
    """Files, directories, links, pipes and unnamed files belong to the caller's user and group."""
    mirror = bench.mirror
    info, _ = await mirror.create(ROOT, b"file", 0o644, CREATE, SOMEBODY)
    await mirror.mkdir(ROOT, b"sub", 0o755, SOMEBODY)
    await mirror.symlink(ROOT, b"link", b"x", SOMEBODY)
    await mirror.mknod(ROOT, b"pipe", stat.S_IFIFO | 0o644, 0, SOMEBODY)
    for name in ("file", "sub", "link", "pipe"):
        status = (bench.path / name).lstat()
        assert (status.st_uid, status.st_gid) == (1234, 2345), name
    entry, unnamed = await mirror.tmpfile(ROOT, 0o600, os.O_RDWR | os.O_TMPFILE, 0, SOMEBODY)
    assert (entry.st_uid, entry.st_gid) == (1234, 2345)
    for fh in (info.fh, unnamed.fh):
        await mirror.release(fh)


@needs_root
async def test_a_directory_s_group_is_inherited(bench: Bench) -> None:
    """In a set-group-id directory new files have its group, directories the bit as well."""
    bench.path.chmod(0o2777)
    os.chown(bench.path, 0, 77)
    bench.path.chmod(0o2777)
    await bench.mirror.mkdir(ROOT, b"sub", 0o755, SOMEBODY)
    status = (bench.path / "sub").stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (1234, 77, 0o2755)


@needs_root
async def test_nobody_makes_files_where_they_may_not(bench: Bench) -> None:
    """Making a name never falls back to root: a directory closed to the caller is EACCES."""
    bench.path.chmod(0o755)
    with fails(errno.EACCES):
        await bench.mirror.create(ROOT, b"file", 0o644, CREATE, SOMEBODY)
    with fails(errno.EACCES):
        await bench.mirror.mkdir(ROOT, b"sub", 0o755, SOMEBODY)
    with fails(errno.EACCES):
        await bench.mirror.tmpfile(ROOT, 0o600, os.O_RDWR | os.O_TMPFILE, 0, SOMEBODY)
    assert list(bench.path.iterdir()) == []


@needs_root
async def test_supplementary_groups_count(bench: Bench) -> None:
    """A caller may write where only one of its supplementary groups may."""
    os.chown(bench.path, 0, 4242)
    bench.path.chmod(0o770)
    async with trio.open_nursery() as nursery:
        start = functools.partial(trio.run_process, user=1234, group=1234, extra_groups=[4242], check=False)
        member = await nursery.start(start, ["sleep", "60"])
        caller = Caller(uid=1234, gid=1234, pid=member.pid)
        info, entry = await bench.mirror.create(ROOT, b"file", 0o644, CREATE, caller)
        assert (entry.st_uid, entry.st_gid) == (1234, 1234)
        await bench.mirror.release(info.fh)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("umask", [0, 0o027, 0o777])
async def test_the_caller_s_umask_applies(bench: Bench, umask: int) -> None:
    """Mode bits of everything made are masked by the caller's umask, not the daemon's."""
    caller = Caller(umask=umask)
    await bench.mirror.mkdir(ROOT, b"sub", 0o777, caller)
    await bench.mirror.mknod(ROOT, b"node", stat.S_IFREG | 0o666, 0, caller)
    info, _ = await bench.mirror.create(ROOT, b"file", 0o666, CREATE, caller)
    for name, mode in (("sub", 0o777), ("node", 0o666), ("file", 0o666)):
        assert stat.S_IMODE((bench.path / name).stat().st_mode) == mode & ~umask
    await bench.mirror.release(info.fh)


async def test_a_default_acl_overrides_the_umask(bench: Bench) -> None:
    """In a directory with a default ACL, its entries and not the umask decide the mode."""
    acl = acl_of((0x01, 7, -1), (0x04, 7, -1), (0x20, 0, -1))
    try:
        os.setxattr(bench.path, "system.posix_acl_default", acl)
    except OSError as error:
        pytest.skip(f"no ACLs here: {error}")
    caller = Caller(umask=0o077)
    info, _ = await bench.mirror.create(ROOT, b"file", 0o666, CREATE, caller)
    await bench.mirror.mkdir(ROOT, b"sub", 0o777, caller)
    assert stat.S_IMODE((bench.path / "file").stat().st_mode) == 0o660
    assert stat.S_IMODE((bench.path / "sub").stat().st_mode) == 0o770
    await bench.mirror.release(info.fh)


@needs_root
async def test_opens_use_what_the_kernel_permitted(bench: Bench) -> None:
    """An existing file opens for a caller whose capabilities, unknown here, let the kernel permit it."""
    bench.write("secret", b"data", 0o600)
    fh = await bench.open("secret", os.O_RDWR, SOMEBODY)
    assert os.read(bench.handles.find(fh).descriptor, 10) == b"data"
    await bench.mirror.release(fh)


@needs_root
async def test_identities_do_not_mix(bench: Bench) -> None:
    """Many callers at once each own what they made, and every worker thread is the daemon's again."""

    async def make(number: int) -> None:
        caller = Caller(uid=2000 + number, gid=3000 + number, pid=0, umask=number % 8)
        await bench.mirror.mkdir(ROOT, b"%d" % number, 0o777, caller)

    async with trio.open_nursery() as nursery:
        for number in range(100):
            nursery.start_soon(make, number)
    for number in range(100):
        status = (bench.path / str(number)).stat()
        assert (status.st_uid, status.st_gid) == (2000 + number, 3000 + number)
        assert stat.S_IMODE(status.st_mode) == 0o777 & ~(number % 8)
    await trio.to_thread.run_sync(check_identity)
    check_all_threads()


def check_all_threads() -> None:
    """Every thread of this process must be root's."""
    for task in Path("/proc/self/task").iterdir():
        assert "\nUid:\t0\t0\t0\t0\n" in (task / "status").read_text()


def check_identity() -> None:
    """This thread must be root's in every respect."""
    status = Path(f"/proc/self/task/{threading.get_native_id()}/status").read_text()
    assert "\nUid:\t0\t0\t0\t0\n" in status
    assert "\nGid:\t0\t0\t0\t0\n" in status


@needs_root
def test_groups_are_remembered_for_a_moment(monkeypatch) -> None:
    """Groups are read once a second at most for a caller, and the memory of them is bounded."""
    asked: list[int] = []
    monkeypatch.setattr("lockfs.linux.proc.groups_of", lambda tid: asked.append(tid) or (7,))
    times = iter([0.0, GROUPS_AGE_MAX_S, *(GROUPS_AGE_MAX_S + 0.1 for _ in range(GROUPS_CACHED_MAX * 4))])
    credentials = Credentials(lambda: next(times))
    caller = Caller(uid=1, gid=1, pid=10)
    for _ in range(3):
        assert credentials.identity(caller).groups == (7,)
    assert asked == [10, 10]
    for pid in range(GROUPS_CACHED_MAX * 3):
        credentials.identity(Caller(uid=1, gid=1, pid=pid + 1))
    assert len(credentials._groups) <= GROUPS_CACHED_MAX
    assert credentials.identity(Caller(uid=0, gid=5, pid=10)).groups == credentials.daemon.groups


@needs_root
def test_a_failure_puts_the_identity_back() -> None:
    """Whatever the work raises, the thread is the daemon's afterwards."""
    credentials = Credentials()

    def fail() -> None:
        assert os.getgroups is not None
        raise OSError(errno.EIO, "fails")

    def work() -> None:
        with pytest.raises(OSError, match="fails"):
            credentials.run(SOMEBODY, fail)
        check_identity()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_a_daemon_that_is_not_root_acts_as_itself(monkeypatch) -> None:
    """Without root there is one identity."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    credentials = Credentials()
    assert credentials.identity(SOMEBODY) == credentials.daemon
    assert credentials.run(SOMEBODY, lambda: 5) == 5
