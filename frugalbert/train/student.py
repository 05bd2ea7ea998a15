"""The student of a distillation: module and objective. A teacher and batches in, the sum of what is to be learnt out.

Terms and their sources: `distill.py`. Which layers are compared: the last (AutoTinyBERT, arXiv 2107.13686), evenly
spread ones and the embeddings (TinyBERT, arXiv 1909.10351, section 3.1), or pairs from the YAML.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from frugalbert import dist
from frugalbert.config import Distill
from frugalbert.data.masking import Batch
from frugalbert.model.cost import training_flops
from frugalbert.model.losses import masked_loss
from frugalbert.train import distill
from frugalbert.train.batches import Micro
from frugalbert.train.objectives import encoder_inputs, masked_scores
from frugalbert.train.teacher import Lesson, Teacher
from frugalbert.train.words import WordTeacher

KEY = "pretrain.distill"


def layer_pairs(rule: str | Sequence[tuple[int, int]], student: int, teacher: int) -> tuple[tuple[int, int], ...]:
    """(student's layer, teacher's) to compare, counted from 1, 0 = embeddings; the arguments are numbers of layers.

    Raises ValueError for a layer that does not exist.
    """
    if rule == "last":
        return ((student, teacher),)
    if rule == "even":
        return tuple((layer, round(layer * teacher / student)) for layer in range(student + 1))
    pairs = tuple((int(mine), int(other)) for mine, other in rule)
    for who, place, depth in (("student", 0, student), ("teacher", 1, teacher)):
        wrong = [pair[place] for pair in pairs if pair[place] > depth]
        if wrong:
            raise ValueError(f"{KEY}.layers names layer {wrong[0]} of the {who}, which has {depth}")
    return pairs


def terms(section: Distill) -> str:
    """ "0.1 mlm + 0.5 logits": what is learnt."""
    named = ((getattr(section, name), name) for name in ("mlm", "logits", "attention", "hidden", "relation"))
    return " + ".join(f"{weight:g} {name}" for weight, name in named if weight)


class Student(nn.Module):
    """The encoder that learns, and projections to the teacher's width, which are not kept."""

    network: Any  # FrugalForMaskedLM

    def __init__(self, network: Any, teacher: Teacher | WordTeacher, section: Distill) -> None:
        """Raises ValueError if the two cannot be compared as the section asks."""
        super().__init__()
        self.network = network
        self.teacher = (teacher,)  # in a tuple: no part of the module
        mine = network.config.to_arch()
        self.pairs = layer_pairs(section.layers, len(mine.layers), teacher.depth)
        self.watched, self.asked = [], []
        if section.attention:
            self._watch_attention(mine, teacher.arch)
        if section.relation:
            self._watch_relations(section, mine, teacher.arch)
        fits = {}
        if section.hidden and mine.hidden != teacher.width:
            fits = {str(layer): nn.Linear(mine.hidden, teacher.width) for layer, _ in self.pairs}
        for fit in fits.values():
            nn.init.normal_(fit.weight, std=network.config.initializer_range)
            nn.init.zeros_(fit.bias)
        self.fits = nn.ModuleDict(fits)
        if not (section.mlm or section.logits):
            network.head.requires_grad_(False)
            network.decoder.bias.requires_grad_(False)

    def _watch_attention(self, mine: Any, other: Any) -> None:
        for layer, theirs in self.pairs:
            if layer and theirs:
                heads = mine.layers[layer - 1].heads, other.layers[theirs - 1].heads
                if heads[0] != heads[1]:
                    raise ValueError(
                        f"{KEY}.attention compares head by head, but layer {layer} has {heads[0]} heads and the "
                        f"teacher's layer {theirs} has {heads[1]}; give relation a weight instead"
                    )
                self.watched.append(layer - 1)
                self.asked.append(theirs - 1)

    def _watch_relations(self, section: Distill, mine: Any, other: Any) -> None:
        self.relation_layer = (section.relation_layer or len(other.layers)) - 1
        if self.relation_layer >= len(other.layers):
            raise ValueError(f"{KEY}.relation_layer is {section.relation_layer}; the teacher has {len(other.layers)}")
        for width in (mine.layers[-1].qkv, other.layers[self.relation_layer].qkv):
            if width % section.relation_heads:
                raise ValueError(
                    f"{KEY}.relation_heads {section.relation_heads} does not divide heads * head_dim = {width}; choose "
                    "a divisor of both models' widths"
                )
        self.watched.append(len(mine.layers) - 1)
        self.asked.append(self.relation_layer)

    def blocks(self) -> list[nn.Module]:
        """The layers of both models that can be compiled: those that nobody looks into."""
        mine = [block for index, block in enumerate(self.network.model.layers) if index not in self.watched]
        return mine + self.teacher[0].blocks(self.asked)

    def fit(self, layer: int, x: Tensor) -> Tensor:
        """Hidden states after a layer in the teacher's width."""
        return self.fits[str(layer)](x) if self.fits else x

    def forward(self, objective: Distilled, batch: Batch) -> dict[str, Tensor]:
        """What `objective` measures."""
        if not self.training and objective.of_words:
            return objective.text(self, batch)
        found = objective.measure(self, batch)
        if self.training and dist.world() > 1:  # the ranks' averaging waits for a gradient of every weight
            weights = [parameter for parameter in self.parameters() if parameter.requires_grad]
            found["loss_of_tokens"] = found["loss_of_tokens"] + sum(weight.sum() * 0.0 for weight in weights)
        return found


@dataclass(frozen=True)
class Distilled:
    """The objective: the weighted sum of the section's terms. `isolate` hides other documents of a row."""

    isolate: bool
    section: Distill

    @property
    def of_words(self) -> bool:
        """Whether the vocabulary is learnt, so that a masked-LM loss means something."""
        return bool(self.section.mlm or self.section.logits)

    def __call__(self, model: nn.Module, micro: Micro, progress: float) -> dict[str, Tensor]:
        found = model(self, micro.batch)
        words, tokens = found.pop("loss_of_words"), found.pop("loss_of_tokens")
        figures = {"loss": words * micro.masked_share + tokens * micro.token_share}
        for name, value in found.items():
            of_words = name in ("text_loss", "logits_loss", "cached_share")
            figures[name] = value.detach() * (micro.masked_share if of_words else micro.token_share)
        return figures

    def score(self, model: nn.Module, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """Held-out masked-LM figures; without any learning of words the distance from the teacher."""
        found = model(self, batch)
        if self.of_words:
            return masked_scores(found["loss"], found["logits"], batch)
        real = (batch.document_ids > 0).sum()
        return {"validation_loss": (found["loss_of_tokens"] * real, real)}

    def flops(self, model: Student, length: float, rate: float) -> float:
        """Useful operations per token of a step: the student's, forward and backward, and the teacher's forward."""
        config = model.network.config
        mine = training_flops(config.to_arch(), config.vocab_size, length, rate, whole=True)
        return model.teacher[0].flops(length, rate) + mine

    def text(self, model: Student, batch: Batch) -> dict[str, Tensor]:
        """Masked-LM loss and logits of the student."""
        output = model.network(
            batch.input_ids,
            labels=batch.labels,
            masked_positions=batch.masked_positions,
            **encoder_inputs(batch, isolate=self.isolate),
        )
        return {"loss": output.loss, "logits": output.logits}

    def measure(self, model: Student, batch: Batch) -> dict[str, Tensor]:
        """ "loss_of_words" (a mean over masked tokens), "loss_of_tokens" (over real ones), and each term unweighted."""
        section = self.section
        teacher, hidden = model.teacher[0], [theirs for _, theirs in model.pairs] if section.hidden else []
        foreign = isinstance(teacher, WordTeacher)
        lesson = Lesson({}, {}) if foreign else teacher.look(batch, model.asked, hidden)
        with distill.watch(model.network.model, model.watched) as states:
            output = model.network.model(
                batch.input_ids, output_hidden_states=bool(hidden), **encoder_inputs(batch, isolate=self.isolate)
            )
        zero = torch.zeros((), device=batch.input_ids.device)
        found = {"loss_of_words": zero}
        if self.of_words:
            found |= self._words(model, output.last_hidden_state, batch, lesson)
        if foreign:
            terms = {"hidden_loss": _by_word(model, teacher, batch, output.hidden_states)}
        else:
            terms = self._tokens(model, batch, lesson, states, output.hidden_states)
        weighted = [getattr(section, name.removesuffix("_loss")) * value for name, value in terms.items()]
        return found | {"loss_of_tokens": sum(weighted, zero)} | terms

    def _words(self, model: Student, last_BTD: Tensor, batch: Batch, lesson: Lesson) -> dict[str, Tensor]:
        network = model.network
        x = network.head(last_BTD.flatten(0, 1).index_select(0, batch.masked_positions))
        if lesson.wanted is None:
            loss = masked_loss(x, network.decoder, batch.labels, loss_only=True)[0]
            return {"loss_of_words": self.section.mlm * loss, "text_loss": loss}
        loss, hard, soft, _ = distill.distilled_loss(
            x, network.decoder, batch.labels, lesson.wanted, (self.section.mlm, self.section.logits),
            self.section.temperature,
        )  # fmt: skip
        found = {"loss_of_words": loss, "text_loss": hard, "logits_loss": soft}
        return found | ({"cached_share": loss.new_tensor(lesson.cached)} if self.section.cache else {})

    def _tokens(
        self, model: Student, batch: Batch, lesson: Lesson, states: dict[int, distill.States], hidden: Any
    ) -> dict[str, Tensor]:
        section, found = self.section, {}
        pairs = distill.pairs_of(batch.document_ids, isolate=self.isolate)
        if section.attention:
            terms = [
                distill.attention_loss(states[mine - 1], lesson.states[other - 1], pairs)
                for mine, other in model.pairs
                if mine and other
            ]
            found["attention_loss"] = torch.stack(terms).sum()
        if section.hidden:
            terms = [
                distill.hidden_loss(model.fit(mine, hidden[mine]), lesson.hidden[other], batch.document_ids)
                for mine, other in model.pairs
            ]
            found["hidden_loss"] = torch.stack(terms).sum()
        if section.relation:
            last = len(model.network.model.layers) - 1
            found["relation_loss"] = distill.relation_loss(
                states[last], lesson.states[model.relation_layer], pairs, section.relation_heads
            )
        return found


def _by_word(model: Student, teacher: WordTeacher, batch: Batch, hidden: Sequence[Tensor]) -> Tensor:
    """The hidden-state term where the teacher's tokens are others: means over the pieces of each word."""
    wanted, words, both = teacher.read(batch, [theirs for _, theirs in model.pairs])
    terms = [
        distill.hidden_loss(words.pool(model.fit(mine, hidden[mine])), wanted[other], both.long())
        for mine, other in model.pairs
    ]
    return torch.stack(terms).sum()
