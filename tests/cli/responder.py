"""The smallest file system that a mount can be tested with: an empty root directory that answers statfs.

Run as a program it is lockfs with this in the place of the real server; LOCKFS_STUB says how it behaves:
serve, fail (before it is ready), die (likewise, killed), silent (never ready), end (returns before it is
ready), defect (an unexpected exception after it was ready, in every turn), hopeless (likewise, but the second
turn finds that nothing can go on), group (a SetupError in a nest of groups).
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import struct
import sys
import time
from collections.abc import Callable

from lockfs.cli import main, options
from lockfs.cli.resuming import resume
from lockfs.errors import HopelessError, SetupError
from lockfs.guardian.turn import Turn
from lockfs.guardian.upgrade import CAN_RESUME, RESUME
from lockfs.journal.memory import SharedMemory
from lockfs.mount.options import MountOptions

_IN = struct.Struct("=IIQQIIIHH")
_OUT = struct.Struct("=IiQ")
GETATTR, STATFS, INIT, DESTROY, FORGET, BATCH_FORGET = 3, 17, 26, 38, 2, 42
_INIT_OUT = struct.Struct("=IIIIHHIIHHIIH22x")
_ATTR = struct.Struct("=QQQQQQIIIIIIIIII")
BUFFER_BYTES = 1 << 18
NOTIFY_RESEND = 7
MODULE = "tests.cli.responder"


def _body(opcode: int) -> bytes | None:
    if opcode == INIT:
        return _INIT_OUT.pack(7, 31, 65536, 0, 12, 9, 65536, 1, 0, 0, 0, 0, 0)
    if opcode == GETATTR:
        return struct.pack("=QII", 0, 0, 0) + _ATTR.pack(1, *[0] * 8, 0o40755, 2, 0, 0, 0, 4096, 0)
    if opcode == STATFS:
        return struct.pack("=QQQQQIIII24x", 100, 50, 50, 10, 5, 4096, 255, 4096, 0)
    return None


def respond(device_fd: int, ready: Callable[[], None], turn: Turn | None = None) -> None:
    """Answer requests until the mount is gone; `ready` is called after INIT was answered.

    On a later turn what a former server had read is asked for again.
    """
    if turn is not None and not turn.first:
        with contextlib.suppress(OSError):  # unmounted
            os.write(device_fd, _OUT.pack(16, NOTIFY_RESEND, 0))
        ready()
    waiting = select.poll()
    waiting.register(device_fd, select.POLLIN)
    while True:
        if turn is not None:
            turn.beat()
            turn.look_around()
        if not waiting.poll(100):
            continue
        try:
            request = os.read(device_fd, BUFFER_BYTES)
        except OSError as error:
            if error.errno in (errno.EINTR, errno.EAGAIN, errno.ENOENT):
                continue
            if error.errno == errno.ENODEV:
                return
            raise
        _, opcode, unique, *_ = _IN.unpack_from(request)
        if opcode in (FORGET, BATCH_FORGET):
            continue
        body = _body(opcode)
        number = -errno.ENOSYS if body is None else 0
        os.write(device_fd, _OUT.pack(16 + len(body or b""), number, unique) + (body or b""))
        if opcode == INIT:
            ready()


def _defective(ready: Callable[[], None]) -> Callable[[], None]:
    def then_break() -> None:
        ready()
        raise ZeroDivisionError("a defect")

    return then_break


def serve(
    mount_options: MountOptions,
    source_fd: int,
    device_fd: int,
    ready: Callable[[], None],
    turn: Turn,
    memory: SharedMemory,
) -> None:
    """A server that behaves as LOCKFS_STUB says."""
    how = os.environ.get("LOCKFS_STUB", "serve")
    if how == "fail":
        raise SetupError("The stub was told to fail: tell it to serve.")
    if how == "group":
        raise BaseExceptionGroup("", [BaseExceptionGroup("", [SetupError("The stub failed in a group.")])])
    if how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "silent":
        time.sleep(600)
    if how == "end":
        return
    if how == "hopeless" and not turn.first:
        raise HopelessError("The stub was told to give up.")
    respond(device_fd, _defective(ready) if how in ("defect", "hopeless") else ready, turn)


if __name__ == "__main__":
    if "LOCKFS_STUB_DEADLINE" in os.environ:
        main.START_DEADLINE_S = float(os.environ["LOCKFS_STUB_DEADLINE"])  # type: ignore[misc]
    if sys.argv[1] in (CAN_RESUME, RESUME):
        sys.exit(resume(sys.argv[1:], serve, MODULE))
    try:
        invocation = options.parse(sys.argv[1:])
    except main.LockfsError as complaint:
        sys.exit(str(complaint))
    sys.exit(main.run(invocation, serve=serve, module=MODULE))
