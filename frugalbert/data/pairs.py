"""Sentence pairs: documents as sentences of token ids in; rows `[CLS] A [SEP] B [SEP] [PAD]…` and their labels out.

Next sentences as published by BERT (Devlin et al. 2019, arXiv 1810.04805, appendix A.2): consecutive sentences are
collected up to a target length, A is a random number of them, B is the rest or, in half of the pairs, sentences of
another document, and what was not used is put back. Sentence order as published by ALBERT (arXiv 1909.11942): A and B
of one passage, half of the pairs swapped. Every choice is drawn by a hash of the document's place, so the pairs do not
depend on who makes them. Another document is one with other tokens, and what is the true next is never called random.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import xxhash

from frugalbert.config import Shards

# A run of marks and what closes after it, before white space; marks of Chinese and Japanese; before line breaks.
# Possessive, and at the beginning of a run only: the time is linear in the text.
END = re.compile(r"(?<![.!?…])[.!?…]++[\"'”’»)\]]*+(?=\s++(\S))|[。！？]++[”’」』）]*+|(?<!\n)(?=\n)")
Span = tuple[int, int]
Pair = tuple[Span, Span, int]


def sentences(text: str) -> list[str]:
    """The text in parts that join to it. A sentence ends behind . ! ? … (and quotes or brackets that close after them)
    where white space and no lower-case letter follow, behind 。！？, and at a line break."""
    cuts = sorted({match.end() for match in END.finditer(text) if not (match[1] or "").islower()})
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True) if start < end]


@dataclass(frozen=True, eq=False)
class Documents:
    """Documents one after the other: token `ids`, `counts` (S,) tokens of each sentence, `sizes` (D,) sentences of each
    document. None is empty."""

    ids: np.ndarray
    counts: np.ndarray
    sizes: np.ndarray

    @classmethod
    def of(cls, ids: np.ndarray, counts: np.ndarray, sizes: np.ndarray) -> Documents:
        """Without sentences and documents that have no token."""
        sizes = np.bincount(np.repeat(np.arange(len(sizes)), sizes), counts > 0, len(sizes)).astype(np.int64)
        return cls(ids, counts[counts > 0], sizes[sizes > 0])

    def __add__(self, other: Documents) -> Documents:
        names = ("ids", "counts", "sizes")
        return Documents(*(np.concatenate([getattr(self, name), getattr(other, name)]) for name in names))

    def hashes(self) -> np.ndarray:
        """(D,) uint64, equal for documents of equal tokens."""
        ends = np.cumsum(self.counts)[np.cumsum(self.sizes) - 1] if len(self.sizes) else np.empty(0, np.int64)
        parts = np.split(self.ids, ends[:-1]) if len(ends) else []
        return np.array([xxhash.xxh3_64_intdigest(part.tobytes()) for part in parts], np.uint64)

    def cut(self, longest: int) -> tuple[list[int], list[int]]:
        """Where sentences of at most `longest` tokens begin in `ids`, and which of them begin a document; each with the
        end as its last. A longer sentence becomes equal parts."""
        parts = -(-self.counts // longest)
        size = np.repeat(-(-self.counts // parts), parts)
        place = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
        counts = np.minimum(size, np.repeat(self.counts, parts) - place * size)
        of_document = np.add.reduceat(parts, np.cumsum(self.sizes) - self.sizes)
        return np.cumsum([0, *counts]).tolist(), np.cumsum([0, *of_document]).tolist()


def make_rows(
    documents: Documents, own: int, section: Shards, length: int, name: str, special: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray, int]:
    """Rows (N, length) of pairs of the first `own` documents, labels (N,) uint8 (1 = random or swapped), and how many
    tokens were cut off. The others are there to be drawn from; `name` tells this file's draws from another's."""
    room = length - 3
    starts, first = documents.cut(max(1, room // 2))
    others = _Others(documents, starts, first) if section.pairs == "nsp" else None
    made: list[tuple[int, int, int, int, int]] = []
    lost = 0
    for number in range(own):
        draw = Random(xxhash.xxh3_64_intdigest(f"{name} {number} {length}".encode()))
        target = draw.randint(2, room) if draw.random() < section.short_share else room
        bounds = starts[first[number] : first[number + 1] + 1]
        found = _ordered(bounds, target, draw) if others is None else others.pairs(number, bounds, target, draw)
        kept = 0
        for a, b, label in found:
            after = a[1]
            a, b = _truncated(a, b, room, draw)
            mine = bounds[0] <= b[0] < bounds[-1]
            kept += a[1] - a[0] + (b[1] - b[0] if mine else 0)
            if label and others is not None and not mine:
                label = int(
                    not np.array_equal(documents.ids[slice(*b)], documents.ids[after : bounds[-1]][: b[1] - b[0]])
                )
            made.append((*a, *b, label))
        lost += bounds[-1] - bounds[0] - kept
    table = np.array(made, np.int64).reshape(-1, 5)
    return _assembled(documents.ids, table, length, special), table[:, 4].astype(np.uint8), lost


def _ordered(bounds: Sequence[int], target: int, draw: Random) -> Iterator[Pair]:
    """The two parts of each passage of a document, in order or swapped. A sentence that stands alone is halved."""
    at, last = 0, len(bounds) - 1
    while at < last:
        end = _enough(bounds, at, last, target)
        cut = bounds[draw.randrange(at + 1, end)] if end > at + 1 else (bounds[at] + bounds[end]) // 2
        a, b = (bounds[at], cut), (cut, bounds[end])
        if a[0] < a[1]:
            yield (b, a, 1) if draw.random() < 0.5 else (a, b, 0)
        at = end


def _enough(bounds: Sequence[int], at: int, last: int, target: int) -> int:
    """The end of the sentences from number `at` that have `target` tokens together, at least one, at most all."""
    end = at + 1
    while end < last and bounds[end] - bounds[at] < target:
        end += 1
    return end


class _Others:
    """Documents to draw random sentences from: each as likely as another, but never one with the same tokens."""

    def __init__(self, documents: Documents, starts: list[int], first: list[int]) -> None:
        self.starts, self.first, hashes = starts, first, documents.hashes()
        self.order = np.argsort(hashes, kind="stable").tolist()
        ordered = np.sort(hashes)
        self.low = np.searchsorted(ordered, hashes, "left").tolist()
        self.high = np.searchsorted(ordered, hashes, "right").tolist()

    def pairs(self, number: int, bounds: Sequence[int], target: int, draw: Random) -> Iterator[Pair]:
        """Pairs of a document: B is the rest of the passage or drawn. A sentence that stands alone is halved for a rest
        (BERT always draws then, which makes more than half of the pairs random)."""
        at, last = 0, len(bounds) - 1
        while at < last:
            end = _enough(bounds, at, last, target)
            cut = draw.randrange(at + 1, end) if end > at + 1 else end
            middle = bounds[cut] if cut < end else (bounds[at] + bounds[end]) // 2
            if draw.random() < 0.5 or middle == bounds[at]:
                a, end = (bounds[at], bounds[cut]), cut
                yield a, self._drawn(number, target - (a[1] - a[0]), draw), 1
            else:
                yield (bounds[at], middle), (middle, bounds[end]), 0
            at = end

    def _drawn(self, number: int, wanted: int, draw: Random) -> Span:
        low, high = self.low[number], self.high[number]
        place = draw.randrange(len(self.order) - (high - low))
        other = self.order[place if place < low else place + high - low]
        at = draw.randrange(self.first[other], self.first[other + 1])
        return self.starts[at], self.starts[_enough(self.starts, at, self.first[other + 1], wanted)]


def _truncated(a: Span, b: Span, room: int, draw: Random) -> tuple[Span, Span]:
    """As BERT does: a token off the longer one, from a random end, until both fit into `room`."""
    sizes = (a[1] - a[0], b[1] - b[0])
    if sum(sizes) <= room:
        return a, b
    half = ((room + 1) // 2, room // 2)
    left = (min(sizes[0], max(half[0], room - sizes[1])), min(sizes[1], max(half[1], room - sizes[0])))
    front = [draw.getrandbits(size - kept).bit_count() for size, kept in zip(sizes, left, strict=True)]
    return (a[0] + front[0], a[0] + front[0] + left[0]), (b[0] + front[1], b[0] + front[1] + left[1])


def _assembled(ids: np.ndarray, table: np.ndarray, length: int, special: dict[str, Any]) -> np.ndarray:
    rows = np.full((len(table), length), special["pad"], ids.dtype)
    rows[:, 0] = special["cls"]
    place, number = np.ones(len(table), np.int64), np.arange(len(table))
    flat = rows.reshape(-1)
    for start, end in ((table[:, 0], table[:, 1]), (table[:, 2], table[:, 3])):
        sizes = end - start
        before = np.cumsum(sizes) - sizes
        along = np.arange(sizes.sum())
        flat[np.repeat(number * length + place - before, sizes) + along] = ids[np.repeat(start - before, sizes) + along]
        place = place + sizes
        rows[number, place] = special["sep"]
        place = place + 1
    return rows
