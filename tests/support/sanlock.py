"""Real sanlock daemons for tests, several of them on one machine, each a host of its own.

A daemon runs without watchdog, real-time priority, locked memory or system log, and with a run directory of
its own: that is all that keeps it apart from the next. It forks a helper; both live in a session of their
own, and a test ends with that session empty.
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import trio

from tests.support.sanlock_client import Lockspace, Resource, SanlockClient, SanlockGone

PROGRAM = "sanlock"
PACKAGE = "sanlock"
START_S = 20.0
STOP_S = 20.0  # leaving a lockspace takes 2 to 3 s
END_S = 10.0
POLL_S = 0.02
AREA = 1 << 20


class LeaseFile:
    """A file with a lockspace at its start and `leases` resource areas behind it, of 512-byte sectors."""

    def __init__(self, path: Path, leases: int, name: bytes = b"LS") -> None:
        self.path = path
        with open(path, "xb") as file:
            file.truncate(AREA * (1 + leases))
        self.lockspace = Lockspace(name, path)
        self.resources = [Resource(name, b"res%d" % n, path, AREA * (1 + n)) for n in range(leases)]

    async def init(self, client: SanlockClient, *, io_timeout: int = 1, num_hosts: int = 0) -> None:
        """Have a daemon write every area."""
        await client.init_lockspace(self.lockspace, io_timeout=io_timeout)
        for resource in self.resources:
            await client.init_resource(resource, num_hosts=num_hosts)


def program() -> str | None:
    """The daemon's path, also where /usr/sbin is not searched."""
    return shutil.which(PROGRAM, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")


def why_not_sanlock(directory: Path) -> str | None:
    """The reason why no daemon can work on lease files in `directory`, or None."""
    if program() is None:
        return f"the sanlock daemon is not installed (package {PACKAGE})"
    probe = directory / "o_direct.probe"
    try:
        os.close(os.open(probe, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600))
    except OSError as error:
        return f"no O_DIRECT in {directory}: {error.strerror}"
    finally:
        probe.unlink(missing_ok=True)
    return None


class SanlockDaemon:
    """A daemon named `name` that logs to `directory`/`name`.log; entering the block starts it.

    `name` is also its host name on the storage. Leaving the block ends it, with a clean shutdown if it still
    runs; what holds leases through it is then killed by it. After `kill` it can be started again.
    """

    def __init__(self, directory: Path, name: str) -> None:
        self.name = name
        self.log_file = directory / f"{name}.log"
        self._run: tempfile.TemporaryDirectory[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def socket(self) -> Path:
        """Where clients connect."""
        assert self._run is not None, "not started"
        return Path(self._run.name, "sanlock.sock")

    @property
    def client(self) -> SanlockClient:
        """A client of this daemon."""
        return SanlockClient(self.socket)

    @property
    def pid(self) -> int:
        """The daemon's process."""
        assert self._process is not None, "not started"
        return self._process.pid

    def is_running(self) -> bool:
        """Whether its process is there."""
        return self._process is not None and self._process.poll() is None

    def log(self) -> str:
        """What it has logged."""
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    async def start(self) -> None:
        """Start it and return when it answers.

        Raises:
            AssertionError: it ended, or did not answer in time; with its log.
        """
        assert not self.is_running(), f"{self.name} runs already"
        command = program()
        assert command is not None, "check why_not_sanlock first"
        if self._run is None:  # short, as the name of a socket has to be
            self._run = tempfile.TemporaryDirectory(prefix="sanlock-")
        with open(self.log_file, "ab") as log:
            self._process = subprocess.Popen(
                [command, "daemon", *_options(self.name)],
                env={**os.environ, "SANLOCK_RUN_DIR": self._run.name, "SANLOCK_PRIVILEGED": "0"},
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        with trio.move_on_after(START_S):
            while self.is_running():
                try:
                    await self.client.version()
                    return
                except (OSError, SanlockGone):
                    await trio.sleep(POLL_S)
        raise AssertionError(f"{self.name} does not answer:\n{self.log()}")

    async def stop(self) -> None:
        """End it in good order: its lockspaces are left. Kills it, and fails, if it does not end.

        Whoever holds a lease through it is sent SIGKILL by it.
        """
        if not self.is_running():
            return
        with trio.move_on_after(STOP_S), contextlib.suppress(SanlockGone, OSError):
            with contextlib.suppress(trio.TooSlowError):
                await self.client.shutdown(timeout=STOP_S)
            while self.is_running():
                await trio.sleep(POLL_S)
        if self.is_running():
            self.kill()
            raise AssertionError(f"{self.name} did not end by itself:\n{self.log()}")
        self._session_ends()

    def kill(self) -> None:
        """Crash it: SIGKILL, and nothing is written to the storage any more."""
        if self._process is not None:
            if self.is_running():
                self._process.kill()
            self._process.wait(END_S)
            self._session_ends()

    def _session_ends(self) -> None:
        """Wait for the helper, which ends by itself when the daemon does; end it otherwise, and fail."""
        end = time.monotonic() + END_S
        while left := list(_session(self.pid)):
            if time.monotonic() > end:
                for pid in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                raise AssertionError(f"{self.name} left processes {left}:\n{self.log()}")
            time.sleep(POLL_S)

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                await self.stop()
        finally:
            self.close()
        if kind is not None:
            print(f"--- {self.name}:\n{self.log()}")

    def close(self) -> None:
        """Kill it if it still runs, and remove its run directory; the log stays."""
        try:
            self.kill()
        finally:
            if self._run is not None:
                self._run.cleanup()
                self._run = None


def _options(name: str) -> list[str]:
    user, group = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(os.getegid()).gr_name
    words = f"-D -w 0 -U {user} -G {group} -e {name} -l 0 -h 0 -L -1 -S -1"
    return words.split()


def _session(leader: int) -> Iterator[int]:
    """The processes of a session that have not ended."""
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            # The command in parentheses may hold anything; behind it: state, parent, group, session.
            state, _, _, session = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[:4]
            if int(session) == leader and state != "Z":
                yield int(entry)
