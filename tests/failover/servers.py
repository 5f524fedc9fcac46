"""The processes of one mount, found from outside: who serves, who watches, who waits for their turn.

Every process that lockfs starts inherits the environment that it was started with; a word in it that no
other process has (`MARK`) tells a mount's processes from all others, whoever their parents are by now.
"""

from __future__ import annotations

import contextlib
import os
import struct
from dataclasses import dataclass
from pathlib import Path

MARK = "LOCKFS_TEST_MOUNT"


_JOURNAL = "/memfd:lockfs-journal"
_PIDS_AT = 2 * 8
"""Words 2 to 5 of the journal's header (lockfs/journal): guardian, twin, worker, spare."""
_PIDS = struct.Struct("=qqqq")


@dataclass(frozen=True)
class Servers:
    """Pids by role; None: there is none. Without a guardian one process is all."""

    guardian: int | None
    worker: int | None
    twin: int | None
    spare: int | None
    others: tuple[int, ...] = ()

    @property
    def all(self) -> tuple[int, ...]:
        """Every pid, once."""
        named = (self.guardian, self.worker, self.twin, self.spare)
        return tuple(dict.fromkeys((*(pid for pid in named if pid is not None), *self.others)))

    @property
    def complete(self) -> bool:
        """Whether nobody's place is empty."""
        return None not in (self.guardian, self.worker, self.twin, self.spare)


@dataclass(frozen=True)
class _Process:
    pid: int
    parent: int
    threads: int
    state: str
    imported: bool  # has the FUSE library


def find(mark: str) -> Servers:
    """The processes of the mount that was started with this mark, as their journal has it.

    Without a journal by what they look like: the worker has the most threads and the library of FUSE; the
    spare has the library and one thread; of the others the guardian is the twin's parent.
    """
    looked = [process for pid in marked(mark) if (process := _look(pid)) is not None]
    found = [process for process in looked if process.state not in "ZX"]
    for process in found:
        words = journal_words(process.pid)
        if words is not None:
            living = {one.pid for one in found}
            named = [pid if pid in living else None for pid in words]
            others = tuple(sorted(living.difference(words)))
            return Servers(guardian=named[0], twin=named[1], worker=named[2], spare=named[3], others=others)
    return _roles(found)


def journal_words(pid: int) -> tuple[int, int, int, int] | None:
    """Guardian, twin, worker and spare as the journal's header has them; None: no journal."""
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            path = f"/proc/{pid}/fd/{name}"
            if not os.readlink(path).startswith(_JOURNAL):
                continue
            with open(path, "rb", buffering=0) as file:
                data = file.read(_PIDS_AT + _PIDS.size)
            if len(data) == _PIDS_AT + _PIDS.size and any(data[_PIDS_AT:]):
                guardian, twin, worker, spare = _PIDS.unpack_from(data, _PIDS_AT)
                return guardian, twin, worker, spare
    return None


def _roles(found: list[_Process]) -> Servers:
    if len(found) == 1:
        return Servers(found[0].pid, found[0].pid, None, None)
    busy = [process for process in found if process.threads > 1]
    worker = max(busy, key=lambda process: process.threads, default=None)
    rest = [process for process in found if process is not worker]
    spare = next((process for process in rest if process.imported), None)
    plain = [process for process in rest if not process.imported]
    parents = {process.parent for process in found}
    guardian = next((process for process in plain if process.pid in parents), plain[0] if plain else None)
    twin = next((process for process in plain if process is not guardian and _child(process, guardian)), None)
    named = [process.pid if process else None for process in (guardian, worker, twin, spare)]
    others = tuple(process.pid for process in found if process.pid not in named)
    guardian_pid, worker_pid, twin_pid, spare_pid = named
    return Servers(guardian_pid, worker_pid, twin_pid, spare_pid, others)


def _child(process: _Process, guardian: _Process | None) -> bool:
    return guardian is not None and process.parent == guardian.pid


def marked(mark: str) -> list[int]:
    """Living processes with the mark in their environment."""
    word = f"{MARK}={mark}".encode()
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if word in Path(f"/proc/{name}/environ").read_bytes().split(b"\0"):
                found.append(int(name))
    return found


def _look(pid: int) -> _Process | None:
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        imported = "pyfuse3" in Path(f"/proc/{pid}/maps").read_text(errors="replace")
    except OSError:
        return None
    return _Process(pid, int(words[1]), int(words[17]), words[0], imported)


def alive(pid: int | None) -> bool:
    """Whether the process runs: neither gone nor waiting to be buried."""
    if pid is None:
        return False
    found = _look(pid)
    return found is not None and found.state not in "ZX"


def dead_children(parents: set[int]) -> list[str]:
    """Ended processes that one of `parents` has not buried."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            head, _, tail = Path(f"/proc/{name}/stat").read_text().rpartition(")")
            words = tail.split()
            if words[0] == "Z" and int(words[1]) in parents:
                found.append(f"{head}) below {words[1]}")
    return found


def descriptors(pid: int) -> list[str]:
    """What the process has open; the pipe of a listing may come and go."""
    found = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/{pid}/fd/{name}"))
    return sorted(found)
