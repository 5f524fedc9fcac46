"""The command lockfsctl: which mounts run here, who holds which image; lease areas made and looked at."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from lockfs import __version__
from lockfs.cli import areas, fencing, lockspace, upgrading
from lockfs.cli.asking import TIMEOUT_S, Found, Mount, locate, running_mounts
from lockfs.cli.table import local_time, printable, render
from lockfs.errors import EXIT_OK, EXIT_SYSTEM, EXIT_USAGE, LockfsError
from lockfs.mount import control
from lockfs.mount.control import ControlError, Message

_STATUS_HEADINGS = (
    "MOUNTPOINT",
    "SOURCE",
    "BACKEND",
    "IO",
    "IMAGES",
    "OPEN",
    "HOST",
    "PID",
    "SINCE",
    "VERSION",
)
_WHO_HEADINGS = ("IMAGE", "MODE", "HOST", "PID", "PROGRAM", "SINCE", "STATE")


class _Arguments(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"lockfsctl: {message} (lockfsctl --help shows how).", file=sys.stderr)
        raise SystemExit(EXIT_USAGE)


def _parser() -> argparse.ArgumentParser:
    parser = _Arguments(
        prog="lockfsctl",
        description="Shows the lockfs mounts of this host, and prepares and shows lease areas.",
        allow_abbrev=False,
    )
    parser.add_argument("-V", "--version", action="version", version=f"lockfsctl {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    status = commands.add_parser(
        "status", help="which mounts run", description="Lists the mounts that run.", allow_abbrev=False
    )
    status.add_argument("places", metavar="MOUNTPOINT", nargs="*", help="only these (default: all)")
    who = commands.add_parser(
        "who",
        help="who holds which image",
        description="Lists images that are held, and who holds them.",
        allow_abbrev=False,
    )
    who.add_argument(
        "places",
        metavar="IMAGE|MOUNTPOINT",
        nargs="*",
        help="an image: this host and others; default: all here",
    )
    for command in (status, who):
        command.add_argument("--json", action="store_true", help="print JSON, for programs")
    lockspace.add_commands(commands)
    fencing.add_commands(commands)
    upgrading.add_commands(commands)
    areas.add_commands(commands)
    return parser


def status(places: Sequence[str], mounts: Sequence[Mount], found: Found) -> None:
    """Gather the mounts at `places`, all if none is given."""
    wanted = [os.path.realpath(place) for place in places]
    for path in wanted:
        if not any(path == mount.mountpoint for mount in mounts):
            found.complaints.append(f"No lockfs mount runs at {path}.")
    found.rows += [mount.status for mount in mounts if not wanted or mount.mountpoint in wanted]


def who(places: Sequence[str], mounts: Sequence[Mount], found: Found) -> None:
    """Gather what is held at `places`: images, or whole mounts, all if none is given."""
    questions: list[tuple[Mount, str | None]] = []
    for place in places:
        path = os.path.realpath(place)
        located = locate(path, mounts)
        if located is None:
            found.complaints.append(f"{path} is on no lockfs mount that runs here.")
        else:
            questions.append(located)
    for mount, relative in questions if places else [(mount, None) for mount in mounts]:
        question: Message = {"op": "who"} if relative is None else {"op": "who", "path": relative}
        try:
            answer = control.request(mount.socket, question, TIMEOUT_S)
        except ControlError as error:
            found.complaints.append(f"{mount.mountpoint}: {error}")
            continue
        images = answer.get("images")
        found.rows += [
            {
                **image,
                "mountpoint": mount.mountpoint,
                "file": os.path.join(mount.mountpoint, str(image.get("path"))),
            }
            for image in (images if isinstance(images, list) else [])
            if isinstance(image, dict)
        ]


def _status_rows(mounts: Sequence[Message]) -> list[list[str]]:
    names = ("mountpoint", "source", "backend", "io", "images", "handles", "host", "pid")
    rows = []
    for mount in mounts:
        cells = [printable(mount.get(name)) for name in names]
        if mount.get("io") == "auto":
            cells[3] = "auto (passthrough)" if mount.get("passthrough") else "auto (daemon)"
        rows.append([*cells, local_time(mount.get("since")), printable(mount.get("version"))])
    return rows


def _who_rows(images: Sequence[Message]) -> list[list[str]]:
    rows = []
    for image in images:
        openers: list[Any] = image.get("openers") or [{}]
        for at, opener in enumerate(openers):
            first = at == 0
            rows.append(
                [
                    printable(image.get("file")) if first else "",
                    printable(image.get("mode")) if first else "",
                    printable(image.get("host")) if first else "",
                    printable(opener.get("pid")),
                    printable(opener.get("program")),
                    local_time(image.get("since")) if first else "",
                    _state(image, opener),
                ]
            )
    return rows


def _state(image: Message, opener: Message) -> str:
    state, kind = printable(image.get("state")), printable(opener.get("kind"))
    return state if kind in ("-", state) else f"{state}, {kind}"


def _print(command: str, found: Found, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"mounts" if command == "status" else "images": found.rows}, indent=2))
    elif found.rows and command == "status":
        print(render(_STATUS_HEADINGS, _status_rows(found.rows)))
    elif found.rows:
        print(render(_WHO_HEADINGS, _who_rows(found.rows)))


def run(argv: Sequence[str], folder: Path | None = None) -> int:
    """Run the command; returns its exit code: 0, 1 wrong usage, 2 nothing there.

    `folder` has the sockets of the mounts, for those commands that ask them.
    """
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else EXIT_USAGE
    if arguments.command in areas.COMMANDS:
        return areas.COMMANDS[arguments.command](arguments)
    for commands in (lockspace.COMMANDS, fencing.COMMANDS, upgrading.COMMANDS):
        if arguments.command in commands:
            return commands[arguments.command](arguments, folder)
    found = Found()
    try:
        mounts = running_mounts(found.complaints, folder)
    except LockfsError as error:
        mounts = []
        found.complaints.append(str(error))
    if mounts:
        (status if arguments.command == "status" else who)(arguments.places, mounts, found)
    elif not found.complaints:
        found.complaints.append("No lockfs mount runs here.")
    _print(arguments.command, found, as_json=arguments.json)
    if arguments.command == "who" and not found.rows and not found.complaints and not arguments.json:
        print("Nobody holds any of these images." if arguments.places else "No image is held.")
    for complaint in found.complaints:
        print(f"lockfsctl: {printable(complaint)}", file=sys.stderr)
    return EXIT_SYSTEM if found.complaints else EXIT_OK


def entry() -> None:
    """The command `lockfsctl`."""
    try:
        code = run(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = EXIT_SYSTEM
    except KeyboardInterrupt:
        code = EXIT_SYSTEM
    sys.exit(code)


if __name__ == "__main__":
    entry()
