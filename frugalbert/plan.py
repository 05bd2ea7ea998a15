"""What a run will do, before it does it: stages and their state, sizes, tokens, hours and disk. No torch here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from frugalbert.config import Config
from frugalbert.progress import duration, number
from frugalbert.stages import Status, examine

CHARACTERS_PER_TOKEN = 4.4  # English, a WordPiece vocabulary of 30,000; replaced by the real count once shards exist
CPU_FLOPS_PER_CORE = 1e11  # sustained by a training step in bf16 or with wide fp32 units; printed as an assumption
GPU_FLOPS = 2e14
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
    describe |= {"finetune": _finetune}
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
    return f"{', '.join(sources)} ({number(size) + 'B' if size else 'size not known beforehand'})"


def _tokenizer(config: Config, folder: Path, known: dict[str, Any]) -> str:
    assert config.tokenizer is not None
    if config.tokenizer.path:
        return f"load {config.tokenizer.path}"
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


def _pretrain(config: Config, folder: Path, known: dict[str, Any]) -> str:
    from frugalbert.model import cost
    from frugalbert.model.arch import Arch

    section = config.pretrain
    assert section is not None
    assert config.shards is not None
    arch = Arch.load(section.arch, folder)
    vocabulary = known.get("tokenizer", {}).get("vocab_size") or (
        config.tokenizer.vocab_size if config.tokenizer else 0
    )
    parameters = cost.parameter_count(arch, vocabulary, "mlm")
    length = config.shards.length[0]
    flops = cost.training_flops(arch, vocabulary, length, section.mask.rate[0])
    per_step = section.batch_size * length
    amount, kind = section.budget.amount, section.budget.kind
    corpus_tokens = _tokens(config, folder, known)
    tokens = {"tokens": amount, "steps": amount * per_step}.get(kind)
    if kind == "epochs" and corpus_tokens:
        tokens = amount * corpus_tokens
    parts = [
        arch.to_text(),
        f"{number(parameters)} parameters",
        f"{number(flops)}FLOP/token",
        f"budget {section.budget}",
    ]
    on_gpu = config.machine.device == "cuda"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    speed = (GPU_FLOPS if on_gpu else cores * CPU_FLOPS_PER_CORE) / flops
    where = "a GPU" if on_gpu else f"{cores} CPU cores"
    if kind == "seconds":
        parts.append(f"roughly {number(amount * speed)} tokens, {number(amount * speed / per_step)} steps on {where}")
    elif tokens:
        parts.append(
            f"{number(tokens)} tokens, {number(tokens / per_step)} steps, roughly {duration(tokens / speed)} on {where}"
        )
    checkpoints = parameters * 12 * (section.checkpoints.keep + 1) + parameters * 4 * (
        len(section.checkpoints.markers) + 1
    )
    parts.append(f"up to {number(checkpoints)}B of checkpoints")
    return ", ".join(parts)


def _finetune(config: Config, folder: Path, known: dict[str, Any]) -> str:
    section = config.finetune
    assert section is not None
    tasks = [task if isinstance(task, str) else task.name for task in section.tasks]
    runs = len(section.seeds) * (2 if section.random_baseline else 1)
    baseline = ", also from random weights" if section.random_baseline else ""
    return f"{', '.join(tasks)}: {runs} runs each ({len(section.seeds)} seeds{baseline})"
