"""A host that tries for an image when it is told to: see killed_host.py.

Reads words, one a line. `hammer`: try all the time from now on. `stop`: no more; answers how often it got
the image. `win NAME`: try for that one until it is had; answers "won", or "busy" after WIN_S. `share`: the
same for a SHARED lease of the image; `peek`: for PEEK_S only. `end`: end.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import trio

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lockfs.backends.base import Backend, Image, Mode, Owner
from lockfs.errors import ImageBusy
from tests.backends.contender import BACKENDS

WIN_S, PEEK_S = 10.0, 0.5
PAUSE_S = 0.02
ATTEMPT_S = 5.0


class Rival:
    """Tries with one backend; `won` counts since `hammer`."""

    def __init__(self, backend: Backend, store: str, name: str, owner: Owner) -> None:
        self._backend, self._store, self._owner = backend, store, owner
        self._images: dict[str, Image] = {}
        self._name = name
        self._scope = trio.CancelScope()
        self._idle = trio.Lock()
        self.won = 0

    def _image(self, name: str) -> Image:
        if name not in self._images:
            descriptor = os.open(Path(self._store) / name, os.O_RDWR | os.O_CREAT)
            self._images[name] = Image(os.fstat(descriptor).st_ino, name.encode(), descriptor)
        return self._images[name]

    async def tries(self, name: str = "", mode: Mode = Mode.EXCLUSIVE) -> bool:
        """Try once, and give back what it got."""
        try:
            lease = await self._backend.acquire(
                self._image(name or self._name), mode, self._owner, trio.current_time() + ATTEMPT_S
            )
        except ImageBusy:
            return False
        with trio.CancelScope(shield=True):
            await self._backend.release(lease)
        self.won += 1
        return True

    async def hammer(self) -> None:
        """Try until stopped; does so already: nothing new."""
        if self._idle.locked():
            return
        self.won = 0
        self._scope = trio.CancelScope()
        async with self._idle:
            with self._scope:
                while True:
                    await self.tries()
                    await trio.sleep(PAUSE_S)

    async def stop(self) -> str:
        """How often it got the image."""
        self._scope.cancel()
        async with self._idle:
            return str(self.won)

    async def win(self, name: str = "", mode: Mode = Mode.EXCLUSIVE, within: float = WIN_S) -> str:
        """Whether an image could be had."""
        with trio.move_on_after(within):
            while not await self.tries(name, mode):
                await trio.sleep(PAUSE_S)
            self.won = 0
            return "won"
        return "busy"

    async def answer(self, word: str) -> str:
        """What one of the words asks for."""
        if word == "stop":
            return await self.stop()
        if word in ("share", "peek"):
            return await self.win(mode=Mode.SHARED, within=WIN_S if word == "share" else PEEK_S)
        return await self.win(word.removeprefix("win "))


async def main(task: dict[str, Any]) -> None:
    """Do what the words say."""
    spec = task["maker"]
    store = os.open(spec["store"], os.O_PATH | os.O_DIRECTORY)
    backend = BACKENDS[spec["backend"]](spec | {"store_fd": store})
    await backend.start(lambda lease: None)
    rival = Rival(backend, spec["store"], task["image"], Owner(spec["host"], os.getpid(), "rival", 0.0))
    async with trio.open_nursery() as nursery:
        await nursery.start(backend.run)
        await rival.win(task["image"])
        print("ready", flush=True)
        while (word := (await trio.to_thread.run_sync(sys.stdin.readline)).strip()) not in ("", "end"):
            if word == "hammer":
                nursery.start_soon(rival.hammer)
                await trio.sleep(0)
            else:
                print(await rival.answer(word), flush=True)
        nursery.cancel_scope.cancel()
    await backend.stop()


if __name__ == "__main__":
    trio.run(main, json.loads(sys.argv[1]))
