"""One guest and its disk chain, driven the two ways that management software drives QEMU.

"drive" uses -drive and commands that take file names; "auto" is how libvirt does it: -blockdev nodes with
auto-read-only on the protocol node, each new file created with blockdev-create and added as two nodes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support import guest
from tests.support.qemu import Build, Fleet, Qemu, Style, disk


class Machine:
    """A guest that writes to `disk0`; `image` is the file that is on top of its chain now."""

    def __init__(self, fleet: Fleet, build: Build, style: Style, image: Path, image_format: str) -> None:
        self.qemu: Qemu = fleet.start(build, disk(style, image_format, image))
        self.style = style
        self.build = build
        self.chain = [("disk0", image)]
        self.image_format = image_format
        self._jobs = 0
        self.qemu.wait_written(10)

    @property
    def top(self) -> str:
        """What block commands call the disk."""
        return "disk0" if self.style == "drive" else self.chain[-1][0]

    @property
    def image(self) -> Path:
        return self.chain[-1][1]

    def job(self, command: str, ready: bool = False, **arguments: Any) -> str:
        """Start a block job; return its name once it ended (or, with `ready`, once it could be completed)."""
        self._jobs += 1
        name = f"job{self._jobs}"
        self.qemu.command(command, **{"job-id": name}, **arguments)
        if ready:
            self.qemu.qmp.wait_event("BLOCK_JOB_READY", device=name)
        else:
            self.completed(name)
        return name

    def completed(self, name: str) -> None:
        """Wait until a job ended, and well."""
        event = self.qemu.qmp.wait_event("BLOCK_JOB_COMPLETED", device=name)
        assert "error" not in event["data"], event

    def complete(self, name: str) -> None:
        """Pivot, as `job-complete` does, and wait for the end."""
        self.qemu.command("job-complete", id=name)
        self.completed(name)

    def snapshot(self, path: Path) -> None:
        """Put a new qcow2 overlay on top while the guest writes."""
        node = f"node{len(self.chain)}"
        if self.style == "drive":
            self.qemu.command(
                "blockdev-snapshot-sync", device="disk0", **{"snapshot-file": str(path), "format": "qcow2"}
            )
        else:
            self.add_node(node, path, backing=self.chain[-1])
            self.qemu.command("blockdev-snapshot", node=self.top, overlay=node)
        self.chain.append((node, path))

    def add_node(self, node: str, path: Path, backing: tuple[str, Path] | None = None) -> None:
        """Create a qcow2 file and add it as a node."""
        self._create(node + "-mkfile", {"driver": "file", "filename": str(path), "size": 0})
        protocol = {
            "driver": "file", "node-name": node + "-file", "filename": str(path), "auto-read-only": True,
            "discard": "unmap",
        }  # fmt: skip
        self.qemu.command("blockdev-add", **protocol)
        options: dict[str, Any] = {"driver": "qcow2", "file": node + "-file", "size": guest.DISK_BYTES}
        if backing is not None:
            options |= {"backing-file": str(backing[1]), "backing-fmt": self._format_of(backing[1])}
        self._create(node + "-mkfmt", options)
        self.qemu.command(
            "blockdev-add",
            **{
                "driver": "qcow2",
                "node-name": node,
                "file": node + "-file",
                "read-only": False,
                "backing": None,
            },
        )

    def _format_of(self, path: Path) -> str:
        return self.image_format if path == self.chain[0][1] else "qcow2"

    def _create(self, job: str, options: dict[str, Any]) -> None:
        self.qemu.command("blockdev-create", **{"job-id": job}, options=options)
        self.qemu.wait_job(job)
        self.qemu.command("job-dismiss", id=job)

    def finish(self, *images: Path) -> None:
        """End the guest; each of `images` (default: the top), read with its chain, must hold every write."""
        self.qemu.wait_written(10)
        acknowledged = self.qemu.halt()
        assert self.qemu.quit() == 0, self.qemu.output
        for image in images or (self.image,):
            image_format = self._format_of(image)
            if image_format == "qcow2":
                self.build.img("check", "-f", "qcow2", image)
            guest.check(guest.read_record(image, image_format, self.build.program("qemu-img")), acknowledged)
