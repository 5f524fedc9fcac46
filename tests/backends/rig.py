"""Marks for tests that need programs which may be missing."""

from __future__ import annotations

import pytest

from . import bare_qemu, virtlockd_client

needs_virtlockd = pytest.mark.skipif(
    virtlockd_client.missing() is not None, reason=str(virtlockd_client.missing())
)
needs_qemu = pytest.mark.skipif(bare_qemu.missing() is not None, reason=str(bare_qemu.missing()))
