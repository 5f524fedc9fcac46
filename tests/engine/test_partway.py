"""Errors part-way (section 15 of the format): every I/O of every operation fails in every way.

After `settle` another host can take the lease, exactly once; at no time two hosts hold it; and what the
operation's owner says of its hold is what the storage says.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from lockfs.errors import BackendError
from lockfs.paxos.errors import Refused
from lockfs.paxos.resource import Hold, Resource
from lockfs.records import sectors
from lockfs.records.geometry import MIB
from tests.engine.fakes import FAST, Cancelled, Fate, Host, World, run, two_hosts

TRIES = 40
"""How often settling may fail before a test gives up; the latest write lands long before."""
WAYS = [(fate, after) for fate in Fate for after in ((0.3, 4.0) if "late" in fate.value else (0.0,))]


@dataclass
class Scene:
    """Two hosts, the first of which does something with the lease; `dead` may share it."""

    world: World
    one: Host
    two: Host
    mine: Resource = field(init=False)
    its: Resource = field(init=False)

    def __post_init__(self) -> None:
        self.mine, self.its = self.one.resource(), self.two.resource()

    def check(self) -> None:
        """Nobody holds what another holds."""
        holds = [self.mine.hold, self.its.hold]
        assert Hold.NONE in holds or holds == [Hold.SHARED, Hold.SHARED]


def nothing(scene: Scene) -> None:
    """The lease is free."""


def exclusive(scene: Scene) -> None:
    """Held."""
    run(scene.mine.acquire())


def shared(scene: Scene) -> None:
    """Held shared."""
    run(scene.mine.acquire(shared=True))


def shared_by_both(scene: Scene) -> None:
    """Held shared by both."""
    shared(scene)
    run(scene.its.acquire(shared=True))


def shared_by_a_dead_host(scene: Scene) -> None:
    """Whose sector is to be cleared."""
    third = Host(scene.world, 3).join()
    run(third.resource().acquire(shared=True))
    third.crash()
    scene.world.advance(FAST.dead + 3)


def let_go_of(scene: Scene) -> None:
    """The next version is one that was proposed for, and let go of."""
    scene.one.disk.fail(Fate.REFUSED, "write", MIB)
    with pytest.raises(BackendError):
        run(scene.mine.acquire())
    run(scene.mine.settle())


def committed_late(scene: Scene) -> None:
    """As before, and the other host has committed it since."""
    let_go_of(scene)
    with pytest.raises(Refused):
        run(scene.its.acquire())


def overtaken(scene: Scene) -> None:
    """The other host will commit the ballot when it is half over, or take the lease if it is broken off."""

    def overtake() -> None:
        with contextlib.suppress(Refused):
            run(scene.its.acquire())

    scene.one.disk.before(overtake, "read", MIB, nth=3)


def shared_and_overtaken(scene: Scene) -> None:
    """Held shared; the ballot of the conversion will be committed by the other."""
    shared(scene)
    overtaken(scene)


def conversion_failed(scene: Scene) -> None:
    """Held shared, with the leader not freed."""
    exclusive(scene)
    scene.one.disk.fail(Fate.REFUSED, "write", MIB)
    with pytest.raises(BackendError):
        run(scene.mine.convert(shared=True))


FOREVER = 1e9
OPERATIONS: dict[str, tuple[Callable[[Scene], None], Callable[[Scene], None]]] = {
    "acquire": (nothing, lambda scene: run(scene.mine.acquire(give_up_at=FOREVER))),
    "acquire shared": (nothing, lambda scene: run(scene.mine.acquire(shared=True, give_up_at=FOREVER))),
    "acquire, overtaken": (overtaken, lambda scene: run(scene.mine.acquire(give_up_at=FOREVER))),
    "acquire shared, overtaken": (
        overtaken, lambda scene: run(scene.mine.acquire(shared=True, give_up_at=FOREVER)),
    ),
    "acquire, let go of": (let_go_of, lambda scene: run(scene.mine.acquire())),
    "acquire, committed late": (committed_late, lambda scene: run(scene.mine.acquire())),
    "acquire over a dead sharer": (shared_by_a_dead_host, lambda scene: run(scene.mine.acquire())),
    "acquire over a living sharer": (
        lambda scene: run(scene.its.acquire(shared=True)), lambda scene: run(scene.mine.acquire()),
    ),
    "release": (exclusive, lambda scene: run(scene.mine.release())),
    "release shared": (shared, lambda scene: run(scene.mine.release())),
    "release after a conversion": (conversion_failed, lambda scene: run(scene.mine.release())),
    "settle": (conversion_failed, lambda scene: run(scene.mine.settle())),
    "convert up": (shared, lambda scene: run(scene.mine.convert(shared=False))),
    "convert up, overtaken": (
        shared_and_overtaken,
        lambda scene: run(scene.mine.convert(shared=False, give_up_at=FOREVER)),
    ),
    "convert up, not alone": (shared_by_both, lambda scene: run(scene.mine.convert(shared=False))),
    "convert down": (exclusive, lambda scene: run(scene.mine.convert(shared=True))),
}  # fmt: skip


def set_up(name: str) -> tuple[Scene, Callable[[Scene], None]]:
    """The scene before an operation, and the operation."""
    before, operation = OPERATIONS[name]
    scene = Scene(*two_hosts())
    before(scene)
    return scene, operation


def lease_ios(name: str) -> int:
    """How many I/Os the first host's operation has."""
    scene, operation = set_up(name)
    start = len(scene.world.io)
    try:
        operation(scene)
    except Refused:
        assert "living" in name or "not alone" in name
    return sum(io.host == 1 and io.offset >= MIB for io in scene.world.io[start:])


def break_at(scene: Scene, nth: int, fate: Fate, after: float) -> None:
    """The so manieth I/O of the lease from now on meets its fate; not counted are those of the lockspace."""
    left = nth

    def count(offset: int) -> None:
        nonlocal left
        if offset >= MIB:
            left -= 1
            if not left:
                scene.one.disk.fail(fate, "", offset, after=after)

    original = scene.one.disk._begin

    def begin(io: object, timeout: float) -> object:
        count(io.offset)  # type: ignore[attr-defined]
        return original(io, timeout)  # type: ignore[arg-type]

    scene.one.disk._begin = begin  # type: ignore[method-assign, assignment]


def settled(scene: Scene) -> None:
    """Settle until it succeeds."""
    for _ in range(TRIES):
        try:
            run(scene.mine.settle())
            return
        except BackendError:
            scene.world.advance(0.5)
    pytest.fail("never settled")


def taken(resource: Resource, world: World) -> bool:
    """Whether an exclusive acquire succeeds, in up to three tries."""
    for _ in range(3):
        try:
            run(resource.acquire(give_up_at=world.now + 3))
            return True
        except Refused:
            continue
    return False


def check_storage(scene: Scene) -> None:
    """What the storage says of the first host's hold is what it believes."""
    leader, record = scene.world.leader(), scene.world.record(1)
    let_go = leader.write_id != leader.owner_id and record.dblock.released
    owns = bool(leader.timestamp) and leader.owner_id == 1 and not let_go
    assert (owns, record.mode.shared) == (scene.mine.hold is Hold.EXCLUSIVE, scene.mine.hold is Hold.SHARED)


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_io_may_fail_in_every_way(name: str) -> None:
    """And the lease is neither lost nor held twice."""
    broken = 0
    for nth in range(1, lease_ios(name) + 1):
        for fate, after in WAYS:
            scene, operation = set_up(name)
            break_at(scene, nth, fate, after)
            try:
                operation(scene)
            except (BackendError, Cancelled):
                broken += 1
            scene.check()
            settled(scene)
            scene.one.disk.no_more_faults()
            scene.check()
            check_storage(scene)
            if scene.its.hold is not Hold.NONE:
                run(scene.its.release())
            other_can = taken(scene.its, scene.world)
            assert other_can == (scene.mine.hold is Hold.NONE), (name, nth, fate, after)
            scene.check()
            scene.world.advance(6)  # whatever lands late has landed
            if other_can:
                assert not taken(scene.mine, scene.world), (name, nth, fate, after)
                run(scene.its.release())
                assert taken(scene.mine, scene.world), (name, nth, fate, after)
            settled(scene)
            run(scene.mine.release())
            assert taken(scene.its, scene.world), (name, nth, fate, after)
    assert broken


def test_the_sweep_sees_a_lease_that_is_not_put_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """A settle that forgets the leader is caught by it."""

    async def forgetful(self: Resource) -> None:
        contest = self._contest
        if contest.unsettled:
            contest.unsettled = False
            await self._carry_out(contest.write_own(contest.written.dblock, sectors.NOT_SHARED))

    monkeypatch.setattr(Resource, "settle", forgetful)
    with pytest.raises(AssertionError):
        test_every_io_may_fail_in_every_way("acquire")


@pytest.mark.parametrize("nth", range(1, 4))
@pytest.mark.parametrize(("fate", "after"), WAYS, ids=str)
def test_a_join_may_fail_in_every_way(nth: int, fate: Fate, after: float) -> None:
    """After `leave` the next host has the id, at the latest after the long delay, and nobody has it twice."""
    world = World().make()
    first = Host(world, 1)
    first.disk.fail(fate, nth=nth, after=after)
    try:
        run(first.lockspace.join())
    except (BackendError, Cancelled):
        assert not first.lockspace.joined
    for _ in range(TRIES):
        try:
            run(first.lockspace.leave())
            break
        except BackendError:
            world.advance(0.5)
    assert not first.lockspace.joined
    second = Host(world, 1, name=b"second")
    for _ in range(2):
        try:
            run(second.lockspace.join())
            break
        except BackendError:
            world.advance(1)
    assert second.lockspace.joined
    world.advance(6)
    run(second.lockspace.renew())


@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize(("fate", "after"), WAYS, ids=str)
def test_a_renewal_may_fail_in_every_way(nth: int, fate: Fate, after: float) -> None:
    """Either it counts, or the age goes on; the next one decides."""
    world, one, _ = two_hosts()
    one.crash()
    renewed_at = one.lockspace.renewed_at
    one.disk.fail(fate, nth=nth, after=after)
    try:
        run(one.lockspace.renew())
    except (BackendError, Cancelled):
        assert one.lockspace.renewed_at == renewed_at
    for _ in range(TRIES):
        world.advance(0.5)
        try:
            run(one.lockspace.renew())
            break
        except BackendError:
            continue
    timed_out = nth == 2 and fate in (Fate.LOST, Fate.LATE)
    assert (one.lockspace.renewed_at == world.now) == (not timed_out)
    assert bool(one.lockspace.why_lost) == timed_out


def test_cancelled_while_waiting() -> None:
    """In any sleep there is: nothing was proposed, or it is settled."""
    world, one, two = two_hosts()
    resource = two.resource()
    run(resource.acquire())
    two.crash()
    world.advance(4)
    mine = one.resource()
    for sleep in (1, 5):
        one.clock.cancel_at = sleep
        with pytest.raises(Cancelled):
            run(mine.acquire(give_up_at=FOREVER))
        assert not mine.unsettled
