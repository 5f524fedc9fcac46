"""Loads that make, rename and remove names: each request must be done once, not twice and not never."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import struct
import time
from pathlib import Path

from tests.failover.loads import Load

_GETDENTS64 = {"x86_64": 217, "aarch64": 61}
_DIRENT = struct.Struct("=QqHB")
BEAT_S = 0.03


class Names(Load):
    """O_EXCL creation, writing, rename over another file, unlink; contents follow their names."""

    def prepare(self) -> None:
        self.make_turn()
        self.serial = 0
        self.current = b""
        self.write(self.place("target"), b"", os.O_CREAT | os.O_EXCL)

    def step(self) -> None:
        self.serial += 1
        fresh, target = self.place(f"fresh{self.serial}"), self.place("target")
        content = self.random.randbytes(self.random.randrange(1, 20_000))
        self.write(fresh, content, os.O_CREAT | os.O_EXCL)
        self.same(self.read(target, 1 << 20), self.current, "the target before the rename")
        self.call("rename", os.rename, fresh, target)
        self.current = content
        self.absent(fresh)
        self.same(self.read(target, 1 << 20), content, "the target after the rename")
        if self.serial % 3 == 0:
            self.call("unlink", os.unlink, target)
            self.absent(target)
            self.write(target, b"", os.O_CREAT | os.O_EXCL)
            self.current = b""


class Unlinks(Load):
    """Files made and removed, and their number counted by the directory itself."""

    def prepare(self) -> None:
        self.make_turn()

    def step(self) -> None:
        paths = [self.place(f"short-lived{number}") for number in range(3)]
        for path in paths:
            descriptor = self.call(
                "create", os.open, path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600
            )
            with self.closing(descriptor):
                self.call("write", os.pwrite, descriptor, path.name.encode(), 0)
        for path in paths:
            self.call("unlink", os.unlink, path)
            self.absent(path)
        self.same(self.call("readdir", os.listdir, self.place("x").parent), [], "what is left")


class Directories(Load):
    """mkdir, rmdir, and directories moved with what is in them."""

    def prepare(self) -> None:
        self.make_turn()

    def step(self) -> None:
        outer, inner, moved = self.place("outer"), self.place("outer/inner"), self.place("moved")
        self.call("mkdir", os.mkdir, outer)
        self.call("mkdir", os.mkdir, inner)
        self.same(self.call("stat", os.stat, outer).st_nlink, 3, "links of a directory with one inside")
        self.call("rename", os.rename, outer, moved)
        self.absent(outer)
        self.same(self.call("readdir", os.listdir, moved), ["inner"], "what moved along")
        self.call("rmdir", os.rmdir, moved / "inner")
        self.call("rmdir", os.rmdir, moved)
        self.absent(moved)


class Links(Load):
    """Hard and symbolic links, and the count of links."""

    def prepare(self) -> None:
        self.make_turn()
        self.write(self.place("file"), b"linked", os.O_CREAT | os.O_EXCL)

    def step(self) -> None:
        file, alias, pointer = self.place("file"), self.place("alias"), self.place("pointer")
        self.call("link", os.link, file, alias)
        self.same(self.call("stat", os.stat, alias).st_nlink, 2, "links of the file")
        self.same(self.read(alias, 100), b"linked", "the alias")
        self.call("symlink", os.symlink, "alias", pointer)
        self.same(self.call("readlink", os.readlink, pointer), "alias", "the symbolic link")
        self.same(self.read(pointer, 100), b"linked", "what the symbolic link leads to")
        self.call("unlink", os.unlink, pointer)
        self.call("unlink", os.unlink, alias)
        self.same(self.call("stat", os.stat, file).st_nlink, 1, "links of the file")


class Listing(Load):
    """A directory read in many small pieces with rests between them: every name once, none missing."""

    NAMES = 150
    PIECE = 1024
    REST_S = 0.05
    paced = False

    def prepare(self) -> None:
        self.descriptor = -1
        self.make_turn()
        self.wanted = sorted(f"entry-{number:04}-with-a-name-of-some-length" for number in range(self.NAMES))
        for name in self.wanted:
            descriptor = self.call("create", os.open, self.place(name), os.O_CREAT | os.O_EXCL | os.O_RDWR)
            self.call("close", os.close, descriptor)
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.found: list[str] = []

    def step(self) -> None:
        """One piece of the listing, so that a kill falls between two pieces as a rule."""
        time.sleep(self.random.uniform(0, 2 * self.REST_S))
        if self.descriptor < 0:
            flags = os.O_RDONLY | os.O_DIRECTORY
            self.descriptor = self.call("opendir", os.open, self.place("x").parent, flags)
            self.found = []
        names = self.call("readdir", self._piece)
        self.found += names
        if names:
            return
        self.call("closedir", os.close, self.descriptor)
        self.descriptor = -1
        self.same(sorted(self.found), [".", "..", *self.wanted], "the listing")

    def _piece(self) -> list[str]:
        buffer = ctypes.create_string_buffer(self.PIECE)
        number = _GETDENTS64[platform.machine()]
        length = self.libc.syscall(number, self.descriptor, buffer, self.PIECE)
        if length < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        names, at, data = [], 0, buffer.raw
        while at < length:
            size = _DIRENT.unpack_from(data, at)[2]
            names.append(os.fsdecode(data[at + _DIRENT.size : at + size].split(b"\0")[0]))
            at += size
        return names

    def finish(self) -> None:
        if self.descriptor >= 0:
            descriptor, self.descriptor = self.descriptor, -1
            os.close(descriptor)

    def abandon(self) -> None:
        super().abandon()
        with contextlib.suppress(OSError):
            self.finish()


class Attributes(Load):
    """Modes, times, extended attributes, free space."""

    def prepare(self) -> None:
        self.make_turn()
        self.path = self.place("file")
        self.write(self.path, b"x", os.O_CREAT | os.O_EXCL)

    def step(self) -> None:
        path = self.path
        mode = self.random.choice((0o600, 0o640, 0o644))
        self.call("chmod", os.chmod, path, mode)
        self.same(self.call("stat", os.stat, path).st_mode & 0o777, mode, "the mode")
        when = self.random.randrange(1, 1 << 60)
        self.call("utimens", lambda: os.utime(path, ns=(when, when)))
        self.same(self.call("stat", os.stat, path).st_mtime_ns, when, "the time of change")
        value = self.random.randbytes(40)
        self._set(path, "user.failover", value, os.XATTR_CREATE)
        self.same(self.call("getxattr", os.getxattr, path, "user.failover"), value, "the attribute")
        self._set(path, "user.failover", value[::-1], os.XATTR_REPLACE)
        self.demand("user.failover" in self.call("listxattr", os.listxattr, path), "an attribute is missing")
        self.call("removexattr", os.removexattr, path, "user.failover")
        self.demand("user.failover" not in self.call("listxattr", os.listxattr, path), "an attribute is left")
        self.demand(self.call("statfs", os.statvfs, path).f_blocks > 0, "the file system has no blocks")

    def _set(self, path: Path, name: str, value: bytes, flags: int) -> None:
        self.call("setxattr", os.setxattr, path, name, value, flags)


class Beat(Load):
    """Looks a name up every few milliseconds: tells when lockfs answers again."""

    paced = False

    def prepare(self) -> None:
        self.make_turn()
        self.write(self.place("beat"), b"x", os.O_CREAT | os.O_EXCL)

    def step(self) -> None:
        self.same(self.call("lookup", os.stat, self.place("beat")).st_size, 1, "the size")
        time.sleep(BEAT_S)
