"""Real QEMUs for tests: start them, talk to them, and be sure that they are gone at the end."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from tests.support import guest
from tests.support.qmp import COMMAND_S, Qmp, QmpClosed, QmpError

START_S = 40.0
END_S = 20.0
POLL_S = 0.02

Style = Literal["drive", "auto", "rw"]
STYLES: tuple[Style, ...] = ("drive", "auto", "rw")


@dataclass(frozen=True)
class Build:
    """One QEMU release: where its programs are and what they need to run."""

    version: str
    root: Path | None = None  # where packages were unpacked; None: installed on this machine
    libraries: tuple[Path, ...] = ()

    def program(self, name: str) -> str:
        """Full path of one of its programs, such as qemu-img."""
        if self.root is not None:
            return str(self.root / "usr/bin" / name)
        found = shutil.which(name)
        if found is None:
            raise FileNotFoundError(f"{name} is not installed")
        return found

    @property
    def environment(self) -> dict[str, str]:
        values = dict(os.environ)
        if self.root is not None:
            values["LD_LIBRARY_PATH"] = ":".join(map(str, self.libraries))
            values["QEMU_MODULE_DIR"] = str(self.root / "usr/lib/x86_64-linux-gnu/qemu")
        return values

    @property
    def firmware(self) -> list[str]:
        if self.root is None:
            return []
        return ["-L", str(self.root / "usr/share/qemu"), "-L", str(self.root / "usr/share/seabios")]

    def run(self, name: str, *args: str | Path, check: bool = True, timeout: float = 60) -> Ran:
        """Run one of its tools to its end."""
        done = subprocess.run(
            [self.program(name), *map(str, args)], env=self.environment, timeout=timeout, check=False,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        if check and done.returncode:
            raise AssertionError(f"{name} {' '.join(map(str, args))}: exit {done.returncode}: {done.stdout}")
        return Ran(done.returncode, done.stdout)

    def img(self, *args: str | Path, check: bool = True, timeout: float = 60) -> str:
        """Run qemu-img; returns what it printed."""
        return self.run("qemu-img", *args, check=check, timeout=timeout).text


@dataclass(frozen=True)
class Ran:
    """How a tool ended, and everything it printed."""

    code: int
    text: str


def installed() -> Build | None:
    """The QEMU installed on this machine, if there is one."""
    program = shutil.which("qemu-system-x86_64")
    if program is None:
        return None
    done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=20, check=True)
    found = re.search(r"version (\d+\.\d+)", done.stdout)
    return Build(found[1] if found else "?")


def disk(
    style: Style, image_format: str, path: Path | str, *, options: str = "", direct: bool = False
) -> list[str]:
    """Arguments for one virtio disk, node or drive "disk0".

    "drive" is -drive; "auto" is -blockdev as libvirt writes it (auto-read-only=on on the protocol node); "rw"
    is -blockdev with its default auto-read-only=off. `options` are added to -drive, or to the device.
    """
    device = ["-device", "virtio-blk-pci,drive=disk0,id=dev0,bootindex=0"]
    if style == "drive":
        cache = ",cache=none" if direct else ""
        return [
            "-drive",
            f"file={path},format={image_format},if=none,id=disk0,discard=unmap{cache}{options}",
            *device,
        ]
    protocol = {
        "driver": "file", "filename": str(path), "node-name": "file0", "auto-read-only": style == "auto",
        "discard": "unmap", "cache": {"direct": direct, "no-flush": False},
    }  # fmt: skip
    node = {
        "driver": image_format,
        "node-name": "disk0",
        "file": "file0",
        "read-only": False,
        "discard": "unmap",
    }
    device[1] += options
    return ["-blockdev", json.dumps(protocol), "-blockdev", json.dumps(node), *device]


class QemuRefused(Exception):
    """QEMU ended instead of starting; the text is what it printed."""


class Qemu:
    """One QEMU process under TCG with a monitor. Use it as a context manager, or through a Fleet."""

    def __init__(self, build: Build, name: str, work: Path, args: Sequence[str], memory: int = 32) -> None:
        self.build = build
        self.name = name
        self.qmp = Qmp(work / f"{name}.qmp", name)
        self._log = work / f"{name}.log"
        command = [
            build.program("qemu-system-x86_64"), *build.firmware,
            "-name", name, "-M", "pc", "-accel", "tcg", "-m", str(memory), "-nodefaults", "-display", "none",
            "-qmp", f"unix:{work / f'{name}.qmp'},server=on,wait=off", *args,
        ]  # fmt: skip
        with open(self._log, "wb") as log:
            self.process = subprocess.Popen(
                command, env=build.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def connect(self, timeout: float = START_S) -> Self:
        """Wait until the monitor answers.

        Raises:
            QemuRefused: QEMU ended; the text is what it printed.
        """
        try:
            self.qmp.connect(timeout, lambda: self.process.poll() is None)
        except QmpClosed:
            code = self.process.wait(END_S)
            raise QemuRefused(f"{self.name} ended with {code}: {self.output}") from None
        return self

    def command(self, command: str, timeout: float = COMMAND_S, **arguments: Any) -> Any:
        return self.qmp.command(command, timeout, **arguments)

    def status(self) -> str:
        return str(self.command("query-status")["status"])

    def wait_status(self, *wanted: str, timeout: float = COMMAND_S) -> str:
        """Wait until the run state is one of `wanted`."""
        end = time.monotonic() + timeout
        while (status := self.status()) not in wanted:
            if time.monotonic() > end:
                raise AssertionError(f"{self.name} is {status}, not {wanted}: {self.output}")
            time.sleep(POLL_S)
        return status

    def hmp(self, line: str) -> str:
        return str(self.command("human-monitor-command", command_line=line))

    def _word(self, address: int) -> int:
        text = self.hmp(f"xp /1wx {address:#x}")
        return int(text.split(":")[1].strip(), 16)

    def written(self) -> int:
        """How many writes of the guest (tests.support.guest) were acknowledged to it."""
        return self._word(guest.COUNTER)

    def wait_written(self, more: int = 1, timeout: float = COMMAND_S) -> int:
        """Wait until the guest has made `more` further writes; returns the new count."""
        start = self.written()
        end = time.monotonic() + timeout
        while (now := self.written()) < start + more:
            if time.monotonic() > end:
                raise AssertionError(
                    f"{self.name} stands at write {now}, status {self.status()}, "
                    f"errors {self._word(guest.ERRORS)}: {self.output}"
                )
            time.sleep(POLL_S)
        return now

    def halt(self) -> int:
        """Stop the guest's processors; returns how many writes were acknowledged to it."""
        self.command("stop")
        return self.written()

    def quit(self, timeout: float = END_S) -> int:
        """End QEMU through its monitor; returns its exit code."""
        with contextlib.suppress(QmpClosed):
            self.command("quit")
        self.qmp.close()
        return self.process.wait(timeout)

    def kill(self) -> None:
        """End QEMU at once, whatever it does; harmless if it ended."""
        self.qmp.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait(END_S)

    def wait_job(self, job: str, state: str = "concluded", timeout: float = COMMAND_S) -> None:
        """Wait for a block job's state; "concluded" also means that it is gone."""
        end = time.monotonic() + timeout
        while True:
            jobs = {entry["id"]: entry for entry in self.command("query-jobs")}
            now = jobs.get(job, {"status": "concluded"})
            if now.get("error"):
                raise AssertionError(f"job {job} failed: {now['error']}")
            if now["status"] == state:
                return
            if time.monotonic() > end:
                raise AssertionError(f"job {job} is {now}")
            time.sleep(POLL_S)


@dataclass
class Fleet:
    """All QEMUs and helper processes of one test, in one short-named directory (unix sockets need that)."""

    work: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="lockfs-vm-")))
    machines: list[Qemu] = field(default_factory=list)
    _names: Any = field(default_factory=lambda: itertools.count(1))
    _others: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, build: Build, args: Sequence[str], name: str = "vm", **options: Any) -> Qemu:
        """Start a QEMU and wait for its monitor."""
        return self.launch(build, args, name, **options).connect()

    def launch(self, build: Build, args: Sequence[str], name: str = "vm", **options: Any) -> Qemu:
        """Start a QEMU; do not wait for it."""
        machine = Qemu(build, f"{name}{next(self._names)}", self.work, args, **options)
        self.machines.append(machine)
        return machine

    def refused(self, build: Build, args: Sequence[str], name: str = "refused", **options: Any) -> str:
        """Start a QEMU that must end by itself; returns what it printed."""
        machine = self.launch(build, args, name, **options)
        try:
            machine.connect()
        except QemuRefused as error:
            return str(error)
        raise AssertionError(f"{machine.name} started: {args}")

    def spawn(
        self, command: Sequence[str | Path], env: dict[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start any other process that must not outlive the test."""
        with open(self.work / f"process{next(self._names)}.log", "wb") as log:
            process = subprocess.Popen(
                [str(part) for part in command], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env
            )
        self._others.append(process)
        return process

    def end(self) -> None:
        """Kill what still runs, newest first, and remove the directory."""
        for machine in reversed(self.machines):
            machine.kill()
        for process in reversed(self._others):
            if process.poll() is None:
                process.kill()
                process.wait(END_S)
        shutil.rmtree(self.work, ignore_errors=True)

    def path(self, suffix: str) -> Path:
        """A new name in the directory."""
        return self.work / f"{next(self._names)}.{suffix}"

    def report(self) -> str:
        """What every QEMU printed, for a failed test."""
        return "\n".join(f"--- {vm.name} ({vm.process.poll()}): {vm.output}" for vm in self.machines)


def eventually(
    condition: Callable[[], Any], what: str, timeout: float = COMMAND_S, poll: float = POLL_S
) -> Any:
    """Wait until `condition()` is true and return its value; AssertionError with `what` after `timeout`."""
    end = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > end:
            raise AssertionError(f"not within {timeout} s: {what}")
        time.sleep(poll)
    return value


__all__ = [
    "STYLES", "Build", "Fleet", "Qemu", "QemuRefused", "QmpClosed", "QmpError", "Ran", "Style", "disk",
    "eventually", "installed",
]  # fmt: skip
