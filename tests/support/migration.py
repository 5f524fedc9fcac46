"""Live migration of one QEMU to another over a unix socket, step by step."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tests.support.qemu import POLL_S, Qemu

MIGRATION_S = 60.0
SLOW_BYTES = 512 * 1024  # a second: slow enough to step in while memory is copied
FULL_BYTES = 1 << 30
DONE = ("completed", "failed", "cancelled")


class Migration:
    """One attempt. The destination was started with `-incoming defer` (perhaps -S)."""

    def __init__(
        self, source: Qemu, destination: Qemu, stream: Path, *capabilities: str, slow: bool = False
    ) -> None:
        self.source = source
        self.destination = destination
        self._stream = stream
        wanted = [{"capability": name, "state": True} for name in (*capabilities, "events")]
        for machine in (source, destination):
            machine.command("migrate-set-capabilities", capabilities=wanted)
        source.command("migrate-set-parameters", **{"max-bandwidth": SLOW_BYTES if slow else FULL_BYTES})

    def start(self) -> None:
        """Begin to copy."""
        self.destination.command("migrate-incoming", uri=f"unix:{self._stream}")
        self.source.command("migrate", uri=f"unix:{self._stream}")

    def info(self) -> dict[str, Any]:
        """What the source says of it."""
        result: dict[str, Any] = self.source.command("query-migrate")
        return result

    def wait(self, *states: str, timeout: float = MIGRATION_S) -> str:
        """Wait until the source reports one of these states."""
        end = time.monotonic() + timeout
        while (info := self.info()).get("status") not in states:
            if info.get("status") in DONE or time.monotonic() > end:
                raise AssertionError(
                    f"migration is {info}, not {states}; source: {self.source.output}; "
                    f"destination: {self.destination.output}"
                )
            time.sleep(POLL_S)
        return str(info["status"])

    def hurry(self) -> None:
        """Lift the limit of speed."""
        self.source.command("migrate-set-parameters", **{"max-bandwidth": FULL_BYTES})

    def run(self) -> None:
        """From start to the end, which must be success on the source."""
        self.start()
        self.wait("completed")


def reset_capabilities(machine: Qemu, *capabilities: str) -> None:
    """Switch capabilities off again, for a further migration of the same machine."""
    machine.command(
        "migrate-set-capabilities",
        capabilities=[{"capability": name, "state": False} for name in capabilities],
    )
