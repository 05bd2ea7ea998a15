"""Patterns at equal density: exact fillings, families that cannot."""

import pytest

from frugalbert.model.patterns import dense, parse
from frugalbert.search import densities
from frugalbert.search.densities import filled

LOGSPARSE = 1666 / 128**2
FAMILIES = ("window:{}", "strided:{}/16", "fixed:{}/1/16", "window:{}&0", "window:{}&0+64", "bigbird:1/{}/3/128&0")


@pytest.mark.parametrize("family", FAMILIES)
def test_filling_is_exact_and_lies_between_two_members(family: str):
    mask = dense(parse(filled(family, LOGSPARSE, 128))[0], 128)
    symmetric = not family.startswith("fixed")
    assert 1666 - mask.sum() in ((0, 1) if symmetric else (0,))
    assert (mask == mask.T).all() == symmetric
    below, above = (dense(parse(member)[0], 128) for member in densities._around(family, LOGSPARSE, 128))
    assert below.sum() <= mask.sum() < above.sum()
    assert (below <= mask).all()
    assert (mask <= below | above).all()


def test_everything_is_the_densest_member():
    assert dense(parse(filled("window:{}", 1.0, 16))[0], 16).all()


def test_a_family_that_is_too_dense_says_so():
    with pytest.raises(ValueError, match="already has density 0.25 at 128 tokens; give strided:.*a smaller other"):
        filled("strided:{}/4", 0.1, 128)
