"""Two QEMUs on two mounts whose leases lie on the storage: refused, handed over, migrated.

The steps are those of test_exclusion.py and test_migration.py, which play them with file locks; here a part
of them is played with backend=paxos, in guarded mode (what io=auto means there) and through the daemon.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.opponents import test_exclusion, test_migration
from tests.opponents.conftest import Hosts, Pair
from tests.opponents.test_migration import Stage, StageMaker
from tests.support import guest
from tests.support.qemu import Build, Fleet, Style, disk

pytestmark = pytest.mark.usefixtures("needs_lockfs")


@pytest.fixture
def build(request: pytest.FixtureRequest) -> Build:
    """The QEMU that the case names: "own" or "newer"."""
    found: Build = request.getfixturevalue(request.param)
    return found


PairMaker = Callable[..., Pair]


@pytest.fixture
def paxos_mounts(two_mounts: Hosts, tmp_path: Path) -> PairMaker:
    """paxos_mounts(options, io) -> Pair. The mounts join while the test goes on: its first open waits."""

    def make(options: str = "", io: str = "auto") -> Pair:
        words = f"backend=paxos,io_timeout=1,state_dir={tmp_path}/state,io={io}"
        return two_mounts(",".join(filter(None, (words, options))))

    return make


@pytest.fixture
def io(request: pytest.FixtureRequest) -> str:
    """The data mode that the case names."""
    return str(request.param)


@pytest.fixture
def stage(paxos_mounts: PairMaker, fleet: Fleet, build: Build, io: str) -> StageMaker:
    """As in test_migration.py: stage(style, format, options) makes the mounts and an image on them."""

    def make(style: Style, image_format: str = "qcow2", options: str = "") -> Stage:
        words = [word for word in options.split(",") if not word.startswith("io=")]
        pair = paxos_mounts(",".join(words), io)
        return Stage(fleet, build, (pair.a / "i.img", pair.b / "i.img"), style, image_format)

    return make


@pytest.mark.parametrize(
    ("build", "style", "image_format", "io"),
    [("own", "drive", "raw", "auto"), ("newer", "rw", "qcow2", "daemon")],
    indirect=["build", "io"],
)
def test_second_qemu_is_refused(
    paxos_mounts: PairMaker, fleet: Fleet, build: Build, style: Style, image_format: str, io: str
) -> None:
    """A second QEMU is refused with EBUSY and by the holder's name, and starts once the first ended."""

    def mounts(options: str) -> Pair:
        return paxos_mounts(options, io)

    test_exclusion.test_second_qemu_is_refused(mounts, fleet, build, style, image_format)


@pytest.mark.parametrize(("build", "io"), [("own", "auto")], indirect=True)
def test_a_killed_qemu_hands_over(paxos_mounts: PairMaker, fleet: Fleet, build: Build, io: str) -> None:
    """A QEMU that is killed lets its image go at once: its host lives, and gives the lease back."""
    pair = paxos_mounts("wait=20", io)
    guest.make_image(pair.a / "i.img", "qcow2")
    first = fleet.start(build, disk("auto", "qcow2", pair.a / "i.img"), "first")
    written = first.wait_written(5)
    first.kill()
    second = fleet.start(build, disk("auto", "qcow2", pair.b / "i.img"), "second")
    # It begins anew at 1, and must have written over all that the first one may have left.
    second.wait_written(written + 20)
    acknowledged = second.halt()
    assert second.quit() == 0
    guest.check(guest.read_record(pair.b / "i.img", "qcow2"), acknowledged)


@pytest.mark.parametrize(
    ("build", "style", "image_format", "io"),
    [("own", "drive", "raw", "auto"), ("newer", "rw", "qcow2", "daemon")],
    indirect=["build", "io"],
)
def test_there_and_back(stage: StageMaker, style: Style, image_format: str, io: str) -> None:
    """A guest moves to the other host and back while it writes."""
    test_migration.test_there_and_back(stage, style, image_format, io)


@pytest.mark.parametrize(("build", "style", "io"), [("newer", "rw", "auto")], indirect=["build", "io"])
def test_destination_waits_for_cont(stage: StageMaker, style: Style) -> None:
    """A destination started with -S runs at `cont`, although nobody had the image open before that."""
    test_migration.test_destination_waits_for_cont(stage, style, "qcow2")


@pytest.mark.parametrize(("build", "io"), [("own", "daemon")], indirect=True)
def test_late_activation(stage: StageMaker) -> None:
    """With -S and late-block-activate the destination opens its image for writing at `cont` only."""
    test_migration.test_late_activation(stage)


@pytest.mark.parametrize(("build", "style", "io"), [("own", "rw", "daemon")], indirect=["build", "io"])
def test_destination_killed_at_switchover(stage: StageMaker, style: Style) -> None:
    """When the destination is dead at the switch-over, the source takes its image back and runs on."""
    test_migration.test_destination_killed_at_switchover(stage, style)


@pytest.mark.parametrize(("build", "style", "io"), [("newer", "drive", "auto")], indirect=["build", "io"])
def test_destination_rejects_the_state(stage: StageMaker, style: Style) -> None:
    """When the destination refuses the device state, the source takes its image back, and can migrate."""
    test_migration.test_destination_rejects_the_state(stage, style)


@pytest.mark.parametrize(("build", "style", "io"), [("own", "rw", "auto")], indirect=["build", "io"])
def test_source_cannot_come_back(stage: StageMaker, style: Style) -> None:
    """While the destination's guest writes, `cont` on the source never lets the source write."""
    test_migration.test_source_cannot_come_back(stage, style)
