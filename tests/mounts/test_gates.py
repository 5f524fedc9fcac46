"""Where every write passes a gate, unless the user asks for another way."""

from __future__ import annotations

import pytest

from lockfs.cli import options as command_line
from lockfs.linux import calls
from lockfs.mount import serve


@pytest.mark.parametrize(
    ("backend", "on_nfs", "needed"),
    [
        ("paxos", False, True),
        ("paxos", True, True),
        ("fcntl", False, False),
        ("fcntl", True, True),
        ("nop", True, False),
    ],
)
def test_where_a_lease_may_be_lost(
    monkeypatch: pytest.MonkeyPatch, backend: str, on_nfs: bool, needed: bool
) -> None:
    """With leases that must be renewed, and with locks that a server may give to another host."""
    monkeypatch.setattr(calls, "on_nfs", lambda descriptor: on_nfs)
    options = command_line.parse(["-o", f"backend={backend}", "/store", "/mount"]).options
    assert options is not None
    assert serve._needs_gates(options, -1) is needed
