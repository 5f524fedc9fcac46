"""The commands lockfs and mount.lockfs: from a command line to a mount that is served.

Order: the words, then the checks of source and mount point, the kernel's mount, the server. Only the words
are read in the process that was called; what follows may block on a sick file system and runs, unless in the
foreground, in a child that is given START_DEADLINE_S.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from lockfs.cli import options as command_line
from lockfs.cli.daemon import START_DEADLINE_S, Reporter, in_background
from lockfs.cli.journal import Journal
from lockfs.cli.resuming import guarded, program_of, remember, resume
from lockfs.cli.reviving import Revived, revive
from lockfs.cli.serving import Serve, Served, serve_mount
from lockfs.cli.table import printable
from lockfs.errors import EXIT_MOUNT, EXIT_OK, EXIT_SYSTEM, LockfsError, UsageError, exit_code_of
from lockfs.guardian.family import Ending
from lockfs.guardian.upgrade import CAN_RESUME, RESUME, Program
from lockfs.journal.memory import SharedMemory
from lockfs.mirror.modes import IoMode
from lockfs.mount import kernelmount, source
from lockfs.mount.kernelmount import KernelMount
from lockfs.mount.options import MountOptions
from lockfs.mount.source import Source

_log = logging.getLogger("lockfs")


def _complain(sentence: str) -> None:
    print(f"lockfs: {printable(sentence)}", file=sys.stderr, flush=True)


def raise_descriptor_limit() -> None:
    """Allow as many open files as the system does: each open image costs several descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = hard
    if os.geteuid() == 0:
        wanted = max(hard, int(Path("/proc/sys/fs/nr_open").read_text(encoding="ascii")))
    for limits in ((wanted, wanted), (hard, hard)):
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        except (OSError, ValueError):  # no CAP_SYS_RESOURCE: what the hard limit allows must do
            continue
        return
    _log.warning("The limit of open files stays at %d.", soft)


class _Mounter:
    """One mount from its checks to its end, in the process that becomes its guardian."""

    def __init__(
        self, options: MountOptions, serve: Serve, reporter: Reporter | None, program: Program
    ) -> None:
        self._options = options
        self._serve = serve
        self._reporter = reporter
        self._program = program

    def run(self, *, fake: bool = False) -> int:
        """Mount and serve until unmounted; the exit code of the process."""
        try:
            self._options = source.absolute(self._options)
            if os.geteuid() and self._options.io is IoMode.PASSTHROUGH:
                raise UsageError("The option io=passthrough needs root: run lockfs as root, or give io=auto.")
            if self._reporter is not None:
                os.chdir("/")  # before there are other processes: each has a working directory of its own
            with self._journal():
                raise_descriptor_limit()
                store = source.prepare(self._options, as_root=not os.geteuid(), clears=not fake)
            try:
                self._options = _as_the_store(self._options, store)
                if fake:
                    return EXIT_OK
                return self._mount_and_guard(store)
            finally:
                os.close(store.descriptor)
        except BaseException as error:  # noqa: BLE001  (whatever it is: the log, the parent, the exit code)
            return self._failed(error)

    def _journal(self) -> contextlib.closing[Journal]:
        """The log, for as long as this process may have a thread."""
        journal = Journal(
            self._options.mountpoint,
            file=self._options.log,
            debug=self._options.debug,
            background=self._reporter is not None,
        )
        return contextlib.closing(journal)

    def _mount_and_guard(self, store: Source) -> int:
        with self._journal():
            mounted = kernelmount.mount(self._options, store.mode, as_root=not os.geteuid())
        if self._reporter is not None:
            self._reporter.mounted()
        served = self._remembered(store.descriptor, mounted)
        try:
            ending = guarded(served, self._program, self._ready)
        except OSError:
            mounted.abandon()
            raise
        if ending.ready:
            os.close(mounted.device_fd)
            return ending.code
        mounted.abandon()
        return self._give_up(*_reason(ending))

    def _remembered(self, source_fd: int, mounted: KernelMount) -> Served:
        """What the workers are given, kept for the program that may go on after this one."""
        memory = SharedMemory.create()
        background = self._reporter is not None
        served = Served(self._options, source_fd, mounted, background, self._serve, memory)
        remember(served, self._program.shown)
        return served

    def _ready(self) -> None:
        if self._reporter is not None:
            self._reporter.ready()

    def _failed(self, error: BaseException) -> int:
        """Tell whoever waits; the exit code. Other errors than the expected are defects, and for the log."""
        if isinstance(error, LockfsError | OSError):
            return self._give_up(exit_code_of(error), str(error))
        if isinstance(error, KeyboardInterrupt):
            return self._give_up(EXIT_SYSTEM, "Interrupted.")
        with contextlib.suppress(LockfsError), self._journal():
            _log.critical("A defect ended lockfs on %s.", self._options.mountpoint, exc_info=error)
        return self._give_up(EXIT_SYSTEM, f"A defect ended lockfs: {error!r}.")

    def _give_up(self, code: int, sentence: str) -> int:
        if self._reporter is not None:
            self._reporter.failed(code, sentence)
        else:
            _complain(sentence)
        return code


def _as_the_store(options: MountOptions, store: Source) -> MountOptions:
    return replace(
        options,
        mount_flags=options.mount_flags | store.flags,
        read_only=options.read_only or bool(store.flags & os.ST_RDONLY),
    )


def _reason(ending: Ending) -> tuple[int, str]:
    """The exit code and the sentence of a start that failed."""
    if ending.sentence:
        return ending.code, ending.sentence
    how = f"ended with code {ending.code}"
    if ending.number is not None:
        how = f"was killed by signal {ending.number}"
    return EXIT_MOUNT, f"lockfs {how} before the mount was ready: run it with -f to see more."


def _start_deadline(options: MountOptions) -> float:
    """How long the start may take, seconds: longer if it waits for a lockspace that is slow to join."""
    if options.backend == "paxos" and options.paxos.join_wait:
        return START_DEADLINE_S + options.paxos.timing.dead + options.paxos.timing.fails
    return START_DEADLINE_S


def run(
    invocation: command_line.Invocation, serve: Serve = serve_mount, module: str = "lockfs.cli.main"
) -> int:
    """Do what the command line asked for; returns the exit code. An upgrade runs `module`."""
    if invocation.options is None:
        sys.stdout.write(invocation.text or "")
        return EXIT_OK
    options = invocation.options
    program = program_of(module, sys.argv[1:])
    if (revived := revive(serve, raise_descriptor_limit)) is not None:
        return _go_on(revived, program, foreground=options.foreground)
    if options.foreground or invocation.fake:
        return _Mounter(options, serve, None, program).run(fake=invocation.fake)
    mountpoint = os.path.abspath(options.mountpoint)
    start = in_background(
        lambda reporter: _Mounter(options, serve, reporter, program).run(),
        mountpoint,
        _start_deadline(options),
    )
    if start.left_mount:
        KernelMount(-1, os.path.realpath(mountpoint), os.geteuid() == 0).uncover()
    if start.sentence is not None:
        _complain(start.sentence)
    return start.exit_code


def _go_on(revived: Revived, program: Program, *, foreground: bool) -> int:
    """Serve the mount whose descriptors the service manager kept; the exit code of this process."""
    if foreground:
        return revived.run(program)

    def child(reporter: Reporter) -> int:
        reporter.ready()  # the mount is there; whether it answers is looked at by the parent
        return revived.run(program)

    start = in_background(child, revived.mountpoint)
    if start.sentence is not None:
        _complain(start.sentence)
    return start.exit_code


def _main(parse: Callable[[Sequence[str]], command_line.Invocation], argv: Sequence[str]) -> int:
    try:
        if argv[:1] in ([CAN_RESUME], [RESUME]):
            return resume(argv, serve_mount, "lockfs.cli.main")
        return run(parse(argv))
    except (LockfsError, OSError) as error:
        _complain(str(error))
        return exit_code_of(error)


def entry() -> None:
    """The command `lockfs`."""
    sys.exit(_main(command_line.parse, sys.argv[1:]))


def entry_mount_helper() -> None:
    """The command `mount.lockfs`, which mount(8) calls for `-t lockfs`."""
    sys.exit(_main(command_line.parse_mount_helper, sys.argv[1:]))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--as-mount-helper"]:
        del sys.argv[1]
        entry_mount_helper()
    entry()
