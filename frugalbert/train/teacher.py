"""The teacher of a distillation: a masked LM that is never trained, and what it says about a batch.

In: `pretrain.distill` and token batches. Out: a `Lesson` per batch: its predictions at the masked places, hidden states
after its layers, the last states of its attention. It runs in evaluation mode without gradients (`no_grad`: autograd
must keep some of what it says, which inference tensors forbid), in the precision of the step around it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from frugalbert import dist
from frugalbert.config import Distill, Pretrain
from frugalbert.data import tokenizer as tokenizers
from frugalbert.data.masking import Batch, Vocabulary, num_slots
from frugalbert.data.rows import ShardSet, read_index
from frugalbert.model import slicing
from frugalbert.model.arch import Arch
from frugalbert.model.cost import forward_flops
from frugalbert.model.modeling import FrugalForMaskedLM
from frugalbert.run import fingerprint
from frugalbert.train import stock_teacher
from frugalbert.train.distill import Prediction, States, likeliest, watch
from frugalbert.train.importance import sort_by_importance
from frugalbert.train.objectives import encoder_inputs
from frugalbert.train.teacher_cache import Cache
from frugalbert.train.weights import is_readable, load_model, reads_alike
from frugalbert.train.words import WordTeacher, load_word_teacher

KEY = "pretrain.distill.teacher"


@dataclass(frozen=True, eq=False)
class Lesson:
    """hidden: (B, T, D) after the layers that were asked for, from 1, 0 = embeddings; states by layer from 0."""

    hidden: dict[int, Tensor]
    states: dict[int, States]
    wanted: Prediction | None = None
    cached: float = 0.0
    """Share of the rows whose predictions were read from disk."""


class Teacher:
    """A frozen FrugalForMaskedLM. No module: the student neither trains, saves nor spreads it."""

    def __init__(self, model: Any, section: Distill, *, isolate: bool, cache: Cache | None = None) -> None:
        self.model = model.requires_grad_(False).eval()
        self.section, self.isolate, self.cache = section, isolate, cache
        self.arch: Arch | None = model.config.to_arch()
        assert self.arch is not None
        self.depth, self.width = len(self.arch.layers), self.arch.hidden

    def blocks(self, seen: Sequence[int]) -> list[Any]:
        """Layers that can be compiled: those that nobody looks into."""
        return [block for index, block in enumerate(self.model.model.layers) if index not in seen]

    def flops(self, length: float, rate: float) -> float:
        """Operations per token of a forward pass with predictions at a share `rate` of the tokens."""
        assert self.arch is not None
        head = {"vocab_size": self.model.config.vocab_size, "masked": rate if self.section.logits else 0.0}
        return 0.0 if self.cache else forward_flops(self.arch, length, head="mlm", **head)

    @torch.no_grad()
    def look(self, batch: Batch, layers: Sequence[int], hidden: Sequence[int]) -> Lesson:
        """What it says about a batch: attention states of `layers`, hidden states after the layers `hidden`."""
        if self.cache is not None and batch.copies is not None:
            wanted, cached = self._from_cache(self.cache, batch)
            return Lesson({}, {}, wanted, cached)
        return self._read(batch, layers, hidden)

    def _read(self, batch: Batch, layers: Sequence[int], hidden: Sequence[int]) -> Lesson:
        with watch(self.model.model, layers) as states:
            output = self.model.model(
                batch.input_ids, output_hidden_states=bool(hidden), **encoder_inputs(batch, isolate=self.isolate)
            )
        wanted = None
        if self.section.logits:
            last = output.last_hidden_state.flatten(0, 1).index_select(0, batch.masked_positions)
            wanted = self._kept(self.model.decoder(self.model.head(last)))
        return Lesson({layer: output.hidden_states[layer] for layer in hidden}, states, wanted)

    def _kept(self, logits: Tensor) -> Prediction:
        if self.section.top_k is None:
            return Prediction(logits)
        return likeliest(logits, self.section.top_k, self.section.temperature)

    def _from_cache(self, cache: Cache, batch: Batch) -> tuple[Prediction, float]:
        assert batch.copies is not None
        length = batch.input_ids.shape[1]
        numbers = batch.copies.cpu().numpy()
        found, known = cache.read(length, numbers)
        if not known.all():
            absent = torch.from_numpy((~known).nonzero()[0]).to(batch.input_ids.device)
            wanted = self._read(rows_of(batch, absent), (), ()).wanted
            assert wanted is not None
            cache.write(length, numbers[~known], wanted)
            found, _ = cache.read(length, numbers)
        return found.to(batch.input_ids.device), float(known.mean())


class StockTeacher(Teacher):
    """Any other masked LM that reads our ids: predictions and hidden states. Has no Arch of ours."""

    def __init__(self, model: Any, section: Distill, size: int, *, isolate: bool, cache: Cache | None = None) -> None:
        self.model = model.requires_grad_(False).eval()
        self.section, self.isolate, self.cache, self.size = section, isolate, cache, size
        self.arch = None
        self.depth, self.width = model.config.num_hidden_layers, model.config.hidden_size

    def blocks(self, seen: Sequence[int]) -> list[Any]:
        """None: documents as rows of their own have ever other lengths."""
        return []

    def flops(self, length: float, rate: float) -> float:
        """Operations per token, from the number of its weights."""
        return 0.0 if self.cache else 2.0 * sum(weight.numel() for weight in self.model.parameters())

    def _read(self, batch: Batch, layers: Sequence[int], hidden: Sequence[int]) -> Lesson:
        states, logits = stock_teacher.read(self.model, batch, hidden, isolate=self.isolate)
        return Lesson(states, {}, self._kept(logits[:, : self.size]) if self.section.logits else None)


def rows_of(batch: Batch, rows: Tensor) -> Batch:
    """The batch with these rows (indices) alone."""
    size, length = batch.input_ids.shape
    slots = len(batch.masked_positions) // size
    places = batch.masked_positions.view(size, slots)[rows] % length
    start = torch.arange(len(rows), device=rows.device)[:, None] * length
    return replace(
        batch,
        input_ids=batch.input_ids[rows],
        position_ids=batch.position_ids[rows],
        document_ids=batch.document_ids[rows],
        masked_positions=(places + start).flatten(),
        labels=batch.labels.view(size, slots)[rows].flatten(),
        draws=batch.draws.view(size, slots)[rows].flatten(),
        copies=None,
    )


# ---- from the section to a teacher -----------------------------------------------------------------------------------


def load_teacher(
    section: Pretrain, inputs: dict[str, Path], lengths: Sequence[int], vocabulary: Vocabulary
) -> Teacher | WordTeacher:
    """The teacher of `section.distill` on the device; `lengths` are those of the rows.

    Raises ValueError if it cannot teach what the section asks, or if its cache belongs to something else.
    """
    distill = section.distill
    assert distill is not None
    folder, whole = inputs["yaml"], distill.logits > 0
    if not reads_alike(distill.teacher, folder, vocabulary):
        other = [name for name in ("logits", "attention", "relation") if getattr(distill, name)]
        if other:
            raise ValueError(
                f"{KEY} {distill.teacher} has another tokenizer than the shards, so {other[0]} cannot be compared; "
                "take its tokenizer (tokenizer.path), or learn hidden states alone (logits: 0, hidden: 1)"
            )
        ours = tokenizers.load(inputs["tokenizer"])
        foreign = load_word_teacher(distill.teacher, KEY, folder, ours, vocabulary)
        _check_finite(foreign.model, distill.teacher)
        return foreign
    if not is_readable(distill.teacher, folder):
        other = [name for name in ("attention", "relation") if getattr(distill, name)]
        if other:
            raise ValueError(
                f"{KEY} {distill.teacher} is of a class whose attention cannot be read, so {other[0]} cannot be "
                "compared; give logits or hidden a weight instead, or take a BERT, RoBERTa or ModernBERT"
            )
        stock = stock_teacher.load_stock(distill.teacher, KEY, folder, vocabulary)
        _check_finite(stock, distill.teacher)
        cache = _open_cache(section, inputs, lengths, stock, vocabulary) if distill.cache else None
        settings = {"isolate": section.isolate_documents, "cache": cache}
        return StockTeacher(stock.to(vocabulary.special.device), distill, vocabulary.size, **settings)
    model = load_model(distill.teacher, KEY, folder, FrugalForMaskedLM, vocabulary, whole=whole)
    _check_finite(model, distill.teacher)
    known = model.config.to_arch().max_length
    if known < max(lengths):
        raise ValueError(f"{KEY} {distill.teacher} knows {known} positions, the rows have {max(lengths)} tokens")
    cache = _open_cache(section, inputs, lengths, model, vocabulary) if distill.cache else None
    return Teacher(model.to(vocabulary.special.device), distill, isolate=section.isolate_documents, cache=cache)


def _check_finite(model: Any, name: str) -> None:
    if not all(bool(weight.isfinite().all()) for weight in model.parameters()):
        raise ValueError(f"{KEY} {name} has weights that are not finite; take an earlier checkpoint of it")


def _open_cache(
    section: Pretrain, inputs: dict[str, Path], lengths: Sequence[int], teacher: Any, vocabulary: Vocabulary
) -> Cache:
    distill, mask, shards = section.distill, section.mask, inputs["shards"]
    assert distill is not None
    assert distill.cache is not None
    assert distill.top_k is not None
    assert mask.copies is not None
    identity = {
        "teacher": digest(teacher),
        "shards": fingerprint(read_index(shards)),
        "mask": mask.model_dump(mode="json"),
        "seed": section.seed,
        "isolate_documents": section.isolate_documents,
        "top_k": distill.top_k,
        "temperature": distill.temperature,
        "precision": dist.pick_precision(section.precision, vocabulary.special.device),
    }
    sizes: dict[int, tuple[int, int]] = {}
    for length in set(lengths):
        rows = ShardSet.open(shards, length, "train", verify=False).rows
        sizes[length] = rows * mask.copies, num_slots(mask.rate[0], length, mask.max_predictions)
    return Cache(inputs["yaml"] / distill.cache, identity, sizes, distill.top_k, vocabulary.size)


def digest(model: Any) -> str:
    """BLAKE2 of all weights with their names."""
    found = hashlib.blake2b(digest_size=16)
    for name, weight in sorted(model.named_parameters()):
        found.update(name.encode())
        found.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
    return found.hexdigest()


def slice_of_teacher(
    section: Pretrain, arch: Arch, teacher: Teacher | WordTeacher, shards: Path, vocabulary: Vocabulary
) -> Any:
    """`arch` with the teacher's weights: its most important heads, units and channels, and some of its layers.

    Raises ValueError if `arch` is no slice of the teacher.
    """
    assert section.distill is not None
    big = teacher.arch
    if big is None:
        raise ValueError(
            "pretrain.start from teacher needs a BERT, RoBERTa, ModernBERT or a model of ours, with the shards' "
            "tokenizer; remove start"
        )
    try:
        layers = slicing.kept_layers(big, len(arch.layers), section.distill.slice)
        slicing.check(big, arch, layers)
    except ValueError as error:
        raise ValueError(f"pretrain.start from teacher: {arch} is no slice of the teacher, {big}: {error}") from None
    whole = slicing.extract(teacher.model, big).requires_grad_(True)
    length = min(int(length) for length in read_index(shards)["sets"])
    sort_by_importance(whole, shards, length, vocabulary, isolate=section.isolate_documents)
    found = slicing.extract(whole, arch, layers)
    dropout = {"hidden_dropout_prob": section.dropout, "attention_probs_dropout_prob": section.dropout}
    found.config.update(dropout)
    return FrugalForMaskedLM.from_pretrained(None, config=found.config, state_dict=found.state_dict()).train()
