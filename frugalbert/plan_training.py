"""What `plan` knows of any training before it runs: tokens, vocabulary, pace on this machine, disk. No torch here.

In: the configuration, its folder, and the figures of stages that have run. Out: numbers and texts.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from frugalbert.budget import Budget
from frugalbert.config import Config, Training
from frugalbert.progress import duration, number
from frugalbert.run import read_json
from frugalbert.train import phases

CHARACTERS_PER_TOKEN = 4.4  # English, a WordPiece vocabulary of 30,000; replaced by the real count once shards exist
CPU_FLOPS_PER_CORE = 1e11  # sustained by a training step in bf16 or with wide fp32 units; printed as an assumption
GPU_FLOPS = 2e14
MULTIPLE = 8
"""16 bytes of 16-bit numbers: what tensor cores read (NVIDIA, "Matrix Multiplication Background User's Guide")."""


def source_bytes(config: Config, folder: Path) -> int | None:
    """Bytes on disk of the local sources; None if something cannot be sized beforehand."""
    total = 0
    for source in config.corpus.sources if config.corpus else ():
        path = folder / (source if isinstance(source, str) else source.path)
        if not path.exists():
            return None
        total += sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())
    return total


def tokens_of(config: Config, folder: Path, known: dict[str, Any]) -> float | None:
    if "tokens" in known.get("shards", {}):
        return float(known["shards"]["tokens"])
    size = known.get("corpus", {}).get("characters") or source_bytes(config, folder)
    return size / CHARACTERS_PER_TOKEN if size else None


def vocabulary_of(config: Config, folder: Path, known: dict[str, Any]) -> int:
    section = config.tokenizer
    if section is None or "vocab_size" in known.get("tokenizer", {}):
        return known["tokenizer"]["vocab_size"] if section else 0
    return (entries_of(folder / section.path) if section.path else None) or section.vocab_size


def entries_of(path: Path) -> int | None:
    """Of a tokenizer on disk; None if it is not there (yet), or only its name on the hub is known."""
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        return None
    if file.suffix == ".txt":
        return len(file.read_text(encoding="utf-8").splitlines())
    content = read_json(file)
    added = [token["id"] + 1 for token in content.get("added_tokens", ())]
    return max([len(content["model"]["vocab"]), *added])


def device_of(config: Config) -> str:
    """Where it will run."""
    if config.machine.device != "auto":
        return config.machine.device
    return "cuda" if Path("/dev/nvidia0").exists() else "cpu"


def rough_sizes(config: Config, sizes: dict[str, Iterable[int]]) -> str:
    """`; hidden 564 is no multiple of 8 …` where a GPU may do the work; nothing if all are, or a CPU does it."""
    found = {name: sorted({size for size in values if size % MULTIPLE}) for name, values in sizes.items()}
    odd = [f"{name} {size}" for name, values in found.items() for size in values]
    served = config.latency is not None and config.latency.device == "cuda"
    if not odd or (config.machine.device == "cpu" and not served):
        return ""
    named = ", ".join(odd[:3]) + (f" and {len(odd) - 3} more" if len(odd) > 3 else "")
    word = "are no multiples" if len(odd) > 1 else "is no multiple"
    return f"; {named} {word} of {MULTIPLE}, without which a GPU's tensor cores are slower (multiples of 64 are best)"


def training(config: Config, section: Training, model: tuple[str, float, int], corpus_tokens: float | None) -> str:
    """`model`: what is trained, FLOPs per token of a step, parameters."""
    assert config.shards is not None
    what, flops, parameters = model
    amount, kind = section.budget.amount, section.budget.kind
    per_step = phases.tokens_per_step(phases.spans(section, config.shards.length[0]), kind)
    tokens = {"tokens": amount, "steps": amount * per_step}.get(kind)
    if kind == "epochs" and corpus_tokens:
        tokens = amount * corpus_tokens
    kept = section.checkpoints
    disk = parameters * (12 * (kept.keep + 1) + 4 * (len(kept.markers) + 1))
    return "; ".join(
        [
            f"{what}, budget {section.budget}",
            *(_pace(speed / flops, where, section.budget, tokens, per_step) for where, speed in speeds(config)),
            f"up to {number(disk)}B of checkpoints",
        ]
    )


def speeds(config: Config) -> list[tuple[str, float]]:
    """Where this may run, with the FLOP/s assumed there: a GPU if there is one, else the CPU and, to compare, a GPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpu, cpu = ("a GPU", GPU_FLOPS), (f"{cores} CPU cores", cores * CPU_FLOPS_PER_CORE)
    if config.machine.device == "cpu":
        return [cpu]
    return [gpu] if device_of(config) == "cuda" else [cpu, gpu]


def _pace(tokens_per_second: float, where: str, budget: Budget, tokens: float | None, per_step: float) -> str:
    if budget.kind == "seconds":
        tokens = budget.amount * tokens_per_second
        return f"on {where} roughly {number(tokens)} tokens, {number(round(tokens / per_step))} steps"
    if tokens is None:
        return f"on {where} roughly {number(tokens_per_second)} tokens/s"
    return f"on {where} roughly {duration(tokens / tokens_per_second)} for {number(tokens)} tokens"
