"""The commands `lockfsctl init` and `lockfsctl dump`: lease areas prepared and looked at, without a mount."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import trio

from lockfs.cli import areas_table
from lockfs.cli.table import printable
from lockfs.errors import (
    EXIT_MOUNT,
    EXIT_OK,
    EXIT_SYSTEM,
    BackendError,
    LockfsError,
    SetupError,
    UsageError,
    exit_code_of,
)
from lockfs.linux import ofd
from lockfs.paxos.prepare import FIXED_AREAS, Plan, check_unused, write_plan
from lockfs.paxos.scan import READ_TIMEOUT_S, UNIT, scan
from lockfs.paxos.timing import IO_TIMEOUT_DEFAULT, IO_TIMEOUT_MAX, IO_TIMEOUT_MIN
from lockfs.records import sectors
from lockfs.records.describe import DescribedArea
from lockfs.records.geometry import GEOMETRIES, MIB, Geometry
from lockfs.storage.disk import DirectDisk

EXIT_DAMAGE = 1
LEASES_DEFAULT = sectors.INDEX_RESOURCES_DEFAULT
_SUFFIXES = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_NEW_FILE_MODE = 0o600


def add_commands(commands: argparse._SubParsersAction[Any]) -> None:
    """Add `init` and `dump` to the commands of lockfsctl."""
    init = commands.add_parser(
        "init",
        help="prepare a lease area",
        description="Prepares a file or device for the leases of one lockspace. Refuses one that is in use.",
        allow_abbrev=False,
    )
    init.add_argument("area", metavar="AREA", help="a file, made or made longer as needed, or a block device")
    init.add_argument("--lockspace", metavar="NAME", required=True, help="its name, up to 48 bytes")
    init.add_argument(
        "--leases",
        metavar="N",
        type=_whole,
        help=f"how many images can have a lease (default: {LEASES_DEFAULT}, on a device at most what fits)",
    )
    init.add_argument(
        "--sector", type=int, choices=(512, 4096), help="bytes in a sector (default: what the storage takes)"
    )
    init.add_argument(
        "--align",
        type=int,
        choices=(1, 2, 4, 8),
        help="MiB for each lease (default: 1 with sectors of 512, 8 with 4096: room for 2000 hosts)",
    )
    init.add_argument(
        "--io-timeout",
        metavar="S",
        type=_whole,
        default=IO_TIMEOUT_DEFAULT,
        help=f"seconds one I/O may take, 1 to {IO_TIMEOUT_MAX} (default: {IO_TIMEOUT_DEFAULT})",
    )
    dump = commands.add_parser(
        "dump",
        help="show what lies in a lease area",
        description="Shows every record of a lease area and points out damage. Never writes. "
        "The exit code is 1 if there is damage.",
        allow_abbrev=False,
    )
    dump.add_argument("area", metavar="AREA", help="a file or block device")
    dump.add_argument("--json", action="store_true", help="print JSON, for programs")
    dump.add_argument(
        "--offset",
        metavar="BYTES",
        type=byte_count,
        default=0,
        help="where to begin; K, M, G and T may follow",
    )


def _whole(word: str) -> int:
    if not (word.isascii() and word.isdigit()):
        raise argparse.ArgumentTypeError(f"{word!r} is no whole number")
    return int(word)


def byte_count(word: str) -> int:
    """A number of bytes, K, M, G or T being its thousand and twenty-four, and so on.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    factor = _SUFFIXES.get(word[-1:].upper(), 1)
    return _whole(word[:-1] if factor > 1 else word) * factor


def _run(command: Callable[[argparse.Namespace], Awaitable[int]], arguments: argparse.Namespace) -> int:
    """Run `init` or `dump`; returns the exit code: 0, 1 wrong usage or damage, 2 it could not be done."""
    try:
        return trio.run(command, arguments)
    except (LockfsError, OSError) as error:
        print(f"lockfsctl: {printable(error)}", file=sys.stderr)
        code = exit_code_of(error)
        return EXIT_SYSTEM if code == EXIT_MOUNT else code


# --- init


async def _init(arguments: argparse.Namespace) -> int:
    name = _space_name(arguments.lockspace)
    if not IO_TIMEOUT_MIN <= arguments.io_timeout <= IO_TIMEOUT_MAX:
        raise UsageError(f"--io-timeout must be within {IO_TIMEOUT_MIN} and {IO_TIMEOUT_MAX} seconds.")
    shapes = _shapes(arguments.sector, arguments.align)
    if arguments.leases is not None:
        _check_leases(arguments.leases, shapes)
    with _made_if_missing(arguments.area) as keep:
        async with _opened(arguments.area, writable=True) as disk, contextlib.AsyncExitStack() as claims:
            plan = await _plan(arguments, disk, shapes, name)
            claims.enter_context(_claimed(arguments.area, is_device=disk.is_device))
            await check_unused(disk, await disk.size(READ_TIMEOUT_S), plan)
            if not disk.is_device:
                await trio.to_thread.run_sync(_lengthen, arguments.area, plan.size)
            keep()
            await write_plan(disk, plan)
    print(
        f"{printable(arguments.area)} now has lockspace {printable(arguments.lockspace)} for "
        f"{plan.shape.hosts_max} hosts and room for {plan.leases} leases ({plan.shape})."
    )
    return EXIT_OK


def _space_name(word: str) -> bytes:
    name = os.fsencode(word)
    if not name or len(name) > sectors.NAME_BYTES:
        raise UsageError(f"--lockspace must be a name of 1 to {sectors.NAME_BYTES} bytes.")
    return name


def _shapes(sector: int | None, align: int | None) -> list[Geometry]:
    """The geometries that fit what was asked for, the usual one of each sector size last."""
    shapes = [
        shape
        for shape in GEOMETRIES
        if sector in (None, shape.sector_size) and align in (None, shape.area_size // MIB)
    ]
    if not shapes:
        raise UsageError(f"--align {align} does not go with --sector {sector}; with 512 it can only be 1.")
    return shapes


def _check_leases(leases: int, shapes: list[Geometry]) -> None:
    most = max(shape.index_resources_max for shape in shapes)
    if not 0 < leases <= most:
        raise UsageError(f"--leases must be within 1 and {most} for this geometry.")


async def _plan(arguments: argparse.Namespace, disk: DirectDisk, shapes: list[Geometry], name: bytes) -> Plan:
    """With the smallest sectors that the storage takes and, of these, the largest areas."""
    fitting = [shape for shape in shapes if shape.sector_size >= disk.sector_size]
    if not fitting:
        raise UsageError(f"The storage of {disk.name} needs --sector {disk.sector_size}; leave --sector out.")
    smallest = min(shape.sector_size for shape in fitting)
    shape = max((one for one in fitting if one.sector_size == smallest), key=lambda one: one.area_size)
    leases = arguments.leases
    if leases is not None:
        _check_leases(leases, [shape])
    elif disk.is_device:
        room = await disk.size(READ_TIMEOUT_S) // shape.area_size - FIXED_AREAS
        leases = max(1, min(room, LEASES_DEFAULT))
    else:
        leases = LEASES_DEFAULT
    plan = Plan(shape, name, arguments.io_timeout, leases)
    if disk.is_device and await disk.size(READ_TIMEOUT_S) < plan.size:
        has, needs = await disk.size(READ_TIMEOUT_S) // MIB, plan.size // MIB
        problem = f"it has {has} MiB, and {leases} leases need {needs} MiB"
        raise BackendError(f"{disk.name} is too small: {problem}.")
    return plan


@contextlib.contextmanager
def _made_if_missing(path: str) -> Iterator[Callable[[], None]]:
    """Have a file at `path`; one that was made is removed again unless the function given was called."""
    kept = False

    def keep() -> None:
        nonlocal kept
        kept = True

    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _NEW_FILE_MODE)
        try:
            os.ftruncate(descriptor, UNIT)  # its sectors cannot be told of an empty file
        finally:
            os.close(descriptor)
    except FileExistsError:
        kept = True
    except OSError as error:
        raise SetupError(f"{path} cannot be made: {os.strerror(error.errno or errno.EIO)}.") from error
    try:
        yield keep
    finally:
        if not kept and os.stat(path).st_size == UNIT:
            os.unlink(path)


@contextlib.contextmanager
def _claimed(path: str, *, is_device: bool) -> Iterator[None]:
    """Hold the device or file for the block as its users do, so that it is nobody else's.

    A device as a file system or a mapping would; a file by a lock on all of it, which those of a virtual
    machine keep from being had, and another init's.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_EXCL if is_device else 0))
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        problem = "it is mounted, a swap area, or a part of a volume group, array or other device"
        raise BackendError(f"{path} is in use by this system: {problem}. Nothing was changed.") from None
    try:
        if not (is_device or _locked(descriptor)):
            problem = "another program has locks on it, as a virtual machine has on its disk"
            raise BackendError(f"{path} is in use: {problem}. Nothing was changed.")
        yield
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    try:
        return ofd.try_lock(descriptor, ofd.WRITE, 0, 0)
    except OSError:
        return True  # storage without locks, which is what the leases may be for


def _lengthen(path: str, size: int) -> None:
    """Make the file at least `size` bytes long, without using room for it, and see that it stays so."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        if os.fstat(descriptor).st_size < size:
            os.ftruncate(descriptor, size)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    folder = os.open(os.path.dirname(os.path.realpath(path)), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


# --- dump


async def _dump(arguments: argparse.Namespace) -> int:
    async with _opened(arguments.area, writable=False) as disk:
        size = await disk.size(READ_TIMEOUT_S)
        start = arguments.offset
        if start % UNIT:
            raise UsageError(f"--offset must be a multiple of {UNIT}.")
        if start + UNIT > size:
            problem = "too short for a lease area" if size < UNIT else f"nothing begins at byte {start}"
            raise BackendError(f"{disk.name} is {size} bytes long: {problem}.")
        found = await scan(disk, size, start=start)
    if arguments.json:
        print(json.dumps(_as_json(arguments.area, size, found), indent=2))
    else:
        print(areas_table.report(found, size - start))
    return EXIT_DAMAGE if any(area.damage for area in found) else EXIT_OK


def _as_json(path: str, size: int, found: list[DescribedArea]) -> dict[str, Any]:
    damaged = any(area.damage for area in found)
    return {"area": path, "size": size, "damaged": damaged, "areas": [asdict(area) for area in found]}


@contextlib.asynccontextmanager
async def _opened(path: str, *, writable: bool) -> AsyncIterator[DirectDisk]:
    disk = await DirectDisk.open(path, writable=writable)
    try:
        yield disk
    finally:
        await disk.close()


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "init": partial(_run, _init),
    "dump": partial(_run, _dump),
}
"""What lockfsctl calls with its arguments, for an exit code."""
