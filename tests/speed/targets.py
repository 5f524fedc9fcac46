"""The mounts that a measurement compares, all of one backing directory at the same time.

Every target mirrors the same directory, so each reads and writes the very same blocks of the same files, and
what differs between two figures is the path to them alone.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
MOUNT_DEADLINE_S = 20.0
UNMOUNT_DEADLINE_S = 20.0
POLL_S = 0.02
O_DIRECT_ALIGNMENT = 512

BARE = "bare"
BARE_AGAIN = "bare again"
PYFUSE3 = "plain pyfuse3"
BINDFS = "bindfs"
LOCKFS_MODES = ("passthrough", "guarded", "daemon")


class TargetUnavailable(Exception):
    """A target cannot run here; the message is a sentence that says why."""


@dataclass
class Target:
    """A directory to measure, and the process that serves it where there is one."""

    name: str
    root: Path
    note: str = ""
    process: subprocess.Popen[bytes] | None = None
    log: Path | None = None

    def alive(self) -> bool:
        """Whether the mount still stands: a server that died leaves the bare directory's speed behind."""
        if self.process is None:
            return self.log is None
        return self.process.poll() is None and os.path.ismount(self.root)

    def stop(self) -> None:
        """Unmount and wait for the server to end; kill it past UNMOUNT_DEADLINE_S."""
        if self.process is None:
            return
        deadline = time.monotonic() + UNMOUNT_DEADLINE_S
        while os.path.ismount(self.root) and time.monotonic() < deadline:
            subprocess.run(["umount", str(self.root)], check=False, capture_output=True)
            time.sleep(POLL_S)
        try:
            self.process.wait(max(POLL_S, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if os.path.ismount(self.root):
            subprocess.run(["umount", "-l", str(self.root)], check=False, capture_output=True)
        self.process = None


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def start(name: str, command: Sequence[str], root: Path, log: Path, note: str = "") -> Target:
    """Start a server that stays in the foreground and wait until `root` is a mount.

    Raises TargetUnavailable with the last line of its log when it ends early or is not ready in time.
    """
    root.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ, PYTHONPATH=str(REPOSITORY))
    with log.open("wb") as output:
        process = subprocess.Popen(
            list(command), stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment
        )
    target = Target(name, root, note, process, log)
    deadline = time.monotonic() + MOUNT_DEADLINE_S
    while not os.path.ismount(root):
        if process.poll() is not None:
            raise TargetUnavailable(f"{name} ended with {process.returncode}: {_tail(log)}")
        if time.monotonic() > deadline:
            target.stop()
            raise TargetUnavailable(f"{name} was not mounted within {MOUNT_DEADLINE_S:.0f} s: {_tail(log)}")
        time.sleep(POLL_S)
    return target


def lockfs_name(io: str, backend: str = "fcntl") -> str:
    """The name under which a lockfs mount appears in results."""
    return f"lockfs {io}" + ("" if backend == "fcntl" else f" {backend}")


def start_lockfs(io: str, store: Path, work: Path, backend: str = "fcntl", options: str = "") -> Target:
    """Mount `store` with lockfs in one data mode; raises TargetUnavailable."""
    name = lockfs_name(io, backend)
    slug = name.replace(" ", "-")
    root = work / f"mount-{slug}"
    joined = ",".join(filter(None, (f"io={io},backend={backend}", options)))
    command = [sys.executable, "-m", "lockfs.cli.main", "-f", "-o", joined, str(store), str(root)]
    return start(name, command, root, work / f"{slug}.log")


def start_bindfs(store: Path, work: Path) -> Target:
    """Mount `store` with bindfs, O_DIRECT passed on (it is dropped by default); raises TargetUnavailable."""
    if shutil.which("bindfs") is None:
        raise TargetUnavailable("bindfs is not installed")
    root = work / "mount-bindfs"
    command = ["bindfs", "-f", f"--forward-odirect={O_DIRECT_ALIGNMENT}", str(store), str(root)]
    return start(BINDFS, command, root, work / "bindfs.log", "with --forward-odirect")


def start_pyfuse3(store: Path, work: Path, cache: Path) -> Target:
    """Mount `store` with pyfuse3's own passthrough example; raises TargetUnavailable."""
    example = fetch_example(cache)
    root = work / "mount-pyfuse3"
    command = [sys.executable, "-m", "tests.speed.plain", str(example), str(store), str(root)]
    note = "its passthroughfs example, with direct_io and aligned buffers for O_DIRECT"
    return start(PYFUSE3, command, root, work / "pyfuse3.log", note)


def fetch_example(cache: Path) -> Path:
    """The path of passthroughfs.py from the source package of the installed pyfuse3, fetched once."""
    version = subprocess.run(
        [sys.executable, "-c", "import pyfuse3; print(pyfuse3.__version__)"],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    example = cache / f"pyfuse3-{version}" / "examples" / "passthroughfs.py"
    if example.exists():
        return example
    cache.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "pyfuse3"]
    done = subprocess.run(
        [*command, "--dest", str(cache), f"pyfuse3=={version}"], check=False, capture_output=True, text=True
    )
    archive = cache / f"pyfuse3-{version}.tar.gz"
    if done.returncode != 0 or not archive.exists():
        raise TargetUnavailable(f"the source package of pyfuse3 {version} could not be fetched")
    shutil.unpack_archive(archive, cache)
    if not example.exists():
        raise TargetUnavailable(f"the source package of pyfuse3 {version} has no passthroughfs.py")
    return example


@dataclass
class Field:
    """All targets of a run, in a fixed order, and the reasons for those that are absent."""

    store: Path
    work: Path
    targets: list[Target] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    _makers: dict[str, Callable[[], Target]] = field(default_factory=dict)

    def open(self, cache: Path, wanted: frozenset[str]) -> None:
        """Start every target whose name is in `wanted` (all, if it is empty)."""
        self.targets = [Target(BARE, self.store), Target(BARE_AGAIN, self.store)]
        store, work = self.store, self.work
        makers: dict[str, Callable[[], Target]] = {
            lockfs_name(io): partial(start_lockfs, io, store, work) for io in LOCKFS_MODES
        }
        makers[lockfs_name("passthrough", "nop")] = partial(start_lockfs, "passthrough", store, work, "nop")
        makers[PYFUSE3] = partial(start_pyfuse3, store, work, cache)
        makers[BINDFS] = partial(start_bindfs, store, work)
        self._makers = makers
        for name, make in makers.items():
            if wanted and name not in wanted:
                continue
            try:
                self.targets.append(make())
            except TargetUnavailable as reason:
                self.absent[name] = str(reason)

    def revive(self) -> None:
        """Start again those whose server has ended; what cannot be started stays as it is."""
        for index, target in enumerate(self.targets):
            if not target.alive():
                target.stop()
                with contextlib.suppress(TargetUnavailable):
                    self.targets[index] = self._makers[target.name]()

    def close(self) -> None:
        """Stop every target."""
        for target in reversed(self.targets):
            target.stop()

    def select(self, names: Sequence[str]) -> list[Target]:
        """The running targets of these names, in the order of the field."""
        return [target for target in self.targets if target.name in names]
