"""Where a mount's log goes: standard error, the system log, a file.

Records are written by a thread of their own behind a bounded queue: a slow disk or a stuck log daemon
must never hold up the thread that serves the mount. What does not fit is dropped and counted.
"""

from __future__ import annotations

import logging
import logging.handlers
import os
import queue
import sys

from lockfs.errors import SetupError

QUEUE_RECORDS_MAX = 4096
_SYSLOG = "/dev/log"
_FILE_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class _Bounded(logging.handlers.QueueHandler):
    """Hands records to the writing thread; drops them, counted, rather than wait."""

    def __init__(self, records: queue.Queue[logging.LogRecord]) -> None:
        super().__init__(records)
        self._dropped = 0

    def enqueue(self, record: logging.LogRecord) -> None:
        """Put the record into the queue or count it as dropped."""
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            self._dropped += 1
            return
        if self._dropped:
            record.msg = f"({self._dropped} earlier records were dropped: too many at once) {record.msg}"
            self._dropped = 0


class Journal:
    """The log of one process. Make it after the last fork: it runs a thread."""

    def __init__(self, mountpoint: str, *, file: str | None, debug: bool, background: bool) -> None:
        """Start logging: to `file`, and in the foreground to standard error.

        In the background to the system's log, if there is one, and warnings also to standard error until
        `started`.

        Raises:
            SetupError: the log file cannot be opened.
        """
        root = logging.getLogger()
        handlers: list[logging.Handler] = []
        self._start: logging.Handler | None = None
        terminal = logging.StreamHandler(sys.stderr)
        terminal.setFormatter(logging.Formatter("lockfs: %(message)s"))
        if background:  # directly, so that nothing is still queued when the terminal is left
            self._start = terminal
            terminal.setLevel(logging.WARNING)
            root.addHandler(terminal)
        else:
            handlers.append(terminal)
        if background and os.path.exists(_SYSLOG):
            handlers.append(_system_log(mountpoint))
        if file is not None:
            handlers.append(_file_log(file))
        records: queue.Queue[logging.LogRecord] = queue.Queue(QUEUE_RECORDS_MAX)
        self._entry = _Bounded(records)
        self._listener = logging.handlers.QueueListener(records, *handlers)
        self._listener.start()
        root.addHandler(self._entry)
        root.setLevel(logging.INFO)
        logging.getLogger("lockfs").setLevel(logging.DEBUG if debug else logging.INFO)

    def started(self) -> None:
        """Stop showing warnings on the terminal that the process was started from."""
        if self._start is not None:
            logging.getLogger().removeHandler(self._start)
            self._start = None

    def close(self) -> None:
        """Write what is queued and stop."""
        self.started()
        logging.getLogger().removeHandler(self._entry)
        self._listener.stop()
        for handler in self._listener.handlers:
            handler.close()


def _system_log(mountpoint: str) -> logging.Handler:
    handler = logging.handlers.SysLogHandler(_SYSLOG, logging.handlers.SysLogHandler.LOG_DAEMON)
    handler.ident = f"lockfs[{os.getpid()}]: "
    handler.setFormatter(logging.Formatter(f"{mountpoint.replace('%', '%%')}: %(message)s"))
    return handler


def _file_log(file: str) -> logging.Handler:
    try:
        handler = logging.FileHandler(file, encoding="utf-8", errors="backslashreplace")
    except (OSError, ValueError) as error:
        raise SetupError(f"The log file {file} cannot be opened ({error}): give another log=.") from error
    handler.setFormatter(logging.Formatter(_FILE_FORMAT))
    return handler
