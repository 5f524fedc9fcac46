"""The worker's half of the commands: one turn at serving a mount, with its log, its signals and its end."""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

from lockfs.cli.journal import Journal
from lockfs.errors import EXIT_OK, EXIT_SYSTEM, HopelessError, LockfsError, SetupError, exit_code_of
from lockfs.guardian import service
from lockfs.guardian.family import EXIT_HOPELESS
from lockfs.guardian.turn import Turn
from lockfs.journal.memory import SharedMemory
from lockfs.mount import kernelmount
from lockfs.mount.kernelmount import KernelMount
from lockfs.mount.options import MountOptions

Serve = Callable[[MountOptions, int, int, Callable[[], None], Turn, SharedMemory], None]

_log = logging.getLogger("lockfs")


def serve_mount(  # noqa: PLR0917  (the parameters of lockfs.mount.serve.serve)
    options: MountOptions,
    source_fd: int,
    device_fd: int,
    ready: Callable[[], None],
    turn: Turn,
    memory: SharedMemory,
) -> None:
    """lockfs.mount.serve.serve, imported where it is needed: never by the guardian."""
    from lockfs.mount.serve import serve  # noqa: PLC0415

    serve(options, source_fd, device_fd, ready, turn, memory)


def single(error: BaseException) -> BaseException:
    """The one error inside groups of one, as nurseries make them."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


@dataclass(frozen=True)
class Served:
    """What every worker of a mount is given."""

    options: MountOptions
    source_fd: int
    mounted: KernelMount
    background: bool
    serve: Serve
    memory: SharedMemory


class Worker:
    """One worker's turn; runs in the process that serves."""

    def __init__(self, served: Served, turn: Turn) -> None:
        self._served = served
        self._options = served.options
        self._turn = turn
        self._is_ready = False

    def run(self) -> int:
        """Serve until unmounted; the exit code of the process."""
        journal: Journal | None = None
        try:
            journal = Journal(
                self._options.mountpoint,
                file=self._options.log,
                debug=self._options.debug,
                background=self._served.background,
            )
            if not self._turn.first:
                journal.started()
            self._serve(journal)
        except BaseException as error:  # noqa: BLE001  (whatever it is: the log, the guardian, the exit code)
            return self._failed(single(error))
        finally:
            if journal is not None:
                journal.close()
        return EXIT_OK

    def _serve(self, journal: Journal) -> None:
        options, turn, served = self._options, self._turn, self._served

        def ready() -> None:
            self._is_ready = True
            if turn.first:
                _log.info("%s is mounted on %s.", options.source, options.mountpoint)
            else:
                _log.warning("Process %d serves %s.", os.getpid(), options.mountpoint)
            if served.background:
                journal.started()
            turn.ready()

        if not turn.first:
            self._report_death()
        _unmount_on_signals(served.mounted)
        turn.listening()
        service.hand_over(served.memory)
        served.serve(options, served.source_fd, served.mounted.device_fd, ready, turn, served.memory)
        if turn.first and not self._is_ready:
            raise SetupError(f"{options.mountpoint} was unmounted before it was ready.")
        _log.info("%s is unmounted.", options.mountpoint)

    def _report_death(self) -> None:
        turn = self._turn
        _log.log(
            logging.INFO if turn.upgraded else logging.ERROR,
            "The process that served %s %s: process %d takes over (turn %d).",
            self._options.mountpoint,
            turn.died,
            os.getpid(),
            turn.number,
        )
        if turn.fenced:
            _log.critical(
                "%d processes that served %s have died one after the other: it is served for reading only.",
                turn.deaths,
                self._options.mountpoint,
            )

    def _failed(self, error: BaseException) -> int:
        """Tell the log, or the guardian if somebody waits for the start; the exit code. Other errors than the
        expected are defects.
        """
        mountpoint = self._options.mountpoint
        waited_for = self._turn.first and not self._is_ready
        if isinstance(error, HopelessError):
            code, sentence = EXIT_HOPELESS, str(error)
            _log.critical("%s cannot be served any more: %s", mountpoint, sentence, exc_info=error)
        elif isinstance(error, LockfsError | OSError):
            code, sentence = exit_code_of(error), str(error)
            if not waited_for:
                _log.error("%s ended: %s", mountpoint, sentence, exc_info=error)
        else:
            code, sentence = EXIT_SYSTEM, f"A defect ended lockfs: {error!r}."
            _log.critical("A defect ended lockfs on %s.", mountpoint, exc_info=error)
        if waited_for:
            self._turn.failed(code, sentence)
        return code


def _unmount_on_signals(mounted: KernelMount) -> None:
    asked = threading.Lock()  # one attempt at a time: a service manager signals guardian and worker

    def on_signal(number: int, frame: FrameType | None) -> None:
        if asked.acquire(blocking=False):
            reason = f"Got {signal.Signals(number).name}"
            threading.Thread(target=_unmount_for, args=(reason, mounted, asked), daemon=True).start()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)


def _unmount_for(reason: str, mounted: KernelMount, asked: threading.Lock) -> None:
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
        asked.release()
