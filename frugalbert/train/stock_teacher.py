"""A masked LM of any Hugging Face class that reads our ids, where `model.interop` has no exact copy of it.

In: packed batches. Out: its logits and hidden states where our tokens are. Its own code knows nothing of several
documents in a row, so every document becomes a row of its own, padded, and the results go back to their places.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from frugalbert.data.masking import Batch, Vocabulary
from frugalbert.loading import load_weights


def rows_of_documents(batch: Batch, *, isolate: bool) -> Tensor:
    """(documents, longest) int64: places of the tokens of each document in the flattened batch, -1 for padding.

    Without `isolate` all documents of a row count as one.
    """
    size, length = batch.document_ids.shape
    ids = batch.document_ids if isolate else (batch.document_ids > 0).long()
    rows = torch.arange(size, device=ids.device)[:, None] * (length + 1)
    owner = torch.where(ids > 0, ids + rows, 0).flatten()
    real = owner.nonzero()[:, 0]
    _, owner = owner[real].unique_consecutive(return_inverse=True)
    counts = torch.bincount(owner)
    column = torch.arange(len(real), device=ids.device) - (counts.cumsum(0) - counts)[owner]
    places = torch.full((len(counts), int(counts.max())), -1, device=ids.device)
    places[owner, column] = real
    return places


def read(model: Any, batch: Batch, hidden: Sequence[int], *, isolate: bool) -> tuple[dict[int, Tensor], Tensor]:
    """Hidden states (B, T, D) after the layers `hidden` (0 = embeddings), 0 at padding; logits (P, V) where masked."""
    size, length = batch.input_ids.shape
    places = rows_of_documents(batch, isolate=isolate)
    there = places >= 0
    ids = batch.input_ids.flatten()[places.clamp(min=0)]
    ids = ids.masked_fill(~there, model.config.pad_token_id or 0)
    output = model(input_ids=ids, attention_mask=there.long(), output_hidden_states=bool(hidden))
    states: dict[int, Tensor] = {}
    for layer in hidden:
        x = output.hidden_states[layer]
        flat = x.new_zeros(size * length, x.shape[-1])
        flat[places[there]] = x[there]
        states[layer] = flat.view(size, length, -1)
    where = torch.zeros(size * length, dtype=torch.int64, device=ids.device)
    where[places[there]] = there.flatten().nonzero()[:, 0]
    return states, output.logits.flatten(0, 1)[where[batch.masked_positions]]


def load_stock(name: str, key: str, folder: Path, vocabulary: Vocabulary) -> Any:
    """The model. Raises ValueError if it is no masked LM, damaged, or has fewer tokens than the vocabulary."""
    from transformers import AutoModelForMaskedLM

    place = str(folder / name) if (folder / name).exists() else name
    model, report = load_weights(AutoModelForMaskedLM, place, f"{key} {name} cannot be loaded", "name a masked LM")
    if report["missing_keys"]:
        raise ValueError(f"{key} {name} is no masked LM: it has no {min(report['missing_keys'])}")
    if model.config.vocab_size < vocabulary.size:
        raise ValueError(f"{key} {name} has {model.config.vocab_size} tokens, the tokenizer {vocabulary.size}")
    return model
