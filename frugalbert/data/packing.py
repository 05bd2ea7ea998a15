"""Packing: documents as runs of token ids in, shard files of fixed-length rows out, no token discarded.

A row is `[CLS] piece [SEP] [CLS] piece [SEP] [PAD]…`; a document longer than a row's rest continues in the next one.
Packing as in RoBERTa's FULL-SENTENCES (arXiv 1907.11692, section 4.2), with the pieces of different documents kept
apart; short pieces as in BERT's sample builder (Devlin et al. 2019), without its losses.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from frugalbert import run
from frugalbert.config import Shards

SPLITS = ("train", "held_out")
LABELS = ".labels"  # of sentence pairs: a byte for each row, in a file beside that of the rows
DRAW = 1  # seed of the hash that draws short pieces: other bits than those that decide about holding out
Writers = dict[tuple[int, str], "RowWriter"]


# ---- the shards of one task ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_writers(task: dict[str, Any]) -> Iterator[Writers]:
    """A writer per length and split, for the shards number `task["position"]`; a failure inside leaves no file."""
    section = Shards.model_validate(task["section"])
    with contextlib.ExitStack() as stack:
        yield {
            (length, split): stack.enter_context(
                RowWriter(Path(task["out"]), f"{split}-{task['position']:05d}", length, section, task)
            )
            for length in section.length
            for split in SPLITS
        }


def add(writers: Writers, ids: np.ndarray, counts: np.ndarray, held_out: np.ndarray, hashes: np.ndarray | None) -> None:
    """Append documents to the shards of their split: ids one after the other, and for each document (D,) its number of
    tokens, whether it is held out, and 64 random bits that decide about short pieces."""
    for split in SPLITS:
        mine = held_out == (split == "held_out")
        chosen = ids[np.repeat(mine, counts)]
        for (_, name), writer in writers.items():
            if name == split:
                writer.add(chosen, counts[mine], None if hashes is None else hashes[mine])


def finish(writers: Writers) -> dict[str, dict[str, Any]]:
    """Close all shards; their entries for the index by length and split."""
    sets: dict[str, dict[str, Any]] = {}
    for (length, split), writer in writers.items():
        sets.setdefault(str(length), {})[split] = writer.finish()
    return sets


def disarm(ids: np.ndarray, special: dict[str, Any]) -> int:
    """Replace, in place, every special token of a text by [UNK]; their number."""
    forged = np.isin(ids, [found for found in special["all"] if found != special["unk"]])
    ids[forged] = special["unk"]
    return int(forged.sum())


class RowWriter:
    """One shard file in the making: documents in, full rows out; under a temporary name until `finish`.

    `task` gives the ids of the special tokens and the type of the numbers. A context manager: a failure inside leaves
    no file. A shard without rows is not written.
    """

    def __init__(self, out: Path, name: str, length: int, section: Shards, task: dict[str, Any]) -> None:
        self.path = out / f"length-{length}" / f"{name}.bin"
        self.length, self.section, self.special = length, section, task["special"]
        self.dtype = np.dtype(task["dtype"]).newbyteorder("<")
        self.figures = dict.fromkeys(("rows", "tokens", "documents", "document_tokens"), 0)
        self._open_row = np.empty(0, self.dtype)
        self._labels: list[bytes] = []
        self._digest = hashlib.sha256()

    def __enter__(self) -> RowWriter:
        self.path.parent.mkdir(exist_ok=True)
        descriptor, self._temporary = tempfile.mkstemp(prefix=f".tmp-{self.path.name}-", dir=self.path.parent)
        self._file = os.fdopen(descriptor, "wb")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._temporary)

    def add(self, ids: np.ndarray, counts: np.ndarray, hashes: np.ndarray | None = None) -> None:
        """Append documents: their ids one after the other, the number of tokens of each, and for `short_share` 64
        random bits of each."""
        limits = None if hashes is None else piece_limits(hashes, self.length, self.section.short_share).tolist()
        starts, sizes, end = layout(counts.tolist(), self.length, len(self._open_row), self.section, limits)
        space = np.full(-(-end // self.length) * self.length, self.special["pad"], self.dtype)
        space[: len(self._open_row)] = self._open_row
        first = np.cumsum(sizes) - sizes  # of each piece, in ids
        space[np.repeat(starts + 1 - first, sizes) + np.arange(len(ids))] = ids
        space[starts] = self.special["cls"]
        space[starts + sizes + 1] = self.special["sep"]
        full = end // self.length * self.length
        self._write(space[:full])
        self._open_row = space[full:end]
        self.figures["tokens"] += len(ids) + 2 * len(starts)
        self.figures["documents"] += int((counts > 0).sum())
        self.figures["document_tokens"] += len(ids)

    def add_pairs(self, rows: np.ndarray, labels: np.ndarray, documents: int, truncated: int) -> None:
        """Append finished rows (N, length) of sentence pairs with their labels (N,): of so many documents, of which so
        many tokens were cut off."""
        self._write(rows.astype(self.dtype).reshape(-1))
        self._labels.append(labels.tobytes())
        tokens = int((rows != self.special["pad"]).sum())
        found = {"tokens": tokens, "documents": documents, "document_tokens": tokens - 3 * len(rows)}
        for name, count in {**found, "random": int(labels.sum()), "truncated": truncated}.items():
            self.figures[name] = self.figures.get(name, 0) + count

    def finish(self) -> dict[str, Any]:
        """Pad the last row, move the file to its name; the shard's entry for the index."""
        if len(self._open_row):
            row = np.full(self.length, self.special["pad"], self.dtype)
            row[: len(self._open_row)] = self._open_row
            self._write(row)
        self._file.flush()
        os.fsync(self._file.fileno())
        entry = {"name": self.path.name, "sha256": self._digest.hexdigest(), **self.figures}
        if self.figures["rows"]:
            if self._labels:
                labels = b"".join(self._labels)
                run.write_atomic(self.path.with_suffix(LABELS), labels)
                entry["labels_sha256"] = hashlib.sha256(labels).hexdigest()
            os.chmod(self._temporary, 0o644)
            os.replace(self._temporary, self.path)
            run.sync_directory(self.path.parent)
        return entry

    def _write(self, rows: np.ndarray) -> None:
        data = rows.tobytes()
        self._file.write(data)
        self._digest.update(data)
        self.figures["rows"] += len(rows) // self.length


def piece_limits(hashes: np.ndarray, length: int, share: float) -> np.ndarray:
    """The longest piece (D,) of each document in rows of `length`: length - 2, but for a `share` of the documents a
    number drawn evenly from 2 … length - 2. `hashes` (D,) uint64 are the draws."""
    room = np.uint64(length - 2)
    drawn = np.uint64(2) + ((hashes >> np.uint64(32)) * (room - np.uint64(1)) >> np.uint64(32))
    short = (hashes & np.uint64(0xFFFFFFFF)).astype(np.float64) < share * 2.0**32
    return np.where(short, drawn, room).astype(np.int64)


def layout(
    counts: Iterable[int], length: int, filled: int, section: Shards, limits: Iterable[int] | None = None
) -> tuple[np.ndarray, np.ndarray, int]:
    """Where the pieces of documents of `counts` tokens go in rows of `length`, the first `filled` being taken.

    Returns starts (P,): the place of each piece's [CLS]; sizes (P,): its tokens without [CLS] and [SEP]; and the end of
    the last. The rest of a row stays empty rather than take fewer than `min_piece` tokens of a longer document. No
    piece of a document is longer than its entry in `limits`.
    """
    starts: list[int] = []
    sizes: list[int] = []
    least, pack = min(section.min_piece, length - 2), section.pack
    place = filled
    for count, limit in zip(counts, itertools.repeat(length) if limits is None else limits, strict=False):
        while count:
            if not pack:
                place = -(-place // length) * length
            room = length - place % length
            size = min(count, room - 2, limit)
            if size < min(count, least, limit):
                place += room
                continue
            starts.append(place)
            sizes.append(size)
            place += size + 2
            count -= size
    return np.array(starts, np.int64), np.array(sizes, np.int64), place
