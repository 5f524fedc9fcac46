"""The commands `lockfsctl fence` and `lockfsctl break`: an image taken from whoever has it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lockfs.cli.asking import TIMEOUT_S, Found, Mount, located
from lockfs.cli.table import printable
from lockfs.errors import EXIT_OK, EXIT_SYSTEM, LockfsError
from lockfs.mount import control
from lockfs.mount.control import Message

BREAK_ROUNDS_MAX = 100
"""How often a mount is asked whether the holder counts as dead; each time it waits for a few seconds."""
_RISK = """\
This takes the lease of {image} although its holder is not known to be dead:
  {holder}
If that host still runs, both will write to the image, and what is in it will be destroyed beyond repair. Make
sure that the host is off, or cut off from the storage, before you go on."""


def add_commands(commands: argparse._SubParsersAction[Any]) -> None:
    """Add `fence` and `break` to the commands of lockfsctl."""
    fence = commands.add_parser(
        "fence",
        help="make what is open of an image here stop working",
        description="Makes every read and write through what is open of an image on this host fail, ends "
        "processes that map it into memory, and gives its lease back, so that it can be opened anew.",
        allow_abbrev=False,
    )
    fence.add_argument("place", metavar="IMAGE|MOUNTPOINT", help="an image, or all that a mount has open")
    taking = commands.add_parser(
        "break",
        help="free an image whose host is dead",
        description="Frees the lease of an image whose host is dead, having proved from the storage that it "
        "is, and says what was checked. Waits for a host that is silent until it counts as dead.",
        allow_abbrev=False,
    )
    taking.add_argument("place", metavar="IMAGE", help="the image, by its path on the mount")
    taking.add_argument(
        "--force",
        action="store_true",
        help="take it from a host that is not proved dead; asks on the terminal",
    )


def _fence(arguments: argparse.Namespace, folder: Path | None) -> int:
    found = Found()
    image = located(arguments.place, folder, found)
    if image is not None:
        answer = _ask(image, {"op": "fence"}, found)
        if answer is not None:
            opens, done = answer.get("opens"), answer.get("done")
            if done and not opens:
                print(f"Nobody here has {printable(arguments.place)} open for writing.")
            elif done:
                print(f"{printable(arguments.place)} is fenced: {opens} opens are dead.")
            else:
                problem = "is being fenced, but not all is done yet; the mount's log tells what it waits for"
                found.complaints.append(f"{arguments.place} {problem}.")
    return _end(found)


def _ask(image: tuple[Mount, str | None], question: Message, found: Found) -> Message | None:
    mount, path = image
    try:
        return control.request(mount.socket, {**question, "path": path}, TIMEOUT_S)
    except LockfsError as error:
        found.complaints.append(f"{mount.mountpoint}: {error}")
        return None


def _break(arguments: argparse.Namespace, folder: Path | None) -> int:
    found = Found()
    image = located(arguments.place, folder, found)
    if image is None or image[1] is None:
        found.complaints += [] if image is None else [f"{arguments.place} is no image."]
        return _end(found)
    said: list[str] = []
    answer: Message = {}
    for _ in range(BREAK_ROUNDS_MAX):
        asked = _ask(image, {"op": "break", "force": False}, found)
        if asked is None:
            return _end(found)
        answer = asked
        for sentence in answer.get("checked") or []:
            if sentence not in said:
                said.append(sentence)
                print(printable(sentence), flush=True)
        if answer.get("freed"):
            print(f"{printable(arguments.place)} is free.")
            return EXIT_OK
        if answer.get("waits") is None or arguments.force:
            break
    if arguments.force and answer.get("forcible"):
        return _force(arguments.place, image, said[-1] if said else "", found)
    found.complaints.append(f"{arguments.place} was not freed.")
    return _end(found)


def _force(place: str, image: tuple[Mount, str | None], holder: str, found: Found) -> int:
    """State the risk, ask, and take the lease."""
    print(_RISK.format(image=printable(place), holder=printable(holder)), flush=True)
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        found.complaints.append("--force asks on a terminal, and there is none: nothing was changed.")
        return _end(found)
    if input("Take it? Type yes: ").strip().lower() != "yes":
        found.complaints.append("Nothing was changed.")
        return _end(found)
    answer = _ask(image, {"op": "break", "force": True}, found)
    if answer is not None and answer.get("freed"):
        print(f"{printable(place)} is free.")
    elif answer is not None:
        found.complaints.append(f"{place} was not freed: {' '.join(answer.get('checked') or [])}")
    return _end(found)


def _end(found: Found) -> int:
    for complaint in found.complaints:
        print(f"lockfsctl: {printable(complaint)}", file=sys.stderr)
    return EXIT_SYSTEM if found.complaints else EXIT_OK


COMMANDS: dict[str, Callable[[argparse.Namespace, Path | None], int]] = {"fence": _fence, "break": _break}
"""What lockfsctl calls with its arguments and the folder of the sockets, for an exit code."""
