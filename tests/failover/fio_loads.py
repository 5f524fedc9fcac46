"""fio writes and verifies, run after run; the images stay open for writing from the first run to the last."""

from __future__ import annotations

import glob
import os
import re
import subprocess
import time
from pathlib import Path
from typing import ClassVar

from tests.failover.loads import HELD, Load
from tests.failover.recording import Request

RUN_DEADLINE_S = 120.0
RATE = "700k"
"""Bytes a second and job: two jobs of three loads must leave a machine of two cores idle time."""
_COMPLAINT = re.compile(r"^.*(?:verify|error|fail|err= *[1-9]).*$", re.MULTILINE | re.IGNORECASE)
_WHAT = {"0": "fio read", "1": "fio write", "2": "fio trim"}


class Fio(Load):
    """Random writes of two jobs, checked against their checksums while they go on and at the end of a run.

    This process keeps the images open, and fio inherits that, so that it may write them as well.
    """

    seeds = 2
    seed_bytes = 3 << 20
    paced = False
    fio_timed: ClassVar[bool] = True
    options: ClassVar[dict[str, object]] = {}

    def prepare(self) -> None:
        self.runs = 0
        self.files = [self.directory / HELD / f"{number}.img" for number in range(self.seeds)]
        self.descriptors: list[int] = []
        for path in self.files:
            self.descriptors.append(self.call("open", os.open, path, os.O_RDWR | os.O_CLOEXEC))

    def step(self) -> None:
        self.runs += 1
        prefix = self.bare / f"{type(self).__name__}-{self.runs}"
        try:
            done = subprocess.run(
                self._command(prefix), pass_fds=self.descriptors, stdin=subprocess.DEVNULL, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=RUN_DEADLINE_S, check=False,
                cwd=self.bare,
            )  # fmt: skip
            self._collect(prefix)
        except subprocess.TimeoutExpired:
            self.demand(False, f"fio did not end within {RUN_DEADLINE_S:.0f} s")
        complaints = _COMPLAINT.findall(done.stdout)
        if done.returncode:
            self.demand(False, f"fio ended with {done.returncode}: {' | '.join(complaints)[:600]}")
        self.recorder.record.facts["runs"] = self.runs

    def _command(self, prefix: Path) -> list[str]:
        options = {
            "size": self.seed_bytes, "rw": "randwrite", "bsrange": "4k-64k", "verify": "crc32c",
            "verify_fatal": 1, "do_verify": 1, "verify_backlog": 32, "verify_state_save": 0,
            "rate": RATE, "randseed": self.random.randrange(1 << 30), "create_on_open": 0,
            "overwrite": 1, "write_lat_log": prefix, "log_unix_epoch": 1, "per_job_logs": 1,
            "invalidate": 0, **self.options,
        }  # fmt: skip
        words = ["fio", "--thread", *(f"--{name}={value}" for name, value in options.items())]
        for path in self.files:
            words += [f"--name={path.stem}", f"--filename={path}"]
        return words

    def _collect(self, prefix: Path) -> None:
        """Take fio's times of every request into the record; its clock is the calendar's, in milliseconds.

        Only where fio waits for one request at a time: others it finds ended later, delayed by its rate.
        """
        ahead = time.time_ns() - time.monotonic_ns()
        count = 0
        for name in glob.glob(f"{glob.escape(str(prefix))}*.log"):
            with open(name) as lines:
                if not (self.fio_timed and "_clat." in name):
                    lines.seek(0, os.SEEK_END)
                for line in lines:
                    at, took, kind, *_ = (word.strip() for word in line.split(","))
                    ended = int(at) * 1_000_000 - ahead
                    request = Request(self.recorder.record.load, _WHAT[kind], ended - int(took), ended)
                    self.recorder.record.requests.append(request)
                    count += 1
            os.unlink(name)
        now = time.monotonic_ns()
        self.recorder.row.leave(now)
        self.recorder.record.facts["requests"] = self.recorder.record.facts.get("requests", 0) + count

    def finish(self) -> None:
        for descriptor in self.descriptors:
            self.call("close", os.close, descriptor)
        self.descriptors = []

    def abandon(self) -> None:
        super().abandon()
        for descriptor in self.descriptors:
            try:
                os.close(descriptor)
            except OSError as error:
                self.recorder.fault(f"closing after an error: {error!r}")
        self.descriptors = []


class FioDirect(Fio):
    """With O_DIRECT."""

    options: ClassVar[dict[str, object]] = {"ioengine": "psync", "direct": 1}


class FioAsync(Fio):
    """With O_DIRECT, four requests at a time."""

    fio_timed = False
    options: ClassVar[dict[str, object]] = {"ioengine": "libaio", "iodepth": 4, "direct": 1}


class FioBuffered(Fio):
    """Through the page cache, where the mode has one."""

    options: ClassVar[dict[str, object]] = {"ioengine": "psync", "direct": 0, "fsync": 16}
