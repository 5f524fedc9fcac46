"""The program as it is installed takes the place of the running one, with the mount and all that is open.

exec(2) ends the sharing of the table, so every other process of the family is ended before; what the journal
names and what the guardian keeps is inherited. First the new program is asked whether it could.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

from lockfs.guardian import long_values
from lockfs.journal.memory import SharedMemory

CHECK_LIMIT_S = 10.0
CAN_RESUME, RESUME = "--can-resume", "--resume"
OPTIONS = "guardian:options"
"""The long value in the journal that has, as `options`, those of the mount."""


@dataclass(frozen=True)
class Program:
    """What is started: `command`, an option of the above with the journal's descriptor, and `shown`, which
    means nothing but to whoever looks at the list of processes.
    """

    command: tuple[str, ...]
    shown: tuple[str, ...] = ()

    def words(self, option: str, descriptor: int) -> list[str]:
        """The command line."""
        return [*self.command, option, str(descriptor), *self.shown]


def can_resume(program: Program, memory: SharedMemory) -> bool:
    """Whether the program, run anew, understands this journal: it exits with 0 then. Blocks for its start."""
    descriptor = memory.descriptor
    try:
        done = subprocess.run(
            program.words(CAN_RESUME, descriptor),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(descriptor,),
            timeout=CHECK_LIMIT_S,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return not done.returncode


def change_options(memory: SharedMemory, changed: dict[str, Any]) -> None:
    """Have the next program find other options: plain values by name, in groups where they are grouped.

    Raises:
        JournalFull, ValueError: they are too long; nothing has changed.
    """
    value = long_values.current(memory.facts, OPTIONS)
    if not isinstance(value, dict) or not changed:
        return
    options = dict(value["options"])
    for name, new in changed.items():
        options[name] = {**options[name], **new} if isinstance(options.get(name), dict) else new
    long_values.replace(memory.facts, OPTIONS, {**value, "options": options})


def become(program: Program, memory: SharedMemory, kept: Collection[int], signals: Iterable[int]) -> NoReturn:
    """Replace this process by the new program; `signals` wait until that takes them.

    Raises:
        OSError: the program could not be started, and everything is as before.
    """
    memory.reload()
    inherited = {memory.descriptor, *kept, *memory.named_descriptors()}
    former = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    inherit(inherited, True)
    try:
        os.execv(program.command[0], program.words(RESUME, memory.descriptor))
    finally:
        inherit(inherited, False)
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def inherit(descriptors: Iterable[int], whether: bool) -> None:
    """Let descriptors stay open over an exec, or not; the standard streams always do."""
    for descriptor in descriptors:
        if descriptor > 2:
            with contextlib.suppress(OSError):  # named, but closed: its process was killed in between
                os.set_inheritable(descriptor, whether)
