"""Serving one mount: backend, keeper, mirror and channel put together, from INIT to the unmount."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace

import pyfuse3
import trio

from lockfs.backends.base import Backend
from lockfs.backends.fcntl import FcntlBackend
from lockfs.backends.nop import NopBackend
from lockfs.backends.paxos.backend import PaxosBackend
from lockfs.channel.device import Device
from lockfs.channel.handles import HandleTable
from lockfs.channel.library import Library
from lockfs.channel.relay import Relay
from lockfs.errors import SetupError
from lockfs.keeper.keeper import Keeper
from lockfs.mirror.mirror import Mirror
from lockfs.mirror.modes import IoMode, is_passed
from lockfs.mount.control import serve_control
from lockfs.mount.options import MountOptions
from lockfs.mount.report import Report
from lockfs.mount.watchdog import Watchdog, keep_fed, open_watchdog

log = logging.getLogger("lockfs.mount")

REQUESTS_MAX = 1024  # requests on names and opens under way at once; opens that wait for a lease count
STOP_DEADLINE_S = 30.0


def serve(options: MountOptions, source_fd: int, device_fd: int, ready: Callable[[], None]) -> None:
    """Serve the mount on `device_fd` until it is gone. `ready` is called once requests are answered.

    Raises:
        SetupError: the kernel, the privileges or the storage cannot carry what `options` ask for.
    """
    device = Device(device_fd)
    probe = os.memfd_create("lockfs-probe", os.MFD_CLOEXEC)
    try:
        device.negotiate(options.io is not IoMode.DAEMON, probe)
    finally:
        os.close(probe)
    if options.backend == "paxos" and options.io is IoMode.AUTO:
        # Passthrough has to be revoked when a lease is lost, by a lockfs that lives; what is guarded stops.
        options = replace(options, io=IoMode.GUARDED if device.passthrough else IoMode.DAEMON)
    if options.io in (IoMode.PASSTHROUGH, IoMode.GUARDED) and not device.passthrough:
        raise SetupError(
            f"io={options.io.value} needs Linux 6.9 or later and CAP_SYS_ADMIN; use io=auto or io=daemon."
        )
    trio.run(_Service(options, source_fd, device, ready).run, strict_exception_groups=True)


def make_backend(options: MountOptions, source_fd: int) -> Backend:
    """The backend that the options name."""
    if options.backend == "nop":
        return NopBackend()
    if options.backend == "paxos":
        return PaxosBackend(options.paxos, source_fd, options.host, store=options.source)
    return FcntlBackend(options.fcntl, source_fd, options.host)


class _Service:
    """One mount's parts and their order of starting and stopping."""

    def __init__(
        self, options: MountOptions, source_fd: int, device: Device, ready: Callable[[], None]
    ) -> None:
        self._options = options
        self._device = device
        self._ready = ready
        self._handles = HandleTable()
        self._watchdog: Watchdog | None = None
        self._orderly = False
        self._backend = make_backend(options, source_fd)
        # In plain passthrough nothing can be taken back from a handle that is open, so nothing is promised.
        yielding = options.policy.yielding and options.io is not IoMode.PASSTHROUGH
        policy = replace(options.policy, yielding=yielding)
        self._mirror = Mirror(
            source_fd, self._handles, device, io=options.io, policy=policy, host=options.host
        )
        self._keeper = Keeper(
            self._backend,
            policy,
            options.host,
            surroundings=self._mirror.surroundings,
            freed=self._mirror.freed,
        )
        self._mirror.keeper = self._keeper
        self._report = Report(options, self._backend, self._keeper, self._handles, device, source_fd)

    async def run(self) -> None:
        """Start from the storage upwards, serve, and stop in the opposite order."""
        await self._backend.start(self._keeper.lease_changed)
        library = Library()
        library.attach(self._mirror)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pyfuse3.main, 1, REQUESTS_MAX)
                library.greet()
                await trio.to_thread.run_sync(library.await_greeting)
                await nursery.start(self._backend.run)
                await nursery.start(self._keeper.run)
                await self._start_watchdog(nursery)
                relay = Relay(self._device, library, self._handles, self._mirror, nursery)
                relay.start()
                await self._learn_device()
                await nursery.start(serve_control, self._options.mountpoint, self._report.answer)
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

    async def _start_watchdog(self, nursery: trio.Nursery) -> None:
        """Arm the watchdog that was asked for: it fires before another host may take what this one holds."""
        timeout_s = self._options.paxos.watchdog_timeout
        name = self._options.watchdog
        self._watchdog = await trio.to_thread.run_sync(
            open_watchdog, name, timeout_s, self._options.mountpoint
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
            self._watchdog.disarm()

    async def _learn_device(self) -> None:
        """Learn the mount's own device number, under which /proc shows what is open and locked on it.

        Asking for the free space besides shows that pyfuse3 answers too.
        """
        status = await trio.to_thread.run_sync(os.stat, self._options.mountpoint)
        await trio.to_thread.run_sync(os.statvfs, self._options.mountpoint)
        self._mirror.device = status.st_dev
        self._mirror.mounted_at(self._options.mountpoint)
