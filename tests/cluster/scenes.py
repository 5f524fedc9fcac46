"""What the scenarios have in common: host A writes, host B wants to, and what landed is judged in the end."""

from __future__ import annotations

import time
from collections.abc import Callable

from tests.cluster import rigs, witness
from tests.cluster.guests import Guest, Writer
from tests.cluster.rigs import NfsServer, SharedDisk
from tests.support.qemu import eventually

PATIENCE_S = 180.0
"""How long anything may take before the test gives up: guests are 10 to 20 times slower than machines."""
SETTLED = 50
"""Writes after which a host counts as writing."""
AFTERMATH_S = 8.0
"""How long a host that came back is left alone with its old handle, which it uses all the time."""

Figures = Callable[..., None]
_BUSY = "open 16"


class Scene:
    """Hosts A and B of one rig, A in the middle of writing, B refused; or, if not `asked`, B waits with its
    first open until it is to take over.
    """

    def __init__(
        self, rig: SharedDisk | NfsServer, boot: Callable[[str], Guest], *, asked: bool = True
    ) -> None:
        self.rig = rig
        self._asked = asked
        self.a, self.b = rigs.both(boot)
        self.first = Writer(self.a, 1)
        self.first.wait_open(PATIENCE_S)
        self.first.wait_acknowledged(SETTLED, PATIENCE_S)
        if asked:
            self.second = Writer(self.b, 2)
            eventually(lambda: _BUSY in self.second.errors(), "B is refused", PATIENCE_S, 0.1)

    def ask(self) -> None:
        """Let B open the image for the first time."""
        self.second = Writer(self.b, 2)

    def taken_over(self, gone_at: float) -> float:
        """Wait until B has the image and writes; returns how long after `gone_at` it had it."""
        taken_at = self.second.wait_open(PATIENCE_S)
        self.second.wait_acknowledged(SETTLED, PATIENCE_S)
        met = set(self.second.errors())
        assert met == {_BUSY} or not (met or self._asked), "B met more than an image that was held"
        return taken_at - gone_at

    def aftermath(self) -> int:
        """Let A, which came back, try with its old handle; returns how many writes it was told succeeded."""
        before = self.first.acknowledged()
        eventually(self.first.failing, "writes of A fail", PATIENCE_S, 0.1)
        time.sleep(AFTERMATH_S)
        assert self.first.failing(), "A writes again, although B has had the image"
        return self.first.acknowledged() - before

    def judge(self) -> witness.Term:
        """End B, and check what landed but for stale writes; returns A's term."""
        self.second.end()
        first, second = self.rig.landed()
        assert (first.host, second.host) == ("A", "B")
        assert first.holes == second.holes == ()
        assert second.landed == self.second.ended["number"]
        return first


def nothing_stale(term: witness.Term, *, under_way: bool = False) -> None:
    """Fail if a write landed after the next owner had the image; `under_way` allows the one in flight."""
    allowed = [(), (term.landed,)] if under_way else [()]
    assert term.stale in allowed, f"{len(term.stale)} writes of A landed after B had the image: {term}"
