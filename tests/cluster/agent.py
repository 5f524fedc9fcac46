"""Runs in a guest and does what the test asks: one JSON object a line in, one out, over a virtio-serial port.

    {"op": "run", "argv": […], "timeout": seconds}    {"code": …, "text": output}
    {"op": "start", "argv": […], "log": path}         {"pid": …}, in the background
    {"op": "read", "path": …}                         {"text": …}, empty if there is no such file
    {"op": "write", "path": …, "text": …}             {}
    {"op": "clock"}                                   {"boot": seconds, "real": seconds}

A request has an "id", which its answer repeats. What fails is answered with {"error": sentence}.
Standard library only.
"""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

PORT = "agent"


def port() -> str:
    """The device of the port that the test listens on."""
    for entry in Path("/sys/class/virtio-ports").iterdir():
        if (entry / "name").read_text().strip() == PORT:
            return f"/dev/{entry.name}"
    raise FileNotFoundError(f"no virtio-serial port is named {PORT}")


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Do one request."""
    match request["op"]:
        case "run":
            done = subprocess.run(
                request["argv"], timeout=request["timeout"], check=False, stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            return {"code": done.returncode, "text": done.stdout.decode("utf-8", "replace")}
        case "start":
            with open(request["log"], "ab") as log:
                process = subprocess.Popen(
                    request["argv"], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
            return {"pid": process.pid}
        case "read":
            path = Path(request["path"])
            return {"text": path.read_text(errors="replace") if path.exists() else ""}
        case "write":
            Path(request["path"]).write_text(request["text"])
            return {}
        case "clock":
            return {"boot": time.clock_gettime(time.CLOCK_BOOTTIME), "real": time.time()}
    return {"error": f"unknown request {request['op']}"}


def main() -> None:
    """Answer requests until the port is closed."""
    with open(port(), "r+b", buffering=0) as line:
        waiting = b""
        while data := line.read(65536):
            *requests, waiting = (waiting + data).split(b"\n")
            for request in requests:
                asked = json.loads(request)
                try:
                    reply = answer(asked)
                except (OSError, subprocess.SubprocessError, ValueError) as error:
                    reply = {"error": f"{type(error).__name__}: {error}"}
                whole = json.dumps({"id": asked["id"], **reply}).encode() + b"\n"
                while whole:
                    whole = whole[line.write(whole) or 0 :]


if __name__ == "__main__":
    main()
