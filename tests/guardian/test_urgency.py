"""Running before other programs, for a while."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from lockfs.linux import urgency

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root may raise a priority")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """However a test ends, and whatever it was run with."""
    before = os.getpriority(os.PRIO_PROCESS, 0)
    os.setpriority(os.PRIO_PROCESS, 0, urgency.ORDINARY)
    yield
    os.setpriority(os.PRIO_PROCESS, 0, before)


def test_a_thread_and_those_it_starts() -> None:
    """What was started before is not; the end is for all."""
    done, told = threading.Event(), threading.Semaphore(0)
    seen: list[int] = []

    def look() -> None:
        seen.append(threading.get_native_id())
        told.release()
        done.wait()

    threads = []
    try:
        for _ in range(2):
            threads.append(threading.Thread(target=look))
            threads[-1].start()
            told.acquire()
            urgency.begin()
        assert [urgency.is_urgent(thread) for thread in (0, *seen)] == [True, False, True]
        urgency.end_everywhere()
        assert not any(map(urgency.is_urgent, (0, *seen)))
        assert os.getpriority(os.PRIO_PROCESS, 0) == urgency.ORDINARY
    finally:
        done.set()
        for thread in threads:
            thread.join()


def test_what_is_not_allowed_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container."""

    def refuse(*arguments: object) -> None:
        raise PermissionError

    os.setpriority(os.PRIO_PROCESS, 0, 5)
    with monkeypatch.context() as patch:
        patch.setattr(os, "setpriority", refuse)
        urgency.be_ordinary()
        urgency.begin()
        assert os.getpriority(os.PRIO_PROCESS, 0) == 5
    urgency.begin()
    with monkeypatch.context() as patch:
        patch.setattr(os, "setpriority", refuse)
        urgency.end()
        urgency.end_everywhere()
        assert urgency.is_urgent(0)


@pytest.mark.parametrize("niceness", [5, 0, -10, -15])
def test_ordinary_is_the_least(niceness: int) -> None:
    """Who was given more keeps it."""
    os.setpriority(os.PRIO_PROCESS, 0, niceness)
    urgency.be_ordinary()
    assert os.getpriority(os.PRIO_PROCESS, 0) == min(niceness, urgency.ORDINARY)


@pytest.mark.parametrize("niceness", [-19, 0, 5])
def test_other_priorities_are_left_alone(niceness: int) -> None:
    """What somebody gave the program on purpose."""
    os.setpriority(os.PRIO_PROCESS, 0, niceness)
    urgency.end()
    urgency.end_everywhere()
    assert os.getpriority(os.PRIO_PROCESS, 0) == niceness


def test_who_is_gone_is_not() -> None:
    """A thread may end between two looks."""
    assert not urgency.is_urgent(2**22 + 1)
