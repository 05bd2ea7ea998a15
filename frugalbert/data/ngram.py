"""Unigram and bigram baselines for a masked-LM validation: what a model that knows no context would lose.

In: the training rows and the masked positions of the validation rows. Out: mean cross-entropies in nats. The bigram
sees the true left neighbour, which the encoder may find masked, so it is the harder one to beat. It is an interpolated
Kneser-Ney model (Chen and Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling", 1999, section
4.1.6); its discount comes from the training counts alone (Ney, Essen and Kneser, 1994).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from frugalbert.data.rows import ShardSet
from frugalbert.run import check_stop

CHUNK_TOKENS = 4_000_000
MAX_TOKENS = 100_000_000


@dataclass(frozen=True, eq=False)
class Counts:
    """Unigram counts (V,), zero for special tokens, and bigrams: sorted keys left * V + right with their counts."""

    unigrams: np.ndarray
    keys: np.ndarray
    counts: np.ndarray
    ordinary: np.ndarray


def baselines(
    train: ShardSet, ids: np.ndarray, positions: np.ndarray, labels: np.ndarray, max_tokens: int = MAX_TOKENS
) -> dict[str, float]:
    """{"unigram_nll", "bigram_nll"}: mean nats per masked token, both trained on `train`.

    ids (R, T): the validation rows as they were before masking; positions (P,) into the flattened rows; labels (P,),
    of which negative ones are left out. At most `max_tokens` training tokens, spread evenly, bound time and memory
    (about 16 bytes per different bigram).
    """
    positions, labels = np.asarray(positions).ravel(), np.asarray(labels).ravel()
    used = labels >= 0
    right, left = labels[used].astype(np.int64), np.asarray(ids).ravel()[positions[used] - 1].astype(np.int64)
    if right.size == 0:
        raise ValueError("there is no masked position to measure the n-gram baselines at; give validation more rows")
    counts = count(train, max_tokens)
    return {
        "unigram_nll": float(-np.log(unigram(counts, right)).mean()),
        "bigram_nll": float(-np.log(bigram(counts, left, right)).mean()),
    }


def count(train: ShardSet, max_tokens: int = MAX_TOKENS) -> Counts:
    """Counts of ordinary tokens and of what stands left of them, in bounded memory."""
    size = train.vocab_size
    ordinary = np.ones(size, dtype=bool)
    ordinary[train.special["all"]] = False
    unigrams = np.zeros(size, dtype=np.int64)
    merged = pending = (np.empty(0, np.int64), np.empty(0, np.int64))
    for rows in _chunks(train, max_tokens):
        check_stop()
        right = rows[:, 1:].astype(np.int64)
        keep = ordinary[right]
        unigrams += np.bincount(right[keep], minlength=size)
        pairs = rows[:, :-1].astype(np.int64) * size + right
        pending = _merge(pending, np.unique(pairs[keep], return_counts=True))
        if len(pending[0]) > len(merged[0]):  # doubling keeps the number of large merges logarithmic
            merged, pending = _merge(merged, pending), (merged[0][:0], merged[1][:0])
    keys, counts = _merge(merged, pending)
    return Counts(unigrams, keys, counts, ordinary)


def unigram(counts: Counts, right: np.ndarray) -> np.ndarray:
    """Probabilities (P,) of tokens (P,), with one added to every ordinary token's count."""
    return (counts.unigrams[right] + 1) / (counts.unigrams.sum() + counts.ordinary.sum())


def bigram(counts: Counts, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Probabilities (P,) of tokens `right` (P,) after tokens `left` (P,)."""
    size = len(counts.unigrams)
    first, second = counts.keys // size, counts.keys % size
    total = np.bincount(first, weights=counts.counts, minlength=size)[left]
    followers = np.bincount(first, minlength=size)[left]
    preceded = np.bincount(second, minlength=size)
    lower = (preceded[right] + 1) / (len(counts.keys) + counts.ordinary.sum())
    key = left * size + right
    place = np.minimum(np.searchsorted(counts.keys, key), len(counts.keys) - 1)
    seen = np.where(counts.keys[place] == key, counts.counts[place], 0)
    once, twice = int((counts.counts == 1).sum()), int((counts.counts == 2).sum())
    discount = once / (once + 2 * twice) if once and twice else 0.5
    known = np.maximum(total, 1)
    interpolated = (np.maximum(seen - discount, 0) + discount * followers * lower) / known
    return np.where(total > 0, interpolated, unigram(counts, right))


def _chunks(train: ShardSet, max_tokens: int) -> Iterator[np.ndarray]:
    """The training rows, or evenly spread ones of them, some million tokens at a time."""
    wanted = min(train.rows, max(1, max_tokens // train.length))
    step = max(1, CHUNK_TOKENS // train.length)
    for start in range(0, wanted, step):
        chosen = np.arange(start, min(start + step, wanted), dtype=np.int64)
        yield train.take(chosen * train.rows // wanted)


def _merge(one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Sum two sorted lists of (keys, counts)."""
    keys, counts = np.concatenate([one[0], other[0]]), np.concatenate([one[1], other[1]])
    order = np.argsort(keys, kind="stable")
    keys, counts = keys[order], counts[order]
    first = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]]) if len(keys) else np.empty(0, np.int64)
    return keys[first], np.add.reduceat(counts, first) if len(first) else counts
