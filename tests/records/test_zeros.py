"""Used sectors are found wherever they lie, and nothing that is not there counts as unused."""

from __future__ import annotations

from random import Random

import pytest

from lockfs.records.zeros import used_sectors

SECTORS = 700  # several runs of each length, and parts of them


@pytest.mark.parametrize("size", [512, 4096])
def test_every_sector_with_one_byte_is_found(size: int) -> None:
    """The first byte, the last, or any; alone or among others; never one outside what is asked about."""
    random = Random(size)
    for _ in range(60):
        area = bytearray(SECTORS * size)
        used = set(random.sample(range(SECTORS), random.choice((0, 1, 2, 40))))
        for number in used:
            area[number * size + random.choice((0, size - 1, random.randrange(size)))] = 1
        first, end = sorted(random.choices(range(SECTORS + 1), k=2))
        expected = sorted(number for number in used if first <= number < end)
        assert list(used_sectors(bytes(area), size, first, end)) == expected
        assert list(used_sectors(memoryview(area), size, first, end)) == expected


def test_an_area_that_is_too_short_is_refused() -> None:
    """Its missing end is not taken for zeros."""
    with pytest.raises(ValueError, match="1535 bytes are not 3 sectors of 512"):
        list(used_sectors(bytes(1535), 512, 1, 3))
    assert list(used_sectors(bytes(512), 512, 2, 2)) == []
