"""Options are kept over an upgrade, also by another version."""

from __future__ import annotations

import pytest

from lockfs.cli import saved
from lockfs.mirror.modes import IoMode
from lockfs.mount.options import MountOptions


def test_options_are_kept() -> None:
    """Options come out as they went in; what another version has or lacks does not matter."""
    options = MountOptions("/s", "/m", "fs", "h", io=IoMode.GUARDED, kernel_options=("a", "b"), log="/l")
    values = saved.plain(options)
    assert saved.restored(MountOptions, values) == options
    del values["io"]
    values["policy"]["unheard_of"] = 1
    assert saved.restored(MountOptions, values).io is IoMode.AUTO
    del values["source"]
    with pytest.raises(ValueError, match="source"):
        saved.restored(MountOptions, values)
