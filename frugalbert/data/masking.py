"""Masked-LM and replaced-token batches from rows of token ids, on the device, without host synchronisation.

In: rows (B, T), the number and the epoch of each. Out: inputs with a fixed number of masked slots per row, so that all
shapes are static. Every choice is a hash of (seed, row, epoch, position), never a generator's state: a row's masks do
not depend on the batch it stands in, on rank, order, device or resume. The rule is BERT's (Devlin et al., 2019,
arXiv 1810.04805, section 3.1 and appendix A.1), whole words as in its later release, ELECTRA's sampling arXiv
2003.10555.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from frugalbert.config import Mask
from frugalbert.data.slots import num_slots

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
IGNORED = -100
WORD_STARTS = ("Ġ", "Ċ", "ĉ", "▁")  # byte-level BPE writes space, newline and tab as the first three


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """What masking knows of a tokenizer, as tables on the device. `size` is the largest id + 1.

    special (size,) bool; ordinary (size - specials,) int64: ids that may replace a token; continuation (size,) bool:
    ids that continue the word before them, or None if the tokenizer does not mark where words start; tokens: their ids.
    """

    size: int
    cls: int
    sep: int
    pad: int
    mask: int
    special: Tensor
    ordinary: Tensor
    continuation: Tensor | None
    tokens: dict[str, int] = field(default_factory=dict)

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerFast) -> Vocabulary:
        """From a Hugging Face fast tokenizer whose cls, sep, pad and mask tokens are set."""
        tokens = tokenizer.get_vocab()
        size = max(tokens.values()) + 1
        special = torch.zeros(size, dtype=torch.bool)
        special[list(tokenizer.all_special_ids)] = True
        used = torch.zeros(size, dtype=torch.bool)
        used[list(tokens.values())] = True
        model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
        return cls(
            size=size,
            cls=tokenizer.cls_token_id,
            sep=tokenizer.sep_token_id,
            pad=tokenizer.pad_token_id,
            mask=tokenizer.mask_token_id,
            special=special,
            ordinary=torch.nonzero(used & ~special).flatten(),
            continuation=_continuation(tokens, model, size),
            tokens=tokens,
        )

    def to(self, device: torch.device | str) -> Vocabulary:
        continuation = None if self.continuation is None else self.continuation.to(device)
        return replace(
            self, special=self.special.to(device), ordinary=self.ordinary.to(device), continuation=continuation
        )


def _continuation(tokens: dict[str, int], model: dict[str, Any], size: int) -> Tensor | None:
    """Which ids continue a word: `##x` in WordPiece, letters and digits without the word-start sign elsewhere."""
    prefix = model.get("continuing_subword_prefix")
    if prefix:
        continues = [number for token, number in tokens.items() if token.startswith(prefix)]
    elif any(token.startswith(WORD_STARTS) for token in tokens):
        # byte-level tokens of other scripts start with a letter too: Latin-1 letters stand for their bytes
        continues = [
            number
            for token, number in tokens.items()
            if not token.startswith(WORD_STARTS) and (token[:1].isalnum() or ord(token[:1] or " ") > 0x7F)
        ]
    else:
        return None
    table = torch.zeros(size, dtype=torch.bool)
    table[continues] = True
    return table


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch of B rows of T tokens with k slots per row.

    input_ids (B, T) int64; position_ids (B, T) counting from 0 in each document; document_ids (B, T): 1, 2, … and 0 for
    padding; masked_positions (B*k,) into the flattened B*T, ascending within a row; labels (B*k,): the original ids,
    or -100 in slots that a row has no use for (they point at its first position, which stays as it is); draws (B*k,)
    float32 uniform in [0, 1), one per slot, for `sample`; copies (B,) int64: row_id * `mask.copies` + the copy, or None
    if masks never come again. Of sentence pairs (`with_pairs`) also token_type_ids (B, T) int64, 1 in the second
    segment and 0 elsewhere, and pair_labels (B,) int64, 1 = random or swapped.
    """

    input_ids: Tensor
    position_ids: Tensor
    document_ids: Tensor
    masked_positions: Tensor
    labels: Tensor
    draws: Tensor
    copies: Tensor | None = None
    token_type_ids: Tensor | None = None
    pair_labels: Tensor | None = None


def mlm_batch(
    rows: Tensor, row_ids: Tensor, epochs: Tensor, settings: Mask, rate: float, seed: int, vocabulary: Vocabulary
) -> Batch:
    """Mask `rate` of each row's tokens: rows (B, T) of any integer type, row_ids and epochs (B,) int64, same device.

    Of a row with n tokens besides padding, min(max(1, round(rate * n)), ordinary tokens, max_predictions) are chosen,
    each equally likely; special tokens never are. With whole words, words are taken in random order while they fit, at
    last those of one piece, so a row without such words may stay a token or two below the number. With
    `settings.copies` the masks of epoch e are those of epoch e mod copies.
    Raises ValueError if whole words are asked of a tokenizer that does not mark them.
    """
    ids = rows.long()
    num_rows, length = ids.shape
    document_ids, position_ids = documents(ids, vocabulary)
    copies = None if settings.copies is None else row_ids * settings.copies + epochs % settings.copies
    key = _key(seed, row_ids, epochs if settings.copies is None else epochs % settings.copies)
    candidate = ~vocabulary.special[ids]
    num_real = (document_ids > 0).sum(1, keepdim=True)
    wanted = (num_real.double() * rate).round().long().clamp(min=1, max=settings.max_predictions)
    wanted = torch.minimum(wanted, candidate.sum(1, keepdim=True))
    place = torch.arange(length, device=ids.device)
    slots = num_slots(rate, length, settings.max_predictions)
    if settings.whole_words:
        chosen = _whole_words(ids, candidate, wanted, key, vocabulary)
        position = torch.where(chosen, place, length).topk(slots, largest=False, sorted=True).values
    else:
        position = _score(key, place.expand_as(ids), candidate).topk(slots, largest=False, sorted=True).indices
        unused = torch.arange(slots, device=ids.device) >= wanted
        position = position.masked_fill(unused, length).sort(1).values
    valid = position < length
    position = position.masked_fill(~valid, 0)
    original = ids.gather(1, position)
    first = torch.arange(num_rows, device=ids.device)[:, None] * length
    return Batch(
        input_ids=ids.scatter(1, position, _replacement(original, valid, key, position, settings, vocabulary)),
        position_ids=position_ids,
        document_ids=document_ids,
        masked_positions=(position + first).flatten(),
        labels=original.masked_fill(~valid, IGNORED).flatten(),
        draws=(_shift(_noise(key, position, 2), 40).float() * 2.0**-24).flatten(),
        copies=copies,
    )


def with_pairs(batch: Batch, rows: Tensor, labels: Tensor, vocabulary: Vocabulary) -> Batch:
    """The batch of rows (B, T) of sentence pairs with its segments and their labels (B,). Both segments are one
    document: they see each other."""
    ends = (rows == vocabulary.sep).cumsum(1) - (rows == vocabulary.sep).long()  # [SEP] that stand before a place
    types = ((ends > 0) & (rows != vocabulary.pad)).long()
    return replace(batch, token_type_ids=types, pair_labels=labels.long())


def documents(ids: Tensor, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
    """document_ids and position_ids (B, T) of packed rows (B, T): each [CLS] starts a document, padding is 0."""
    begins, real = ids == vocabulary.cls, ids != vocabulary.pad
    place = torch.arange(ids.shape[1], device=ids.device)
    begin = torch.where(begins, place, 0).cummax(1).values
    return begins.cumsum(1) * real, (place - begin) * real


def restore(batch: Batch) -> Tensor:
    """The rows (B, T) as they were: labels put back into their places."""
    flat = batch.input_ids.flatten()
    used = batch.labels != IGNORED
    values = torch.where(used, batch.labels, flat.gather(0, batch.masked_positions))
    return flat.scatter(0, batch.masked_positions, values).view_as(batch.input_ids)


# ---- replaced-token detection ----------------------------------------------------------------------------------------


def sample(logits: Tensor, draws: Tensor) -> Tensor:
    """One token per row of logits (P, V) from softmax(logits), by the inverse of its distribution at draws (P,)."""
    cumulative = logits.float().softmax(-1).cumsum(-1)
    point = draws[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, point, right=True).squeeze(1).clamp(max=logits.shape[-1] - 1)


def replace_tokens(batch: Batch, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Fill the slots with tokens (B*k,): input ids (B, T), and (B, T) bool: differs from the original text.

    A generator that hits the original leaves a token that counts as not replaced (ELECTRA, section 2).
    """
    original = restore(batch)
    flat = original.flatten()
    values = torch.where(batch.labels != IGNORED, tokens, flat.gather(0, batch.masked_positions))
    filled = flat.scatter(0, batch.masked_positions, values).view_as(original)
    return filled, filled != original


# ---- choices ---------------------------------------------------------------------------------------------------------


def _whole_words(ids: Tensor, candidate: Tensor, wanted: Tensor, key: Tensor, vocabulary: Vocabulary) -> Tensor:
    """(B, T) bool: words in random order while they fit into `wanted` (B, 1), in three rounds of smaller words."""
    if vocabulary.continuation is None:
        raise ValueError(
            "this tokenizer does not mark where words start; set pretrain.mask.whole_words: false or take another"
        )
    place = torch.arange(ids.shape[1], device=ids.device)
    before = torch.zeros_like(candidate)
    before[:, 1:] = candidate[:, :-1]
    starts = candidate & ~(vocabulary.continuation[ids] & before)
    word = torch.where(starts, place, 0).cummax(1).values
    order = _score(key, word, candidate).argsort(1)  # a word's pieces follow each other: the score ends in the place
    sizes = torch.zeros_like(ids).scatter_add(1, word, candidate.long())
    word_in_order = word.gather(1, order)
    size = sizes.gather(1, word_in_order)
    pieces_after = size - 1 - (order - word_in_order)
    ordinary = candidate.gather(1, order)
    taken = torch.zeros_like(candidate)
    for largest in (len(place), len(place), 1):  # one round stops at the first word that is too large for the rest
        room = wanted - taken.sum(1, keepdim=True)
        eligible = ordinary & ~taken & (size <= room.clamp(max=largest))
        taken = taken | (eligible & (eligible.cumsum(1) + pieces_after <= room))
    return torch.zeros_like(candidate).scatter(1, order, taken)


def _replacement(
    original: Tensor, valid: Tensor, key: Tensor, position: Tensor, settings: Mask, vocabulary: Vocabulary
) -> Tensor:
    """What the model sees in each slot (B, k): [MASK], a random token or the original."""
    if settings.style == "mask":
        return torch.where(valid, vocabulary.mask, original)
    noise = _noise(key, position, 1)
    which, low = _shift(noise, 32), noise & 0xFFFFFFFF
    if settings.random_token_includes_special:
        drawn = (low * vocabulary.size) >> 32
    else:
        drawn = vocabulary.ordinary[(low * len(vocabulary.ordinary)) >> 32]
    changed = torch.where(which < round(0.8 * 2**32), vocabulary.mask, drawn)
    return torch.where(valid & (which < round(0.9 * 2**32)), changed, original)


def _score(key: Tensor, word: Tensor, candidate: Tensor) -> Tensor:
    """(B, T) distinct int64 >= 0: 47 random bits of the word's hash, then the place; last for what is no candidate."""
    place = torch.arange(word.shape[1], device=word.device)
    return torch.where(candidate, _shift(_noise(key, word, 0), 17) << 16 | place, (1 << 63) - 1)


# ---- the hash --------------------------------------------------------------------------------------------------------


def _key(seed: int, row_ids: Tensor, epochs: Tensor) -> Tensor:
    """(B, 1) int64 from the seed, the row and the epoch."""
    start = (seed + 1) * GOLDEN % (1 << 64)
    start -= (start >> 63) << 64
    return _mix(_mix(row_ids + start) + epochs * GOLDEN)[:, None]


def _noise(key: Tensor, position: Tensor, stream: int) -> Tensor:
    """64 random bits for each (B, n) position; another `stream` gives independent ones."""
    return _mix(key + (position + (stream << 32) + 1) * GOLDEN)


def _mix(value: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele, Lea, Flood, OOPSLA 2014) in wrapping int64: the same on CPU and GPU."""
    value = (value ^ _shift(value, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    value = (value ^ _shift(value, 27)) * (0x94D049BB133111EB - (1 << 64))
    return value ^ _shift(value, 31)


def _shift(value: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's own repeats the sign."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)
