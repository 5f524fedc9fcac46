"""The fcntl backend against a real virtlockd and a real QEMU without lockfs, both ways round."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import opponents
from .opponents import Check, Field
from .rig import needs_qemu, needs_virtlockd


def _name(check: Check) -> str:
    return check.__name__


@needs_virtlockd
@needs_qemu
@pytest.mark.parametrize("check", opponents.WITH_VIRTLOCKD, ids=_name)
async def test_virtlockd(check: Check, field: Field, virtlockd: Path) -> None:
    """lockfs and virtlockd in its direct mode exclude each other."""
    field.socket = virtlockd
    await check(field)


@needs_virtlockd
@needs_qemu
@pytest.mark.parametrize("check", [*opponents.WITH_INDIRECT_VIRTLOCKD, *opponents.WITH_VIRTLOCKD], ids=_name)
async def test_indirect_virtlockd(check: Check, indirect_field: Field, virtlockd: Path) -> None:
    """lockfs with a lock directory and virtlockd in either mode exclude each other."""
    indirect_field.socket = virtlockd
    await check(indirect_field)


@needs_qemu
@pytest.mark.parametrize("check", opponents.WITH_QEMU, ids=_name)
async def test_qemu(check: Check, field: Field) -> None:
    """lockfs and a QEMU without lockfs exclude each other, as QEMUs do among themselves."""
    await check(field)
