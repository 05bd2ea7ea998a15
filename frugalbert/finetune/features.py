"""Texts in; token ids once, and padded batches out.

Batches hold texts of similar length, padded to a multiple of 8 tokens: on two cores this is worth more than any other
setting. Their order is a pure function of (seed, epoch), so a repeated run sees the same batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from frugalbert.finetune.tasks import Example
from frugalbert.run import check_stop

if TYPE_CHECKING:
    import torch

CHUNK = 2000
POOL = 8  # batches sorted by length together
MULTIPLE = 8


@dataclass(frozen=True)
class Features:
    """`ids[i]` (length,) int32, `types[i]` the same or no types at all; labels (N,) int64, (N,) float32 or (N, L)."""

    ids: list[np.ndarray[Any, Any]]
    types: list[np.ndarray[Any, Any]] | None
    labels: np.ndarray[Any, Any]
    pad: int
    max_length: int
    num_cut: int

    @property
    def lengths(self) -> np.ndarray[Any, Any]:
        return np.array([len(ids) for ids in self.ids])


def encode(tokenizer: Any, examples: list[Example], num_labels: int, max_length: int, has_types: bool) -> Features:
    """Token ids with the tokenizer's own special tokens; a pair is cut from its longer text.

    Args:
        num_labels: classes or labels; 0 = regression.
        has_types: whether the model distinguishes the texts of a pair by token types.
    """
    ids: list[np.ndarray[Any, Any]] = []
    types: list[np.ndarray[Any, Any]] = []
    num_cut = 0
    for start in range(0, len(examples), CHUNK):
        check_stop()
        part = examples[start : start + CHUNK]
        second = None if part[0].text_b is None else [example.text_b for example in part]
        found = tokenizer(
            [example.text for example in part],
            second,
            truncation="longest_first",
            max_length=max_length,
            split_special_tokens=True,  # "[SEP]" in a text is text
        )
        ids += [np.array(row, dtype=np.int32) for row in found["input_ids"]]
        if has_types and "token_type_ids" in found:
            types += [np.array(row, dtype=np.int32) for row in found["token_type_ids"]]
        num_cut += sum(bool(encoding.overflowing) for encoding in found.encodings)
    return Features(ids, types or None, label_array(examples, num_labels), tokenizer.pad_token_id, max_length, num_cut)


def label_array(examples: list[Example], num_labels: int) -> np.ndarray[Any, Any]:
    """Class numbers (N,), numbers to predict (N,), or one row of 0 and 1 per multi-label example (N, num_labels)."""
    labels = [example.label for example in examples]
    if num_labels == 0:
        return np.array(labels, dtype=np.float32)
    if not isinstance(labels[0], tuple):
        return np.array(labels, dtype=np.int64)
    rows = np.zeros((len(labels), num_labels), dtype=np.float32)
    for row, label in zip(rows, labels, strict=True):
        assert isinstance(label, tuple)
        row[list(label)] = 1.0
    return rows


def batches(lengths: np.ndarray[Any, Any], batch_size: int, seed: int, epoch: int) -> list[np.ndarray[Any, Any]]:
    """Every example once, in random batches of similar length; the last one may be smaller."""
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))
    found = []
    for start in range(0, len(order), POOL * batch_size):
        pool = order[start : start + POOL * batch_size]
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        found += [pool[first : first + batch_size] for first in range(0, len(pool), batch_size)]
    return [found[number] for number in generator.permutation(len(found))]


def collate(features: Features, rows: np.ndarray[Any, Any], device: torch.device) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask` and, where there are any, `token_type_ids`: (len(rows), padded length) int64."""
    import torch

    longest = max(len(features.ids[row]) for row in rows)
    width = max(longest, min(-(-longest // MULTIPLE) * MULTIPLE, features.max_length))
    batch = {"input_ids": np.full((len(rows), width), features.pad, dtype=np.int64)}
    batch["attention_mask"] = np.zeros((len(rows), width), dtype=np.int64)
    if features.types is not None:
        batch["token_type_ids"] = np.zeros((len(rows), width), dtype=np.int64)
    for place, row in enumerate(rows):
        length = len(features.ids[row])
        batch["input_ids"][place, :length] = features.ids[row]
        batch["attention_mask"][place, :length] = 1
        if features.types is not None:
            batch["token_type_ids"][place, :length] = features.types[row]
    return {name: torch.from_numpy(array).to(device) for name, array in batch.items()}
