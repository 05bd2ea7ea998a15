"""The stage that pre-trains: token shards and a tokenizer in; checkpoints, metrics and a Hugging Face model out.

`build` reads from top to bottom like a table of contents. Masked language modelling inside a budget is 24hBERT's (arXiv
2104.07705); what it cost, and how near to the hardware it came, is printed and kept in summary.json.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

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
from frugalbert.data.masking import Vocabulary
from frugalbert.data.rows import read_index
from frugalbert.model.arch import Arch
from frugalbert.run import flatten, say, write_atomic
from frugalbert.trackers import Trackers
from frugalbert.train.assemble import Method, Rows, assemble, curve_scale, optimizer_settings, row_lengths
from frugalbert.train.batches import mask_rate
from frugalbert.train.curves import curve
from frugalbert.train.loop import train
from frugalbert.train.objectives import Electra, MaskedLM, ReplacedTokens, generator_arch
from frugalbert.train.optim import check_optimizer, parameter_table
from frugalbert.train.state import Run, write_weights
from frugalbert.train.student import Distilled, Student, terms
from frugalbert.train.summary import announce, attended, measured_ceiling, summarise
from frugalbert.train.teacher import load_teacher, slice_of_teacher
from frugalbert.train.weights import load_model

OwnArch = TypeVar("OwnArch", Pretrain, Attention)
Make = Callable[[int, Vocabulary], Method]
"""The method, from the tokens of the longest rows and the vocabulary."""


def build(section: Pretrain, inputs: dict[str, Path], out: Path, machine: Machine) -> dict[str, Any]:
    """Pre-train within the budget; returns the headline figures.

    Raises ValueError and OSError for what the user can mend, Stopped after a signal.
    """
    section = resolved(section, inputs)
    return run_training(section, inputs, out, machine, maker(section, inputs))


def maker(section: Pretrain, inputs: dict[str, Path]) -> Make:
    """What makes the model and the objective of the (resolved) section."""
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

    return make


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


def run_training(section: Training, inputs: dict[str, Path], out: Path, machine: Machine, make: Make) -> dict[str, Any]:
    """Train what `make(longest row, vocabulary)` gives within the section's budget; returns the headline figures."""
    with keys_of(section):
        check(section, machine, inputs["yaml"])
    with dist.ranks(machine) as device:
        return _train(section, inputs, out, machine, make, device)


def prepare(
    section: Training, inputs: dict[str, Path], out: Path, machine: Machine, make: Make, device: torch.device
) -> tuple[Run, Rows, Method]:
    """The assembled run of a stage, on this rank's device."""
    clock = Clock()
    rows = Rows.open(section, inputs["shards"], inputs["tokenizer"], device)
    with keys_of(section):
        method = make(rows.longest, rows.sampler.vocabulary)
    run = assemble(section, machine, inputs["yaml"], out, rows, method, clock)
    run.state.costs["setup"] = clock.seconds()
    return run, rows, method


def _train(
    section: Training, inputs: dict[str, Path], out: Path, machine: Machine, make: Make, device: torch.device
) -> dict[str, Any]:
    run, rows, method = prepare(section, inputs, out, machine, make, device)
    run.trackers = Trackers(machine.trackers, out.parent.name, out / "trackers")
    write_table(run, section)
    flops = method.objective.flops(run.model, attended(section, rows.sampler), mask_rate(section.mask, 0.5))
    ceiling = announce(run, section, rows.sampler, method.kept, flops)
    before = (run.precision, run.micro_batch)
    train(run)
    write_weights(run, out / "model")
    if (run.precision, run.state.micro_batch) != before:  # by trial: others than those of the first ceiling
        ceiling = measured_ceiling(run, method.kept.config.to_arch(), run.state.micro_batch * rows.sampler.first)
    measured = {"flops_per_token": flops, "ceiling_flops": ceiling, "compile": run.compiled}
    return summarise(run, rows.sampler, rows.held_out, method.kept, measured)


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


# ---- what the loop calls ---------------------------------------------------------------------------------------------


def write_table(run: Run, section: Training) -> None:
    """parameters.txt: which parameter has which peak rate and weight decay. The trackers get the settings."""
    if dist.is_main():
        write_atomic(run.out / "parameters.txt", parameter_table(run.optimizer))
    if run.trackers is not None:
        run.trackers.configuration(flatten(section.model_dump(mode="json")))
