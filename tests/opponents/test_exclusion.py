"""Two hosts, one image: the second writer is refused by the holder's name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import guest
from tests.support.qemu import STYLES, Build, Fleet, Style, disk


@pytest.mark.usefixtures("needs_lockfs")
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_second_qemu_is_refused(
    two_mounts, fleet: Fleet, build: Build, style: Style, image_format: str
) -> None:
    """A second QEMU is refused with EBUSY, the log names the holder, and it starts once the first ended."""
    pair = two_mounts("wait=0.5")
    a, b = pair.a, pair.b
    guest.make_image(a / "i.img", image_format)
    first = fleet.start(build, disk(style, image_format, a / "i.img"), "first")
    first.wait_written(5)
    text = fleet.refused(build, disk(style, image_format, b / "i.img"))
    assert "Device or resource busy" in text
    pair.log(b, "hostA", str(first.pid))
    (held,) = _who(b / "i.img")
    assert (held["host"], held["openers"][0]["pid"]) == ("hostA", first.pid)
    acknowledged = first.wait_written(5)
    assert first.quit() == 0
    second = fleet.start(build, disk(style, image_format, b / "i.img"), "second")
    assert second.wait_written(5) < acknowledged, "the guest starts anew"


def _who(image: Path) -> list[dict[str, Any]]:
    """What lockfsctl says of an image."""
    done = subprocess.run(
        [sys.executable, "-m", "lockfs.cli.ctl", "who", "--json", str(image)],
        capture_output=True, text=True, timeout=20, check=True,
    )  # fmt: skip
    images: list[dict[str, Any]] = json.loads(done.stdout)["images"]
    return images
