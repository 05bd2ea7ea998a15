"""Short trainings from scratch: an architecture, a recipe and a seed in; the lowest held-out error out.

The error surrogate of optimal subarchitecture extraction (de Wynter 2020, arXiv 2010.08512): at most s steps, then the
loss on a fixed set B. It is the one loop with its checkpoints in a folder that is thrown away, so a training that was
killed continues. The rows of B are those held-out ones that validation does not use, with validation's masks.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from frugalbert import dist
from frugalbert.budget import Clock
from frugalbert.config import Machine, Pretrain, ShortRecipe
from frugalbert.data.masking import Batch
from frugalbert.data.rows import read_index
from frugalbert.run import fingerprint
from frugalbert.train import pretrain
from frugalbert.train.assemble import Method, Rows, assemble
from frugalbert.train.batches import HeldOut
from frugalbert.train.loop import train
from frugalbert.train.objectives import MaskedLM
from frugalbert.train.state import Run

PLACES = ("shards", "tokenizer", "yaml")
ROWS_AT_ONCE = 32


def score(task: dict[str, Any]) -> dict[str, Any] | None:
    """Train `task["arch"]` for `steps` by `recipe` (config.ShortRecipe) from `seed`; for `fanout.run_tasks`.

    Further keys: `shards`, `tokenizer`, `yaml`, `work`: directories; `looks`: measurements, evenly spread; `rows`: of
    B; `device`; `threads`: of a worker process, 0 = as they are. Returns `errors` of each look, `error` (the
    lowest), `half_error` (the lowest on half of B), `tokens` and `seconds`; None if it diverged.
    """
    if task["threads"]:
        torch.set_num_threads(task["threads"])
    section = section_of(task)
    folder = Path(task["work"]) / fingerprint(task)[:16] / "pretrain"
    folder.mkdir(parents=True, exist_ok=True)
    with _quiet():
        run = _assemble(section, task, folder)
        try:
            train(run)
        except ValueError:
            if not (run.state.skipped or run.state.restores):
                raise
            return _gone(folder)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    looks = [line for line in lines if "validation_loss" in line]
    errors = [float(line["validation_loss"]) for line in looks]
    halves = [float(line["validation_half_loss"]) for line in looks]
    seconds, tokens = run.state.seconds, run.state.tokens
    _gone(folder)
    if not all(map(math.isfinite, errors)):
        return None
    return {
        "error": min(errors),
        "errors": errors,
        "half_error": min(halves),
        "tokens": tokens,
        "seconds": round(seconds, 3),
    }


def _gone(folder: Path) -> None:
    shutil.rmtree(folder.parent)


def _quiet() -> contextlib.AbstractContextManager[Any]:
    """There are hundreds of trainings: the driver's progress line is enough. (A thread of Dask's may not swap it.)"""
    if threading.current_thread() is not threading.main_thread():
        return contextlib.nullcontext()
    return contextlib.redirect_stderr(io.StringIO())


def section_of(task: dict[str, Any]) -> Pretrain:
    """The pre-training that a task describes: defaults, but for its recipe, its looks and no second chances."""
    recipe = ShortRecipe.model_validate(task["recipe"])
    betas = recipe.betas or ((0.0, 0.98) if recipe.optimizer == "sgd" else (0.9, 0.98))
    every = 1.0 / task["looks"]
    validation = {"every": every, "begin_every": every, "end_every": every, "rows": task["rows"]}
    values = recipe.model_dump() | {"betas": betas, "validation": validation}
    values |= {"arch": task["arch"], "budget": f"{task['steps']}steps", "seed": task["seed"], "non_finite": "stop"}
    return Pretrain.model_validate(values)


def _assemble(section: Pretrain, task: dict[str, Any], out: Path) -> Run:
    shards, tokenizer, yaml = (Path(task[name]) for name in PLACES)
    machine = Machine(device=task["device"], compile=False)
    shared = section.model_dump_json(exclude={"arch"})
    rows = _rows(shared, shards, tokenizer, dist.pick_device(machine), read_index(shards)["checksum"])
    model = pretrain.make_model(section, yaml, rows.longest, rows.sampler.vocabulary)
    method = Method(model, model, MaskedLM(section.isolate_documents))
    run = assemble(section, machine, yaml, out, rows, method, Clock())
    run.validate = _validator(run, rows.held_out)
    run.free = frozenset()  # a score does not depend on what was fast that day
    return run


@functools.lru_cache(maxsize=2)
def _rows(section: str, shards: Path, tokenizer: Path, device: torch.device, checksum: str) -> Rows:
    """Kept for the next training by the same recipe: here the shards are verified."""
    return Rows.open(Pretrain.model_validate_json(section), shards, tokenizer, device, at_end=True)


def _validator(run: Run, held_out: HeldOut) -> Callable[[Callable[[], None]], dict[str, float]]:
    """Losses on B and on (about) its first half: what a smaller B would have said."""
    rows = len(held_out.row_ids)

    def validate(pause: Callable[[], None]) -> dict[str, float]:
        seen = 0

        def score(batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
            nonlocal seen
            with torch.no_grad(), dist.autocast(run.device, run.precision):
                total, count = run.objective.score(run.parallel, batch)["validation_loss"]  # type: ignore[attr-defined]
            first, seen = seen < rows // 2, seen + len(batch.input_ids)
            return {"validation_loss": (total, count), "validation_half_loss": (total * first, count * first)}

        run.model.eval()
        try:
            return held_out.measure(score, min(ROWS_AT_ONCE, -(-rows // 2)), pause)
        finally:
            run.model.train()

    return validate
