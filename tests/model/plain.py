"""The encoder written a second time, straight from the papers' formulas: one text, one head, one position at a time.

Nothing of `frugalbert.model` is used but the parameters by name.
"""

from __future__ import annotations

import cmath
import math

import torch
from torch import Tensor

from frugalbert.model.arch import Arch, LayerArch

ACTIVATIONS = {
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: x * (x > 0),
    "silu": lambda x: x / (1 + torch.exp(-x)),
}


class Plain:
    """`state`: a FrugalModel's float64 parameters."""

    def __init__(self, arch: Arch, state: dict[str, Tensor]) -> None:
        self.arch, self.state = arch, state

    def linear(self, name: str, x: Tensor) -> Tensor:
        y = x @ self.state[name + ".weight"].T
        return y if self.arch.family == "modern" else y + self.state[name + ".bias"]

    def norm(self, name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        y = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + self.arch.norm_epsilon)
        y = y * self.state[name + ".weight"]
        return y if self.arch.family == "modern" else y + self.state[name + ".bias"]

    def turned(self, x: Tensor, position: int, theta: float) -> Tensor:
        """RoPE with complex numbers: pair k of K/2 turns by position / theta^(2k/K)."""
        half = len(x) // 2
        pairs = [complex(x[k], x[half + k]) for k in range(half)]
        turned = [pair * cmath.exp(1j * position / theta ** (k / half)) for k, pair in enumerate(pairs)]
        return torch.tensor([z.real for z in turned] + [z.imag for z in turned], dtype=x.dtype)

    def attention(self, at: str, layer: LayerArch, x: Tensor) -> Tensor:
        q, k, v = (self.linear(f"{at}.attention.{name}", x) for name in ("query", "key", "value"))
        size, mixed = layer.head_dim, torch.zeros(len(x), layer.qkv, dtype=x.dtype)
        for head in range(layer.heads):
            part = slice(head * size, (head + 1) * size)
            queries, keys = list(q[:, part]), list(k[:, part])
            if self.arch.qk_norm:
                queries, keys = (
                    [
                        row
                        / torch.sqrt((row**2).mean() + self.arch.norm_epsilon)
                        * self.state[f"{at}.attention.{name}"]
                        for row in rows
                    ]
                    for rows, name in ((queries, "query_norm.weight"), (keys, "key_norm.weight"))
                )
            if self.arch.family == "modern":
                theta = self.arch.rope_theta if layer.window is None else self.arch.local_rope_theta
                queries = [self.turned(row, i, theta) for i, row in enumerate(queries)]
                keys = [self.turned(row, i, theta) for i, row in enumerate(keys)]
            for i, query in enumerate(queries):
                seen = [j for j in range(len(x)) if layer.window is None or abs(i - j) <= layer.window]
                weight = torch.tensor([math.exp(query @ keys[j] / math.sqrt(size)) for j in seen], dtype=x.dtype)
                mixed[i, part] = sum(w * v[j, part] for w, j in zip(weight / weight.sum(), seen, strict=True))
        return self.linear(f"{at}.attention.output", mixed)

    def feed_forward(self, at: str, x: Tensor) -> Tensor:
        inner = ACTIVATIONS[self.arch.activation](self.linear(f"{at}.ffn.input", x))
        if self.arch.family == "modern":
            inner = inner * self.linear(f"{at}.ffn.gate", x)
        return self.linear(f"{at}.ffn.output", inner)

    def layer(self, index: int, layer: LayerArch, x: Tensor) -> Tensor:
        at = f"layers.{index}"
        if self.arch.family == "bert":
            x = self.norm(f"{at}.attention_norm", x + self.attention(at, layer, x))
            return self.norm(f"{at}.ffn_norm", x + self.feed_forward(at, x))
        first = self.arch.family == "modern" and self.arch.embedding_norm and index == 0
        x = x + self.attention(at, layer, x if first else self.norm(f"{at}.attention_norm", x))
        return x + self.feed_forward(at, self.norm(f"{at}.ffn_norm", x))

    def __call__(self, ids: Tensor, types: Tensor) -> Tensor:
        """ids, types (T,) -> (T, D)."""
        x = self.state["embeddings.word.weight"][ids]
        if self.arch.token_types:
            x = x + self.state["embeddings.token_type.weight"][types]
        if self.arch.family != "modern":
            x = x + self.state["embeddings.position.weight"][: len(ids)]
        if self.arch.embedding_norm:
            x = self.norm("embeddings.norm", x)
        for index, layer in enumerate(self.arch.layers):
            x = torch.cat((self.layer(index, layer, x[:, : layer.hidden]), x[:, layer.hidden :]), 1)
        return x if self.arch.family == "bert" else self.norm("final_norm", x)
