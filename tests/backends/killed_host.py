"""One host whose workers are killed, at every system call of a step, and what the next one makes of it.

Run with one argument, a JSON object: see test_killed.py. The workers are clones that share descriptors and
memory, as a mount's are; each begins with what the one before it left, and is killed a little later in the
same step than that one. A rival, a process of its own, tries for the image meanwhile. Prints a report in
JSON: how many workers were killed, and what went wrong.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import trio

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lockfs.backends.base import Backend, Image, Lease, Mode, Owner
from lockfs.errors import ImageBusy
from lockfs.journal.memory import SharedMemory
from lockfs.linux.cloning import clone_sharing_files
from tests.backends.contender import BACKENDS

HELD = "test:held"
"""The mode in which the host's keeper believes that the lease is held."""
NEW = "test:new"
"""The name of an image that a worker was to have the first lease of, and gave up with its life."""
WORKERS_MAX = 400
BUSY_MAX = 20
DONE, AGAIN, TROUBLE = 0, 3, 4
ATTEMPT_S = 5.0
_COUNTED = ("posix", "fcntl")


class Trap:
    """Kills this process just before, or just after, the so manieth system call since it was armed."""

    def __init__(self, memory: SharedMemory) -> None:
        self._left = 0
        for name in ("set", "remove"):
            self._watch(memory.facts, name)
        threading.setprofile(self._seen)  # of threads that are yet to start
        sys.setprofile(self._seen)

    def _watch(self, facts: Any, name: str) -> None:
        method: Callable[..., None] = getattr(facts, name)

        def counted(*arguments: Any) -> None:
            self._count()
            method(*arguments)
            self._count()

        setattr(facts, name, counted)

    def arm(self, nth: int) -> None:
        self._left = nth

    def disarm(self) -> None:
        self._left = 0

    def _seen(self, frame: FrameType, event: str, function: Any) -> None:
        if event.startswith("c_") and getattr(function, "__module__", "") in _COUNTED:
            self._count()

    def _count(self) -> None:
        if self._left:
            self._left -= 1
            if not self._left:
                os.kill(os.getpid(), signal.SIGKILL)


class Rival:
    """The other host, behind pipes that every worker has."""

    def __init__(self, task: dict[str, Any]) -> None:
        script = str(Path(__file__).with_name("rival.py"))
        argument = json.dumps({"maker": task["rival"], "image": task["image"]})
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([sys.executable, script, argument], stdin=pipe, stdout=pipe)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._in, self._out = self.process.stdin.fileno(), self.process.stdout.fileno()
        self.answer()

    def tell(self, word: str) -> None:
        os.write(self._in, f"{word}\n".encode())

    def answer(self) -> str:
        line = b""
        while not line.endswith(b"\n"):
            line += os.read(self._out, 1) or b"ended\n"
        return line.decode().strip()

    def ask(self, word: str) -> str:
        self.tell(word)
        return self.answer()


class Worker:
    """One of the host's processes."""

    def __init__(self, task: dict[str, Any], memory: SharedMemory, rival: Rival, kept: set[int]) -> None:
        self._task = task
        self._memory = memory
        self._facts = memory.facts
        self._rival = rival
        self._mode, self._other = Mode(task["mode"]), Mode(task["other"])
        self._kept = kept
        self._trap = Trap(memory)

    def run(self, nth: int) -> int:
        """Serve until the step has been made, or until killed in it."""
        self._memory.reload()
        if self._facts.get(HELD) is not None:
            self._rival.tell("hammer")
        for descriptor in open_descriptors() - self._kept - self._memory.named_descriptors():
            os.close(descriptor)
        return trio.run(self._serve, nth)

    async def _serve(self, nth: int) -> int:
        spec, store = self._task["maker"], self._task["store"]
        image = self._image(nth)
        owner = Owner(spec["host"], 1, "keeper", 0.0)
        backend = BACKENDS[spec["backend"]](spec | {"store_fd": store})
        await backend.start(lambda lease: None, self._facts)
        held, lease = self._facts.get(HELD), None
        if held is not None:
            lease = await backend.recall(image, Mode(held), owner)
            late = self._task["step"] == "release-late"  # its keeper is told only when it was released
            self._expect(late or lease is not None, "a lease that was held was not recalled")
        async with trio.open_nursery() as nursery:
            await nursery.start(backend.run)
            await backend.settle()
            await self._let_go(backend, lease)
            if self._task["step"] == "first":
                image = self._image(nth, new=True)
            outcome = await self._step(backend, image, owner, nth)
            nursery.cancel_scope.cancel()
        await backend.stop()
        return outcome

    def _image(self, nth: int, *, new: bool = False) -> Image:
        """The one that was opened before all workers; or one that no host ever had a lease of."""
        descriptor, name = self._task["descriptor"], self._task["image"]
        if new:
            name = f"{nth}.img"
            descriptor = os.open(Path(self._task["maker"]["store"]) / name, os.O_RDWR | os.O_CREAT)
            self._facts.set(NEW, name)
        return Image(os.fstat(descriptor).st_ino, name.encode(), descriptor)

    def _expect(self, true: bool, what: str) -> None:
        """End at once if it is not so: a moment later this worker may be killed."""
        if not true:
            print(f"{self._task['step']}: {what}", file=sys.stderr, flush=True)
            os._exit(TROUBLE)

    async def _let_go(self, backend: Backend, lease: Lease | None) -> None:
        """The rival had nothing as long as the lease was held, and has all as soon as it is not."""
        won = self._rival.ask("stop")
        if self._facts.get(HELD) is not None:
            self._expect(won == "0" or lease is None, "another host got the image in between")
        if lease is not None:
            word = "share" if lease.mode is Mode.SHARED else "peek"
            shared = await trio.to_thread.run_sync(self._rival.ask, word)
            self._expect((shared == "won") is (lease.mode is Mode.SHARED), f"{lease.mode}, and {shared}")
        if lease is not None:
            self._facts.remove(HELD)
            await backend.release(lease)
        word = f"win {self._facts.get(NEW) or self._task['image']}"
        self._expect(await trio.to_thread.run_sync(self._rival.ask, word) == "won", "it was not given back")

    async def _step(self, backend: Backend, image: Image, owner: Owner, nth: int) -> int:
        step, lease = self._task["step"], None
        if step in ("release", "release-late", "convert"):
            lease = await backend.acquire(image, self._mode, owner, trio.current_time() + ATTEMPT_S)
            self._facts.set(HELD, self._mode.value)
        if step in ("convert", "release-late"):
            self._rival.tell("hammer")
        self._trap.arm(nth)
        try:
            if step == "release":
                assert lease is not None
                self._facts.remove(HELD)
                await backend.release(lease)
            elif step == "release-late":
                assert lease is not None
                await backend.release(lease)
                self._facts.remove(HELD)
            elif step == "convert":
                assert lease is not None
                await backend.convert(lease, self._other, trio.current_time() + ATTEMPT_S)
                self._facts.set(HELD, self._other.value)
            else:
                lease = await backend.acquire(image, self._mode, owner, trio.current_time() + ATTEMPT_S)
                if step == "acquire":
                    self._facts.set(HELD, self._mode.value)
        except ImageBusy:  # the rival was in the way
            self._trap.disarm()
            os.kill(os.getpid(), signal.SIGUSR1)
        self._trap.disarm()
        if step == "acquire":
            self._rival.tell("hammer")
        if step == "first" and lease is not None:
            await backend.release(lease)
        await self._let_go(backend, lease if step in ("acquire", "convert") else None)
        return DONE


def open_descriptors() -> set[int]:
    """Of this process, but for the one that lists them and the parent's hold of the worker."""
    listed = {int(name) for name in os.listdir("/proc/self/fd")}
    return {descriptor for descriptor in listed if not _passes(descriptor)}


def _passes(descriptor: int) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}") == "anon_inode:[pidfd]"
    except OSError:
        return True


def main(task: dict[str, Any]) -> dict[str, Any]:
    """Kill one worker after the other until the step is made."""
    task["store"] = os.open(task["maker"]["store"], os.O_PATH | os.O_DIRECTORY)
    task["descriptor"] = os.open(Path(task["maker"]["store"]) / task["image"], os.O_RDWR)
    memory, rival = SharedMemory.create(), Rival(task)
    kept = open_descriptors()
    killed, busy, nth = 0, 0, 1
    while killed < WORKERS_MAX and busy < BUSY_MAX:
        pid, pidfd = clone_sharing_files()
        if not pid:
            work(task, memory, rival, kept, nth)
        _, status = os.waitpid(pid, 0)
        os.close(pidfd)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            killed, nth = killed + 1, nth + task["stride"]
        elif os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGUSR1:
            busy += 1
        else:
            break
    memory.reload()
    rival.tell("end")
    named = sorted(memory.named_descriptors())
    return {"killed": killed, "busy": busy, "status": status, "named": named, "rival": rival.process.wait()}


def work(task: dict[str, Any], memory: SharedMemory, rival: Rival, kept: set[int], nth: int) -> None:
    """Be a worker, and end as one."""
    code = TROUBLE
    try:
        code = Worker(task, memory, rival, kept).run(nth)
    except BaseException:  # noqa: BLE001  (told, and the process ends here)
        traceback.print_exc()
    finally:
        os._exit(code)


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
