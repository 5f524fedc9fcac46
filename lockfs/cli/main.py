"""The commands lockfs and mount.lockfs: from a command line to a mount that is served.

Order: the words, then the checks of source and mount point, the kernel's mount, the server. Only the words
are read in the process that was called; what follows may block on a sick file system and runs, unless in the
foreground, in a child that is given START_DEADLINE_S.
"""

from __future__ import annotations

import errno
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType

from lockfs.cli import options as command_line
from lockfs.cli.daemon import START_DEADLINE_S, Reporter, in_background
from lockfs.cli.journal import Journal
from lockfs.cli.table import printable
from lockfs.errors import EXIT_OK, EXIT_SYSTEM, LockfsError, SetupError, UsageError, exit_code_of
from lockfs.mirror.modes import IoMode
from lockfs.mount import kernelmount, source
from lockfs.mount.kernelmount import KernelMount
from lockfs.mount.options import MountOptions

Serve = Callable[[MountOptions, int, int, Callable[[], None]], None]

_log = logging.getLogger("lockfs")


def _complain(sentence: str) -> None:
    print(f"lockfs: {printable(sentence)}", file=sys.stderr, flush=True)


def _serve(options: MountOptions, source_fd: int, device_fd: int, ready: Callable[[], None]) -> None:
    from lockfs.mount.serve import serve  # noqa: PLC0415  (keeps --help and wrong options fast)

    serve(options, source_fd, device_fd, ready)


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


def _unmount_for(reason: str, mounted: KernelMount) -> None:
    """Runs on a thread of its own: the serving thread must go on answering while the mount ends."""
    try:
        mounted.unmount()
    except (OSError, LockfsError, subprocess.SubprocessError) as error:
        if isinstance(error, OSError) and error.errno == errno.EBUSY:
            users = ", ".join(kernelmount.users_of(mounted.mountpoint)) or "somebody in another namespace"
            _log.warning(
                "%s: %s stays mounted, it is in use by %s. End them first, then run `umount %s`.",
                reason,
                mounted.mountpoint,
                users,
                mounted.mountpoint,
            )
        else:
            _log.warning("%s: %s could not be unmounted: %s", reason, mounted.mountpoint, error)


def _unmount_on_signals(mounted: KernelMount) -> None:
    def on_signal(number: int, frame: FrameType | None) -> None:
        reason = f"Got {signal.Signals(number).name}"
        threading.Thread(target=_unmount_for, args=(reason, mounted), daemon=True).start()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def _single(error: BaseException) -> BaseException:
    """The one error inside groups of one, as nurseries make them."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


class _Mounter:
    """One mount from its checks to its end, in the process that serves it."""

    def __init__(self, options: MountOptions, serve: Serve, reporter: Reporter | None) -> None:
        self._options = options
        self._serve = serve
        self._reporter = reporter
        self._is_ready = False

    def run(self, *, fake: bool = False) -> int:
        """Mount and serve until unmounted; the exit code of the process."""
        journal: Journal | None = None
        try:
            self._options = source.absolute(self._options)
            journal = Journal(
                self._options.mountpoint,
                file=self._options.log,
                debug=self._options.debug,
                background=self._reporter is not None,
            )
            self._mount_and_serve(journal, fake=fake)
        except BaseException as error:  # noqa: BLE001  (whatever it is: the log, the parent, the exit code)
            return self._failed(_single(error))
        finally:
            if journal is not None:
                journal.close()
        return EXIT_OK

    def _failed(self, error: BaseException) -> int:
        """Tell the log and whoever waits; the exit code. Other errors than the expected are defects."""
        mountpoint = self._options.mountpoint
        if isinstance(error, LockfsError | OSError):
            code, sentence = exit_code_of(error), str(error)
            if self._is_ready:
                _log.error("%s ended: %s", mountpoint, sentence, exc_info=error)
        elif isinstance(error, KeyboardInterrupt):
            code, sentence = EXIT_SYSTEM, "Interrupted."
        else:
            code, sentence = EXIT_SYSTEM, f"A defect ended lockfs: {error!r}."
            _log.critical("A defect ended lockfs on %s.", mountpoint, exc_info=error)
        if self._reporter is not None:
            self._reporter.failed(code, sentence)
        elif not self._is_ready:
            _complain(sentence)
        return code

    def _mount_and_serve(self, journal: Journal, *, fake: bool) -> None:
        options, as_root = self._options, os.geteuid() == 0
        if options.io is IoMode.PASSTHROUGH and not as_root:
            raise UsageError("The option io=passthrough needs root: run lockfs as root, or give io=auto.")
        raise_descriptor_limit()
        store = source.prepare(options, as_root=as_root, clears=not fake)
        try:
            options = replace(
                options,
                mount_flags=options.mount_flags | store.flags,
                read_only=options.read_only or bool(store.flags & os.ST_RDONLY),
            )
            if fake:
                return
            mounted = kernelmount.mount(options, store.mode, as_root=as_root)
            self._serve_mounted(options, store.descriptor, mounted, journal)
        finally:
            os.close(store.descriptor)

    def _serve_mounted(
        self, options: MountOptions, source_fd: int, mounted: KernelMount, journal: Journal
    ) -> None:
        def ready() -> None:
            self._is_ready = True
            _log.info("%s is mounted on %s.", options.source, options.mountpoint)
            if self._reporter is not None:
                journal.started()
                self._reporter.ready()

        if self._reporter is not None:
            self._reporter.mounted()
        _unmount_on_signals(mounted)
        try:
            self._serve(options, source_fd, mounted.device_fd, ready)
        except BaseException:
            if not self._is_ready:
                mounted.abandon()
            raise  # once it served, a dead mount is the safe state: nothing unguarded is uncovered
        if not self._is_ready:
            mounted.abandon()
            raise SetupError(f"{options.mountpoint} was unmounted before it was ready.")
        os.close(mounted.device_fd)
        _log.info("%s is unmounted.", options.mountpoint)


def _start_deadline(options: MountOptions) -> float:
    """How long the start may take, seconds: longer if it waits for a lockspace that is slow to join."""
    if options.backend == "paxos" and options.paxos.join_wait:
        return START_DEADLINE_S + options.paxos.timing.dead + options.paxos.timing.fails
    return START_DEADLINE_S


def run(invocation: command_line.Invocation, serve: Serve = _serve) -> int:
    """Do what the command line asked for; returns the exit code."""
    if invocation.options is None:
        sys.stdout.write(invocation.text or "")
        return EXIT_OK
    options = invocation.options
    if options.foreground or invocation.fake:
        return _Mounter(options, serve, None).run(fake=invocation.fake)
    mountpoint = os.path.abspath(options.mountpoint)
    start = in_background(
        lambda reporter: _Mounter(options, serve, reporter).run(), mountpoint, _start_deadline(options)
    )
    if start.left_mount:
        KernelMount(-1, os.path.realpath(mountpoint), os.geteuid() == 0).uncover()
    if start.sentence is not None:
        _complain(start.sentence)
    return start.exit_code


def _main(parse: Callable[[Sequence[str]], command_line.Invocation], argv: Sequence[str]) -> int:
    try:
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
