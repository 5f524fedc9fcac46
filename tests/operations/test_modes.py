"""Who serves the data of which open."""

from __future__ import annotations

import errno
import itertools
import os

import pytest

from lockfs.channel.handles import (
    FOPEN_DIRECT_IO,
    FOPEN_KEEP_CACHE,
    FOPEN_NOFLUSH,
    FOPEN_PARALLEL_DIRECT_WRITES,
    FOPEN_PASSTHROUGH,
    Handle,
)
from lockfs.keeper.grants import Kind
from lockfs.mirror.modes import GUARDED, PASSED, SERVED, IoMode, choose

from .conftest import ROOT, Bench

KERNEL_FLAGS = FOPEN_DIRECT_IO | FOPEN_PASSTHROUGH | FOPEN_PARALLEL_DIRECT_WRITES


def mode_of(handle: Handle | None) -> int:
    """Who serves the handle's data; whether its closes are told besides is another matter."""
    assert handle is not None
    return handle.open_flags & ~FOPEN_NOFLUSH


class KernelRules:
    """The kernel's bookkeeping of one inode's opens (fs/fuse/iomode.c): `open` says whether it takes one."""

    def __init__(self) -> None:
        self.ids: dict[int, int] = {}

    def open(self, number: int, flags: int, backing_id: int) -> bool:
        """Enter an open; False where the opener would get EIO."""
        if flags & FOPEN_KEEP_CACHE or not flags & (FOPEN_DIRECT_IO | FOPEN_PASSTHROUGH):
            return False
        if not flags & FOPEN_PASSTHROUGH:
            return not self.ids
        if not backing_id or any(known != backing_id for known in self.ids.values()):
            return False
        self.ids[number] = backing_id
        return True

    def release(self, number: int) -> None:
        """Strike an open out."""
        self.ids.pop(number, None)


CASES = [
    (IoMode.AUTO, Kind.READER, False, PASSED),
    (IoMode.AUTO, Kind.LEASED, False, PASSED),
    (IoMode.AUTO, Kind.LEASED, True, GUARDED),
    (IoMode.AUTO, Kind.PROVISIONAL, True, SERVED),
    (IoMode.AUTO, Kind.MANAGED, False, SERVED),
    (IoMode.PASSTHROUGH, Kind.READER, False, PASSED),
    (IoMode.PASSTHROUGH, Kind.LEASED, False, PASSED),
    (IoMode.PASSTHROUGH, Kind.PROVISIONAL, False, SERVED),
    (IoMode.GUARDED, Kind.READER, False, PASSED),
    (IoMode.GUARDED, Kind.LEASED, False, GUARDED),
    (IoMode.GUARDED, Kind.MANAGED, False, SERVED),
    (IoMode.DAEMON, Kind.READER, False, SERVED),
    (IoMode.DAEMON, Kind.LEASED, False, SERVED),
]


@pytest.mark.parametrize(("mode", "kind", "may_yield", "flags"), CASES)
async def test_each_kind_of_open_in_each_mode(
    make_bench, mode: IoMode, kind: Kind, may_yield: bool, flags: int
) -> None:
    """A first open of each kind gets the data mode that the design names for it."""
    bench = make_bench(mode)
    bench.write("image")
    bench.keeper.kind, bench.keeper.may_yield = kind, may_yield
    fh = await bench.open("image", os.O_RDONLY if kind is Kind.READER else os.O_RDWR)
    handle = bench.handles.find(fh)
    assert mode_of(handle) == flags
    assert bool(handle.backing_id) == bool(flags & FOPEN_PASSTHROUGH)
    assert bool(bench.kernel.registered) == (mode is not IoMode.DAEMON)
    await bench.mirror.release_all()
    bench.mirror.close()


async def test_a_provisional_open_beside_passthrough_shares_its_id(bench: Bench) -> None:
    """With a passthrough open beside it, a handle without a lease is guarded; alone again, served."""
    bench.write("image")
    reader = await bench.open("image")
    bench.keeper.kind = Kind.PROVISIONAL
    guarded = await bench.open("image", os.O_RDWR)
    assert mode_of(bench.handles.find(guarded)) == GUARDED
    assert bench.handles.find(guarded).backing_id == bench.handles.find(reader).backing_id
    await bench.mirror.release(reader)
    await bench.mirror.release(guarded)
    served = await bench.open("image", os.O_RDWR)
    assert mode_of(bench.handles.find(served)) == SERVED
    again = await bench.open("image")
    assert mode_of(bench.handles.find(again)) == PASSED
    await bench.mirror.release_all()


async def test_no_order_of_opens_breaks_the_kernel_s_rules(bench: Bench) -> None:
    """Every order of opens and releases of all kinds is one that the kernel takes."""
    bench.write("image")
    number = await bench.number("image")
    kinds = [Kind.READER, Kind.LEASED, Kind.PROVISIONAL, Kind.MANAGED]
    for order in itertools.product(kinds, repeat=3):
        for keep in (True, False):
            rules, fhs = KernelRules(), []
            for kind in order:
                bench.keeper.kind = kind if kind is not Kind.READER else Kind.LEASED
                flags = os.O_RDONLY if kind is Kind.READER else os.O_RDWR
                handle = bench.handles.find((await bench.mirror.open(number, flags, bench.me)).fh)
                assert rules.open(handle.number, handle.open_flags, handle.backing_id), order
                fhs.append(handle.number)
                if not keep and len(fhs) == 2:
                    rules.release(fhs[0])
                    await bench.mirror.release(fhs.pop(0))
            for fh in fhs:
                await bench.mirror.release(fh)
    assert not bench.kernel.registered


async def test_without_passthrough_lockfs_serves_all(make_bench) -> None:
    """A kernel or a privilege without passthrough means direct I/O, and nothing is registered."""
    bench = make_bench(passthrough=False)
    bench.write("image")
    for flags in (os.O_RDONLY, os.O_RDWR):
        assert mode_of(bench.handles.find(await bench.open("image", flags))) == SERVED
    info, _ = await bench.mirror.create(ROOT, b"new", 0o644, os.O_RDWR | os.O_CREAT, bench.me)
    assert mode_of(bench.handles.find(info.fh)) == SERVED
    assert not bench.kernel.registered
    await bench.mirror.release_all()
    bench.mirror.close()


async def test_a_file_that_cannot_back_a_passthrough_is_served(bench: Bench, expect_log) -> None:
    """If the kernel refuses to register a file, its opens are served, and that is said once."""
    expect_log("WARNING lockfs.mirror: The kernel does not take '.*/a' as a backing file", 1)
    bench.kernel.refusal = OSError(errno.ELOOP, "Too many levels of symbolic links")
    for name in ("a", "b"):
        bench.write(name)
        for flags in (os.O_RDONLY, os.O_RDWR):
            assert mode_of(bench.handles.find(await bench.open(name, flags))) == SERVED
    await bench.mirror.release_all()
    bench.kernel.refusal = None
    assert mode_of(bench.handles.find(await bench.open("a"))) == PASSED
    await bench.mirror.release_all()


async def test_an_executing_open_reads_only_and_guards_a_later_writer(bench: Bench) -> None:
    """The description of an execution cannot write: a writer's lease lies on another one, and is guarded."""
    bench.write("program", b"#!", 0o755)
    executing = await bench.open("program", os.O_RDONLY | 0x20)
    writing = await bench.open("program", os.O_RDWR)
    first, second = (image.descriptor for _, image in bench.keeper.asked)
    assert first != second
    assert mode_of(bench.handles.find(executing)) == PASSED
    assert mode_of(bench.handles.find(writing)) == GUARDED
    assert bench.handles.find(writing).backing_id == bench.handles.find(executing).backing_id
    await bench.mirror.release_all()


async def test_unpassed_opens_are_counted_and_invalidated(bench: Bench) -> None:
    """Taking a lease drops cached pages of an image that is open outside pure passthrough, and only then."""
    bench.write("image")
    ask, number = bench.mirror.surroundings, await bench.number("image")
    passed = await bench.open("image", os.O_RDWR)
    assert not ask.wants_taken
    ask.taken(number)
    assert bench.kernel.invalidated == []
    bench.keeper.may_yield = True
    guarded = await bench.open("image", os.O_RDWR)
    assert ask.wants_taken
    ask.taken(number)
    assert bench.kernel.invalidated == [number]
    await bench.mirror.release(guarded)
    assert not ask.wants_taken
    await bench.mirror.release(passed)


def test_every_choice_is_one_of_three() -> None:
    """No combination yields flags that the kernel would refuse or that would cache pages."""
    for io, kind in itertools.product(IoMode, Kind):
        for bits in itertools.product((False, True), repeat=4):
            may_yield, registered, passing, locks_apart = bits
            flags = choose(
                io, kind, may_yield=may_yield, registered=registered, passing=passing, locks_apart=locks_apart
            )
            assert flags in (SERVED, GUARDED, PASSED)
            assert not flags & ~KERNEL_FLAGS
            assert registered or flags == SERVED


async def test_only_a_local_store_in_passthrough_is_spared_the_flush(make_bench) -> None:
    """A close is told wherever it may write back, or report that this failed."""
    for passthrough in (True, False):
        bench = make_bench(passthrough=passthrough)
        bench.write("image")
        handle = bench.handles.find(await bench.open("image"))
        spared = passthrough and bench.mirror._store.local
        assert bool(handle.open_flags & FOPEN_NOFLUSH) is spared
        await bench.mirror.release_all()
        bench.mirror.close()
