"""Asking what may never answer: a child asks, and is given up after a deadline.

A thread would not do. Who waits for a FUSE server that has read the request cannot be killed (fs/fuse/dev.c,
request_wait_answer), and would keep its whole process from ending.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Callable

REAP_S = 0.2
"""How long a child that was killed is waited for; one that cannot end is left to whoever inherits it."""
FAILED = 255


def in_child(ask: Callable[[], int], deadline_s: float) -> int | None:
    """What `ask` returned in a child process, 0 to 254; FAILED if it raised, None if it took too long.

    The child has no descriptors but 0 to 2, on /dev/null, so that nobody waits for it should it be left.
    `ask` must do system calls only: other threads of this process may have held any lock at the fork.
    """
    pid = os.fork()
    if pid == 0:
        code = FAILED
        try:
            os.closerange(0, os.sysconf("SC_OPEN_MAX"))
            for _ in range(3):
                os.open(os.devnull, os.O_RDWR)
            code = ask()
        finally:
            os._exit(code)
    watch = os.pidfd_open(pid)
    try:
        poller = select.poll()
        poller.register(watch, select.POLLIN)
        if not poller.poll(deadline_s * 1000):
            signal.pidfd_send_signal(watch, signal.SIGKILL)
            if poller.poll(REAP_S * 1000):
                os.waitpid(pid, 0)
            return None
    finally:
        os.close(watch)
    with contextlib.suppress(ChildProcessError):
        _, status = os.waitpid(pid, 0)
        return os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else FAILED
    return FAILED
