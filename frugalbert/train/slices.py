"""Training all slices of one encoder: which ones a batch trains, what each learns, and what it may move.

In: batches, and a Space whose largest architecture the network has. Out: the objective of the one loop. Sandwich rule
and in-place distillation: Yu et al., arXiv 1903.05134 and 1812.08928; sampling one architecture after another:
AutoTinyBERT, arXiv 2107.13686. The architectures of a batch follow from the seed and the position in the data alone:
the same on every rank, for every micro-batch of a step, and after a restart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from frugalbert import dist
from frugalbert.config import Supernet
from frugalbert.data.masking import Batch
from frugalbert.model import slicing
from frugalbert.model.arch import Arch
from frugalbert.model.cost import training_flops
from frugalbert.space import Space
from frugalbert.train import distill
from frugalbert.train.batches import Micro
from frugalbert.train.objectives import by_row, encoder_inputs, masked_scores
from frugalbert.train.state import Drawn

ALL = 64  # architectures that `sampling: all` trains per batch at most


@dataclass(frozen=True)
class Sampling:
    """Draws the architectures of a batch by one of the strategies of `config.Supernet.sampling`."""

    space: Space
    strategy: str
    random_archs: int
    stratified: bool
    seed: int

    @classmethod
    def of(cls, section: Supernet, space: Space) -> Sampling:
        """Raises ValueError if the strategy does not go with the space."""
        if section.sampling == "all" and space.size() > ALL:
            raise ValueError(
                f"supernet.sampling all trains every architecture in every batch, but the space has {space.size()}; "
                "use sandwich"
            )
        return cls(space, section.sampling, section.random_archs, section.stratified, section.seed)

    def draw(self, position: int, progress: float) -> tuple[Arch, ...]:
        """For the batch at `position` of the sample sequence; the largest, if it is there, comes first."""
        rng = np.random.default_rng([self.seed, position])
        largest = self.space.largest()
        if self.strategy == "all":
            rest = [arch for arch in self.space.enumerate() if arch != largest]
            return (largest, *rest)
        if self.strategy == "alternate":
            return (largest,) if rng.random() < 0.5 else (self._one(rng),)
        if self.strategy == "random-linear":
            return (self._one(rng),) if rng.random() < progress else (largest,)
        others = tuple(self._one(rng) for _ in range(self.random_archs))
        if self.strategy == "random":
            return others
        return (largest, *others, self.space.smallest())

    def _one(self, rng: np.random.Generator) -> Arch:
        return self.space.sample_stratified(rng) if self.stratified else self.space.sample(rng)


@dataclass(frozen=True, eq=False)
class SliceMicro:
    """A micro-batch and the architectures that learn from it."""

    micro: Micro
    archs: tuple[Arch, ...]


def with_archs(
    draw: Callable[[float, dict[str, int], int], Drawn], sampling: Sampling
) -> Callable[[float, dict[str, int], int], Drawn]:
    """The same batches, each with its architectures."""

    def drawn(progress: float, samples: dict[str, int], micro_batch: int) -> Drawn:
        found = draw(progress, samples, micro_batch)
        archs = sampling.draw(sum(samples.values()), progress)
        return replace(found, micros=[SliceMicro(micro, archs) for micro in found.micros])

    return drawn


# ---- the module and its objective ------------------------------------------------------------------------------------


class SuperNetwork(nn.Module):
    """The encoder of the largest architecture and, with a teacher, the projection to the teacher's width.

    `layers` is the rule of `slicing.kept_layers`. The teacher is no part of the module: it is not trained or saved.
    """

    network: Any  # FrugalForMaskedLM

    def __init__(self, network: Any, layers: str, teacher: Any = None) -> None:
        super().__init__()
        self.network = network
        self.layers = layers
        self.teacher = (teacher,)
        self.fit = None if teacher is None else nn.Linear(network.config.hidden_size, teacher.config.hidden_size)
        if self.fit is not None:
            nn.init.normal_(self.fit.weight, std=network.config.initializer_range)
            nn.init.zeros_(self.fit.bias)
            network.head.requires_grad_(False)
            network.decoder.bias.requires_grad_(False)

    def kept(self, arch: Arch) -> tuple[int, ...]:
        return slicing.kept_layers(self.network.config.to_arch(), len(arch.layers), self.layers)  # type: ignore[arg-type]

    def forward(self, objective: SliceLosses, batch: Batch, archs: tuple[Arch, ...]) -> list[dict[str, Tensor]]:
        """What `objective` measures of each architecture."""
        found = objective.measure(self, batch, archs)
        if self.training and dist.world() > 1:  # the ranks' averaging waits for a gradient of every weight
            weights = [parameter for parameter in self.parameters() if parameter.requires_grad]
            found[0]["total"] = found[0]["total"] + sum(weight.sum() * 0.0 for weight in weights)
        return found


@dataclass(frozen=True)
class SliceLosses:
    """The objective: masked-LM loss of every slice and what the smaller ones learn from the largest's predictions, or,
    with a teacher, what its last layer shows."""

    isolate: bool
    inplace_weight: float
    combine: str
    validated: dict[str, Arch]
    """Suffix of a validation figure -> architecture; "" is the largest."""
    distilled: tuple[str, ...] = ()
    relation_heads: int = 12
    sampling: Sampling | None = None
    """For `flops` alone."""

    def __call__(self, model: nn.Module, item: SliceMicro, progress: float) -> dict[str, Tensor]:
        found = model(self, item.micro.batch, item.archs)
        share = item.micro.token_share if self.distilled else item.micro.masked_share
        total = sum((losses["total"] for losses in found), torch.zeros((), device=share.device))
        scale = share / len(found) if self.combine == "mean" else share
        if self.distilled:
            return {"loss": total * scale}
        text = torch.stack([losses["loss"].detach() for losses in found]).mean()
        return {"loss": total * scale, "text_loss": text * share}

    def score(self, model: nn.Module, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """Held-out figures of the largest, the median and the smallest architecture."""
        figures: dict[str, tuple[Tensor, Tensor]] = {}
        for losses, suffix in zip(model(self, batch, tuple(self.validated.values())), self.validated, strict=True):
            if self.distilled:
                real = (batch.document_ids > 0).sum()
                found = {"validation_loss": (losses["loss"] * real, real)}
            else:
                found = masked_scores(losses["loss"], losses["logits"], batch)
            figures |= {f"{name}{suffix}": value for name, value in found.items()}
        return figures

    def flops(self, model: SuperNetwork, length: float, rate: float) -> float:
        """Training operations per token of a batch's architectures together, on average; without the teacher's."""
        assert self.sampling is not None
        vocabulary = model.network.config.vocab_size
        batches = [self.sampling.draw(position, 0.5) for position in range(64)]
        whole = bool(self.distilled)
        return sum(training_flops(x, vocabulary, length, rate, whole=whole) for archs in batches for x in archs) / 64

    def measure(self, model: SuperNetwork, batch: Batch, archs: tuple[Arch, ...]) -> list[dict[str, Tensor]]:
        """ "loss" (comparable between runs), "total" (what is learnt) and "logits" of each architecture."""
        if self.distilled:
            return self._from_teacher(model, batch, archs)
        found: list[dict[str, Tensor]] = []
        largest = model.network.config.to_arch()
        for arch in archs:
            output = slicing.forward(
                model.network,
                arch,
                model.kept(arch),
                input_ids=batch.input_ids,
                masked_positions=by_row(batch),
                **encoder_inputs(batch, isolate=self.isolate),
            )
            teaches = found and archs[0] == largest
            target = found[0]["logits"].detach() if teaches else None
            hard, total = distill.soft_label_loss(output.logits, batch.labels, target, self.inplace_weight)
            found.append({"loss": hard, "total": total, "logits": output.logits})
        return found

    def _from_teacher(self, model: SuperNetwork, batch: Batch, archs: tuple[Arch, ...]) -> list[dict[str, Tensor]]:
        inputs = {"input_ids": batch.input_ids, **encoder_inputs(batch, isolate=self.isolate)}
        teacher = model.teacher[0]
        with torch.no_grad(), distill.watch(teacher, [-1]) as wanted:
            target = teacher(**inputs).last_hidden_state
        pairs = distill.pairs_of(batch.document_ids, isolate=self.isolate)
        found: list[dict[str, Tensor]] = []
        for arch in archs:
            shell = slicing.skeleton(model.network, arch)
            with distill.watch(shell.model, [-1]) as mine:
                output = slicing.forward(
                    model.network,
                    arch,
                    model.kept(arch),
                    masked_positions=batch.masked_positions,
                    output_hidden_states=True,
                    **inputs,
                )
            loss = self._of_states(mine[-1], wanted[-1], pairs)
            if "hidden" in self.distilled:
                loss = loss + self._of_hidden(model, output.hidden_states[-1], target, batch)
            found.append({"loss": loss, "total": loss})
        return found

    def _of_states(self, mine: distill.States, wanted: distill.States, pairs: Tensor) -> Tensor:
        total = torch.zeros((), device=pairs.device)
        if "attention" in self.distilled:
            total = total + distill.attention_loss(mine, wanted, pairs)
        if "relation" in self.distilled:
            total = total + distill.relation_loss(mine, wanted, pairs, self.relation_heads)
        return total

    def _of_hidden(self, model: SuperNetwork, hidden: Tensor, target: Tensor, batch: Batch) -> Tensor:
        assert model.fit is not None
        weight = model.fit.weight[:, : hidden.shape[-1]]
        projected = nn.functional.linear(hidden.to(weight.dtype), weight, model.fit.bias)
        return distill.hidden_loss(projected, target, batch.document_ids)


# ---- what a step may move --------------------------------------------------------------------------------------------


class OnlySampled:
    """Keeps weights and optimizer state that no architecture of the batch used as they were before the step.

    Their gradient is zero, but momentum would still move them and weight decay shrink them. Two hooks of the
    optimizer: one remembers, one puts back. A batch with the largest architecture uses everything and costs nothing.
    """

    def __init__(self, model: SuperNetwork, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer
        self.names = {parameter: name for name, parameter in model.network.named_parameters()}
        self.archs: tuple[Arch, ...] = ()
        self._before: list[tuple[Tensor, Tensor, Tensor]] = []
        optimizer.register_step_pre_hook(self._remember)
        optimizer.register_step_post_hook(self._put_back)

    def watch(
        self, draw: Callable[[float, dict[str, int], int], Drawn]
    ) -> Callable[[float, dict[str, int], int], Drawn]:
        """The same batches, whose architectures are noted."""

        def drawn(progress: float, samples: dict[str, int], micro_batch: int) -> Drawn:
            found = draw(progress, samples, micro_batch)
            self.archs = found.micros[0].archs
            return found

        return drawn

    @torch.no_grad()
    def _remember(self, *_: Any) -> None:
        self._before = []
        big = self.model.network.config.to_arch()
        if big in self.archs:
            return
        masks = {name: torch.zeros(weight.shape, dtype=torch.bool) for weight, name in self.names.items()}
        untouched = slicing.sliced(masks, big, [(arch, self.model.kept(arch)) for arch in self.archs])
        for weight, name in self.names.items():
            if name in untouched:
                weight.grad = None
            if weight.grad is None or masks[name].all():
                continue
            unused = ~masks[name].to(weight.device)
            states = [
                s for s in self.optimizer.state[weight].values() if torch.is_tensor(s) and s.shape == weight.shape
            ]
            self._before += [(tensor, unused, tensor[unused]) for tensor in (weight, *states)]

    @torch.no_grad()
    def _put_back(self, *_: Any) -> None:
        for tensor, unused, values in self._before:
            tensor[unused] = values
        self._before = []


def validated_archs(space: Space) -> dict[str, Arch]:
    """Suffix of validation figures -> the largest (no suffix), one of median size, the smallest."""
    rng = np.random.default_rng(0)
    drawn = [space.sample(rng) for _ in range(101)]
    archs = sorted(drawn, key=lambda arch: training_flops(arch, 1, 128, 0.0, whole=True))
    return {"": space.largest(), "_median": archs[50], "_smallest": space.smallest()}
