"""Loads that write and read data: what was written is there, once, wherever it was written from."""

from __future__ import annotations

import contextlib
import os

from tests.failover.loads import HELD, Load

BLOCK = 4096
_KEPT_OPEN = os.O_RDWR | os.O_CLOEXEC


def _stamp(number: int) -> bytes:
    return f"{number:015}\n".encode() * (BLOCK // 16)


class Opens(Load):
    """Images opened and closed all the time, read-only and for writing, each with its last stamp in it."""

    IMAGES = 4

    def prepare(self) -> None:
        self.make_turn()
        self.stamps = [0] * self.IMAGES
        for number in range(self.IMAGES):
            self.write(self.place(f"{number}.img"), _stamp(0), os.O_CREAT | os.O_EXCL)

    def step(self) -> None:
        number = self.random.randrange(self.IMAGES)
        path = self.place(f"{number}.img")
        descriptor = self.call("open", os.open, path, _KEPT_OPEN)
        with self.closing(descriptor):
            found = self.call("read", os.pread, descriptor, BLOCK, 0)
            self.same(found, _stamp(self.stamps[number]), "the stamp")
            self.stamps[number] += 1
            written = self.call("write", os.pwrite, descriptor, _stamp(self.stamps[number]), 0)
            self.same(written, BLOCK, "bytes written")
        self.same(self.read(path, BLOCK), _stamp(self.stamps[number]), "the stamp after another open")


class Kept(Load):
    """Images that stay open for writing from beginning to end: the second host must never get one."""

    seeds = 4

    def prepare(self) -> None:
        self.descriptors: list[int] = []
        for number in range(self.seeds):
            path = self.directory / HELD / f"{number}.img"
            self.descriptors.append(self.call("open", os.open, path, _KEPT_OPEN))
        self.stamps = [dict[int, int]() for _ in range(self.seeds)]

    def step(self) -> None:
        number = self.random.randrange(self.seeds)
        descriptor, stamps = self.descriptors[number], self.stamps[number]
        block = self.random.randrange(self.seed_bytes // BLOCK)
        if block in stamps:
            found = self.call("read", os.pread, descriptor, BLOCK, block * BLOCK)
            self.same(found, _stamp(stamps[block]), f"block {block}")
        stamps[block] = stamps.get(block, 0) + 1
        written = self.call("write", os.pwrite, descriptor, _stamp(stamps[block]), block * BLOCK)
        self.same(written, BLOCK, "bytes written")
        if self.random.random() < 0.3:
            self.call(*self.random.choice((("fsync", os.fsync), ("fdatasync", os.fdatasync))), descriptor)
        self.same(self.call("fstat", os.fstat, descriptor).st_size, self.seed_bytes, "the size")

    def finish(self) -> None:
        for descriptor, stamps in zip(self.descriptors, self.stamps, strict=True):
            for block, stamp in stamps.items():
                found = self.call("read", os.pread, descriptor, BLOCK, block * BLOCK)
                self.same(found, _stamp(stamp), f"block {block} in the end")
        for descriptor in self.descriptors:
            self.call("close", os.close, descriptor)

    def abandon(self) -> None:
        super().abandon()
        for descriptor in self.descriptors:
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self.descriptors = []


class Append(Load):
    """Records at the end of a file, through one descriptor and through new ones: each there exactly once."""

    def prepare(self) -> None:
        self.descriptor = -1
        self.make_turn()
        self.count = 0
        self.descriptor = self.call(
            "create", os.open, self.place("log"), _KEPT_OPEN | os.O_CREAT | os.O_EXCL | os.O_APPEND
        )

    def step(self) -> None:
        if self.count % 7 == 6:
            descriptor = self.call("open", os.open, self.place("log"), _KEPT_OPEN | os.O_APPEND)
            with self.closing(descriptor):
                self._add(descriptor)
        else:
            self._add(self.descriptor)
        if self.count % 50 == 0:
            self._check()

    def _add(self, descriptor: int) -> None:
        self.same(self.call("append", os.write, descriptor, self._line(self.count)), 32, "bytes written")
        self.count += 1

    def _line(self, number: int) -> bytes:
        return f"record {number:024}\n".encode()

    def _check(self) -> None:
        found = self.read(self.place("log"), 32 * self.count + 4096).splitlines(keepends=True)
        for number, line in enumerate(found):
            self.same(line, self._line(number), f"record {number} of {self.count}")
        self.same(len(found), self.count, "the number of records")

    def finish(self) -> None:
        self._check()
        self.call("close", os.close, self.descriptor)

    def abandon(self) -> None:
        super().abandon()
        if self.descriptor >= 0:
            with contextlib.suppress(OSError):
                os.close(self.descriptor)


class Truncate(Load):
    """Files made shorter and longer by descriptor and by name; what is beyond an old end reads as zeros."""

    def prepare(self) -> None:
        self.make_turn()
        self.write(self.place("file"), b"", os.O_CREAT | os.O_EXCL)

    def step(self) -> None:
        path = self.place("file")
        self.same(self.call("stat", os.stat, path).st_size, 0, "the size left by the last step")
        self.write(path, b"a" * 3 * BLOCK, 0)
        short, long = self.random.randrange(1, BLOCK), self.random.randrange(2 * BLOCK, 4 * BLOCK)
        self.call("truncate", os.truncate, path, short)
        self.same(self.call("stat", os.stat, path).st_size, short, "the size after truncate")
        descriptor = self.call("open", os.open, path, _KEPT_OPEN)
        with self.closing(descriptor):
            self.call("ftruncate", os.ftruncate, descriptor, long)
            self.call("fsync", os.fsync, descriptor)
            self.same(self.call("fstat", os.fstat, descriptor).st_size, long, "the size after ftruncate")
        self.same(self.read(path, 5 * BLOCK), b"a" * short + bytes(long - short), "the content")
        descriptor = self.call("open", os.open, path, _KEPT_OPEN | os.O_TRUNC)
        self.call("close", os.close, descriptor)
        self.same(self.call("stat", os.stat, path).st_size, 0, "the size after O_TRUNC")


class Orphans(Load):
    """A file whose name is gone while it is open: its data lasts as long as the descriptor."""

    LIFE = 40  # steps

    def prepare(self) -> None:
        self.descriptor = -1
        self.make_turn()
        self.age = self.LIFE

    def step(self) -> None:
        if self.age >= self.LIFE:
            self._renew()
        found = self.call("read", os.pread, self.descriptor, BLOCK, 0)
        self.same(found, _stamp(self.age), "the file without a name")
        self.age += 1
        self.same(self.call("write", os.pwrite, self.descriptor, _stamp(self.age), 0), BLOCK, "bytes written")
        status = self.call("fstat", os.fstat, self.descriptor)
        self.same((status.st_nlink, status.st_size), (0, BLOCK), "links and size of a file without a name")

    def _renew(self) -> None:
        self.finish()
        path = self.place("doomed")
        self.descriptor = self.call("create", os.open, path, _KEPT_OPEN | os.O_CREAT | os.O_EXCL)
        self.age = 0
        self.call("write", os.pwrite, self.descriptor, _stamp(0), 0)
        self.call("unlink", os.unlink, path)
        self.absent(path)

    def finish(self) -> None:
        if self.descriptor >= 0:
            descriptor, self.descriptor = self.descriptor, -1
            self.call("close", os.close, descriptor)

    def abandon(self) -> None:
        super().abandon()
        with contextlib.suppress(OSError):
            self.finish()
