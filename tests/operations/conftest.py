"""A mirror over a temporary directory, whose descriptors are counted."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pyfuse3
import pytest

from lockfs.channel.handles import HandleTable
from lockfs.keeper.policy import Policy
from lockfs.mirror.mirror import Mirror
from lockfs.mirror.modes import IoMode

from .fakes import Caller, FakeKeeper, FakeKernel

ROOT = pyfuse3.ROOT_INODE
FIELDS = ("mode", "uid", "gid", "size", "atime", "mtime", "ctime")


def open_descriptors() -> set[str]:
    """The descriptors that this process has open now."""
    return set(os.listdir("/proc/self/fd"))


@dataclass
class Bench:
    """A mirror and everything around it."""

    path: Path
    mirror: Mirror
    keeper: FakeKeeper
    kernel: FakeKernel
    handles: HandleTable
    me: Caller

    async def lookup(self, name: str | bytes, parent: int = ROOT) -> pyfuse3.EntryAttributes:
        """Look a name up as ourselves."""
        return await self.mirror.lookup(parent, os.fsencode(name), self.me)

    async def number(self, name: str | bytes, parent: int = ROOT) -> int:
        """The node number of a name, with one more lookup."""
        return (await self.lookup(name, parent)).st_ino

    def write(self, name: str, content: bytes = b"", mode: int = 0o644) -> Path:
        """Make a file below, past the mirror."""
        path = self.path / name
        path.write_bytes(content)
        path.chmod(mode)
        return path

    async def open(self, name: str, flags: int = os.O_RDONLY, caller: Caller | None = None) -> int:
        """Look up and open; returns the handle's number."""
        return (await self.mirror.open(await self.number(name), flags, caller or self.me)).fh

    async def setattr(self, number: int, fh: int | None = None, caller: Caller | None = None, **values: int):
        """SETATTR of the fields given: mode, uid, gid, size, atime_ns, mtime_ns."""
        wanted = pyfuse3.EntryAttributes()
        named = {field.removesuffix("_ns") for field in values}
        for field, value in values.items():
            setattr(wanted, f"st_{field}", value)
        fields = SimpleNamespace(**{f"update_{field}": field in named for field in FIELDS})
        return await self.mirror.setattr(number, wanted, fields, fh, caller or self.me)


@contextmanager
def fails(*numbers: int) -> Iterator[None]:
    """The block must end with a FUSEError of one of these numbers."""
    with pytest.raises(pyfuse3.FUSEError) as caught:
        yield
    told = errno.errorcode.get(caught.value.errno)
    assert caught.value.errno in numbers, f"{told} instead of {[errno.errorcode[n] for n in numbers]}"


@contextmanager
def mounted(store: Path) -> Iterator[Path]:
    """A directory `mounted` in the store, with a file system of its own mounted on it."""
    path = store / "mounted"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "none", path], check=False).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


@pytest.fixture
def io() -> IoMode:
    """The data mode of the mirror; modules and tests override it."""
    return IoMode.AUTO


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """The directory that is mirrored, open to everybody."""
    tmp_path.chmod(0o755)
    path = tmp_path / "store"
    path.mkdir()
    path.chmod(0o777)
    return path


@pytest.fixture(params=["local", "shared"])
def make_bench(store: Path, io: IoMode, request: pytest.FixtureRequest) -> Callable[..., Bench]:
    """Makes mirrors over the store, taken for a local file system and for one shared with other hosts."""

    def make(mode: IoMode = io, policy: Policy | None = None, passthrough: bool = True) -> Bench:
        kernel, handles, keeper = FakeKernel(passthrough), HandleTable(), FakeKeeper()
        descriptor = os.open(store, os.O_PATH | os.O_DIRECTORY)
        mirror = Mirror(descriptor, handles, kernel, io=mode, policy=policy or Policy(), host="thishost")
        os.close(descriptor)
        if request.param == "shared":
            mirror._store.local = mirror._store._looks_in_cache = False
        mirror.keeper = keeper
        return Bench(store, mirror, keeper, kernel, handles, Caller())

    return make


@pytest.fixture
async def bench(make_bench: Callable[..., Bench]) -> AsyncIterator[Bench]:
    """A mirror that must end as it began: no handle, no grant, no backing id, no descriptor left."""
    before = open_descriptors()
    made = make_bench()
    yield made
    await made.mirror.release_all()
    made.mirror.close()
    assert not made.keeper.grants
    assert not made.kernel.registered
    assert not len(made.handles)
    assert open_descriptors() == before
    assert os.umask(0o022) == 0o022
    assert (os.geteuid(), os.getegid()) == (made.me.uid, made.me.gid)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="changing identities needs root")
