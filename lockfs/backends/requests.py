"""Requests for images: how a host asks the holder, through the storage alone, to let an image go.

A request is the file `requests/<inode>.<instance>`, rewritten every REQUEST_REPEAT_S for as long as it is
wanted. A host that dies leaves its file behind, and clocks of hosts (and of nodes of a cluster file system)
differ, so no time written by another host is compared with ours. A request counts as alive when we *saw*
it appear or change, by our own clock, within REQUEST_TTL_S; one that stays the same for longer is removed.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

from lockfs.backends.base import Owner
from lockfs.backends.owners import encode
from lockfs.backends.state import REQUESTS, StateDirectory

REQUEST_REPEAT_S = 0.1
REQUEST_TTL_S = 5.0


@dataclass
class _Seen:
    content: bytes
    alive: bool  # it appeared or changed while we watched
    since: float


class Requests:
    """This host's requests and those of others. Methods block and belong on worker threads.

    Times are seconds of any one clock of this host that never steps back.
    """

    def __init__(self, state: StateDirectory, instance: bytes) -> None:
        """`instance` tells this mount's files from those of every other mount of the store."""
        self._state = state
        self._instance = instance
        self._lock = threading.Lock()
        self._sent: dict[int, tuple[int, float]] = {}
        self._seen: dict[bytes, _Seen] = {}
        self._looked: float | None = None

    def _name(self, inode: int) -> bytes:
        return b"%d.%s" % (inode, self._instance)

    def send(self, inode: int, owner: Owner, now: float) -> None:
        """Make or renew the request; renewals closer than REQUEST_REPEAT_S to the last are left out."""
        with self._lock:
            count, last = self._sent.get(inode, (0, -REQUEST_REPEAT_S))
            if now - last < REQUEST_REPEAT_S:
                return
            self._sent[inode] = (count + 1, now)
        # The count makes every renewal differ, whatever the resolution of the storage's times.
        self._state.write(REQUESTS, self._name(inode), b"%d\n%s" % (count, encode(owner)))

    def withdraw(self, inode: int) -> None:
        """Remove the request."""
        with self._lock:
            self._sent.pop(inode, None)
        self._state.remove(REQUESTS, self._name(inode))

    def asked_for(self, held: frozenset[int], now: float) -> set[int]:
        """Of the inodes `held`, those that a living request of another host names; removes dead ones."""
        wanted: dict[bytes, int] = {}
        for name in self._state.names(REQUESTS):
            number, _, instance = name.partition(b".")
            if number.isdigit() and instance and instance != self._instance:
                wanted[name] = int(number)
        contents = self._state.read(REQUESTS, sorted(wanted)) if wanted else {}
        alive, dead = self._judge(contents, now)
        for name in dead:
            self._state.remove(REQUESTS, name)
        return {wanted[name] for name in alive} & held

    def _judge(self, contents: dict[bytes, bytes], now: float) -> tuple[list[bytes], list[bytes]]:
        """Compare with what the last look saw; a file new since a recent look was made by a living host."""
        with self._lock:
            watched = self._looked is not None and now - self._looked <= REQUEST_TTL_S
            self._looked = now
            seen = {}
            for name, content in contents.items():
                before = self._seen.get(name)
                if before is None:
                    seen[name] = _Seen(content, watched, now)
                elif before.content != content:
                    seen[name] = _Seen(content, True, now)
                else:
                    seen[name] = before
            dead = [name for name, what in seen.items() if now - what.since > REQUEST_TTL_S]
            self._seen = {name: what for name, what in seen.items() if name not in dead}
            return [name for name, what in self._seen.items() if what.alive], dead
