"""The unit under a real systemd: whoever of a mount's processes is killed, clients see a pause at most."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import container
from tests.cluster.container import MOUNT, STORE, UNIT, Container
from tests.support import write_loop
from tests.support.mounts import mounted
from tests.support.qemu import eventually

pytestmark = [pytest.mark.slow, pytest.mark.cluster]

BACKENDS = {
    "nop": "backend=nop",
    "fcntl": "backend=fcntl,wait=0,host=",
    "paxos": "backend=paxos,io_timeout=2,join=wait,wait=0,host=",
}
KILLS = 5
END_S = 60.0


@pytest.fixture
def system(tmp_path: Path) -> Iterator[Container]:
    """A container with an empty store."""
    if os.geteuid() != 0:
        pytest.skip("a container is started by root")
    if missing := container.missing():
        pytest.skip(f"not installed: {', '.join(missing)} (Debian: systemd-container)")
    store, base = tmp_path / "store", tmp_path / "container"
    store.mkdir()
    base.mkdir()
    with container.container(base, store) as made:
        yield made


class Client:
    """A program inside that writes to an image, and a rival on another host that wants the same one."""

    def __init__(self, system: Container, base: Path, options: str) -> None:
        self._system = system
        self._stop = system.store / "stop"
        (system.store / "image").write_bytes(bytes(write_loop.RECORD * write_loop.RECORDS))
        loop = [sys.executable, write_loop.__file__, f"{MOUNT}/image", f"{STORE}/stop"]
        self._base, self._options = base, options
        self._done, self._refused, self.got = threading.Event(), 0, False
        self._writer = subprocess.Popen(system.inside(*loop), stdout=subprocess.PIPE)
        assert self._writer.stdout is not None
        self.says_open = self._writer.stdout.readline() == b"open\n"

    @contextlib.contextmanager
    def contended(self) -> Iterator[None]:
        """For the length of a block the rival tries all the time."""
        if "host=" not in self._options:
            yield
            return
        options = f"{self._options}hostB"
        with mounted(self._system.store, self._base / "rival", options) as rival:
            thread = threading.Thread(target=self._try, args=(rival.path / "image",))
            thread.start()
            try:
                yield
                assert not self.got, "another host had the image of a writer"
                assert self._refused
                self.end()
                eventually(lambda: self.got, "the image for the other host", END_S)
            finally:
                self._done.set()
                thread.join()

    def _try(self, image: Path) -> None:
        while not self._done.is_set() and not self.got:
            try:
                os.close(os.open(image, os.O_RDWR))
                self.got = True
            except OSError:
                self._refused += 1

    def kill(self) -> None:
        """Give the writer up: it runs in the container, and ends with it."""
        assert self._writer.stdout is not None
        self._writer.stdout.close()
        if self._writer.poll() is None:
            self._writer.kill()
        self._writer.wait()

    def end(self) -> None:
        """End the writer, which must have seen no error."""
        if self._stop.exists():  # the rival's end wanted it
            return
        self._stop.touch()
        output, _ = self._writer.communicate(timeout=END_S)
        assert self._writer.returncode == 0
        assert int(output) > 0


@contextlib.contextmanager
def _client(system: Container, base: Path, options: str) -> Iterator[Client]:
    client = Client(system, base, options)
    try:
        assert client.says_open
        yield client
        client.end()
    except BaseException:
        print(system.log())
        raise
    finally:
        client.kill()


def _start(system: Container, options: str) -> None:
    system.configure(options + "hostA" if "host=" in options else options)
    system.run("systemctl", "start", UNIT)


def _stop(system: Container) -> None:
    """An orderly end leaves nothing behind."""
    system.run("systemctl", "stop", UNIT)
    assert system.property("Result") == "success"
    assert system.property("NFileDescriptorStore") == "0"
    assert MOUNT not in system.run("cat", "/proc/self/mounts")


def _kill(system: Container, whom: str) -> None:
    before = int(system.property("NRestarts"))
    # It fails where a process ends in between: of the death of one the others hear soon.
    kill = system.inside("systemctl", "kill", "--signal=KILL", f"--kill-who={whom}", UNIT)
    subprocess.run(kill, check=False, capture_output=True, timeout=END_S)
    eventually(
        lambda: int(system.property("NRestarts")) > before and system.property("ActiveState") == "active",
        "the unit's restart",
        END_S,
    )


def _await_turn(system: Container, turn: int) -> None:
    def serves() -> bool:
        _, found, later = system.log().partition(f"takes over (turn {turn})")
        return bool(found) and f"{MOUNT} serves " in later

    eventually(serves, f"service in turn {turn}", END_S)


@pytest.mark.parametrize("whom", ["all", "main"])
@pytest.mark.parametrize("options", BACKENDS.values(), ids=BACKENDS)
def test_it_is_brought_back(system: Container, tmp_path: Path, options: str, whom: str) -> None:
    """All processes at once; the guardian alone, of which systemd makes the same."""
    _start(system, options)
    with _client(system, tmp_path, options) as client, client.contended():
        for _ in range(KILLS):
            _kill(system, whom)
    assert system.property("NRestarts") == str(KILLS)
    _stop(system)


@pytest.mark.parametrize("options", BACKENDS.values(), ids=BACKENDS)
def test_a_reload_upgrades(system: Container, tmp_path: Path, options: str) -> None:
    _start(system, options)
    with _client(system, tmp_path, options) as client, client.contended():
        for turn in range(2, 5):
            system.run("systemctl", "reload", UNIT)
            _await_turn(system, turn)
    assert system.property("NRestarts") == "0"
    assert system.property("ActiveState") == "active"
    _stop(system)


def test_a_killed_worker_is_lockfs_own_business(system: Container, tmp_path: Path) -> None:
    """systemd does not notice, and has in its store what the next worker opened."""
    _start(system, BACKENDS["nop"])
    with _client(system, tmp_path, BACKENDS["nop"]):
        for turn in range(2, 5):
            (worker,) = system.run("pgrep", "-x", "lockfs-worker").split()
            system.run("kill", "-KILL", worker)
            _await_turn(system, turn)
        assert system.property("NRestarts") == "0"
        _kill(system, "all")
    _stop(system)
