"""Learned attention masks: logits beside an encoder, trained with it, that say which pairs of tokens may meet.

In: an encoder, batches, and how the masks are built (`Structure`) and shared. Out: the module and objective of the one
loop. SparseBERT (arXiv 2102.12871, section 4) learns a mask for each head with Gumbel noise; here a mask is
1[alpha + logistic noise > 0], its gradient straight-through, one mask per step for all ranks and micro-batches, and
validation uses 1[alpha > 0], never a sample. A target density is held by an augmented Lagrangian.

Shapes: G masks, P logits of one mask, L layers, H heads, T tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from frugalbert.config import Attention
from frugalbert.data.masking import Batch
from frugalbert.model.attention import Attend, Options
from frugalbert.train.batches import Micro
from frugalbert.train.gating import Gate
from frugalbert.train.state import Drawn

HOLD, GAIN, RAMP = 100.0, 2.0, 0.1  # of the controller: quadratic term, step of the multiplier, steps without it
BETAS, EPSILON = (0.9, 0.999), 1e-8


# ---- what a logit stands for -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Structure:
    """Which logit decides about a pair (i, j): `unstructured`, `toeplitz`, `block` or `block-toeplitz`.

    `toeplitz-priced` has the logits of `toeplitz` and pays for the blocks that it touches.
    """

    name: str
    length: int
    block: int
    symmetric: bool

    def index(self) -> np.ndarray:
        """(length, length) int64: the number of the logit of each pair."""
        return _index(self)

    def weights(self) -> np.ndarray:
        """(P,) int64: how many pairs each logit decides about."""
        return np.bincount(self.index().ravel())

    @property
    def size(self) -> int:
        """P."""
        return int(self.index().max()) + 1


@functools.lru_cache(maxsize=8)
def _index(structure: Structure) -> np.ndarray:
    place = np.arange(structure.length)
    if structure.name.startswith("block"):
        place = place // structure.block
    i, j = place[:, None], place[None, :]
    if structure.name in ("toeplitz", "toeplitz-priced", "block-toeplitz"):
        return abs(i - j) if structure.symmetric else i - j + place[-1]
    if not structure.symmetric:
        return i * (place[-1] + 1) + j
    low, high = np.minimum(i, j), np.maximum(i, j)
    return high * (high + 1) // 2 + low


def groups(share: str, heads: tuple[int, ...], layers_per_group: int | None) -> tuple[tuple[int, ...], ...]:
    """Layer by layer, the number of the mask of each head. Raises ValueError for layers that cannot share.

    `layers`: a mask per head for all layers (or for `layers_per_group` neighbours); `heads`: one per layer; `all`: one;
    `none`: one per layer and head.
    """
    if share == "none":
        ends = np.cumsum((0, *heads)).tolist()
        return tuple(tuple(range(start, start + count)) for start, count in zip(ends, heads, strict=False))
    if share == "all":
        return tuple((0,) * count for count in heads)
    if share == "heads":
        return tuple((index,) * count for index, count in enumerate(heads))
    if len(set(heads)) > 1:
        raise ValueError(
            f"attention.share: layers needs equal numbers of heads, these layers have {sorted(set(heads))}; write "
            "heads or none"
        )
    several = layers_per_group or len(heads)
    return tuple(
        tuple(range(index // several * count, (index // several + 1) * count)) for index, count in enumerate(heads)
    )


# ---- masks -----------------------------------------------------------------------------------------------------------


def relax(logits: Tensor, noise: Tensor | None, temperature: float) -> Tensor:
    """Masks of 0 and 1 with the gradient of sigmoid((alpha + noise) / temperature): P(1) = sigmoid(alpha)."""
    shifted = logits if noise is None else logits + noise
    soft = torch.sigmoid(shifted / temperature)
    return (shifted > 0.0).to(soft.dtype) + (soft - soft.detach())  # exactly 0 or 1


def logistic(shape: torch.Size, key: int) -> Tensor:
    """Logistic noise that `key` alone decides, on the CPU."""
    uniform = torch.rand(shape, generator=torch.Generator().manual_seed(key)).clamp(1e-6, 1.0 - 1e-6)
    return uniform.log() - (-uniform).log1p()


@dataclass(frozen=True, eq=False)
class MaskMicro:
    """A micro-batch, the key of its step's mask, and whether the step trains weights, masks or both."""

    micro: Micro
    key: int
    trains: str


class Masked(nn.Module):
    """The encoder, the logits of its attention masks, and the multiplier that holds their density."""

    network: Any  # FrugalForMaskedLM, or the same with a pair head
    index: Tensor
    weights: Tensor
    multiplier: Tensor

    def __init__(self, network: Any, section: Attention, structure: Structure) -> None:
        super().__init__()
        self.network, self.section, self.structure = network, section, structure
        layers = network.config.to_arch().layers
        self.rows = groups(section.share, tuple(layer.heads for layer in layers), section.layers_per_group)
        count = 1 + max(max(row) for row in self.rows)
        self.logits = nn.Parameter(1e-3 * torch.randn(count, structure.size))
        self.global_logits = nn.Parameter(1e-3 * torch.randn(count, 2, len(section.global_positions)))
        for logits in self.own():
            logits.apart = True  # type: ignore[attr-defined]  # neither the weights' optimizer nor their clip
        self.global_logits.requires_grad_(self.global_logits.numel() > 0)  # DDP waits for every gradient there may be
        self.register_buffer("index", torch.from_numpy(structure.index().copy()), persistent=False)
        self.register_buffer("weights", torch.from_numpy(structure.weights().copy()).float(), persistent=False)
        self.register_buffer("multiplier", torch.zeros(()))
        self.trains, self.progress = "both", 0.0

    def own(self) -> list[nn.Parameter]:
        """The logits: what is not the encoder's."""
        return [logits for logits in (self.logits, self.global_logits) if logits.numel()]

    # ---- forward -----------------------------------------------------------------------------------------------------

    def forward(self, objective: LearnedMasks, item: MaskMicro | Batch, progress: float) -> dict[str, Any]:
        """What `objective` measures of a micro-batch, or, of a plain batch, its validation figures."""
        return objective.measure(self, item, progress)

    def gates(self, noise_key: int | None, progress: float, batch: Batch) -> Callable[[int, Tensor | None], Attend]:
        """For the encoder's `gates`: sampled masks of a step, soft ones, or without a key those of validation."""
        found = [self._values(logits, noise_key, progress) for logits in (self.logits, self.global_logits)]
        packed = batch.position_ids if self.structure.name == "unstructured" or found[1].numel() else None
        made: dict[tuple[int, ...], Tensor] = {}

        def gate(layer: int, visible: Tensor | None) -> Attend:
            rows = self.rows[layer]
            if rows not in made:
                made[rows] = self._expand(found[0], found[1], rows, batch.input_ids.shape[1], packed)
            return Gate(made[rows], visible, self.section.gating)

        return gate

    def _values(self, logits: Tensor, key: int | None, progress: float) -> Tensor:
        if self.section.soft:
            return torch.sigmoid(logits)
        if key is None:
            return (logits > 0.0).float()
        first, last = self.section.temperature[0], self.section.temperature[-1]
        noise = logistic(logits.shape, key).to(logits.device)
        values = relax(logits, noise, first + (last - first) * progress)
        return values.detach() if self.trains == "weights" else values

    def _expand(
        self, values: Tensor, extra: Tensor, rows: tuple[int, ...], length: int, places: Tensor | None
    ) -> Tensor:
        """(H, T, T) from the logits' values, or (B, H, T, T) if positions (B, T) count within documents."""
        index = self.index[:length, :length]
        if places is not None and self.structure.name == "unstructured":
            index = self.index[places[:, :, None], places[:, None, :]]
        chosen = values[list(rows)]
        mask = chosen.index_select(1, index.flatten()).unflatten(1, index.shape)
        if mask.ndim == 4:
            mask = mask.transpose(0, 1)
        if extra.numel():
            assert places is not None
            return self._with_globals(mask if mask.ndim == 4 else mask[None], extra, list(rows), places)
        return mask

    def _with_globals(self, mask: Tensor, extra: Tensor, rows: Any, places: Tensor) -> Tensor:
        """The union of (B or 1, H, T, T) with rows and columns of the global positions; `places` (B or 1, T)."""
        for number, position in enumerate(self.section.global_positions):
            here = (places == position).to(mask.dtype)
            sees, seen = extra[rows, 0, number], extra[rows, 1, number]
            mask = 1.0 - (1.0 - mask) * (1.0 - here[:, None, :, None] * sees[:, None, None])
            mask = 1.0 - (1.0 - mask) * (1.0 - here[:, None, None, :] * seen[:, None, None])
        return mask

    # ---- density -----------------------------------------------------------------------------------------------------

    def density(self, values: Tensor, extra: Tensor) -> Tensor:
        """Mean density of masks with these values or probabilities, as if all were independent."""
        pairs = float(self.structure.length**2)
        if not extra.numel():
            return (values * self.weights).sum(1).mean() / pairs
        mask = values.index_select(1, self.index.flatten()).unflatten(1, self.index.shape)
        places = torch.arange(self.structure.length, device=mask.device)[None]
        every = torch.arange(len(values), device=mask.device)
        return self._with_globals(mask[None], extra, every, places).mean()

    def price(self, key: int | None, progress: float) -> Tensor:
        """What the penalty and the controller look at: the expected (or sampled) density, or block occupancy."""
        if self.structure.name == "toeplitz-priced":
            return block_price(torch.sigmoid(self.logits), self.structure.length, self.structure.block)
        if self.section.penalty_on == "sampled" and key is not None:
            return self.density(
                self._values(self.logits, key, progress), self._values(self.global_logits, key, progress)
            )
        return self.density(torch.sigmoid(self.logits), torch.sigmoid(self.global_logits))

    def penalty(self, key: int, progress: float) -> Tensor:
        """What is added to the loss."""
        section = self.section
        price = self.price(key, progress)
        if section.penalty is not None:
            return section.penalty * price * (self.logits.shape[0] * self.structure.length**2 if section.sum else 1.0)
        if section.density is None or progress < RAMP:
            return 0.0 * price
        gap = price - section.density
        return self.multiplier * gap + HOLD * gap**2

    # ---- the step ----------------------------------------------------------------------------------------------------

    def join(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the logits be moved whenever `optimizer` steps: Adam at their own rate, with their own clip."""
        names = {id(logits): name for name, logits in self.named_parameters()}
        group = {"params": self.own(), "names": [names[id(logits)] for logits in self.own()], "weight_decay": 0.0}
        optimizer.add_param_group({**group, "lr": 0.0, "peak": 0.0})
        optimizer.register_step_pre_hook(lambda *_: self._step(optimizer))

    @torch.no_grad()
    def _step(self, optimizer: torch.optim.Optimizer) -> None:
        gradients = [logits.grad for logits in self.own()]
        for logits in self.own():
            logits.grad = None
        if self.trains == "masks":
            for weight in self.network.parameters():
                weight.grad = None
        norm = torch.nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None])
        if self.trains == "weights" or not norm.isfinite():
            return
        scale = (self.section.mask_clip_norm / norm).clamp(max=1.0)
        for logits, gradient in zip(self.own(), gradients, strict=True):
            if gradient is not None:
                self._adam(optimizer.state[logits], logits, gradient * scale)
        if self.section.density is not None and self.progress >= RAMP:
            self.multiplier += GAIN * (self.price(None, 1.0) - self.section.density)

    def _adam(self, state: dict[str, Any], logits: Tensor, gradient: Tensor) -> None:
        if not state:
            state |= {"exp_avg": torch.zeros_like(logits), "exp_avg_sq": torch.zeros_like(logits)}
            state["step"] = torch.zeros((), device=logits.device)
        state["step"] += 1.0
        state["exp_avg"].lerp_(gradient, 1.0 - BETAS[0])
        state["exp_avg_sq"].mul_(BETAS[1]).addcmul_(gradient, gradient, value=1.0 - BETAS[1])
        first = state["exp_avg"] / (1.0 - BETAS[0] ** state["step"])
        second = state["exp_avg_sq"] / (1.0 - BETAS[1] ** state["step"])
        logits -= self.section.mask_learning_rate * first / (second.sqrt() + EPSILON)

    def figures(self) -> dict[str, Tensor]:
        """What is worth watching: densities that must meet, and how many logits are undecided."""
        with torch.no_grad():
            share = torch.sigmoid(self.logits)
            undecided = (share > 0.05) & (share < 0.95)
            values = (self.logits > 0.0).float(), (self.global_logits > 0.0).float()
            return {
                "density_expected": self.density(share, torch.sigmoid(self.global_logits)),
                "density_kept": self.density(*values),
                "undecided": undecided.float().mean(),
            }


def block_price(shares_GP: Tensor, length: int, block: int) -> Tensor:
    """Expected share of the block x block tiles that Toeplitz masks with these probabilities touch."""
    count = -(-length // block)
    total = torch.zeros(len(shares_GP), device=shares_GP.device)
    for number in range(count):
        low, high = max(0, (number - 1) * block + 1), min(length, (number + 1) * block)
        touched = 1.0 - (1.0 - shares_GP[:, low:high]).prod(1)
        total = total + touched * (count if number == 0 else 2 * (count - number))
    return total.mean() / count**2


# ---- objective -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LearnedMasks:
    """The objective: that of `base`, computed under the step's masks, and the price of their density."""

    base: Any

    def __call__(self, model: nn.Module, item: MaskMicro, progress: float) -> dict[str, Tensor]:
        return model(self, item, progress)

    def score(self, model: nn.Module, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """Figures of `base` under the masks as they would be taken now, and their densities."""
        return model(self, batch, 1.0)

    def measure(self, model: Masked, item: MaskMicro | Batch, progress: float) -> dict[str, Any]:
        """As the two above."""
        if isinstance(item, Batch):
            call = functools.partial(model.network, options=Options(model.gates(None, progress, item)))
            found = self.base.score(call, item)
            one = torch.ones((), device=model.logits.device)
            return found | {f"validation_{name}": (value, one) for name, value in model.figures().items()}
        model.trains, model.progress, key = item.trains, progress, item.key
        call = functools.partial(model.network, options=Options(model.gates(key, progress, item.micro.batch)))
        found = self.base(call, item.micro, progress)
        loss = found.pop("loss")
        price = model.penalty(key, progress) * item.micro.masked_share
        figures = {name: value * item.micro.masked_share for name, value in model.figures().items()}
        return {"loss": loss + price, "text_loss": loss.detach()} | found | figures

    def flops(self, model: Masked, length: float, rate: float) -> float:
        """Those of the dense encoder: a mask that is still searched saves nothing."""
        return self.base.flops(model.network, length, rate)


# ---- batches ---------------------------------------------------------------------------------------------------------


def with_masks(
    draw: Callable[[float, dict[str, int], int], Drawn], section: Attention
) -> Callable[[float, dict[str, int], int], Drawn]:
    """The same batches with the key of the step's masks: a function of the seed and the position in the data alone."""

    def drawn(progress: float, samples: dict[str, int], micro_batch: int) -> Drawn:
        found = draw(progress, samples, micro_batch)
        position = sum(samples.values())
        key = int(np.random.default_rng([section.seed, position]).integers(1 << 62))
        trains = "both"
        if section.levels == 2:
            trains = "weights" if position // section.batch_size % 2 == 0 else "masks"
        return replace(found, micros=[MaskMicro(micro, key, trains) for micro in found.micros])

    return drawn
