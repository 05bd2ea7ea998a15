"""Examples in; token ids once, and padded batches out.

A *row* is one input of the model. Most examples are one row; a multiple choice is a row per option, an extractive
question a row per window of its passage, a long sentence to tag a row per piece. A *unit* is what training draws: the
rows of an example for multiple choice, else one row.

Batches hold units of similar length, padded to a multiple of 8 tokens: on two cores this is worth more than any other
setting. Their order is a pure function of (seed, epoch), so a repeated run sees the same batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from frugalbert.finetune.coder import Coder
from frugalbert.finetune.tasks import Example
from frugalbert.run import check_stop

if TYPE_CHECKING:
    import torch

Array = np.ndarray[Any, Any]
CHUNK = 500
POOL = 8  # batches sorted by length together
MULTIPLE = 8
IGNORED = -100


@dataclass(frozen=True)
class Lengths:
    """How inputs are made to fit, in tokens. `cut`: the text that gives way, `longest`, `first` or `second`."""

    maximum: int
    cut: str = "longest"
    stride: int = 128
    question: int = 64


@dataclass(frozen=True)
class Features:
    """`ids[r]` (length,) int32 and `types[r]` alike, or no types at all; `owner[r]` the example of row r.

    Unit u is the rows `units[u]` to `units[u + 1]`. `targets[u]` by `kind`: a class, a number, (L,) zeros and ones, a
    tuple of right options, (2,) first and last token of the answer, or (length,) tags with -100 where there is none;
    None if labels are not known. `marks[r]`, where the kind has them: spans (S, 2) as token positions, end exclusive;
    character offsets (length, 2) in the passage, -1 outside it; or (length,) the word that a token begins, else -1.
    `num_cut`: examples that lost text.
    """

    kind: str
    ids: list[Array]
    types: list[Array] | None
    owner: Array
    units: Array
    targets: Any
    marks: list[Array] | None
    pad: int
    max_length: int
    num_cut: int

    @property
    def lengths(self) -> Array:
        """Tokens of each unit's longest row."""
        rows = np.array([len(ids) for ids in self.ids])
        return rows if len(self.units) == len(rows) + 1 else np.maximum.reduceat(rows, self.units[:-1])

    def rows(self, units: Array) -> Array:
        """The rows of some units, in their order."""
        return np.concatenate([np.arange(self.units[unit], self.units[unit + 1]) for unit in units])


def encode(
    tokenizer: Any, kind: str, examples: list[Example], num_labels: int, lengths: Lengths, has_types: bool
) -> Features:
    """Token ids with the tokenizer's own special tokens; `[SEP]` in a text is text.

    Args:
        kind: the task's type.
        num_labels: classes or labels; 0 = regression.
        has_types: whether the model distinguishes the texts of a pair by token types.
    """
    coder = Coder(tokenizer, has_types)
    row_of = {
        "multiple-choice": _choice_rows,
        "question-answering": _question_rows,
        "token-classification": _word_rows,
    }.get(kind, _text_rows)
    rows: list[_Row] = []
    owner: list[int] = []
    cut: set[int] = set()
    for start in range(0, len(examples), CHUNK):
        check_stop()
        for place, row in row_of(coder, examples[start : start + CHUNK], lengths):
            rows.append(row)
            owner.append(start + place)
            if row.cut:
                cut.add(start + place)
    owners = np.array(owner, dtype=np.int64)
    together = kind == "multiple-choice"
    units = np.searchsorted(owners, np.arange(len(examples) + 1)) if together else np.arange(len(rows) + 1)
    marks = [row.marks for row in rows if row.marks is not None]
    targets = None
    if examples and all(example.label is not None for example in examples):
        targets = _targets(kind, examples, rows, owners, num_labels)
    types = [row.types for row in rows] if has_types else None
    return Features(
        kind, [row.ids for row in rows], types, owners, units, targets, marks or None, tokenizer.pad_token_id,
        lengths.maximum, len(cut),
    )  # fmt: skip


@dataclass(frozen=True)
class _Row:
    ids: Array
    types: Array
    cut: bool
    marks: Array | None = None
    target: Any = None


def _text_rows(coder: Coder, examples: list[Example], lengths: Lengths) -> list[tuple[int, _Row]]:
    """One row for one text or two, with the positions of the words to look at."""
    sides = [coder.pieces([example.text for example in examples])]
    if any(example.text_b is not None for example in examples):
        sides.append(coder.pieces([example.text_b or "" for example in examples]))
    found = []
    room = lengths.maximum - coder.num_special(len(sides) == 2)
    for place, example in enumerate(examples):
        texts = [side[place] for side in sides]
        sizes = _shares([len(text) for text in texts], room, lengths.cut)
        starts = [0] * len(texts)
        spans = [(side, *texts[side].tokens(first, last)) for side, first, last in example.spans]
        for side, size in enumerate(sizes):
            last = max((stop for where, _, stop in spans if where == side), default=0)
            starts[side] = max(0, last - size)  # a word that the head reads is never cut off
        windows = [text.window(start, size) for text, start, size in zip(texts, starts, sizes, strict=True)]
        ids, types, begins = coder.join(windows)
        row_spans = [
            _clip(first - starts[side], stop - starts[side], sizes[side], begins[side]) for side, first, stop in spans
        ]
        marks = np.array(row_spans, dtype=np.int64) if row_spans else None
        found.append((place, _Row(ids, types, sum(sizes) < sum(map(len, texts)), marks)))
    return found


def _clip(first: int, stop: int, size: int, begin: int) -> tuple[int, int]:
    """A span within its window as positions in the row; what lies outside altogether is read at the first token."""
    first, stop = max(0, first), min(size, stop)
    return (begin + first, begin + stop) if first < stop else (0, 1)


def _choice_rows(coder: Coder, examples: list[Example], lengths: Lengths) -> list[tuple[int, _Row]]:
    """A row for each option: the passage beside it."""
    passages = coder.pieces([example.text for example in examples])
    options = iter(coder.pieces([option for example in examples for option in example.options]))
    room = lengths.maximum - coder.num_special(True)
    found = []
    for place, (example, passage) in enumerate(zip(examples, passages, strict=True)):
        for _ in example.options:
            option = next(options)
            sizes = _shares([len(passage), len(option)], room, lengths.cut)
            ids, types, _ = coder.join([passage.window(0, sizes[0]), option.window(0, sizes[1])])
            found.append((place, _Row(ids, types, sum(sizes) < len(passage) + len(option))))
    return found


def _question_rows(coder: Coder, examples: list[Example], lengths: Lengths) -> list[tuple[int, _Row]]:
    """A row for each window of the passage; windows overlap by the stride (Devlin et al. 2019's SQuAD code)."""
    questions = coder.pieces([example.text for example in examples])
    passages = coder.pieces([example.text_b or "" for example in examples])
    found = []
    for place, example in enumerate(examples):
        asked = questions[place].window(0, lengths.question)
        passage = passages[place]
        room = max(1, lengths.maximum - coder.num_special(True) - len(asked))
        step = max(1, room - min(lengths.stride, room // 2))
        cut = len(asked) < len(questions[place])
        for start in range(0, max(1, len(passage) - room + step), step):
            window = passage.window(start, room)
            ids, types, begins = coder.join([asked, window])
            offsets = np.full((len(ids), 2), -1, dtype=np.int32)
            offsets[begins[1] : begins[1] + len(window)] = window.offsets
            target = np.full(2, coder.first(ids), dtype=np.int64)
            if example.answers and example.starts[0] >= 0:
                first, stop = passage.tokens(example.starts[0], example.starts[0] + len(example.answers[0]))
                if start <= first < stop <= start + len(window):
                    target = np.array([first, stop - 1]) - start + begins[1]
            found.append((place, _Row(ids, types, cut, offsets, target)))
    return found


def _word_rows(coder: Coder, examples: list[Example], lengths: Lengths) -> list[tuple[int, _Row]]:
    """As many rows as a sentence needs; a word is tagged at its first piece."""
    room = lengths.maximum - coder.num_special(False)
    found = []
    for place, words in enumerate(coder.words([example.words for example in examples])):
        labels = examples[place].label
        pieces: list[int] = []
        heads: list[int] = []
        parts: list[tuple[list[int], list[int]]] = []
        for number, word in enumerate(words):
            if pieces and len(pieces) + len(word) > room:
                parts.append((pieces, heads))
                pieces, heads = [], []
            heads += [number] + [-1] * (len(word) - 1)
            pieces += word
        for part, begun in [*parts, (pieces, heads)]:
            ids, types, begins = coder.join_ids(part[:room])
            marks = np.full(len(ids), -1, dtype=np.int64)
            marks[begins : begins + len(begun[:room])] = begun[:room]
            target = None
            if isinstance(labels, tuple):
                target = np.array([labels[word] if word >= 0 else IGNORED for word in marks])
            found.append((place, _Row(ids, types, len(part) > room, marks, target)))
    return found


def _shares(lengths: list[int], room: int, cut: str) -> list[int]:
    """Tokens that each text keeps. A protected one gives way too once it would leave the other less than a quarter."""
    if sum(lengths) <= room:
        return list(lengths)
    if len(lengths) == 1:
        return [room]
    if cut == "longest":
        small = min(0, 1, key=lambda side: lengths[side])
        kept = min(lengths[small], room // 2)
    else:
        small = 1 if cut == "first" else 0  # the protected one
        kept = min(lengths[small], room - min(lengths[1 - small], room // 4))
    shares = [room - kept, room - kept]
    shares[small] = kept
    return shares


def _targets(kind: str, examples: list[Example], rows: list[_Row], owner: Array, num_labels: int) -> Any:
    if kind in ("question-answering", "token-classification"):
        found = [row.target for row in rows]
        return np.stack(found) if kind == "question-answering" else found
    if kind == "multiple-choice":
        return [label if isinstance(label, tuple) else (label,) for label in (example.label for example in examples)]
    return label_array(examples, num_labels)


def label_array(examples: list[Example], num_labels: int) -> Array:
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


# ---- batches --------------------------------------------------------------------------------------------------------


def batches(lengths: Array, batch_size: int, seed: int, epoch: int) -> list[Array]:
    """Every unit once, in random batches of similar length; the last one may be smaller."""
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))
    found = []
    for start in range(0, len(order), POOL * batch_size):
        pool = order[start : start + POOL * batch_size]
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        found += [pool[first : first + batch_size] for first in range(0, len(pool), batch_size)]
    return [found[number] for number in generator.permutation(len(found))]


def parts(features: Features, units: Array, most: int) -> list[Array]:
    """A batch in micro-batches of at most `most` rows, but never less than a unit."""
    sizes = features.units[units + 1] - features.units[units]
    if sizes.max() == 1:
        return np.array_split(units, -(-len(units) // most))
    found: list[list[int]] = [[]]
    rows = 0
    for unit, size in zip(units, sizes, strict=True):
        if found[-1] and rows + size > most:
            found.append([])
            rows = 0
        found[-1].append(unit)
        rows += size
    return [np.array(part) for part in found]


def collate(features: Features, rows: Array, device: torch.device) -> dict[str, torch.Tensor]:
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
