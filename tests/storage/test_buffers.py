"""Buffers for O_DIRECT: aligned, lent once, few kept, and none in a forked child."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

import pytest

from lockfs.storage.buffers import AREA_BUFFER_BYTES, KEPT_BUFFERS_MAX, Buffers


def address(buffer: mmap.mmap) -> int:
    """Where a buffer lies."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


@pytest.mark.parametrize(
    "length", [1, 512, mmap.PAGESIZE, mmap.PAGESIZE + 1, 1 << 20, (2 << 20) + 512, 8 << 20]
)
def test_aligned_and_long_enough(length: int) -> None:
    buffer = Buffers().take(length)
    assert len(buffer) >= length
    assert address(buffer) % mmap.PAGESIZE == 0


@pytest.mark.parametrize("length", [512, 1 << 20])
def test_lent_once_and_then_again(length: int) -> None:
    buffers = Buffers()
    first, second = buffers.take(length), buffers.take(length)
    assert address(first) != address(second)
    buffers.give_back(first)
    assert buffers.take(length) is first
    assert buffers.take(length) is not first


@pytest.mark.parametrize(
    ("length", "kept"), [(512, KEPT_BUFFERS_MAX), (1 << 20, KEPT_BUFFERS_MAX), (3 << 20, 0)]
)
def test_few_are_kept(length: int, kept: int) -> None:
    assert kept == 0 or length <= AREA_BUFFER_BYTES
    buffers = Buffers()
    lent = [buffers.take(length) for _ in range(KEPT_BUFFERS_MAX + 3)]
    for buffer in lent:
        buffers.give_back(buffer)
    again = [buffers.take(length) for _ in lent]
    assert sum(any(buffer is old for old in lent) for buffer in again) == kept


def test_a_fork_leaves_it_out() -> None:
    buffer = Buffers().take(1 << 20)
    start = address(buffer)
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split(" ", 1)[0]
        if "-" in first:
            low, high = (int(number, 16) for number in first.split("-"))
            inside = low <= start < high
        elif inside and first == "VmFlags:":
            assert "dc" in line.split()  # proc(5): do not copy area on fork
            return
    pytest.fail("the mapping was not found")
