"""A descriptor that threads use while others close it: open during every use, closed after the last, once."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from functools import partial

import pytest

from lockfs.storage.descriptor import FileClosed, SharedDescriptor

USERS = 4
CLOSERS = 2
ROUNDS = 300
WAIT_S = 60.0


@pytest.fixture
def many_switches() -> Iterator[None]:
    """Threads change places as often as the interpreter lets them."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def use(file: SharedDescriptor, start: threading.Barrier, inode: int, wrong: list[str]) -> None:
    """Look twice, in one use, whether the descriptor is the pipe."""
    start.wait(WAIT_S)
    try:
        with file.used() as descriptor:
            for _ in range(2):
                if os.fstat(descriptor).st_ino != inode:
                    wrong.append("closed while it was used")
    except FileClosed:
        pass
    except Exception as error:  # noqa: BLE001  (reported by the test)
        wrong.append(repr(error))


def close(file: SharedDescriptor, start: threading.Barrier) -> None:
    """Close it."""
    start.wait(WAIT_S)
    file.close()


def test_users_and_closers_at_the_same_moment(many_switches: None) -> None:
    """The other end of a pipe tells that the descriptor was closed; the leak check, that nothing else was."""
    wrong: list[str] = []
    for _ in range(ROUNDS):
        reading, writing = os.pipe()
        inode = os.fstat(writing).st_ino
        file, start = SharedDescriptor(), threading.Barrier(USERS + CLOSERS)
        with file.opened(partial(int, writing)):
            pass
        works = [partial(use, file, start, inode, wrong)] * USERS + [partial(close, file, start)] * CLOSERS
        threads = [threading.Thread(target=work) for work in works]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        os.set_blocking(reading, False)
        assert os.read(reading, 1) == b""  # BlockingIOError: still open
        os.close(reading)
    assert not wrong


def test_a_failure_while_opening_closes() -> None:
    reading, writing = os.pipe()
    file = SharedDescriptor()
    with pytest.raises(LookupError), file.opened(partial(int, writing)):
        raise LookupError
    assert os.read(reading, 1) == b""
    os.close(reading)
    with pytest.raises(FileClosed), file.used():
        pass


def test_a_failed_opening_leaves_nothing_to_close() -> None:
    file = SharedDescriptor()

    def refuse() -> int:
        raise FileNotFoundError

    with pytest.raises(FileNotFoundError), file.opened(refuse):
        pass
    file.close()
    file.close()
