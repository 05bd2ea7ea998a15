"""FlexAttention (arXiv 2412.05496) as an `Attend`: a pattern and a batch's padding in, compiled attention out.

The block mask says which pairs the pattern allows and is made once for a pattern and a length; padding and documents
change with every batch and so are part of the scores. Lengths are rounded up, so that few kernels are compiled. On a
CPU it has no backward pass and needs a C++ compiler.

Shapes: B batch, T tokens, H heads, K head_dim; P patterns (1 or H).
"""

import functools
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .patterns import dense, parse

BLOCK = {"cpu": 32, "cuda": 128}
"""Of the block mask. On a CPU 32 took 0.3 to 0.8 of the time of 128."""
ROUND = 128
"""Lengths are rounded up to this: PyTorch's backward pass gave NaN at others (pytorch/pytorch issue 153799)."""
LEAST_CHANNELS = 16
KERNELS = 64
"""Shapes that may be compiled; beyond PyTorch's own limit of 8 it would silently compute all pairs."""
HIDDEN, ITSELF = -1e9, -5e8
"""Instead of the score of a hidden key; a query whose keys are all hidden sees itself."""


@dataclass(frozen=True)
class Flex:
    """An `Attend`: the block mask of a rounded length and what changes the scores."""

    block_mask: Any
    change: Callable[..., Tensor] | None
    length: int

    def __call__(self, query_BHTK: Tensor, key_BHTK: Tensor, value_BHTK: Tensor, dropout: float) -> Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        assert dropout == 0.0
        length = query_BHTK.shape[2]
        inputs = (query_BHTK, key_BHTK, value_BHTK)
        if length < self.length:
            inputs = tuple(functional.pad(x, (0, 0, 0, self.length - length)) for x in inputs)
        run = flex_attention if torch.compiler.is_compiling() else _compiled()
        return run(*inputs, score_mod=self.change, block_mask=self.block_mask)[:, :, :length]


@functools.cache
def _compiled() -> Any:
    from torch._dynamo import config
    from torch.nn.attention.flex_attention import flex_attention

    config.recompile_limit = max(KERNELS, config.recompile_limit)
    return torch.compile(flex_attention, dynamic=False)


def flex(pattern: str, like_BTD: Tensor, attention_mask_BT: Tensor | None, document_ids_BT: Tensor | None) -> Flex:
    """For one forward pass over rows of the length of `like`; masks as `visible_pairs` takes them. Every head's pattern
    contains the diagonal."""
    length = like_BTD.shape[1]
    whole = -(-length // ROUND) * ROUND
    mask = _block_mask(pattern, length, whole, like_BTD.device)
    if attention_mask_BT is None and document_ids_BT is None:
        return Flex(mask, None, whole)
    real, document = (
        None if x is None else functional.pad(x, (0, whole - length)) for x in (attention_mask_BT, document_ids_BT)
    )
    return Flex(mask, _change(None if real is None else real.bool(), document), whole)


def _change(real_BT: Tensor | None, document_BT: Tensor | None) -> Callable[..., Tensor]:
    def hide(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = i == i
        if real_BT is not None:
            seen = seen & real_BT[b, j]
        if document_BT is not None:
            seen = seen & (document_BT[b, i] == document_BT[b, j])
        return torch.where(seen, score, torch.where(i == j, ITSELF, HIDDEN))

    return hide


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)  # what is kept may be trained with later
def _block_mask(pattern: str, length: int, whole: int, device: torch.device) -> Any:
    """Of the first `length` tokens; those that fill up to `whole` see and are seen by themselves alone."""
    from torch.nn.attention.flex_attention import create_block_mask

    heads = parse(pattern)
    end = torch.tensor(length, device=device)  # as a number it would be part of the kernel
    block = BLOCK.get(device.type, BLOCK["cuda"])
    if all(head.by_distance for head in heads):
        distance = np.arange(-whole, whole + 1)
        near = torch.from_numpy(np.stack([head.allowed(distance, np.zeros_like(distance)) for head in heads])).to(
            device
        )

        def allowed(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return near[h % len(heads), i - j + whole] & (j < end) | (i == j)
    else:
        table = np.stack([np.pad(dense(head, length), (0, whole - length)) for head in heads])
        pairs = torch.from_numpy(table).to(device)

        def allowed(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return pairs[h % len(heads), i, j] | (i == j)

    many = len(heads) if len(heads) > 1 else None
    return create_block_mask(allowed, None, many, whole, whole, device=device, BLOCK_SIZE=block)


@functools.cache
def can_compile(device_type: str) -> bool:
    """Whether PyTorch finds what it compiles kernels with; warns once if not."""
    cpu = device_type == "cpu"
    name = os.environ.get("CXX" if cpu else "CC") or (
        "clang++" if sys.platform == "darwin" else "g++" if cpu else "gcc"
    )
    found = shutil.which(name) is not None and (cpu or find_spec("triton") is not None)
    if not found:
        warnings.warn(
            f"attention skips blocks by gathering them instead of FlexAttention, which needs the compiler {name}"
            + ("" if cpu else " and triton"),
            stacklevel=2,
        )
    return found
