"""Operations that must be done once, though their request is sent again after the worker was killed.

Before such an operation changes anything it says what it is about to change, and afterwards that it is done.
A request that is sent again, and finds that it was about to be done, lets the names tell whether it was.
Forgotten when the answer is at the kernel.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from lockfs.backends.base import Memory
from lockfs.mirror.credentials import Caller
from lockfs.mirror.inodes import Key

T = TypeVar("T")
Facts = dict[str, Any]


@dataclass(frozen=True)
class Named:
    """What a name leads to: its key, None for nothing, and its status; not `known`: that is not certain."""

    key: Key | None
    status: os.stat_result | None = None
    known: bool = True


def named(directory: int, name: bytes) -> Named:
    """What a name leads to now; worker thread."""
    try:
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return Named(None)
    except OSError:
        return Named(None, known=False)
    return Named((status.st_dev, status.st_ino), status)


_PREFIX = "op:"


def _key(number: int) -> str:
    return f"{_PREFIX}{number}"


class Repeats:
    """Of one mount. Any thread."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory

    def former(self, caller: Caller) -> Facts | None:
        """What a former worker said of this very request; None if it had not begun with it."""
        said = self._memory.get(_key(caller.unique)) if caller.resent else None
        return said if isinstance(said, dict) else None

    def doing(self, caller: Caller, intent: Facts, work: Callable[[], T]) -> T:
        """Do it, and say before what is to be done, and after that it is. What fails changes nothing, and may
        be tried again.
        """
        if not caller.unique:
            return work()
        key = _key(caller.unique)
        self._memory.set(key, intent)
        try:
            result = work()
        except BaseException:
            self._memory.remove(key)
            raise
        self._memory.set(key, {**intent, "done": True})
        return result

    def answered(self, unique: int) -> None:
        """The answer is at the kernel: it will not send the request again."""
        self._memory.remove(_key(unique))

    def noted(self) -> list[int]:
        """The numbers of the requests of which something is said."""
        return [int(key.removeprefix(_PREFIX)) for key in self._memory.items(_PREFIX)]


# Whether what was about to be changed was changed


def was_removed(said: Facts, directory: int, name: bytes) -> bool:
    """Whether the name does not lead any more to the file that was to lose it."""
    here = named(directory, name)
    return bool(said.get("done")) or (here.known and here.key != tuple(said["file"]))


def was_moved(said: Facts, old: tuple[int, bytes], new: tuple[int, bytes]) -> bool:
    """Whether the new name leads to what the old one led to, and the old one does not (or, exchanged, to what
    the new one led to)."""
    if said.get("done", False):
        return True
    here, there = named(*old), named(*new)
    if there.key != tuple(said["file"]):
        return False
    return here.known and here.key != there.key


def was_made(said: Facts, directory: int, name: bytes, kind: int, uid: int) -> bool:
    """Whether the name leads to a file of the kind and owner that was to be made where nothing was."""
    status = named(directory, name).status
    if status is None:
        return False
    return bool(said.get("done")) or (
        bool(said.get("absent")) and stat.S_IFMT(status.st_mode) == kind and status.st_uid == uid
    )


def was_linked(said: Facts, directory: int, name: bytes) -> bool:
    """Whether the name leads to the file that was to get it."""
    return named(directory, name).key == tuple(said["file"])


def is_absent(directory: int, name: bytes) -> bool:
    """Whether the name leads to nothing, for certain."""
    here = named(directory, name)
    return here.known and here.key is None
