"""Answers to lockfsctl: what this mount is, and who holds which image."""

from __future__ import annotations

import errno
import logging
import os
import time
from dataclasses import asdict
from typing import Any, Protocol

import trio

import lockfs
from lockfs.backends.base import Backend, Holder, Image
from lockfs.channel.device import Device
from lockfs.channel.handles import HandleTable
from lockfs.errors import BackendError, ImageBusy, LockfsError, UsageError
from lockfs.guardian.upgrade import change_options
from lockfs.journal.memory import SharedMemory
from lockfs.keeper.grants import HeldImage
from lockfs.keeper.keeper import Keeper
from lockfs.keeper.openers import Opener, Role
from lockfs.linux import calls, proc
from lockfs.mount.options import MountOptions
from lockfs.mount.walk import inodes_below

Answer = dict[str, Any]


class Upgradable(Protocol):
    """What can be replaced by a newer version of the program."""

    def upgrade(self) -> None: ...


log = logging.getLogger("lockfs.mount")
REMOTE_MAX = 4096  # images of other hosts in one report
FENCE_S = 8.0
"""How long a request to fence waits for the end before it answers."""
BREAK_WAIT_S = 5.0
"""How long a request to free an image waits for a silent holder before it answers, seconds."""
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
        memory: SharedMemory | None = None,
        turn: Upgradable | None = None,
    ) -> None:
        self._options = options
        self._backend = backend
        self._keeper = keeper
        self._handles = handles
        self._device = device
        self._source_fd = source_fd
        self._since = time.time()
        self._memory = memory
        self._turn = turn

    async def answer(self, question: Answer) -> Answer:  # noqa: PLR0911  (one for each operation)
        """The answer to one request of the control socket.

        Raises:
            UsageError: a question that is not known.
        """
        operation = question.get("op")
        if operation == "status":
            return self._status()
        if operation == "upgrade":
            return self._upgrade(question.get("changed"))
        if operation == "who":
            path = question.get("path")
            if path is not None and not isinstance(path, str):
                raise UsageError("path must be text")
            return await self._who(path)
        if operation == "hosts":
            return await self._hosts()
        if operation == "fence":
            return await self._fence(question.get("path"))
        if operation == "break":
            return await self._break(question.get("path"), force=question.get("force") is True)
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
            "family": self._family(),
        }

    def _family(self) -> Answer | None:
        """The processes that keep the mount served; None if it ends with this one."""
        if self._memory is None or self._turn is None:
            return None
        header = self._memory.header
        return {
            "guardian": header.guardian_pid,
            "twin": header.twin_pid,
            "worker": header.worker_pid,
            "spare": header.spare_pid,
            "workers": header.turns,
        }

    def _upgrade(self, changed: object) -> Answer:
        """Have the next worker, of the program as it is installed, take over, with some options changed."""
        if self._turn is None or self._memory is None:
            raise UsageError("this mount ends with its process: unmount it and mount it anew")
        if isinstance(changed, dict) and changed:
            change_options(self._memory, changed)
        self._turn.upgrade()
        return {"workers": self._memory.header.turns}

    async def _hosts(self) -> Answer:
        return {"hosts": [asdict(peer) for peer in await self._backend.peers()]}

    async def _fence(self, path: object) -> Answer:
        """Fence one image, or all (None); what was open of it is dead when this answers that it is done."""
        inode = None
        if path is not None:
            if not isinstance(path, str):
                raise UsageError("path must be text")
            descriptor = await trio.to_thread.run_sync(self._open, path)
            inode = os.fstat(descriptor).st_ino
            os.close(descriptor)
        opens, done = 0, False
        with trio.move_on_after(FENCE_S):
            opens = await self._keeper.fence(inode)
            done = True
        return {"opens": opens, "done": done}

    async def _break(self, path: object, *, force: bool) -> Answer:
        """Take the lease of an image whose holder is dead, as the backend's own rules have it, and free it.

        `checked` are sentences about what was looked at; `waits`: the holder is silent, and in so many
        seconds it counts as dead: ask again, which waits as well.
        """
        if not isinstance(path, str):
            raise UsageError("path must be text")
        descriptor = await trio.to_thread.run_sync(self._open, path)
        try:
            image = Image(os.fstat(descriptor).st_ino, os.fsencode(path), descriptor)
            return await self._break_image(image, force=force)
        finally:
            os.close(descriptor)

    async def _break_image(self, image: Image, *, force: bool) -> Answer:
        if self._keeper.holds(image.inode):
            here = f"This mount has the lease of {image.name}: lockfsctl fence frees it."
            return {"checked": [here], "freed": False, "waits": None, "forcible": False}
        found = await self._backend.evidence(image)
        checked = list(found.sentences)
        if force and found.forcible:
            log.critical("image '%s': its lease is taken by force: %s", image.name, " ".join(checked))
            await self._backend.force(image)
            return {"checked": checked, "freed": True, "waits": None, "forcible": True}
        if found.dead_in_s:
            await trio.sleep(min(found.dead_in_s, BREAK_WAIT_S))
            return {"checked": checked, "freed": False, "waits": found.dead_in_s, "forcible": True}
        if found.free is not None:
            return {"checked": checked, "freed": found.free, "waits": None, "forcible": False}
        freed = False
        try:
            async with self._keeper.removing(image, Opener(proc.process_of(os.getpid()), 0, Role.ORDINARY)):
                freed = True
        except (ImageBusy, BackendError) as error:
            checked.append(str(error))
        if freed and found.forcible:
            log.error("image '%s': freed of its dead holder: %s", image.name, " ".join(checked))
        return {"checked": checked, "freed": freed, "waits": None, "forcible": found.forcible}

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
