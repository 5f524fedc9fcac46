"""System calls that get stuck, come up short or fail, in front of a real file.

The fault model: a call that `hold` names (one of "preadv" and "pwritev", at one offset) does not begin to
move data until it is let go, as on a path that is lost, a server that is silent or a disk that retries.
Nothing can end it: neither a signal nor a deadline, as with a thread in the kernel. When it is let go it
moves the bytes that its buffer has at *that* moment, which is when the device would fetch them, and lands.
Each `hold` holds one call. `answer` makes all calls of a kind return a number instead (short transfers, an
alignment, None for a file system that tells none) or raise an error of the kernel; they move nothing then.
Calls that no rule names are the kernel's own, on the real file.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from mmap import mmap

import trio

from lockfs.storage.buffers import Buffers
from lockfs.storage.rawio import Kernel, RawIO

WAIT_S = 60.0  # only a broken test waits so long; its threads end then


class Held:
    """One call that is to be held."""

    def __init__(self) -> None:
        self._entered = threading.Event()
        self._free = threading.Event()
        self._thread = threading.current_thread()

    def pause(self) -> None:
        """Be stuck: in the thread that called."""
        self._thread = threading.current_thread()
        self._entered.set()
        if not self._free.wait(WAIT_S):
            raise TimeoutError("a test left a call held")

    async def entered(self) -> None:
        """Wait until the call is there."""
        assert await trio.to_thread.run_sync(self._entered.wait, WAIT_S), "the call never came"

    def let_go(self) -> None:
        """Let it move its data and return."""
        self._free.set()

    async def thread_ended(self) -> None:
        """Wait until the thread that called is gone: its disk must be closed, the call let go."""
        await trio.to_thread.run_sync(self._thread.join, WAIT_S)
        assert not self._thread.is_alive()


class FaultyIO(RawIO):
    """A RawIO of that fault model."""

    def __init__(self) -> None:
        self._kernel = Kernel()
        self._held: defaultdict[tuple[str, int], list[Held]] = defaultdict(list)
        self._all_held: list[Held] = []
        self._answers: dict[str, int | OSError | None] = {}

    def hold(self, call: str, offset: int) -> Held:
        """Hold the next such call."""
        held = Held()
        self._held[call, offset].append(held)
        self._all_held.append(held)
        return held

    def answer(self, call: str, answer: int | OSError | None) -> None:
        """Answer every such call with this."""
        self._answers[call] = answer

    def let_all_go(self) -> None:
        """Leave nobody stuck."""
        for held in self._all_held:
            held.let_go()

    def preadv(self, descriptor: int, buffers: Sequence[memoryview], offset: int, /) -> int:
        """See RawIO."""
        return self._call("preadv", offset, lambda: self._kernel.preadv(descriptor, buffers, offset)) or 0

    def pwritev(self, descriptor: int, buffers: Sequence[memoryview], offset: int, /) -> int:
        """See RawIO."""
        return self._call("pwritev", offset, lambda: self._kernel.pwritev(descriptor, buffers, offset)) or 0

    def alignment(self, descriptor: int, /) -> int | None:
        """See RawIO."""
        return self._call("alignment", 0, lambda: self._kernel.alignment(descriptor))

    def _call(self, name: str, offset: int, ask_kernel: Callable[[], int | None]) -> int | None:
        if waiting := self._held[name, offset]:
            waiting.pop(0).pause()
        if name not in self._answers:
            return ask_kernel()
        answer = self._answers[name]
        if isinstance(answer, OSError):
            raise answer
        return answer


class BuffersReusedAtOnce(Buffers):
    """Broken: a buffer is up for the next call while a late write still needs it."""

    def take(self, length: int) -> mmap:
        """See Buffers."""
        buffer = super().take(length)
        self.give_back(buffer)
        return buffer
