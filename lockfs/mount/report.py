"""Answers to lockfsctl: what this mount is, and who holds which image."""

from __future__ import annotations

import errno
import os
import time
from dataclasses import asdict
from typing import Any

import trio

import lockfs
from lockfs.backends.base import Backend, Holder, Image
from lockfs.channel.device import Device
from lockfs.channel.handles import HandleTable
from lockfs.errors import BackendError, LockfsError, UsageError
from lockfs.keeper.grants import HeldImage
from lockfs.keeper.keeper import Keeper
from lockfs.linux import calls
from lockfs.mount.options import MountOptions
from lockfs.mount.walk import inodes_below

Answer = dict[str, Any]
REMOTE_MAX = 4096  # images of other hosts in one report
COLLECT_S = 6.0
"""How long one request to remove leases works before it answers; whoever asked asks again."""


class Report:
    """Reads the keeper's books for the control socket; changes nothing."""

    def __init__(  # noqa: PLR0917  (the parts of a mount)
        self,
        options: MountOptions,
        backend: Backend,
        keeper: Keeper,
        handles: HandleTable,
        device: Device,
        source_fd: int,
    ) -> None:
        self._options = options
        self._backend = backend
        self._keeper = keeper
        self._handles = handles
        self._device = device
        self._source_fd = source_fd
        self._since = time.time()

    async def answer(self, question: Answer) -> Answer:
        """The answer to one request of the control socket.

        Raises:
            UsageError: a question that is not known.
        """
        operation = question.get("op")
        if operation == "status":
            return self._status()
        if operation == "who":
            path = question.get("path")
            if path is not None and not isinstance(path, str):
                raise UsageError("path must be text")
            return await self._who(path)
        if operation == "hosts":
            return await self._hosts()
        if operation == "gc":
            return await self._collect()
        raise UsageError(f"there is no operation {operation!r}")

    def _status(self) -> Answer:
        return {
            "mountpoint": self._options.mountpoint,
            "source": self._options.source,
            "backend": self._options.backend,
            "io": self._options.io.value,
            "passthrough": self._device.passthrough,
            "pid": os.getpid(),
            "host": self._options.host,
            "version": lockfs.__version__,
            "since": self._since,
            "images": len(self._keeper.images()),
            "handles": len(self._handles),
        }

    async def _hosts(self) -> Answer:
        return {"hosts": [asdict(peer) for peer in await self._backend.peers()]}

    async def _collect(self) -> Answer:
        """Remove leases of images that are gone, as far as that goes within COLLECT_S."""
        there = await trio.to_thread.run_sync(inodes_below, self._source_fd)
        removed, done = await self._backend.collect(
            lambda inode: inode not in there, trio.current_time() + COLLECT_S
        )
        return {"removed": removed, "done": done}

    async def _who(self, path: str | None) -> Answer:
        mine = [self._local(image) for image in self._keeper.images()]
        if path is None:
            return {"images": mine + await self._elsewhere()}
        inode, name, holders = await self._others(path)
        found = [image for image in mine if image["inode"] == inode]
        found += [_remote(inode, name, holder) for holder in holders]
        return {"images": found}

    async def _elsewhere(self) -> list[Answer]:
        """What other hosts hold, as far as they left a name and the storage confirms it."""
        found = []
        for path in (await self._backend.known_paths())[:REMOTE_MAX]:
            try:
                inode, name, holders = await self._others(os.fsdecode(path))
            except LockfsError:
                continue
            found += [_remote(inode, name, holder) for holder in holders]
        return found

    def _local(self, image: HeldImage) -> Answer:
        return {
            "path": image.name,
            "inode": image.inode,
            "mode": image.mode.value if image.mode else None,
            "state": image.state,
            "host": self._options.host,
            "since": image.since,
            "openers": [
                {"pid": pid, "program": program, "kind": kind} for pid, program, kind in image.openers
            ],
            "remote": False,
        }

    async def _others(self, path: str) -> tuple[int, str, list[Holder]]:
        descriptor = await trio.to_thread.run_sync(self._open, path)
        try:
            image = Image(os.fstat(descriptor).st_ino, os.fsencode(path), descriptor)
            return image.inode, image.name, await self._keeper.others(image)
        except BackendError as error:
            raise LockfsError(str(error)) from error
        finally:
            os.close(descriptor)

    def _open(self, path: str) -> int:
        """Open a file of the store to ask about its locks; a path never leads out of the store."""
        resolve = calls.RESOLVE_BENEATH | calls.RESOLVE_NO_SYMLINKS
        try:
            relative = os.fsencode(path).lstrip(b"/")
            return calls.openat2(self._source_fd, relative, os.O_RDONLY | os.O_NONBLOCK, 0, resolve)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.EXDEV):
                raise UsageError(f"{path}: {error.strerror}") from error
            raise LockfsError(f"{path}: {error.strerror}") from error


def _remote(inode: int, name: str, holder: Holder) -> Answer:
    owner = holder.owner
    opener = [{"pid": owner.pid, "program": owner.program, "kind": holder.description}] if owner else []
    return {
        "path": name,
        "inode": inode,
        "mode": holder.mode.value,
        "state": "held",
        "host": owner.host if owner else None,
        "since": owner.since if owner else None,
        "openers": opener or [{"pid": None, "program": holder.description, "kind": holder.description}],
        "remote": True,
    }
