"""A search problem that costs nothing: a score with one optimum per size, costs in closed form."""

from __future__ import annotations

import math

from frugalbert import config
from frugalbert.budget import Clock
from frugalbert.model.arch import Arch
from frugalbert.model.cost import forward_flops, parameter_count
from frugalbert.search.evolution import Settings
from frugalbert.search.run import Result, search
from frugalbert.space import Space

SPACE = Space(
    depth=tuple(range(1, 7)),
    hidden=tuple(range(32, 129, 16)),
    heads=(2, 3, 4, 6),
    head_dim=(8, 16, 24, 32),
    ffn=(56, 84, 112, 140, 168, 196, 224, 320, 448, 512),
)
LIMIT = config.Limit(latency_ms=(3.0,))


def cost(arch: Arch) -> dict[str, float]:
    flops = 64 * forward_flops(arch, 64)
    latency = 0.2 + flops / 2e7 + 0.05 * len(arch.layers)
    return {"latency_ms": latency, "parameters": parameter_count(arch, 1000), "flops": flops}


def loss(arch: Arch) -> float:
    """More of everything helps less and less; heads of 16 and a feed-forward of twice the width help most."""
    layer = arch.layers[-1]
    shape = (math.log(layer.ffn / 2 / layer.hidden)) ** 2 + 0.5 * math.log(layer.head_dim / 16) ** 2
    return 3.0 + 0.6 / len(arch.layers) ** 0.5 + 8.0 / layer.hidden**0.7 + 0.3 / layer.heads + 0.2 * shape


def score(archs: list[Arch]) -> list[float]:
    return [loss(arch) for arch in archs]


def run(settings: Settings, seed: int = 0, limit: config.Limit = LIMIT, space: Space = SPACE, of=score) -> Result:
    import numpy as np

    return search(space, of, cost, limit, np.random.default_rng(seed), Clock(), settings)
