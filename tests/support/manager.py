"""A service manager for tests: what systemd does with NOTIFY_SOCKET and its store of descriptors, in small.

As systemd (src/core/service.c, service_add_fd_store) it keeps an open description once, under the first name
that it came by. As systemd (src/core/manager.c, manager_setup_notify) it hears what was sent before it acts
on a death.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lockfs.linux.descriptions import are_one
from tests.support import mounts

STORE_MAX = 4096
WAIT_S = 20.0
_LAUNCH = """
import fcntl, os, sys
names = sys.argv[1].split(":") if sys.argv[1] else []
given = [int(word) for word in sys.argv[2].split(",")] if names else []
high = [fcntl.fcntl(number, fcntl.F_DUPFD, 10000) for number in given]
os.closerange(3, 10000)
for index, number in enumerate(high):
    os.dup2(number, 3 + index)
os.closerange(max(10000, 3 + len(high)), 100000)
if names:
    os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(names)), LISTEN_FDNAMES=":".join(names))
os.execv(sys.argv[3], sys.argv[3:])
"""


@dataclass
class Stored:
    """A descriptor in the store."""

    name: str
    descriptor: int


class ServiceManager:
    """Keeps descriptors and starts lockfs with them."""

    def __init__(self, base: Path) -> None:
        self._base = base
        self._address = str(base / "notify")
        self._channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._channel.bind(self._address)
        self._lock = threading.Lock()
        self.store: list[Stored] = []
        self.said: list[str] = []
        """The messages that are not about descriptors."""
        self._ends = False
        self._started = 0
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def close(self) -> None:
        """Forget everything."""
        self._ends = True
        self._thread.join()
        self._channel.close()
        for stored in self.store:
            os.close(stored.descriptor)

    def _read(self) -> None:
        self._channel.settimeout(0.02)
        while not self._ends:
            with contextlib.suppress(TimeoutError):
                data, messages, _, _ = self._channel.recvmsg(4096, socket.CMSG_SPACE(64))
                descriptors = array.array("i")
                for _, _, rights in messages:
                    descriptors.frombytes(rights)
                self._take(dict(line.split("=", 1) for line in data.decode().splitlines()), list(descriptors))

    def _take(self, words: dict[str, str], descriptors: list[int]) -> None:
        name = words.get("FDNAME", "stored")
        with self._lock:
            if "FDSTORE" in words:
                for descriptor in descriptors:
                    twice = any(are_one(descriptor, stored.descriptor) for stored in self.store)
                    if twice or len(self.store) >= STORE_MAX:
                        os.close(descriptor)
                    else:
                        self.store.append(Stored(name, descriptor))
            elif "FDSTOREREMOVE" in words:
                self._remove(name)
            else:
                self.said += [f"{word}={text}" for word, text in words.items()]

    def _remove(self, name: str) -> None:
        for stored in [stored for stored in self.store if stored.name == name]:
            self.store.remove(stored)
            os.close(stored.descriptor)

    def hear_all(self) -> None:
        """Return when everything that was sent up to here has been heard."""
        self._started += 1
        word = f"HEARD={self._started}"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.sendto(word.encode(), self._address)
        self.await_true(lambda: word in self.said, "what was sent")

    def leads_to(self, file: str) -> list[str]:
        """The names of what is stored of a file, by the end of its name in /proc."""
        with self._lock:
            links = [(s.name, os.readlink(f"/proc/self/fd/{s.descriptor}")) for s in self.store]
        return [name for name, link in links if link.endswith(file)]

    def lose(self, *names: str) -> None:
        """Drop descriptors, as if they had been sent too late."""
        with self._lock:
            for name in names:
                self._remove(name)

    def await_said(self, word: str, times: int = 1) -> None:
        """Wait for a message."""
        self.await_true(lambda: sum(said.startswith(word) for said in self.said) >= times, word)

    def await_true(self, condition: Callable[[], object], what: str) -> None:
        """Wait until a condition holds."""
        end = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < end, f"waited for {what}; {self.said} {self.store}"
            time.sleep(0.01)

    def start(self, source: Path, path: Path, options: str = "") -> mounts.Mount:
        """Start lockfs, with what is stored, without waiting for it. Nothing here may look at `path`: while
        nobody serves it, that waits.
        """
        self.hear_all()
        command = [sys.executable, "-m", "lockfs.cli.main", "-f"]
        command += ["-o", options] if options else []
        command += [str(source), str(path)]
        log_file = self._base / f"{path.name}.log"
        environment = {**os.environ, "NOTIFY_SOCKET": self._address, "FDSTORE": str(STORE_MAX)}
        with self._lock, open(log_file, "ab") as output:
            numbers = [stored.descriptor for stored in self.store]
            names = ":".join(stored.name for stored in self.store)
            process = subprocess.Popen(
                [sys.executable, "-c", _LAUNCH, names, ",".join(map(str, numbers)), *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=numbers,
                env=environment,
            )
        return mounts.Mount(source, path, process, log_file)

    def again(self, mount: mounts.Mount, options: str = "") -> None:
        """Kill every process of a mount, and start it again."""
        mount.wait_ready()
        said = sum(word.startswith("READY=1") for word in self.said)
        mount.kill()
        mount.process = self.start(mount.source, mount.path, options).process
        self.await_said("READY=1", said + 1)


@contextlib.contextmanager
def service_manager(base: Path) -> Iterator[ServiceManager]:
    """One for the length of a block."""
    manager = ServiceManager(base)
    try:
        yield manager
    finally:
        manager.close()


@contextlib.contextmanager
def managed(manager: ServiceManager, source: Path, path: Path, options: str = "") -> Iterator[mounts.Mount]:
    """A mount under a service manager."""
    source.mkdir(exist_ok=True)
    path.mkdir()
    mount = manager.start(source, path, options)
    try:
        manager.await_said("READY=1")
        yield mount
        mount.stop()
    except BaseException:
        with contextlib.suppress(OSError):
            mount.kill()
        mount.process.kill()
        mount.process.wait()
        subprocess.run(["umount", "-l", str(path)], check=False, capture_output=True)
        raise
