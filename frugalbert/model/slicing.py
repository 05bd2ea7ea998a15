"""One slicing rule: the small encoder inside a big one. Weights of a big Arch in, those of a smaller one out.

`AXES` says along which axis of the architecture each weight runs; a slice takes the leading channels, heads,
feed-forward units, and of each head its leading dimensions. That is both of AutoTinyBERT's rules (arXiv 2107.13686):
the first h whole heads when head_dim is the same, the first rows of every head when the number of heads is. Everything
else follows from the table: `view` (differentiable, no copy where memory allows), `extract` (the same, as a model of
its own), `reorder` (permute first, so that slices keep what matters; DynaBERT, arXiv 2004.04037).
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from .arch import Arch, LayerArch
from .configuration import FrugalConfig

AXES: dict[str, tuple[str, ...]] = {
    "embeddings.word": ("all", "stream"),
    "embeddings.position": ("all", "stream"),
    "embeddings.token_type": ("all", "stream"),
    "embeddings.norm": ("stream",),
    "attention.query": ("qkv", "hidden"),
    "attention.key": ("qkv", "hidden"),
    "attention.value": ("qkv", "hidden"),
    "attention.output": ("hidden", "qkv"),
    "attention.query_norm": ("head_dim",),
    "attention.key_norm": ("head_dim",),
    "attention_norm": ("hidden",),
    "ffn.input": ("ffn", "hidden"),
    "ffn.gate": ("ffn", "hidden"),
    "ffn.output": ("hidden", "ffn"),
    "ffn_norm": ("hidden",),
    "final_norm": ("stream",),
    "pooler": ("stream", "stream"),
    "head.dense": ("stream", "stream"),
    "head.norm": ("stream",),
    "dense": ("stream", "stream"),
    "decoder": ("all", "stream"),
    "pair": ("all", "stream"),
    "classifier": ("all", "stream"),
    "fit": ("all", "stream"),
}
"""Module -> axes of its weight; a bias runs along the first. `all` is never cut, `stream` is the residual stream,
`hidden` the channels of it that a layer uses, `qkv` heads * head_dim."""
LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.(.+)")
MODERN_FIRST = "the first layer of this encoder has no norm of its own, so every slice must keep it as its first"


def axes_of(name: str) -> tuple[int | None, tuple[str, ...]]:
    """(layer or None, axes) of a parameter. Raises ValueError for a parameter that the table does not know."""
    module, _, kind = name.rpartition(".")
    match = LAYER.fullmatch(module)
    module = match[2] if match else module.removeprefix("model.")
    if module not in AXES or kind not in ("weight", "bias"):
        raise ValueError(f"the axes of the parameter {name} are not known; add its module to model.slicing.AXES")
    axes = AXES[module]
    return int(match[1]) if match else None, axes[:1] if kind == "bias" else axes


def kept_layers(big: Arch, depth: int, rule: Literal["first", "even"] = "first") -> tuple[int, ...]:
    """Which layers a slice of `depth` layers keeps: the first (AutoTinyBERT), or evenly spread (DynaBERT)."""
    if rule == "first" or depth == 1:
        return tuple(range(depth))
    return tuple(round(index * (len(big.layers) - 1) / (depth - 1)) for index in range(depth))


def check(big: Arch, small: Arch, layers: Sequence[int] | None = None) -> tuple[int, ...]:
    """The layers of `big` that `small` is made of. Raises ValueError saying what does not fit."""
    chosen = tuple(range(len(small.layers))) if layers is None else tuple(layers)
    if len(chosen) != len(small.layers) or sorted(set(chosen)) != list(chosen):
        raise ValueError(f"{len(small.layers)} layers cannot be taken from the layers {chosen}")
    if chosen[-1] >= len(big.layers):
        raise ValueError(f"an encoder of {len(small.layers)} layers is no slice of one of {len(big.layers)}")
    if small.hidden > big.hidden:
        raise ValueError(f"{small.hidden} channels are no slice of {big.hidden}")
    for name in ("family", "max_length", "token_types", "embedding_norm", "norm_epsilon", "activation", "qk_norm",
                 "rope_theta", "local_rope_theta"):  # fmt: skip
        if getattr(small, name) != getattr(big, name):
            raise ValueError(f"{name} is {getattr(small, name)!r} here and {getattr(big, name)!r} in the super-network")
    if big.family == "modern" and big.embedding_norm and chosen[0] != 0:
        raise ValueError(MODERN_FIRST)
    for index, layer in zip(chosen, small.layers, strict=True):
        _check_layer(index, big.layers[index], layer)
    return chosen


def _check_layer(index: int, big: LayerArch, small: LayerArch) -> None:
    for name in ("hidden", "heads", "head_dim", "ffn"):
        if getattr(small, name) > getattr(big, name):
            raise ValueError(
                f"layer {index} of the super-network has {name} {getattr(big, name)}; {getattr(small, name)} does not "
                "fit into it"
            )
    if small.pattern != big.pattern:
        raise ValueError(f"layer {index} attends {big.pattern} in the super-network, not {small.pattern}")


# ---- slices ----------------------------------------------------------------------------------------------------------


def view(
    weights: Mapping[str, Tensor], big: Arch, small: Arch, layers: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """The weights of the slice `small` under the names they have in a model of that Arch.

    `weights` are parameters of a model of `big` by name, any head included. The results are views, except where heads
    are cut (a gather); gradients flow into the slices alone. `layers` are the layers to keep, by default the first.
    Raises ValueError if `small` does not fit into `big`.
    """
    chosen = check(big, small, layers)
    place = {old: new for new, old in enumerate(chosen)}
    out: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        index, axes = axes_of(name)
        if index is not None and index not in place:
            continue
        new = name if index is None else name.replace(f"layers.{index}.", f"layers.{place[index]}.", 1)
        first, second = (None, None) if index is None else (big.layers[index], small.layers[place[index]])
        for dimension, axis in enumerate(axes):
            tensor = _cut(tensor, dimension, axis, small, first, second)
        out[new] = tensor
    return out


def _cut(
    tensor: Tensor, dimension: int, axis: str, small: Arch, before: LayerArch | None, after: LayerArch | None
) -> Tensor:
    if axis == "all":
        return tensor
    if axis == "stream":
        return _prefix(tensor, dimension, small.hidden)
    assert before is not None
    assert after is not None
    if axis in ("hidden", "ffn"):
        return _prefix(tensor, dimension, getattr(after, axis))
    rotary = small.family == "modern"
    if axis == "head_dim":
        return _cut_heads(tensor, dimension, (1, before.head_dim), (1, after.head_dim), rotary)
    return _cut_heads(tensor, dimension, (before.heads, before.head_dim), (after.heads, after.head_dim), rotary)


def _prefix(tensor: Tensor, dimension: int, size: int) -> Tensor:
    """The leading entries; a whole axis is left alone, since even its trivial slice costs a copy of the gradient."""
    return tensor if size == tensor.shape[dimension] else tensor.narrow(dimension, 0, size)


def _cut_heads(tensor: Tensor, dimension: int, before: tuple[int, int], after: tuple[int, int], rotary: bool) -> Tensor:
    """The first heads, and of each its first dimensions; rotary positions turn pairs (k, k + K/2), which stay pairs."""
    if before[1] == after[1]:
        return _prefix(tensor, dimension, after[0] * after[1])
    parts = 2 if rotary else 1
    tensor = tensor.unflatten(dimension, (before[0], parts, before[1] // parts))
    tensor = tensor.narrow(dimension, 0, after[0]).narrow(dimension + 2, 0, after[1] // parts)
    return tensor.flatten(dimension, dimension + 2)


def forward(model: Any, small: Arch, layers: Sequence[int] | None = None, **inputs: Any) -> Any:
    """What the slice `small` of `model` computes: the outputs of its class, gradients to the slice of its weights."""
    weights = view(dict(model.named_parameters()), model.config.to_arch(), small, layers)
    return torch.func.functional_call(skeleton(model, small), weights, kwargs=inputs)


def skeleton(model: Any, small: Arch) -> nn.Module:
    """A model like `model`, of the Arch `small`, without weights of its own (2 ms; the latest are kept)."""
    config = json.dumps(model.config.to_dict(), sort_keys=True, default=str)
    return _skeleton(type(model), config, small).train(model.training)


@functools.lru_cache(maxsize=64)
def _skeleton(kind: type[Any], config: str, small: Arch) -> nn.Module:
    with torch.device("meta"), no_init_weights():
        shell = kind(FrugalConfig.from_dict({**json.loads(config), "arch": small.to_text()}))
    shell.tie_weights()
    return shell


def extract(model: Any, small: Arch, layers: Sequence[int] | None = None) -> Any:
    """The slice as a model of its own, of the same class, heads included. Raises ValueError if it does not fit."""
    weights = view(dict(model.named_parameters()), model.config.to_arch(), small, layers)
    with torch.device(model.device), no_init_weights():
        new = type(model)(FrugalConfig.from_dict({**model.config.to_dict(), "arch": small.to_text()}))
    new.tie_weights()
    with torch.no_grad():
        for name, parameter in new.to(model.dtype).named_parameters():
            parameter.copy_(weights[name])
    return new.train(model.training)


def sliced(tensors: Mapping[str, Tensor], big: Arch, slices: Sequence[tuple[Arch, Sequence[int] | None]]) -> set[str]:
    """Mark with True, in place, what any of the slices uses of each boolean tensor; the names of those that none does.

    `tensors` have the names and shapes of the weights of `big`.
    """
    unused = set(tensors)
    for small, layers in slices:
        chosen = check(big, small, layers)
        for name, tensor in tensors.items():
            index, axes = axes_of(name)
            if index is not None and index not in chosen:
                continue
            unused.discard(name)
            first = None if index is None else big.layers[index]
            second = None if index is None else small.layers[chosen.index(index)]
            where = [_indices(tensor.shape[d], axis, small, first, second) for d, axis in enumerate(axes)]
            tensor[torch.meshgrid(*where, indexing="ij") if len(where) > 1 else where[0]] = True
    return unused


def _indices(size: int, axis: str, small: Arch, first: LayerArch | None, second: LayerArch | None) -> Tensor:
    return _cut(torch.arange(size), 0, axis, small, first, second)


# ---- order -----------------------------------------------------------------------------------------------------------

Order = dict[str, list[Tensor]]
"""`stream`: one tensor (hidden,); `heads`, `ffn`: one per layer, (heads,) and (ffn,). Scores or permutations."""


def importance(model: Any) -> Order:
    """First-order Taylor scores from the gradients the model holds: how much the loss changes without a unit.

    With a factor m in front of a unit's output, |dL/dm| = |<w, dL/dw>| over the weights that carry that output on
    (DynaBERT, section 2.1; Michel et al., arXiv 1905.10650). Add up over batches.
    """
    arch: Arch = model.config.to_arch()
    stream = torch.zeros(arch.hidden)
    heads = [torch.zeros(layer.heads) for layer in arch.layers]
    ffn = [torch.zeros(layer.ffn) for layer in arch.layers]
    for name, weight in model.named_parameters():
        index, axes = axes_of(name)
        if weight.grad is None or len(axes) < 2:
            continue
        change = (weight.detach() * weight.grad).float().cpu()
        if name.endswith("embeddings.word.weight"):
            stream += change.sum(0)
        elif index is not None and axes[0] == "hidden":
            stream[: change.shape[0]] += change.sum(1)
            if axes[1] == "qkv":
                heads[index] += change.sum(0).view(arch.layers[index].heads, -1).sum(1)
            else:
                ffn[index] += change.sum(0)
    return {"stream": [stream.abs()], "heads": [item.abs() for item in heads], "ffn": [item.abs() for item in ffn]}


def ranking(scores: Order) -> Order:
    """The permutations that put the most important unit first."""
    return {name: [item.argsort(descending=True, stable=True) for item in items] for name, items in scores.items()}


@torch.no_grad()
def reorder(model: Any, order: Order) -> None:
    """Permute heads, feed-forward units and stream channels in place; the model computes the same as before.

    Kinds that `order` leaves out stay. Raises ValueError for the stream of an encoder whose layers differ in `hidden`.
    """
    arch: Arch = model.config.to_arch()
    if "stream" in order and any(layer.hidden != arch.hidden for layer in arch.layers):
        raise ValueError("the stream of an encoder whose layers differ in hidden has only one order")
    for name, weight in model.named_parameters():
        index, axes = axes_of(name)
        for dimension, axis in enumerate(axes):
            if axis in ("stream", "hidden") and "stream" in order:
                weight.copy_(weight.index_select(dimension, order["stream"][0].to(weight.device)))
            elif axis == "ffn" and "ffn" in order and index is not None:
                weight.copy_(weight.index_select(dimension, order["ffn"][index].to(weight.device)))
            elif axis == "qkv" and "heads" in order and index is not None:
                split = weight.unflatten(dimension, (arch.layers[index].heads, -1))
                chosen = split.index_select(dimension, order["heads"][index].to(weight.device))
                weight.copy_(chosen.flatten(dimension, dimension + 1))
