"""The records of one training: what decides it (Recipe), what changes (State), the parts at work (Run).

A checkpoint is the State as JSON, the weights, and the tensors of optimizer and average: `save` and `resume` are the
only two functions that turn a Run into files and back.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from frugalbert import dist
from frugalbert.budget import Budget, Clock
from frugalbert.config import Checkpoints, EarlyStop, Validation
from frugalbert.run import Stopped, stop_requested
from frugalbert.trackers import Trackers
from frugalbert.train import checkpoint
from frugalbert.train.optim import load_optimizer_state, optimizer_state


@dataclass(frozen=True)
class Recipe:
    """What decides the result, besides model, data and objective. `rate(progress)` is the factor on the peak rates."""

    budget: Budget
    rate: Callable[[float], float]
    schedule: Callable[[float], int] = lambda progress: 0  # another number: rates begin anew, and the optimizer's steps
    seed: int = 0
    stop_at: float = 1.0
    clip_norm: float = 0.0
    non_finite: str = "restore"
    validation: Validation = Validation()
    early_stop: EarlyStop | None = None
    checkpoints: Checkpoints = Checkpoints()


@dataclass
class State:
    """Every number that the run's future depends on."""

    step: int = 0  # optimizer steps taken
    attempt: int = 0  # batches tried, skipped ones included; seeds dropout and sampling
    samples: dict[str, int] = field(default_factory=dict)  # position in the endless sequence, by row length
    epochs: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    begun: float = 0.0  # seconds of the budget used before the first step: set-up, trials, compiling
    progress: float = 0.0
    reserve: float = 0.0  # seconds of the budget kept for the last validation and checkpoint
    micro_batch: int = 0
    validated: float = 0.0  # progress at the latest validation
    validation: dict[str, float] = field(default_factory=dict)
    markers: list[float] = field(default_factory=list)
    snapshots: int = 0  # points of the last tenth that have passed
    averaged: int = 0  # snapshots in the average
    saved: dict[str, float] = field(default_factory=dict)  # budget used at the latest checkpoint
    costs: dict[str, float] = field(default_factory=dict)  # seconds by activity
    longest: dict[str, float] = field(default_factory=dict)  # seconds of one checkpoint, one validation
    window: dict[str, float] = field(default_factory=dict)  # sums since the latest line of metrics.jsonl
    line: int = -1  # which share of the budget that line stands for
    usual_loss: float | None = None
    schedule: int = 0  # of the latest step
    skipped: int = 0  # steps in a row
    restores: int = 0
    low_scale: int = 0  # steps in a row at loss scale 1
    metrics_bytes: int = 0
    scaler: dict[str, float] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)  # its state that is no tensor
    settled: dict[str, str | bool] = field(default_factory=dict)  # what was measured to be the fastest
    ended: str = ""

    def busy(self) -> float:
        """Seconds of all steps, with what they waited for."""
        return self.costs.get("train", 0.0) + self.costs.get("wait", 0.0)

    def used(self) -> dict[str, float]:
        """What has been used of each kind of budget."""
        return {"seconds": self.seconds, "tokens": self.tokens, "steps": self.step, "epochs": self.epochs}


@dataclass(frozen=True, eq=False)
class Drawn:
    """One global batch: this rank's micro-batches for the objective, and where the data stand after it."""

    micros: list[Any]
    tokens: Tensor  # real tokens of the global batch, a number on the device
    samples: dict[str, int]
    epochs: float
    figures: dict[str, float] = field(default_factory=dict)  # for the log, e.g. the masking rate


@dataclass(eq=False)
class Run:
    """The parts of one training. `parallel` is what `dist.wrap` made of `model`; only the main rank writes to `out`.

    draw(progress, samples, micro_batch) -> Drawn, a pure function. objective(parallel, micro, progress) -> "loss" and
    further figures, each this micro-batch's share of the global batch's mean, so that they add up. validate(pause) ->
    figures with "validation_loss"; it calls `pause` about once a second. write_model(folder, weights) writes Hugging
    Face files, among them model.safetensors, from the weights whose names begin with `prefix`.
    """

    model: Any  # an HF model of ours, or a module around one
    parallel: nn.Module
    optimizer: torch.optim.Optimizer
    device: torch.device
    precision: str
    recipe: Recipe
    clock: Clock
    out: Path
    draw: Callable[[float, dict[str, int], int], Drawn]
    objective: Callable[[nn.Module, Any, float], dict[str, Tensor]]
    write_model: Callable[[Path, dict[str, Tensor]], None]
    prefix: str = ""
    validate: Callable[[Callable[[], None]], dict[str, float]] | None = None
    trackers: Trackers | None = None
    micro_batch: int = 1  # sequences of the first row length in memory at once
    micro_batch_fixed: bool = True  # False: a smaller one that an earlier process came to is kept
    largest_micro_batch: int = 1  # this rank's share of the global batch
    free: frozenset[str] = frozenset()  # of `precision`, `micro_batch`, `compile`: what measuring may choose
    blocks: list[nn.Module] = field(default_factory=list)  # what may be compiled
    compiled: bool = False
    trial: bool = False  # a pass before the first step shows which micro-batch fits
    state: State = field(default_factory=State)
    average: dict[str, Tensor] = field(default_factory=dict)
    scaler: torch.amp.GradScaler | None = None

    def __post_init__(self) -> None:
        if self.precision == "fp16":
            self.scaler = torch.amp.GradScaler(self.device.type)

    @property
    def folder(self) -> Path:
        return self.out / "checkpoints"

    @property
    def stage(self) -> str:
        """Which stage trains, as its section is called: `pretrain` or `supernet`."""
        return self.out.name

    @contextlib.contextmanager
    def cost(self, name: str) -> Iterator[None]:
        """Charge the time of the block to an activity."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.state.costs[name] = self.state.costs.get(name, 0.0) + time.perf_counter() - started


# ---- metrics.jsonl ---------------------------------------------------------------------------------------------------


def write_line(run: Run, values: dict[str, Any]) -> None:
    """Append one line to metrics.jsonl, and tell the trackers."""
    state = run.state
    seconds = round(state.seconds, 3)
    values = {"step": state.step, "progress": state.progress, "seconds": seconds, "tokens": state.tokens, **values}
    if dist.is_main():
        with open(run.out / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(as_json(values)) + "\n")
        if run.trackers is not None:
            run.trackers.log(values, state.step)


def as_json(values: dict[str, Any]) -> dict[str, Any]:
    """NaN and infinity are no JSON: they become texts, which `float` reads."""
    return {name: str(v) if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}


def _cut_metrics(run: Run) -> None:
    """Forget the lines after the checkpoint that the run continues from."""
    path = run.out / "metrics.jsonl"
    if dist.is_main() and path.exists() and path.stat().st_size > run.state.metrics_bytes:
        with open(path, "r+b") as file:
            file.truncate(run.state.metrics_bytes)


# ---- weights ---------------------------------------------------------------------------------------------------------


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters (tied ones once) and persistent buffers, as they are (FSDP: shards)."""
    names = {name for name, _ in model.named_parameters()}
    buffers = {name for name, _ in model.named_buffers()}
    return {name: tensor for name, tensor in model.state_dict().items() if name in names or name in buffers}


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """The same with shards put together; all ranks must call it."""
    return {name: dist.full(tensor).detach() for name, tensor in named_weights(model).items()}


def set_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy whole weights into the model. Raises ValueError for a name that is missing or has another shape."""
    with torch.no_grad():
        for name, tensor in named_weights(model).items():
            if name not in weights or weights[name].shape != tensor.shape:
                found = tuple(weights[name].shape) if name in weights else "absent"
                raise ValueError(f"the weight {name} should have shape {tuple(tensor.shape)} but is {found}")
            tensor.copy_(dist.split_like(weights[name], tensor))


def healthy(run: Run) -> bool:
    """Whether all weights are finite, on all ranks."""
    finite = [tensor.isfinite().all() for tensor in map(dist.local, named_weights(run.model).values())]
    return dist.agree([float(not torch.stack(finite).all())]) == [0.0]


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def estimate(run: Run) -> int:
    """Bytes of a checkpoint: weights, two tensors of optimizer state each, the average."""
    weights = sum(tensor.numel() * tensor.element_size() for tensor in named_weights(run.model).values())
    return weights * (4 if run.recipe.checkpoints.average else 3)


def save(run: Run) -> None:
    """Write a training checkpoint of the run as it stands; all ranks must call it. Raises OSError, ValueError."""
    state, started = run.state, run.clock.seconds()
    with run.cost("checkpoint"):
        weights = whole_weights(run.model)
        tensors, state.optimizer = optimizer_state(run.optimizer)
        tensors = {f"optimizer/{name}": tensor for name, tensor in tensors.items()}
        tensors |= {f"average/{name}": dist.full(tensor) for name, tensor in run.average.items()}
        tensors |= {f"model/{name}": tensor for name, tensor in weights.items() if not name.startswith(run.prefix)}
        state.scaler = dict(run.scaler.state_dict()) if run.scaler else {}
        state.saved = state.used()
        if dist.is_main():
            metrics = run.out / "metrics.jsonl"
            state.metrics_bytes = metrics.stat().st_size if metrics.exists() else 0
            run.folder.mkdir(exist_ok=True)
            checkpoint.check_disk(run.folder, estimate(run))
            numbers = asdict(state) | {"validation": as_json(state.validation)}
            checkpoint.save(run.folder, state.step, lambda path: _write(run, path, weights), tensors, numbers)
            checkpoint.prune(run.folder, run.recipe.checkpoints.keep)
    keep_time(run, "checkpoint", run.clock.seconds() - started)


def _write(run: Run, path: Path, weights: dict[str, Tensor]) -> None:
    own = {name.removeprefix(run.prefix): tensor for name, tensor in weights.items() if name.startswith(run.prefix)}
    run.write_model(path, own)


def write_weights(run: Run, path: Path) -> None:
    """The model alone as Hugging Face files in `path`, whole or not at all; all ranks must call it."""
    from frugalbert.run import publish

    weights = whole_weights(run.model)
    if dist.is_main():
        with publish(path) as work:
            _write(run, work, weights)


def pause() -> None:
    """Raises Stopped on all ranks if a signal has reached any; between pieces of work that all of them do."""
    if signal := dist.agree([float(stop_requested() or 0)])[0]:
        raise Stopped(int(signal))


def keep_time(run: Run, name: str, seconds: float) -> None:
    """Remember the longest time that a checkpoint or validation took: that much is kept for the last one."""
    longest = run.state.longest
    longest[name] = max(longest.get(name, 0.0), seconds)
    run.state.reserve = 1.2 * sum(longest.values())


def resume(run: Run) -> bool:
    """Continue from the newest checkpoint that verifies; False if there is none. All ranks must call it."""
    newest = checkpoint.find(run.folder) if dist.is_main() and run.folder.exists() else None
    step = int(dist.agree([-1.0 if newest is None else float(newest)])[0])
    if step < 0:
        return False
    load(run, step)
    return True


def load(run: Run, step: int) -> None:
    """Weights, optimizer, average and state of the checkpoint of `step`; metrics.jsonl is cut to it."""
    from safetensors.torch import load_file

    tensors, state = checkpoint.load(run.folder, step)
    parts: dict[str, dict[str, Tensor]] = {"optimizer": {}, "average": {}, "model": {}}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("/")
        parts[kind][rest] = tensor
    own = load_file(checkpoint.path_of(run.folder, step) / "model.safetensors")
    set_weights(run.model, {**{run.prefix + name: tensor for name, tensor in own.items()}, **parts["model"]})
    if not set(state) <= {item.name for item in fields(State)}:  # what an earlier version lacks has its default
        raise ValueError(
            f"the checkpoints in {run.folder} are of a later version of frugalbert; continue with that one"
        )
    run.state = State(**state | {"validation": {name: float(value) for name, value in state["validation"].items()}})
    load_optimizer_state(run.optimizer, parts["optimizer"], run.state.optimizer)
    own_weights = named_weights(run.model)
    run.average = {
        name: dist.split_like(tensor.to(run.device), own_weights[name]) for name, tensor in parts["average"].items()
    }
    if run.scaler is not None and run.state.scaler:
        run.scaler.load_state_dict(run.state.scaler)
    _cut_metrics(run)
