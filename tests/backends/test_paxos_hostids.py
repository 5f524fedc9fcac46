"""Which host ids a machine tries, and that two mounts of it never share one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from lockfs.backends.paxos.hostids import CHOICE, HostIds
from tests.conftest import ExpectLog

FREE = list(range(1, 101))


@pytest.fixture
def made() -> Iterator[list[HostIds]]:
    """What the test opened; let go of at the end."""
    several: list[HostIds] = []
    yield several
    for ids in several:
        for host_id in FREE:
            ids.let_go(host_id, keep=False)


def mount(made: list[HostIds], state: Path, area: str = "/dev/a", lockspace: bytes = b"one") -> HostIds:
    """One more mount of the machine."""
    made.append(HostIds(str(state), area, lockspace))
    return made[-1]


def test_new_ids_are_low_and_by_chance(tmp_path: Path, made: list[HostIds]) -> None:
    """Hosts that start together seldom try the same id, and ids stay small."""
    ids = mount(made, tmp_path)
    orders = [ids.candidates(FREE, Random(seed)) for seed in range(8)]
    assert all(sorted(order) == FREE[:CHOICE] for order in orders)
    assert len({order[0] for order in orders}) > 1
    assert not (tmp_path / "host-ids").exists()


def test_a_kept_id_comes_first(tmp_path: Path, made: list[HostIds]) -> None:
    """The id of the last mount is tried before any other, if it is free."""
    first = mount(made, tmp_path)
    assert first.hold(77)
    first.let_go(77, keep=True)
    later = mount(made, tmp_path)
    assert later.candidates(FREE, Random(0))[0] == 77
    assert 77 not in later.candidates(FREE[:50], Random(0))


def test_without_a_free_id_kept_ones_are_waited_out(tmp_path: Path, made: list[HostIds]) -> None:
    """An id that this machine could not leave is its own to wait for, if there is no other."""
    first = mount(made, tmp_path)
    assert first.hold(9)
    first.let_go(9, keep=True)
    assert mount(made, tmp_path).candidates([], Random(0)) == [9]


def test_an_id_that_is_not_kept_is_forgotten(tmp_path: Path, made: list[HostIds]) -> None:
    first = mount(made, tmp_path)
    assert first.hold(77)
    first.let_go(77, keep=False)
    first.let_go(77, keep=False)  # again is no error
    assert 77 not in mount(made, tmp_path).candidates(FREE, Random(0))


def test_two_mounts_never_have_one_id(tmp_path: Path, made: list[HostIds]) -> None:
    """What one mount has, another of the machine does not get until it lets go."""
    one, other = mount(made, tmp_path), mount(made, tmp_path)
    assert one.hold(5)
    assert not other.hold(5)
    assert other.hold(6)
    one.let_go(5, keep=True)
    assert other.hold(5)


def test_lockspaces_and_areas_are_apart(tmp_path: Path, made: list[HostIds]) -> None:
    """Ids of one lockspace say nothing of another, nor of one of the same name elsewhere."""
    assert mount(made, tmp_path).hold(5)
    assert mount(made, tmp_path, lockspace=b"two").hold(5)
    assert mount(made, tmp_path, area="/dev/b").hold(5)


def test_other_files_are_no_ids(tmp_path: Path, made: list[HostIds]) -> None:
    """Whatever else lies in the directory is passed over."""
    ids = mount(made, tmp_path)
    assert ids.hold(3)
    (directory,) = (tmp_path / "host-ids").iterdir()
    for name in ("3.bak", "99999", "-4", "notes"):
        (directory / name).touch()
    ids.let_go(3, keep=True)
    assert ids.candidates([1, 3, 4], Random(0))[0] == 3
    assert ids.candidates([], Random(0)) == [3]


def test_a_state_directory_that_cannot_be_written(
    tmp_path: Path, made: list[HostIds], expect_log: ExpectLog
) -> None:
    """The mount goes on without keeping an id, and says so once."""
    expect_log("WARNING .*hostids: The host id cannot be kept in .*: Not a directory", 1)
    (tmp_path / "file").touch()
    ids = mount(made, tmp_path / "file")
    assert ids.hold(1)
    assert ids.hold(2)
    ids.let_go(1, keep=True)
    assert set(ids.candidates([1, 2], Random(0))) == {1, 2}


def test_a_planted_link_is_not_followed(tmp_path: Path, made: list[HostIds], expect_log: ExpectLog) -> None:
    """No file elsewhere is made, locked or removed."""
    expect_log("WARNING .*cannot be kept", 1)
    ids = mount(made, tmp_path)
    assert ids.hold(1)
    (directory,) = (tmp_path / "host-ids").iterdir()
    os.symlink(tmp_path / "victim", directory / "2")
    assert ids.hold(2)
    assert not (tmp_path / "victim").exists()
