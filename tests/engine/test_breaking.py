"""What is said of a lease's holders, and a lease taken by force."""

from __future__ import annotations

from lockfs.paxos.area import Area
from lockfs.paxos.breaking import facts, free_by_force, told
from lockfs.paxos.resource import Hold
from lockfs.records.geometry import FILE_GEOMETRY, MIB
from tests.engine.fakes import NAME, Host, World, run, two_hosts


def said(host: Host) -> str:
    """All sentences, as that host has them now."""
    leader, holders = run(facts(Area(host.disk, MIB, FILE_GEOMETRY, 1), host.lockspace, NAME))
    return " ".join(told(holders, leader, host.lockspace))


def force(host: Host) -> None:
    """Take the lease by force."""
    run(free_by_force(Area(host.disk, MIB, FILE_GEOMETRY, 1), host.lockspace, NAME))


def held_by_two() -> tuple[World, Host, Host]:
    """The second of two hosts holds the lease, and both have been watched for a while."""
    world, one, two = two_hosts()
    run(two.resource().acquire())
    world.advance(10)
    return world, one, two


def test_a_free_lease() -> None:
    """Its last version is named."""
    _, one, _ = two_hosts()
    assert said(one) == "The lease is free; its last version is 0."


def test_the_life_of_a_holder() -> None:
    """Alive, silent, dead: with its id, its generation, and the sector that says so."""
    world, one, two = held_by_two()
    alive = said(one)
    assert alive.startswith("Version 1 of the lease is held by host 'host2' (host id 2, generation 1).")
    assert "sector 1 of /leases" in alive and alive.endswith("it may be alive.")
    two.crash()
    world.advance(20)
    assert said(one).endswith("it counts as dead after 68 s without a change.")
    world.advance(60)
    assert said(one).endswith("more than the 68 s after which a host has stopped writing: it is dead.")
    run(one.resource().acquire())
    assert "host id 1" in said(one)


def test_our_own() -> None:
    """Is told so."""
    _, _, two = held_by_two()
    assert said(two).endswith("That is this mount: lockfsctl fence frees the image.")


def test_a_life_that_is_over() -> None:
    """The host has left, or joined anew."""
    world, one, two = held_by_two()
    two.crash()
    run(two.lockspace.leave())
    assert "has left since" in said(one)
    Host(world, 2, name=b"again").join()
    assert "has joined anew, generation 2, since" in said(one)


def test_a_host_that_was_not_seen_yet() -> None:
    """Nothing is known of how long it is silent."""
    world, _, _ = held_by_two()
    late = Host(world, 3)
    run(late.lockspace.join())
    assert "changed 0 s ago" in said(late)


def test_force() -> None:
    """The lease is free, exclusive or shared, and can be had."""
    for shared in (False, True):
        world, one, two = two_hosts()
        run(two.resource().acquire(shared=shared))
        force(one)
        assert said(one).startswith("The lease is free")
        mine = one.resource()
        run(mine.acquire())
        assert mine.hold is Hold.EXCLUSIVE
        assert world.leader().owner_id == 1
