"""A teacher that reads the text with another tokenizer: hidden states compared word by word.

In: batches of our token ids. Out: for each document the mean of the teacher's hidden states over the pieces of each
word, and which of our tokens make the same word. A word is what the shards' tokenizer marks as one; a word with a
masked token is one mask token for the teacher too, so it does not see more than the student. Predictions cannot be
compared this way (the vocabularies differ), nor attention (so do the tokens).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from frugalbert.data.masking import IGNORED, Batch, Vocabulary, restore
from frugalbert.loading import load_weights
from frugalbert.progress import reason

MOST_TEXTS = 1 << 20  # words whose text is remembered


@dataclass(frozen=True, eq=False)
class Words:
    """N tokens of W words: places (N,) of tokens in the flattened batch, words (N,) ascending, count W."""

    places: Tensor
    words: Tensor
    count: int

    def pool(self, x_BTD: Tensor) -> Tensor:
        """(W, D) float32: means over the tokens of each word, 0 for one without tokens."""
        x_ND = x_BTD.flatten(0, 1).index_select(0, self.places).float()
        sums = x_ND.new_zeros(self.count, x_ND.shape[1]).index_add(0, self.words, x_ND)
        return sums / self.sizes()[:, None].clamp(min=1)

    def sizes(self) -> Tensor:
        """(W,): numbers of tokens."""
        return torch.bincount(self.words, minlength=self.count)


def words_of(batch: Batch, vocabulary: Vocabulary) -> tuple[Words, list[np.ndarray], np.ndarray, np.ndarray]:
    """The words of a batch; their ids, the number of the document of each, and whether one of its tokens is masked."""
    assert vocabulary.continuation is not None
    ids, documents = restore(batch).flatten(), batch.document_ids
    rows = torch.arange(documents.shape[0], device=documents.device)[:, None] * (documents.max() + 1)
    place = torch.arange(len(ids), device=ids.device)
    ordinary = ~vocabulary.special[ids] & (documents.flatten() > 0)
    follows = torch.cat((ordinary.new_zeros(1), ordinary[:-1]))  # a token after [CLS] begins a word
    begins = ordinary & ~(vocabulary.continuation[ids] & follows)
    masked = torch.zeros_like(ordinary)
    masked[batch.masked_positions[batch.labels != IGNORED]] = True
    places = place[ordinary]
    words = begins.cumsum(0)[ordinary] - 1
    count = int(begins.sum())
    hidden = torch.bincount(words, masked[places].double(), minlength=count) > 0
    first = places[torch.cat((words.new_ones(1), words.diff())) > 0] if count else places
    texts = np.split(ids[places].cpu().numpy(), np.flatnonzero(words.diff().cpu().numpy()) + 1) if count else []
    owners = (documents + rows).flatten()[first]
    return Words(places, words, count), texts, owners.cpu().numpy(), hidden.cpu().numpy()


class WordTeacher:
    """Any Hugging Face encoder with its own tokenizer, frozen; teaches hidden states. Has no Arch of ours."""

    arch = None

    def __init__(self, model: Any, tokenizer: Any, ours: Any, vocabulary: Vocabulary) -> None:
        self.model = model.requires_grad_(False).eval()
        self.tokenizer, self.ours, self.vocabulary = tokenizer, ours, vocabulary
        self.depth, self.width = model.config.num_hidden_layers, model.config.hidden_size
        known = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
        self.most = min(int(tokenizer.model_max_length), int(known) - (2 if tokenizer.pad_token_id == 1 else 0))
        self.texts: dict[bytes, str] = {}

    def blocks(self, seen: Sequence[int]) -> list[Any]:
        """Layers that can be compiled: none, since the lengths of texts in its tokens vary."""
        return []

    def flops(self, length: float, rate: float) -> float:
        """Operations per token, from the number of its weights without embeddings."""
        embeddings = self.model.get_input_embeddings().weight.numel()
        return 2.0 * (sum(weight.numel() for weight in self.model.parameters()) - embeddings)

    @torch.no_grad()
    def read(self, batch: Batch, layers: Sequence[int]) -> tuple[dict[int, Tensor], Words, Tensor]:
        """Means of the states after these layers (W, D), the batch's words, and (W,) which of them both models have."""
        words, ids, owners, masked = words_of(batch, self.vocabulary)
        device = batch.input_ids.device
        if not words.count:
            nothing = torch.zeros(0, self.width, device=device)
            return dict.fromkeys(layers, nothing), words, words.sizes() > 0
        texts = [
            self.tokenizer.mask_token if hide else self._text(piece) for piece, hide in zip(ids, masked, strict=True)
        ]
        ends = np.flatnonzero(np.diff(owners)) + 1
        documents = [part.tolist() for part in np.split(np.arange(len(texts)), ends)]
        encoded = self.tokenizer(
            [[texts[word] for word in document] for document in documents],
            is_split_into_words=True, padding=True, truncation=True, max_length=self.most, return_tensors="pt",
        )  # fmt: skip
        where: list[tuple[int, int]] = []
        length = encoded["input_ids"].shape[1]
        for row, document in enumerate(documents):
            found = encoded.word_ids(row)
            where += [(row * length + place, document[word]) for place, word in enumerate(found) if word is not None]
        theirs = torch.tensor(where, dtype=torch.int64, device=device).view(-1, 2)
        there = Words(theirs[:, 0], theirs[:, 1], words.count)
        states = self.model(**encoded.to(device), output_hidden_states=True).hidden_states
        return {layer: there.pool(states[layer]) for layer in layers}, words, there.sizes() > 0

    def _text(self, ids: np.ndarray) -> str:
        key = ids.tobytes()
        if key not in self.texts:
            if len(self.texts) >= MOST_TEXTS:
                self.texts.clear()
            first, *others = self.ours.convert_ids_to_tokens(ids.tolist())
            if (others or first.startswith("##")) and all(token.startswith("##") for token in others):
                self.texts[key] = first.removeprefix("##") + "".join(token[2:] for token in others)
            else:
                self.texts[key] = self.ours.convert_tokens_to_string([first, *others]).strip()
        return self.texts[key]


def load_word_teacher(name: str, key: str, folder: Path, ours: Any, vocabulary: Vocabulary) -> WordTeacher:
    """Raises ValueError if there is no such encoder or tokenizer, or the shards' tokenizer marks no words."""
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    if vocabulary.continuation is None:
        raise ValueError(f"{key} {name} has another tokenizer, and that of the shards does not mark where words begin")
    place = str(folder / name) if (folder / name).exists() else name
    told, remedy = f"{key} {name} cannot be loaded", "name a masked LM with its tokenizer"
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False, use_fast=True)
        if hasattr(tokenizer, "add_prefix_space"):
            tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False, add_prefix_space=True)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise ValueError(f"{told} ({reason(error)}); {remedy}") from None
    model = load_weights(AutoModelForMaskedLM, place, told, remedy)[0].base_model
    if not tokenizer.is_fast or tokenizer.mask_token is None or tokenizer.pad_token_id is None:
        raise ValueError(f"{key} {name} has no fast tokenizer with mask and padding tokens (tokenizer.json)")
    return WordTeacher(model.to(vocabulary.special.device), tokenizer, ours, vocabulary)
