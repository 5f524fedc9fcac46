"""What /proc tells of processes: who a request's thread belongs to, what it runs, what it holds.

Everything here reads and may find the process gone; then it answers with what is still known.
All functions block for microseconds at most but belong on worker threads, as any file access.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_STATUS_BYTES_MAX = 16384
_CMDLINE_BYTES_MAX = 131072


def _read(path: str, limit: int) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, limit)
    finally:
        os.close(fd)


@dataclass(frozen=True)
class Process:
    """A process: its id (thread group), when it started (clock ticks since boot), program and arguments.

    `program` is the base name of the executable, or the command name if the link cannot be read.
    """

    pid: int
    started: int
    program: str
    arguments: tuple[bytes, ...]

    def same_as(self, other: Process) -> bool:
        """Whether both are one process; a process id alone may have been reused."""
        return self.pid == other.pid and self.started == other.started


NOBODY = Process(0, 0, "unknown", ())


def thread_group(tid: int) -> int:
    """The process id of thread `tid`, or `tid` itself if the thread is gone.

    A pidfd can be had of a process's first thread alone (pidfd_open(2)), which is asked far more quickly
    than /proc.
    """
    with contextlib.suppress(OSError):
        os.close(os.pidfd_open(tid))
        return tid
    try:
        status = _read(f"/proc/{tid}/status", _STATUS_BYTES_MAX)
    except OSError:
        return tid
    at = status.find(b"\nTgid:")
    return int(status[at + 6 : status.index(b"\n", at + 6)]) if at >= 0 else tid


def start_time(pid: int) -> int:
    """Start time of a process in clock ticks since boot (field 22 of /proc/PID/stat), 0 if it is gone."""
    try:
        stat = _read(f"/proc/{pid}/stat", _STATUS_BYTES_MAX)
    except OSError:
        return 0
    return int(stat[stat.rindex(b")") + 2 :].split()[19])


def _describe(pid: int, started: int, exe: str) -> Process:
    try:
        cmdline = _read(f"/proc/{pid}/cmdline", _CMDLINE_BYTES_MAX)
    except OSError:
        cmdline = b""
    return Process(pid, started, exe, tuple(cmdline.split(b"\0")[:-1]))


def process_of(tid: int) -> Process:
    """The process that thread `tid` belongs to; NOBODY for 0 (a caller in a foreign pid namespace)."""
    if tid <= 0:
        return NOBODY
    pid = thread_group(tid)
    try:
        exe = os.path.basename(os.readlink(f"/proc/{pid}/exe")).removesuffix(" (deleted)")
    except OSError:
        try:
            exe = _read(f"/proc/{pid}/comm", 64).decode("utf-8", "replace").strip()
        except OSError:
            exe = "unknown"
    return _describe(pid, start_time(pid), exe)


def groups_of(tid: int) -> tuple[int, ...]:
    """Supplementary groups of thread `tid`, empty if it is gone."""
    try:
        status = _read(f"/proc/{tid}/status", _STATUS_BYTES_MAX)
    except OSError:
        return ()
    at = status.find(b"\nGroups:")
    if at < 0:
        return ()
    return tuple(int(word) for word in status[at + 8 : status.index(b"\n", at + 8)].split())


def holds_open(pid: int, device: int, inode: int, writable: bool) -> bool:
    """Whether process `pid` has the file open (for writing, if `writable`), inherited descriptors included.

    Compares the mount's device (st_dev as the process sees it) and inode without touching the file: the
    descriptor may belong to a mount that waits for us. Reads /proc/PID/fdinfo ("ino", "mnt_id", Linux 5.14)
    and /proc/PID/mountinfo.
    """
    try:
        mounts = _mount_ids(pid, device)
        names = os.listdir(f"/proc/{pid}/fdinfo")
    except OSError:
        return False
    for name in names:
        try:
            lines = _read(f"/proc/{pid}/fdinfo/{name}", 4096).splitlines()
        except OSError:
            continue
        fields = dict(line.split(b":", 1) for line in lines if b":" in line)
        flags = int(fields.get(b"flags", b"0"), 8)
        if int(fields.get(b"ino", b"-1")) != inode or int(fields.get(b"mnt_id", b"-1")) not in mounts:
            continue
        if not flags & os.O_PATH and (not writable or flags & os.O_ACCMODE != os.O_RDONLY):
            return True
    return False


def _mount_ids(pid: int, device: int) -> set[int]:
    wanted = f"{os.major(device)}:{os.minor(device)}".encode()
    with open(f"/proc/{pid}/mountinfo", "rb") as table:
        return {int(words[0]) for words in (line.split(b" ", 3) for line in table) if words[2] == wanted}


def locked_bytes(device: int, inode: int) -> list[tuple[int, int]]:
    """Byte ranges (first, last) that anybody on this machine has locked on a file, from /proc/locks.

    `last` is 2**63 - 1 for a lock to the end of the file.
    """
    wanted = f"{os.major(device):02x}:{os.minor(device):02x}:{inode}".encode()
    found = []
    with open("/proc/locks", "rb") as table:
        for line in table:
            words = line.split()
            if len(words) >= 8 and words[-3] == wanted:
                last = 2**63 - 1 if words[-1] == b"EOF" else int(words[-1])
                found.append((int(words[-2]), last))
    return found


def shared_mappers(devices: set[int], inodes: set[int] | None = None) -> dict[int, set[int]]:
    """Who has files mapped shared so that a store into memory may reach them: process ids by inode number.

    Of all files if `inodes` is None.

    A mapping counts if it is shared and is, or can be made, writable ("sh" and "mw" among the VmFlags of
    /proc/PID/smaps, proc(5)); `devices` are the st_dev under which the kernel may show the files. Processes
    that end meanwhile are left out.
    """
    wanted = {f"{os.major(device):02x}:{os.minor(device):02x}".encode() for device in devices}
    found: dict[int, set[int]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/maps", "rb") as maps:
                mapped = set(_shared_inodes(maps, wanted))
            if inodes is not None:
                mapped &= inodes
            if mapped:
                with open(f"/proc/{name}/smaps", "rb") as smaps:
                    mapped &= _changeable_inodes(smaps, wanted)
        except OSError:
            continue
        for inode in mapped:
            found.setdefault(inode, set()).add(int(name))
    return found


def _shared_inodes(maps: Iterable[bytes], wanted: set[bytes]) -> Iterator[int]:
    """Inodes of the shared mappings in /proc/PID/maps: ADDRESSES PERMISSIONS OFFSET DEVICE INODE PATH."""
    for line in maps:
        words = line.split(None, 5)
        if len(words) >= 5 and words[1].endswith(b"s") and words[3] in wanted:
            yield int(words[4])


def _changeable_inodes(smaps: Iterable[bytes], wanted: set[bytes]) -> set[int]:
    found = set()
    inode = 0
    for line in smaps:
        words = line.split(None, 5)
        if b"-" in words[0] and not words[0].endswith(b":"):
            inode = int(words[4]) if words[3] in wanted else 0
        elif inode and words[0] == b"VmFlags:" and {b"sh", b"mw"} <= set(line.split()[1:]):
            found.add(inode)
    return found


def kill_all(identities: Iterable[tuple[int, int]], deadline_s: float) -> set[tuple[int, int]]:
    """SIGKILL processes, all before any is waited for; those that are not gone within `deadline_s` seconds.

    Processes are given by id and start time (start_time), so that one that came to the same number meanwhile
    is spared. Those that cannot be killed, of other users or pid namespaces (id 0), count as not gone.
    """
    waited: dict[int, tuple[int, int]] = {}
    there: set[tuple[int, int]] = set()
    try:
        for pid, started in identities:
            try:
                descriptor = os.pidfd_open(pid)
            except ProcessLookupError:
                continue
            except OSError:
                there.add((pid, started))
                continue
            waited[descriptor] = (pid, started)
            if not _signal(descriptor, pid, started):
                os.close(descriptor)
                del waited[descriptor]
        _await_ends(waited, deadline_s)
        return there | set(waited.values())
    finally:
        for descriptor in waited:
            os.close(descriptor)


def _signal(descriptor: int, pid: int, started: int) -> bool:
    """SIGKILL through a pidfd; False if the process is gone already."""
    if start_time(pid) != started:
        return False
    try:
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _await_ends(waited: dict[int, tuple[int, int]], deadline_s: float) -> None:
    """Wait for processes; closes and takes out the descriptors of those that end."""
    end = time.monotonic() + deadline_s
    poller = select.poll()
    for descriptor in waited:
        poller.register(descriptor, select.POLLIN)
    while waited:
        left = end - time.monotonic()
        ended = poller.poll(max(0.0, left) * 1000)
        for descriptor, _ in ended:
            poller.unregister(descriptor)
            os.close(descriptor)
            del waited[descriptor]
        if left <= 0 and not ended:
            return


INTERRUPTING = frozenset(
    {signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGKILL, signal.SIGALRM, signal.SIGTERM}
)
"""Signals that are meant to end what a program waits for.

Any other signal that would end the process is pending as SIGKILL by the time it can be seen (signal(7)).
"""


def interrupted(tid: int) -> bool:
    """Whether thread `tid` has a signal to act on that is to end its waiting.

    Others (SIGCHLD, timers, SIGUSR1) are caught by programs that do not expect open(2) to fail for them.
    """
    try:
        status = _read(f"/proc/{tid}/status", _STATUS_BYTES_MAX)
    except OSError:
        return True
    masks = {
        name: int(value, 16)
        for name, _, value in (line.partition(b":\t") for line in status.splitlines())
        if name in (b"SigPnd", b"ShdPnd", b"SigBlk", b"SigIgn")
    }
    waiting = masks.get(b"SigPnd", 0) | masks.get(b"ShdPnd", 0)
    waiting &= ~masks.get(b"SigBlk", 0) & ~masks.get(b"SigIgn", 0)
    return any(waiting >> (number - 1) & 1 for number in INTERRUPTING)
