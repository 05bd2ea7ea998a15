"""Objectives: `(model, micro, progress) -> {"loss": …, …}`, plain functions with their settings.

Every value is this micro-batch's share of the global batch's mean, so that values and gradients of micro-batches and
ranks add up. `mlm` is BERT's (arXiv 1810.04805), at the masked positions only; `rtd` is ELECTRA's (arXiv 2003.10555).
Beside each stands what validation measures: (sum, count) of its figures for one batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from frugalbert import dist
from frugalbert.data.masking import IGNORED, Batch, replace_tokens, sample
from frugalbert.model import patterns
from frugalbert.model.arch import Arch, LayerArch
from frugalbert.model.cost import training_flops
from frugalbert.train.batches import Micro


def encoder_inputs(batch: Batch, *, isolate: bool) -> dict[str, Tensor]:
    """What the encoder gets besides token ids: isolated documents, or only padding hidden; segments of pairs."""
    segments = {} if batch.token_type_ids is None else {"token_type_ids": batch.token_type_ids}
    if isolate:
        return {"position_ids": batch.position_ids, "document_ids": batch.document_ids, **segments}
    return {"attention_mask": batch.document_ids > 0, **segments}


def by_row(batch: Batch) -> Tensor:
    """The masked positions as (B, k): the last layer makes no other states. k changes with the masking rate."""
    rows = len(batch.input_ids)
    return dist.of_any_size(batch.masked_positions.view(rows, len(batch.masked_positions) // rows), 1)


# ---- masked language modelling ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MaskedLM:
    """The objective for a model that predicts at `masked_positions`; `isolate` hides other documents of a row.

    With a `pair_weight` the loss has that much of the sentence pairs' beside it (BERT: 1), for a model that has a head
    for them and batches that have their labels.
    """

    isolate: bool
    pair_weight: float = 0.0

    def _call(self, model: nn.Module, batch: Batch, *, loss_only: bool = False) -> Any:
        pairs = {"pair_labels": batch.pair_labels} if self.pair_weight else {}
        return model(
            input_ids=batch.input_ids,
            masked_positions=batch.masked_positions if pairs else by_row(batch),
            labels=batch.labels,
            loss_only=loss_only,
            **pairs,
            **encoder_inputs(batch, isolate=self.isolate),
        )

    def __call__(self, model: nn.Module, micro: Micro, progress: float) -> dict[str, Tensor]:
        if not self.pair_weight:
            return {"loss": self.loss(model, micro.batch) * micro.masked_share}
        output = self._call(model, micro.batch, loss_only=True)
        masked, pair = output.masked_loss * micro.masked_share, output.pair_loss * micro.row_share
        return {"loss": masked + self.pair_weight * pair, "masked_loss": masked, "pair_loss": pair}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy at the masked positions."""
        return self._call(model, batch, loss_only=True).loss

    def score(self, model: nn.Module, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """Cross-entropy and accuracy at the masked positions, and of the pairs."""
        output, labels = self._call(model, batch), batch.pair_labels
        if not self.pair_weight or labels is None:
            return masked_scores(output.loss, output.logits, batch)
        count = torch.full((), len(labels), device=labels.device)
        return {
            **masked_scores(output.masked_loss, output.logits, batch),
            "validation_pair_loss": (output.pair_loss * count, count),
            "validation_pair_accuracy": ((output.pair_logits.argmax(-1) == labels).sum(), count),
        }

    def flops(self, model: Any, length: float, rate: float) -> float:
        """Useful training operations per real token that attends to `length` others, at a masking rate."""
        head = "pairs" if self.pair_weight else "mlm"
        return training_flops(model.config.to_arch(), model.config.vocab_size, length, rate, head)


def masked_scores(loss: Tensor, logits_PV: Tensor, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
    used = batch.labels != IGNORED
    count = used.sum()
    hits = ((logits_PV.argmax(-1) == batch.labels) & used).sum()
    return {"validation_loss": (loss * count, count), "validation_accuracy": (hits, count)}


# ---- replaced-token detection ----------------------------------------------------------------------------------------


def generator_arch(arch: Arch, width: float) -> Arch:
    """The generator beside a discriminator `arch`: as deep, `width` times as wide in heads, channels and ffn.

    It reads and writes the leading channels of a residual stream as wide as the discriminator's, so that both share
    their embeddings as they are (ELECTRA projects them instead).
    """

    def narrow(size: int) -> int:
        return max(1, round(size * width))

    layers = tuple(
        LayerArch(
            max(2, narrow(layer.hidden)), narrow(layer.heads), layer.head_dim, narrow(layer.ffn),
            patterns.join(patterns.parse(layer.pattern)[: narrow(layer.heads)]),
        )
        for layer in arch.layers
    )  # fmt: skip
    return Arch.from_json({**arch.to_json(), "layers": [vars(layer) for layer in layers]})


class Electra(nn.Module):
    """Generator and discriminator with shared token embeddings, trained together; the discriminator is kept."""

    generator: Any  # HF models of ours
    discriminator: Any

    def __init__(self, generator: Any, discriminator: Any) -> None:
        super().__init__()
        self.discriminator, self.generator = discriminator, generator
        generator.set_input_embeddings(discriminator.get_input_embeddings())
        generator.tie_weights()

    def forward(self, batch: Batch, isolate: bool) -> dict[str, Tensor]:
        """Means: "generator_loss" over masked slots, "loss" over real tokens; and what validation looks at.

        The generator's samples carry no gradient (section 2 of the paper); they are drawn with the batch's own numbers.
        """
        inputs = encoder_inputs(batch, isolate=isolate)
        guess = self.generator(input_ids=batch.input_ids, masked_positions=by_row(batch), labels=batch.labels, **inputs)
        with torch.no_grad():
            filled, replaced = replace_tokens(batch, sample(guess.logits.detach(), batch.draws))
            labels = torch.where(batch.document_ids > 0, replaced.long(), IGNORED)
        found = self.discriminator(input_ids=filled, labels=labels, **inputs)
        return {
            "generator_loss": guess.loss,
            "generator_logits": guess.logits,
            "loss": found.loss,
            "replaced": labels,
            "hits": (found.logits > 0).long() == labels,
        }


@dataclass(frozen=True)
class ReplacedTokens:
    """ELECTRA's objective: the generator's masked-LM loss + `weight` times the discriminator's over all real tokens."""

    isolate: bool
    weight: float

    def __call__(self, model: nn.Module, micro: Micro, progress: float) -> dict[str, Tensor]:
        found = model(micro.batch, self.isolate)
        generator = found["generator_loss"] * micro.masked_share
        discriminator = found["loss"] * micro.token_share
        return {
            "loss": generator + self.weight * discriminator,
            "generator_loss": generator,
            "discriminator_loss": discriminator,
        }

    def score(self, model: nn.Module, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """The generator's masked-LM figures (comparable with other runs), and the discriminator's."""
        found = model(batch, self.isolate)
        real = batch.document_ids > 0
        replaced = found["replaced"] == 1
        return {
            **masked_scores(found["generator_loss"], found["generator_logits"], batch),
            "validation_replaced_loss": (found["loss"] * real.sum(), real.sum()),
            "validation_replaced_accuracy": ((found["hits"] & real).sum(), real.sum()),
            "validation_replaced_recall": ((found["hits"] & replaced).sum(), replaced.sum()),
        }

    def flops(self, model: Electra, length: float, rate: float) -> float:
        """As of `MaskedLM`, of both models together."""
        small, large = model.generator.config, model.discriminator.config
        generator = training_flops(small.to_arch(), small.vocab_size, length, rate)
        return generator + training_flops(large.to_arch(), large.vocab_size, length, 0.0, head="rtd")
