"""The comparison of search methods: what it calls better, worse and a tie."""

from __future__ import annotations

import argparse

import numpy as np
import pytest

from tests.structure import benchmark


@pytest.fixture(scope="module")
def script():
    return benchmark("search_methods")


def test_verdicts(script):
    base = np.random.default_rng(0).random((40, 3))
    shift = np.array([[0.0, 0.0, 0.1]])
    found = script.compare(
        {"random": base, "same": base, "more": base + shift, "less": base - shift, "other": np.roll(base, 7, axis=0)}
    )
    verdicts = {name: entry.get("verdict") for name, entry in found.items()}
    assert verdicts == {
        "random": None, "same": "tie with random", "more": "worse than random", "less": "better than random",
        "other": "tie with random",
    }  # fmt: skip
    assert found["same"]["seeds_against_random"] == {"better": 0, "equal": 40, "worse": 0}
    assert found["less"]["wilcoxon_p"] <= found["less"]["holm_p"] < 1e-6


def test_methods_see_the_table_alone(script, tmp_path):
    script.write_synthetic(tmp_path / "table.jsonl")
    table = script.read_table(tmp_path / "table.jsonl")
    for arch in list(table)[::7]:
        del table[arch]  # on the axes, but not in the table
    space = script.space_of(table)
    assert space.size() > len(table)
    options = argparse.Namespace(
        limit_ms=float(np.median([v for _, v in table.values()])), evaluations=40, population=12
    )
    best = min(score for score, latency in table.values() if latency <= options.limit_ms)
    curves = {}
    for name in ("random", "fast", "evolution", "evolution-no-crossover", "local"):
        curve = curves[name] = script.run_method(name, table, space, 0, options)
        assert len(curve) == 40
        assert curve == sorted(curve, reverse=True)
        assert curve[-1] >= best
        assert curve == script.run_method(name, table, space, 0, options)
    assert curves["random"][:12] == curves["evolution"][:12]  # the same first population
    assert len({tuple(curve) for curve in curves.values()}) > 3
