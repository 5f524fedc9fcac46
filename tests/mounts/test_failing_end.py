"""How the server ends after a failure: leases of images that the kernel still writes are not given back."""

from __future__ import annotations

import os
import types
from typing import Any, cast

import pytest

from lockfs.channel.handles import Handle, HandleTable
from lockfs.mirror.modes import GUARDED, PASSED, SERVED
from lockfs.mount.serve import _Service
from tests.conftest import ExpectLog


class Ended:
    """Stands for mirror, backend and watchdog; remembers what of them was ended."""

    def __init__(self) -> None:
        self.what: list[str] = []

    async def release_all(self) -> None:
        self.what.append("leases")

    async def stop(self) -> None:
        self.what.append("backend")

    def disarm(self) -> None:
        self.what.append("watchdog")


class Noted:
    """Stands for the journal."""

    def remove(self, key: str) -> None:
        """Nothing is kept here."""


@pytest.mark.parametrize(
    ("orderly", "flags", "mode", "dead", "gives_back"),
    [
        (True, os.O_RDWR, PASSED, False, True),
        (False, os.O_RDWR, PASSED, False, False),
        (False, os.O_RDWR, PASSED, True, True),
        (False, os.O_RDONLY, PASSED, False, True),
        (False, os.O_RDWR, GUARDED, False, True),
        (False, os.O_RDWR, SERVED, False, True),
    ],
)
async def test_what_is_given_back(
    expect_log: ExpectLog, orderly: bool, flags: int, mode: int, dead: bool, gives_back: bool
) -> None:
    """Everything, and the watchdog is disarmed, unless a failure left a live writer in passthrough."""
    expect_log("CRITICAL.*their leases are kept", 0 if gives_back else 1)
    ended, handles = Ended(), HandleTable()
    handles.add(Handle(1, -1, flags, mode, 0, None, dead=dead))
    parts: Any = types.SimpleNamespace(
        _handles=handles, _orderly=orderly, _mirror=ended, _backend=ended, _watchdog=ended, _facts=Noted()
    )
    await _Service._stop(cast(_Service, parts))
    assert ended.what == (["leases", "backend", "watchdog"] if gives_back else [])
