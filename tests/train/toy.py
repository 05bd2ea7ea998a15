"""A training small enough to run a hundred times in a test: a bag of words that learns which token was left out.

It has what matters to the loop: dropout, tied weights, repeated layers, micro-batches with unequal counts.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from frugalbert import dist
from frugalbert.budget import Budget, Clock
from frugalbert.config import Checkpoints, Validation
from frugalbert.train.batches import my_pieces
from frugalbert.train.curves import curve, rate
from frugalbert.train.loop import train
from frugalbert.train.optim import OptimizerSettings, make_optimizer
from frugalbert.train.state import Drawn, Recipe, Run

VOCABULARY, WIDTH, LENGTH = 23, 8, 6
WALL_CLOCK = ("seconds", "tokens_per_second")


class Toy(nn.Module):
    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)])
        self.norm = nn.LayerNorm(WIDTH)
        self.decoder = nn.Linear(WIDTH, VOCABULARY)
        self.decoder.weight = self.words.weight
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids).mean(1)
        for layer in self.layers:
            x = x + self.dropout(functional.gelu(layer(x)))
        return self.decoder(self.norm(x))


def rows(start: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, labels and weights of samples: a pure function of their positions; every third label does not count."""
    generator = torch.Generator()
    ids = []
    for position in range(start, start + count):
        generator.manual_seed(position % 64 + 1)
        ids.append(torch.randint(VOCABULARY, (LENGTH,), generator=generator))
    table = torch.stack(ids)
    return table, table.sum(1) % VOCABULARY, (torch.arange(start, start + count) % 3 > 0).double()


def draw(batch_size: int) -> Any:
    def one(progress: float, samples: dict[str, int], micro_batch: int) -> Drawn:
        start = samples.get("toy", 0)
        parts = [rows(at, num) for at, num in my_pieces(start, batch_size, micro_batch)]
        total = rows(start, batch_size)[2].sum()
        micros = [(ids, labels, counts / total) for ids, labels, counts in parts]
        after = start + batch_size
        return Drawn(micros, torch.tensor(float(batch_size * LENGTH)), {"toy": after}, after / 64, {"mask_rate": 0.15})

    return one


def objective(model: nn.Module, micro: tuple[Tensor, Tensor, Tensor], progress: float) -> dict[str, Tensor]:
    ids, labels, shares = micro
    losses = functional.cross_entropy(model(ids).float(), labels, reduction="none")
    return {"loss": (losses * shares.to(losses.dtype)).sum()}


def objective64(model: nn.Module, micro: tuple[Tensor, Tensor, Tensor], progress: float) -> dict[str, Tensor]:
    ids, labels, shares = micro
    return {"loss": (functional.cross_entropy(model(ids), labels, reduction="none") * shares).sum()}


def validator(run: Run) -> Any:
    def validate(pause: Any) -> dict[str, float]:
        pause()
        run.model.eval()
        ids, labels, _ = rows(1000, 32)
        with torch.no_grad():
            loss = functional.cross_entropy(run.parallel(ids), labels).item()
        run.model.train()
        return {"validation_loss": loss, "validation_accuracy": 0.5}

    return validate


def write_model(path: Path, weights: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path / "model.safetensors")
    (path / "config.json").write_text("{}")


RECIPE = Recipe(
    budget=Budget.parse("20steps"),
    rate=lambda progress: rate(progress, 0.1, curve("linear")),
    seed=3,
    clip_norm=1.0,
    validation=Validation(every=0.25, begin_every=0.25, end_every=0.25),
    checkpoints=Checkpoints(every=Budget.parse("4steps"), markers=(0.5, 0.9)),
)

SHORT = replace(RECIPE, budget=Budget.parse("8steps"), checkpoints=Checkpoints(every=Budget.parse("2steps")))


def make(out: Path, recipe: Recipe = RECIPE, **options: Any) -> Run:
    """A Run in `out`. Options: name, dropout, dtype, batch_size, micro_batch, learning_rate, precision, now."""
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    dtype = options.get("dtype", torch.float32)
    model = Toy(options.get("dropout", 0.1)).to(dtype)
    settings = OptimizerSettings(options.get("name", "adamw"), learning_rate=options.get("learning_rate", 0.02))
    run = Run(
        model=model,
        parallel=dist.wrap(model, torch.device("cpu"), options.get("strategy", "ddp")),
        optimizer=make_optimizer(model, settings),
        device=torch.device("cpu"),
        precision=options.get("precision", "fp32"),
        recipe=recipe,
        clock=Clock(options["now"]) if "now" in options else Clock(),
        out=out,
        draw=draw(options.get("batch_size", 8)),
        objective=objective if dtype == torch.float32 else objective64,
        write_model=write_model,
        micro_batch=options.get("micro_batch", 3),
    )
    run.validate = validator(run)
    return run


def go(out: Path, recipe: Recipe = RECIPE, **options: Any) -> Run:
    """Make and train."""
    run = make(out, recipe, **options)
    train(run)
    return run


def cut_off(run: Run, step: int) -> None:
    """Train until `step`, and no further."""
    draw = run.draw

    def dying(progress: float, samples: dict[str, int], micro_batch: int) -> Any:
        if samples.get("toy", 0) >= step * 8:
            raise KeyboardInterrupt
        return draw(progress, samples, micro_batch)

    run.draw = dying
    with contextlib.suppress(KeyboardInterrupt):
        train(run)


def changed(**values: Any) -> Recipe:
    return replace(RECIPE, **values)


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def result(run: Run) -> str:
    """Hash of all that a finished run leaves: weights, markers, metrics without the wall clock, final state."""
    digest = hashlib.sha256()
    for name, tensor in run.model.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    for path in sorted((run.out / "markers").rglob("*.safetensors")):
        digest.update(path.parent.name.encode() + path.read_bytes())
    for line in lines(run.out):
        digest.update(json.dumps({key: line[key] for key in sorted(line) if key not in WALL_CLOCK}).encode())
    state = run.state
    counts = (state.step, state.attempt, state.samples, state.tokens, state.markers, state.averaged)
    digest.update(repr(counts).encode())
    return digest.hexdigest()
