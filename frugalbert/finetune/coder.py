"""Texts in; pieces with their places in the text, and rows between the tokenizer's special tokens out.

The special tokens' places come from what the tokenizer itself puts around one text and around two (BERT
`[CLS] A [SEP] B [SEP]`, RoBERTa `<s> A </s></s> B </s>`, …), so cutting, windows and protected words are array slices
that are the same for every model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Pieces:
    """`ids` (n,) and their characters `offsets` (n, 2) in the text, end exclusive."""

    ids: Array
    offsets: Array

    def __len__(self) -> int:
        return len(self.ids)

    def window(self, start: int, size: int) -> Pieces:
        return Pieces(self.ids[start : start + size], self.offsets[start : start + size])

    def tokens(self, first: int, last: int) -> tuple[int, int]:
        """Positions (start, behind the end) of the pieces that touch the characters `first` to `last`."""
        inside = np.flatnonzero((self.offsets[:, 0] < last) & (self.offsets[:, 1] > first))
        return (int(inside[0]), int(inside[-1]) + 1) if len(inside) else (0, 0)


class Coder:
    """A tokenizer with truncation, padding and the meaning of special tokens inside texts switched off."""

    def __init__(self, tokenizer: Any, has_types: bool) -> None:
        from tokenizers import Tokenizer

        self.backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True  # "[SEP]" in a text is text
        self.cls = tokenizer.cls_token_id
        self.unknown = tokenizer.unk_token_id
        self.around = [self._around(("a",)), self._around(("a", "a"))]
        self.has_types = has_types
        marked = self.backend.encode(" a", add_special_tokens=False).tokens
        self.marks_spaces = any(token.startswith("Ġ") for token in marked)

    def _around(self, texts: tuple[str, ...]) -> list[tuple[list[int], list[int]]]:
        """(ids, types) before, between and after the texts, and in their places one type each."""
        found = self.backend.encode(*texts)
        sides = found.sequence_ids
        parts: list[tuple[list[int], list[int]]] = [([], [])]
        for side in range(len(texts)):
            inside = [place for place, where in enumerate(sides) if where == side]
            first, last = inside[0], inside[-1] + 1
            begin = max((p + 1 for p, where in enumerate(sides[:first]) if where is not None), default=0)
            parts[-1] = (found.ids[begin:first], found.type_ids[begin:first])
            parts += [([], [found.type_ids[first]]), (found.ids[last:], found.type_ids[last:])]
        return parts

    def num_special(self, pair: bool) -> int:
        return sum(len(ids) for ids, _ in self.around[pair])

    def pieces(self, texts: list[str]) -> list[Pieces]:
        found = self.backend.encode_batch(texts, add_special_tokens=False)
        return [
            Pieces(np.array(x.ids, dtype=np.int32), np.array(x.offsets, dtype=np.int32).reshape(-1, 2)) for x in found
        ]

    def words(self, sentences: list[tuple[str, ...]]) -> list[list[list[int]]]:
        """The ids of each word's pieces; a word of which nothing is left becomes the unknown token."""
        if self.marks_spaces:  # byte-level tokenizers write the space in front of a word into its first piece
            sentences = [tuple(f" {word}" if place else word for place, word in enumerate(s)) for s in sentences]
        found = self.backend.encode_batch(sentences, is_pretokenized=True, add_special_tokens=False)
        result = []
        for sentence, encoding in zip(sentences, found, strict=True):
            words: list[list[int]] = [[] for _ in sentence]
            for piece, word in zip(encoding.ids, encoding.word_ids, strict=True):
                words[word].append(piece)
            result.append([word or [self.unknown] for word in words])
        return result

    def join(self, windows: Sequence[Pieces]) -> tuple[Array, Array, list[int]]:
        """(ids, types, where each text begins) of a row."""
        return self._join([window.ids for window in windows])

    def join_ids(self, pieces: list[int]) -> tuple[Array, Array, int]:
        """The same for one text given as ids."""
        ids, types, begins = self._join([np.array(pieces, dtype=np.int32)])
        return ids, types, begins[0]

    def _join(self, texts: Sequence[Array]) -> tuple[Array, Array, list[int]]:
        ids: list[Any] = []
        types: list[Any] = []
        begins = []
        length = 0
        for place, (special, kinds) in enumerate(self.around[len(texts) == 2]):
            if place % 2:
                part = texts[place // 2]
                begins.append(length)
                ids.append(part)
                types.append(np.full(len(part), kinds[0], dtype=np.int32))
            else:
                ids.append(np.array(special, dtype=np.int32))
                types.append(np.array(kinds, dtype=np.int32))
            length += len(ids[-1])
        return np.concatenate(ids), np.concatenate(types), begins

    def first(self, ids: Array) -> int:
        """Where a row's `[CLS]` stands: what questions without an answer point to."""
        places = np.flatnonzero(ids == self.cls)
        return int(places[0]) if len(places) else 0
