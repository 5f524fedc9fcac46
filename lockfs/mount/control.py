"""The control socket of a mount, by which lockfsctl asks what is going on.

One unix stream socket per mount, of its owner only, in `/run/lockfs` or the user's runtime directory. A
client sends one JSON object on one line and receives one on one line; `{"error": SENTENCE}` if it failed.
A socket whose server is gone refuses connections: whoever notices removes it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import socket
import stat
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import trio

from lockfs.errors import LockfsError, SetupError

REQUEST_BYTES_MAX = 65536
RESPONSE_BYTES_MAX = 16 << 20
EXCHANGE_DEADLINE_S = 10.0
CONNECTIONS_MAX = 16
SOCKETS_MAX = 1024
_BACKLOG = 16
_PATH_BYTES_MAX = 107  # sun_path of unix(7), less its NUL
_CHUNK = 65536
_PASSING_ERRORS = (errno.ECONNABORTED, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)

Message = dict[str, Any]
Handler = Callable[[Message], Awaitable[Message]]

_log = logging.getLogger(__name__)


class ControlError(LockfsError):
    """A mount's server does not answer, or not as it should."""

    errno = errno.EPROTO


class ServerGone(ControlError):
    """Nobody serves the socket any more."""

    errno = errno.ECONNREFUSED


def directory() -> Path:
    """Where this user's mounts have their sockets."""
    if os.geteuid() == 0:
        return Path("/run/lockfs")
    runtime = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}"
    if os.path.isdir(runtime):
        return Path(runtime) / "lockfs"
    return Path(f"/tmp/lockfs-{os.geteuid()}")  # checked for its owner before use


def socket_name(mountpoint: str, pid: int) -> str:
    """The name of the socket of the mount that process `pid` serves at `mountpoint`."""
    return f"{hashlib.sha256(os.fsencode(mountpoint)).hexdigest()[:12]}-{pid}.sock"


def find_sockets(folder: Path | None = None) -> list[Path]:
    """The sockets that are there, at most SOCKETS_MAX, servers alive or not."""
    folder = folder or directory()
    try:
        names = sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except PermissionError as error:
        raise ControlError(f"The control sockets in {folder} cannot be listed: run as root.") from error
    return [folder / name for name in names if name.endswith(".sock")][:SOCKETS_MAX]


# --- server


def _make_directory(folder: Path) -> None:
    """Make the directory, and take it only if nobody else could put a socket into it."""
    folder.mkdir(mode=0o755, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise SetupError(
            f"The directory {folder} for control sockets is open to others: make it yours, mode 755."
        )


def _listening(path: Path) -> socket.socket:
    """A socket that listens under a passing name and is then renamed: one that is seen, answers."""
    if len(os.fsencode(path)) + len(".new") > _PATH_BYTES_MAX:
        raise SetupError(f"The path {path} is too long for a socket: use a shorter runtime directory.")
    passing = path.with_name(path.name + ".new")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _make_directory(path.parent)
        passing.unlink(missing_ok=True)
        listener.bind(os.fspath(passing))
        passing.chmod(0o600)
        listener.listen(_BACKLOG)
        passing.rename(path)
    except OSError as error:
        listener.close()
        raise SetupError(f"The control socket {path} cannot be made: {error.strerror}.") from error
    except BaseException:
        listener.close()
        raise
    return listener


async def serve_control(
    mountpoint: str,
    handler: Handler,
    *,
    folder: Path | None = None,
    pid: int | None = None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer requests about a mount on its socket in `folder` until cancelled, then remove the socket.

    `handler` is given the request and returns the answer; a LockfsError it raises is sent to the client.
    `pid`: the process that the mount is known by, this one if it is not said. Any other exception of it is a
    defect: logged, and told to the client, and the mount serves on, for a report must not take guests down.
    At most CONNECTIONS_MAX are served at once, each for at most EXCHANGE_DEADLINE_S.

    Raises:
        SetupError: the socket cannot be made.
    """
    path = (folder or directory()) / socket_name(mountpoint, pid or os.getpid())
    listener = trio.socket.from_stdlib_socket(await trio.to_thread.run_sync(_listening, path))
    places = trio.Semaphore(CONNECTIONS_MAX)
    try:
        async with trio.open_nursery() as nursery:
            task_status.started()
            while True:
                await places.acquire()
                connection = await _accepted(listener)
                nursery.start_soon(_converse, connection, handler, places)
    finally:
        listener.close()
        _forget(path)


def _forget(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


async def _accepted(listener: trio.socket.SocketType) -> trio.socket.SocketType:
    while True:
        try:
            connection, _ = await listener.accept()
        except OSError as error:
            if error.errno not in _PASSING_ERRORS:
                raise
            _log.warning("A control connection could not be accepted: %s", error.strerror)
            await trio.sleep(1)
        else:
            return connection


async def _converse(connection: trio.socket.SocketType, handler: Handler, places: trio.Semaphore) -> None:
    stream = trio.SocketStream(connection)
    try:
        with trio.move_on_after(EXCHANGE_DEADLINE_S), contextlib.suppress(trio.BrokenResourceError):
            line = await _request_line(stream)
            if line is not None:
                await stream.send_all(await _answer(line, handler))
    finally:
        connection.close()
        places.release()


async def _request_line(stream: trio.SocketStream) -> bytes | None:
    """One line without its end; None if the client went away; more than the bound counts as a line."""
    received = bytearray()
    while len(received) <= REQUEST_BYTES_MAX:
        chunk = await stream.receive_some(_CHUNK)
        if not chunk:
            return None
        received += chunk
        end = received.find(b"\n")
        if end >= 0:
            return bytes(received[:end])
    return bytes(received)


def _encoded(message: Message) -> bytes:
    return json.dumps(message, allow_nan=False).encode("ascii") + b"\n"


async def _answer(line: bytes, handler: Handler) -> bytes:
    if len(line) > REQUEST_BYTES_MAX:
        return _encoded({"error": f"The request is longer than {REQUEST_BYTES_MAX} bytes."})
    try:
        request = json.loads(line)
    except (ValueError, RecursionError):
        request = None
    if not isinstance(request, dict):
        return _encoded({"error": "The request is not a JSON object."})
    try:
        answer = _encoded(await handler(request))
    except LockfsError as error:
        return _encoded({"error": str(error)})
    except Exception as error:  # noqa: BLE001  (see serve_control)
        _log.exception("A control request failed: %s", request.get("op"))
        return _encoded({"error": f"The server failed to answer ({type(error).__name__}); its log has more."})
    if len(answer) > RESPONSE_BYTES_MAX:
        return _encoded({"error": f"The answer exceeds {RESPONSE_BYTES_MAX} bytes: ask for one image."})
    return answer


# --- client


def request(path: Path, message: Message, timeout: float = EXCHANGE_DEADLINE_S) -> Message:
    """Ask the server behind a socket; blocks at most `timeout` seconds.

    Raises:
        ServerGone: nobody listens (the dead socket was removed), or the server ended before it answered.
        ControlError: no answer in time, a malformed one, or the server's own complaint.
    """
    deadline = time.monotonic() + timeout
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        try:
            client.settimeout(timeout)
            _connect(client, path)
            client.sendall(_encoded(message))
            line = _response_line(client, deadline)
        except TimeoutError as error:
            raise ControlError(f"The server of {path} did not answer within {timeout:g} seconds.") from error
        except (BrokenPipeError, ConnectionResetError) as error:
            raise ServerGone(f"The server of {path} went away.") from error
        except OSError as error:
            raise ControlError(f"The server of {path} cannot be reached: {error.strerror}.") from error
    if not line:  # closed without an answer: it is ending
        raise ServerGone(f"The server of {path} went away.")
    try:
        answer = json.loads(line)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        raise ControlError(f"The server of {path} gave no proper answer.")
    if "error" in answer:
        raise ControlError(str(answer["error"]))
    return answer


def _connect(client: socket.socket, path: Path) -> None:
    try:
        client.connect(os.fspath(path))
    except FileNotFoundError as error:
        raise ServerGone(f"The socket {path} is gone.") from error
    except ConnectionRefusedError as error:
        if not _may_come_back(path):
            _forget(path)
        raise ServerGone(f"Nobody serves {path} any more.") from error


def _may_come_back(path: Path) -> bool:
    """Whether the process that the socket is named after runs: the mount's next worker may listen in a
    moment.
    """
    pid = path.name.removesuffix(".sock").rpartition("-")[2]
    return pid.isdecimal() and os.path.exists(f"/proc/{pid}")


def _response_line(client: socket.socket, deadline: float) -> bytes:
    received = bytearray()
    while len(received) <= RESPONSE_BYTES_MAX:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        client.settimeout(left)
        chunk = client.recv(_CHUNK)
        if not chunk:
            break
        received += chunk
        if received.endswith(b"\n"):
            break
    return bytes(received)
