"""One model, one task, one seed: training examples in, the trained model and its outputs on other sets out.

The recipe is BERT's (arXiv 1810.04805, appendix A.3): AdamW, linear warm-up, then linear to 0, clipped gradients. By
default one evaluation after the last step; with `select` the best epoch's weights are kept, on examples that the
settings name. Regression trains on standardised targets and folds the scale back into the last layer, so the saved
model speaks in the task's own units.

Batches and dropout are functions of (seed, step), so a trial that is killed goes on from its last checkpoint (every
few minutes, and at a signal) to the same weights.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from frugalbert import dist
from frugalbert.config import Finetune
from frugalbert.finetune import models
from frugalbert.finetune.features import Features, batches, parts
from frugalbert.finetune.tasks import Data
from frugalbert.run import Stopped, check_stop

if TYPE_CHECKING:
    import torch
    from torch import nn

    from frugalbert.finetune.heads import Loss

CLIP_NORM = 1.0
BETAS, EPSILON = (0.9, 0.999), 1e-6
EVALUATION_BATCH = 64
CHECKPOINT_SECONDS = 300.0


@dataclass(frozen=True)
class Job:
    """What all trials of a task share; `settings` are the task's own, with `epochs` as a number."""

    data: Data
    features: dict[str, Features]
    settings: Finetune
    source: models.Source
    device: torch.device
    precision: str
    micro_batch: int
    texts: str = ""
    """Hash of all examples and labels."""

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil((len(self.features["train"].units) - 1) / self.settings.batch_size)

    @property
    def num_steps(self) -> int:
        assert not isinstance(self.settings.epochs, str)
        if "train" not in self.features:
            return 0
        return max(1, round(self.settings.epochs * self.steps_per_epoch))


@dataclass
class State:
    """Where a training stands: steps done, the scores of its epochs, and the weights of the best one."""

    step: int = 0
    scores: list[float] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=dict)
    """The model's tensors after the best epoch, on the CPU; empty without `select`."""
    seconds: float = 0.0

    @property
    def best_epoch(self) -> int:
        """The first epoch with the highest score, from 1; NaN counts as lowest."""
        return int(np.argmax(np.nan_to_num(self.scores, nan=-np.inf))) + 1


class Diverged(ValueError):
    """The loss or the gradients became infinite or undefined."""


Report = Callable[[int, float], None]
"""Called after each step with its number and loss."""
Score = Callable[["nn.Module", tuple[float, float]], float]
"""The headline figure of a model that is being trained, on the examples that select; with its target scale."""


def run_trial(
    job: Job, init: str, seed: int, report: Report, folder: Path | None = None, score: Score | None = None
) -> tuple[nn.Module, State]:
    """Train from `init` (`pretrained`, `random`; `as it is` trains nothing) and return the model.

    Args:
        folder: for checkpoints; they are gone when this returns.
        score: chooses the epoch; None = the last step's weights.
    Raises run.Stopped between steps, ValueError if training diverges.
    """
    model = models.build(job.source, job.data, init, job.settings.dropout, seed).to(job.device)
    if init == models.AS_IT_IS:
        return model, State()
    regression = job.data.task.type == "regression"
    scale = target_scale(job.features["train"].targets) if regression else (0.0, 1.0)
    state = fit(model, job, seed, scale, report, folder, score)
    if regression:
        rescale(model, *scale)
    if folder is not None:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return model, state


def fit(
    model: nn.Module,
    job: Job,
    seed: int,
    scale: tuple[float, float],
    report: Report,
    folder: Path | None,
    score: Score | None,
) -> State:
    """The training loop, in place."""
    import torch

    from frugalbert.finetune.heads import Loss
    from frugalbert.train.curves import linear, rate

    settings, features = job.settings, job.features["train"]
    groups = parameter_groups(model, settings.weight_decay, settings.layer_decay)
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=BETAS, eps=EPSILON, fused=True)
    loss_of = Loss(features, class_weights(job), *scale)
    lengths, decay, per_epoch = features.lengths, linear(), job.steps_per_epoch
    keeper = Keeper(folder, model, optimizer)
    state = keeper.resume()
    queue: list[np.ndarray[Any, Any]] = []
    model.train()
    for step in range(state.step, job.num_steps):
        keeper.look(state)
        if not queue or step % per_epoch == 0:
            queue = batches(lengths, settings.batch_size, seed, step // per_epoch)
        torch.manual_seed(seed * 1_000_003 + step)
        loss = gradients(model, job, queue[step % per_epoch], loss_of)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        if not math.isfinite(loss) or not bool(torch.isfinite(norm)):
            raise Diverged(
                f"task {job.data.task.title}: the loss became {loss:g} at step {step + 1} of {job.num_steps} (gradient "
                f"norm {float(norm):g}); lower finetune.learning_rate"
            )
        for group in optimizer.param_groups:
            peak = settings.learning_rate * group["factor"]
            group["lr"] = peak * rate((step + 0.5) / job.num_steps, settings.warmup, decay)
        optimizer.step()
        optimizer.zero_grad()
        state.step = step + 1
        report(step + 1, loss)
        ended = state.step % per_epoch == 0 or state.step == job.num_steps
        if score and ended and _no_better(state, model, score(model, scale), settings.patience):
            break
    if state.best:
        model.load_state_dict(state.best)
    return state


def _no_better(state: State, model: nn.Module, value: float, patience: int | None) -> bool:
    """Note an epoch's score, keep its weights if it is the best, and say whether to stop."""
    state.scores.append(value)
    if state.best_epoch == len(state.scores):
        state.best = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    model.train()
    return patience is not None and len(state.scores) - state.best_epoch >= patience


def gradients(model: nn.Module, job: Job, units: np.ndarray[Any, Any], loss_of: Loss) -> float:
    """Add the gradients of the batch's mean loss, in micro-batches, and return that loss."""
    import torch

    from frugalbert.finetune.heads import outputs

    features, total = job.features["train"], 0.0
    try:
        for part in parts(features, units, job.micro_batch):
            with dist.autocast(job.device, job.precision):
                found = outputs(model, features, features.rows(part), job.device)
            loss = loss_of(found, part).sum() / len(units)
            loss.backward()
            total += loss.item()
    except torch.OutOfMemoryError:
        raise ValueError("the GPU's memory is full; write a smaller machine.micro_batch, for example 8") from None
    return total


def predict(model: nn.Module, features: Features, device: torch.device) -> list[np.ndarray[Any, Any]]:
    """Outputs of each row in full precision: (C,), or (length, C) where every token has some."""
    import torch

    from frugalbert.finetune.heads import outputs

    lengths = np.array([len(ids) for ids in features.ids])
    order = np.argsort(lengths, kind="stable")
    model.eval()
    found: list[Any] = [None] * len(order)
    with torch.inference_mode():
        for start in range(0, len(order), EVALUATION_BATCH):
            check_stop()
            rows = order[start : start + EVALUATION_BATCH]
            values = outputs(model, features, rows, device).float().cpu().numpy()
            for row, value in zip(rows, values, strict=True):
                found[row] = value[: lengths[row]] if value.ndim == 2 else value
    return found


# ---- the optimizer's view of the model ------------------------------------------------------------------------------


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Groups with a `factor` of the learning rate: `layer_decay` to the power of the layers above a parameter.

    The head has 1, the last layer `layer_decay`, the embeddings the least (ULMFiT, arXiv 1801.06146; ELECTRA, arXiv
    2003.10555, appendix B).
    """
    from frugalbert.train.optim import parameter_groups as by_kind

    groups = by_kind(model, weight_decay)
    if layer_decay == 1.0:
        return [{**group, "factor": 1.0} for group in groups]
    blocks = dist.blocks(model)
    depth = {id(parameter): place for place, block in enumerate(blocks, 1) for parameter in block.parameters()}
    inside = {id(parameter) for parameter in getattr(model, str(model.base_model_prefix)).parameters()}
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for number, group in enumerate(groups):
        for parameter in group["params"]:
            layer = depth.get(id(parameter), 0 if id(parameter) in inside else len(blocks) + 1)
            factor = layer_decay ** (len(blocks) + 1 - layer)
            empty = {"params": [], "weight_decay": group["weight_decay"], "factor": factor}
            found.setdefault((number, layer), empty)["params"].append(parameter)
    return list(found.values())


def class_weights(job: Job) -> torch.Tensor | None:
    """(C,) weights inverse to the classes' frequencies, 1 on average over the training examples; None if not asked."""
    import torch

    if job.settings.class_weights == "none" or job.data.task.type not in ("classification", "token-classification"):
        return None
    targets = job.features["train"].targets
    labels = np.concatenate(targets) if isinstance(targets, list) else targets
    counts = np.bincount(labels[labels >= 0], minlength=len(job.data.labels))
    weights = counts.sum() / (np.maximum(counts, 1) * (counts > 0).sum())
    return torch.tensor(weights, dtype=torch.float32, device=job.device)


def target_scale(labels: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Mean and standard deviation of the training targets."""
    return float(labels.mean()), float(labels.std()) or 1.0


def rescale(model: nn.Module, mean: float, scale: float) -> None:
    """Make a model that predicts standardised targets predict the targets: its last linear layer takes the scale."""
    import torch

    last = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module.out_features == 1]
    assert last, "a regression head ends in a linear layer with one output"
    with torch.no_grad():
        last[-1].weight.mul_(scale)
        last[-1].bias.mul_(scale).add_(mean)


# ---- checkpoints ----------------------------------------------------------------------------------------------------


class Keeper:
    """Saves and restores a training below `folder`/checkpoints (see `train/checkpoint.py`); no folder = never."""

    def __init__(self, folder: Path | None, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.folder = folder / "checkpoints" if folder else None
        self.model, self.optimizer = model, optimizer
        self.saved = time.monotonic()

    def look(self, state: State) -> None:
        """Save if the time has come; at a signal save and raise run.Stopped."""
        try:
            check_stop()
        except Stopped:
            if state.step:
                self.save(state)
            raise
        if time.monotonic() - self.saved > CHECKPOINT_SECONDS:
            self.save(state)

    def save(self, state: State) -> None:
        from frugalbert.train import checkpoint

        if self.folder is None:
            return
        tensors = {f"model.{name}": tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in state.best.items()}
        for number, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{name}": value.clone() for name, value in values.items()}
        scores = [None if math.isnan(value) else value for value in state.scores]
        record = {"step": state.step, "scores": scores}
        checkpoint.save(self.folder, state.step, lambda path: None, tensors, record)
        checkpoint.prune(self.folder, 1)
        self.saved = time.monotonic()

    def resume(self) -> State:
        """Put model and optimizer where the newest whole checkpoint left them."""
        from frugalbert.train import checkpoint

        step = checkpoint.find(self.folder) if self.folder and self.folder.is_dir() else None
        if self.folder is None or step is None:
            return State()
        tensors, record = checkpoint.load(self.folder, step)
        parted: dict[str, dict[str, Any]] = {"model": {}, "best": {}, "optimizer": {}}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            parted[kind][rest] = tensor
        self.model.load_state_dict(parted["model"])
        moments: dict[int, dict[str, Any]] = {}
        for name, tensor in parted["optimizer"].items():
            number, _, rest = name.partition(".")
            moments.setdefault(int(number), {})[rest] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        scores = [math.nan if value is None else value for value in record["scores"]]
        return State(record["step"], scores, parted["best"])
