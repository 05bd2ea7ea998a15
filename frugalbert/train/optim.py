"""Parameter groups and optimizers: a model and settings in, a torch optimizer whose groups know their peak rate out.

AdamW, Adam and SGD are torch's fused ones. Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) serves the
matrices of the repeated layers, all of one shape in one batched product, and AdamW the rest. LAMB (arXiv 1904.00962) is
for very large batches. A user's own comes from `file.py:function`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw as adamw_update

from frugalbert import dist
from frugalbert.plugins import check_settings, find, is_ini
from frugalbert.train.curves import CURVES, curve, rate
from frugalbert.train.ini import did_you_mean, read_ini

__all__ = ["CURVES", "Lamb", "Muon", "OptimizerSettings", "curve", "make_optimizer", "parameter_groups", "rate"]
NEWTON_SCHULZ = (3.4445, -4.775, 2.0315)


@dataclass(frozen=True)
class OptimizerSettings:
    """What an optimizer needs to know; the keys of `pretrain:` with the same names."""

    name: str = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    epsilon: float = 1e-6
    muon_learning_rate: float = 0.02
    options: dict[str, Any] = field(default_factory=dict)


# ---- groups ----------------------------------------------------------------------------------------------------------


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups `{"params", "names", "weight_decay"}`: matrices with decay, norms and biases (vectors) without.

    Every trainable parameter is in exactly one group, unless it is marked `apart` (it is moved by other means); tied
    weights count once, under their first name.
    """
    decayed: dict[str, Any] = {"params": [], "names": [], "weight_decay": weight_decay}
    plain: dict[str, Any] = {"params": [], "names": [], "weight_decay": 0.0}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not getattr(parameter, "apart", False):
            group = decayed if parameter.ndim >= 2 else plain
            group["params"].append(parameter)
            group["names"].append(name)
    return [group for group in (decayed, plain) if group["params"]]


def _split_matrices(model: nn.Module, groups: list[dict[str, Any]], rate: float) -> list[dict[str, Any]]:
    """Move the 2-D parameters of the repeated layers into a group of their own, for Muon."""
    inside = {id(parameter) for block in dist.blocks(model) for parameter in block.parameters() if parameter.ndim == 2}
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    matrices: dict[str, Any] = {"params": [], "names": [], "matrices": True, "lr": rate, "peak": rate}
    for group in groups:
        moved = [id(parameter) in inside - embeddings for parameter in group["params"]]
        if any(moved):
            matrices["weight_decay"] = group["weight_decay"]
        for key in ("params", "names"):
            matrices[key] += [item for item, move in zip(group[key], moved, strict=True) if move]
            group[key] = [item for item, move in zip(group[key], moved, strict=True) if not move]
    if not matrices["params"]:
        raise ValueError("optimizer muon finds no matrices in repeated layers of this model; write optimizer: adamw")
    return [matrices, *(group for group in groups if group["params"])]


def parameter_table(optimizer: torch.optim.Optimizer) -> str:
    """One line per parameter: name, shape, peak rate, weight decay."""
    lines = ["parameter\tshape\tpeak rate\tweight decay"]
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            shape = "x".join(map(str, parameter.shape))
            lines.append(f"{name}\t{shape}\t{group['peak']:g}\t{group['weight_decay']:g}")
    return "\n".join(lines) + "\n"


# ---- making one ------------------------------------------------------------------------------------------------------


def make_optimizer(model: nn.Module, settings: OptimizerSettings, folder: Path = Path()) -> torch.optim.Optimizer:
    """The optimizer called `settings.name`, or the user's function below `folder`. Raises ValueError.

    Every group has `lr` = `peak` to begin with; `set_rates` multiplies.
    """
    settings = check_optimizer(settings, folder)
    groups = parameter_groups(model, settings.weight_decay)
    if settings.name not in OPTIMIZERS:
        optimizer = _users_own(groups, settings, folder)
    else:
        if settings.name == "muon":
            groups = _split_matrices(model, groups, settings.muon_learning_rate)
        optimizer = OPTIMIZERS[settings.name](groups, settings, **settings.options)
    for group in optimizer.param_groups:
        group.setdefault("peak", float(group["lr"]))
    return optimizer


def check_optimizer(settings: OptimizerSettings, folder: Path = Path()) -> OptimizerSettings:
    """The settings, those of a settings file filled in. Raises ValueError if the optimizer or an option is unknown."""
    settings, where = _from_ini(settings, folder)
    function = find("optimizer", settings.name, OPTIMIZERS, folder)
    given = ("groups", "settings") if settings.name in OPTIMIZERS else _filled(function)
    check_settings(function, settings.options, where, given)
    return settings


def _from_ini(settings: OptimizerSettings, folder: Path) -> tuple[OptimizerSettings, str]:
    """(settings, where their options stand): those of ExtremeBERT's file if the name is that of one."""
    if not is_ini(settings.name):
        return settings, "pretrain.optimizer_options"
    name, found = read_ini(settings.name, folder)
    if name not in OPTIMIZERS:
        raise ValueError(f"{settings.name}: there is no optimizer {name!r}; {did_you_mean(name, OPTIMIZERS)}")
    betas = settings.betas
    if name == "sgd" and "momentum" in found:
        momentum = found.pop("momentum")
        if isinstance(momentum, bool) or not isinstance(momentum, int | float) or not 0.0 <= momentum <= 1.0:
            raise ValueError(f"{settings.name}: momentum is {momentum!r}; write a number from 0 to 1")
        betas = (float(momentum), betas[1])
    return replace(settings, name=name, betas=betas, options=found | settings.options), settings.name


def _filled(function: Callable[..., Any]) -> list[str]:
    """Parameters of a user's function that we fill: the first one (groups), and settings it names."""
    names = list(inspect.signature(function).parameters)
    return names[:1] + [name for name in names[1:] if name in ("learning_rate", "weight_decay", "betas", "epsilon")]


def _users_own(groups: list[dict[str, Any]], settings: OptimizerSettings, folder: Path) -> torch.optim.Optimizer:
    function = find("optimizer", settings.name, OPTIMIZERS, folder)
    filled = {name: getattr(settings, name) for name in _filled(function)[1:]}
    optimizer = function([{**group, "lr": settings.learning_rate} for group in groups], **filled | settings.options)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f"{settings.name} returned {type(optimizer).__name__}; return a torch.optim.Optimizer")
    given = sorted(id(parameter) for group in optimizer.param_groups for parameter in group["params"])
    if given != sorted(id(parameter) for group in groups for parameter in group["params"]):
        raise ValueError(f"{settings.name} must put every parameter it is given into exactly one group")
    if any("names" not in group for group in optimizer.param_groups):
        raise ValueError(f"{settings.name} must keep the key names of the groups it is given")
    return optimizer


def restart_steps(optimizer: torch.optim.Optimizer) -> None:
    """Let the optimizer count its steps from 0 again, for another bias correction; its moments stay."""
    for state in optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"].zero_()
        elif "step" in state:
            state["step"] = 0


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Learning rate of every group = its peak times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor


Groups = list[dict[str, Any]]


def _adamw(groups: Groups, settings: OptimizerSettings, *, amsgrad: bool = False) -> torch.optim.Optimizer:
    rate, betas, epsilon = settings.learning_rate, settings.betas, settings.epsilon
    return torch.optim.AdamW(groups, lr=rate, betas=betas, eps=epsilon, amsgrad=amsgrad, fused=True)


def _adam(groups: Groups, settings: OptimizerSettings, *, amsgrad: bool = False) -> torch.optim.Optimizer:
    rate, betas, epsilon = settings.learning_rate, settings.betas, settings.epsilon
    return torch.optim.Adam(groups, lr=rate, betas=betas, eps=epsilon, amsgrad=amsgrad, fused=True)


def _sgd(groups: Groups, settings: OptimizerSettings, *, nesterov: bool = False) -> torch.optim.Optimizer:
    momentum = settings.betas[0]
    return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=momentum, nesterov=nesterov, fused=True)


def _lamb(
    groups: Groups,
    settings: OptimizerSettings,
    *,
    minimum_ratio: float = 0.01,
    maximum_ratio: float = 0.3,
    bias_correction: bool = True,
    trust_undecayed: bool = True,
) -> torch.optim.Optimizer:
    ratio = (minimum_ratio, maximum_ratio or math.inf)  # the paper's and NVIDIA's ratio has no bounds: 0 and 0
    return Lamb(groups, settings, ratio, bias_correction, trust_undecayed)


def _bertadam(groups: Groups, settings: OptimizerSettings) -> torch.optim.Optimizer:
    return Lamb(groups, settings, (1.0, 1.0), bias_correction=False)  # no trust ratio: decoupled Adam, uncorrected


def _muon(
    groups: Groups, settings: OptimizerSettings, *, momentum: float = 0.95, iterations: int = 5
) -> torch.optim.Optimizer:
    return Muon(groups, settings, momentum, iterations)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "muon": _muon,
    "lamb": _lamb,
    "bertadam": _bertadam,
    "adam": _adam,
    "sgd": _sgd,
}


# ---- LAMB ------------------------------------------------------------------------------------------------------------


class Lamb(torch.optim.Optimizer):
    """u = m / (sqrt(v) + eps) + decay w;  w -= lr clamp(|w| / |u|) u, per parameter tensor; the ratio is 1 where one is
    0 and, without `undecayed`, in groups that have no weight decay."""

    def __init__(
        self, groups: Iterable[Any], settings: OptimizerSettings, ratio: tuple[float, float], bias_correction: bool,
        undecayed: bool = True,
    ) -> None:  # fmt: skip
        self.settings, self.ratio, self.bias_correction = settings, ratio, bias_correction
        self.undecayed = undecayed
        super().__init__(groups, {"lr": settings.learning_rate, "weight_decay": settings.weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        beta1, beta2 = self.settings.betas
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:
                continue
            for weight in weights:
                _fill_state(self.state[weight], weight, "exp_avg", "exp_avg_sq", "step")
            gradients = [weight.grad for weight in weights]
            first = [self.state[weight]["exp_avg"] for weight in weights]
            second = [self.state[weight]["exp_avg_sq"] for weight in weights]
            torch._foreach_add_([self.state[weight]["step"] for weight in weights], 1.0)
            torch._foreach_lerp_(first, gradients, 1.0 - beta1)
            torch._foreach_mul_(second, beta2)
            torch._foreach_addcmul_(second, gradients, gradients, 1.0 - beta2)
            steps = float(self.state[weights[0]]["step"])
            bias1, bias2 = (1.0 - beta1**steps, 1.0 - beta2**steps) if self.bias_correction else (1.0, 1.0)
            below = torch._foreach_sqrt(second)
            torch._foreach_div_(below, math.sqrt(bias2))
            torch._foreach_add_(below, self.settings.epsilon)
            update = torch._foreach_div(torch._foreach_div(first, bias1), below)
            torch._foreach_add_(update, weights, alpha=group["weight_decay"])
            trusted = self.undecayed or group["weight_decay"] > 0.0
            for weight, change in zip(weights, update, strict=True):
                weight.sub_(change * (group["lr"] * (self._trust(weight, change) if trusted else 1.0)))

    def _trust(self, weight: Tensor, update: Tensor) -> Tensor:
        size, change = dist.full(weight.norm()), dist.full(update.norm())
        ratio = (size / change).clamp(*self.ratio)
        return torch.where((size > 0) & (change > 0), ratio, 1.0)


def _fill_state(state: dict[str, Any], weight: Tensor, *names: str) -> None:
    """Zeros for state that is not there yet; `step` is a number on the CPU, the others are like the weight."""
    for name in names:
        if name not in state:
            state[name] = torch.tensor(0.0) if name == "step" else torch.zeros_like(weight)


# ---- Muon ------------------------------------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Nesterov momentum made orthogonal (groups with `matrices`), AdamW for the others.

    w -= lr sqrt(max(1, rows / columns)) NS(m), NS = `iterations` Newton-Schulz steps; decoupled decay before it. In
    bf16 where the hardware multiplies it. `precision` (`fp32`) is for comparisons.
    """

    def __init__(
        self,
        groups: Iterable[Any],
        settings: OptimizerSettings,
        momentum: float = 0.95,
        iterations: int = 5,
        precision: str = "auto",
    ) -> None:
        if not 0.0 <= momentum < 1.0 or iterations < 1:
            raise ValueError("pretrain.optimizer_options: muon needs 0 <= momentum < 1 and iterations >= 1")
        self.settings, self.momentum, self.iterations, self.precision = settings, momentum, iterations, precision
        # torch's loading of state looks at `fused` to put AdamW's `step` beside its parameter
        super().__init__(groups, {"lr": settings.learning_rate, "weight_decay": settings.weight_decay, "fused": True})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if weights and group.get("matrices"):
                self._orthogonal(group, weights)
            elif weights:
                self._adamw(group, weights)

    def _orthogonal(self, group: dict[str, Any], weights: list[Tensor]) -> None:
        for weight in weights:
            _fill_state(self.state[weight], weight, "momentum")
        gradients = [weight.grad for weight in weights]
        momenta = [self.state[weight]["momentum"] for weight in weights]
        torch._foreach_lerp_(momenta, gradients, 1.0 - self.momentum)
        updates = torch._foreach_lerp(gradients, momenta, self.momentum)
        if group["weight_decay"]:
            torch._foreach_mul_(weights, 1.0 - group["lr"] * group["weight_decay"])
        shapes: dict[torch.Size, list[int]] = {}
        for index, weight in enumerate(weights):
            shapes.setdefault(weight.shape, []).append(index)
        bf16 = self.precision == "auto" and dist.multiplies_bf16(weights[0].device)
        for shape, members in shapes.items():
            batch = torch.stack([dist.full(updates[index]) for index in members])
            change = orthogonalise(batch.bfloat16() if bf16 else batch, self.iterations).to(batch.dtype)
            scale = -group["lr"] * math.sqrt(max(1.0, shape[0] / shape[1]))
            chosen = [weights[index] for index in members]
            parts = [dist.split_like(part, weight) for part, weight in zip(change, chosen, strict=True)]
            torch._foreach_add_(chosen, parts, alpha=scale)

    def _adamw(self, group: dict[str, Any], weights: list[Tensor]) -> None:
        for weight in weights:
            _fill_state(self.state[weight], weight, "exp_avg", "exp_avg_sq")
            self.state[weight].setdefault("step", torch.zeros((), device=weight.device))
        adamw_update(
            weights,
            [weight.grad for weight in weights],  # type: ignore[misc]
            [self.state[weight]["exp_avg"] for weight in weights],
            [self.state[weight]["exp_avg_sq"] for weight in weights],
            [],
            [self.state[weight]["step"] for weight in weights],
            fused=True,
            amsgrad=False,
            beta1=self.settings.betas[0],
            beta2=self.settings.betas[1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=self.settings.epsilon,
            maximize=False,
        )


def orthogonalise(matrices_NRC: Tensor, iterations: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly (singular values 0.7 to 1.2): a batch of (N, rows, columns)."""
    a, b, c = NEWTON_SCHULZ
    x = matrices_NRC.mT if matrices_NRC.size(-2) > matrices_NRC.size(-1) else matrices_NRC
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if matrices_NRC.size(-2) > matrices_NRC.size(-1) else x


# ---- state -----------------------------------------------------------------------------------------------------------


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(`{"parameter/name": tensor}`, the same for what is no tensor) of an optimizer's state; whole, not shards."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{name}/{key}"] = dist.full(value).detach()
                else:
                    values[f"{name}/{key}"] = value
    return tensors, values


def load_optimizer_state(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """The inverse of `optimizer_state`."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in {**tensors, **values}.items():
        name, _, entry = key.rpartition("/")
        found.setdefault(name, {})[entry] = value
    state: dict[int, dict[str, Any]] = {}
    named = [pair for group in optimizer.param_groups for pair in zip(group["names"], group["params"], strict=True)]
    for index, (name, parameter) in enumerate(named):
        for entry, value in found.get(name, {}).items():
            whole = isinstance(value, Tensor) and value.shape == parameter.shape
            state.setdefault(index, {})[entry] = dist.split_like(value, parameter) if whole else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
