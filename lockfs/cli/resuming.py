"""A mount that goes on in another program: what is kept in the journal for it, and how it begins."""

from __future__ import annotations

import gc
import logging
import os
import select
import sys
from collections.abc import Callable, Sequence
from typing import cast

from lockfs.cli import saved
from lockfs.cli.journal import Journal
from lockfs.cli.serving import Serve, Served, Worker
from lockfs.errors import EXIT_OK, EXIT_SYSTEM, LockfsError, UsageError
from lockfs.guardian import long_values, service, upgrade
from lockfs.guardian.family import Ending, Plan, guard
from lockfs.guardian.upgrade import CAN_RESUME, OPTIONS, Program
from lockfs.journal.memory import JournalError, SharedMemory
from lockfs.linux import calls
from lockfs.mount.kernelmount import KernelMount
from lockfs.mount.options import MountOptions

KEPT = "guardian:kept"

_log = logging.getLogger("lockfs")


def prepare_worker() -> None:
    """Import what a worker needs, before it is needed.

    It is kept out of collections: they would only touch, and thereby copy, what is shared with other workers.
    """
    import lockfs.mount.serve  # noqa: PLC0415, F401  (never in the guardian)

    calls.keep_heap_small()
    gc.collect()
    gc.freeze()


def program_of(module: str, shown: Sequence[str]) -> Program:
    """The command of an upgrade: this interpreter and `module`, which it looks for where it did before.

    Never in the directory that lockfs happens to be started in.
    """
    isolation = "-I" if sys.flags.isolated else "-P"
    return Program((sys.executable, isolation, "-m", module), tuple(shown))


def plan_of(served: Served, program: Program, on_ready: Callable[[], None]) -> Plan:
    """What the guardian of a mount is to do."""
    kept = (served.source_fd, served.mounted.device_fd)

    def ready() -> None:
        on_ready()
        service.ready()

    return Plan(
        serve=lambda turn: Worker(served, turn).run(),
        prepare=prepare_worker,
        memory=served.memory,
        kept=kept,
        on_ready=ready,
        is_over=lambda: is_gone(served.mounted.device_fd),
        program=program,
    )


def is_gone(device_fd: int) -> bool:
    """Whether the mount of a device has ended (fs/fuse/dev.c, fuse_dev_poll)."""
    poller = select.poll()
    poller.register(device_fd, 0)
    return any(events & select.POLLERR for _, events in poller.poll(0))


def guarded(served: Served, program: Program, on_ready: Callable[[], None]) -> Ending:
    """Guard a mount until it ends, and tell the service manager, which then has nothing of it any more.

    Raises:
        OSError: the first worker could not be started.
    """
    try:
        return guard(plan_of(served, program, on_ready))
    finally:
        service.farewell(served.memory)


def remember(served: Served, shown: Sequence[str]) -> None:
    """Keep what `resume` needs.

    Raises:
        JournalFull: there is no room.
        ValueError: the options are too long.
    """
    facts, mounted = served.memory.facts, served.mounted
    value = {
        "options": saved.plain(served.options),
        "source": served.source_fd,
        "device": mounted.device_fd,
        "mountpoint": mounted.mountpoint,
        "as_root": mounted.as_root,
        "given": mounted.given,
        "background": served.background,
        "shown": list(shown),
    }
    long_values.replace(facts, OPTIONS, value)
    facts.set(KEPT, {"fds": [served.source_fd, mounted.device_fd]})


def remembered(memory: SharedMemory, serve: Serve) -> tuple[Served, list[str]]:
    """What every worker of the mount is given, and the command line of its first start.

    Raises:
        JournalError: the journal is of another version.
    """
    value = long_values.current(memory.facts, OPTIONS)
    if not isinstance(value, dict):
        raise JournalError("The journal has no options.")
    try:
        options = saved.restored(MountOptions, value["options"])
        mounted = KernelMount(value["device"], value["mountpoint"], value["as_root"], value["given"])
        served = Served(options, value["source"], mounted, value["background"], serve, memory)
        return served, cast(list[str], value["shown"])
    except (KeyError, TypeError, ValueError) as error:
        raise JournalError(f"The options in the journal are of another version ({error!r}).") from error


def resume(argv: Sequence[str], serve: Serve, module: str) -> int:
    """Go on with the mount whose journal is the descriptor that `argv` names, or say whether that can be.

    Raises:
        UsageError: `argv` was not made by an upgrade.
        JournalError: the journal is of another version.
    """
    if not argv[1:] or not argv[1].isdecimal():
        raise UsageError(f"The option {argv[0]} is for lockfs's own use.")
    memory = SharedMemory.attach(int(argv[1]))
    served, shown = remembered(memory, serve)
    if argv[0] == CAN_RESUME:
        prepare_worker()
        return EXIT_OK
    upgrade.inherit({memory.descriptor, served.source_fd, served.mounted.device_fd}, False)
    upgrade.inherit(memory.named_descriptors(), False)
    memory.facts.reload()
    return go_on(served, program_of(module, shown))


def go_on(served: Served, program: Program) -> int:
    """Guard a mount that others served before; the exit code of the process."""
    try:
        return guarded(served, program, _nobody_waits).code
    except (LockfsError, OSError) as error:
        _report(served, error)
        return EXIT_SYSTEM


def _nobody_waits() -> None:
    """The start was reported by the program before this one."""


def _report(served: Served, error: Exception) -> None:
    options = served.options
    journal = Journal(options.mountpoint, file=options.log, debug=options.debug, background=served.background)
    _log.critical("%s is served no more (%d): %s", options.mountpoint, os.getpid(), error, exc_info=error)
    journal.close()
