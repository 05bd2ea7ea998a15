"""One model, one task, one seed: training examples in, the trained model and its dev outputs out.

The recipe is BERT's (arXiv 1810.04805, appendix A.3): AdamW, linear warm-up, then linear to 0, clipped gradients, one
evaluation after the last step. The dev set decides nothing. Regression trains on standardised targets and folds the
scale back into the last layer, so the saved model speaks in the task's own units.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from frugalbert import dist
from frugalbert.config import Finetune
from frugalbert.finetune import models
from frugalbert.finetune.features import Features, batches, collate
from frugalbert.finetune.tasks import Data
from frugalbert.run import check_stop

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

CLIP_NORM = 1.0
BETAS, EPSILON = (0.9, 0.999), 1e-6
EVALUATION_BATCH = 64


@dataclass(frozen=True)
class Job:
    """What all trials of a task share."""

    data: Data
    train: Features
    dev: Features
    settings: Finetune
    source: models.Source
    device: torch.device
    precision: str
    micro_batch: int

    @property
    def num_steps(self) -> int:
        return max(1, round(self.settings.epochs * math.ceil(len(self.train.ids) / self.settings.batch_size)))


def run_trial(job: Job, init: str, seed: int, report: Callable[[int, float], None]) -> tuple[nn.Module, np.ndarray]:
    """Train from `init` (`pretrained` or `random`) and return the model and its dev outputs (N, C) float32.

    `report(step, loss)` is called after each step. Raises run.Stopped between steps, ValueError if training diverges.
    """
    model = models.build(job.source, job.data, init, job.settings.dropout, seed).to(job.device)
    mean, scale = target_scale(job.train.labels) if job.data.task.type == "regression" else (0.0, 1.0)
    fit(model, job, seed, (mean, scale), report)
    if job.data.task.type == "regression":
        rescale(model, mean, scale)
    return model, predict(model, job.dev, job.device)


def fit(
    model: nn.Module, job: Job, seed: int, scale: tuple[float, float], report: Callable[[int, float], None]
) -> None:
    """The training loop, in place."""
    import torch

    from frugalbert.train.curves import linear, rate
    from frugalbert.train.optim import parameter_groups

    settings = job.settings
    groups = parameter_groups(model, settings.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=BETAS, eps=EPSILON, fused=True)
    labels = torch.from_numpy(job.train.labels).to(job.device)
    if job.data.task.type == "regression":
        labels = (labels - scale[0]) / scale[1]
    lengths, decay, epoch = job.train.lengths, linear(), 0
    queue: list[np.ndarray[Any, Any]] = []
    model.train()
    for step in range(job.num_steps):
        check_stop()
        if not queue:
            queue, epoch = batches(lengths, settings.batch_size, seed, epoch), epoch + 1
        loss = gradients(model, job, queue.pop(), labels)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        if not math.isfinite(loss) or not bool(torch.isfinite(norm)):
            raise ValueError(
                f"task {job.data.task.title}: the loss became {loss:g} at step {step + 1} of {job.num_steps} (gradient "
                f"norm {float(norm):g}); lower finetune.learning_rate"
            )
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * rate((step + 0.5) / job.num_steps, settings.warmup, decay)
        optimizer.step()
        optimizer.zero_grad()
        report(step + 1, loss)


def gradients(model: nn.Module, job: Job, rows: np.ndarray[Any, Any], labels: Tensor) -> float:
    """Add the gradients of the batch's mean loss, in micro-batches, and return that loss."""
    import torch

    total = 0.0
    try:
        for part in np.array_split(rows, -(-len(rows) // job.micro_batch)):
            with dist.autocast(job.device, job.precision):
                logits = model(**collate(job.train, part, job.device)).logits
            expected = labels[torch.from_numpy(part).to(job.device)]
            loss = losses(job.data.task.type, logits.float(), expected).sum() / len(rows)
            loss.backward()
            total += loss.item()
    except torch.OutOfMemoryError:
        raise ValueError("the GPU's memory is full; write a smaller machine.micro_batch, for example 8") from None
    return total


def predict(model: nn.Module, features: Features, device: torch.device) -> np.ndarray[Any, Any]:
    """Outputs (N, C) in full precision, in the order of the examples."""
    import torch

    order = np.argsort(features.lengths, kind="stable")
    model.eval()
    found: list[Tensor] = []
    with torch.inference_mode():
        for start in range(0, len(order), EVALUATION_BATCH):
            check_stop()
            found.append(
                model(**collate(features, order[start : start + EVALUATION_BATCH], device)).logits.float().cpu()
            )
    outputs = torch.cat(found).numpy()
    back = np.empty_like(outputs)
    back[order] = outputs
    return back


def losses(kind: str, logits: Tensor, labels: Tensor) -> Tensor:
    """Loss of each example (B,): cross-entropy, squared error, or the mean over labels of binary cross-entropy."""
    from torch.nn import functional

    if kind == "classification":
        return functional.cross_entropy(logits, labels, reduction="none")
    if kind == "regression":
        return (logits.squeeze(-1) - labels) ** 2
    return functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(-1)


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
