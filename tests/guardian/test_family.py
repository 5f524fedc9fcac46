"""Whoever of the family is killed, the others go on; a descriptor once opened is never lost."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.guardian.conftest import Family, alive


def kill(*pids: int) -> None:
    """End processes as crashes do, all at once."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def test_orderly_end(family: Family) -> None:
    """The worker's exit code 0 ends everybody; nothing stays open but what was open before."""
    family.start()
    ending = family.end()
    assert (ending["code"], ending["ready"], family.process.returncode) == (0, True, 0)
    assert len(family.of("turn")) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may raise a priority")
def test_everybody_has_priority(family: Family) -> None:
    """Above all who replaces the dead, and a worker that is waited for; not one that merely begins."""
    family.start()
    first = family.pids()
    niceness = {"guardian": -20, "twin": -20, "worker": -10, "spare": -10}

    def are_as_they_should(pids: dict[str, int]) -> bool:
        return {name: os.getpriority(os.PRIO_PROCESS, pid) for name, pid in pids.items()} == niceness

    family.until(lambda: are_as_they_should(first), "each has its priority")
    kill(first["worker"])
    family.turns(2)
    now = family.complete(first["worker"])
    niceness["worker"] = -20
    family.until(lambda: are_as_they_should(now), "each has its priority")
    family.end()


def test_killed_worker_is_replaced(family: Family) -> None:
    """The next worker finds open what the journal names, and closed what nobody names."""
    family.start()
    first = family.turns(1)
    kill(family.pids()["worker"])
    second = family.turns(2)
    assert second["pid"] != first["pid"]
    assert (second["held"], second["content"]) == (first["held"], "kept")
    event = family.of("turn")[1]
    assert (event["first"], event["fenced"], event["died"]) == (False, False, "was killed by SIGKILL")
    links = {
        int(name): os.readlink(f"/proc/{second['pid']}/fd/{name}")
        for name in os.listdir(f"/proc/{second['pid']}/fd")
    }
    assert [number for number, link in links.items() if link.endswith("behaviour.json")] == [second["lost"]]
    family.complete(first["pid"])
    family.end()


def test_worker_that_exits_is_replaced(family: Family) -> None:
    """Any exit code but 0 counts as a death."""
    family.start(ready=False, **{"1": "exit"})
    family.turns(2)
    family.attach()
    assert family.of("turn")[1]["died"] == "ended with code 3"
    family.end()


def test_stopped_worker_is_replaced(family: Family) -> None:
    """A worker that is stopped shows no heartbeat: it is killed, and the next one goes on."""
    family.start()
    worker = family.pids()["worker"]
    os.kill(worker, signal.SIGSTOP)
    family.turns(2)
    assert not alive(worker)
    assert family.of("turn")[1]["died"] == "did not answer and was killed"
    family.end()


def test_hanging_loop_is_replaced(family: Family) -> None:
    """So is one whose loop stands still."""
    family.start()
    (family.directory / "hang").touch()
    family.until(lambda: len(family.of("turn")) >= 2, "a second worker")
    (family.directory / "hang").unlink()
    family.turns(2)
    family.end()


def test_guardian_that_was_stopped_kills_nobody(family: Family) -> None:
    """After a stop of everybody, however long, the worker has its time to show that it lives."""
    family.start(limits={"heartbeat": 1.5, "poll": 0.05})
    pids = family.pids()
    os.kill(pids["worker"], signal.SIGSTOP)
    before = family.header.heartbeat_ns
    time.sleep(0.2)  # the guardian has seen the last heartbeat; what follows is the length of the stop
    os.kill(pids["guardian"], signal.SIGSTOP)
    time.sleep(1.6)
    os.kill(pids["guardian"], signal.SIGCONT)
    kill(pids["twin"])
    family.until(lambda: family.pids()["twin"] not in (0, pids["twin"]), "the guardian has looked again")
    os.kill(pids["worker"], signal.SIGCONT)
    family.until(lambda: family.header.heartbeat_ns > before, "a heartbeat")
    assert family.pids()["worker"] == pids["worker"]
    family.end()


def test_twin_takes_over(family: Family) -> None:
    """The guardian is killed: the same worker and spare go on under the twin, which gets a twin itself."""
    family.start()
    before = family.pids()
    kill(before["guardian"])
    after = family.complete(before["guardian"])
    assert after["guardian"] == before["twin"]
    assert (after["worker"], after["spare"]) == (before["worker"], before["spare"])
    kill(after["worker"])
    family.turns(2)
    last = family.complete(after["worker"])
    kill(last["guardian"])
    family.complete(last["guardian"])
    output = family.directory / "output"
    family.until(lambda: "The guardian was killed" in output.read_text(), "the worker says so")
    assert family.end()["code"] == 0


def test_dead_twin_and_spare_are_replaced(family: Family) -> None:
    """Nobody notices, but for a line in the log."""
    family.start()
    before = family.pids()
    kill(before["twin"], before["spare"])
    after = family.complete(before["twin"], before["spare"])
    assert (after["guardian"], after["worker"]) == (before["guardian"], before["worker"])
    kill(after["worker"])
    family.turns(2)
    family.end()


@pytest.mark.parametrize(
    "killed",
    [
        ("guardian", "worker"),
        ("guardian", "worker", "spare"),
        ("guardian", "spare"),
        ("guardian", "twin"),
        ("guardian", "twin", "worker"),
        ("twin", "worker", "spare"),
    ],
)
def test_several_at_once(family: Family, killed: tuple[str, ...]) -> None:
    """Twin or spare are left, and the mount is served again with a full family."""
    family.start()
    before = family.pids()
    kill(*(before[name] for name in killed))
    after = family.complete(*(before[name] for name in killed))
    if "worker" in killed:
        assert family.turns(2)["pid"] == after["worker"]
    else:
        assert after["worker"] == before["worker"]
    assert family.end()["code"] == 0


def test_crash_loop(family: Family) -> None:
    """After five deaths in a row the next worker is to serve reading only, and is retried not too often."""
    family.start(ready=False, others="die")
    family.until(lambda: len(family.of("turn")) >= 7, "seven turns")
    fenced = [event["fenced"] for event in family.of("turn")[:7]]
    assert fenced == [False] * 5 + [True] * 2
    family.attach()


def test_crash_loop_after_the_end(family: Family) -> None:
    """If there is nothing left to serve a crash loop ends the family."""
    family.start(ready=False, others="die")
    (family.directory / "over").touch()
    ending = family.ended()
    assert (ending["code"], len(family.of("turn"))) == (2, 5)


@pytest.mark.parametrize("steady", [0.0, 10.0])
def test_steady_workers_are_no_crash_loop(family: Family, steady: float) -> None:
    """Deaths count only if they come soon after the start; by SIGKILL, only if nothing was served yet."""
    family.start(limits={"loop_steady": steady, "loop_killed": 0.0})
    for count in range(2, 9):
        kill(family.complete()["worker"])
        family.turns(count)
    assert not any(event["fenced"] for event in family.of("turn"))
    family.end()


def test_failed_start(family: Family) -> None:
    """The first worker's sentence and code are those of the family."""
    family.start(ready=False, **{"1": "fail"})
    ending = family.ended()
    assert (ending["code"], ending["ready"]) == (32, False)
    assert ending["sentence"] == "It cannot be: " + "ä" * 1000
    assert family.process.returncode == 32
    assert not family.of("on ready")


def test_start_that_is_killed(family: Family) -> None:
    """A first worker that is killed before it is ready ends the family."""
    family.start(ready=False, **{"1": "die early"})
    ending = family.ended()
    assert (ending["code"], ending["ready"], ending["number"]) == (2, False, signal.SIGKILL)


def test_hopeless_worker_ends_the_family(family: Family) -> None:
    """A worker that finds that nothing can go on is the last one."""
    family.start(**{"2": "hopeless"})
    kill(family.pids()["worker"])
    ending = family.ended()
    assert (ending["code"], ending["ready"]) == (2, True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_passed_on(family: Family, number: signal.Signals) -> None:
    """The guardian asks the worker for the end; others of the family are not moved by the signal."""
    family.start()
    pids = family.pids()
    for name in ("twin", "spare"):
        os.kill(pids[name], number)
    if number == signal.SIGINT:
        os.kill(pids["worker"], number)  # as a terminal would not: it is in another session
    else:
        os.kill(pids["guardian"], number)
        assert family.ended()["code"] == 0
        return
    assert family.pids() == pids
    family.end()


def test_sessions(family: Family) -> None:
    """What a terminal sends reaches only the guardian."""
    family.start()
    pids = family.pids()
    others = [pids[name] for name in ("twin", "worker", "spare")]
    family.until(lambda: [os.getsid(pid) for pid in others] == others, "sessions of their own")
    assert os.getsid(pids["guardian"]) == os.getsid(0)


def test_guardian_is_small(family: Family) -> None:
    """Neither guardian nor twin import what serves, and both are small."""
    family.start(imports=True)
    for name in ("guardian", "twin"):
        status = Path(f"/proc/{family.pids()[name]}/status").read_text()
        assert int(status.split("VmRSS:")[1].split()[0]) < 20 * 1024
    assert family.end()["modules"] == []


def test_descriptors_stay_few(family: Family) -> None:
    """However often members are killed, the shared table does not grow."""
    family.start(limits={"loop_steady": 0.0, "loop_killed": 0.0})
    counts = []
    for count in range(2, 8):
        pids = family.complete()
        kill(pids["guardian"] if count % 2 else pids["twin"])
        pids = family.complete(pids["guardian"] if count % 2 else pids["twin"])
        kill(pids["worker"])
        family.turns(count)
        after = family.complete(pids["worker"])
        counts.append(len(os.listdir(f"/proc/{after['guardian']}/fd")))
    assert max(counts) <= counts[0] + 1, counts  # one more may wait for the next worker's sweep
    family.end()


def test_upgrade(family: Family) -> None:
    """SIGHUP: the program as it is now goes on in the same process, with what the journal names open."""
    family.start()
    first = family.turns(1)
    guardian = family.pids()["guardian"]
    os.kill(guardian, signal.SIGHUP)
    second = family.turns(2)
    after = family.complete(first["pid"])
    assert after["guardian"] == guardian
    assert family.of("start")[1]["upgraded"] == str(guardian)
    assert (second["held"], second["content"]) == (first["held"], "kept")
    event = family.of("turn")[1]
    assert (event["first"], event["died"]) == (False, "was replaced by a new version")
    kill(after["guardian"])
    family.complete(guardian)
    assert family.end()["code"] == 0


def test_upgrade_by_the_worker(family: Family) -> None:
    """The header's word asks for it as well, also from a guardian that took another's place."""
    family.start()
    kill(family.pids()["guardian"])
    family.complete(family.process.pid)
    family.header.upgrade = 1
    family.turns(2)
    family.complete()
    assert family.end()["code"] == 0


def test_upgrade_to_what_does_not_run(family: Family) -> None:
    """A program that cannot go on is not started: the worker serves on."""
    family.start(program="tests.guardian.no_such_program")
    before = family.pids()
    os.kill(before["guardian"], signal.SIGHUP)
    family.until(lambda: family.words.upgrades_refused == 1, "refused")
    assert family.complete() == before
    assert len(family.of("turn")) == 1
    output = family.directory / "output"
    family.until(lambda: "cannot take this mount over" in output.read_text(), "the worker says so")
    family.end()
