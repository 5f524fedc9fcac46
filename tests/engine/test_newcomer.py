"""What a host that has just joined may not do yet, and what one notices that waits for others."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from lockfs.paxos.errors import Refused
from lockfs.paxos.resource import Hold
from lockfs.records.results import Result
from tests.engine.fakes import Host, World, run, two_hosts

FOREVER = math.inf


def newcomer(*, passed: bool = True) -> tuple[World, Host]:
    """Two hosts of which the first does not trust the second to look before it clears a sharer."""
    world, one, _ = two_hosts()
    one.lockspace._looks_first = lambda name: False
    one.lockspace._entered_at = world.now
    if not passed:
        one.lockspace.watch.first_check = 0.0
    return world, one


@pytest.mark.parametrize("passed", [True, False])
def test_a_newcomer_shares_nothing_until_all_must_have_seen_it(passed: bool) -> None:
    """Without patience it is refused, with the time; with patience it waits until then."""
    world, one = newcomer(passed=passed)
    known_at = one.lockspace.known_at
    assert known_at > world.now
    with pytest.raises(Refused) as caught:
        run(one.resource().acquire(shared=True))
    assert (caught.value.result, caught.value.free_at) == (Result.SHARED_RETRIES, known_at)
    resource = one.resource()
    run(resource.acquire())
    with pytest.raises(Refused):
        run(resource.convert(shared=True))
    assert resource.hold is Hold.EXCLUSIVE
    run(resource.release())


def test_with_patience_it_waits() -> None:
    """And has what it asked for; its renewals go on meanwhile."""
    world, one = newcomer()
    known_at = one.lockspace.known_at
    resource = one.resource()
    run(resource.acquire(shared=True, give_up_at=FOREVER))
    assert resource.hold is Hold.SHARED
    assert world.now >= known_at


def test_who_trusts_all_waits_for_nobody() -> None:
    """lockfs hosts look at the storage first; so do hosts that have left."""
    world, one, two = two_hosts()
    assert one.lockspace.known_at == 0.0
    one.lockspace._looks_first = lambda name: True
    assert one.lockspace.known_at == 0.0
    one.lockspace._looks_first = lambda name: False
    two.crash()
    run(two.lockspace.leave())
    world.advance(3)
    assert one.lockspace.known_at == 0.0


def test_a_loser_notices_that_it_is_over() -> None:
    """While it backs off another host commits a version; the loser begins anew at once."""
    world, one, two = two_hosts()
    resource = one.resource()
    resource._random.random = lambda: 0.95  # type: ignore[method-assign]

    def won_by_two() -> None:
        leader = world.leader()
        world.change_leader(
            replace(leader, lver=leader.lver + 1, owner_id=2, owner_generation=1, timestamp=7)
        )

    world.at(world.now + 0.25, won_by_two)
    start = world.now
    run(resource._back_off(FOREVER, world.leader()))
    assert 0.25 <= world.now - start < 0.5
    two.crash()
