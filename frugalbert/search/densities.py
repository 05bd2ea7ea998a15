"""Fixed patterns at a wanted density, so that masks can be compared fairly: a family and a density in, a pattern out.

A family is a pattern's text with one free whole number, such as `window:{}` or `strided:{}/16`, denser as it grows. The
papers' own settings have very different densities (SparseBERT's table: 70 to 96 % sparse); with one number for window
and stride, `strided` never gets sparser than 77 % at 128 tokens and `fixed` than 84 %, so both have separate ones here.
"""

from __future__ import annotations

import numpy as np

from frugalbert.model.patterns import Pattern, dense, density, pack, parse


def _around(family: str, wanted: float, length: int) -> tuple[str, str]:
    """The densest member that is not denser than wanted, and the next. Raises ValueError if the sparsest is denser."""
    start = 0 if _is_pattern(family.format(0)) else 1
    before = family.format(start)
    if density(before, length) > wanted:
        raise ValueError(
            f"{before} already has density {density(before, length):.3g} at {length} tokens; give {family} a smaller "
            f"other number, or compare at more than {wanted:.3g}"
        )
    for number in range(start + 1, length + 1):
        after = family.format(number)
        if density(after, length) > wanted:
            return before, after
        before = after
    return before, before


def _is_pattern(text: str) -> bool:
    try:
        parse(text)
    except ValueError:
        return False
    return True


def filled(family: str, wanted: float, length: int) -> str:
    """The densest member that is not too dense, and pairs of the next one, evenly spread, until the density is exact.

    A symmetric family stays symmetric, exact to one pair of pairs. The result is an explicit mask.
    """
    mask, larger = (dense(parse(text)[0], length) for text in _around(family, wanted, length))
    return explicit(_grown(mask, larger & ~mask, round(wanted * length**2)))


def _grown(mask: np.ndarray, more: np.ndarray, pairs: int) -> np.ndarray:
    mask, symmetric = mask.copy(), bool((mask == mask.T).all() and (more == more.T).all())
    free = np.flatnonzero(np.triu(more) if symmetric else more)
    room = pairs - int(mask.sum())
    wanted = max(0, room) / (2 if symmetric else 1)
    order = free[np.unique(np.linspace(0, len(free), min(len(free), round(wanted)), endpoint=False).astype(int))]
    for place in [*order.tolist(), *np.setdiff1d(free, order).tolist()]:
        i, j = divmod(place, len(mask))
        cost = 2 if symmetric and i != j else 1
        if cost <= room:
            room -= cost
            mask[i, j] = True
            mask[j, i] |= symmetric
    return mask


def explicit(mask: np.ndarray) -> str:
    """A square mask as a pattern."""
    return str(Pattern("explicit", (len(mask), pack(mask))))
