"""From a section to a Run: model, optimizer, batches, curves and measurements, put together in one place.

A `Method` says what is trained and how; `Rows` what it reads. Every training of the toolkit (stages, short trainings of
a search, benchmarks) is assembled here and driven by `loop.train`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from frugalbert import dist
from frugalbert.budget import Clock
from frugalbert.config import Machine, Training
from frugalbert.data import tokenizer as tokenizers
from frugalbert.data.masking import Batch, Vocabulary
from frugalbert.data.rows import read_index
from frugalbert.train.batches import HeldOut, Sampler
from frugalbert.train.curves import UNSCALED, curve, rate
from frugalbert.train.optim import OptimizerSettings, make_optimizer
from frugalbert.train.phases import at, spans
from frugalbert.train.state import Drawn, Recipe, Run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ACTIVATIONS = {"cpu": 1 << 30, "cuda": 16 << 30}  # bytes of one micro-batch, unless the YAML says otherwise
Draw = Callable[[float, dict[str, int], int], Drawn]


@dataclass
class Method:
    """What tells one way of training from another.

    `kept` is the Hugging Face model that is written: `model`, or the part of it whose weights begin with `prefix`.
    `change` wraps the drawing of batches; `prepare` sees the assembled run before it starts; `passes` of the kept model
    hold their activations at once; `blocks` are the layers that may be compiled, by default all.
    """

    model: nn.Module
    kept: Any
    objective: Any  # callable, with `score` and `flops`
    prefix: str = ""
    passes: float = 1.0
    change: Callable[[Draw], Draw] = lambda draw: draw
    prepare: Callable[[Run], None] = lambda run: None
    blocks: list[nn.Module] | None = None


@dataclass(frozen=True, eq=False)
class Rows:
    """What a training reads, on its device. `longest`: tokens of the longest rows."""

    tokenizer: PreTrainedTokenizerFast
    sampler: Sampler
    held_out: HeldOut
    longest: int

    @classmethod
    def open(
        cls, section: Training, shards: Path, tokenizer: Path, device: torch.device, *, at_end: bool = False
    ) -> Rows:
        """Raises ValueError if shards and tokenizer do not belong together. `at_end`: see HeldOut."""
        names = tokenizers.load(tokenizer)
        vocabulary = Vocabulary.from_tokenizer(names).to(device)
        lengths = row_lengths(section, shards)
        sampler = Sampler(section, shards, lengths, vocabulary, tokenizers.digest(tokenizer))
        held_out = HeldOut(shards, lengths[0], vocabulary, section.validation.rows, at_end=at_end)
        return cls(names, sampler, held_out, max(lengths))


def row_lengths(section: Training, shards: Path) -> list[int]:
    """The row lengths in the order of the phases. Raises ValueError if the shards lack one."""
    there = [int(length) for length in read_index(shards)["sets"]]
    wanted = [phase.length for phase in section.phases]
    first = [length for length in there if length not in wanted] or there[:1]
    return [first[0], *wanted]


def assemble(
    section: Training, machine: Machine, folder: Path, out: Path, rows: Rows, method: Method, clock: Clock
) -> Run:
    """The run, ready for `loop.train`. `folder`: where the YAML and its plug-ins are."""
    device, sampler = rows.sampler.device, rows.sampler
    model = method.model.to(device)
    blocks = dist.blocks(model) if method.blocks is None else method.blocks
    if machine.compile is True:
        dist.compile_blocks(blocks, dynamic=False)  # before FSDP wraps them
    ramp = section.batch_ramp if device.type == "cuda" else None  # where every shape is compiled anew
    share = -(-(ramp.start if ramp else section.batch_size) // dist.world())  # of a global batch, this rank's
    free = {"micro_batch": machine.micro_batch, "compile": machine.compile if machine.strategy == "ddp" else "as said"}
    if device.type == "cpu" and dist.multiplies_bf16(device):
        free["precision"] = section.precision
    run = Run(
        model=model,
        parallel=dist.wrap(model, device, machine.strategy),
        optimizer=make_optimizer(model, optimizer_settings(section), folder),
        device=device,
        precision=dist.pick_precision(section.precision, device),
        recipe=make_recipe(section, folder),
        clock=clock,
        out=out,
        draw=method.change(sampler.draw),
        objective=method.objective,
        write_model=writer(method.kept, rows.tokenizer),
        prefix=method.prefix,
        micro_batch=_micro_batch(section, machine, share, method, sampler),
        micro_batch_fixed=machine.micro_batch != "auto",
        largest_micro_batch=share,
        free=frozenset(name for name, setting in free.items() if setting == "auto"),
        blocks=blocks,
        compiled=machine.compile is True,
        trial=device.type == "cuda",
    )
    run.validate = validator(run, method.objective, rows.held_out)
    method.prepare(run)
    return run


def optimizer_settings(section: Training) -> OptimizerSettings:
    return OptimizerSettings(
        name=section.optimizer,
        learning_rate=section.learning_rate,
        weight_decay=section.weight_decay,
        betas=section.betas,
        epsilon=section.epsilon,
        muon_learning_rate=section.muon_learning_rate,
        options=dict(section.optimizer_options),
    )


def curve_scale(section: Training) -> tuple[float | None, float]:
    """(steps after warm-up if the budget counts steps, peak rate)."""
    steps = section.budget.amount * (1.0 - section.warmup) if section.budget.kind == "steps" else None
    return steps, section.learning_rate


def make_recipe(section: Training, folder: Path) -> Recipe:
    shape = curve(section.curve, section.curve_options, folder, curve_scale(section))
    power = 2.0 if section.curve == "exp" else 1.0  # 24hBERT's exponential schedule warms up quadratically
    parts = spans(section, 1)  # schedules know no lengths

    def factor(progress: float) -> float:
        part, rescaled = at(parts, progress), section.curve not in UNSCALED
        return part.peak * rate(part.within(progress), part.warmup, shape, power, rescaled=rescaled)

    return Recipe(
        budget=section.budget,
        rate=factor,
        schedule=lambda progress: at(parts, progress).schedule,
        seed=section.seed,
        stop_at=section.stop_at,
        clip_norm=section.clip_norm,
        non_finite=section.non_finite,
        validation=section.validation,
        early_stop=section.early_stop,
        checkpoints=section.checkpoints,
    )


def _micro_batch(section: Training, machine: Machine, share: int, method: Method, sampler: Sampler) -> int:
    """Sequences in memory at once: what the YAML says, else `share`, halved until an estimate of its activations fits.

    Few large pieces are mostly faster: each one casts and differentiates the whole vocabulary. Halves of `share` make
    pieces of one shape.
    """
    if machine.micro_batch != "auto":
        return min(share, machine.micro_batch)
    config = method.kept.config
    layers = config.to_arch().layers
    per_token = sum(40 * layer.hidden + 10 * layer.ffn + 6 * layer.heads * sampler.first for layer in layers)
    per_token += 6 * max(section.mask.rate) * config.vocab_size
    fits = ACTIVATIONS[sampler.device.type] / (method.passes * per_token * sampler.first)
    while share > max(1, fits):
        share = (share + 1) // 2
    return share


# ---- what the loop calls ---------------------------------------------------------------------------------------------


def writer(model: Any, tokenizer: PreTrainedTokenizerFast) -> Callable[[Path, dict[str, Tensor]], None]:
    """Writes weights as a Hugging Face directory with configuration, code and tokenizer."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # one of its own for every checkpoint

    def write(path: Path, weights: dict[str, Tensor]) -> None:
        model.save_pretrained(path, state_dict=weights)
        tokenizer.save_pretrained(path)

    return write


def validator(run: Run, objective: Any, held_out: HeldOut) -> Callable[[Callable[[], None]], dict[str, float]]:
    """Measures the objective's figures on the held-out rows."""

    def score(batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        with torch.no_grad(), dist.autocast(run.device, run.precision):
            return objective.score(run.parallel, batch)

    def validate(pause: Callable[[], None]) -> dict[str, float]:
        run.model.eval()
        try:
            return held_out.measure(score, max(1, run.state.micro_batch), pause)
        finally:
            run.model.train()

    return validate
