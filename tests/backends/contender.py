"""One process of the stress: fights for an image and reports, as JSON, how often it got it and what it saw.

Run with one argument, a JSON object: see conformance.processes_never_share.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lockfs.backends.base import Backend, Image, Mode, Owner
from lockfs.backends.fcntl import FcntlBackend, FcntlOptions
from lockfs.backends.paxos.backend import PaxosBackend
from lockfs.backends.paxos.options import LayoutKind, PaxosOptions
from lockfs.errors import ImageBusy

FIGHT_S = 3.0
"""So long everybody fights, or a slow start of one who holds the image uses up all rounds of the others."""
_PAUSE_S_MAX = 0.002
_BREATH_S_MAX = 0.02
"""Whoever had the image leaves it to others for a moment, or it would have it again most of the time."""


def _store(spec: dict[str, Any]) -> int:
    """The store's descriptor: the one given, or a new one."""
    given = spec.get("store_fd")
    return given if isinstance(given, int) else os.open(spec["store"], os.O_PATH | os.O_DIRECTORY)


def _fcntl(spec: dict[str, Any]) -> Backend:
    store = _store(spec)
    return FcntlBackend(FcntlOptions(**spec["options"]), store, spec["host"])


def _paxos(spec: dict[str, Any]) -> Backend:
    options = spec["options"] | {"layout": LayoutKind(spec["options"]["layout"])}
    store = _store(spec)
    return PaxosBackend(PaxosOptions(**options), store, spec["host"])


BACKENDS: dict[str, Callable[[dict[str, Any]], Backend]] = {"fcntl": _fcntl, "paxos": _paxos}


class Witness:
    """The marker and the counter that prove who was inside with whom."""

    def __init__(self, directory: Path) -> None:
        self.marker = directory / "inside"
        self.counter = directory / "counter"
        self.trouble: list[str] = []

    def write(self) -> None:
        """Be the one writer."""
        try:
            os.close(os.open(self.marker, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            self.trouble.append("two writers")
            return
        count = int(self.counter.read_text()) if self.counter.exists() else 0
        if random.random() < 0.2:
            os.sched_yield()
        self.counter.write_text(str(count + 1))
        self.marker.unlink()

    def read(self) -> None:
        """Be one of the readers."""
        if self.marker.exists():
            self.trouble.append("a writer beside a reader")


async def contend(task: dict[str, Any]) -> dict[str, Any]:
    """Fight for the given number of rounds."""
    spec = task["maker"]
    backend = BACKENDS[spec["backend"]](spec)
    await backend.start(lambda lease: None)
    async with trio.open_nursery() as nursery:
        await nursery.start(backend.run)
        report = await fight(task, backend)
        nursery.cancel_scope.cancel()
    await backend.stop()
    return report


async def fight(task: dict[str, Any], backend: Backend) -> dict[str, Any]:
    """Acquire and release with the backend running, so many rounds as asked for, and FIGHT_S at least."""
    spec, mode, witness = task["maker"], Mode(task["mode"]), Witness(Path(task["witness"]))
    path = os.fsencode(task["image"])
    descriptor = os.open(Path(spec["store"]) / task["image"], os.O_RDWR)
    image = Image(os.fstat(descriptor).st_ino, path, descriptor)
    owner = Owner(spec["host"], os.getpid(), "contender", 0.0)
    print("ready", flush=True)
    sys.stdin.readline()
    wins = rounds = 0
    until = trio.current_time() + FIGHT_S
    while rounds < task["rounds"] or trio.current_time() < until:
        rounds += 1
        try:
            lease = await backend.acquire(image, mode, owner, trio.current_time() + task["attempt_s"])
        except ImageBusy:
            await trio.sleep(random.random() * _PAUSE_S_MAX)
            continue
        wins += 1
        witness.write() if mode is Mode.EXCLUSIVE else witness.read()
        await backend.release(lease)
        await trio.sleep(random.random() * _BREATH_S_MAX)
    return {"mode": mode.value, "wins": wins, "trouble": witness.trouble}


if __name__ == "__main__":
    print(json.dumps(trio.run(contend, json.loads(sys.argv[1]))))
