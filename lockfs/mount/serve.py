"""Serving one mount: backend, keeper, mirror and channel put together, from INIT to the unmount."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import pyfuse3
import trio

from lockfs.backends.base import Backend, Forgetful, Memory
from lockfs.backends.fcntl import FcntlBackend
from lockfs.backends.nop import NopBackend
from lockfs.backends.paxos.backend import PaxosBackend
from lockfs.channel.device import Device
from lockfs.channel.handles import HandleTable
from lockfs.channel.library import Library
from lockfs.channel.relay import Relay
from lockfs.errors import SetupError
from lockfs.journal.memory import SharedMemory
from lockfs.keeper.keeper import Keeper
from lockfs.linux import calls, urgency
from lockfs.mirror.mirror import Mirror
from lockfs.mirror.modes import IoMode, is_passed
from lockfs.mirror.store import Past
from lockfs.mount.control import serve_control
from lockfs.mount.options import MountOptions
from lockfs.mount.report import Report
from lockfs.mount.watchdog import Kept, Watchdog, keep_fed, open_watchdog

log = logging.getLogger("lockfs.mount")

REQUESTS_MAX = 1024  # requests on names and opens under way at once; opens that wait for a lease count
STOP_DEADLINE_S = 30.0
SETTLE_AFTER_S = 0.5
"""After how long what a former worker left behind is given back, seconds: whoever was waiting for it goes on
with it before, and nothing else takes the storage's time."""
HEARTBEAT_S = 0.5
"""How often the guardian is shown that the event loop turns."""
URGENT_S = 0.3
"""How long after it has taken over a worker still runs before other programs: what waited for it is served
then."""
_DEVICE, _MOUNT_DEVICE, _WATCHDOG = "mount:negotiated", "mount:device", "mount:watchdog"


class Turn(Protocol):
    """One worker's turn at serving the mount; see guardian.turn."""

    number: int
    first: bool
    fenced: bool
    died: str

    @property
    def family(self) -> int: ...
    def beat(self) -> None: ...
    def look_around(self) -> None: ...
    def upgrade(self) -> None: ...


def serve(  # noqa: PLR0917  (what a worker is given)
    options: MountOptions,
    source_fd: int,
    device_fd: int,
    ready: Callable[[], None],
    turn: Turn | None = None,
    memory: SharedMemory | None = None,
) -> None:
    """Serve the mount on `device_fd` until it is gone. `ready` is called once requests are answered.

    `memory` has what former workers of the mount left, and gets what the next one needs. Without it and a
    `turn` the mount ends with this process.

    Raises:
        SetupError: the kernel, the privileges or the storage cannot carry what `options` ask for.
    """
    device = _device(options, device_fd, memory)
    if options.io is IoMode.AUTO and _needs_gates(options, source_fd):
        options = replace(options, io=IoMode.GUARDED if device.passthrough else IoMode.DAEMON)
    if options.io in (IoMode.PASSTHROUGH, IoMode.GUARDED) and not device.passthrough:
        raise SetupError(
            f"io={options.io.value} needs Linux 6.9 or later and CAP_SYS_ADMIN; use io=auto or io=daemon."
        )
    service = _Service(options, source_fd, device, ready, turn, memory)
    trio.run(service.run, strict_exception_groups=True)


def _device(options: MountOptions, device_fd: int, memory: SharedMemory | None) -> Device:
    """The device, negotiated by this worker or by a former one."""
    if memory is None:
        device = Device(device_fd)
    else:
        header = memory.header

        def registered(number: int) -> None:
            header.backing_max = max(number, header.backing_max)

        device = Device(device_fd, registered)
        state = memory.facts.get(_DEVICE)
        if isinstance(state, dict):
            device.recall(state)
            return device
    probe = os.memfd_create("lockfs-probe", os.MFD_CLOEXEC)
    try:
        device.negotiate(options.io is not IoMode.DAEMON, probe)
    finally:
        os.close(probe)
    if memory is not None:
        memory.facts.set(_DEVICE, device.state)
    return device


def _needs_gates(options: MountOptions, source_fd: int) -> bool:
    """Whether a lease may be lost under an open handle; decision 11. Passthrough has to be revoked then, by a
    lockfs that lives; what is guarded stops.
    """
    return options.backend == "paxos" or (options.backend == "fcntl" and calls.on_nfs(source_fd))


def make_backend(options: MountOptions, source_fd: int) -> Backend:
    """The backend that the options name."""
    if options.backend == "nop":
        return NopBackend()
    if options.backend == "paxos":
        return PaxosBackend(options.paxos, source_fd, options.host, store=options.source)
    return FcntlBackend(options.fcntl, source_fd, options.host)


async def _calm_down() -> None:
    await trio.sleep(URGENT_S)
    urgency.end_everywhere()


class _Service:
    """One mount's parts and their order of starting and stopping."""

    def __init__(  # noqa: PLR0917  (what a worker is given)
        self,
        options: MountOptions,
        source_fd: int,
        device: Device,
        ready: Callable[[], None],
        turn: Turn | None,
        memory: SharedMemory | None,
    ) -> None:
        self._options = options
        self._device = device
        self._ready = ready
        self._turn = turn
        self._memory = memory
        self._facts: Memory = memory.facts if memory is not None else Forgetful()
        number = turn.number if turn is not None else 0
        past = Past(self._facts, memory.inodes if memory is not None else None, number)
        self._handles = HandleTable(number)
        self._watchdog: Watchdog | None = None
        self._orderly = False
        self._backend = make_backend(options, source_fd)
        # In plain passthrough nothing can be taken back from a handle that is open, so nothing is promised.
        yielding = options.policy.yielding and options.io is not IoMode.PASSTHROUGH
        policy = replace(options.policy, yielding=yielding)
        self._mirror = Mirror(
            source_fd, self._handles, device, io=options.io, policy=policy, host=options.host, past=past
        )
        self._keeper = Keeper(
            self._backend,
            policy,
            options.host,
            surroundings=self._mirror.surroundings,
            freed=self._mirror.freed,
            memory=self._facts,
        )
        self._mirror.keeper = self._keeper
        self._report = Report(
            options, self._backend, self._keeper, self._handles, device, source_fd, memory, turn
        )

    @property
    def _succeeds(self) -> bool:
        """Whether there was a worker before this one."""
        return self._turn is not None and not self._turn.first

    async def run(self) -> None:
        """Start from the storage upwards, serve, and stop in the opposite order."""
        async with trio.open_nursery() as pulse:
            if self._turn is not None:
                pulse.start_soon(self._beat, self._turn)
            await self._backend.start(self._keeper.lease_changed, self._facts)
            library = Library()
            library.attach(self._mirror)
            if self._succeeds:
                await self._recall()
            await self._serve(library)
            pulse.cancel_scope.cancel()

    async def _beat(self, turn: Turn) -> None:
        while True:
            turn.beat()
            turn.look_around()
            await trio.sleep(HEARTBEAT_S)

    async def _recall(self) -> None:
        """Know again what a former worker had open, and the leases for it."""
        recalling = self._mirror.recalling
        images = recalling.images()
        if self._memory is not None:
            named = {backing.backing_id for backing in recalling.backings()}
            self._device.unregister_unnamed(named, self._memory.header.backing_max)
        await recalling.opens(await self._keeper.recall(images))

    async def _serve(self, library: Library) -> None:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pyfuse3.main, 1, REQUESTS_MAX)
                library.greet()
                await trio.to_thread.run_sync(library.await_greeting)
                await nursery.start(self._backend.run)
                await nursery.start(self._keeper.run)
                await self._start_watchdog(nursery)
                relay = Relay(
                    self._device,
                    library,
                    self._handles,
                    self._mirror,
                    nursery,
                    self._mirror.requests,
                    self._facts,
                )
                if self._succeeds:
                    self._resume(nursery)
                    # Before anything is read: what this worker has taken must not be sent again.
                    self._device.resend()
                relay.start()
                if self._succeeds:
                    nursery.start_soon(_calm_down)
                    nursery.start_soon(self._mirror.recalling.settle)
                else:
                    await self._learn_device()
                nursery.start_soon(self._control)
                self._ready()
                log.info("%s serves %s", self._options.mountpoint, self._options.source)
                await relay.wait()
                self._orderly = True
                pyfuse3.terminate()
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + STOP_DEADLINE_S):
                await self._stop()
            library.close()
            self._mirror.close()
            log.info("%s ended", self._options.mountpoint)

    def _resume(self, nursery: trio.Nursery) -> None:
        """Let what a former worker had open go on."""
        self._mirror.device = int(str(self._facts.get(_MOUNT_DEVICE) or 0))
        self._mirror.mounted_at(self._options.mountpoint)
        fenced = self._turn is not None and self._turn.fenced
        if fenced:
            log.critical("workers keep dying: everything that is open for writing is fenced")
        self._keeper.resume(reading_only=fenced)
        nursery.start_soon(self._settle)

    async def _settle(self) -> None:
        """Give back what nobody goes on with; opens that were under way come back first."""
        await trio.sleep(SETTLE_AFTER_S)
        await self._backend.settle()

    async def _control(self) -> None:
        pid = self._turn.family if self._turn is not None else None
        await serve_control(self._options.mountpoint, self._report.answer, pid=pid)

    async def _start_watchdog(self, nursery: trio.Nursery) -> None:
        """Arm the watchdog that was asked for: it fires before another host may take what this one holds."""
        timeout_s = self._options.paxos.watchdog_timeout
        name = self._options.watchdog
        former = self._facts.get(_WATCHDOG)
        kept = Kept(
            int(former["fd"]) if isinstance(former, dict) else -1,
            lambda descriptor: self._facts.set(_WATCHDOG, {"fd": descriptor}),
        )
        self._watchdog = await trio.to_thread.run_sync(
            open_watchdog, name, timeout_s, self._options.mountpoint, kept
        )
        if self._watchdog is not None:
            await nursery.start(keep_fed, self._watchdog, timeout_s, lambda: self._keeper.fences_hold)

    async def _stop(self) -> None:
        """Give back what is held and disarm the watchdog.

        Not after a failure while the kernel still writes images for their openers: their leases must last,
        those of fcntl with the backing files, and of paxos until a watchdog or the other hosts end them.
        """
        passed = [handle for handle in self._handles.all() if is_passed(handle.open_flags)]
        writing = sum(handle.writable and not handle.dead for handle in passed)
        if writing and not self._orderly:
            log.critical("%d handles are open that the kernel serves: their leases are kept", writing)
            return
        await self._mirror.release_all()
        await self._backend.stop()
        if self._watchdog is not None:
            self._facts.remove(_WATCHDOG)
            self._watchdog.disarm()

    async def _learn_device(self) -> None:
        """Learn the mount's own device number, under which /proc shows what is open and locked on it.

        Asking for the free space besides shows that pyfuse3 answers too.
        """
        status = await trio.to_thread.run_sync(os.stat, self._options.mountpoint)
        await trio.to_thread.run_sync(os.statvfs, self._options.mountpoint)
        self._facts.set(_MOUNT_DEVICE, status.st_dev)
        self._mirror.device = status.st_dev
        self._mirror.mounted_at(self._options.mountpoint)
