"""A simulation is worth what it catches: engines with a step missing, each caught within its seeds."""

from __future__ import annotations

import pytest

from tests.engine.simulation.variants import VARIANTS, Variant


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_the_variant_is_caught(variant: Variant) -> None:
    outcome = variant.first_caught()
    assert outcome is not None, f"{variant.seeds} seeds saw nothing wrong with {variant.name}"


def test_there_are_enough_of_them() -> None:
    assert len({variant.name for variant in VARIANTS}) >= 10
