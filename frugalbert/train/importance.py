"""Important units first: a masked LM and held-out rows in, the same function with its units in another order out.

So a slice of leading units keeps what matters (DynaBERT, arXiv 2004.04037, section 2.1; scores of Michel et al., arXiv
1905.10650). The rows are those that validation does not use.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from frugalbert.data.masking import Vocabulary
from frugalbert.model import slicing
from frugalbert.run import say
from frugalbert.train.batches import HeldOut
from frugalbert.train.objectives import MaskedLM

BATCHES, ROWS = 16, 32


def sort_by_importance(network: Any, shards: Path, length: int, vocabulary: Vocabulary, *, isolate: bool) -> None:
    """Put heads, feed-forward units and channels in the order of their importance for held-out rows, in place."""
    rows = HeldOut(shards, length, vocabulary, BATCHES * ROWS, at_end=True)
    objective, total = MaskedLM(isolate), None
    network.to(vocabulary.special.device).eval()
    count = len(rows.row_ids)
    for start in range(0, count, ROWS):
        network.zero_grad(set_to_none=True)
        for batch in rows.batches([(start, min(ROWS, count - start))]):
            objective.loss(network, batch).backward()
        scores = slicing.importance(network)
        total = scores if total is None else _added(total, scores)
    network.zero_grad(set_to_none=True)
    assert total is not None
    slicing.reorder(network, slicing.ranking(total))
    network.train()
    say(f"heads, feed-forward units and channels sorted by importance on {count} held-out rows")


def _added(one: slicing.Order, two: slicing.Order) -> slicing.Order:
    return {name: [a + b for a, b in zip(one[name], two[name], strict=True)] for name in one}
