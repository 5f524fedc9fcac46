"""Exercises one file with random operations against a model of it in memory.

Every operation and every argument follows from the seed: the same seed and count repeat a failure.

    python -m tests.suites.fsx --seed 7 --operations 100000 /mnt/images/exercised

Sizes and contents are compared after each operation that shows them, the whole file at intervals, and, where
the path to the backing file is given, the same bytes there.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import mmap
import os
import random
import sys
import time
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path

MAX_SIZE = 1 << 20
MAX_LENGTH = 128 << 10
PAGE = mmap.PAGESIZE
BLOCK = 4096
CHECK_EVERY = 100
KEPT = 30

FALLOC_KEEP_SIZE = 0x01
FALLOC_PUNCH_HOLE = 0x02
FALLOC_ZERO_RANGE = 0x10

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class Difference(Exception):
    """The file is not what the model says; the message tells where, and how to repeat it."""


def fallocate(descriptor: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2); raises OSError."""
    if _libc.fallocate(descriptor, mode, offset, length):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


class Exerciser:
    """One file, its model, and the operations.

    `unsupported` names the operations that the file system refuses as such (EOPNOTSUPP, ENODEV).
    """

    def __init__(self, path: Path, seed: int, backing: Path | None = None, mapped: bool = True) -> None:
        self.path = path
        self.backing = backing
        self.seed = seed
        self.count: Counter[str] = Counter()
        self.unsupported: set[str] = set()
        self._random = random.Random(seed)
        self._model = bytearray()
        self._recent: deque[str] = deque(maxlen=KEPT)
        self._number = 0
        self._block = mmap.mmap(-1, MAX_LENGTH)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        self._direct = -1
        self._operations = self._choose(mapped)

    def _choose(self, mapped: bool) -> list[Callable[[], None]]:
        weights: dict[Callable[[], None], int] = {
            self._read: 12, self._write: 14, self._truncate: 4, self._truncate_path: 1, self._allocate: 3,
            self._punch: 4, self._zero: 4, self._copy: 4, self._reopen: 2, self._sync: 1, self._seek: 3,
            self._direct_read: 4, self._direct_write: 4, self._vector: 2,
        }  # fmt: skip
        if mapped:
            weights |= {self._map_read: 5, self._map_write: 6}
        return [operation for operation, weight in weights.items() for _ in range(weight)]

    def close(self) -> None:
        """Close the descriptors."""
        for descriptor in (self._descriptor, self._direct):
            if descriptor >= 0:
                os.close(descriptor)
        self._descriptor = self._direct = -1
        self._block.close()

    def run(self, operations: int) -> None:
        """Do this many operations; raises Difference, or OSError where an operation fails that may not."""
        for self._number in range(1, operations + 1):
            operation = self._random.choice(self._operations)
            name = operation.__name__.strip("_")
            try:
                operation()
                self.count[name] += 1
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.ENODEV):
                    raise OSError(error.errno, self._story(f"{name}: {error}")) from error
                self.unsupported.add(name)
            self._compare_size()
            if self._number % CHECK_EVERY == 0:
                self._compare_all()
        self._compare_all()

    # What is chosen

    def _range(self, limit: int) -> tuple[int, int]:
        """An offset and a length within `limit`, often aligned, often short; (0, 0) when there is none."""
        if limit <= 0:
            return 0, 0
        offset = self._random.randrange(limit)
        if self._random.random() < 0.3:
            offset -= offset % PAGE
        most = min(limit - offset, MAX_LENGTH if self._random.random() < 0.3 else 3 * PAGE)
        length = self._random.randint(1, most)
        if length > PAGE and self._random.random() < 0.3:
            length -= length % PAGE
        return offset, length

    def _aligned(self, limit: int) -> tuple[int, int]:
        blocks = limit // BLOCK
        if not blocks:
            return 0, 0
        first = self._random.randrange(blocks)
        return first * BLOCK, self._random.randint(1, min(blocks - first, MAX_LENGTH // BLOCK)) * BLOCK

    def _note(self, what: str, *numbers: int) -> None:
        self._recent.append(f"{self._number}: {what} {' '.join(map(str, numbers))}")

    # Operations

    def _read(self) -> None:
        offset, length = self._range(len(self._model) + PAGE)
        self._note("read", offset, length)
        self._expect("read", offset, os.pread(self._descriptor, length, offset), length)

    def _write(self) -> None:
        offset, length = self._range(MAX_SIZE)
        if offset > len(self._model) and self._random.random() < 0.7:
            offset = len(self._model)
            length = min(length, MAX_SIZE - offset)
        self._note("write", offset, length)
        data = self._random.randbytes(length)
        self._put_all(offset, os.pwrite(self._descriptor, data, offset), data)

    def _vector(self) -> None:
        offset, length = self._range(MAX_SIZE)
        self._note("writev", offset, length)
        data = self._random.randbytes(length)
        cut = self._random.randint(0, length)
        view = memoryview(data)
        self._put_all(offset, os.pwritev(self._descriptor, [view[:cut], view[cut:]], offset), data)

    def _truncate(self) -> None:
        size = self._size()
        self._note("truncate", size)
        os.ftruncate(self._descriptor, size)
        self._resize(size)

    def _truncate_path(self) -> None:
        size = self._size()
        self._note("truncate by path", size)
        os.truncate(self.path, size)
        self._resize(size)

    def _size(self) -> int:
        if self._random.random() < 0.2:
            return self._random.randint(0, MAX_SIZE)
        return max(0, min(MAX_SIZE, len(self._model) + self._random.randint(-8 * PAGE, 8 * PAGE)))

    def _allocate(self) -> None:
        offset, length = self._range(MAX_SIZE)
        keep = self._random.random() < 0.5
        self._note("fallocate keep" if keep else "fallocate", offset, length)
        fallocate(self._descriptor, FALLOC_KEEP_SIZE if keep else 0, offset, length)
        if not keep:
            self._resize(max(len(self._model), offset + length))

    def _punch(self) -> None:
        offset, length = self._range(len(self._model))
        if not length:
            return
        self._note("punch", offset, length)
        fallocate(self._descriptor, FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, offset, length)
        self._put(offset, bytes(length))

    def _zero(self) -> None:
        offset, length = self._range(MAX_SIZE)
        keep = self._random.random() < 0.5
        self._note("zero keep" if keep else "zero", offset, length)
        fallocate(self._descriptor, FALLOC_ZERO_RANGE | (FALLOC_KEEP_SIZE if keep else 0), offset, length)
        if keep:
            length = max(0, min(length, len(self._model) - offset))
        if length:
            self._put(offset, bytes(length))

    def _copy(self) -> None:
        source, length = self._range(len(self._model))
        target = self._random.randrange(MAX_SIZE - length) if length else 0
        length = min(length, abs(source - target))
        if not length:
            return
        self._note("copy_file_range", source, target, length)
        done = 0
        while done < length:
            copied = os.copy_file_range(
                self._descriptor, self._descriptor, length - done, source + done, target + done
            )
            if not copied:
                raise Difference(self._story(f"copy_file_range stopped at {done} of {length}"))
            done += copied
        self._put(target, self._model[source : source + length])

    def _reopen(self) -> None:
        self._note("close and open")
        os.close(self._descriptor)
        self._descriptor = os.open(self.path, os.O_RDWR)
        if self._direct >= 0:
            os.close(self._direct)
            self._direct = -1

    def _sync(self) -> None:
        self._note("fsync")
        (os.fsync if self._random.random() < 0.5 else os.fdatasync)(self._descriptor)

    def _seek(self) -> None:
        """What is told to be a hole must hold zeros, and data is never past the end."""
        offset = self._random.randrange(MAX_SIZE)
        self._note("seek", offset)
        size = len(self._model)
        try:
            hole = os.lseek(self._descriptor, offset, os.SEEK_HOLE)
        except OSError as error:
            if error.errno != errno.ENXIO or offset < size:
                raise
            return
        try:
            data = os.lseek(self._descriptor, hole, os.SEEK_DATA) if hole < size else size
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            data = size
        if not offset <= hole <= data <= size:
            raise Difference(self._story(f"hole at {hole}, data at {data}, size {size}"))
        if self._model.count(0, hole, data) != data - hole:
            raise Difference(self._story(f"a hole is told from {hole} to {data}, where there is data"))

    def _direct_descriptor(self) -> int:
        if self._direct < 0:
            try:
                self._direct = os.open(self.path, os.O_RDWR | os.O_DIRECT)
            except OSError as error:
                if error.errno == errno.EINVAL:
                    raise OSError(errno.EOPNOTSUPP, "no O_DIRECT here") from error
                raise
        return self._direct

    def _direct_read(self) -> None:
        offset, length = self._aligned(len(self._model))
        if not length:
            return
        self._note("direct read", offset, length)
        with memoryview(self._block) as view, view[:length] as part:
            done = os.preadv(self._direct_descriptor(), [part], offset)
            self._expect("direct read", offset, bytes(part[:done]), length)

    def _direct_write(self) -> None:
        offset, length = self._aligned(MAX_SIZE)
        self._note("direct write", offset, length)
        data = self._random.randbytes(length)
        with memoryview(self._block) as view, view[:length] as part:
            part[:] = data
            self._put_all(offset, os.pwritev(self._direct_descriptor(), [part], offset), data)

    def _map_read(self) -> None:
        offset, length = self._range(len(self._model))
        if not length:
            return
        self._note("map read", offset, length)
        start = offset - offset % PAGE
        end = offset + length
        with contextlib.closing(
            mmap.mmap(self._descriptor, end - start, mmap.MAP_SHARED, mmap.PROT_READ, offset=start)
        ) as mapping:
            self._expect("map read", offset, mapping[offset - start :], length)

    def _map_write(self) -> None:
        offset, length = self._range(MAX_SIZE)
        self._note("map write", offset, length)
        end = offset + length
        if end > len(self._model):
            os.ftruncate(self._descriptor, end)
            self._resize(end)
        data = self._random.randbytes(length)
        start = offset - offset % PAGE
        with contextlib.closing(mmap.mmap(self._descriptor, end - start, offset=start)) as mapping:
            mapping[offset - start : end - start] = data
            mapping.flush()
        self._put(offset, data)

    # The model

    def _resize(self, size: int) -> None:
        if size < len(self._model):
            del self._model[size:]
        else:
            self._model.extend(bytes(size - len(self._model)))

    def _put(self, offset: int, data: bytes | bytearray) -> None:
        self._resize(max(len(self._model), offset + len(data)))
        self._model[offset : offset + len(data)] = data

    def _put_all(self, offset: int, done: int, data: bytes) -> None:
        if done != len(data):
            raise Difference(self._story(f"{done} of {len(data)} bytes were written"))
        self._put(offset, data)

    def _expect(self, what: str, offset: int, found: bytes, length: int) -> None:
        wanted = self._model[offset : offset + length]
        if found == wanted:
            return
        if len(found) != len(wanted):
            raise Difference(self._story(f"{what} gave {len(found)} bytes and not {len(wanted)}"))
        first = next(index for index in range(len(wanted)) if found[index] != wanted[index])
        raise Difference(
            self._story(f"{what} differs at {offset + first}: {found[first]:#x} and not {wanted[first]:#x}")
        )

    def _compare_size(self) -> None:
        by_descriptor = os.fstat(self._descriptor).st_size
        by_path = os.stat(self.path).st_size
        if not by_descriptor == by_path == len(self._model):
            raise Difference(
                self._story(f"size {by_descriptor} by descriptor, {by_path} by path, not {len(self._model)}")
            )

    def _compare_all(self) -> None:
        self._expect("the whole file", 0, os.pread(self._descriptor, MAX_SIZE + 1, 0), MAX_SIZE + 1)
        if self.backing is not None:
            os.fsync(self._descriptor)
            self._expect("the backing file", 0, self.backing.read_bytes(), MAX_SIZE + 1)

    def _story(self, what: str) -> str:
        recent = "\n  ".join(self._recent)
        return f"{what}\nseed {self.seed}, operation {self._number}; the last were\n  {recent}"


def exercise(path: Path, seed: int, operations: int, backing: Path | None = None) -> Exerciser:
    """Run `operations` on a new file at `path`, and return what was done; raises Difference."""
    exerciser = Exerciser(path, seed, backing)
    try:
        exerciser.run(operations)
    finally:
        exerciser.close()
    return exerciser


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Exercise a file against a model in memory.")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--operations", type=int, default=100_000)
    parser.add_argument("--backing", type=Path, help="the same file, reached around the mount")
    parser.add_argument("path", type=Path)
    arguments = parser.parse_args()
    begun = time.monotonic()
    try:
        done = exercise(arguments.path, arguments.seed, arguments.operations, arguments.backing)
    except Difference as difference:
        print(difference, file=sys.stderr)
        return 1
    rate = arguments.operations / (time.monotonic() - begun)
    print(f"seed {arguments.seed}: {arguments.operations} operations, {rate:.0f}/s, no difference")
    print(", ".join(f"{name} {count}" for name, count in done.count.most_common()))
    if done.unsupported:
        print("not supported here:", ", ".join(sorted(done.unsupported)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
