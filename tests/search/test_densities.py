"""Patterns at equal density: nearest members, exact fillings, families that cannot."""

import pytest

from frugalbert.model.patterns import dense, density, parse
from frugalbert.search.densities import closest, filled

LOGSPARSE = 1666 / 128**2
FAMILIES = ("window:{}", "strided:{}/16", "fixed:{}/1/16", "window:{}&0", "window:{}&0+64", "bigbird:1/{}/3/128&0")


@pytest.mark.parametrize("family", FAMILIES)
def test_filling_is_exact_and_lies_between_two_members(family: str):
    mask = dense(parse(filled(family, LOGSPARSE, 128))[0], 128)
    symmetric = not family.startswith("fixed")
    assert 1666 - mask.sum() in ((0, 1) if symmetric else (0,))
    assert (mask == mask.T).all() == symmetric
    number = int(closest(family, LOGSPARSE, 128).split(":")[1].split("/" if "{}/" in family else "&")[0]) \
        if not family.startswith("bigbird") else int(closest(family, LOGSPARSE, 128).split("/")[1])  # fmt: skip
    below, here, above = (dense(parse(family.format(number + step))[0], 128) for step in (-1, 0, 1))
    assert (below & here <= mask).all()
    assert (mask <= below | here | above).all()


def test_the_nearest_member():
    assert closest("window:{}", LOGSPARSE, 128) == "window:6"
    for number in (5, 7):
        assert abs(density("window:6", 128) - LOGSPARSE) < abs(density(f"window:{number}", 128) - LOGSPARSE)
    assert closest("window:{}", 1.0, 16) == "window:16"


def test_a_family_that_is_too_dense_says_so():
    with pytest.raises(ValueError, match="already has density 0.25 at 128 tokens; give strided:.*a smaller other"):
        closest("strided:{}/4", 0.1, 128)
