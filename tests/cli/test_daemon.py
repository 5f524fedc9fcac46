"""The command returns 0 when the mount serves, and otherwise one sentence and no mount."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
from pathlib import Path

import pytest

from lockfs.errors import EXIT_MOUNT, EXIT_SYSTEM, EXIT_USAGE

from .conftest import DEADLINE_S, Stub, until

CAP_SYS_RESOURCE = 1 << 24


def one_sentence(done: subprocess.CompletedProcess[str]) -> str:
    """What the command said, which is one line."""
    assert done.stdout == ""
    assert done.stderr.startswith("lockfs: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_returns_when_ready(stub: Stub) -> None:
    """After exit code 0 the mount answers, and the server has left the terminal and the directory."""
    done = stub.run()
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")
    assert os.statvfs(stub.point).f_blocks == 100
    for server in stub.family():
        assert os.getsid(server) == server
        assert os.readlink(f"/proc/{server}/cwd") == "/"
        assert {os.readlink(f"/proc/{server}/fd/{number}") for number in (0, 1, 2)} == {"/dev/null"}
    stub.logs("is mounted on")


def test_ends_with_the_mount(stub: Stub) -> None:
    """umount ends the server, which says so in its log."""
    assert stub.run().returncode == 0
    subprocess.run(["umount", stub.point], check=True)
    until(lambda: not stub.servers(), "the server ended")
    stub.logs("is unmounted")


@pytest.mark.parametrize(
    ("how", "code", "words"),
    [
        ("fail", EXIT_MOUNT, "told to fail"),
        ("group", EXIT_MOUNT, "failed in a group"),
        ("die", EXIT_MOUNT, "killed by signal 9"),
        ("end", EXIT_MOUNT, "before it was ready"),
    ],
)
def test_failed_start(stub: Stub, how: str, code: int, words: str) -> None:
    """A server that does not get ready leaves no mount; the command says why."""
    done = stub.run(how=how)
    assert done.returncode == code
    assert words in one_sentence(done)
    assert not stub.is_mounted()


def test_start_deadline(stub: Stub) -> None:
    """A server that stays silent is given up at the deadline and leaves no mount."""
    done = stub.run(how="silent", deadline_s=1)
    assert done.returncode == EXIT_MOUNT
    assert "not ready within 1 seconds" in one_sentence(done)
    assert not stub.is_mounted()
    until(lambda: not stub.servers(), "the server was killed")


def test_defect_is_survived(stub: Stub) -> None:
    """An unexpected exception ends the process that serves, is in the log in full, and the next serves."""
    process = stub.start(how="defect")
    stub.logs("takes over (turn 3)")
    stub.logs("ZeroDivisionError: a defect")
    stub.logs("ended with code 2")
    assert process.poll() is None
    assert stub.is_mounted()


def test_hopeless_defect_is_loud(stub: Stub) -> None:
    """If no other process can go on, lockfs ends, the log has all of it, and a dead mount is left."""
    done = stub.run(how="hopeless")
    assert done.returncode in (0, EXIT_MOUNT)  # it may break before the mount was asked
    until(lambda: not stub.servers(), "the server ended")
    stub.logs("ZeroDivisionError: a defect")
    stub.logs("cannot be served any more: The stub was told to give up.")
    assert stub.is_mounted()
    with pytest.raises(OSError, match="not connected"):
        os.statvfs(stub.point)
    again = stub.run()
    assert again.returncode == 0
    assert f"{stub.point} has a lockfs of {stub.source} whose processes are all gone" in again.stderr
    assert stub.is_mounted()


@pytest.mark.parametrize("how", ["fail", "hopeless"])
def test_foreground_exit_codes(stub: Stub, how: str) -> None:
    """In the foreground the exit code tells how it ended: 32, a failed set-up; 2, nobody could go on."""
    process = stub.start(how=how)
    assert process.wait(DEADLINE_S) == {"fail": EXIT_MOUNT, "hopeless": EXIT_SYSTEM}[how]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_unmount(stub: Stub, number: signal.Signals) -> None:
    """SIGTERM and Ctrl-C unmount and end the server well."""
    process = stub.start()
    stub.logs("is mounted")
    process.send_signal(number)
    assert process.wait(DEADLINE_S) == 0
    assert not stub.is_mounted()


def test_signal_while_busy(stub: Stub) -> None:
    """A mount in use stays, and the log names who uses it."""
    process = stub.start()
    stub.logs("is mounted")
    descriptor = os.open(stub.point, os.O_PATH)
    try:
        process.send_signal(signal.SIGTERM)
        stub.logs("stays mounted", f"(pid {os.getpid()})")
        assert process.poll() is None
        assert os.statvfs(stub.point).f_blocks == 100
    finally:
        os.close(descriptor)


def test_mount_over_itself(stub: Stub) -> None:
    """SOURCE may be MOUNTPOINT; a second time is refused with what to do."""
    stub.source = stub.point
    assert stub.run().returncode == 0
    done = stub.run()
    assert done.returncode == EXIT_MOUNT
    assert "already" in one_sentence(done)
    assert f"umount {stub.point}" in done.stderr


def test_relative_paths(stub: Stub) -> None:
    """Relative paths are taken from where the command was started; the mount table has absolute ones."""
    command = stub.command()[:-2]
    done = subprocess.run(
        [*command, "source", "./point/"],
        env=stub.environment("serve", 20),
        cwd=stub.source.parent,
        capture_output=True,
        check=False,
        timeout=DEADLINE_S,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert stub.is_mounted()
    assert f"{stub.point} rw" in Path("/proc/self/mountinfo").read_text()
    assert f"fuse.lockfs {stub.source} " in Path("/proc/self/mountinfo").read_text()


def test_warnings_reach_the_terminal(stub: Stub) -> None:
    """What is wrong but no reason to give up is on standard error when the command returns."""
    below = stub.source / "below"
    below.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", below], check=True)
    try:
        done = stub.run()
    finally:
        subprocess.run(["umount", below], check=True)
    assert done.returncode == 0
    assert str(below) in done.stderr


def test_descriptor_limit(stub: Stub) -> None:
    """The server may have as many files open as the kernel allows it: with CAP_SYS_RESOURCE, fs.nr_open."""
    stub.start()
    servers = stub.family()
    status = Path("/proc/self/status").read_text().split("CapEff:")[1]
    maximum = str(resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    if int(status.split()[0], 16) & CAP_SYS_RESOURCE:
        maximum = Path("/proc/sys/fs/nr_open").read_text().strip()
    for server in servers:
        limits = Path(f"/proc/{server}/limits").read_text().splitlines()
        assert (
            next(line for line in limits if line.startswith("Max open files")).split()[3:5] == [maximum] * 2
        )


def test_usage_error_exit_code(stub: Stub) -> None:
    """The real command refuses a wrong option with exit code 1 and one line, in the called process."""
    command = ["-m", "lockfs.cli.main", "-o", "wait=never", str(stub.source), str(stub.point)]
    done = subprocess.run([stub.command()[0], *command], capture_output=True, text=True, check=False)
    assert done.returncode == EXIT_USAGE
    assert "wait" in one_sentence(done)
