"""Live migration, between two mounts, of a guest that writes all the time.

Every test ends with the same demand: the image shows an unbroken sequence of the guest's writes, whatever
host each was made on.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import guest
from tests.support.migration import Migration, reset_capabilities
from tests.support.qemu import STYLES, Build, Fleet, Qemu, QmpError, Style, disk, eventually

BOTH_FORMATS = pytest.mark.parametrize("image_format", ["raw", "qcow2"])
EVERY_STYLE = pytest.mark.parametrize("style", STYLES)
BALLOON = ["-device", "virtio-balloon-pci"]


class Stage:
    """One image, a running source on host A, and destinations for it."""

    def __init__(
        self, fleet: Fleet, build: Build, image: tuple[Path, Path], style: Style, image_format: str
    ) -> None:
        self.fleet, self.build = fleet, build
        self.on_a, self.on_b = image
        self.style, self.image_format = style, image_format
        self.direct = False
        guest.make_image(self.on_a, image_format)

    def source(self, *extra: str) -> Qemu:
        machine = self.fleet.start(self.build, [*self._disk(self.on_a), *extra], "src")
        machine.wait_written(20)
        return machine

    def destination(self, *extra: str, path: Path | None = None) -> Qemu:
        args = [*self._disk(path or self.on_b), "-incoming", "defer", *extra]
        return self.fleet.start(self.build, args, "dst")

    def _disk(self, path: Path) -> list[str]:
        return disk(self.style, self.image_format, path, direct=self.direct)

    def migration(self, source: Qemu, destination: Qemu, *capabilities: str, slow: bool = False) -> Migration:
        return Migration(source, destination, self.fleet.path("mig"), *capabilities, slow=slow)

    def finish(self, last: Qemu) -> None:
        """Let the guest write on, end its QEMU, and check every write it ever made."""
        last.wait_written(30)
        acknowledged = last.halt()
        assert last.quit() == 0, last.output
        for machine in self.fleet.machines:
            machine.kill()
        if self.image_format == "qcow2":
            self.build.img("check", "-f", "qcow2", self.on_a)
        guest.check(guest.read_record(self.on_a, self.image_format), acknowledged)
        guest.check(guest.read_record(self.on_b, self.image_format), acknowledged)


StageMaker = Callable[..., Stage]


@pytest.fixture
def stage(two_mounts, fleet: Fleet, build: Build) -> StageMaker:
    """stage(style, format, options) makes the mounts and an image on them."""

    def make(style: Style, image_format: str = "qcow2", options: str = "") -> Stage:
        pair = two_mounts(options)
        return Stage(fleet, build, (pair.a / "i.img", pair.b / "i.img"), style, image_format)

    return make


@EVERY_STYLE
@BOTH_FORMATS
@pytest.mark.parametrize("io", ["auto", "guarded", "daemon"])
def test_there_and_back(stage: StageMaker, style: Style, image_format: str, io: str) -> None:
    """A guest moves to the other host and back while it writes."""
    on = stage(style, image_format, f"io={io}")
    first = on.source()
    second = on.destination()
    on.migration(first, second).run()
    second.wait_status("running")
    first.quit()
    second.wait_written(20)
    third = on.destination(path=on.on_a)
    on.migration(second, third).run()
    third.wait_status("running")
    third.wait_written(20)
    second.quit()
    on.finish(third)


@EVERY_STYLE
@pytest.mark.parametrize("io", ["auto", "daemon"])
def test_without_page_cache(stage: StageMaker, style: Style, io: str) -> None:
    """With cache=none the destination reads what the source wrote last."""
    on = stage(style, "qcow2", f"io={io}")
    on.direct = True
    source, destination = on.source(), on.destination()
    on.migration(source, destination).run()
    destination.wait_status("running")
    source.quit()
    on.finish(destination)


def test_late_activation(stage: StageMaker) -> None:
    """With -S and late-block-activate the destination opens its image for writing at `cont` only."""
    on = stage("auto")
    source, destination = on.source(), on.destination("-S")
    on.migration(source, destination, "late-block-activate").run()
    destination.wait_status("paused")
    source.quit()
    destination.command("cont")
    destination.wait_status("running")
    on.finish(destination)


@EVERY_STYLE
@BOTH_FORMATS
def test_destination_waits_for_cont(stage: StageMaker, style: Style, image_format: str) -> None:
    """A destination started with -S runs at `cont`, although nobody had the image open before that."""
    on = stage(style, image_format)
    source, destination = on.source(), on.destination("-S")
    on.migration(source, destination).run()
    destination.wait_status("paused")
    destination.command("cont")
    destination.wait_status("running")
    destination.wait_written(10)
    source.quit()
    on.finish(destination)


@EVERY_STYLE
def test_postcopy(stage: StageMaker, style: Style) -> None:
    """A guest that runs on the destination before its memory has arrived writes there, and only there."""
    on = stage(style)
    source, destination = on.source(), on.destination()
    move = on.migration(source, destination, "postcopy-ram", slow=True)
    move.start()
    move.wait("active")
    source.command("migrate-start-postcopy")
    move.wait("postcopy-active", "completed")
    move.hurry()
    move.wait("completed")
    destination.wait_status("running")
    source.quit()
    on.finish(destination)


@EVERY_STYLE
def test_cancelled_while_copying(stage: StageMaker, style: Style) -> None:
    """A migration cancelled while memory is copied leaves the guest writing on the source."""
    on = stage(style)
    source, destination = on.source(), on.destination()
    move = on.migration(source, destination, slow=True)
    move.start()
    move.wait("active")
    source.wait_written(10)
    source.command("migrate_cancel")
    move.wait("cancelled")
    destination.kill()
    on.finish(source)


@EVERY_STYLE
def test_cancelled_before_switchover(stage: StageMaker, style: Style) -> None:
    """A migration cancelled when the guest already stood still lets it run on."""
    on = stage(style)
    source, destination = on.source(), on.destination()
    move = on.migration(source, destination, "pause-before-switchover")
    move.start()
    move.wait("pre-switchover")
    source.command("migrate_cancel")
    move.wait("cancelled")
    source.wait_status("running")
    destination.kill()
    on.finish(source)


@EVERY_STYLE
def test_switchover_after_pause(stage: StageMaker, style: Style) -> None:
    """With pause-before-switchover the guest goes on at the destination after migrate-continue."""
    on = stage(style)
    source, destination = on.source(), on.destination()
    move = on.migration(source, destination, "pause-before-switchover")
    move.start()
    move.wait("pre-switchover")
    source.command("migrate-continue", state="pre-switchover")
    move.wait("completed")
    destination.wait_status("running")
    destination.wait_written(10)
    source.quit()
    on.finish(destination)


@EVERY_STYLE
def test_destination_killed_while_copying(stage: StageMaker, style: Style) -> None:
    """When the destination dies while memory is copied, the source runs on, and can migrate again."""
    on = stage(style)
    source, destination = on.source(), on.destination()
    move = on.migration(source, destination, slow=True)
    move.start()
    move.wait("active")
    destination.kill()
    move.wait("failed")
    source.wait_status("running")
    source.wait_written(20)
    second = on.destination()
    on.migration(source, second).run()
    second.wait_status("running")
    source.quit()
    on.finish(second)


@EVERY_STYLE
def test_destination_killed_at_switchover(stage: StageMaker, style: Style) -> None:
    """When the destination is dead at the switch-over, the source takes its image back and runs on."""
    on = stage(style)
    source, destination = on.source(), on.destination()
    move = on.migration(source, destination, "pause-before-switchover")
    move.start()
    move.wait("pre-switchover")
    destination.kill()
    source.command("migrate-continue", state="pre-switchover")
    move.wait("failed")
    source.wait_status("running")
    on.finish(source)


@EVERY_STYLE
def test_destination_rejects_the_state(stage: StageMaker, style: Style) -> None:
    """When the destination refuses the device state (return-path on), the source takes its image back."""
    on = stage(style)
    source, destination = on.source(*BALLOON), on.destination()
    move = on.migration(source, destination, "return-path")
    move.start()
    move.wait("failed")
    source.wait_status("running")
    source.wait_written(20)
    destination.process.wait(20)
    reset_capabilities(source, "return-path")
    second = on.destination(*BALLOON)
    on.migration(source, second).run()
    second.wait_status("running")
    second.wait_written(10)
    source.quit()
    on.finish(second)


@EVERY_STYLE
def test_destination_quits_after_success(stage: StageMaker, style: Style) -> None:
    """When the destination ends before its guest ran, the source is told `cont` and runs on."""
    on = stage(style)
    source, destination = on.source(), on.destination("-S")
    on.migration(source, destination).run()
    destination.wait_status("paused")
    destination.quit()
    source.command("cont")
    source.wait_status("running")
    on.finish(source)


@pytest.mark.usefixtures("needs_lockfs")
@EVERY_STYLE
def test_source_cannot_come_back(stage: StageMaker, style: Style) -> None:
    """While the destination's guest writes, `cont` on the source never lets the source write."""
    on = stage(style, options="wait=0.5,handover_wait=1")
    source, destination = on.source(), on.destination()
    on.migration(source, destination).run()
    destination.wait_status("running")
    destination.wait_written(10)
    if style == "rw":
        source.command("cont")
        eventually(lambda: source.status() == "io-error", "the source's guest is paused at its first write")
    else:
        with pytest.raises(QmpError, match="busy"):
            source.command("cont")
    on.finish(destination)
