"""Leases on the storage where time decides: hosts that must count as dead, leases that are not renewed.

Each scenario takes as long as the protocol's own times want, so all that were selected run side by side, each
with a store of its own, before the first test looks at its outcome. Nothing is judged by how long it took:
what may not be earlier or later than something else is compared with the protocol's own timestamps.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from lockfs.records import sectors
from lockfs.records.geometry import MIB
from tests.mounts import test_paxos
from tests.mounts.test_leases import PATIENCE_S, Holder, refused
from tests.mounts.test_paxos import ask, paxos
from tests.support.mounts import Mount, mounted, start

WATCHDOG = 10  # the shortest allowed
WRITES_END = 8  # io_timeout is 1: after so many seconds without a renewal nothing may be written,
DEAD = WRITES_END + WATCHDOG  # and after so many others may take over
SECTOR = 512
BLOCK = 4096
REAL_TIME_S = 120.0
PAUSE_S = 0.02
WRITER = "import os, sys; os.close(os.open(sys.argv[1], os.O_RDWR))"


wait_for = partial(test_paxos.wait_for, within=REAL_TIME_S)
logged = partial(test_paxos.logged, within=REAL_TIME_S)


def now() -> float:
    """The clock that the leases' timestamps are of."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def refused_for(mount: Mount, image: str, words: str) -> bool:
    """Whether an open for writing is refused; the mount then logs the words (again)."""
    times = mount.log().count(words)
    if not refused(mount.path / image):
        return False
    logged(mount, words, times + 1)
    return True


def joined_as(mount: Mount, times: int = 1) -> int:
    """The mount's host id, once it has joined (anew)."""
    logged(mount, "is joined with host id", times)
    return int(re.findall(r"joined with host id (\d+)", mount.log())[-1])


def lockspace_of(store: Path) -> Path:
    """The file of the lockspace."""
    return store / ".lockfs" / "leases" / "lockspace"


def stamp_in(lockspace: bytes, host_id: int) -> int:
    """When the host renewed last, in whole seconds, rounded down."""
    at = sectors.delta_sector(host_id) * SECTOR
    return sectors.decode_leader(lockspace[at : at + SECTOR]).timestamp


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """The image open for writing."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        yield descriptor
    finally:
        with contextlib.suppress(OSError):
            os.close(descriptor)


@dataclass
class Rig:
    """A store with an image, and mounts of it."""

    base: Path
    stack: contextlib.ExitStack
    watchdog: int = WATCHDOG

    @property
    def store(self) -> Path:
        return self.base / "store"

    @property
    def lockspace(self) -> Path:
        return lockspace_of(self.store)

    def mount(self, name: str, *options: str) -> Mount:
        """Mount the store as host `name`; unmounted in the end."""
        words = paxos(self.base, f"watchdog_timeout={self.watchdog}", f"host={name}", *options)
        return self.stack.enter_context(mounted(self.store, self.base / name, words))

    def lose_storage(self, content: bytes = b"") -> bytes:
        """Put other content in the place of the lockspace, right after a renewal; returns what was there.

        So no renewal comes between the copy and the loss: put back, it is what the hosts left.
        """
        before = self.lockspace.read_bytes()
        wait_for(lambda: self.lockspace.read_bytes() != before, "a renewal")
        saved = self.lockspace.read_bytes()
        os.truncate(self.lockspace, 0)
        if content:
            self.put(content)
        return saved

    def put(self, content: bytes) -> None:
        """Write the lockspace anew, at once."""
        with open(self.lockspace, "r+b", buffering=0) as file:
            assert file.write(content) == len(content)


@dataclass
class Write:
    """One write: when it was begun and had ended, and with which error (0: none)."""

    number: int
    begun: float
    ended: float
    error: int = 0


@dataclass
class Writer:
    """Writes numbers to one place of an image, one after the other, in a thread, until told to end."""

    descriptor: int
    done: list[Write] = field(default_factory=list)
    _end: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Writer:
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join(REAL_TIME_S)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        number = 0
        while not self._end.wait(PAUSE_S):
            number += 1
            begun, error = now(), 0
            try:
                os.pwrite(self.descriptor, b"%0*d" % (BLOCK, number), 0)
            except OSError as failure:
                error = failure.errno or -1
            self.done.append(Write(number, begun, now(), error))

    def goes_on(self) -> None:
        """Return once a write that begins from now on has succeeded."""
        since = now()
        wait_for(lambda: any(w.begun > since and not w.error for w in list(self.done)), "a further write")

    def fails(self) -> int:
        """The error of the next write to fail."""
        known = len(self.done)
        wait_for(lambda: any(w.error for w in self.done[known:]), "a write that fails")
        return next(w.error for w in self.done[known:] if w.error)


def number_in(image: Path) -> int:
    """The last number that a Writer brought to the image itself."""
    return int(image.read_bytes()[:BLOCK])


# --- The scenarios


def killed_host_counts_as_dead(rig: Rig) -> None:
    """A killed host's image is refused until the host counts as dead. Meanwhile, restarted with the same host
    id, it serves reads and lets writers wait."""
    (rig.base / "hostA").mkdir()
    words = paxos(rig.base, f"watchdog_timeout={WATCHDOG}", "host=hostA", "host_id=1")
    first = start(rig.store, rig.base / "hostA", words)
    rig.stack.callback(first.process.kill)
    other = rig.mount("hostB", "wait=0.3", "join=wait")
    joined_as(first)
    holder = Holder(first.path / "disk")
    rig.stack.callback(holder.process.communicate)
    rig.stack.callback(holder.process.kill)
    first.kill()
    subprocess.run(["umount", "-l", str(first.path)], check=True)
    dead_at = stamp_in(rig.lockspace.read_bytes(), 1) + DEAD

    again = rig.mount("hostA", "host_id=1", "wait=0.3")
    assert (again.path / "other").read_bytes() == bytes(BLOCK)
    waiter = subprocess.Popen([sys.executable, "-c", WRITER, again.path / "other"])
    rig.stack.callback(waiter.wait)
    rig.stack.callback(waiter.kill)
    assert "is joined" not in again.log(), "reads do not wait for the join"

    assert refused_for(other, "disk", "on hostA")
    wait_for(lambda: not refused(other.path / "disk"), "hostB takes over")
    assert now() >= dead_at, "taken over from a host that might have been alive"
    logged(other, "a host that is silent and counts as dead in")

    joined_as(again)
    assert waiter.wait(PATIENCE_S) == 0
    assert now() >= dead_at
    with opened(other.path / "disk"):
        assert refused_for(again, "disk", "on hostB")


def writers_wait_for_the_join(rig: Rig) -> None:
    """A host id that another host has is reported by that host's name; reads go on, no write is let in."""
    first = rig.mount("hostA", "host_id=1")
    joined_as(first)
    second = rig.mount("hostB", "host_id=1", "wait=0.3")
    logged(second, "host id 1 is in use by host hostA")
    assert (second.path / "disk").read_bytes() == bytes(BLOCK)
    with pytest.raises(OSError) as caught:
        os.open(second.path / "disk", os.O_RDWR)
    assert caught.value.errno == errno.EIO
    with opened(first.path / "disk") as descriptor:
        assert os.pwrite(descriptor, b"x", 0) == 1
    first.stop()
    joined_as(second)
    with opened(second.path / "disk") as descriptor:
        assert os.pwrite(descriptor, b"y", 0) == 1


def storage_comes_back_in_time(rig: Rig) -> None:
    """Writes go on for 8 io_timeout after the last renewal, then wait, and go on when the storage is back."""
    rig.watchdog = 60  # as in earnest: half a minute for the storage to come back
    mount = rig.mount("hostA", "handover_wait=100", "join=wait")
    host_id = joined_as(mount)
    with opened(mount.path / "disk") as descriptor, Writer(descriptor) as writer:
        saved = rig.lose_storage()
        renewed = stamp_in(saved, host_id)
        logged(mount, "its lease is in doubt; writes wait")
        # Until a write that ought to wait, but does not, cannot be taken for one that was in time.
        wait_for(lambda: now() > renewed + WRITES_END + 2, "the time for writes is over")
        back = now()
        rig.put(saved)
        logged(mount, "its lease is certain again")
        writer.goes_on()
    assert not [write for write in writer.done if write.error]
    before = [write for write in writer.done if write.ended < back]
    assert before[-1].begun > renewed + WRITES_END - 2, "writes ended too early"
    # The stamp is rounded down, so it may be a second younger than it says.
    late = [write for write in writer.done if write.begun >= renewed + 1 + WRITES_END]
    assert all(write.ended >= back for write in late), "written under a lease that nobody renewed"
    assert number_in(rig.store / "disk") == writer.done[-1].number
    assert "is lost" not in mount.log()


def storage_stays_away(rig: Rig) -> None:
    """Writes fail with ENOSPC once they waited in vain. Nobody else has had the image: so a handle whose
    lease was lost writes again, once this host's former life counts as dead."""
    mount = rig.mount("hostA", "handover_wait=0.5", "wait=0.3", "join=wait")
    host_id = joined_as(mount)
    with opened(mount.path / "disk") as descriptor, Writer(descriptor) as writer:
        saved = rig.lose_storage()
        assert writer.fails() == errno.ENOSPC
        assert now() >= stamp_in(saved, host_id) + WRITES_END
        last = max(write.number for write in writer.done if not write.error)
        logged(mount, "its writes are refused")
        assert writer.fails() == errno.ENOSPC
        rig.put(saved)
        joined_as(mount, times=2)
        assert writer.fails() == errno.ENOSPC
        (told,) = [image for image in ask(mount, "who")["images"] if not image["remote"]]
        assert told["state"] == "suspended"
        assert not refused(mount.path / "other"), "what was not lost can be written after the join"
        assert number_in(rig.store / "disk") == last, "written under a lost lease"
        back = now()
        writer.goes_on()
        again = [write for write in writer.done if write.number > last and not write.error]
        assert again[0].ended >= back
    assert number_in(rig.store / "disk") == max(w.number for w in writer.done if not w.error)


def storage_stays_away_and_the_image_is_taken(rig: Rig) -> None:
    """Another host has the image while the first is away: the handle whose lease was lost never writes again;
    a new open does."""
    mount = rig.mount("hostA", "handover_wait=0.5", "wait=0.3", "join=wait")
    joined_as(mount)
    with opened(mount.path / "disk") as descriptor, Writer(descriptor) as writer:
        saved = rig.lose_storage()
        logged(mount, "its writes are refused")
        last = max(write.number for write in writer.done if not write.error)
        rig.put(saved)
        other = rig.mount("hostB", "wait=0.3", "join=wait")
        wait_for(lambda: not refused(other.path / "disk"), "the other host has had the image")
        logged(mount, "somebody else has had it since")
        wait_for(lambda: not refused(mount.path / "disk"), "a new open")
        assert writer.fails() == errno.ENOSPC
    assert all(write.error for write in writer.done if write.number > last)
    assert number_in(rig.store / "disk") == last, "a lost handle wrote"


def storage_is_overwritten(rig: Rig) -> None:
    """Where the lockspace is none any more, the lease is lost at once, and nothing is written there. Once put
    right, the image can be written again when this host's former life counts as dead."""
    mount = rig.mount("hostA", "handover_wait=0.5", "wait=0.3", "join=wait")
    host_id = joined_as(mount)
    with opened(mount.path / "disk") as descriptor, Writer(descriptor) as writer:
        saved = rig.lose_storage(b"\xa5" * MIB)
        assert writer.fails() == errno.ENOSPC
        logged(mount, "its writes are refused")
        logged(mount, f"cannot be joined: sector 0 of {rig.lockspace}: no delta lease is there")
    with pytest.raises(OSError) as caught:
        os.open(mount.path / "other", os.O_RDWR)
    assert caught.value.errno == errno.EIO
    assert rig.lockspace.read_bytes() == b"\xa5" * MIB
    rig.put(saved)
    joined_as(mount, times=2)
    wait_for(lambda: not refused(mount.path / "disk"), "a new open of the image")
    assert now() >= stamp_in(saved, host_id) + DEAD, "taken from a life that might have gone on"


def lockspace_is_replaced(rig: Rig) -> None:
    """Once the lockspace's file was removed, hosts that mount make another, and see nothing of those that
    have the old one open. So these write no more."""
    first = rig.mount("hostA", "handover_wait=0.5", "join=wait")
    with opened(first.path / "disk") as descriptor, Writer(descriptor) as writer:
        writer.goes_on()
        rig.lockspace.unlink()
        logged(first, "is lost: its file was removed or replaced")
        assert writer.fails() == errno.ENOSPC
        last = max(write.number for write in writer.done if not write.error)
        second = rig.mount("hostB", "join=wait", "wait=0.3")
        with opened(second.path / "disk"):
            assert writer.fails() == errno.ENOSPC
        logged(first, "cannot be joined: its file was removed or replaced")
    assert number_in(rig.store / "disk") == last, "two hosts wrote"
    with pytest.raises(OSError) as caught:
        os.open(first.path / "disk", os.O_RDWR)
    assert caught.value.errno == errno.EIO


def prepared_area(rig: Rig) -> None:
    """Two hosts whose leases lie in an area that was prepared with lockfsctl init."""
    area = rig.base / "area"
    area.touch()
    os.truncate(area, 16 * MIB)
    command = [sys.executable, "-m", "lockfs.cli.ctl", "init", str(area), "--lockspace", "images"]
    subprocess.run([*command, "--leases", "8"], check=True, capture_output=True)
    two_hosts(rig, f"lease_area={area}")
    assert not (rig.store / ".lockfs" / "leases").exists()


def libvirt_layout(rig: Rig) -> None:
    """Two hosts whose leases lie where libvirt's sanlock plugin puts them."""
    leases = rig.base / "leases"
    leases.mkdir()
    two_hosts(rig, f"layout=libvirt,lease_area={leases},lock_path=/images")
    lease = hashlib.md5(b"/images/disk", usedforsecurity=False).hexdigest()
    assert sorted(os.listdir(leases)) == sorted(["__LIBVIRT__DISKS__", lease])


def two_hosts(rig: Rig, options: str) -> None:
    """One after the other writes, never both. A host that comes back has its host id again."""
    a, b = (rig.mount(name, options, "wait=0.3") for name in ("hostA", "hostB"))
    host_id, other_id = joined_as(a), joined_as(b)
    assert host_id != other_id
    with opened(a.path / "disk"):
        assert refused_for(b, "disk", "on hostA")
    wait_for(lambda: not refused(b.path / "disk"), "hostB takes over")
    with opened(b.path / "disk"):
        assert refused_for(a, "disk", "on hostB")
    a.stop()
    assert joined_as(rig.mount("hostA", options)) == host_id


SCENARIOS = (
    killed_host_counts_as_dead,
    writers_wait_for_the_join,
    storage_comes_back_in_time,
    storage_stays_away,
    storage_stays_away_and_the_image_is_taken,
    storage_is_overwritten,
    lockspace_is_replaced,
    prepared_area,
    libvirt_layout,
)


def played(scenario: Callable[[Rig], None], base: Path) -> BaseException | None:
    """Play one scenario; what it failed with, and the logs of its mounts."""
    (base / "store").mkdir(parents=True)
    for name in ("disk", "other"):
        (base / "store" / name).write_bytes(bytes(BLOCK))
    try:
        with contextlib.ExitStack() as stack:
            scenario(Rig(base, stack))
    except BaseException as error:  # noqa: BLE001  (the test that it belongs to raises it)
        for log in sorted(base.glob("*.log")):
            error.add_note(f"--- {log.name}:\n{log.read_text()}")
        return error
    return None


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[Callable[[Rig], None], BaseException | None]:
    """What came of each selected scenario, after all of them have ended."""
    mine = [item for item in request.session.items if item.path == request.path]
    chosen = {item.callspec.params["scenario"] for item in mine if isinstance(item, pytest.Function)}
    base = tmp_path_factory.mktemp("time")
    with ThreadPoolExecutor(len(SCENARIOS)) as pool:
        playing = {one: pool.submit(played, one, base / one.__name__) for one in chosen}
        return {one: outcome.result() for one, outcome in playing.items()}


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_in_real_time(
    outcomes: dict[Callable[[Rig], None], BaseException | None], scenario: Callable[[Rig], None]
) -> None:
    """The scenario's own sentence says what is shown."""
    error = outcomes[scenario]
    if error is not None:
        raise error
