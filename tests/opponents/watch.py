"""A watcher beside a test: no image may ever be held for writing by both hosts.

It asks both mounts, over their control sockets, in the order A, B, A. If A says before and after that it
holds an image under one and the same lease, and B says in between that it holds it too, both held it at
once; whatever the timing of the answers, a hand-over cannot look like that.
"""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any, Self

from lockfs.mount import control
from tests.support.mounts import Mount

PERIOD_S = 0.02
ANSWER_S = 5.0
END_S = 20.0
EXCLUSIVE = "exclusive"

Held = dict[int, tuple[float, str]]


def who(mount: Mount) -> list[dict[str, Any]]:
    """What the mount says of its own images."""
    path = control.directory() / control.socket_name(str(mount.path), mount.process.pid)
    images: list[dict[str, Any]] = control.request(path, {"op": "who"}, ANSWER_S)["images"]
    return images


def _held(mount: Mount) -> Held:
    """Inode number -> (when the lease was taken, for people who holds it)."""
    return {
        entry["inode"]: (entry["since"], f"{entry['path']} {entry['state']} {entry['openers']}")
        for entry in who(mount)
        if entry["mode"] == EXCLUSIVE and any(opener["kind"] == "leased" for opener in entry["openers"])
    }


class Watch:
    """Runs during a `with` block; leaving it raises AssertionError if both hosts ever held one image."""

    def __init__(self, a: Mount, b: Mount) -> None:
        self._mounts = (a, b)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch")
        self.rounds = 0
        self.overlaps: list[str] = []
        self.complaints: list[str] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join(END_S)
        assert not self.overlaps, f"both hosts held an image: {self.overlaps[:3]}"
        if kind is None:
            assert not self.complaints, f"a mount did not say who holds what: {self.complaints[:3]}"
            assert self.rounds, "nothing was watched"

    def _run(self) -> None:
        a, b = self._mounts
        while not self._end.wait(PERIOD_S if self.rounds else 0):
            try:
                first, between, second = _held(a), _held(b), _held(a)
            except control.ControlError as error:
                self.complaints.append(str(error))
                return
            self.rounds += 1
            for inode, (since, text) in first.items():
                if inode in between and second.get(inode, (None, ""))[0] == since:
                    self.overlaps.append(f"hostA: {text}; hostB: {between[inode][1]}")
