"""QEMU and its tools run on the bare store, the way a host without lockfs runs them."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

PROGRAM = "qemu-system-x86_64"
ANSWER_S = 20.0


def missing() -> str | None:
    """Why QEMU cannot be run here, or None."""
    for program in (PROGRAM, "qemu-img", "qemu-io"):
        if shutil.which(program) is None:
            return f"{program} is not installed (packages qemu-system-x86 and qemu-utils)"
    return None


class Refused(Exception):
    """The program ended with an error; the text is what it said."""


@contextlib.contextmanager
def guest(image: Path, form: str, drive: str = "", *more: str) -> Iterator[None]:
    """A guest that has opened the image and is stopped before its first instruction; Refused if it cannot."""
    machine = ["-S", "-M", "pc,accel=tcg", "-m", "32", "-nodefaults", "-display", "none", "-qmp", "stdio"]
    disk = ["-drive", f"file={image},format={form},if=virtio{drive}"]
    command = [PROGRAM, *machine, *disk, *more]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write('{"execute": "qmp_capabilities"}\n')
            process.stdin.flush()
        greeting, answer = process.stdout.readline(), process.stdout.readline()
        if not answer:
            raise Refused(process.communicate(timeout=ANSWER_S)[1])
        assert "QMP" in json.loads(greeting)
        yield
    finally:
        process.kill()
        process.communicate()


def tool(*command: str) -> str:
    """Run qemu-img or qemu-io; Refused with what it said if it failed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S, check=False)
    if done.returncode != 0:
        raise Refused(done.stderr + done.stdout)
    return done.stdout


def make(image: Path, form: str) -> Path:
    """A small image."""
    tool("qemu-img", "create", "-q", "-f", form, str(image), "4M")
    return image
