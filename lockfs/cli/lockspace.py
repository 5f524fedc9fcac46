"""The commands of lockfsctl on a mount's lockspace: who is in it, and which of its leases nobody needs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lockfs.cli.asking import TIMEOUT_S, Found, Mount, located
from lockfs.cli.table import printable, render
from lockfs.errors import EXIT_OK, EXIT_SYSTEM, LockfsError
from lockfs.mount import control
from lockfs.mount.control import Message

ROUNDS_MAX = 10_000
"""How often a mount is asked to go on removing leases; each time it removes what it can in a few seconds."""
_HEADINGS = ("ID", "HOST", "STATE", "LAST SEEN", "GENERATION", "IO TIMEOUT", "LEASES")
_OLD_S = 3600


def add_commands(commands: argparse._SubParsersAction[Any]) -> None:
    """Add `hosts` and `gc` to the commands of lockfsctl."""
    hosts = commands.add_parser(
        "hosts",
        help="which hosts are in a mount's lockspace",
        description="Lists the hosts of the lockspace that a mount takes its leases in (backend=paxos).",
        allow_abbrev=False,
    )
    hosts.add_argument("--json", action="store_true", help="print JSON, for programs")
    collect = commands.add_parser(
        "gc",
        help="remove leases of images that are gone",
        description="Removes leases of images that are no longer in the store; never one that is held.",
        allow_abbrev=False,
    )
    for command in (hosts, collect):
        command.add_argument("place", metavar="MOUNTPOINT", help="the mount to ask")


def _mount_at(place: str, folder: Path | None, found: Found) -> Mount | None:
    at = located(place, folder, found)
    return at[0] if at is not None else None


def _hosts(arguments: argparse.Namespace, folder: Path | None) -> int:
    found = Found()
    mount = _mount_at(arguments.place, folder, found)
    if mount is not None:
        try:
            found.rows += control.request(mount.socket, {"op": "hosts"}, TIMEOUT_S).get("hosts") or []
        except LockfsError as error:
            found.complaints.append(f"{mount.mountpoint}: {error}")
    if arguments.json:
        print(json.dumps({"hosts": found.rows}, indent=2))
    elif found.rows:
        print(render(_HEADINGS, [_row(host) for host in found.rows]))
    elif mount is not None and not found.complaints:
        backend = printable(mount.status.get("backend"))
        print(f"{mount.mountpoint} has backend={backend}, which knows of no hosts.")
    return _end(found)


def _row(host: Message) -> list[str]:
    name = printable(host.get("name"))
    leases = host.get("leases")
    return [
        printable(host.get("host_id")),
        f"{name} (this mount)" if host.get("own") else name,
        printable(host.get("state")),
        _ago(host.get("silent_s")),
        printable(host.get("generation")),
        f"{printable(host.get('io_timeout'))} s",
        "-" if leases is None else printable(leases),
    ]


def _ago(seconds: object) -> str:
    """How long ago, to the second below an hour."""
    if not isinstance(seconds, int | float):
        return "-"
    if seconds < _OLD_S:
        return f"{max(0, round(seconds))} s ago"
    return f"{seconds / _OLD_S:.1f} h ago"


def _collect(arguments: argparse.Namespace, folder: Path | None) -> int:
    found = Found()
    mount = _mount_at(arguments.place, folder, found)
    if mount is not None:
        removed = _removed(mount, found)
        print(f"{removed} lease{'' if removed == 1 else 's'} removed.")
    return _end(found)


def _removed(mount: Mount, found: Found) -> int:
    """Have the mount remove leases until it is done; how many there were."""
    removed = 0
    for _ in range(ROUNDS_MAX):
        try:
            answer = control.request(mount.socket, {"op": "gc"}, TIMEOUT_S)
        except LockfsError as error:
            found.complaints.append(f"{mount.mountpoint}: {error}")
            break
        removed += len(answer.get("removed") or [])
        if answer.get("done", True):
            break
    return removed


def _end(found: Found) -> int:
    for complaint in found.complaints:
        print(f"lockfsctl: {printable(complaint)}", file=sys.stderr)
    return EXIT_SYSTEM if found.complaints else EXIT_OK


COMMANDS: dict[str, Callable[[argparse.Namespace, Path | None], int]] = {"hosts": _hosts, "gc": _collect}
"""What lockfsctl calls with its arguments and the folder of the sockets, for an exit code."""
