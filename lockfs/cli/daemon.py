"""Going into the background so that the command returns when the mount serves, or says why it does not.

The starting process forks and waits on a pipe. The child writes what it reached: MOUNTED, then READY, or
else an exit code and a sentence. Whatever ends the pipe without one of the latter two is a failed start
as well, and a mount it left is taken away.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from lockfs.errors import EXIT_MOUNT, EXIT_OK, EXIT_SYSTEM

START_DEADLINE_S = 30.0
_REPORT_BYTES_MAX = 4096
_READY, _MOUNTED = 255, 254  # no exit codes of lockfs


class Reporter:
    """The child's end of the pipe; after the first final report the parent is gone."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe

    def mounted(self) -> None:
        """Tell the parent that there is a mount now, to be taken away should the child die."""
        self._report(bytes([_MOUNTED]))

    def ready(self) -> None:
        """Leave the terminal, with all processes of the mount, and tell the parent that it serves."""
        _leave_terminal()
        self._report(bytes([_READY]), final=True)

    def failed(self, exit_code: int, sentence: str) -> None:
        """Tell the parent why there is no mount."""
        self._report(bytes([exit_code]) + sentence.encode("utf-8", "backslashreplace"), final=True)

    def _report(self, report: bytes, *, final: bool = False) -> None:
        if self._pipe < 0:
            return
        with contextlib.suppress(BrokenPipeError):  # the parent gave up or was killed
            os.write(self._pipe, report[:_REPORT_BYTES_MAX])
        if final:
            os.close(self._pipe)
            self._pipe = -1


def _leave_terminal() -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    if null > 2:
        os.close(null)


@dataclass(frozen=True)
class Start:
    """How a start ended: the exit code, a sentence if it failed, and whether a dead mount was left."""

    exit_code: int
    sentence: str | None = None
    left_mount: bool = False


def in_background(
    child: Callable[[Reporter], int], mountpoint: str, deadline_s: float = START_DEADLINE_S
) -> Start:
    """Run `child` in a new session and wait for its report, at most `deadline_s` seconds.

    The child never returns from here: it exits with what `child` returned.
    """
    reading, writing = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        code = EXIT_SYSTEM
        try:
            os.close(reading)
            os.setsid()
            code = child(Reporter(writing))
        finally:
            os._exit(code)
    os.close(writing)
    report = bytearray()
    try:
        complete = _read_report(reading, report, time.monotonic() + deadline_s)
        failure = f"The mount was not ready within {deadline_s:g} seconds and was given up."
    except KeyboardInterrupt:
        complete, failure = False, "The start was interrupted."
    finally:
        os.close(reading)
    mounted = report[:1] == bytes([_MOUNTED])
    if not complete:
        os.kill(pid, signal.SIGKILL)
        return Start(EXIT_MOUNT, failure, left_mount=mounted)
    return _outcome(pid, bytes(report[1:] if mounted else report), mountpoint, deadline_s, mounted=mounted)


def _outcome(pid: int, report: bytes, mountpoint: str, deadline_s: float, *, mounted: bool) -> Start:
    if report[:1] == bytes([_READY]):
        return _answers(mountpoint, deadline_s)
    _, status = os.waitpid(pid, 0)
    if report:
        return Start(report[0], report[1:].decode("utf-8", "replace"))
    code = os.waitstatus_to_exitcode(status)
    how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    sentence = f"lockfs {how} before the mount was ready: run it with -f to see more."
    return Start(EXIT_MOUNT, sentence, left_mount=mounted)


def _read_report(pipe: int, report: bytearray, deadline: float) -> bool:
    """Collect what the child reports until it closes its end; False if that took too long."""
    poller = select.poll()
    poller.register(pipe, select.POLLIN)
    while len(report) <= _REPORT_BYTES_MAX:
        left = deadline - time.monotonic()
        if left <= 0 or not poller.poll(left * 1000):
            return False
        chunk = os.read(pipe, _REPORT_BYTES_MAX)
        if not chunk:
            break
        report += chunk
    return True


def _answers(mountpoint: str, deadline_s: float) -> Start:
    """Ask the mount itself: ready means that a request through the kernel comes back."""
    outcome: list[OSError | None] = []

    def ask() -> None:
        try:
            os.statvfs(mountpoint)
        except OSError as error:
            outcome.append(error)
        else:
            outcome.append(None)

    asker = threading.Thread(target=ask, daemon=True)
    asker.start()
    asker.join(deadline_s)
    if not outcome:
        return Start(EXIT_MOUNT, f"{mountpoint} is mounted but does not answer: see its log.")
    if outcome[0] is not None:
        return Start(EXIT_MOUNT, f"{mountpoint} is mounted but fails ({outcome[0].strerror}): see its log.")
    return Start(EXIT_OK)
