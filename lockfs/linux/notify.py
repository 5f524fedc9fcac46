"""Talking to a service manager: datagrams to the socket in NOTIFY_SOCKET, with descriptors for its store.

Source: sd_notify(3), sd_listen_fds(3). What is sent is never waited for: what does not go at once waits in a
bounded queue for a thread. A copy of its descriptor waits with it, so what waits stays open a little longer.
"""

from __future__ import annotations

import array
import collections
import contextlib
import os
import select
import socket
import threading
import time
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

QUEUE_MAX = 8192
"""Messages that may wait for the service manager."""
PATIENCE_S = 5.0
"""How long `say` waits for a service manager that does not read."""
_LISTEN_FIRST = 3
_VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")


@dataclass(frozen=True)
class Manager:
    """The service manager that started this program. `store_max`: how many descriptors it keeps, 0: none."""

    address: str
    store_max: int


def manager(environment: Mapping[str, str]) -> Manager | None:
    """Who started this program, None if that was no service manager.

    FDSTORE is set by systemd 254 and later; units for an older one set it themselves.
    """
    address = environment.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return None
    number = environment.get("FDSTORE", "")
    return Manager(address, int(number) if number.isdecimal() else 0)


def take_listed(environment: MutableMapping[str, str]) -> list[tuple[int, str]]:
    """The descriptors that the service manager gave this process, with their names; the words for it are
    taken out of the environment, so that no child takes them for its own.
    """
    words = {name: environment.pop(name, "") for name in _VARIABLES}
    if words["LISTEN_PID"] != str(os.getpid()) or not words["LISTEN_FDS"].isdecimal():
        return []
    numbers = range(_LISTEN_FIRST, _LISTEN_FIRST + int(words["LISTEN_FDS"]))
    names = words["LISTEN_FDNAMES"].split(":")
    if len(names) != len(numbers):
        return []
    return list(zip(numbers, names, strict=True))


def _connected(address: str) -> socket.socket:
    """Raises OSError: nobody listens there."""
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    try:
        channel.connect("\0" + address[1:] if address.startswith("@") else address)
    except OSError:
        channel.close()
        raise
    channel.setblocking(False)
    return channel


def _rights(descriptor: int) -> list[tuple[int, int, array.array[int]]]:
    if descriptor < 0:
        return []
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))]


def say(address: str, *texts: str) -> None:
    """Send texts, each a message, waiting up to PATIENCE_S in all. Nobody to hear it: nothing happens.

    Opens and closes one descriptor.
    """
    end = time.monotonic() + PATIENCE_S
    with contextlib.suppress(OSError), _connected(address) as channel:
        poller = select.poll()
        poller.register(channel, select.POLLOUT)
        for text in texts:
            while True:
                try:
                    channel.send(text.encode())
                except BlockingIOError:
                    if time.monotonic() > end:
                        return
                    poller.poll(100)
                else:
                    break


class Outbox:
    """Messages of one process, sent in order. Thread-safe."""

    def __init__(self, address: str) -> None:
        """Raises OSError: nobody listens there."""
        self._channel = _connected(address)
        self._lock = threading.Lock()
        self._waiting: collections.deque[tuple[bytes, int]] = collections.deque()
        self._drains = False
        self.lost = 0
        """How many messages were given up: the queue was full, or the service manager is gone."""

    def send(self, text: str, descriptor: int = -1) -> None:
        """Send, or have sent, a message and what `descriptor` leads to at this moment. Instant."""
        data = text.encode()
        with self._lock:
            if not self._waiting and self._send(data, descriptor):
                return
            if len(self._waiting) >= QUEUE_MAX:
                self.lost += 1
                return
            self._waiting.append((data, os.dup(descriptor) if descriptor >= 0 else -1))
            if not self._drains:
                self._drains = True
                threading.Thread(target=self._drain, name="service-manager", daemon=True).start()

    def _send(self, data: bytes, descriptor: int) -> bool:
        """Whether that is done with; False: later."""
        try:
            self._channel.sendmsg([data], _rights(descriptor))
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:
            self.lost += 1
        return True

    def _drain(self) -> None:
        """Send what waits, on a thread that ends when nothing does."""
        poller = select.poll()
        poller.register(self._channel, select.POLLOUT)
        while True:
            with self._lock:
                while self._waiting and self._send(*self._waiting[0]):
                    _, descriptor = self._waiting.popleft()
                    if descriptor >= 0:
                        os.close(descriptor)
                if not self._waiting:
                    self._drains = False
                    return
            poller.poll(1000)
