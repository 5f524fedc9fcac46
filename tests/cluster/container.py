"""A container that boots this machine's systemd, with units of the test's own; the store is shared.

Its root is this machine's, seen through an overlay: whatever the service manager does there at its start
(clearing /tmp, making device nodes) stays in the overlay. Its kernel and its network are this machine's.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.support.qemu import eventually

STORE, MOUNT, UNIT = "/srv/store", "/srv/mnt", "lockfs@images"
START_S, END_S, COMMAND_S = 60.0, 30.0, 60.0
_PROJECT = Path(__file__).parents[2]
_TARGET = "[Unit]\nDescription=What the test needs\nRequires=sysinit.target\nAfter=sysinit.target\n"
_COMMAND = """#!/bin/sh
export PYTHONPATH={project}
exec {python} -P -m lockfs.cli.main "$@"
"""
_WITHOUT_MOUNTS = """
grep ' fuse.lockfs ' /proc/self/mounts | cut -d ' ' -f 2 | xargs -r umount -l
exec "$@"
"""
"""A copy of another mount in the container would keep that one served after its unmounting."""


def missing() -> list[str]:
    """What of it is not installed."""
    return [name for name in ("systemd-nspawn", "nsenter", "unshare") if shutil.which(name) is None]


class Container:
    """A running one. `root` is its root as this machine sees it, `store` the directory behind STORE."""

    def __init__(self, root: Path, store: Path, process: subprocess.Popen[bytes]) -> None:
        self.root = root
        self.store = store
        self._process = process

    @property
    def _leader(self) -> int:
        pid = self._process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(children[0]) if children else 0

    def inside(self, *command: str) -> list[str]:
        """The command that runs another one inside."""
        return ["nsenter", "-t", str(self._leader), "-m", "-p", "-u", "-i", "-n", "-r", "-w", *command]

    def run(self, *command: str) -> str:
        """Run a command inside; what it prints.

        Raises:
            CalledProcessError: it failed.
        """
        done = subprocess.run(
            self.inside(*command), check=True, capture_output=True, text=True, timeout=COMMAND_S
        )
        return done.stdout

    def property(self, name: str) -> str:
        """A property of the unit, as `systemctl show` has it."""
        return self.run("systemctl", "show", "--value", "-p", name, UNIT).strip()

    def log(self) -> str:
        """What the unit's journal has."""
        return self.run("journalctl", "--no-pager", "-o", "cat", "-u", UNIT)

    def configure(self, options: str) -> None:
        """Write the unit's configuration."""
        text = f"SOURCE={STORE}\nMOUNTPOINT={MOUNT}\nOPTIONS={options}\n"
        (self.root / "etc/lockfs/images.conf").write_text(text)

    def wait_booted(self) -> None:
        """Return when its service manager answers."""

        def answers() -> bool:
            if self._process.poll() is not None or not self._leader:
                return False
            asked = self.inside("systemctl", "is-active", "trial.target")
            return subprocess.run(asked, check=False, capture_output=True).stdout == b"active\n"

        eventually(answers, "the container's service manager", START_S)

    def end(self) -> None:
        """End everything inside."""
        self._process.terminate()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _furnish(root: Path) -> None:
    units = root / "etc/systemd/system"
    units.mkdir(parents=True, exist_ok=True)
    _put(units / "trial.target", _TARGET)
    for name, target in (("default.target", "trial.target"), ("timers.target", "/dev/null")):
        (units / name).unlink(missing_ok=True)
        (units / name).symlink_to(target)
    _put(units / "lockfs@.service", (_PROJECT / "scripts/lockfs@.service").read_text())
    command = root / "usr/local/bin/lockfs"
    words = {"project": shlex.quote(str(_PROJECT)), "python": shlex.quote(sys.executable)}
    _put(command, _COMMAND.format(**words))
    command.chmod(0o755)
    for directory in ("etc/lockfs", STORE[1:], MOUNT[1:]):
        (root / directory).mkdir(parents=True, exist_ok=True)


def _put(path: Path, text: str) -> None:
    """Write a new file. One that is there already may be a link that leads out of the root."""
    path.unlink(missing_ok=True)
    path.write_text(text)


@contextlib.contextmanager
def container(base: Path, store: Path) -> Iterator[Container]:
    """One for the length of a block; `base` is an empty directory."""
    root, upper, work = base / "root", base / "upper", base / "work"
    for directory in (root, upper, work):
        directory.mkdir()
    layers = f"lowerdir=/,upperdir={upper},workdir={work}"
    subprocess.run(["mount", "-t", "overlay", "-o", layers, "overlay", str(root)], check=True)
    try:
        _furnish(root)
        command = [
            "unshare", "--mount", "sh", "-c", _WITHOUT_MOUNTS, "sh",
            "systemd-nspawn", "--quiet", "--directory", str(root), f"--machine=lockfs-{os.getpid()}",
            "--register=no", "--keep-unit", "--link-journal=no", f"--bind-ro={_PROJECT}",
            f"--bind-ro={sys.prefix}", "--bind=/dev/fuse", f"--bind={store}:{STORE}", "--boot",
        ]  # fmt: skip
        with open(base / "console", "wb") as console:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=console, stderr=console)
        made = Container(root, store, process)
        try:
            made.wait_booted()
            yield made
        finally:
            made.end()
    finally:
        subprocess.run(["umount", str(root)], check=True)
