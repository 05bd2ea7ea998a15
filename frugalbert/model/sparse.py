"""Attention that skips what its pattern forbids: a pattern and a batch's padding in, an `Attend` for the layers out.

`gather` copies for each tile of queries the key blocks that it needs to one place and works on those with ordinary
products (BigBird's implementation, arXiv 2007.14062, appendix D, for any pattern). Padding and documents are compared
within the tiles; nothing of the size of all pairs is made.

Shapes: B batch, T tokens, H heads, K head_dim; P patterns (1 or H), R tiles of a group, t queries of a tile, b keys of
a block, N blocks of a tile, C = N b keys of a tile.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .attention import Attend, Mask, Rows, additive_mask
from .backends import choose
from .configuration import FrugalConfig
from .flex import LEAST_CHANNELS, can_compile, flex
from .patterns import parse
from .tiles import best, groups

PIECE = 1 << 19
"""Scores in memory at once on a CPU without gradients: small enough for its cache and for malloc to keep them."""


@dataclass(frozen=True)
class Tiles:
    """A group of tiles as tensors. `all` says that the tiles are all there are, in their order."""

    all: bool
    tiles_R: Tensor
    keys_RN: Tensor
    """Numbers of key blocks among those of all patterns."""
    counts: tuple[int, ...]
    """How many of them each tile needs."""
    query_places_Rt: Tensor
    key_places_RC: Tensor
    """Places in the row; -1 for what is not there."""
    allowed_RtC: Tensor
    """What the pattern allows; a query without any key sees itself."""


@dataclass(frozen=True, eq=False)
class Layout:
    """All groups of a pattern at a length."""

    tile: int
    block: int
    patterns: int
    groups: tuple[Tiles, ...]


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)  # what is kept may be trained with later
def layout(pattern: str, length: int, shape: tuple[int, int], device: torch.device) -> Layout:
    """The tensors of `tiles.groups` for tiles of `shape` = (queries, keys of a block)."""
    tile, block = shape
    heads, parts = parse(pattern), groups(pattern, length, tile, block)
    rows, columns = -(-length // tile), -(-length // block)
    found: list[Tiles] = []
    for part in parts:
        head, row = part.tiles // rows, part.tiles % rows
        queries = row[:, None] * tile + np.arange(tile)
        keys = (part.keys[:, :, None] * block + np.arange(block)).reshape(len(row), -1)
        keys[np.repeat(part.keys < 0, block, axis=1) | (keys >= length)] = -1
        allowed = np.stack(
            [
                heads[number].allowed(np.minimum(query[:, None], length - 1), np.maximum(key, 0)[None]) & (key >= 0)
                for number, query, key in zip(head, queries, keys, strict=True)
            ]
        )
        allowed |= (queries[:, :, None] == keys[:, None]) & ~allowed.any(-1, keepdims=True)
        numbers = np.maximum(part.keys, 0) + head[:, None] * columns
        counts = tuple((part.keys >= 0).sum(1).tolist())
        order, key_numbers, *rest = (
            torch.from_numpy(x).to(device) for x in (part.tiles, numbers, queries, keys, allowed)
        )
        found.append(Tiles(len(parts) == 1, order, key_numbers, counts, *rest))
    return Layout(tile, block, len(heads), tuple(found))


def _blocks(x_BHTK: Tensor, patterns: int, size: int) -> Tensor:
    """(B, H / P, P * blocks, size, K), zeros where the tokens end."""
    batch, heads, length, channels = x_BHTK.shape
    missing = -length % size
    if missing:
        x_BHTK = functional.pad(x_BHTK, (0, 0, 0, missing))
    return x_BHTK.reshape(batch, heads // patterns, -1, size, channels)


@dataclass(frozen=True)
class Gather:
    """An `Attend`: the layout and what is added to the scores of each group, (B or 1, 1, R, t, C)."""

    layout: Layout
    masks: tuple[Tensor, ...]

    def __call__(self, query_BHTK: Tensor, key_BHTK: Tensor, value_BHTK: Tensor, dropout: float) -> Tensor:
        layout, length = self.layout, query_BHTK.shape[2]
        query = _blocks(query_BHTK * query_BHTK.shape[-1] ** -0.5, layout.patterns, layout.tile)
        key, value = (_blocks(x, layout.patterns, layout.block) for x in (key_BHTK, value_BHTK))
        out: Tensor | None = None
        for tiles, mask in zip(layout.groups, self.masks, strict=True):
            step = count = len(tiles.keys_RN)
            if query.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
                each = query.shape[0] * query.shape[1] * mask.shape[-1] * layout.tile
                step = max(1, PIECE // each)
            for start in range(0, count, step):
                some, most = slice(start, start + step), max(tiles.counts[start : start + step])
                chosen = query[:, :, some] if tiles.all else query.index_select(2, tiles.tiles_R[some])
                hidden = mask[:, :, some, :, : most * layout.block]
                mixed = _mix(chosen, key, value, tiles.keys_RN[some, :most], hidden, dropout)
                if step >= count and tiles.all:
                    out = mixed
                    continue
                out = mixed.new_empty(query.shape) if out is None else out
                out.index_copy_(2, tiles.tiles_R[some], mixed)
        assert out is not None
        return out.reshape(*query_BHTK.shape[:2], -1, query_BHTK.shape[-1])[:, :, :length]


def _mix(query: Tensor, key: Tensor, value: Tensor, keys_RN: Tensor, mask: Tensor, dropout: float) -> Tensor:
    """Softmax(q k + mask) v of some tiles. In tiles of this size plain products are faster than the fused function."""
    place, numbers = (*query.shape[:3], -1, query.shape[-1]), keys_RN.flatten()
    fetched = key.index_select(2, numbers)
    scores = torch.matmul(query, fetched.view(place).transpose(-1, -2)).add_(mask)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        weights = functional.dropout(torch.softmax(scores, -1), dropout, training=dropout > 0.0)
        fetched = value.index_select(2, numbers)
    else:  # the memory is in the cache already
        weights = functional.dropout(torch.softmax(scores, -1, out=scores), dropout, training=dropout > 0.0)
        torch.index_select(value, 2, numbers, out=fetched)
    return torch.matmul(weights, fetched.view(place))


def masks_of(
    patterns: Mapping[str, int], rows: Rows, x_BTD: Tensor, config: FrugalConfig, *, dropout: bool
) -> dict[str, Mask]:
    """What the layers of each pattern are given: what skips forbidden pairs where that pays, else a mask.

    `patterns`: each with the narrowest heads that have it."""
    masks: dict[str, Mask] = {}
    for pattern, head_dim in patterns.items():
        found = skipping(pattern, rows, x_BTD, config.attention_backend, head_dim=head_dim, dropout=dropout)
        masks[pattern] = additive_mask(pattern, rows, x_BTD, config.sep_token_id) if found is None else found
    return masks


def skipping(pattern: str, rows: Rows, x_BTD: Tensor, wanted: str, *, head_dim: int, dropout: bool) -> Attend | None:
    """How layers of this pattern skip what it forbids, or None where masking all pairs is as good.

    `wanted` is the configuration's attention_backend, `head_dim` the least of these layers. A whole model that is
    exported or compiled masks all pairs; compiled layers take what they are given. Raises ValueError for inputs longer
    than the pattern is defined for.
    """
    if torch.compiler.is_exporting() or torch.compiler.is_compiling() or x_BTD.device.type == "meta":
        return None
    length, device = x_BTD.shape[1], x_BTD.device.type
    backend, _ = choose(
        pattern, length, device, training=not torch.is_inference_mode_enabled(), packed=rows.position_ids is not None,
        dropout=dropout, wanted=wanted,
    )  # fmt: skip
    if backend == "sdpa":
        return None
    mask, documents = rows.attention_mask, rows.document_ids
    if device == "cpu":  # where looking costs nothing
        mask = None if mask is None or bool(mask.all()) else mask
        documents = None if documents is None or bool((documents == documents[:, :1]).all()) else documents
    if backend == "flex" and head_dim >= LEAST_CHANNELS and can_compile(device):
        return flex(pattern, x_BTD, mask, documents)
    return gather(pattern, x_BTD, mask, documents)


def gather(
    pattern: str, like_BTD: Tensor, attention_mask_BT: Tensor | None, document_ids_BT: Tensor | None,
    shape: tuple[int, int] | None = None,
) -> Gather:  # fmt: skip
    """For one forward pass over rows of the length of `like`, scores in its dtype. Both masks as `visible_pairs` takes
    them; the pattern counts positions from the start of the row. `shape`: (queries of a tile, keys of a block)."""
    length = like_BTD.shape[1]
    made = layout(pattern, length, shape or best(pattern, length), like_BTD.device)
    if attention_mask_BT is None and document_ids_BT is None:
        return Gather(made, _static(made, like_BTD.dtype))
    masks = (_visible(tiles, attention_mask_BT, document_ids_BT) for tiles in made.groups)
    return Gather(made, tuple(_added(mask, like_BTD.dtype) for mask in masks))


def _added(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    zeros = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return zeros.masked_fill_(~allowed, torch.finfo(dtype).min / 2)


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)
def _static(made: Layout, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(_added(tiles.allowed_RtC[None, None], dtype) for tiles in made.groups)


def _visible(tiles: Tiles, attention_mask_BT: Tensor | None, document_ids_BT: Tensor | None) -> Tensor:
    """(B, 1, R, t, C) bool: the pattern within real tokens of the same document, and no query without a key."""
    query, key = tiles.query_places_Rt, tiles.key_places_RC
    found = tiles.allowed_RtC[None]
    if attention_mask_BT is not None:
        found = found & attention_mask_BT.bool()[:, key.clamp(min=0)][:, :, None]
    if document_ids_BT is not None:
        last = document_ids_BT.shape[1] - 1
        mine = document_ids_BT[:, query.clamp(max=last)]
        found = found & (mine[..., None] == document_ids_BT[:, key.clamp(min=0)][:, :, None])
    here = query[:, :, None] == key[:, None]
    return (found | (here & ~found.any(-1, keepdim=True)))[:, None]
