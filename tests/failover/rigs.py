"""What the kills are aimed at: a mount and, as the second host, another of the same store."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tests.failover import servers

START_S = 60.0
STOP_S = 30.0
SETTLE_S = 20.0
STEADY_S = 1.0
POLL_S = 0.05
LOG_CHARS_MAX = 3000


class RigError(Exception):
    """The mounts did not come up; the text tells why."""


class Rig(Protocol):
    """A store, the place where the victim serves it, and the second host's: None where there are no leases.

    `started` is the process that was started, whose parent is this one.
    """

    store: Path
    near: Path
    far: Path | None
    mark: str
    backend: str

    @property
    def started(self) -> int | None:
        """Its pid, even if it ended."""

    def started_is_killed(self) -> None:
        """It ends by intent: its exit code tells nothing."""

    def bury(self) -> None:
        """Collect it if it ended."""

    def start(self) -> None:
        """Bring everything up. Raises RigError."""

    def stop(self) -> list[str]:
        """End everything, whatever state it is in; returns what was not as it should be."""

    def status(self) -> Mapping[str, Any] | None:
        """What the mount tells of itself; None if it is none that could."""

    def abort(self) -> None:
        """End all of the victim's processes at once, so that nobody waits for them any more."""


@dataclass
class _Lockfs:
    """One lockfs in the foreground."""

    store: Path
    path: Path
    options: str
    mark: str
    log_file: Path
    process: subprocess.Popen[bytes] | None = None
    killed: bool = False

    def start(self) -> None:
        self.path.mkdir()
        command = [
            sys.executable, "-m", "lockfs.cli.main", "-f", "-o", self.options, str(self.store), str(self.path)
        ]  # fmt: skip
        with open(self.log_file, "wb") as output:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                env={**os.environ, servers.MARK: self.mark},
            )  # fmt: skip
        end = time.monotonic() + START_S
        while " serves " not in self.log():
            if self.process.poll() is not None or time.monotonic() > end:
                raise RigError(f"lockfs does not serve {self.path}: {self.log()}")
            time.sleep(POLL_S)

    def log(self) -> str:
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    def mounted(self) -> bool:
        with open("/proc/self/mountinfo") as table:
            return any(f" {self.path} " in line for line in table)

    def stop(self) -> list[str]:
        """Unmount in order, then by force."""
        found: list[str] = []
        end = time.monotonic() + STOP_S
        while self.mounted():
            done = subprocess.run(["umount", str(self.path)], capture_output=True, text=True, check=False)
            if done.returncode and time.monotonic() > end:
                found.append(f"{self.path.name} cannot be unmounted: {done.stderr.strip()}")
                self.kill()
                subprocess.run(["umount", "-l", str(self.path)], check=False)
            time.sleep(POLL_S)
        while servers.marked(self.mark):
            if time.monotonic() > end:
                found.append(f"processes of {self.path.name} are left: {servers.find(self.mark)}")
                self.kill()
                break
            time.sleep(POLL_S)
        if self.process is not None:
            try:
                code = self.process.wait(SETTLE_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                code = self.process.wait(SETTLE_S)
            if code and not self.killed:
                found.append(f"lockfs on {self.path.name} ended with {code}")
        if "Traceback" in self.log():
            trace = self.log()[self.log().index("Traceback") :]
            found.append(f"lockfs on {self.path.name} failed inside: {trace[:LOG_CHARS_MAX]}")
        return found

    def kill(self) -> None:
        self.killed = True
        for pid in servers.marked(self.mark):
            try:
                os.kill(pid, 9)
            except ProcessLookupError:
                continue


@dataclass
class MountRig:
    """Two mounts below `base`, which is an empty directory; the first is the victim."""

    base: Path
    io: str
    backend: str
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    _near: _Lockfs | None = None
    _far: _Lockfs | None = None

    def __post_init__(self) -> None:
        self.store = self.base / "store"
        self.near = self.base / "a"
        self.far = None if self.backend == "nop" else self.base / "b"
        self.store.mkdir()

    def start(self) -> None:
        common = f"backend={self.backend},io={self.io}"
        if self.backend == "paxos":
            common += f",io_timeout=1,join=wait,state_dir={self.base}/state"
        self._near = _Lockfs(self.store, self.near, f"host=hostA,{common}", self.mark, self.base / "a.log")
        self._near.start()
        if self.far is not None:
            options = f"host=hostB,wait=0,{common}"
            self._far = _Lockfs(self.store, self.far, options, f"{self.mark}-far", self.base / "b.log")
            self._far.start()

    def stop(self) -> list[str]:
        return [fault for made in (self._near, self._far) if made is not None for fault in made.stop()]

    def abort(self) -> None:
        for made in (self._near, self._far):
            if made is not None:
                made.kill()

    @property
    def started(self) -> int | None:
        return self._near.process.pid if self._near is not None and self._near.process is not None else None

    def started_is_killed(self) -> None:
        if self._near is not None:
            self._near.killed = True

    def bury(self) -> None:
        if self._near is not None and self._near.process is not None:
            self._near.process.poll()

    def status(self) -> Mapping[str, Any] | None:
        command = [sys.executable, "-m", "lockfs.cli.ctl", "status", "--json"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=STOP_S)
            mounts = json.loads(done.stdout)["mounts"]
        except (subprocess.TimeoutExpired, ValueError, KeyError):
            return {}
        return next((mount for mount in mounts if mount["mountpoint"] == str(self.near)), {})


# --- descriptors


def steady(mark: str) -> list[str]:
    """What the guardian's table has, once it and the processes stay the same for STEADY_S."""
    end = time.monotonic() + SETTLE_S
    known: object = None
    since = time.monotonic()
    while True:
        family = servers.find(mark)
        table = servers.descriptors(family.guardian) if family.guardian else []
        if (family, len(table)) != known:
            known, since = (family, len(table)), time.monotonic()
        if time.monotonic() - since > STEADY_S or time.monotonic() > end:
            return table
        time.sleep(POLL_S)


def _kinds(table: list[str]) -> Counter[str]:
    """Names without the numbers of sockets and pipes, which each worker has of its own."""
    return Counter(re.sub(r"^(socket|pipe):.*", r"\1", name) for name in table)


def leaked(mark: str, before: list[str], within: float) -> list[str]:
    """What the table has more or less than before, after `within` seconds: RELEASE and FORGET come late."""
    end = time.monotonic() + within
    while True:
        family = servers.find(mark)
        table = servers.descriptors(family.guardian) if family.guardian else []
        if len(table) == len(before) or time.monotonic() > end:
            break
        # The kernel keeps looked-up names until it is short of memory or told to let go.
        Path("/proc/sys/vm/drop_caches").write_text("2")
        time.sleep(4 * POLL_S)
    if len(table) == len(before):
        return []
    more, fewer = _kinds(table) - _kinds(before), _kinds(before) - _kinds(table)
    return [
        f"{len(table)} descriptors, {len(before)} at the start",
        *(f"more: {name} ({count})" for name, count in more.most_common(20)),
        *(f"fewer: {name} ({count})" for name, count in fewer.most_common(20)),
    ]
