"""What a run will do, before it does it: stages and their state, sizes, tokens, hours and disk. No torch here."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frugalbert.config import (
    AUTO,
    FROM_ATTENTION,
    FROM_SEARCH,
    FROM_SUPERNET,
    Attention,
    Config,
    Finetune,
    Importance,
    Pretrain,
    Supernet,
    Sweep,
)
from frugalbert.plan_training import (
    GPU_FLOPS,
    entries_of,
    rough_sizes,
    source_bytes,
    speeds,
    tokens_of,
    training,
    vocabulary_of,
)
from frugalbert.progress import duration, number
from frugalbert.stages import Status, examine
from frugalbert.train import phases

if TYPE_CHECKING:
    from frugalbert.model.arch import Arch
    from frugalbert.space import Space

SERVING_FLOPS = 5e10  # of one CPU thread that serves one sequence at a time in fp32
READINGS, READING_SECONDS = 3, {"torch": 0.5, "onnx": 4.0, "onnx-int8": 5.0}  # building, exporting and warming up one
Row = tuple[str, str, str]


def rows(config: Config, directory: Path, folder: Path) -> list[Row]:
    """(stage, state, what it will do or did) for every stage."""
    found: list[Row] = []
    known: dict[str, dict[str, Any]] = {}
    for status in examine(config, directory, folder, read_files=False):
        name = status.stage.name
        metrics = (status.record or {}).get("metrics") or {}
        if metrics:
            known[name] = metrics
        if metrics and name == "attention":
            known[name] = metrics | {"arch": str((directory / name / "arch.json").resolve())}
        found.append((name, status.state, _describe(status, config, folder, known)))
    return found


def _describe(status: Status, config: Config, folder: Path, known: dict[str, dict[str, Any]]) -> str:
    if status.state == "drifted":
        return "; ".join(status.changes)
    if status.record:
        seconds = status.record["seconds"]
        metrics = {key: item for key, item in status.record["metrics"].items() if isinstance(item, int | float | str)}
        figures = ", ".join(f"{key.replace('_', ' ')} {number(item)}" for key, item in list(metrics.items())[:4])
        return f"took {duration(seconds)}; {figures}" if figures else f"took {duration(seconds)}"
    describe = {"corpus": _corpus, "tokenizer": _tokenizer, "shards": _shards, "pretrain": _pretrain}
    describe |= {"space": _space, "supernet": _supernet, "latency": _latency, "search": _search,
                 "attention": _attention, "importance": _importance}  # fmt: skip
    describe |= {"finetune": _finetune, "export": _export, "bench": _bench, "report": _report}
    function = describe.get(status.stage.name)
    return function(config, folder, known) if function else ""


def _corpus(config: Config, folder: Path, known: dict[str, Any]) -> str:
    assert config.corpus is not None
    size = source_bytes(config, folder)
    sources = [source if isinstance(source, str) else source.path for source in config.corpus.sources]
    absent = [
        name for name in sources if _is_local(name) and not (folder / name).exists() and not _matches(folder, name)
    ]
    what = (
        f"not there yet: {', '.join(absent)}" if absent else f"{number(size)}B" if size else "size not known beforehand"
    )
    return f"{', '.join(sources)} ({what})"


def _is_local(source: str) -> bool:
    return source != "python-docs" and not source.startswith("hub:")


def _matches(folder: Path, pattern: str) -> bool:
    return not Path(pattern).is_absolute() and any(folder.glob(pattern))


def _tokenizer(config: Config, folder: Path, known: dict[str, Any]) -> str:
    assert config.tokenizer is not None
    if config.tokenizer.path:
        entries = entries_of(folder / config.tokenizer.path)
        size = f"{entries} entries" if entries else f"size not known beforehand: {config.tokenizer.vocab_size} assumed"
        return f"load {config.tokenizer.path}, {size}"
    return f"train {config.tokenizer.kind}, {-(-config.tokenizer.vocab_size // 64) * 64} entries"


def _shards(config: Config, folder: Path, known: dict[str, Any]) -> str:
    assert config.shards is not None
    tokens = tokens_of(config, folder, known)
    lengths = ", ".join(map(str, config.shards.length))
    if tokens is None:
        return f"rows of {lengths} tokens"
    return f"rows of {lengths} tokens, about {number(tokens)} tokens, {number(2 * tokens * len(config.shards.length))}B"


def _arch(
    config: Config, section: Pretrain | Attention | Importance, folder: Path, known: dict[str, Any]
) -> tuple[str, Arch]:
    """What is trained, after what is to be said as long as it is not found."""
    from frugalbert import plan_attention
    from frugalbert.model.arch import Arch

    if section.arch == AUTO:
        return _auto(config, folder, known)
    if section.arch not in (FROM_SEARCH, FROM_ATTENTION):
        return "", Arch.load(section.arch, folder)
    if "arch" in (found := known.get(section.arch.removeprefix("from "), {})):
        return "", Arch.load(found["arch"], folder)
    if section.arch == FROM_SEARCH:
        return "from search, at most ", _choices(config).largest()
    assert config.attention is not None
    bound, arch = _arch(config, config.attention, folder, known)
    return f"from attention, {bound}", plan_attention.plain(arch)


def _auto(config: Config, folder: Path, known: dict[str, Any]) -> tuple[str, Arch]:
    """What `arch: auto` would be at the assumed pace; speeds and latencies are measured when the stage begins."""
    from frugalbert import sizing

    assert config.pretrain is not None
    assert config.shards is not None
    vocabulary, first = vocabulary_of(config, folder, known), config.shards.length[0]
    pace, unique = speeds(config)[0][1], tokens_of(config, folder, known) or math.inf
    rung = sizing.rough(config.pretrain, vocabulary, first, pace, unique)
    limit = config.pretrain.limit.latency_ms
    served = f", or as much less as {limit:g} ms a call allow" if limit else ""
    return f"auto ({sizing.LADDER[0]} to {sizing.LADDER[-1]}), at such a pace{served}: ", rung.arch


def _pretrain(config: Config, folder: Path, known: dict[str, Any]) -> str:
    from frugalbert import plan_attention
    from frugalbert.model import cost

    section = config.pretrain
    assert section is not None
    assert config.shards is not None
    (bound, arch), vocabulary = _arch(config, section, folder, known), vocabulary_of(config, folder, known)
    head = "pairs" if config.shards.pairs != "none" and section.pair_weight > 0.0 else "mlm"
    rate, whole = section.mask.rate[0], section.distill is not None
    flops = phases.per_token(
        phases.spans(section, config.shards.length[0]),
        lambda span: cost.training_flops(arch, vocabulary, span.length, rate, head, whole=whole),
    )
    parameters = cost.parameter_count(arch, vocabulary, head)
    what = f"{bound}{arch.brief()}, {number(parameters)} parameters, {number(flops)}FLOP/token"
    if not bound:
        sizes = {name: {getattr(layer, name) for layer in arch.layers} for name in ("hidden", "head_dim", "ffn")}
        what += rough_sizes(config, sizes)
    tokens = tokens_of(config, folder, known)
    if any(layer.pattern != "dense" for layer in arch.layers):
        what += "; " + plan_attention.patterns(config, section, arch)
    if section.distill:
        from frugalbert import plan_teacher

        largest = _choices(config).largest() if section.distill.teacher == FROM_SUPERNET else None
        rows = known.get("shards", {}).get("rows")
        said, more = plan_teacher.describe(section, config.shards, folder, largest, vocabulary, (tokens, rows))
        what, flops = f"{what}; {said}", flops + more
    return training(config, section, (what, flops, parameters), tokens)


def _attention(config: Config, folder: Path, known: dict[str, Any]) -> str:
    from frugalbert import plan_attention

    assert config.attention is not None
    bound, arch = _arch(config, config.attention, folder, known)
    return plan_attention.attention(config, bound, plan_attention.plain(arch), folder, known)


def _importance(config: Config, folder: Path, known: dict[str, Any]) -> str:
    from frugalbert import plan_attention

    assert config.importance is not None
    bound, arch = _arch(config, config.importance, folder, known)
    return plan_attention.importance(config, bound, plan_attention.plain(arch), folder, known)


# ---- choosing an architecture ----------------------------------------------------------------------------------------


def _choices(config: Config) -> Space:
    from frugalbert.space import Space

    assert config.space is not None
    return Space.of(config.space)


def _space(config: Config, folder: Path, known: dict[str, Any]) -> str:
    from frugalbert.model.cost import parameter_count

    space, vocabulary = _choices(config), vocabulary_of(config, folder, known)
    ends = [
        f"{arch.to_text()} ({number(parameter_count(arch, vocabulary))} parameters)"
        for arch in (space.smallest(), space.largest())
    ]
    size = f"{space.size():,}" if space.size() < 10**15 else number(space.size())
    sizes = {"hidden": space.hidden, "head_dim": space.head_dim, "ffn": space.ffn}
    return f"{size} architectures from {ends[0]} to {ends[1]}{rough_sizes(config, sizes)}"


def _supernet(config: Config, folder: Path, known: dict[str, Any]) -> str:
    from frugalbert.model import cost

    section, space, vocabulary = config.supernet, _choices(config), vocabulary_of(config, folder, known)
    assert section is not None
    assert config.shards is not None
    flops = flops_per_token(section, space, vocabulary, config.shards.length[0])
    largest = space.largest()
    parameters = cost.parameter_count(largest, vocabulary, "mlm")
    others = {"sandwich": section.random_archs + 2, "random": section.random_archs, "all": space.size()}
    what = (
        f"{largest.to_text()}, {number(parameters)} parameters, {others.get(section.sampling, 1)} of its slices a step"
    )
    what += f": {number(flops)}FLOP/token" + (" and the teacher's" if section.teacher else "")
    return training(config, section, (what, flops, parameters), tokens_of(config, folder, known))


def flops_per_token(section: Supernet, space: Space, vocabulary: int, length: int) -> float:
    """Training operations per token of all architectures of a batch together, on average (`train/slices.py`)."""
    from frugalbert.model.cost import training_flops

    def flops(arch: Arch) -> float:
        rate = sum(section.mask.rate) / len(section.mask.rate)
        return training_flops(arch, vocabulary, length, rate, whole=section.teacher is not None)

    largest, random = flops(space.largest()), _mean(space, flops, stratified=section.stratified)
    if section.sampling == "sandwich":
        return largest + section.random_archs * random + flops(space.smallest())
    if section.sampling == "random":
        return section.random_archs * random
    if section.sampling == "all":  # small spaces only
        return space.size() * _mean(space, flops, stratified=False)
    return (largest + random) / 2


def _mean(space: Space, value: Callable[[Arch], float], *, stratified: bool) -> float:
    import numpy as np

    rng = np.random.default_rng(0)
    draw = space.sample_stratified if stratified else space.sample
    draws = 64 if space.mixed else 1024
    return sum(value(draw(rng)) for _ in range(draws)) / draws


def _latency(config: Config, folder: Path, known: dict[str, Any]) -> str:
    from frugalbert.model.cost import forward_flops

    section, space = config.latency, _choices(config)
    assert section is not None
    timed = min(section.architectures, space.size())
    per_token = _mean(space, lambda arch: forward_flops(arch, section.length), stratified=True)
    operations = section.batch_size * section.length * per_token
    speed = GPU_FLOPS / 10 if section.device == "cuda" else section.threads * SERVING_FLOPS
    seconds = timed * READINGS * (READING_SECONDS[section.backend] + (section.repeats + 2) * operations / speed)
    where = section.device if section.device == "cuda" else f"{section.threads} CPU thread{'s' * (section.threads > 1)}"
    return (
        f"{timed} architectures, {READINGS} readings each: {section.backend} on {where}, {section.batch_size} x "
        f"{section.length} tokens; roughly {duration(seconds)}"
    )


def _search(config: Config, folder: Path, known: dict[str, Any]) -> str:
    section = config.search
    assert section is not None
    limits = []
    for name, value in section.limit:
        if value is not None:
            ends = [f"{number(end)}" for end in value]
            least = "at least" if name == "speedup" else "at most"
            limits.append(f"{name.replace('_', ' ')} {' to '.join(ends) if len(ends) > 1 else f'{least} {ends[0]}'}")
    budget = f" or {section.budget}" if section.budget else ""
    by = f"{section.quality} on {section.rows} rows"
    if section.finetune is not None:
        by = f"{_names(section.finetune)} fine-tuned"
    within = f" within {', '.join(limits)}" if limits else ""
    if section.method != "extraction":
        by += _short(config, vocabulary_of(config, folder, known), section.evaluations)
        return f"{section.method}: {section.evaluations} evaluations{budget}{within}; by {by}"
    visited, how = -(-_choices(config).size() // section.extraction.interval), section.extraction
    maximum = how.maximum or "the largest of the space"
    count = f"{'at most ' if limits else ''}{visited} of {_choices(config).size()} architectures{within}"
    return (
        f"extraction: {count} by W of parameters, {how.inference} and {by}, maximum point {maximum}"
        f"{_short(config, vocabulary_of(config, folder, known), visited)}"
    )


def _short(config: Config, vocabulary: int, visited: int) -> str:
    """The short trainings of so many architectures, if they are judged by them."""
    from frugalbert.model.cost import forward_flops, training_flops

    assert config.search is not None
    assert config.shards is not None
    short, length = config.search.training, config.shards.length[0]
    if short is None:
        return ""
    repeated = visited * len(short.seeds)
    steps = repeated * len(short.recipes) * short.steps
    tokens = repeated * sum(recipe.batch_size for recipe in short.recipes) * short.steps * length
    looked = repeated * len(short.recipes) * short.looks * config.search.rows * length
    flops = tokens * _mean(
        _choices(config), lambda arch: training_flops(arch, vocabulary, length, 0.15), stratified=False
    )
    flops += looked * _mean(
        _choices(config),
        lambda arch: forward_flops(arch, length, vocab_size=vocabulary, masked=0.15, head="mlm"),
        stratified=False,
    )
    times = ", ".join(f"on {where} roughly {duration(flops / speed)}" for where, speed in speeds(config))
    return (
        f"; {repeated * len(short.recipes)} trainings of {short.steps} steps, {number(steps)} steps, "
        f"{number(tokens)} tokens, {times}"
    )


def _finetune(config: Config, folder: Path, known: dict[str, Any]) -> str:
    section = config.finetune
    assert section is not None
    seeds = f"{len(section.seeds)} seed{'s' if len(section.seeds) > 1 else ''}"
    if not section.train:
        return f"{_names(section)}: evaluated as the model is, without training"
    starts = 2 if section.random_baseline else 1
    baseline = ", also from random weights" if section.random_baseline else ""
    transfers = [f"{name} {own.start}" for name, own in section.per_task.items() if own.start]
    also = f"; also {', '.join(transfers)}" if transfers else ""
    if section.agora:
        also += f"; then rounds of Agora with {_tried(section.agora.settings)}, {seeds}"
    sweep = section.sweep
    if sweep is None:
        return f"{_names(section)}: {len(section.seeds) * starts} runs each ({seeds}{baseline}){also}"
    chosen = {"train": "a share of the training examples", "dev": "the dev set itself", "none": "nothing"}
    how = f"{_tried(sweep)} by {sweep.method}, {seeds}{baseline}, chosen on {chosen[section.select]}"
    return f"{_names(section)}: {how}{also}"


def _tried(sweep: Sweep) -> str:
    """`6 settings`, `all settings of bort`."""
    tried = f"{sweep.trials} settings" if sweep.method != "grid" else "all settings"
    axes = ("learning_rate", "batch_size", "epochs", "warmup", "weight_decay", "layer_decay")
    values = [getattr(sweep, name) for name in axes]
    if sweep.method == "grid" and sweep.preset is None:
        tried = f"{math.prod(len(value) for value in values if value and not isinstance(value, str))} settings"
    return f"{tried} of {sweep.preset}" if sweep.preset else tried


def _names(section: Finetune) -> str:
    return ", ".join(task if isinstance(task, str) else task.name for task in section.tasks)


def _export(config: Config, folder: Path, known: dict[str, Any]) -> str:
    assert config.export is not None
    return ", ".join(config.export.formats)


def _bench(config: Config, folder: Path, known: dict[str, Any]) -> str:
    section = config.bench
    assert section is not None
    cells = len(section.lengths) * len(section.batch_sizes) * len(section.threads)
    return f"{cells} settings of length, batch and threads for every exported form, beside {section.baseline}"


def _report(config: Config, folder: Path, known: dict[str, Any]) -> str:
    return "one HTML page"
