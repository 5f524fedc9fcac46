"""The command `lockfsctl upgrade`: a mount goes on in the program as installed now, or with other options."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lockfs.cli import options as command_line
from lockfs.cli import saved
from lockfs.cli.asking import TIMEOUT_S, Found, Mount, located
from lockfs.cli.table import printable
from lockfs.errors import EXIT_OK, EXIT_SYSTEM, EXIT_USAGE, LockfsError, UsageError
from lockfs.mount import control
from lockfs.mount.control import ControlError, Message

UPGRADE_S = 30.0
"""How long a mount may take until its next worker serves, seconds."""
POLL_S = 0.05
CHANGEABLE = ("policy", "log")
"""The options, by their names in MountOptions, that what is open does not depend on."""


def add_commands(commands: argparse._SubParsersAction[Any]) -> None:
    """Add `upgrade` to the commands of lockfsctl."""
    upgrade = commands.add_parser(
        "upgrade",
        help="go on in the program as it is installed now",
        description="Has a mount go on in the program as it is installed now, without unmounting: what is "
        "open stays open, and requests wait for a moment.",
        allow_abbrev=False,
    )
    upgrade.add_argument("place", metavar="MOUNTPOINT")
    upgrade.add_argument(
        "-o",
        dest="options",
        metavar="OPTIONS",
        help="change these: wait=, readers=, on_lost=, guests=, log= and the like",
    )


def changes(words: str) -> dict[str, Any]:
    """What the words after -o change, as plain values by the names of MountOptions and Policy.

    Raises:
        UsageError: an option that is not known, or that a running mount cannot change.
    """
    plain = [saved.plain(_parsed(given)) for given in ("", words)]
    changed = {name: value for name, value in plain[1].items() if value != plain[0].get(name)}
    fixed = sorted(set(changed) - set(CHANGEABLE))
    if fixed:
        raise UsageError(f"A running mount keeps its {', '.join(fixed)}: unmount it to change that.")
    if "policy" in changed:
        before = plain[0]["policy"]
        changed["policy"] = {name: v for name, v in changed["policy"].items() if v != before.get(name)}
    return changed


def _parsed(words: str) -> object:
    arguments = ["-o", words, "/", "/"] if words else ["/", "/"]
    return command_line.parse(arguments).options


def _upgrade(arguments: argparse.Namespace, folder: Path | None) -> int:
    found = Found()
    try:
        changed = changes(arguments.options) if arguments.options else {}
        at = located(arguments.place, folder, found)
        if at is not None and at[1] is not None:
            found.complaints.append(f"{arguments.place} is no mount point: name that of the mount.")
        elif at is not None:
            answer = control.request(at[0].socket, {"op": "upgrade", "changed": changed}, TIMEOUT_S)
            print(_await_next(at[0], int(answer.get("workers") or 0)))
    except UsageError as error:
        print(f"lockfsctl: {printable(str(error))}", file=sys.stderr)
        return EXIT_USAGE
    except LockfsError as error:
        found.complaints.append(str(error))
    for complaint in found.complaints:
        print(f"lockfsctl: {printable(complaint)}", file=sys.stderr)
    return EXIT_SYSTEM if found.complaints else EXIT_OK


def _await_next(mount: Mount, workers: int) -> str:
    """Wait until a later worker than that answers; a sentence about it.

    Raises:
        ControlError: none does in time.
    """
    end = time.monotonic() + UPGRADE_S
    while time.monotonic() < end:
        status = _status_of(mount)
        family = status.get("family")
        if isinstance(family, dict) and int(family.get("workers") or 0) > workers:
            version, pid = printable(status.get("version")), printable(family.get("worker"))
            return f"{printable(mount.mountpoint)} is served by lockfs {version} (process {pid})."
        time.sleep(POLL_S)
    raise ControlError(f"{mount.mountpoint} was not taken over within {UPGRADE_S:g} s: see its log.")


def _status_of(mount: Mount) -> Message:
    """What the mount says of itself now; nothing if nobody answers for it."""
    for socket in control.find_sockets(mount.socket.parent):
        try:
            status = control.request(socket, {"op": "status"}, TIMEOUT_S)
        except ControlError:
            continue
        if status.get("mountpoint") == mount.mountpoint:
            return status
    return {}


COMMANDS: dict[str, Callable[[argparse.Namespace, Path | None], int]] = {"upgrade": _upgrade}
