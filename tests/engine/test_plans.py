"""Plans by single I/Os, as a disk without threads of its own carries them out (seams.Disk.carry_out)."""

from __future__ import annotations

import pytest

from lockfs.paxos.seams import DiskError, Plan, ToRead, ToWrite
from tests.engine.fakes import Cancelled, Fate, HostDisk, World, run

OLD, NEW = bytes(512), b"\x11" * 512


def disk() -> HostDisk:
    """One over an empty area."""
    return HostDisk(World(areas=1), 1)


def steps(seen: list[bytes]) -> Plan[str]:
    """Read a sector, write it, read it again."""
    seen.append(bytes((yield ToRead(512, 512, 1.0))))
    seen.append(bytes((yield ToWrite(512, NEW, 1.0))))
    seen.append(bytes((yield ToRead(512, 512, 1.0))))
    return "done"


def test_one_after_the_other() -> None:
    """A read is answered by its bytes, a write by none."""
    seen: list[bytes] = []
    assert run(disk().carry_out(steps(seen))) == "done"
    assert seen == [OLD, b"", NEW]


@pytest.mark.parametrize(("fate", "error"), [(Fate.REFUSED, DiskError), (Fate.CANCELLED, Cancelled)])
def test_what_fails_closes_the_plan(fate: Fate, error: type[BaseException]) -> None:
    """Nothing of it runs after the call."""
    failing, seen = disk(), list[bytes]()
    failing.fail(fate, "write")
    plan = steps(seen)
    with pytest.raises(error):
        run(failing.carry_out(plan))
    assert plan.gi_frame is None
    assert seen == [OLD]


def test_what_was_read_is_lent_until_the_next_step() -> None:
    """The simulation too finds a plan that keeps it."""

    def keeps() -> Plan[bytes]:
        kept = yield ToRead(512, 512, 1.0)
        yield ToRead(1024, 512, 1.0)
        return bytes(kept)

    with pytest.raises(ValueError, match="released"):
        run(disk().carry_out(keeps()))
