"""Workers that are killed just when they begin: what they were about to take is taken by the next one."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path

from tests.support.mounts import FAMILY, Mount, mounted, needs_mount
from tests.support.qemu import eventually

pytestmark = needs_mount

KILLS = 16
THREADS = 4
FRESH_S = 0.08
"""About as long a worker that has its turn needs until it has taken its first requests."""
PART = 1 << 18
STEADY_S = 0.35
"""Whoever served for so long does not count as one of a crash loop."""


class Writers:
    """Threads that write to a part of a file of their own and read it, and note what goes wrong."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stop = threading.Event()
        self.done = 0
        self.errors: list[str] = []
        self._threads = [threading.Thread(target=self._work, args=(number,)) for number in range(THREADS)]

    def _work(self, number: int) -> None:
        fd = os.open(self._path, os.O_RDWR)
        data, at = os.urandom(4096 * (1 + 15 * number)), number * PART
        try:
            while not self._stop.is_set():
                try:
                    os.pwrite(fd, data, at)
                    if os.pread(fd, len(data), at) != data:
                        self.errors.append("other data")
                except OSError as error:
                    self.errors.append(str(error))
                self.done += 1
        finally:
            os.close(fd)

    def __enter__(self) -> Writers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def _next_worker(mount: Mount, former: int) -> int:
    """The worker that came after `former`."""
    return int(
        eventually(lambda: {mount.family().get("lockfs-worker", 0)} - {0, former}, "the next worker").pop()
    )


def test_nobody_sees_an_error(tmp_path: Path) -> None:
    store, moments = tmp_path / "store", random.Random(1)
    store.mkdir()
    (store / "image").write_bytes(bytes(1 << 20))
    with mounted(store, tmp_path / "m", "backend=nop,io=daemon") as mount:
        with Writers(mount.path / "image") as writers:
            worker = mount.family()["lockfs-worker"]
            for _ in range(KILLS):
                os.kill(worker, signal.SIGKILL)
                fresh = _next_worker(mount, worker)
                time.sleep(moments.uniform(0.0, FRESH_S))
                os.kill(fresh, signal.SIGKILL)
                worker = _next_worker(mount, fresh)
                done = writers.done
                eventually(lambda done=done: writers.done > done + 2 * THREADS, "requests answered again")
                time.sleep(STEADY_S)
        assert writers.errors == []


def test_who_has_taken_over_is_urgent_no_more(tmp_path: Path) -> None:
    """Soon afterwards no thread of the worker comes before other programs, nor does a spare."""
    store = tmp_path / "store"
    store.mkdir()
    with mounted(store, tmp_path / "mount", "backend=nop") as mount:
        former = mount.family()["lockfs-worker"]
        ordinary = os.getpriority(os.PRIO_PROCESS, former)
        os.kill(former, signal.SIGKILL)
        os.statvfs(mount.path)

        def is_complete() -> bool:
            family = mount.family()
            return family.keys() >= FAMILY and former not in family.values()

        eventually(is_complete, "there is another worker")
        worker, spare = (mount.family()[name] for name in ("lockfs-worker", "lockfs-spare"))

        def niceness() -> set[int]:
            threads = map(int, os.listdir(f"/proc/{worker}/task"))
            return {os.getpriority(os.PRIO_PROCESS, thread) for thread in (*threads, spare)}

        eventually(lambda: niceness() == {ordinary}, "everything is ordinary again")
        time.sleep(0.5)
        os.listdir(mount.path)
        assert niceness() == {ordinary}
