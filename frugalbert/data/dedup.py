"""Which documents stay: exact and near duplicates go, and held-out text that training text repeats.

Works on the records of `parts`, never on text: 8 bytes a document for exact duplicates (a slice of the hashes at a
time), a band of MinHash signatures at a time for near ones (LSH; Leskovec, Rajaraman, Ullman, section 3.4). The first
document in the corpus order stays. The result does not depend on who prepared the records.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from frugalbert.data import parts
from frugalbert.run import check_stop

KEPT, DUPLICATE, NEAR_DUPLICATE, REPEATED, THINNED = range(5)
REASONS = ("", "duplicate", "near duplicate", "held-out text repeated in training", "left out by weight")
SLICE = 5_000_000  # hashes compared at once
REPEATED_SHARE = 0.8  # of a held-out document's longer lines, by length


def decide(paths: Sequence[Path], sizes: Sequence[int], mode: str, threshold: float) -> list[np.ndarray]:
    """One code per document (KEPT … REPEATED) for each part; `sizes` are their documents, `mode` is `corpus.dedup`."""
    starts = np.cumsum([0, *sizes])
    codes = np.zeros(starts[-1], np.uint8)
    if mode != "none":
        exact(lambda part: parts.load(paths[part], "records")[:, parts.HASH], starts, codes)
    if mode == "near":
        _near(paths, starts, codes, threshold)
    each = [codes[first:last] for first, last in zip(starts, starts[1:], strict=False)]
    _repeated(paths, each)
    return each


def exact(hashes_of: Callable[[int], np.ndarray], starts: np.ndarray, codes: np.ndarray) -> None:
    """Mark as DUPLICATE in `codes` (N,) all but the first of equal hashes; part p's stand at starts[p] … starts[p + 1],
    and `hashes_of(p)` reads them (uint64)."""
    passes = 1 + len(codes) // SLICE
    for number in range(passes if len(codes) else 0):
        check_stop()
        found = [_slice(hashes_of(part), number, passes) for part in range(len(starts) - 1)]
        hashes = np.concatenate([hashes for hashes, _ in found])
        places = np.concatenate([places + start for (_, places), start in zip(found, starts, strict=False)])
        order = np.argsort(hashes, kind="stable")
        same = hashes[order][1:] == hashes[order][:-1]
        codes[places[order[1:][same]]] = DUPLICATE


def _slice(hashes: np.ndarray, number: int, passes: int) -> tuple[np.ndarray, np.ndarray]:
    places = np.flatnonzero(hashes % np.uint64(passes) == number) if passes > 1 else np.arange(len(hashes))
    return hashes[places], places


def bands_for(threshold: float) -> tuple[int, int]:
    """(bands, rows of a band) whose chance of a common band rises steeply just below the similarity `threshold`."""
    for rows in range(parts.PERMUTATIONS, 1, -1):
        bands = parts.PERMUTATIONS // rows
        if (1 / bands) ** (1 / rows) <= threshold - 0.05:
            return bands, rows
    return parts.PERMUTATIONS, 1


def _near(paths: Sequence[Path], starts: np.ndarray, codes: np.ndarray, threshold: float) -> None:
    bands, rows = bands_for(threshold)
    multipliers = np.random.Generator(np.random.PCG64(0)).integers(1, 2**63, rows, dtype=np.uint64) * np.uint64(2) + 1
    cached = functools.lru_cache(64)(lambda number: parts.load(paths[number], "signatures"))

    def signature(place: int) -> np.ndarray:
        number = int(np.searchsorted(starts, place, "right")) - 1
        return cached(number)[place - starts[number]]

    for band in range(bands):
        check_stop()
        columns = slice(band * rows, (band + 1) * rows)
        hashes = np.concatenate(
            [(cached(number)[:, columns] * multipliers).sum(1, dtype=np.uint64) for number in range(len(paths))]
        )
        order = np.argsort(hashes, kind="stable")
        edges = np.flatnonzero(np.diff(hashes[order])) + 1
        for group in np.split(order, edges) if len(edges) < len(order) - 1 else ():
            alive = [int(place) for place in group if codes[place] == KEPT] if len(group) > 1 else []
            for place in alive[1:]:
                if (signature(alive[0]) == signature(place)).mean() >= threshold:
                    codes[place] = NEAR_DUPLICATE


def _repeated(paths: Sequence[Path], each: Sequence[np.ndarray]) -> None:
    """Mark the held-out documents most of whose longer lines stand in training documents too."""
    held = [parts.load(path, "held") for path in paths]
    wanted = np.unique(np.concatenate([lines[:, parts.LINE_HASH] for lines in held])) if held else np.empty(0)
    seen = np.zeros(len(wanted), bool)
    for path in paths if len(wanted) else ():
        check_stop()
        lines = parts.load(path, "train")
        places = np.minimum(np.searchsorted(wanted, lines), len(wanted) - 1)
        seen[places[wanted[places] == lines]] = True
    for lines, codes in zip(held, each, strict=True):
        repeated = seen[np.searchsorted(wanted, lines[:, parts.LINE_HASH])]
        documents, size = lines[:, parts.LINE_DOCUMENT].astype(np.int64), lines[:, parts.LINE_BYTES]
        total = np.bincount(documents, size, len(codes))
        share = np.bincount(documents, size * repeated, len(codes)) / np.maximum(total, 1)
        codes[(share >= REPEATED_SHARE) & (codes == KEPT)] = REPEATED


def copies(hashes: np.ndarray, held_out: np.ndarray, weight: float) -> np.ndarray:
    """How often each document enters the corpus: `weight` times, its fraction decided by the hash; held-out at most
    once."""
    mixed = hashes * np.uint64(0x9E3779B97F4A7C15)  # other bits than those that decide about holding out
    extra = mixed < np.uint64(min(int(weight % 1 * parts.SPACE), parts.SPACE - 1))
    number = np.minimum(int(weight) + extra, 255)
    return np.where(held_out, np.minimum(number, 1), number).astype(np.uint8)
