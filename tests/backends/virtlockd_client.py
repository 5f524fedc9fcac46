"""A real virtlockd for tests, and a client of its RPC: who it locks for is up to the test.

The wire format is libvirt's: 32-bit big-endian words, the first one the frame's length with itself, then
program, version, procedure, type, serial and status, then an XDR body.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import struct
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

UNPRIVILEGED = 65534
START_S = 10.0
ANSWER_S = 10.0

_PROGRAM, _VERSION = 0x0EA7BEEF, 1
_REGISTER, _ACQUIRE, _RELEASE, _CREATE_LOCKSPACE = 1, 6, 7, 8
_HEADER = struct.Struct(">7I")
SHARED, AUTO_CREATE = 1, 2
CODE_BUSY = 87


class VirtlockdError(Exception):
    """virtlockd refused; `code` is libvirt's error number (CODE_BUSY: somebody has the lock)."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code = code


def missing() -> str | None:
    """Why virtlockd cannot be run here, or None."""
    if shutil.which("virtlockd", path="/usr/sbin:/usr/bin:/sbin") is None:
        return "virtlockd is not installed (package libvirt-daemon)"
    if os.getuid() == 0 and shutil.which("setpriv") is None:
        return "as root, virtlockd needs setpriv to run as another user"
    return None


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack(">I", len(raw)) + raw + bytes(-len(raw) % 4)


class Client:
    """One connection. The socket belongs to virtlockd's user, so as root the connection is made as it."""

    def __init__(self, path: Path, owner_pid: int) -> None:
        self._socket = _connect(path)
        self._socket.settimeout(ANSWER_S)
        self._serial = 0
        identity = uuid.uuid4().bytes + _string("guest") + struct.pack(">II", 1, owner_pid)
        self._call(_REGISTER, identity + struct.pack(">I", 0))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._socket.close()

    def create_lockspace(self, directory: Path) -> None:
        """Tell virtlockd of an indirect mode's directory."""
        self._call(_CREATE_LOCKSPACE, _string(str(directory)))

    def acquire(self, name: str, lockspace: str = "", shared: bool = False) -> None:
        """Lock an image (lockspace "": directly), or raise VirtlockdError."""
        flags = (SHARED if shared else 0) | (AUTO_CREATE if lockspace else 0)
        self._call(_ACQUIRE, _string(lockspace) + _string(name) + struct.pack(">I", flags))

    def release(self, name: str, lockspace: str = "") -> None:
        """Unlock it."""
        self._call(_RELEASE, _string(lockspace) + _string(name) + struct.pack(">I", 0))

    def _call(self, procedure: int, body: bytes) -> None:
        self._serial += 1
        length = _HEADER.size + len(body)
        self._socket.sendall(_HEADER.pack(length, _PROGRAM, _VERSION, procedure, 0, self._serial, 0) + body)
        answer_length = struct.unpack(">I", self._read(4))[0]
        answer = self._read(answer_length - 4)
        status = struct.unpack_from(">I", answer, 20)[0]
        if status != 0:
            code, _, present = struct.unpack_from(">iiI", answer, 24)
            text = answer[40 : 40 + struct.unpack_from(">I", answer, 36)[0]] if present else b""
            raise VirtlockdError(code, text.decode())

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self._socket.recv(size - len(data))
            if not part:
                raise ConnectionError("virtlockd closed the connection")
            data += part
        return data


def _connect(path: Path) -> socket.socket:
    """Connect as virtlockd's user: it takes nobody else, and looks at who made the connection."""
    root = os.geteuid() == 0
    connection = socket.socket(socket.AF_UNIX)
    if root:
        os.setegid(UNPRIVILEGED)
        os.seteuid(UNPRIVILEGED)
    try:
        connection.connect(str(path))
    except BaseException:
        connection.close()
        raise
    finally:
        if root:
            os.seteuid(0)
            os.setegid(0)
    return connection


@contextlib.contextmanager
def running_virtlockd() -> Iterator[Path]:
    """A virtlockd of its own, unprivileged; yields the path of its socket (short, as sockets need)."""
    home = Path(tempfile.mkdtemp(prefix="lockfs-vl-"))
    config = home / "virtlockd.conf"
    (home / "run").mkdir(mode=0o700)
    config.touch()
    command = ["virtlockd", "-f", str(config), "-p", str(home / "virtlockd.pid")]
    if os.getuid() == 0:
        for path in (home, home / "run", config):
            os.chown(path, UNPRIVILEGED, UNPRIVILEGED)
        user = [f"--reuid={UNPRIVILEGED}", f"--regid={UNPRIVILEGED}", "--clear-groups"]
        command = ["setpriv", *user, *command]
    environment = {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": str(home),
        "XDG_RUNTIME_DIR": str(home / "run"),
        "XDG_CONFIG_HOME": str(home),
        "XDG_CACHE_HOME": str(home),
    }
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    path = home / "run" / "libvirt" / "virtlockd-sock"
    try:
        end = time.monotonic() + START_S
        while not path.exists():
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError("virtlockd did not start: " + (home / "log").read_text())
            time.sleep(0.02)
        yield path
    finally:
        process.terminate()
        process.wait(timeout=START_S)
        shutil.rmtree(home)
