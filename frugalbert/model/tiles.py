"""Which tiles of an attention matrix a pattern needs: its text and a length in, lists of keys for tiles of queries out.

A tile is so many queries of one head, whose keys come in smaller blocks. Tiles that need about as many blocks are
computed together, padded to the most of them; the few that see nearly everything (global tokens) so stand alone.
No torch: plans say with it what skipping costs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .patterns import blocks, check_length, parse

if TYPE_CHECKING:
    import numpy as np

KEYS = 16
"""Keys of a block: fetching 16 at a time costs no more than fetching 64, and leaves fewer pairs."""
PAIR = {32: 2.1, 64: 1.4, 128: 1.1, 256: 1.0}
"""Queries of a tile, and what a pair costs in it (training at 2,048 tokens, 12 heads of 64: 1.9, 1.3, 1.1 and 1 in
fp32, 2.7, 1.8, 1.3 and 1 in bf16)."""
MOST_GROUPS = 3


@dataclass(frozen=True)
class Group:
    """Tiles that are computed together: (tiles,) numbers head * tiles per head + tile, and (tiles, K) numbers of their
    key blocks, -1 where there is none."""

    tiles: np.ndarray
    keys: np.ndarray


@functools.lru_cache(maxsize=256)
def groups(text: str, length: int, tile: int, block: int) -> tuple[Group, ...]:
    """The work of one head per pattern of the text. The blocks of the diagonal are always among the keys."""
    import numpy as np

    need = np.concatenate([_needed(index, text, length, tile, block) for index in range(len(parse(text)))])
    counts = need.sum(1)
    found: list[Group] = []
    least = 0
    for most in _cuts(counts):
        (tiles,) = np.nonzero((counts > least) & (counts <= most))
        order = np.argsort(~need[tiles], axis=1, kind="stable")[:, :most]
        keys = np.where(np.take_along_axis(need[tiles], order, 1), order, -1)
        found.append(Group(tiles, keys))
        least = most
    return tuple(found)


def _needed(index: int, text: str, length: int, tile: int, block: int) -> np.ndarray:
    """(tiles, blocks) bool of one head."""
    import numpy as np

    fine = blocks(parse(text)[index], length, block)
    step, rows = tile // block, -(-length // tile)
    need = np.zeros((rows * step, fine.shape[1]), bool)
    need[: len(fine)] = fine | np.eye(len(fine), dtype=bool)
    return np.logical_or.reduce(need.reshape(rows, step, -1), axis=1)


def _cuts(counts: np.ndarray) -> list[int]:
    """The largest count of each group, ascending: those (at most three) that leave the least padding."""
    import numpy as np

    values, numbers = np.unique(counts, return_counts=True)
    total = np.concatenate([[0], np.cumsum(numbers)])

    @functools.cache
    def best(end: int, left: int) -> tuple[float, tuple[int, ...]]:
        """Cost and cuts of the `end` smallest values in at most `left` groups."""
        whole = (float(total[end] * values[end - 1]), (int(values[end - 1]),))
        if left == 1 or end == 1:
            return whole
        parts = [
            (cost + float((total[end] - total[start]) * values[end - 1]), (*cuts, int(values[end - 1])))
            for start in range(1, end)
            for cost, cuts in [best(start, left - 1)]
        ]
        cheapest = min(parts)
        return cheapest if cheapest[0] < 0.9 * whole[0] else whole

    return list(best(len(values), MOST_GROUPS)[1])


def work(text: str, length: int, tile: int, block: int) -> float:
    """Which share of all pairs is computed, padding included."""
    pairs = sum(group.keys.size for group in groups(text, length, tile, block)) * tile * block
    return pairs / (len(parse(text)) * length**2)


@functools.lru_cache(maxsize=256)
def best(text: str, length: int) -> tuple[int, int]:
    """(queries of a tile, keys of a block) with the least cost. Raises ValueError for inputs that are too long."""
    check_length(text, length)
    return min(PAIR, key=lambda tile: PAIR[tile] * work(text, length, tile, KEYS)), KEYS
