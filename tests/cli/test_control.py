"""The control socket answers whoever may ask, whatever they send, and leaves nothing behind."""

from __future__ import annotations

import functools
import json
import os
import socket
import stat
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lockfs.errors import SetupError, UsageError
from lockfs.mount import control
from lockfs.mount.control import ControlError, Message, ServerGone

POINT = "/mnt/images"


async def echo(request: Message) -> Message:
    """Answers with the request; fails as it is told."""
    match request.get("op"):
        case "usage":
            raise UsageError("There is no such operation.")
        case "defect":
            raise ZeroDivisionError("a defect")
        case "huge":
            return {"text": "x" * control.RESPONSE_BYTES_MAX}
        case "nan":
            return {"number": float("nan")}
    return {"request": request}


@asynccontextmanager
async def served(folder: Path) -> AsyncIterator[Path]:
    """A server in `folder`; yields its socket."""
    async with trio.open_nursery() as nursery:
        await nursery.start(functools.partial(control.serve_control, POINT, echo, folder=folder))
        yield folder / control.socket_name(POINT, os.getpid())
        nursery.cancel_scope.cancel()


async def ask(path: Path, message: Message) -> Message:
    """One request through the client."""
    return await trio.to_thread.run_sync(control.request, path, message)


async def send_raw(path: Path, data: bytes, *, end: bool = False) -> bytes:
    """Send bytes and read until the server closes; `end` says that no more will come."""
    received = b""
    async with await trio.open_unix_socket(path) as stream:
        try:
            await stream.send_all(data)
            if end:
                await stream.send_eof()
            async for chunk in stream:
                received += chunk
        except trio.BrokenResourceError:
            pass
    return received


async def test_question_and_answer(tmp_path: Path) -> None:
    """A request comes back as sent, odd names included; the socket is its owner's alone and goes away."""
    folder = tmp_path / "run"
    async with served(folder) as path:
        message = {"op": "x", "path": os.fsdecode(b"\xff\n\xc3\xa4")}
        assert await ask(path, message) == {"request": message}
        assert control.find_sockets(folder) == [path]
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(folder.iterdir()) == []


async def test_errors_are_answers(tmp_path: Path, expect_log: object) -> None:
    """An expected failure, a defect, a huge answer each reach the client as a sentence; serving goes on."""
    assert callable(expect_log)
    expect_log("ERROR lockfs.mount.control: A control request failed", 2)
    async with served(tmp_path) as path:
        for operation, words in (
            ("usage", "no such operation"),
            ("defect", "ZeroDivisionError"),
            ("nan", "ValueError"),
            ("huge", "exceeds"),
        ):
            with pytest.raises(ControlError, match=words):
                await ask(path, {"op": operation})
        assert await ask(path, {}) == {"request": {}}


@pytest.mark.parametrize("data", [b"\n", b"[1]\n", b"{\n", b"\xff\xfe\n", b"[" * 60000 + b"\n", b"nul\0l\n"])
async def test_garbage(tmp_path: Path, data: bytes) -> None:
    """What is no JSON object is answered with an error."""
    async with served(tmp_path) as path:
        assert "error" in json.loads(await send_raw(path, data))


async def test_oversize(tmp_path: Path) -> None:
    """A request beyond the bound is refused without reading on."""
    async with served(tmp_path) as path:
        answer = await send_raw(path, b" " * (control.REQUEST_BYTES_MAX + 1))
        assert "longer" in json.loads(answer)["error"]


async def test_clients_that_go_away(tmp_path: Path) -> None:
    """A client that says nothing, half a line, or leaves before the answer holds nothing up."""
    async with served(tmp_path) as path:
        assert await send_raw(path, b"", end=True) == b""
        assert await send_raw(path, b'{"op"', end=True) == b""
        for _ in range(3):
            stream = await trio.open_unix_socket(path)
            await stream.send_all(b'{"op": "huge"}\n')
            await stream.aclose()
        assert await ask(path, {}) == {"request": {}}


async def test_silent_clients_are_dropped(tmp_path: Path, autojump_clock: trio.abc.Clock) -> None:
    """Clients that occupy every place and stay silent lose them at the deadline."""
    async with served(tmp_path) as path:
        silent = [await trio.open_unix_socket(path) for _ in range(control.CONNECTIONS_MAX)]
        begin = trio.current_time()
        answer = await send_raw(path, b"{}\n")
        assert json.loads(answer) == {"request": {}}
        assert trio.current_time() - begin <= control.EXCHANGE_DEADLINE_S + 1
        for stream in silent:
            await stream.aclose()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_any_line(tmp_path: Path, data: bytes) -> None:
    """Whatever a line says, the answer is one JSON object on one line."""

    async def check() -> None:
        answer = await control._answer(data, echo)
        assert answer.endswith(b"\n")
        assert answer.count(b"\n") == 1
        assert isinstance(json.loads(answer), dict)

    trio.run(check)


def test_dead_socket(tmp_path: Path) -> None:
    """A socket whose server is gone is recognised and removed; a missing one is told apart from silence."""
    path = tmp_path / "0-4194305.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with pytest.raises(ServerGone):
        control.request(path, {})
    assert not path.exists()
    with pytest.raises(ServerGone):
        control.request(path, {})


@pytest.mark.parametrize(
    ("reply", "words"), [(b"", "went away"), (b"{}", None), (b"[]\n", "proper"), (b"\xff\n", "proper")]
)
def test_improper_servers(tmp_path: Path, reply: bytes, words: str | None) -> None:
    """The client takes one JSON object, and says so if it gets something else."""
    path = tmp_path / "0-4194305.sock"

    def answer(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(1000)
            connection.sendall(reply)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        server = threading.Thread(target=answer, args=(listener,))
        server.start()
        if words is None:
            assert control.request(path, {}) == {}
        else:
            with pytest.raises(ControlError, match=words):
                control.request(path, {})
        server.join()


def test_silent_server(tmp_path: Path) -> None:
    """A server that accepts nothing costs the client its timeout, no more."""
    path = tmp_path / "0-4194305.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with pytest.raises(ControlError, match=r"within 0\.05 seconds"):
            control.request(path, {}, 0.05)


async def test_unsafe_directory(tmp_path: Path) -> None:
    """A directory that others may write to, or a path too long for a socket, is refused."""
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(SetupError, match="open to others"):
        await control.serve_control(POINT, echo, folder=folder)
    with pytest.raises(SetupError, match="too long"):
        await control.serve_control(POINT, echo, folder=tmp_path / ("x" * 120))
    with pytest.raises(SetupError, match="cannot be made"):
        await control.serve_control(POINT, echo, folder=tmp_path / "none" / "such")


def test_no_directory(tmp_path: Path) -> None:
    """Without a directory there are no sockets; other files in it are not taken for some."""
    assert control.find_sockets(tmp_path / "none") == []
    (tmp_path / "notes").touch()
    (tmp_path / "a.sock.new").touch()
    assert control.find_sockets(tmp_path) == []
