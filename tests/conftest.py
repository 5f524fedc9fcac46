"""What every test must leave as it found it, and what a run in CI may not pass over.

Per test: no descriptor and no child process more than before, and no log record of WARNING or above that the
test did not declare (fixture `expect_log`, or `caplog` for a test that looks at the log itself). Per run: no
mount and no process that has to do with the run's own temporary directory. With CI=true, a skip that
allowed_skips.txt does not have is a failure.
"""

from __future__ import annotations

import fnmatch
import gc
import logging
import os
import re
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

SETTLE_S = 2.0
_ALLOWED_SKIPS = Path(__file__).with_name("allowed_skips.txt")
# Kept open by the interpreter, pytest and hypothesis for the rest of the run once they were needed.
_LASTING = re.compile(r"^/dev/(null|u?random)$|\.hypothesis/|/memfd:.*pytest")

ExpectLog = Callable[..., None]


# --- descriptors and children


def _descriptors() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue  # the one that listed the directory
    return found


def _children() -> dict[int, str]:
    """Children of this process, by pid; ended ones that nobody waited for included."""
    pids = set()
    for task in os.listdir("/proc/self/task"):
        try:
            pids |= set(map(int, Path(f"/proc/self/task/{task}/children").read_text().split()))
        except OSError:
            continue  # a thread that ended
    return {pid: _command(pid) for pid in pids}


def _command(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        line = b" ".join(words).decode("utf-8", "replace").strip()
        return line or f"ended: {Path(f'/proc/{pid}/comm').read_text().strip()}"
    except OSError:
        return "gone"


def _surplus(read: Callable[[], dict[int, str]], before: dict[int, str]) -> dict[int, str]:
    return {key: what for key, what in read().items() if before.get(key) != what}


@pytest.fixture(autouse=True)
def _nothing_kept_open(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that leaks descriptors or children fails."""
    descriptors, children = _descriptors(), _children()
    yield
    deadline = time.monotonic() + SETTLE_S
    while True:
        kept = {fd: to for fd, to in _surplus(_descriptors, descriptors).items() if not _LASTING.search(to)}
        left = {pid: what for pid, what in _surplus(_children, children).items() if pid not in children}
        if not kept and not left:
            return
        if time.monotonic() > deadline:
            break
        gc.collect()
        time.sleep(0.02)
    pytest.fail(f"left open: {kept or 'nothing'}; left running: {left or 'nothing'}", pytrace=False)


# --- mounts and daemons of the whole run


def _mounts_below(directory: str) -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    points = [line.split(" ")[4] for line in lines]
    return [point for point in points if point.startswith(directory + "/")]


def _processes_about(directory: str) -> list[str]:
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        command = _command(int(name))
        if directory in command and int(name) != os.getpid():
            found.append(f"{command} (pid {name})")
    return found


@pytest.fixture(scope="session", autouse=True)
def _nothing_left_behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A run that leaves mounts, or processes that work in its temporary directory, fails."""
    base = str(tmp_path_factory.getbasetemp())
    yield
    deadline = time.monotonic() + SETTLE_S
    while (left := _mounts_below(base) + _processes_about(base)) and time.monotonic() < deadline:
        time.sleep(0.05)
    if left:
        pytest.fail("the run left behind: " + "; ".join(left), pytrace=False)


# --- log records


@dataclass
class _LogGuard(logging.Handler):
    """Collects records of WARNING and above, and what the test said it expects."""

    records: list[logging.LogRecord] = field(default_factory=list)
    expected: list[tuple[re.Pattern[str], int | None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(logging.WARNING)

    def __hash__(self) -> int:
        return id(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def complaints(self) -> list[str]:
        """What was logged and not expected, and what was expected and not logged."""
        left = [f"{record.levelname} {record.name}: {record.getMessage()}" for record in self.records]
        found = []
        for pattern, count in self.expected:
            matching = [line for line in left if pattern.search(line)]
            left = [line for line in left if line not in matching]
            if count is not None and len(matching) != count:
                found.append(f"expected {count} of {pattern.pattern!r} in the log, not {len(matching)}")
        return [*(f"not expected in the log: {line}" for line in left), *found]


@pytest.fixture
def _log_guard() -> Iterator[_LogGuard]:
    guard = _LogGuard()
    logging.getLogger().addHandler(guard)
    yield guard
    logging.getLogger().removeHandler(guard)


@pytest.fixture(autouse=True)
def _quiet_log(request: pytest.FixtureRequest, _log_guard: _LogGuard) -> Iterator[None]:
    """A test fails over a warning that it did not declare."""
    yield
    if "caplog" not in request.fixturenames and (complaints := _log_guard.complaints()):
        pytest.fail("; ".join(complaints), pytrace=False)


@pytest.fixture
def expect_log(_log_guard: _LogGuard) -> ExpectLog:
    """`expect_log(pattern, count=1)`: the test logs so many records that match; None: any number.

    The pattern is searched for in "LEVEL logger: message".
    """

    def expect(pattern: str, count: int | None = 1) -> None:
        _log_guard.expected.append((re.compile(pattern), count))

    return expect


# --- skips


def _allowed_skips() -> list[str]:
    lines = _ALLOWED_SKIPS.read_text(encoding="utf-8").splitlines() if _ALLOWED_SKIPS.exists() else []
    return [line.split(" #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def _forbidden_skip(report: pytest.TestReport | pytest.CollectReport) -> bool:
    if os.environ.get("CI") != "true" or not report.skipped or hasattr(report, "wasxfail"):
        return False
    return not any(fnmatch.fnmatchcase(report.nodeid, pattern) for pattern in _allowed_skips())


def _fail_instead(report: pytest.TestReport | pytest.CollectReport) -> None:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    report.outcome = "failed"
    report.longrepr = (
        f"{report.nodeid} was skipped, which CI does not allow: {reason}\n"
        f"Make it run, or add it to {_ALLOWED_SKIPS.name} with its reason."
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn a test's forbidden skip into a failure."""
    report = yield
    if _forbidden_skip(report):
        _fail_instead(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Turn a module's forbidden skip into a failure."""
    report = yield
    if _forbidden_skip(report):
        _fail_instead(report)
    return report
