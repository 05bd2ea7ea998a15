"""The stage that pre-trains: token shards and a tokenizer in; checkpoints, metrics and a Hugging Face model out.

`build` reads from top to bottom like a table of contents. Masked language modelling inside a budget is 24hBERT's (arXiv
2104.07705); what it cost, and how near to the hardware it came, is printed and kept in summary.json.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from frugalbert import dist
from frugalbert.budget import Clock
from frugalbert.config import (
    FROM_ATTENTION,
    FROM_SEARCH,
    FROM_SUPERNET,
    FROM_TEACHER,
    Attention,
    Machine,
    Pretrain,
    Supernet,
    Training,
)
from frugalbert.data import tokenizer as tokenizers
from frugalbert.data.masking import Batch, Vocabulary
from frugalbert.data.rows import read_index
from frugalbert.model.arch import Arch
from frugalbert.run import flatten, say, write_atomic
from frugalbert.train.batches import HeldOut, Sampler, mask_rate
from frugalbert.train.curves import UNSCALED, curve, rate
from frugalbert.train.loop import train
from frugalbert.train.objectives import Electra, MaskedLM, ReplacedTokens, generator_arch
from frugalbert.train.optim import OptimizerSettings, check_optimizer, make_optimizer, parameter_table
from frugalbert.train.phases import at, spans
from frugalbert.train.state import Drawn, Recipe, Run, write_weights
from frugalbert.train.student import Distilled, Student, terms
from frugalbert.train.summary import announce, attended, summarise
from frugalbert.train.teacher import load_teacher, slice_of_teacher
from frugalbert.train.weights import load_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ACTIVATIONS = {"cpu": 1 << 30, "cuda": 16 << 30}  # bytes of one micro-batch, unless the YAML says otherwise
COMPILE_FROM_SECONDS = 600.0
GRAPHS = 64  # of torch.compile
OwnArch = TypeVar("OwnArch", Pretrain, Attention)
Draw = Callable[[float, dict[str, int], int], Drawn]


def build(section: Pretrain, inputs: dict[str, Path], out: Path, machine: Machine) -> dict[str, Any]:
    """Pre-train within the budget; returns the headline figures.

    Raises ValueError and OSError for what the user can mend, Stopped after a signal.
    """
    section = resolved(section, inputs)
    arch = Arch.load(section.arch, inputs["yaml"])  # a mistake in it shows at once
    pairs = section.pair_weight > 0.0 and has_pairs(inputs["shards"])

    def make(longest: int, vocabulary: Vocabulary) -> Method:
        lengths = row_lengths(section, inputs["shards"])
        teacher = load_teacher(section, inputs, lengths, vocabulary) if section.distill else None
        if section.start == FROM_TEACHER and teacher is not None:
            model = slice_of_teacher(section, arch, teacher, inputs["shards"], vocabulary)
        else:
            model = make_model(section, inputs["yaml"], longest, vocabulary, pairs=pairs)
        if section.distill and teacher is not None:
            student = Student(model, teacher, section.distill)
            who = teacher.arch or "another tokenizer, compared word by word"
            say(f"pretrain: teacher {section.distill.teacher}: {who}; {terms(section.distill)}")
            objective = Distilled(section.isolate_documents, section.distill)
            return Method(student, model, objective, "network.", blocks=student.blocks())
        if section.objective == "rtd":
            both = with_generator(section, model)
            return Method(
                both, model, ReplacedTokens(section.isolate_documents, section.replaced.weight), "discriminator."
            )
        return Method(model, model, MaskedLM(section.isolate_documents, section.pair_weight if pairs else 0.0))

    return run_training(section, inputs, out, machine, make)


def resolved(section: OwnArch, inputs: dict[str, Path]) -> OwnArch:
    """`from search`, `from attention` and `from supernet` replaced by what these stages have written."""
    found: dict[str, Any] = {}
    for key, file in (("arch", "arch.json"), ("start", "model")):
        if getattr(section, key) in (FROM_SEARCH, FROM_ATTENTION):
            found[key] = str((inputs[getattr(section, key).removeprefix("from ")] / file).resolve())
    lesson = section.distill if isinstance(section, Pretrain) else None
    if lesson and lesson.teacher == FROM_SUPERNET:
        found["distill"] = lesson.model_copy(update={"teacher": str((inputs["supernet"] / "model").resolve())})
    return section.model_copy(update=found)


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


def run_training(
    section: Training, inputs: dict[str, Path], out: Path, machine: Machine, make: Callable[[int, Vocabulary], Method]
) -> dict[str, Any]:
    """Train what `make(longest row, vocabulary)` gives within the section's budget; returns the headline figures."""
    with keys_of(section):
        check(section, machine, inputs["yaml"])
    with dist.ranks(machine) as device:
        return _train(section, inputs, out, machine, make, device)


def _train(
    section: Training, inputs: dict[str, Path], out: Path, machine: Machine, make: Callable[[int, Vocabulary], Method],
    device: torch.device,
) -> dict[str, Any]:  # fmt: skip
    clock, folder = Clock(), inputs["yaml"]
    tokenizer = tokenizers.load(inputs["tokenizer"])
    vocabulary = Vocabulary.from_tokenizer(tokenizer).to(device)
    lengths = row_lengths(section, inputs["shards"])
    digest = tokenizers.digest(inputs["tokenizer"])
    sampler = Sampler(section, inputs["shards"], lengths, vocabulary, digest)
    held_out = HeldOut(inputs["shards"], lengths[0], vocabulary, section.validation.rows)
    with keys_of(section):
        method = make(max(lengths), vocabulary)
    model = method.model.to(device)
    compiled = compile_blocks(method, section, machine, device)
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
        write_model=writer(method.kept, tokenizer),
        prefix=method.prefix,
        trackers=dist.Trackers(machine.trackers, out.parent.name, out / "trackers"),
        micro_batch=first_micro_batch(section, machine, device, method, lengths[0]),
        micro_batch_fixed=machine.micro_batch != "auto",
        trial=device.type == "cuda" or compiled,
    )
    run.validate = validator(run, method.objective, held_out)
    method.prepare(run)
    run.state.costs["setup"] = clock.seconds()
    write_table(run, section)
    flops = method.objective.flops(model, attended(section, sampler), mask_rate(section.mask, 0.5))
    ceiling = announce(run, section, sampler, method.kept, flops)
    train(run)
    write_weights(run, out / "model")
    measured = {"flops_per_token": flops, "ceiling_flops": ceiling, "compile": compiled}
    return summarise(run, sampler, held_out, method.kept, measured)


# ---- from the section to parts ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def keys_of(section: Training) -> Iterator[None]:
    """Sentences about keys of `pretrain` name those of the section that is at work, where it has the same."""
    try:
        yield
    except ValueError as error:
        kind = type(section)
        keys = rf"\bpretrain\.({'|'.join(kind.model_fields)})\b"
        raise ValueError(re.sub(keys, rf"{kind.__name__.lower()}.\1", str(error))) from error


def check(section: Training, machine: Machine, folder: Path) -> None:
    """Refuse in the first second what could only fail later. Raises ValueError, FileNotFoundError."""
    curve(section.curve, section.curve_options, folder, curve_scale(section))
    check_optimizer(optimizer_settings(section), folder)
    if machine.strategy == "fsdp" and section.precision == "fp16":
        raise ValueError("machine.strategy fsdp does not go with pretrain.precision fp16; write bf16 or fp32")


def has_pairs(shards: Path) -> bool:
    """Whether the rows are sentence pairs, with labels."""
    return read_index(shards).get("pairs", "none") != "none"


def row_lengths(section: Training, shards: Path) -> list[int]:
    """The row lengths in the order of the phases. Raises ValueError if the shards lack one."""
    there = [int(length) for length in read_index(shards)["sets"]]
    wanted = [phase.length for phase in section.phases]
    first = [length for length in there if length not in wanted] or there[:1]
    return [first[0], *wanted]


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


def make_model(
    section: Pretrain | Attention, folder: Path, longest: int, vocabulary: Vocabulary, *, pairs: bool = False
) -> Any:
    """The model to train, from `seed` or from the weights of `start`, with a head for sentence `pairs` if they are to
    be learnt. Raises ValueError if they do not fit."""
    arch = Arch.load(section.arch, folder)
    model = first_weights(section, arch, folder, vocabulary, pairs=pairs)
    known = model.config.to_arch()
    if pairs and known.token_types == 1:
        raise ValueError("pretrain.arch knows one kind of segment; sentence pairs (shards.pairs) need token_types=2")
    if "arch" in section.model_fields_set and known != arch:
        raise ValueError(f"pretrain.start {section.start} is {known.brief()}, not {arch.brief()}; remove pretrain.arch")
    if known.max_length < longest:
        raise ValueError(f"pretrain.arch knows {known.max_length} positions; add max_length={longest} for these shards")
    return model


def first_weights(
    section: Pretrain | Attention | Supernet, arch: Arch, folder: Path, vocabulary: Vocabulary, *, pairs: bool = False
) -> Any:
    """A model of `arch` with random weights of `section.seed`, or that of `section.start`, whatever its Arch.

    Raises ValueError if there is none or it has another vocabulary.
    """
    from frugalbert.model.configuration import FrugalConfig
    from frugalbert.model.modeling import FrugalForMaskedLM, FrugalForPairs, FrugalForReplacedTokenDetection

    torch.manual_seed(section.seed)
    detects = isinstance(section, Pretrain) and section.objective == "rtd"
    kind = FrugalForReplacedTokenDetection if detects else FrugalForPairs if pairs else FrugalForMaskedLM
    if section.start is None:
        sizes = (arch, vocabulary.size, vocabulary.pad, section.dropout)
        return kind(FrugalConfig.from_arch(*sizes, sep_token_id=vocabulary.sep)).train()
    return load_model(section.start, "pretrain.start", folder, kind, vocabulary, section.dropout).train()


def with_generator(section: Pretrain, model: Any) -> Electra:
    """ELECTRA's pair: the discriminator `model` and a generator from the same seed's next numbers."""
    from frugalbert.model.configuration import FrugalConfig
    from frugalbert.model.modeling import FrugalForMaskedLM

    small = generator_arch(model.config.to_arch(), section.replaced.generator_width)
    known = model.config
    config = FrugalConfig.from_arch(
        small, known.vocab_size, known.pad_token_id, section.dropout, sep_token_id=known.sep_token_id
    )
    return Electra(FrugalForMaskedLM(config), model).train()


def compile_blocks(method: Method, section: Training, machine: Machine, device: torch.device) -> bool:
    """Compile the encoder's layers one by one (one compilation serves all of a shape). Whether it was done."""
    wanted = machine.compile
    if wanted == "auto":
        short = section.budget.kind == "seconds" and section.budget.amount <= COMPILE_FROM_SECONDS
        wanted = device.type == "cuda" and not short
    if wanted:
        # all layers of all models run through one function of torch, whose graphs count together: one for each kind of
        # layer, shape and mode; beyond the limit (8 of its own) it would silently not compile
        torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
        for block in dist.blocks(method.model) if method.blocks is None else method.blocks:
            block.compile(dynamic=False)
    return bool(wanted)


def first_micro_batch(section: Training, machine: Machine, device: torch.device, method: Method, length: int) -> int:
    """Sequences in memory at once: what the YAML says, else as many as an estimate of their activations allows.

    Few large pieces are faster: each one casts and differentiates the whole vocabulary. A GPU that has less memory than
    the estimate wants halves it in the trial before the first step.
    """
    share = -(-section.batch_size // dist.world())
    if machine.micro_batch != "auto":
        return min(share, machine.micro_batch)
    config = method.kept.config
    layers = config.to_arch().layers
    per_token = sum(40 * layer.hidden + 10 * layer.ffn + 6 * layer.heads * length for layer in layers)
    per_token += 6 * max(section.mask.rate) * config.vocab_size
    return min(share, max(1, int(ACTIVATIONS[device.type] / (method.passes * per_token * length))))


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


def write_table(run: Run, section: Training) -> None:
    """parameters.txt: which parameter has which peak rate and weight decay. The trackers get the settings."""
    if dist.is_main():
        write_atomic(run.out / "parameters.txt", parameter_table(run.optimizer))
    if run.trackers is not None:
        run.trackers.configuration(flatten(section.model_dump(mode="json")))
