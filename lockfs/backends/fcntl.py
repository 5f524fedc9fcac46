"""The backend that takes leases as file locks on the storage: network and cluster file systems, or one host.

Locks sit on the image's own descriptor (see image_locks for the bytes), the one that backs the passthrough:
the kernel keeps them for as long as the data path lives, also when lockfs is killed. Where `lock_dir` is
set, virtlockd's lock file for the image is locked besides (see virtlockd); that lock lives only as long as
the processes that share its descriptor. What the next worker must know is noted before each step.

A lease names an inode, not a path: an image whose name was given to another file meanwhile is still the
image that the lease guards, so the name is not looked at again after locking.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import secrets
from collections.abc import Callable, Iterable
from typing import TypeVar

import trio

from lockfs.backends import bound, image_locks, sightings
from lockfs.backends.base import (
    Backend,
    Evidence,
    Forgetful,
    Holder,
    Image,
    Lease,
    LeaseEvent,
    LeaseState,
    Memory,
    Mode,
    Owner,
)
from lockfs.backends.fcntl_options import FcntlOptions
from lockfs.backends.file_lease import FcntlLease, Looks, probe_all, still_ours
from lockfs.backends.former_locks import FormerLocks
from lockfs.backends.owners import OwnerRecords
from lockfs.backends.remembered import Ledger, Stage
from lockfs.backends.requests import Requests
from lockfs.backends.state import StateDirectory
from lockfs.backends.storecheck import check_store
from lockfs.backends.virtlockd import LockDirectory, LockFile
from lockfs.errors import BackendError, ImageBusy, SetupError
from lockfs.linux import calls

LOCK_THREADS = 16
PROBE_S = 5.0
"""From one look at whether this kernel still knows the locks to the next, seconds."""
PATIENCE_S = 600.0
"""How long such a write waits, seconds: a server that is away makes everybody wait anyway."""
_HOST_CHARS_MAX = 64

_T = TypeVar("_T")
_log = logging.getLogger(__name__)


class _LeaseBroken(BackendError):
    """A conversion failed half-way and the old locks could not be had back."""


class FcntlBackend(Backend):
    """Leases by open-file-description locks, taken on worker threads, or at once where that cannot wait.

    It cannot on a local file system (calls.in_memory): its locks are a list in this kernel's memory, and an
    owner record used a moment ago is a page of it.
    """

    name = "fcntl"
    patience = PATIENCE_S

    def __init__(
        self, options: FcntlOptions, store_fd: int, host: str, *, instance: bytes | None = None
    ) -> None:
        """`store_fd` is the store's root (O_PATH suffices), kept open by the caller until after `stop`.

        `instance` names this mount's files in the store's state directory; it must differ from that of every
        other mount of the store. The default is the host's name and a random number.
        """
        if instance is None:
            safe = re.sub(r"[^A-Za-z0-9-]", "_", host)[:_HOST_CHARS_MAX]
            instance = f"{safe}-{secrets.token_hex(6)}".encode()
        self._options = options
        self._instance = instance
        self._parties = image_locks.Parties(options.virtlockd, options.qemu)
        self._store_fd = store_fd
        self._host = host
        self._local = calls.in_memory(store_fd)
        self._looks = None if self._local else Looks.at_store(store_fd)
        self._name_files(instance)
        self._ledger = Ledger(Forgetful())
        self._succeeds = False
        self._lock_files: LockDirectory | None = None
        self._former = FormerLocks(self._ledger, self._parties, self._records, None, self._looks)
        self._leases: dict[int, FcntlLease] = {}
        self._limiter = trio.CapacityLimiter(LOCK_THREADS)
        self._on_change: LeaseEvent = lambda lease: None

    def _name_files(self, instance: bytes) -> None:
        state = StateDirectory(self._store_fd)
        self._records = OwnerRecords(state, instance)
        self._requests = Requests(state, instance)

    async def start(self, on_change: LeaseEvent, memory: Memory | None = None) -> None:
        """Check the store's locks and open the lock directory; raises SetupError. See Backend.start."""
        self._on_change = on_change
        self._ledger = Ledger(Forgetful() if memory is None else memory)
        instance, self._succeeds = self._ledger.instance(self._instance)
        self._name_files(instance)
        await self._in_thread(self._prepare)
        self._former = FormerLocks(self._ledger, self._parties, self._records, self._lock_files, self._looks)

    def _prepare(self) -> None:
        if not self._succeeds:
            check_store(self._store_fd)
        if self._options.lock_dir is None:
            return
        if self._options.lock_path is None:
            raise SetupError("lock_dir= also needs lock_path=, the store's path as the other hosts write it.")
        try:
            self._lock_files = LockDirectory(self._options.lock_dir, self._options.lock_path)
        except OSError as error:
            raise SetupError(
                f"The lock directory {self._options.lock_dir} cannot be opened: {error.strerror}; "
                "lock_dir= must name virtlockd's lockspace directory, shared by all hosts."
            ) from error

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Ask the storage again and again whether it still knows the locks of the leases that are held.

        A look that comes after the last one had run out is told as a change: somebody may wait for it.
        """
        task_status.started()
        limiter = trio.CapacityLimiter(1)  # a storage that hangs must not take the threads of the others
        while True:
            await trio.sleep(self._looks.every_s if self._looks is not None else PROBE_S)
            held = [lease for lease in self._leases.values() if lease.state is LeaseState.HELD]
            if not held:
                continue
            found = await trio.to_thread.run_sync(probe_all, held, limiter=limiter, abandon_on_cancel=True)
            for lease, reason in found.lost:
                if self._holds(lease):
                    _log.error("%s: the storage has dropped its locks: %s", lease.image.name, reason)
                    lease.state = LeaseState.LOST
                    self._note(lease, Stage.ENDING)
                    self._on_change(lease)
            for lease in found.shown_again:
                if self._holds(lease) and lease.in_time():
                    self._on_change(lease)

    def _holds(self, lease: FcntlLease) -> bool:
        return lease.state is LeaseState.HELD and self._leases.get(lease.image.inode) is lease

    async def stop(self) -> None:
        """Close the lock directory and remove what is left of the owner records."""
        if self._succeeds:
            await self._in_thread(self._records.adopt)
        await self._in_thread(self._records.clear)
        if self._lock_files is not None:
            self._lock_files.close()
            self._lock_files = None

    @property
    def binds(self) -> bool:
        """See Backend.binds."""
        return self._looks is not None and self._looks.binds

    def bind(self, descriptor: int) -> None:
        """See Backend.bind."""
        if self.binds:
            bound.bind(descriptor)

    async def acquire(self, image: Image, mode: Mode, owner: Owner, deadline: float) -> FcntlLease:
        """Take the lease in one attempt; see Backend.acquire. A lock call has no deadline of its own.

        An EXCLUSIVE lease needs a descriptor open for writing.
        """
        if image.inode in self._leases:  # a failed second attempt would drop the first one's locks
            raise BackendError(f"{image.name} is already leased by this mount.")
        await self._former.settle(image.inode)
        # No checkpoint after the thread returned: cancelled means that it never ran.
        lease = self._locked(image, mode, owner) if self._instant else None
        if lease is None:
            lease = await self._in_thread(self._acquire, image, mode, owner)
        else:
            await self._record(lease)
        self._leases[image.inode] = lease
        return lease

    @property
    def _instant(self) -> bool:
        """Whether taking and dropping the locks waits for nothing."""
        return self._local and self._lock_files is None

    async def _record(self, lease: FcntlLease) -> None:
        """Tell who has just got a lease; cancelled, it is given back."""
        image, owner = lease.image, lease.owner
        if lease.mode is Mode.EXCLUSIVE and self._records.write_at_once(image.inode, owner, image.path):
            return
        try:
            await self._in_thread(self._records.write, image.inode, lease.mode, owner, image.path)
        except BaseException:
            self._give_back(lease)
            raise

    async def convert(self, lease: Lease, mode: Mode, deadline: float) -> None:
        """Change the mode; see Backend.convert. If the old locks cannot be kept the lease is LOST."""
        held = _ours(lease)
        if held.mode is mode:
            return
        try:
            await self._in_thread(self._convert, held, mode)
        except _LeaseBroken:
            held.state = LeaseState.LOST
            self._note(held, Stage.ENDING)
            self._on_change(held)
            raise

    async def release(self, lease: Lease) -> None:
        """Drop every lock; see Backend.release.

        Raises:
            BackendError: a step failed; what could be given back was, and closing the image's descriptor
                gives back the rest.
        """
        held = _ours(lease)
        if held.state is LeaseState.RELEASED:
            return
        self._note(held, Stage.ENDING)
        try:
            at_once = self._instant and held.mode is Mode.EXCLUSIVE
            if at_once and self._records.remove_at_once(held.image.inode):
                self._give_back(held)
            else:
                await self._in_thread(self._release, held)
        finally:
            held.state = LeaseState.RELEASED
            self._leases.pop(held.image.inode, None)

    async def holders(self, image: Image) -> list[Holder]:
        """Everybody else who is in the way of an EXCLUSIVE lease; see Backend.holders.

        Works on a descriptor that is open for reading only.
        """
        await self._former.settle(image.inode)
        lease = self._leases.get(image.inode)
        if lease is None:
            return await self._in_thread(self._look, image, image.descriptor, None)
        # Our own locks are no conflict only for the descriptions that carry them. Duplicates are of those,
        # and stay valid if the lease ends while the thread looks.
        fd = os.dup(lease.image.descriptor)
        held = None
        try:
            if lease.lock_file is not None:
                held = os.dup(lease.lock_file.descriptor)
            return await self._in_thread(self._look, image, fd, held)
        finally:
            os.close(fd)
            if held is not None:
                os.close(held)

    async def evidence(self, image: Image) -> Evidence:
        """Who has locks, and that only the storage can end them."""
        holders = await self.holders(image)
        if not holders:
            return Evidence(("No other host has locks on the image.",), free=True)
        return Evidence(
            (
                f"The image is locked by {', '.join(map(str, holders))}.",
                "File locks cannot be broken from here. The storage keeps them for as long as it takes their "
                "host for alive; an NFS server drops those of a client that is silent for its lease time "
                "(90 s, mostly), or when told to (/proc/fs/nfsd/clients/*/ctl).",
            ),
            free=False,
        )

    async def known_paths(self) -> list[bytes]:
        """Paths from the owner records of all hosts."""
        return await self._in_thread(self._records.paths)

    async def request(self, image: Image, owner: Owner) -> None:
        """Ask for the image; a request lives on only while this is repeated (see requests)."""
        await self._in_thread(self._requests.send, image.inode, owner, trio.current_time())

    async def withdraw(self, image: Image, owner: Owner) -> None:
        """Take the request back."""
        await self._in_thread(self._requests.withdraw, image.inode)

    async def requested(self, held: Iterable[int]) -> set[int]:
        """Those of the inodes `held` that a living host asks for."""
        return await self._in_thread(self._requests.asked_for, frozenset(held), trio.current_time())

    # What a former worker left

    async def recall(self, image: Image, mode: Mode, owner: Owner) -> FcntlLease | None:
        """The lease whose locks are still on the image's descriptor; see Backend.recall."""
        found = await self._former.find_again(image)
        if found is None:
            return None
        lease = FcntlLease(
            image, found.mode, owner, device=found.device, looks=self._looks, lock_file=found.lock_file
        )
        self._note(lease, Stage.HELD)
        self._leases[image.inode] = lease
        return lease

    async def settle(self) -> None:
        """Drop the locks that nobody recalled; see Backend.settle."""
        await self._former.settle_all()

    def _note(self, lease: FcntlLease, stage: Stage) -> None:
        """Remember how far the lease has come. What the note must not lose: the lock file's descriptor.

        Until the lock is had the descriptor is not named: then the next worker's sweep closes it.
        """
        image, file = lease.image, lease.lock_file
        facts: dict[str, object] = {"image": image.descriptor, "device": lease.device}
        if self._lock_files is not None:
            facts["file"] = self._lock_files.name_of(image.path).decode()
        if file is not None:
            facts["fd"] = [file.descriptor]
        self._ledger.note(image.inode, stage, lease.mode, **facts)

    async def _in_thread(self, work: Callable[..., _T], *arguments: object) -> _T:
        return await trio.to_thread.run_sync(work, *arguments, limiter=self._limiter)

    # What follows runs on worker threads, or at once where `_instant` says that it may.

    def _acquire(self, image: Image, mode: Mode, owner: Owner) -> FcntlLease:
        lease = self._locked(image, mode, owner)
        if lease is None:
            raise self._busy(image, None)
        self._records.write(image.inode, mode, owner, image.path)
        return lease

    def _locked(self, image: Image, mode: Mode, owner: Owner) -> FcntlLease | None:
        """A lease whose locks are had, but which nobody was told of; None if somebody is in the way."""
        _check_descriptor(image, mode)
        device = os.fstat(image.descriptor).st_dev
        lease = FcntlLease(image, mode, owner, device=device, looks=self._looks)
        self._note(lease, Stage.TAKING)
        taken = False
        try:
            if self._take(lease):
                self._note(lease, Stage.HELD)
                taken = True
        except OSError as error:
            raise _failed(image, "locked", error) from error
        finally:
            if not taken:
                self._give_back(lease)
        return lease if taken else None

    def _take(self, lease: FcntlLease) -> bool:
        image = lease.image
        if not image_locks.take(image.descriptor, lease.mode, self._parties):
            return False
        if self._lock_files is not None:
            lease.lock_file = self._lock_files.take(image.path, lease.mode)
            if lease.lock_file is None:
                return False
        return self._looks is None or self._is_known(lease, self._looks)

    def _is_known(self, lease: FcntlLease, looks: Looks) -> bool:
        """Whether the server knows the locks that were just granted: a client that was away may have granted
        them by itself, and a server that was away so late that the look made before counts no more.
        """
        if looks.binds or not lease.in_time():
            look = looks.now()
            if not still_ours(looks, lease.image.descriptor, lease.mode):
                return False
            lease.saw_locks(look)
        return True

    def _release(self, lease: FcntlLease) -> None:
        self._records.remove(lease.image.inode, lease.mode)
        with lease.mutex:
            lease.ended = True
            self._give_back(lease)

    def _give_back(self, lease: FcntlLease) -> None:
        """Drop all locks, the second also if the first fails; raises BackendError."""
        problem: OSError | None = None
        if lease.lock_file is not None:
            lock_file, lease.lock_file = lease.lock_file, None
            try:
                # The note first, without the descriptor, whose number is free when it is closed.
                lock_file.give_back(lambda: self._note(lease, Stage.ENDING))
            except OSError as error:
                problem = error
        try:
            image_locks.drop(lease.image.descriptor)
        except OSError as error:
            problem = error
        self._ledger.forget(lease.image.inode)
        if problem is not None:
            raise _failed(lease.image, "unlocked wholly", problem) from problem

    def _convert(self, lease: FcntlLease, mode: Mode) -> None:
        image, old = lease.image, lease.mode
        _check_descriptor(image, mode)
        changed = False
        with lease.mutex:
            self._note(lease, Stage.CONVERTING)
            try:
                changed = self._change(lease, mode)
            except OSError as error:
                raise _failed(image, "relocked", error) from error
            finally:
                if not changed:
                    self._restore(lease)
            if changed:
                lease.mode = mode
            self._note(lease, Stage.HELD)
        if not changed:
            raise self._busy(image, lease.lock_file)
        self._records.write(image.inode, mode, lease.owner, image.path)
        self._records.remove(image.inode, old)

    def _change(self, lease: FcntlLease, mode: Mode) -> bool:
        """Strengthen in the order of taking; weaken in the reverse, so that no gap opens for another host."""
        fd, lock_file = lease.image.descriptor, lease.lock_file
        if mode is Mode.EXCLUSIVE:
            taken = image_locks.take(fd, mode, self._parties)
            return taken and (lock_file is None or lock_file.convert(mode))
        if lock_file is not None and not lock_file.convert(mode):
            return False
        image_locks.narrow(fd, self._parties)
        return True

    def _restore(self, lease: FcntlLease) -> None:
        """Have the locks of the lease's mode again after a change that failed half-way."""
        fd, lock_file = lease.image.descriptor, lease.lock_file
        kept = True
        try:
            if lease.mode is Mode.EXCLUSIVE:
                kept = image_locks.take(fd, lease.mode, self._parties)
            else:
                image_locks.narrow(fd, self._parties)
            if lock_file is not None:
                kept = lock_file.convert(lease.mode) and kept
        except OSError as error:
            raise _LeaseBroken(f"The locks of {lease.image.name} are lost: {error.strerror}.") from error
        if not kept:
            raise _LeaseBroken(f"The locks of {lease.image.name} are lost: another host took them.")

    def _busy(self, image: Image, lock_file: LockFile | None) -> ImageBusy:
        held = None if lock_file is None else lock_file.descriptor
        holders = self._look(image, image.descriptor, held)
        names = ", ".join(str(holder) for holder in holders) or "another host, which let go meanwhile"
        return ImageBusy(f"{image.name} is held by {names}.")

    def _look(self, image: Image, fd: int, held: int | None) -> list[Holder]:
        try:
            found = sightings.lockfs_holders(fd, image.inode, self._records, self._host)
            if found:
                return found  # the other bytes are, or may be, theirs
            found = sightings.parties_on_bytes(fd, self._parties, self._host)
            conflict = self._lock_files and self._lock_files.locked_by(image.path, held)
            return [*found, sightings.on_lock_byte(conflict, self._host)] if conflict else found
        except OSError as error:
            raise _failed(image, "asked for locks", error) from error


def _ours(lease: Lease) -> FcntlLease:
    if not isinstance(lease, FcntlLease):
        raise TypeError("the lease was granted by another backend")
    return lease


def _check_descriptor(image: Image, mode: Mode) -> None:
    """Write locks need a descriptor open for writing (fcntl(2), EBADF otherwise)."""
    if mode is Mode.EXCLUSIVE and fcntl.fcntl(image.descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise BackendError(f"{image.name} cannot be held exclusively: it can only be opened for reading.")


def _failed(image: Image, what: str, error: OSError) -> BackendError:
    reason = error.strerror or str(error)
    if error.filename is not None:
        reason += f" (lock file {os.fsdecode(error.filename)})"
    if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP):
        reason += "; the storage has no lock manager"
    return BackendError(f"{image.name} could not be {what}: {reason}.")
