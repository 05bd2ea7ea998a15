"""What a run will do, before it does it: stages and their state, sizes, tokens, hours and disk. No torch here."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frugalbert.budget import Budget
from frugalbert.config import FROM_SEARCH, FROM_SUPERNET, Config, Finetune, Supernet, Training
from frugalbert.progress import duration, number
from frugalbert.run import read_json
from frugalbert.stages import Status, examine
from frugalbert.train import phases

if TYPE_CHECKING:
    from frugalbert.model.arch import Arch
    from frugalbert.space import Space

CHARACTERS_PER_TOKEN = 4.4  # English, a WordPiece vocabulary of 30,000; replaced by the real count once shards exist
CPU_FLOPS_PER_CORE = 1e11  # sustained by a training step in bf16 or with wide fp32 units; printed as an assumption
GPU_FLOPS = 2e14
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
    describe |= {"space": _space, "supernet": _supernet, "latency": _latency, "search": _search}
    describe |= {"finetune": _finetune, "export": _export, "bench": _bench, "report": _report}
    function = describe.get(status.stage.name)
    return function(config, folder, known) if function else ""


def _source_bytes(config: Config, folder: Path) -> int | None:
    """Bytes on disk of the local sources; None if something cannot be sized beforehand."""
    total = 0
    for source in config.corpus.sources if config.corpus else ():
        path = folder / (source if isinstance(source, str) else source.path)
        if not path.exists():
            return None
        total += sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())
    return total


def _corpus(config: Config, folder: Path, known: dict[str, Any]) -> str:
    assert config.corpus is not None
    size = _source_bytes(config, folder)
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
        entries = _entries(folder / config.tokenizer.path)
        size = f"{entries} entries" if entries else f"size not known beforehand: {config.tokenizer.vocab_size} assumed"
        return f"load {config.tokenizer.path}, {size}"
    return f"train {config.tokenizer.kind}, {-(-config.tokenizer.vocab_size // 64) * 64} entries"


def _tokens(config: Config, folder: Path, known: dict[str, Any]) -> float | None:
    if "tokens" in known.get("shards", {}):
        return float(known["shards"]["tokens"])
    size = known.get("corpus", {}).get("characters") or _source_bytes(config, folder)
    return size / CHARACTERS_PER_TOKEN if size else None


def _shards(config: Config, folder: Path, known: dict[str, Any]) -> str:
    assert config.shards is not None
    tokens = _tokens(config, folder, known)
    lengths = ", ".join(map(str, config.shards.length))
    if tokens is None:
        return f"rows of {lengths} tokens"
    return f"rows of {lengths} tokens, about {number(tokens)} tokens, {number(2 * tokens * len(config.shards.length))}B"


def _vocabulary(config: Config, folder: Path, known: dict[str, Any]) -> int:
    section = config.tokenizer
    if section is None or "vocab_size" in known.get("tokenizer", {}):
        return known["tokenizer"]["vocab_size"] if section else 0
    return (_entries(folder / section.path) if section.path else None) or section.vocab_size


def _entries(path: Path) -> int | None:
    """Of a tokenizer on disk; None if it is not there (yet), or only its name on the hub is known."""
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        return None
    if file.suffix == ".txt":
        return len(file.read_text(encoding="utf-8").splitlines())
    content = read_json(file)
    added = [token["id"] + 1 for token in content.get("added_tokens", ())]
    return max([len(content["model"]["vocab"]), *added])


def _pretrain(config: Config, folder: Path, known: dict[str, Any]) -> str:
    from frugalbert.model import cost
    from frugalbert.model.arch import Arch

    section = config.pretrain
    assert section is not None
    assert config.shards is not None
    bound, text = "", section.arch
    if text == FROM_SEARCH and "arch" in known.get("search", {}):
        text = known["search"]["arch"]
    elif text == FROM_SEARCH:
        bound, text = "from search, at most ", _choices(config).largest().to_text()
    arch, vocabulary = Arch.load(text, folder), _vocabulary(config, folder, known)
    head = "pairs" if config.shards.pairs != "none" and section.pair_weight > 0.0 else "mlm"
    flops = phases.per_token(
        phases.spans(section, config.shards.length[0]),
        lambda span: cost.training_flops(arch, vocabulary, span.length, section.mask.rate[0], head),
    )
    parameters = cost.parameter_count(arch, vocabulary, head)
    what = f"{bound}{arch.to_text()}, {number(parameters)} parameters, {number(flops)}FLOP/token"
    tokens = _tokens(config, folder, known)
    if section.distill:
        from frugalbert import plan_teacher

        largest = _choices(config).largest() if section.distill.teacher == FROM_SUPERNET else None
        rows = known.get("shards", {}).get("rows")
        said, more = plan_teacher.describe(section, config.shards, folder, largest, vocabulary, (tokens, rows))
        what, flops = f"{what}; {said}", flops + more
    return _training(config, section, (what, flops, parameters), tokens)


def _training(config: Config, section: Training, model: tuple[str, float, int], corpus_tokens: float | None) -> str:
    """`model`: what is trained, FLOPs per token of a step, parameters."""
    assert config.shards is not None
    what, flops, parameters = model
    per_step = phases.tokens_per_step(phases.spans(section, config.shards.length[0]))
    amount, kind = section.budget.amount, section.budget.kind
    tokens = {"tokens": amount, "steps": amount * per_step}.get(kind)
    if kind == "epochs" and corpus_tokens:
        tokens = amount * corpus_tokens
    kept = section.checkpoints
    disk = parameters * (12 * (kept.keep + 1) + 4 * (len(kept.markers) + 1))
    return "; ".join(
        [
            f"{what}, budget {section.budget}",
            *(_pace(speed / flops, where, section.budget, tokens, per_step) for where, speed in _speeds(config)),
            f"up to {number(disk)}B of checkpoints",
        ]
    )


def _speeds(config: Config) -> list[tuple[str, float]]:
    """Where this may run, with the FLOP/s assumed there: a GPU if there is one, else the CPU and, to compare, a GPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpu, cpu = ("a GPU", GPU_FLOPS), (f"{cores} CPU cores", cores * CPU_FLOPS_PER_CORE)
    if config.machine.device == "cpu":
        return [cpu]
    return [gpu] if config.machine.device == "cuda" or Path("/dev/nvidia0").exists() else [cpu, gpu]


def _pace(tokens_per_second: float, where: str, budget: Budget, tokens: float | None, per_step: float) -> str:
    if budget.kind == "seconds":
        tokens = budget.amount * tokens_per_second
        return f"on {where} roughly {number(tokens)} tokens, {number(round(tokens / per_step))} steps"
    if tokens is None:
        return f"on {where} roughly {number(tokens_per_second)} tokens/s"
    return f"on {where} roughly {duration(tokens / tokens_per_second)} for {number(tokens)} tokens"


# ---- choosing an architecture ----------------------------------------------------------------------------------------


def _choices(config: Config) -> Space:
    from frugalbert.space import Space

    assert config.space is not None
    return Space.of(config.space)


def _space(config: Config, folder: Path, known: dict[str, Any]) -> str:
    from frugalbert.model.cost import parameter_count

    space, vocabulary = _choices(config), _vocabulary(config, folder, known)
    ends = [
        f"{arch.to_text()} ({number(parameter_count(arch, vocabulary))} parameters)"
        for arch in (space.smallest(), space.largest())
    ]
    size = f"{space.size():,}" if space.size() < 10**15 else number(space.size())
    return f"{size} architectures from {ends[0]} to {ends[1]}"


def _supernet(config: Config, folder: Path, known: dict[str, Any]) -> str:
    from frugalbert.model import cost

    section, space, vocabulary = config.supernet, _choices(config), _vocabulary(config, folder, known)
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
    return _training(config, section, (what, flops, parameters), _tokens(config, folder, known))


def flops_per_token(section: Supernet, space: Space, vocabulary: int, length: int) -> float:
    """Training operations per token of all architectures of a batch together, on average (`train/slices.py`)."""
    from frugalbert.model.cost import training_flops

    def flops(arch: Arch) -> float:
        return training_flops(arch, vocabulary, length, sum(section.mask.rate) / len(section.mask.rate))

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
    operations = (
        section.batch_size
        * section.length
        * _mean(space, lambda arch: forward_flops(arch, section.length), stratified=True)
    )
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
        by += _short(config, _vocabulary(config, folder, known), section.evaluations)
        return f"{section.method}: {section.evaluations} evaluations{budget}{within}; by {by}"
    visited, how = -(-_choices(config).size() // section.extraction.interval), section.extraction
    maximum = how.maximum or "the largest of the space"
    count = f"{'at most ' if limits else ''}{visited} of {_choices(config).size()} architectures{within}"
    return (
        f"extraction: {count} by W of parameters, {how.inference} and {by}, maximum point {maximum}"
        f"{_short(config, _vocabulary(config, folder, known), visited)}"
    )


def _short(config: Config, vocabulary: int, visited: int) -> str:
    """The short trainings of so many architectures, if they are judged by them."""
    from frugalbert.model.cost import forward_flops, training_flops

    assert config.search is not None
    assert config.shards is not None
    training, length = config.search.training, config.shards.length[0]
    if training is None:
        return ""
    repeated = visited * len(training.seeds)
    steps = repeated * len(training.recipes) * training.steps
    tokens = repeated * sum(recipe.batch_size for recipe in training.recipes) * training.steps * length
    looked = repeated * len(training.recipes) * training.looks * config.search.rows * length
    flops = tokens * _mean(
        _choices(config), lambda arch: training_flops(arch, vocabulary, length, 0.15), stratified=False
    )
    flops += looked * _mean(
        _choices(config),
        lambda arch: forward_flops(arch, length, vocab_size=vocabulary, masked=0.15, head="mlm"),
        stratified=False,
    )
    times = ", ".join(f"on {where} roughly {duration(flops / speed)}" for where, speed in _speeds(config))
    return (
        f"; {repeated * len(training.recipes)} trainings of {training.steps} steps, {number(steps)} steps, "
        f"{number(tokens)} tokens, {times}"
    )


def _finetune(config: Config, folder: Path, known: dict[str, Any]) -> str:
    section = config.finetune
    assert section is not None
    seeds = f"{len(section.seeds)} seed{'s' if len(section.seeds) > 1 else ''}"
    runs = len(section.seeds) * (2 if section.random_baseline else 1)
    baseline = ", also from random weights" if section.random_baseline else ""
    return f"{_names(section)}: {runs} runs each ({seeds}{baseline})"


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
