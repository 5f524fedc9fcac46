"""How the guardian hears of a worker's death before it is complete, and when it need not wait for the rest.

The pidfd of a process is readable once all its threads are dead, and a thread in a call to slow storage dies
when that call ends. So each worker has a thread that sleeps, the canary: it dies at once, and its own pidfd
tells. Before Linux 6.9 there is none, and the guardian waits for the whole worker.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time

from lockfs.guardian.words import Words
from lockfs.linux import cloning, dying

LOOK_MIN_S, LOOK_MAX_S = 0.002, 0.1
_LOOK_SHARE = 4
"""The threads of a dying worker are looked at again after a quarter of the time that it has taken already."""


def keep(words: Words) -> None:
    """Start this worker's canary and note its pidfd; where that is impossible there is none.

    From then on this process has several threads, and cannot be cloned.
    """
    with contextlib.suppress(OSError, RuntimeError):
        thread = threading.Thread(target=_sleep, name="lockfs-canary", daemon=True)
        thread.start()
        if thread.native_id is not None:
            words.canary_fd = dying.open_thread(thread.native_id)


def _sleep() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    while True:
        threading.Event().wait()


class Watch:
    """The guardian's view of a worker's canary."""

    def __init__(self, words: Words) -> None:
        self._words = words
        self._since: float | None = None

    def pause(self) -> float | None:
        """How long to wait before the dying worker is looked at again, seconds; None: it is not dying."""
        if not self._words.canary_fd or not cloning.is_dead(self._words.canary_fd):
            self._since = None
            return None
        now = time.monotonic()
        if self._since is None:
            self._since = now
        return min(max(LOOK_MIN_S, (now - self._since) / _LOOK_SHARE), LOOK_MAX_S)

    def is_done_for(self, pid: int) -> bool:
        """Whether the worker is as good as dead: what is left of it can neither change anything nor run.

        One that ends by itself or does not show why it dies is waited for, and so is any while too many
        linger.
        """
        words = self._words
        if self.pause() is None or words.ended or words.sweeping or all(words.lingering()):
            return False
        return dying.changes_nothing(pid) and dying.exit_status(pid) is not None


def let_linger(words: Words, pid: int) -> None:
    """Note a worker that is buried before it is wholly dead; to be called while it has not been reaped."""
    lingering = words.lingering()
    if pid not in lingering and 0 in lingering:
        words.set_lingering(lingering.index(0), pid)


def reap(words: Words) -> None:
    """Reap those that have died at last, and forget those that are another process's children.

    A number in the list means the process that was put there: it is a child's that was not reaped, or is
    dropped at the first look. Opens nothing.
    """
    for index, pid in enumerate(words.lingering()):
        if not pid:
            continue
        try:
            done, _ = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:  # this process took a guardian's place
            done = pid
        if done:
            words.set_lingering(index, 0)
