"""The gate, with real threads."""

from __future__ import annotations

import threading

from lockfs.errors import LeaseUnavailable
from lockfs.keeper.gate import Gate, GateState

THREADS = 4
ROUNDS = 300


def test_only_open_lets_in() -> None:
    """A change is inside after OPEN and only then; the refusal goes with the state."""
    refusal = LeaseUnavailable("no")
    gate = Gate(GateState.ASK)
    assert gate.enter() is GateState.ASK
    gate.set(GateState.SHUT, refusal)
    assert (gate.enter(), gate.refusal, gate.inside) == (GateState.SHUT, refusal, 0)
    gate.set(GateState.OPEN)
    assert (gate.enter(), gate.refusal, gate.inside) == (GateState.OPEN, None, 1)
    gate.set(GateState.SHUT)
    assert gate.inside == 1
    gate.leave()
    assert gate.inside == 0


def test_an_open_gate_lets_in_only_in_time() -> None:
    """What enters when the time is over is sent to the keeper, though nobody has closed the gate."""
    gate = Gate(GateState.ASK)
    in_time = True
    gate.set(GateState.OPEN, in_time=lambda: in_time)
    assert gate.passable
    assert gate.enter() is GateState.OPEN
    in_time = False
    assert not gate.passable
    assert (gate.enter(), gate.state, gate.inside) == (GateState.ASK, GateState.OPEN, 1)
    in_time = True
    assert gate.passable
    assert (gate.enter(), gate.inside) == (GateState.OPEN, 2)
    gate.leave()
    gate.leave()


def test_only_an_open_gate_looks_at_the_time() -> None:
    """A gate that is closed stays so in time, and a lease's time ends with the next setting."""
    gate = Gate(GateState.OPEN)
    assert gate.passable  # without a lease that has a time
    gate.set(GateState.OPEN, in_time=lambda: False)
    gate.set(GateState.OPEN)
    assert gate.enter() is GateState.OPEN
    gate.leave()
    for state in (GateState.ASK, GateState.SHUT):
        gate.set(state, in_time=lambda: True)
        assert not gate.passable
        assert gate.enter() is state
    assert gate.inside == 0


def test_nobody_changes_after_the_gate_was_closed_and_empty() -> None:
    """Once the gate was closed and then seen empty, no thread is in a change until it opens again."""
    gate = Gate(GateState.OPEN)
    changing = [0] * THREADS
    done = threading.Event()

    def change(index: int) -> None:
        while not done.is_set():
            if gate.enter() is GateState.OPEN:
                changing[index] = 1
                changing[index] = 0
                gate.leave()

    threads = [threading.Thread(target=change, args=(index,)) for index in range(THREADS)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(ROUNDS):
            gate.set(GateState.ASK)
            while gate.inside:
                pass
            assert changing == [0] * THREADS
            gate.set(GateState.OPEN)
    finally:
        done.set()
        for thread in threads:
            thread.join()
