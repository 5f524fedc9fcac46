"""Making, removing, moving and linking names."""

from __future__ import annotations

import errno
import os
import stat

import pyfuse3
import pytest

from .conftest import ROOT, Bench, fails, needs_root

NOREPLACE, EXCHANGE, WHITEOUT = 1, 2, 4


async def test_directories_are_made_and_removed(bench: Bench) -> None:
    """mkdir gives mode bits under the caller's umask; rmdir removes only what is empty."""
    entry = await bench.mirror.mkdir(ROOT, b"sub", stat.S_IFDIR | 0o1777, bench.me)
    assert stat.S_IMODE((bench.path / "sub").stat().st_mode) == 0o1755
    assert stat.S_ISDIR(entry.st_mode)
    with fails(errno.EEXIST):
        await bench.mirror.mkdir(ROOT, b"sub", 0o755, bench.me)
    (bench.path / "sub" / "file").touch()
    with fails(errno.ENOTEMPTY):
        await bench.mirror.rmdir(ROOT, b"sub", bench.me)
    (bench.path / "sub" / "file").unlink()
    await bench.mirror.rmdir(ROOT, b"sub", bench.me)
    assert not (bench.path / "sub").exists()
    with fails(errno.ENOENT):
        await bench.mirror.rmdir(ROOT, b"sub", bench.me)


@pytest.mark.parametrize("kind", [stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFREG])
async def test_special_files_are_made(bench: Bench, kind: int) -> None:
    """mknod makes pipes, sockets and empty regular files."""
    entry = await bench.mirror.mknod(ROOT, b"node", kind | 0o666, 0, bench.me)
    assert entry.st_mode == (bench.path / "node").stat().st_mode == kind | 0o644
    await bench.mirror.unlink(ROOT, b"node", bench.me)


@needs_root
async def test_devices_are_made(bench: Bench) -> None:
    """mknod makes device files with the number asked for."""
    try:
        entry = await bench.mirror.mknod(ROOT, b"null", stat.S_IFCHR | 0o600, os.makedev(1, 3), bench.me)
    except pyfuse3.FUSEError as error:
        pytest.skip(f"no device files here: {error}")
    assert (entry.st_rdev, (bench.path / "null").stat().st_rdev) == (os.makedev(1, 3), os.makedev(1, 3))


async def test_symbolic_links_keep_their_target(bench: Bench) -> None:
    """A symbolic link is made, read, linked and removed as itself, dangling or not."""
    entry = await bench.mirror.symlink(ROOT, b"link", b"no/\xff/where", bench.me)
    assert stat.S_ISLNK(entry.st_mode)
    assert await bench.mirror.readlink(entry.st_ino, bench.me) == b"no/\xff/where"
    await bench.mirror.link(entry.st_ino, ROOT, b"again", bench.me)
    assert os.readlink(os.fsencode(bench.path / "again")) == b"no/\xff/where"
    await bench.mirror.unlink(ROOT, b"link", bench.me)
    with fails(errno.EINVAL, errno.ENOENT):
        await bench.mirror.readlink(ROOT, bench.me)


async def test_hard_links_are_made(bench: Bench) -> None:
    """link gives one more name to the same inode; a name that is there is EEXIST."""
    bench.write("one", b"x")
    number = await bench.number("one")
    entry = await bench.mirror.link(number, ROOT, b"two", bench.me)
    assert (entry.st_ino, entry.st_nlink) == (number, 2)
    with fails(errno.EEXIST):
        await bench.mirror.link(number, ROOT, b"two", bench.me)


async def test_unlink_removes_one_name(bench: Bench) -> None:
    """unlink asks the keeper for an image and not for other files; a directory is EISDIR."""
    bench.write("image")
    os.mkfifo(bench.path / "pipe")
    (bench.path / "sub").mkdir()
    await bench.mirror.unlink(ROOT, b"image", bench.me)
    await bench.mirror.unlink(ROOT, b"pipe", bench.me)
    with fails(errno.EISDIR):
        await bench.mirror.unlink(ROOT, b"sub", bench.me)
    with fails(errno.ENOENT):
        await bench.mirror.unlink(ROOT, b"image", bench.me)
    assert [(purpose, image.path) for purpose, image in bench.keeper.asked] == [("remove", b"image")]
    assert bench.mirror.statistics().inodes == 1


async def test_unlinking_what_another_host_holds_is_ebusy(bench: Bench, expect_log) -> None:
    """The image stays, nothing leaks, and the log names the holder; so it is for its hard links."""
    expect_log("WARNING lockfs.mirror: .* was refused removal of '(image|alias)': .* on otherhost", 2)
    path = bench.write("image", b"data")
    os.link(path, bench.path / "alias")
    bench.keeper.elsewhere.add(path.stat().st_ino)
    for name in (b"image", b"alias"):
        with fails(errno.EBUSY):
            await bench.mirror.unlink(ROOT, name, bench.me)
    assert path.read_bytes() == b"data"
    assert bench.mirror.statistics().inodes == 1


async def test_unlinking_an_open_image_keeps_it_open(bench: Bench) -> None:
    """The keeper is shown the very description that the open image has."""
    bench.write("image")
    fh = await bench.open("image", os.O_RDWR)
    await bench.mirror.unlink(ROOT, b"image", bench.me)
    opened, removed = (image.descriptor for _, image in bench.keeper.asked)
    assert opened == removed
    assert os.fstat(bench.handles.find(fh).descriptor).st_nlink == 0
    await bench.mirror.release(fh)


async def test_rename_moves_and_replaces(bench: Bench) -> None:
    """rename moves between directories, replaces an image only after asking, and follows its inode."""
    bench.write("old", b"new content")
    target = bench.write("new", b"old content").stat().st_ino
    (bench.path / "sub").mkdir()
    sub = await bench.number("sub")
    number = await bench.number("old")
    await bench.mirror.rename(ROOT, b"old", sub, b"moved", 0, bench.me)
    assert bench.keeper.asked == []
    await bench.mirror.rename(sub, b"moved", ROOT, b"new", 0, bench.me)
    assert [(purpose, image.inode) for purpose, image in bench.keeper.asked] == [("remove", target)]
    assert (bench.path / "new").read_bytes() == b"new content"
    assert await bench.number("new") == number
    with fails(errno.ENOENT):
        await bench.mirror.rename(ROOT, b"old", ROOT, b"new", 0, bench.me)


async def test_renaming_over_what_another_host_holds_is_ebusy(bench: Bench, expect_log) -> None:
    """Neither a plain rename nor an exchange takes the name of an image held elsewhere; moving it is free."""
    expect_log("WARNING lockfs.mirror: .* was refused removal of 'held': .* on otherhost", 2)
    bench.write("mine", b"mine")
    held = bench.write("held", b"held")
    bench.keeper.elsewhere.add(held.stat().st_ino)
    for flags in (0, EXCHANGE):
        with fails(errno.EBUSY):
            await bench.mirror.rename(ROOT, b"mine", ROOT, b"held", flags, bench.me)
    assert held.read_bytes() == b"held"
    with fails(errno.EEXIST):
        await bench.mirror.rename(ROOT, b"mine", ROOT, b"held", NOREPLACE, bench.me)
    await bench.mirror.rename(ROOT, b"held", ROOT, b"elsewhere", 0, bench.me)
    assert bench.mirror.statistics().inodes == 1


async def test_rename_flags(bench: Bench) -> None:
    """NOREPLACE, EXCHANGE and unknown flags mean what renameat2(2) says; its own names need no asking."""
    a, b = bench.write("a", b"a"), bench.write("b", b"b")
    await bench.mirror.rename(ROOT, b"a", ROOT, b"c", NOREPLACE, bench.me)
    assert not a.exists()
    await bench.mirror.rename(ROOT, b"c", ROOT, b"b", EXCHANGE, bench.me)
    assert (b.read_bytes(), (bench.path / "c").read_bytes()) == (b"a", b"b")
    with fails(errno.EINVAL):
        await bench.mirror.rename(ROOT, b"c", ROOT, b"b", 64, bench.me)
    with fails(errno.EINVAL):
        await bench.mirror.rename(ROOT, b"c", ROOT, b"b", NOREPLACE | EXCHANGE, bench.me)
    with fails(errno.ENOENT):
        await bench.mirror.rename(ROOT, b"c", ROOT, b"gone", EXCHANGE, bench.me)
    os.link(b, bench.path / "alias")
    bench.keeper.asked.clear()
    await bench.mirror.rename(ROOT, b"b", ROOT, b"alias", 0, bench.me)
    assert bench.keeper.asked == []


@needs_root
async def test_whiteout_leaves_one_behind(bench: Bench) -> None:
    """RENAME_WHITEOUT leaves a 0:0 character device under the old name."""
    old = bench.write("old")
    try:
        await bench.mirror.rename(ROOT, b"old", ROOT, b"new", WHITEOUT, bench.me)
    except pyfuse3.FUSEError as error:
        pytest.skip(f"no whiteouts here: {error}")
    assert stat.S_ISCHR(old.stat().st_mode)
    assert old.stat().st_rdev == 0


async def test_directories_are_replaced_without_asking(bench: Bench) -> None:
    """A rename over an empty directory works, over a full one it is ENOTEMPTY."""
    for name in ("a", "b", "full"):
        (bench.path / name).mkdir()
    (bench.path / "full" / "file").touch()
    await bench.mirror.rename(ROOT, b"a", ROOT, b"b", 0, bench.me)
    with fails(errno.ENOTEMPTY):
        await bench.mirror.rename(ROOT, b"b", ROOT, b"full", 0, bench.me)
    assert bench.keeper.asked == []


async def test_image_paths_are_relative_to_the_store(bench: Bench) -> None:
    """The keeper is told an image's current path, also after the file was moved behind our back."""
    (bench.path / "sub").mkdir()
    bench.write("sub/image")
    sub = await bench.number("sub")
    number = await bench.number("image", sub)
    first = (await bench.mirror.open(number, os.O_RDONLY, bench.me)).fh
    (bench.path / "sub" / "image").rename(bench.path / "moved")
    second = (await bench.mirror.open(number, os.O_RDONLY, bench.me)).fh
    (bench.path / "moved").unlink()
    third = (await bench.mirror.open(number, os.O_RDONLY, bench.me)).fh
    assert [image.path for _, image in bench.keeper.asked] == [b"sub/image", b"moved", b"moved"]
    for fh in (first, second, third):
        await bench.mirror.release(fh)


async def test_a_file_too_deep_for_a_path_works(bench: Bench) -> None:
    """Where the whole path is longer than PATH_MAX the image is named by its number, and all else works."""
    directory, name, parents = ROOT, b"d" * 250, []
    for _ in range(17):
        parents.append(directory)
        directory = (await bench.mirror.mkdir(directory, name, 0o755, bench.me)).st_ino
    info, entry = await bench.mirror.create(directory, b"image", 0o644, os.O_RDWR | os.O_CREAT, bench.me)
    assert bench.keeper.asked[-1][1].path == b"(inode %d)" % entry.st_ino
    await bench.mirror.release(info.fh)
    await bench.mirror.unlink(directory, b"image", bench.me)
    for parent in reversed(parents):
        await bench.mirror.rmdir(parent, name, bench.me)
