"""Records of who holds an image: what a refused host reads to name the holder.

An EXCLUSIVE holder writes `owners/<inode>`, a SHARED one `owners/<inode>.<instance>`; both after they have
the locks, and take it back before they give them back. A record is believed only while the lock it speaks
of is seen, and never decides anything.

Guests open and close their images many times, and making and removing a file is what costs most in a lease.
So an EXCLUSIVE record is blanked, not removed, and the file is used again; the mount's end removes it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable

from lockfs.backends.base import Mode, Owner
from lockfs.backends.state import FILE_BYTES_MAX, OWNERS, StateDirectory

TEXT_CHARS_MAX = 200
PATH_BYTES_MAX = 400
KEPT_MAX = 4096
"""How many blank records one mount leaves in the store at most."""
_PID_MAX = 2**31 - 1


def encode(owner: Owner, path: bytes = b"") -> bytes:
    """An owner as a JSON object of at most FILE_BYTES_MAX bytes; long names are cut, long paths left out."""
    host, program = owner.host[:TEXT_CHARS_MAX], owner.program[:TEXT_CHARS_MAX]
    fields: dict[str, object] = {}
    if path and len(path) <= PATH_BYTES_MAX:
        fields["path"] = os.fsdecode(path)
    while True:
        fields |= {"host": host, "pid": owner.pid, "program": program, "since": owner.since}
        content = json.dumps(fields, ensure_ascii=False).encode("utf-8", "surrogateescape")
        if len(content) <= FILE_BYTES_MAX:
            return content
        if fields.pop("path", None):
            continue
        host, program = host[: len(host) // 2], program[: len(program) // 2]


def decode(content: bytes) -> Owner | None:
    """The owner a record tells of, or None if it is not one that `encode` could have made.

    The text goes to logs and terminals, so anything unprintable in it is replaced.
    """
    try:
        fields = json.loads(content.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, dict):
        return None
    host, program = _text(fields.get("host")), _text(fields.get("program"))
    pid, since = fields.get("pid"), fields.get("since")
    if host is None or program is None or type(pid) is not int or not 0 <= pid <= _PID_MAX:
        return None
    if isinstance(since, bool) or not isinstance(since, (int, float)) or not math.isfinite(since):
        return None
    return Owner(host, pid, program, float(since))


def decode_path(content: bytes) -> bytes | None:
    """The path a record gives for its image, a hint relative to the store's root, or None."""
    try:
        fields = json.loads(content.decode("utf-8", "surrogateescape"))
        path = fields.get("path") if isinstance(fields, dict) else None
        return os.fsencode(path) if isinstance(path, str) and path and "\0" not in path else None
    except (ValueError, RecursionError):
        return None


def _text(value: object) -> str | None:
    if not isinstance(value, str) or not value or len(value) > TEXT_CHARS_MAX:
        return None
    return "".join(char if char.isprintable() else "?" for char in value)


def _record(owner: Owner, path: bytes) -> bytes:
    return encode(owner, path).ljust(FILE_BYTES_MAX)


class OwnerRecords:
    """This host's records and what the others wrote. Methods block and belong on worker threads."""

    def __init__(self, state: StateDirectory, instance: bytes) -> None:
        """`instance` tells this mount's files from those of every other mount of the store."""
        self._state = state
        self._instance = instance
        self._kept: set[bytes] = set()

    def _name(self, inode: int, mode: Mode) -> bytes:
        return b"%d" % inode if mode is Mode.EXCLUSIVE else b"%d.%s" % (inode, self._instance)

    def write(self, inode: int, mode: Mode, owner: Owner, path: bytes = b"") -> None:
        """Tell who holds the image in this mode, and under which name it was opened."""
        self._state.write(OWNERS, self._name(inode, mode), _record(owner, path))

    def write_at_once(self, inode: int, owner: Owner, path: bytes) -> bool:
        """Do what `write` does for an EXCLUSIVE holder, on any thread of a local store; False: it cannot."""
        name = self._name(inode, Mode.EXCLUSIVE)
        return self._state.overwrite(OWNERS, name, _record(owner, path))

    def remove_at_once(self, inode: int) -> bool:
        """Take back what an EXCLUSIVE holder wrote, on any thread of a local store; False: it cannot."""
        name = self._name(inode, Mode.EXCLUSIVE)
        return name in self._kept and self._state.overwrite(OWNERS, name, b" " * FILE_BYTES_MAX)

    def paths(self) -> list[bytes]:
        """Paths of images that any host says it holds, sorted; whether one does, the locks tell."""
        contents = self._state.read(OWNERS, self._state.names(OWNERS)).values()
        return sorted({path for path in map(decode_path, contents) if path})

    def remove(self, inode: int, mode: Mode) -> None:
        """Take back what `write` told."""
        name = self._name(inode, mode)
        if mode is Mode.EXCLUSIVE and (name in self._kept or len(self._kept) < KEPT_MAX):
            self._kept.add(name)
            self._state.blank(OWNERS, name)
        else:
            self._state.remove(OWNERS, name)

    def adopt(self) -> None:
        """Count blank records, whoever left them, as kept by this mount: of a former worker nobody knows
        which it had.
        """
        names = [name for name in self._state.names(OWNERS) if name.isdigit()][:KEPT_MAX]
        self._kept.update(
            name for name, content in self._state.read(OWNERS, names).items() if not content.strip()
        )

    def clear(self) -> None:
        """Remove the files that were kept for the next time, but for those that another host uses now."""
        for name, content in self._state.read(OWNERS, sorted(self._kept)).items():
            if not content.strip():
                self._state.remove(OWNERS, name)
        self._kept.clear()

    def read(self, inode: int, mode: Mode) -> list[Owner]:
        """Who says that they hold the image in this mode, this mount itself left out."""
        if mode is Mode.EXCLUSIVE:
            names: Iterable[bytes] = [self._name(inode, mode)]
        else:
            prefix = b"%d." % inode
            own = self._name(inode, mode)
            names = (n for n in self._state.names(OWNERS) if n.startswith(prefix) and n != own)
        owners = [decode(content) for content in self._state.read(OWNERS, sorted(names)).values()]
        return [owner for owner in owners if owner is not None]
