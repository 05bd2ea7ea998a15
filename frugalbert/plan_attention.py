"""What `plan` says of sparse attention: how dense, how blocky, what it saves at most, and what will run it. No torch.

In: sections, architectures and what is known of earlier stages. Out: texts. Densities and Amdahl's bound are those of
`model/patterns.py` and `model/cost.py`; the back-end is the one that `model/backends.py` will choose again.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from frugalbert.config import Attention, Config, Importance, Pretrain
from frugalbert.model.arch import Arch
from frugalbert.model.cost import (
    amdahl,
    attention_share,
    attention_summary,
    forward_flops,
    parameter_count,
    training_flops,
)  # fmt: skip
from frugalbert.plan_training import device_of, speeds, tokens_of, training, vocabulary_of
from frugalbert.progress import duration, number
from frugalbert.train import phases


def plain(arch: Arch) -> Arch:
    """The same sizes with dense attention."""
    return replace(arch, layers=tuple(replace(layer, pattern="dense") for layer in arch.layers))


def attention(config: Config, bound: str, arch: Arch, folder: Path, known: dict[str, Any]) -> str:
    """The stage: until it has run, all that is known of its masks is what they shall become."""
    section = config.attention
    assert section is not None
    length, goal = max(_lengths(config, section)), "a density that the penalty decides"
    if section.density is not None:
        unit = "blocks" if section.structure == "toeplitz-priced" else "pairs"
        goal = f"{section.density:.1%} of {unit}"
    masks = f"{section.structure} masks for {goal}, known when the stage has run; dense while they are learnt"
    return _training(
        config, section, arch, folder, known, (bound, f"; {masks}; {amdahl(attention_share(arch, length), length)}")
    )


def importance(config: Config, bound: str, arch: Arch, folder: Path, known: dict[str, Any]) -> str:
    """The stage: a dense training with soft masks, and the short trainings of its study."""
    section = config.importance
    assert section is not None
    said = _training(config, section, arch, folder, known, (bound, "; soft masks"))
    study, length, vocabulary = section.study, _lengths(config, section)[0], vocabulary_of(config, folder, known)
    if study is None:
        return said
    runs = (2 + section.controls) * len(study.seeds)
    trained = runs * study.steps * study.recipes[0].batch_size * length
    flops = trained * training_flops(arch, vocabulary, length, 0.15)
    looked = runs * study.looks * section.validation.rows * length
    flops += looked * forward_flops(arch, length, vocab_size=vocabulary, masked=0.15, head="mlm")
    times = ", ".join(f"on {where} roughly {duration(flops / speed)}" for where, speed in speeds(config))
    variants = f"full, no diagonal and {section.controls} random drops with {len(study.seeds)} seeds"
    return f"{said}; study of {variants}: {runs} trainings of {study.steps} steps, {number(trained)} tokens, {times}"


def patterns(config: Config, section: Pretrain, arch: Arch) -> str:
    """Of an architecture with patterns at the longest rows. Raises ValueError for rows that a pattern does not know."""
    length, settings = max(_lengths(config, section)), {"packed": section.isolate_documents}
    return attention_summary(arch, length, device_of(config), **settings, dropout=section.dropout > 0.0)


def _lengths(config: Config, section: Pretrain | Attention | Importance) -> list[int]:
    assert config.shards is not None
    return [span.length for span in phases.spans(section, config.shards.length[0])]


def _training(
    config: Config, section: Attention | Importance, arch: Arch, folder: Path, known: dict[str, Any],
    around: tuple[str, str],
) -> str:  # fmt: skip
    """Of a dense encoder, between two texts."""
    assert config.shards is not None
    vocabulary, rate = vocabulary_of(config, folder, known), section.mask.rate[0]
    spans = phases.spans(section, config.shards.length[0])
    flops = phases.per_token(spans, lambda span: training_flops(arch, vocabulary, span.length, rate))
    parameters = parameter_count(arch, vocabulary, "mlm")
    what = f"{around[0]}{arch.brief()}, {number(parameters)} parameters, {number(flops)}FLOP/token{around[1]}"
    return training(config, section, (what, flops, parameters), tokens_of(config, folder, known))
