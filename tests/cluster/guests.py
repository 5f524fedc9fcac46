"""Guests that play hosts: started, spoken to, cut off, frozen and ended by a test."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.cluster import agent
from tests.cluster.root import Root
from tests.support.qemu import POLL_S, Build, Fleet, Qemu, eventually

BOOT_S = 120.0
ANSWER_S = 60.0
MEMORY_MIB = 512
IMAGE_MOUNT = "/mnt"
STORE = "/srv"
# The clock must be one that runs on while the QEMU is stopped by a signal. The rest saves time.
_KERNEL_OPTIONS = (
    "console=ttyS0 quiet panic=-1 tsc=reliable clocksource=tsc mitigations=off nokaslr lsm= audit=0"
)
_RESET = "softdog: Initiating system reboot"
IMAGE = "disk"
LOG = "/run/lockfs.log"
PYTHON = os.path.realpath(sys.executable)


class NoAnswer(Exception):
    """The guest's agent did not answer in time, or its QEMU is gone."""


class Line:
    """The test's end of a guest's virtio-serial port: one request at a time."""

    def __init__(self, path: Path, name: str) -> None:
        self._name = name
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._buffer = b""
        self._asked = 0

    def close(self) -> None:
        """Close this end; the guest sees nothing of it."""
        self._socket.close()

    def ask(self, op: str, within: float = ANSWER_S, **arguments: Any) -> dict[str, Any]:
        """One request; returns the answer.

        Raises:
            NoAnswer: not `within` so many seconds. AssertionError: the agent could not do it.
        """
        end = time.monotonic() + within
        self._asked += 1
        try:
            self._socket.sendall(json.dumps({"id": self._asked, "op": op, **arguments}).encode() + b"\n")
            while (reply := self._answer(end))["id"] != self._asked:
                pass  # the answer to a request that was given up
        except (OSError, EOFError) as error:
            raise NoAnswer(f"{self._name} does not answer {op}: {error}") from error
        assert "error" not in reply, f"{self._name}: {op} {arguments}: {reply['error']}"
        return reply

    def _answer(self, end: float) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            self._socket.settimeout(max(0.001, end - time.monotonic()))
            data = self._socket.recv(65536)
            if not data:
                raise EOFError("it is gone")
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        reply: dict[str, Any] = json.loads(line)
        return reply


@dataclass
class Guest:
    """One running host."""

    name: str
    machine: Qemu
    line: Line
    console: Path
    _ahead: float = 0.0

    def boot_at(self, monotonic: float) -> float:
        """What its boot clock shows, or would show, when this machine's monotonic clock shows that."""
        return monotonic + self._ahead

    def learn_clock(self) -> None:
        """Compare its clock with this machine's; the answer's way counts as no time."""
        self._ahead = float(self.line.ask("clock")["boot"]) - time.monotonic()

    def run(self, *argv: str, timeout: float = ANSWER_S, check: bool = True) -> str:
        """Run a program to its end; returns what it printed."""
        reply = self.line.ask("run", timeout + ANSWER_S, argv=argv, timeout=timeout)
        assert not check or reply["code"] == 0, f"{self.name}: {argv}: {reply}"
        return str(reply["text"])

    def busybox(self, *argv: str, timeout: float = ANSWER_S, check: bool = True) -> str:
        """Run one of busybox's programs."""
        return self.run("/usr/bin/busybox", *argv, timeout=timeout, check=check)

    def start(self, *argv: str, log: str) -> int:
        """Start a program in the background; returns its pid there."""
        return int(self.line.ask("start", argv=argv, log=log)["pid"])

    def read(self, path: str) -> str:
        """A text file's content; empty if it is not there."""
        return str(self.line.ask("read", path=path)["text"])

    def log(self) -> str:
        """What lockfs wrote there."""
        return self.read(LOG)

    def load_modules(self) -> None:
        """Load what the network and NFS need."""
        script = 'set -e; while read name; do busybox insmod "/modules/$name.ko"; done </modules/order'
        self.busybox("sh", "-c", script)

    def cut_power(self) -> None:
        """End it as a power cut would: nothing is flushed, nobody is told."""
        self.line.close()
        self.machine.kill()

    def was_reset(self) -> bool:
        """Whether its watchdog has reset it. Its QEMU ends with that (-no-reboot), when no server that is
        stopped keeps it.
        """
        return _RESET in self.console.read_text(errors="replace")

    def freeze(self, *, clocks: bool) -> None:
        """Stop it as a whole; with `clocks` its clocks stop as well, as if no time passed."""
        if clocks:
            self.machine.command("stop")
        else:
            os.kill(self.machine.pid, signal.SIGSTOP)

    def thaw(self, *, clocks: bool) -> None:
        """Let it run on after `freeze` with the same argument."""
        if clocks:
            self.machine.command("cont")
        else:
            os.kill(self.machine.pid, signal.SIGCONT)

    def link(self, *, up: bool) -> None:
        """Plug its network in, or out."""
        self.machine.command("set_link", name="net0", up=up)

    def report(self) -> str:
        """What its console shows, and lockfs's log if it can be had."""
        log = ""
        with contextlib.suppress(NoAnswer, AssertionError):
            log = self.line.ask("read", 5.0, path=LOG)["text"]
        console = self.console.read_text(errors="replace")[-4000:]
        return f"--- {self.name}: console:\n{console}\n--- {self.name}: lockfs:\n{log}"


@dataclass
class Cluster:
    """Where guests are started: the programs, the root they share, and the processes of this test."""

    build: Build
    root: Root
    fleet: Fleet
    guests: list[Guest] = field(default_factory=list)

    def boot(self, name: str, devices: Sequence[str]) -> Guest:
        """Start a guest and wait until its agent answers."""
        serial, port = self.fleet.work / f"{name}.console", self.fleet.work / f"{name}.agent"
        machine = self.fleet.launch(
            self.build,
            [
                "-kernel", str(self.root.kernel), "-initrd", str(self.root.initramfs),
                "-append", _KERNEL_OPTIONS,
                # QEMU 7.2 gets the flags of a cmpxchg16b wrong when an interrupt comes at that moment.
                "-cpu", "qemu64,-cx16", "-no-reboot",
                "-serial", f"file:{serial}",
                "-drive", f"file={self.root.image},format=raw,if=none,id=root,read-only=on",
                "-device", "virtio-blk-pci,drive=root",
                "-device", "virtio-serial-pci",
                "-chardev", f"socket,id=agent,path={port},server=on,wait=off",
                "-device", f"virtserialport,chardev=agent,name={agent.PORT}",
                *devices,
            ],
            name,
            memory=MEMORY_MIB,
        ).connect()  # fmt: skip
        guest = Guest(name, machine, Line(port, name), serial)
        self.guests.append(guest)
        try:
            guest.line.ask("clock", BOOT_S)
            guest.learn_clock()
        except NoAnswer as error:
            raise AssertionError(f"{error}: {machine.output}{serial.read_text(errors='replace')}") from error
        return guest

    def end(self) -> None:
        """Close the lines; the fleet ends the processes."""
        for guest in self.guests:
            guest.line.close()


# --- lockfs and writers in a guest


def mount(guest: Guest, options: str, timeout: float = BOOT_S) -> None:
    """Mount the store with lockfs and wait until it serves."""
    guest.busybox("mkdir", "-p", "/run/state")
    guest.start(
        PYTHON, "-m", "lockfs.cli.main", "-f", "-o", f"host={guest.name},{options}", STORE, IMAGE_MOUNT,
        log=LOG,
    )  # fmt: skip
    eventually(lambda: " serves " in guest.read(LOG), f"{guest.name} serves", timeout, 0.5)


@dataclass
class Writer:
    """A writer in a guest (writer.py), for one term of the image."""

    guest: Guest
    term: int
    image: str = f"{IMAGE_MOUNT}/{IMAGE}"

    def __post_init__(self) -> None:
        self.ended: dict[str, Any] = {}
        self._status = f"/run/writer{self.term}"
        self.guest.start(
            PYTHON, "/lockfs/tests/cluster/writer.py", self.image, self.guest.name, str(self.term),
            self._status, log=f"{self._status}.log",
        )  # fmt: skip

    def status(self) -> dict[str, Any]:
        """What it did so far; empty before it runs."""
        text = self.guest.read(self._status)
        values: dict[str, Any] = json.loads(text) if text.strip() else {}
        log = self.guest.read(f"{self._status}.log")
        assert not log, f"{self.guest.name}: the writer says: {log}"
        return values

    def errors(self) -> dict[str, int]:
        """How often what failed, by what was tried and the error's number."""
        found: dict[str, int] = self.status().get("errors", {})
        return found

    def failing(self) -> bool:
        """Whether the last write failed."""
        return bool(self.status().get("failing"))

    def acknowledged(self) -> int:
        """The number of the last write that succeeded."""
        return int(self.status().get("number", 0))

    def wait_acknowledged(self, more: int, timeout: float = ANSWER_S) -> int:
        """Wait for so many further writes; returns the last number."""
        goal = self.acknowledged() + more
        eventually(
            lambda: self.acknowledged() >= goal, f"{self.guest.name} writes up to {goal}", timeout, POLL_S
        )
        return self.acknowledged()

    def wait_open(self, timeout: float) -> float:
        """Wait until it has the image; returns when that was noticed, as time.monotonic() has it."""
        eventually(
            lambda: self.status().get("state") == "writing", f"{self.guest.name} has the image", timeout, 0.1
        )
        return time.monotonic()

    def end(self) -> dict[str, Any]:
        """Tell it to stop; returns what it did."""
        self.guest.line.ask("write", path=f"{self._status}.stop", text="")
        eventually(
            lambda: self.status()["state"] == "ended", f"{self.guest.name}'s writer ends", ANSWER_S, 0.1
        )
        self.ended = self.status()
        return self.ended
