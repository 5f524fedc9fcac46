"""How a worker ended, as a number for the journal's header and as words for the log."""

from __future__ import annotations

import signal

_SIGNALS = 1000
HUNG, UPGRADED, UNKNOWN = 2000, 2001, 2002
KILLED = _SIGNALS + signal.SIGKILL


def of_status(status: int | None, ended: int) -> int:
    """From what waitpid(2) told, None if it could not, and the exit code + 1 that it left, 0: none."""
    if status is not None and status < 0:
        return _SIGNALS - status
    if ended:
        return ended
    return UNKNOWN if status is None else status + 1


def signal_of(death: int) -> int | None:
    """The signal that killed it, None if none did."""
    return death - _SIGNALS if _SIGNALS < death < HUNG else None


def in_words(death: int) -> str:
    """For the log, to go after "the worker"."""
    if death == HUNG:
        return "did not answer and was killed"
    if death == UPGRADED:
        return "was replaced by a new version"
    if death == UNKNOWN or not death:
        return "was killed"
    number = signal_of(death)
    if number is None:
        return f"ended with code {death - 1}"
    try:
        return f"was killed by {signal.Signals(number).name}"
    except ValueError:
        return f"was killed by signal {number}"
