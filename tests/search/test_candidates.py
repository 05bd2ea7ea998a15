"""Drawing within limits is even and never outside; the Pareto front is what its definition says."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from frugalbert import config
from frugalbert.search import candidates
from frugalbert.search.candidates import Candidate, Region, crowding, front, non_dominated_sort, windows
from frugalbert.space import Space
from tests.search.toy import SPACE, cost

FEW = Space(depth=(1, 2, 3), hidden=(32, 64), heads=(2, 4), head_dim=(8, 16), ffn=(64, 128, 256, 512))
HUGE = Space(
    depth=tuple(range(1, 13)),
    hidden=tuple(range(32, 769, 4)),
    heads=tuple(range(1, 13)),
    head_dim=tuple(range(8, 65, 4)),
    ffn=tuple(range(32, 3073, 4)),
)
MIXED = Space(**{name: getattr(HUGE, name) for name in ("depth", "hidden", "heads", "head_dim", "ffn")}, mixed=True)


def draws(region: Region, count: int, seed: int = 0) -> list:
    rng, seen = np.random.default_rng(seed), set()
    while len(seen) < count and (found := region.draw(rng, seen)):
        assert found[0] not in seen
        seen.add(found[0])
    return list(seen)


def test_windows():
    limit = config.Limit.model_validate({"latency_ms": 8, "speedup": 4, "parameters": [1e6, 2e6]})
    assert windows(limit) == {"latency_ms": (0.0, 8.0), "speedup": (4.0, math.inf), "parameters": (1e6, 2e6)}


@pytest.mark.parametrize("pool", [0, 5000])
def test_draws_within_limits_are_even(pool, monkeypatch):
    monkeypatch.setattr(candidates, "TRIES", 2000 if pool == 0 else 0)  # by rejection, or from the list
    limit = config.Limit.model_validate({"latency_ms": [0.4, 0.7], "parameters": 90_000})
    inside = [
        arch for arch in FEW.enumerate() if 0.4 <= cost(arch)["latency_ms"] <= 0.7 and cost(arch)["parameters"] <= 9e4
    ]
    assert 10 < len(inside) < FEW.size() / 2
    region = Region(FEW, cost, limit)
    rng = np.random.default_rng(0)
    counts = Counter(region.draw(rng, set())[0] for _ in range(50 * len(inside)))  # type: ignore[index]
    assert set(counts) == set(inside)
    assert chisquare([counts[arch] for arch in inside]).pvalue > 1e-3
    assert region.share() == pytest.approx(len(inside) / FEW.size(), rel=0.1 if pool == 0 else 1e-12)
    assert set(draws(region, 10_000)) == set(inside)  # every one once, then none


def test_speedup_is_over_the_largest():
    region = Region(FEW, cost, config.Limit(speedup=(3.0, 5.0)))
    base = cost(FEW.largest())["latency_ms"]
    inside = {arch for arch in FEW.enumerate() if 3.0 <= base / cost(arch)["latency_ms"] <= 5.0}
    assert set(draws(region, 10_000)) == inside != set()
    assert region.costs(FEW.smallest())["speedup"] == base / cost(FEW.smallest())["latency_ms"]


@pytest.mark.parametrize("space", [HUGE, MIXED])
@pytest.mark.parametrize(
    "limit",
    [
        {"latency_ms": 0.35},
        {"parameters": [59_000, 60_000]},
        {"latency_ms": [40.0, 40.4], "parameters": [6.3e6, 6.5e6]},
    ],
)
def test_tight_limits_in_huge_spaces(space, limit, monkeypatch):
    monkeypatch.setattr(candidates, "TRIES", 50)  # as if the space were forty times as large
    region = Region(space, cost, config.Limit.model_validate(limit))
    found = draws(region, 5)
    assert len(set(found)) == 5
    for arch in found:
        assert space.contains(arch)
        assert region.look(arch)[1] == 0.0
    assert region.walking


@pytest.mark.parametrize("space", [FEW, HUGE, MIXED, Space((1,), (32,), (2,), (8,), (64,))])
def test_an_impossible_limit_names_the_nearest(space, monkeypatch):
    monkeypatch.setattr(candidates, "TRIES", 50)
    monkeypatch.setattr(candidates, "WALKS", 1)
    region = Region(space, cost, config.Limit(latency_ms=(0.01,), parameters=(1e9,)))
    assert region.draw(np.random.default_rng(0), set()) is None
    least = cost(space.smallest())["latency_ms"]
    with pytest.raises(ValueError, match="no architecture of the space is within search.limit") as caught:
        raise region.impossible()
    assert f"{space.smallest()} with latency_ms {least:.4g} (limit at most 0.01);" in str(caught.value)


def test_a_limit_on_what_nobody_measured():
    def blind(arch):
        return {"parameters": 1.0, "flops": 1.0}

    for name in ("latency_ms", "speedup"):
        with pytest.raises(ValueError, match=f"search.limit.{name} needs the section latency"):
            Region(FEW, blind, config.Limit.model_validate({name: 3}))
    assert "speedup" not in Region(FEW, blind, config.Limit(flops=(3.0,))).costs(FEW.smallest())


def test_a_rule_is_kept_or_nothing_is_drawn():
    region = Region(SPACE, cost, config.Limit(latency_ms=(3.0,)))
    rng = np.random.default_rng(0)
    for _ in range(50):
        found = region.draw(rng, set(), lambda arch: len(arch.layers) == 2)
        assert found is not None
        assert len(found[0].layers) == 2
    assert region.draw(rng, set(), lambda arch: False) is None
    assert region.draw(rng, set()) is not None


# ---- Pareto ----------------------------------------------------------------------------------------------------------

points = st.lists(st.tuples(*[st.sampled_from([0.0, 1.0, 2.0, 3.0, math.inf])] * 2), max_size=14)


def beats(one, two) -> bool:
    return all(a <= b for a, b in zip(one, two, strict=True)) and any(a < b for a, b in zip(one, two, strict=True))


@given(points)
def test_sorting_is_by_definition(values):
    """A point's front is the longest chain of points that beat each other above it."""

    def depth(index: int) -> int:
        return max((1 + depth(other) for other, point in enumerate(values) if beats(point, values[index])), default=0)

    fronts = non_dominated_sort(values)
    assert sorted(itertools.chain(*fronts)) == list(range(len(values)))
    assert [[depth(index) for index in found] for found in fronts] == [
        [number] * len(found) for number, found in enumerate(fronts)
    ]


def test_crowding():
    assert crowding([(0.0, 4.0), (1.0, 2.0), (2.0, 1.0), (4.0, 0.0)]) == [
        math.inf,
        2 / 4 + 3 / 4,
        3 / 4 + 2 / 4,
        math.inf,
    ]
    assert crowding([(1.0, 1.0)]) == [math.inf]
    assert crowding([(1.0, 1.0)] * 3).count(math.inf) == 2


def test_front_of_candidates():
    rng = np.random.default_rng(3)
    found = [Candidate(arch, cost(arch), "random", score=float(rng.normal())) for arch in FEW.enumerate()]
    failed = Candidate(FEW.smallest(), cost(FEW.smallest()), "random", score=math.inf)
    best = front([*found, failed])
    pairs = [(candidate.score, candidate.costs["latency_ms"]) for candidate in found]
    assert {id(c) for c in best} == {
        id(c) for c, pair in zip(found, pairs, strict=True) if not any(beats(other, pair) for other in pairs)
    }
    assert [c.costs["latency_ms"] for c in best] == sorted(c.costs["latency_ms"] for c in best)
    assert front([failed]) == []
