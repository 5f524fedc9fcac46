"""What may be changed through a description: where the storage can refuse it, it is told of it before.

See Keeper.bind. The lease is had when the description is bound, and nothing was changed through it yet.
"""

from __future__ import annotations

import os

import pytest

from lockfs.keeper.gate import Gate, GateState
from lockfs.keeper.grants import Kind

from .conftest import Bench
from .fakes import Caller

SIZE = 1000


@pytest.fixture
def binding(bench: Bench) -> Bench:
    """A mirror over a storage that can refuse descriptions, with an image."""
    bench.keeper.binds = True
    bench.write("image", b"x" * SIZE)
    return bench


@pytest.mark.parametrize("flags", [os.O_RDWR, os.O_WRONLY, os.O_RDWR | os.O_APPEND])
async def test_a_writers_own_description_is_bound(binding: Bench, flags: int) -> None:
    """Each one, not the one that has the lease's locks."""
    fhs = [await binding.open("image", flags) for _ in range(2)]
    own = [binding.handles.find(fh).descriptor for fh in fhs]
    assert [descriptor for descriptor, _ in binding.keeper.bound] == own
    for fh in fhs:
        await binding.mirror.release(fh)


async def test_readers_are_left_alone(binding: Bench) -> None:
    """They change nothing."""
    await binding.mirror.release(await binding.open("image"))
    assert not binding.keeper.bound


@pytest.mark.parametrize("access", [os.O_RDONLY, os.O_WRONLY, os.O_RDWR])
async def test_a_truncating_open_is_bound_before(binding: Bench, access: int) -> None:
    """The file has its old size when the description is bound."""
    fh = await binding.open("image", access | os.O_TRUNC)
    ((_, status),) = binding.keeper.bound
    assert status.st_size == SIZE and not (binding.path / "image").stat().st_size
    await binding.mirror.release(fh)


async def test_a_truncation_by_path_is_bound_before(binding: Bench) -> None:
    """It has no description: it is given one, which is closed again."""
    number = await binding.number("image")
    await binding.setattr(number, size=10)
    ((_, status),) = binding.keeper.bound
    assert status.st_size == SIZE and (binding.path / "image").stat().st_size == 10
    await binding.mirror.forget([(number, 1)])


@pytest.mark.parametrize("access", [os.O_RDONLY, os.O_RDWR])
async def test_a_new_file_is_bound(binding: Bench, access: int) -> None:
    """It was opened before there was a lease; bound it is after that."""
    flags = access | os.O_CREAT
    made, _ = await binding.mirror.create(1, b"new", 0o644, flags, Caller())
    own = binding.handles.find(made.fh).descriptor
    assert [descriptor for descriptor, _ in binding.keeper.bound] == ([own] if access else [])
    await binding.mirror.release(made.fh)


@pytest.mark.parametrize("access", [os.O_RDONLY, os.O_WRONLY, os.O_RDWR])
async def test_a_file_that_another_host_made_first_is_bound_once(binding: Bench, access: int) -> None:
    """A create that finds it there and truncates it binds a description before, and that is enough."""
    made, _ = await binding.mirror.create(1, b"image", 0o644, access | os.O_CREAT | os.O_TRUNC, Caller())
    ((_, status),) = binding.keeper.bound
    assert status.st_size == SIZE and not (binding.path / "image").stat().st_size
    await binding.mirror.release(made.fh)


async def test_what_is_about_to_write(binding: Bench) -> None:
    """The handles for writing whose gates ask, of that image only, and no dead ones.

    Not one whose gate is shut: its lock may be what refuses a write that is under way.
    """
    binding.write("other")
    binding.keeper.kind = Kind.PROVISIONAL
    waiting = await binding.open("image", os.O_RDWR)
    elsewhere = await binding.open("other", os.O_RDWR)
    binding.keeper.kind = Kind.LEASED
    writing = await binding.open("image", os.O_RDWR)
    reading = await binding.open("image")
    number = await binding.number("image")
    ask, handle = binding.mirror.surroundings, binding.handles.find(waiting)
    assert handle.gate is not None and handle.gate.state is GateState.ASK
    assert ask.unwritten(number) == [handle.descriptor]
    for state in (GateState.OPEN, GateState.SHUT):
        handle.gate = Gate(state)
        assert ask.unwritten(number) == []
    handle.gate, handle.dead = Gate(GateState.ASK), True
    assert ask.unwritten(number) == []
    for fh in (waiting, elsewhere, writing, reading):
        await binding.mirror.release(fh)
