"""Training and validation batches: shard sets in, masked micro-batches on the device out.

A batch is a pure function of (shards, seed, positions in the sample sequence, progress): nothing here has a state, so a
run continues in O(1), with any number of ranks. Row lengths follow each other as phases of the budget (`phases.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from frugalbert import dist
from frugalbert.config import Attention, Mask, Training
from frugalbert.data.masking import IGNORED, Batch, Vocabulary, mlm_batch, with_pairs
from frugalbert.data.rows import RowOrder, ShardSet, gather_rows, rank_share, to_device
from frugalbert.train.phases import Span, at, spans
from frugalbert.train.state import Drawn

# Whatever training masks, so that losses stay comparable. Every slot shows [MASK]: of BERT's 80/10/10 a tenth shows the
# answer, and a model of text without any order would beat the unigram.
VALIDATION_MASK, VALIDATION_SEED = Mask(rate=(0.15,), style="mask"), 0


@dataclass(frozen=True, eq=False)
class Micro:
    """One micro-batch and its shares of the global batch's masked tokens, real tokens and rows (numbers on the
    device)."""

    batch: Batch
    masked_share: Tensor
    token_share: Tensor
    row_share: Tensor = torch.ones(())


def mask_rate(settings: Mask, progress: float) -> float:
    """From the first rate to the second, linearly over the budget."""
    return settings.rate[0] + (settings.rate[-1] - settings.rate[0]) * progress


class HalfOrder:
    """Rows in two halves, for weights and masks in turn, batch by batch (DARTS, arXiv 1806.09055): a row order whose
    even batches of `size` hold even rows, and whose odd ones odd rows."""

    def __init__(self, rows: int, seed: int, size: int) -> None:
        self.order, self.size = RowOrder(rows // 2, seed), size

    def take(self, start: int, count: int) -> np.ndarray:
        batch, first = divmod(start, self.size)
        return 2 * self.order.take(batch // 2 * self.size + first, count) + batch % 2

    def epochs(self, start: int, count: int) -> np.ndarray:
        batch, first = divmod(start, self.size)
        return self.order.epochs(batch // 2 * self.size + first, count)


class Sampler:
    """Global batches of a run. `lengths` are the row lengths in the order of the phases."""

    def __init__(
        self, section: Training, shards: Path, lengths: Sequence[int], vocabulary: Vocabulary, tokenizer_sha256: str
    ) -> None:
        self.section, self.first, self.vocabulary = section, lengths[0], vocabulary
        self.spans = spans(section, self.first)
        self.device = vocabulary.special.device
        check = {"verify": dist.is_main(), "tokenizer_sha256": tokenizer_sha256}
        self.sets = {length: ShardSet.open(shards, length, "train", **check) for length in set(lengths)}
        self.rows = {length: to_device(found, self.device) for length, found in self.sets.items()}
        self.orders: dict[int, RowOrder | HalfOrder] = {}
        for length, found in self.sets.items():
            self.orders[length] = RowOrder(found.rows, section.seed)
            if isinstance(section, Attention) and section.levels == 2:
                self.orders[length] = HalfOrder(found.rows, section.seed, self.batch_size(length))

    def batch_size(self, length: int) -> int:
        """Rows of the largest global batch where rows of this length are first used."""
        first = next(span.schedule for span in self.spans if span.length == length)
        sizes = [span.rows for span in self.spans if (span.length, span.schedule) == (length, first)]
        return max(dist.world(), *sizes)

    def draw(self, progress: float, samples: dict[str, int], micro_batch: int) -> Drawn:
        """The next global batch; `samples` says how many rows of each length have been used."""
        span = at(self.spans, progress)
        length, size = span.length, max(dist.world(), span.rows)
        rate = mask_rate(self.section.mask, progress)
        start = samples.get(str(length), 0)
        at_once = max(1, micro_batch * self.first // length)
        batches = [self._masked(span, first, count, rate) for first, count in my_pieces(start, size, at_once)]
        after = {**samples, str(length): start + size}
        epochs = sum(used / self.sets[int(name)].rows for name, used in after.items())
        micros, tokens = shares(batches)
        return Drawn(micros, tokens, after, epochs, {"mask_rate": rate, "length": float(length)})

    def _masked(self, span: Span, start: int, count: int, rate: float) -> Batch:
        order = self.orders[span.length]
        row_ids, epochs = order.take(start, count), order.epochs(start, count)
        rows = gather_rows(self.rows[span.length], row_ids, self.device)
        numbers = [torch.from_numpy(array).to(self.device, non_blocking=True) for array in (row_ids, epochs)]
        batch = mlm_batch(rows, *numbers, span.mask, rate, self.section.seed, self.vocabulary)
        return labelled(batch, rows, self.sets[span.length], row_ids, self.vocabulary)


def labelled(batch: Batch, rows: Tensor, found: ShardSet, row_ids: np.ndarray, vocabulary: Vocabulary) -> Batch:
    """The batch with segments and labels, if the rows are sentence pairs."""
    if found.labels is None:
        return batch
    labels = torch.from_numpy(found.labels[row_ids]).to(rows.device, non_blocking=True)
    return with_pairs(batch, rows, labels, vocabulary)


def my_pieces(start: int, size: int, at_once: int) -> list[tuple[int, int]]:
    """This rank's part of `size` samples from `start` as (start, count) pieces of about `at_once`, equal within one.

    Every rank has the same number of pieces, for which FSDP and signals make them wait for each other, and none is
    empty; so one may hold a sample more than `at_once` where the ranks' parts differ.
    """
    world = dist.world()
    largest = -(-size // world)
    number = min(-(-largest // at_once), size // world)
    first, count = rank_share(start, size, dist.rank(), world)
    cuts = [first + count * index // number for index in range(number + 1)]
    return [(low, high - low) for low, high in zip(cuts, cuts[1:], strict=False)]


def shares(batches: Sequence[Batch]) -> tuple[list[Micro], Tensor]:
    """Micro-batches with their shares of the totals over all of them and all ranks, and the number of real tokens."""
    counts = torch.stack([_counts(batch) for batch in batches]).double()
    totals = dist.sum_over_ranks(counts.sum(0))
    parts = (counts / totals.clamp(min=1)).float()
    micros = [Micro(batch, *part.unbind()) for batch, part in zip(batches, parts, strict=True)]
    return micros, totals[1]


def _counts(batch: Batch) -> Tensor:
    rows = torch.full((), len(batch.input_ids), device=batch.input_ids.device)
    return torch.stack([(batch.labels != IGNORED).sum(), (batch.document_ids > 0).sum(), rows])


# ---- validation ------------------------------------------------------------------------------------------------------


class HeldOut:
    """The fixed rows and masks on which every validation of every run with these shards is made."""

    def __init__(self, shards: Path, length: int, vocabulary: Vocabulary, rows: int, *, at_end: bool = False) -> None:
        """`rows` of them, or all; `at_end`: those that a validation of fewer rows does not use."""
        self.set = ShardSet.open(shards, length, "held_out", verify=dist.is_main())
        count = min(rows, self.set.rows)
        if count < dist.world():
            raise ValueError(f"{count} validation rows cannot be shared by {dist.world()} ranks; use fewer ranks")
        self.row_ids = RowOrder(self.set.rows, VALIDATION_SEED).take(self.set.rows - count if at_end else 0, count)
        self.vocabulary, self.device = vocabulary, vocabulary.special.device

    def batches(self, pieces: Sequence[tuple[int, int]]) -> Iterator[Batch]:
        """The held-out rows of each (start, count) piece, masked."""
        for start, count in pieces:
            chosen = self.row_ids[start : start + count]
            rows = gather_rows(self.set, chosen, self.device)
            numbers = torch.from_numpy(chosen).to(self.device)
            rate = VALIDATION_MASK.rate[0]
            batch = mlm_batch(
                rows, numbers, torch.zeros_like(numbers), VALIDATION_MASK, rate, VALIDATION_SEED, self.vocabulary
            )
            yield labelled(batch, rows, self.set, chosen, self.vocabulary)

    def measure(
        self, score: Callable[[Batch], dict[str, tuple[Tensor, Tensor]]], at_once: int, pause: Callable[[], None]
    ) -> dict[str, float]:
        """Means over the held-out rows. `score(batch)` gives (sum, count) of each figure; all ranks must call it."""
        sums: dict[str, Tensor] = {}
        for batch in self.batches(my_pieces(0, len(self.row_ids), at_once)):
            pause()
            for name, (total, count) in score(batch).items():
                part = torch.stack([total.double(), count.double()])
                sums[name] = sums[name] + part if name in sums else part
        values = dist.sum_over_ranks(torch.stack(list(sums.values())))
        return {name: total / max(1.0, count) for name, (total, count) in zip(sums, values.tolist(), strict=True)}
