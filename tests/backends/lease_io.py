"""One host's way to the lease area, with faults on demand, and time that passes only while nothing moves.

The fault model: each transfer of the host (a read or a write, of whole sectors, of one file) meets the rules
in the order in which they were made; the first that matches says what happens. REFUSED: an error of the
kernel, no byte is moved. STUCK: it does not begin to move data, and nothing can end it, until it is let go;
then it moves what its buffer has at that moment, or is refused, if it was told so. So a write of which nobody
knows any more may land minutes later, after writes of other hosts. Whatever no rule matches is the kernel's
own, on the real file. Hosts share the files and nothing else.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from lockfs.storage.disk import DirectDisk
from lockfs.storage.rawio import Kernel, RawIO
from lockfs.storage.workers import Workers

IDLE_S = 0.001
"""Real seconds without anything to do before a look whether time may jump."""
WAIT_S = 60.0  # only a broken test waits so long; its threads end then


@dataclass
class Rule:
    """What happens to the transfers that match: any of `calls` ("r", "w"), of the file called `name` (empty:
    of any), at an offset for which `where` is true; at most `times` of them (-1: all).
    """

    calls: str
    name: str
    where: Callable[[int], bool]
    error: OSError | None = None
    times: int = -1
    met: int = 0
    _free: threading.Event = field(default_factory=threading.Event)

    def matches(self, call: str, name: str, offset: int) -> bool:
        fits = call in self.calls and self.name in ("", name) and self.where(offset)
        return fits and self.times != self.met

    def let_go(self, error: OSError | None = None) -> None:
        """Let those that are stuck, and later ones, move their data, or be refused."""
        self.error = error
        self._free.set()

    @property
    def holds(self) -> bool:
        """Whether it keeps transfers stuck."""
        return not self._free.is_set()

    def stay(self) -> None:
        """Be stuck, in the thread that called."""
        if not self._free.wait(WAIT_S):
            raise TimeoutError("a test left a transfer stuck")


class LeaseIO(RawIO):
    """A RawIO of that fault model."""

    def __init__(self) -> None:
        self._kernel = Kernel()
        self._lock = threading.Lock()
        self._rules: list[Rule] = []
        self._held: list[Rule] = []
        self._stuck: dict[int, tuple[int, Rule]] = {}
        self.log: list[tuple[str, str, int]] = []

    def refuse(
        self,
        calls: str,
        error: OSError,
        name: str = "",
        where: Callable[[int], bool] = lambda offset: True,
        times: int = -1,
    ) -> Rule:
        """Refuse transfers from now on."""
        rule = Rule(calls, name, where, error, times)
        rule._free.set()
        self._rules.append(rule)
        return rule

    def hold(
        self,
        calls: str,
        name: str = "",
        where: Callable[[int], bool] = lambda offset: True,
        times: int = -1,
    ) -> Rule:
        """Let transfers be stuck from now on."""
        rule = Rule(calls, name, where, None, times)
        self._rules.append(rule)
        self._held.append(rule)
        return rule

    def hold_nth(self, number: int, name: str) -> Rule:
        """Let one transfer of a file be stuck: the one after `number` others."""
        seen = 0

        def where(offset: int) -> bool:
            nonlocal seen
            seen += 1
            return seen == number + 1

        return self.hold("rw", name, where)

    def heal(self) -> None:
        """No rule any more; what is stuck is let go."""
        with self._lock:
            self._rules.clear()
        for rule in self._held:
            rule.let_go()

    def drop(self, rule: Rule) -> None:
        """The rule matches nothing any more; what is stuck stays so."""
        with self._lock:
            self._rules.remove(rule)

    def preadv(self, descriptor: int, buffers: Sequence[memoryview], offset: int, /) -> int:
        with self._moving("r", descriptor, offset):
            return self._kernel.preadv(descriptor, buffers, offset)

    def pwritev(self, descriptor: int, buffers: Sequence[memoryview], offset: int, /) -> int:
        with self._moving("w", descriptor, offset):
            return self._kernel.pwritev(descriptor, buffers, offset)

    def alignment(self, descriptor: int, /) -> int | None:
        return self._kernel.alignment(descriptor)

    def stuck(self) -> dict[int, int]:
        """The transfers that are stuck, by the workers' calls they are in: their offsets."""
        return {job: offset for job, (offset, rule) in list(self._stuck.items()) if rule.holds}

    @contextlib.contextmanager
    def _moving(self, call: str, descriptor: int, offset: int) -> Iterator[None]:
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.split(" ")[0]
        with self._lock:
            self.log.append((call, name, offset))
            rule = next((rule for rule in self._rules if rule.matches(call, name, offset)), None)
            if rule is not None:
                rule.met += 1
        if rule is not None:
            job = _job_of_this_thread()
            self._stuck[job] = offset, rule
            rule.stay()
            del self._stuck[job]
            if rule.error is not None:
                raise rule.error
        yield


def _job_of_this_thread() -> int:
    """Which of the workers' calls this thread is in, as `id` tells it."""
    frame = sys._getframe()
    while frame.f_code is not Workers._serve.__code__:
        assert frame.f_back is not None
        frame = frame.f_back
    return id(frame.f_locals["job"])


def _tasks(root: trio.lowlevel.Task) -> Iterator[trio.lowlevel.Task]:
    yield root
    for nursery in root.child_nurseries:
        for child in nursery.child_tasks:
            yield from _tasks(child)


_ENDED, _IN_THREAD = Workers._ended.__code__, trio.to_thread.run_sync.__code__
_AFTER_EARLIER = DirectDisk._after_earlier.__code__


def _awaits_a_thread(stuck: dict[int, int]) -> bool:
    """Whether a task waits for what a thread does, other than a transfer that is stuck.

    What the threads do is not looked at: one may have ended its work and wait to be heard.
    """
    root = trio.lowlevel.current_root_task()
    assert root is not None
    for task in _tasks(root):
        for frame, _ in task.iter_await_frames():
            if frame.f_code is _IN_THREAD:
                return True
            if frame.f_code is _ENDED and id(frame.f_locals["job"]) not in stuck:
                return True
            if frame.f_code is _AFTER_EARLIER and frame.f_locals["earlier"].start not in stuck.values():
                return True
    return False


async def pace(ios: Callable[[], Iterable[LeaseIO]]) -> None:
    """Let the mock clock jump to the next deadline whenever nothing happens and nothing is on its way."""
    clock = trio.lowlevel.current_clock()
    assert isinstance(clock, MockClock)
    clock.autojump_threshold = math.inf
    while True:
        await wait_all_tasks_blocked(IDLE_S)
        if _awaits_a_thread({job: offset for io in ios() for job, offset in io.stuck().items()}):
            continue
        left = trio.lowlevel.current_statistics().seconds_to_next_deadline
        if 0 < left < math.inf:
            clock.jump(left)
