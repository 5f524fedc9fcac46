"""The door before the device: one reader leads while nothing waits, and keeps nobody out for long."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from lockfs.channel.door import SOLO_AFTER, TICK_S, Door

PATIENCE_S = 10.0


def run_apart(work: Callable[[], object]) -> threading.Thread:
    """A thread that does the work; it must be joined."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def led(tick_s: float = TICK_S) -> Door:
    """A door that the calling thread leads."""
    door = Door(tick_s)
    for _ in range(SOLO_AFTER):
        door.served()
    assert not door.leads()
    door.served()
    assert door.leads()
    return door


def test_leader_comes_after_a_streak_only() -> None:
    """One request that may wait begins the count anew."""
    door = Door()
    for _ in range(3 * SOLO_AFTER):
        door.served()
        door.slow()
    assert not door.leads()


def test_leader_that_is_about_to_wait_calls_the_others() -> None:
    """A sleeper is let through as soon as the leader says so."""
    door = led(tick_s=10 * PATIENCE_S)
    sleeper = run_apart(door.wait)
    end = time.monotonic() + PATIENCE_S
    while not door.sleepers and time.monotonic() < end:
        time.sleep(0.001)
    assert sleeper.is_alive()
    door.slow()
    sleeper.join(PATIENCE_S)
    assert not sleeper.is_alive()
    assert not door.leads()


def test_leader_that_is_stuck_is_found_out() -> None:
    """Sleepers go to the device by themselves if the leader does not get on, all of them."""
    door = led()
    sleepers = [run_apart(door.wait) for _ in range(3)]
    for sleeper in sleepers:
        sleeper.join(PATIENCE_S)
        assert not sleeper.is_alive()
    assert not door.leads()


def test_slow_of_another_thread_does_not_depose_the_leader() -> None:
    """Who is no leader keeps nobody waiting and so calls nobody."""
    door = led()
    run_apart(door.slow).join(PATIENCE_S)
    assert door.leads()
