"""A QMP client: commands with deadlines, events kept in order."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from pathlib import Path
from typing import Any

COMMAND_S = 40.0
_CONNECT_POLL_S = 0.02


class QmpError(Exception):
    """QEMU answered a command with an error; the text is QEMU's own."""


class QmpClosed(Exception):
    """QEMU closed the monitor: it ended, or was killed."""


class Qmp:
    """One monitor connection. Not for several threads at once."""

    def __init__(self, path: Path, name: str) -> None:
        self.name = name
        self.events: list[dict[str, Any]] = []
        self._path = path
        self._socket: socket.socket | None = None
        self._buffer = b""

    def connect(self, timeout: float, alive: Any) -> None:
        """Connect and negotiate; `alive()` tells whether it is still worth trying."""
        end = time.monotonic() + timeout
        while True:
            sock = socket.socket(socket.AF_UNIX)
            try:
                sock.connect(str(self._path))
                break
            except OSError:
                sock.close()
                if not alive():
                    raise QmpClosed(f"{self.name} ended before its monitor could be reached") from None
                if time.monotonic() > end:
                    raise TimeoutError(f"{self.name}: no monitor within {timeout} s") from None
                time.sleep(_CONNECT_POLL_S)
        self._socket = sock
        self._receive(end)
        self.command("qmp_capabilities", timeout=max(1.0, end - time.monotonic()))

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _receive(self, end: float) -> dict[str, Any]:
        if self._socket is None:
            raise QmpClosed(f"{self.name}: monitor closed")
        while b"\n" not in self._buffer:
            left = end - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"{self.name}: the monitor is silent")
            self._socket.settimeout(left)
            try:
                data = self._socket.recv(65536)
            except TimeoutError:
                continue
            except ConnectionError:
                data = b""
            if not data:
                raise QmpClosed(f"{self.name} closed its monitor")
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        message: dict[str, Any] = json.loads(line)
        return message

    def command(self, command: str, timeout: float = COMMAND_S, **arguments: Any) -> Any:
        """Run one command; underscores in argument names become hyphens. Returns its result.

        Raises:
            QmpError: QEMU refused. QmpClosed: QEMU is gone. TimeoutError: no answer.
        """
        request: dict[str, Any] = {"execute": command}
        if arguments:
            request["arguments"] = {name.replace("_", "-"): value for name, value in arguments.items()}
        if self._socket is None:
            raise QmpClosed(f"{self.name}: monitor closed")
        end = time.monotonic() + timeout
        self._socket.settimeout(timeout)
        try:
            self._socket.sendall(json.dumps(request).encode() + b"\n")
        except ConnectionError as error:
            raise QmpClosed(f"{self.name} closed its monitor") from error
        while True:
            message = self._receive(end)
            if "event" in message:
                self.events.append(message)
            elif "error" in message:
                raise QmpError(f"{self.name}: {command}: {message['error']['desc']}")
            else:
                return message.get("return")

    def wait_event(self, name: str, timeout: float = COMMAND_S, **data: Any) -> dict[str, Any]:
        """The first event of that name whose data has these values, perhaps one that came earlier."""
        end = time.monotonic() + timeout
        seen = 0
        while True:
            while seen < len(self.events):
                event = self.events[seen]
                seen += 1
                values = event.get("data", {})
                if event["event"] == name and all(values.get(key) == value for key, value in data.items()):
                    return event
            message = self._receive(end)
            if "event" in message:
                self.events.append(message)

    def seen(self, name: str) -> int:
        """How many events of that name have come so far."""
        with contextlib.suppress(QmpClosed, TimeoutError):
            self.command("query-name", timeout=5)  # collects what is waiting
        return sum(event["event"] == name for event in self.events)
