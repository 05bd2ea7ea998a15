"""Numbers of tokens in; which texts are computed together out, so that little padding is.

Sorting by length before batching is common (sentence-transformers does); here a batch is a number of tokens instead of
rows, and it also ends where its padding would cost more than a call of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

BUDGET = 2048
"""Tokens per call, padding included: enough to fill two cores (`benchmarks/serving.py`)."""
GPU_BUDGET = 32768
PADDING = 16
"""A batch ends when one of so many of its tokens would be padding: a further call is cheaper then."""
Batches = list[np.ndarray[Any, Any]]


def by_length(lengths: Sequence[int], budget: int = BUDGET, workers: int = 1) -> Batches:
    """Batches of texts of about the same length, longest first: every text once, none wider than `budget` tokens.

    A text longer than `budget` is a batch of its own. Of few texts each of the `workers` gets a share. Returns indices
    into `lengths`.
    """
    budget = min(budget, -(-sum(lengths) // workers))
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    batches: Batches = []
    start = padded = 0
    for place, text in enumerate(order):
        longest = lengths[order[start]]
        more = longest - lengths[text]
        if place > start and ((place - start + 1) * longest > budget or padded + more > budget // PADDING):
            batches.append(order[start:place])
            start, padded, more = place, 0, 0
        padded += more
    return [*batches, order[start:]] if len(order) else []


def in_order(lengths: Sequence[int], rows: int) -> Batches:
    """Batches of `rows` texts as they come: what is compared with."""
    return [np.arange(start, min(start + rows, len(lengths))) for start in range(0, len(lengths), rows)]


def padding(lengths: Sequence[int], batches: Batches) -> float:
    """Share of the computed tokens that are padding."""
    sizes = np.asarray(lengths)
    computed = sum(len(batch) * int(sizes[batch].max()) for batch in batches)
    return 1.0 - int(sizes.sum()) / computed if computed else 0.0
