"""Extended attributes."""

from __future__ import annotations

import errno
import os
import struct

import pytest

from .conftest import ROOT, Bench, fails, needs_root
from .fakes import ELSEWHERE, Caller

NOBODY = Caller(uid=65534, gid=65534, pid=0)


async def test_user_attributes_pass_through(bench: Bench) -> None:
    """Values are kept byte by byte, listed, removed; what is not there is ENODATA."""
    path = bench.write("file")
    number, mirror, me = await bench.number("file"), bench.mirror, bench.me
    for value in (b"", b"\0\xff" * 500):
        await mirror.setxattr(number, b"user.test", value, me)
        assert await mirror.getxattr(number, b"user.test", me) == os.getxattr(path, b"user.test") == value
    assert await mirror.listxattr(number, me) == [b"user.test"]
    await mirror.removexattr(number, b"user.test", me)
    with fails(errno.ENODATA):
        await mirror.getxattr(number, b"user.test", me)
    with fails(errno.ENODATA):
        await mirror.removexattr(number, b"user.test", me)
    assert await mirror.listxattr(number, me) == []


async def test_errors_are_those_of_the_file_system(bench: Bench) -> None:
    """An unknown namespace, a name too long and a link's user attribute fail as on the bare directory."""
    path = bench.write("file")
    (bench.path / "link").symlink_to("file")
    number, link = await bench.number("file"), await bench.number("link")
    cases = [
        (number, path, b"unknown.name", True),
        (number, path, b"user." + b"x" * 300, True),
        (link, bench.path / "link", b"user.name", False),
    ]
    for inode, name, attribute, follow in cases:
        with pytest.raises(OSError) as bare:
            os.setxattr(name, attribute, b"1", follow_symlinks=follow)
        with fails(bare.value.errno):
            await bench.mirror.setxattr(inode, attribute, b"1", bench.me)


@needs_root
async def test_trusted_and_link_attributes(bench: Bench) -> None:
    """Trusted attributes pass through, those of a symbolic link too."""
    (bench.path / "link").symlink_to("nowhere")
    number = await bench.number("link")
    await bench.mirror.setxattr(number, b"trusted.test", b"1", bench.me)
    assert os.getxattr(bench.path / "link", b"trusted.test", follow_symlinks=False) == b"1"
    assert await bench.mirror.listxattr(number, bench.me) == [b"trusted.test"]


@needs_root
async def test_acls_are_the_owner_s(bench: Bench) -> None:
    """A POSIX ACL is set by the file's owner and by nobody else, since the kernel may not have checked."""
    path = bench.write("file")
    number = await bench.number("file")
    acl = acl_of((0x01, 6, -1), (0x02, 4, 1000), (0x04, 4, -1), (0x10, 4, -1), (0x20, 0, -1))
    with fails(errno.EPERM):
        await bench.mirror.setxattr(number, b"system.posix_acl_access", acl, NOBODY)
    await bench.mirror.setxattr(number, b"system.posix_acl_access", acl, bench.me)
    assert os.getxattr(path, b"system.posix_acl_access") == acl


def acl_of(*entries: tuple[int, int, int]) -> bytes:
    """A POSIX ACL's xattr form (linux/posix_acl_xattr.h): version 2, then (tag, permissions, id) each."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", t, p, i & 0xFFFFFFFF) for t, p, i in entries)


OWN = [b"holder", b"host", b"pid", b"program", b"since", b"mode"]


async def own(bench: Bench, number: int) -> dict[bytes, bytes]:
    """lockfs' own attributes of an image."""
    return {name: await bench.mirror.getxattr(number, b"user.lockfs." + name, bench.me) for name in OWN}


async def test_a_free_image_has_no_holder(bench: Bench) -> None:
    """lockfs' attributes of a free image are ENODATA and never listed."""
    bench.write("image")
    number = await bench.number("image")
    for name in [*OWN, b"nonsense"]:
        with fails(errno.ENODATA):
            await bench.mirror.getxattr(number, b"user.lockfs." + name, bench.me)
    assert await bench.mirror.listxattr(number, bench.me) == []


async def test_an_image_tells_who_holds_it_here(bench: Bench) -> None:
    """An image open for writing here names this host, the process and the time."""
    bench.write("image")
    fh = await bench.open("image", os.O_RDWR)
    told = await own(bench, bench.handles.find(fh).nodeid)
    assert (told[b"host"], told[b"pid"]) == (b"thishost", str(os.getpid()).encode())
    assert told[b"holder"] == told[b"program"] + b" (pid %s) on thishost" % told[b"pid"]
    assert told[b"mode"] == b"exclusive"
    assert int(told[b"since"]) > 1_600_000_000
    await bench.mirror.release(fh)


async def test_an_image_tells_who_holds_it_elsewhere(bench: Bench) -> None:
    """An image held by another host names that host and its process."""
    bench.keeper.elsewhere.add(bench.write("image").stat().st_ino)
    told = await own(bench, await bench.number("image"))
    assert told[b"host"] == ELSEWHERE.host.encode()
    assert told[b"pid"] == b"4711"
    assert b"qemu-system-x86_64 (pid 4711) on otherhost" in told[b"holder"]
    assert told[b"since"] == b"1700000000"
    assert bench.mirror.statistics().backings == 0


async def test_lockfs_attributes_are_read_only(bench: Bench) -> None:
    """Setting or removing them on an image is EPERM; those stored below by others stay unseen."""
    path = bench.write("image")
    os.setxattr(path, b"user.lockfs.holder", b"forged")
    number = await bench.number("image")
    with fails(errno.EPERM):
        await bench.mirror.setxattr(number, b"user.lockfs.holder", b"x", bench.me)
    with fails(errno.EPERM):
        await bench.mirror.removexattr(number, b"user.lockfs.holder", bench.me)
    with fails(errno.ENODATA):
        await bench.mirror.getxattr(number, b"user.lockfs.holder", bench.me)
    assert await bench.mirror.listxattr(number, bench.me) == []
    await bench.mirror.setxattr(ROOT, b"user.lockfs.note", b"x", bench.me)
    assert await bench.mirror.listxattr(ROOT, bench.me) == [b"user.lockfs.note"]
