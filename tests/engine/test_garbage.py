"""Any bytes in any sector before any operation: success, or an error that names it and comes before a write.

A release writes this host's own sector before it looks at the leader, as the format has it: so nothing but
that may be written when it fails. Bytes that pass the checksum as well are part of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lockfs.errors import BackendError
from lockfs.paxos.errors import EngineError
from lockfs.paxos.owners import ownership
from lockfs.paxos.requests import request
from lockfs.paxos.resource import Hold, Resource
from lockfs.records import sectors
from lockfs.records.geometry import MIB
from lockfs.records.results import RecordError
from tests.engine.fakes import NAME, NUM_HOSTS, SPACE, Host, World, run, two_hosts

LOCKSPACE_SECTORS = 8


class Case:
    """A world with a lease in some state, and an operation on it."""

    def __init__(self, state: str) -> None:
        self.world, self.one, self.two = two_hosts()
        self.mine: Resource = self.one.resource()
        if state == "busy":
            run(self.two.resource().acquire())
            self.world.advance(1)
        elif state == "shared elsewhere":
            run(self.two.resource().acquire(shared=True))
        elif state != "free":
            run(self.mine.acquire(shared=state == "shared"))
        self.one.crash()
        self.two.crash()

    async def ask(self) -> None:
        """Ask the owner."""
        await request(self.mine.area, self.one.lockspace, NAME, 2)

    async def look(self) -> None:
        """Who holds it."""
        await ownership(self.mine.area, SPACE, NAME)

    async def join(self) -> None:
        """Another host."""
        await Host(self.world, 3).lockspace.join()


OPERATIONS: dict[str, tuple[str, Callable[[Case], None]]] = {
    "join": ("free", lambda case: run(case.join())),
    "renew": ("free", lambda case: run(case.one.lockspace.renew())),
    "acquire": ("free", lambda case: run(case.mine.acquire())),
    "acquire shared": ("free", lambda case: run(case.mine.acquire(shared=True))),
    "acquire, busy": ("busy", lambda case: run(case.mine.acquire())),
    "acquire, shared elsewhere": ("shared elsewhere", lambda case: run(case.mine.acquire())),
    "request": ("busy", lambda case: run(case.ask())),
    "look": ("busy", lambda case: run(case.look())),
    "convert up": ("shared", lambda case: run(case.mine.convert(shared=False))),
    "convert down": ("held", lambda case: run(case.mine.convert(shared=True))),
    "release": ("held", lambda case: run(case.mine.release())),
    "release shared": ("shared", lambda case: run(case.mine.release())),
}
FIELDS = [4, 8, 24, 32, 40, 48, 128, 136, 152, 168, 174]
"""Where fields begin, of one record or another."""
LOOKS_LATE = ("convert down", "release")

PIECES = st.one_of(
    st.binary(min_size=1, max_size=512),
    st.integers(0, 2**64 - 1).map(lambda number: number.to_bytes(8, "little")),
    st.integers(0, 2**32 - 1).map(lambda number: number.to_bytes(4, "little")),
)


def damage(world: World, offset: int, at: int, data: bytes, *, summed: bool) -> None:
    """Overwrite part of a sector; with `summed`, its checksum is made right again."""
    data = data[: 512 - at]
    world.put(offset + at, data)
    if not summed:
        return
    if offset < MIB or offset == MIB:
        with contextlib.suppress(BackendError):
            world.put(offset, sectors.decode_leader(world.sector(offset)).summed().encode())
    elif offset != MIB + 512:
        world.put(offset, sectors.decode_host(world.sector(offset)).dblock.summed().encode())


@pytest.mark.parametrize("name", OPERATIONS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    place=st.one_of(
        st.integers(0, LOCKSPACE_SECTORS - 1).map(lambda sector: sector * 512),
        st.integers(0, 2 + NUM_HOSTS).map(lambda sector: MIB + sector * 512),
    ),
    at=st.one_of(st.just(0), st.integers(0, 511), st.sampled_from(FIELDS)),
    data=PIECES,
    summed=st.booleans(),
)
def test_any_bytes_in_any_sector(name: str, place: int, at: int, data: bytes, summed: bool) -> None:
    """The error family, with a sector's name where a record is at fault."""
    state, operation = OPERATIONS[name]
    case = Case(state)
    damage(case.world, place, at, data, summed=summed)
    before = len(case.world.io)
    try:
        operation(case)
    except RecordError as error:
        assert error.sector is not None
        assert f"sector {error.sector} of /leases" in str(error)
        written = {io.offset for io in case.world.writes(before)}
        assert written <= ({case.world.host_offset(1)} if name in LOOKS_LATE else set()), error
    except EngineError:
        pass
    if case.mine.hold is Hold.EXCLUSIVE and name.startswith(("acquire", "convert up")):
        leader = case.world.leader()
        assert (leader.owner_id, leader.intact) == (1, True)
