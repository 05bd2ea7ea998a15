"""The benchmark that shows why Bort's released distillation loss taught nothing: its formulas, and what is quoted."""

from __future__ import annotations

import json
import math

import pytest
import torch

from tests.structure import ROOT, benchmark


@pytest.fixture(scope="module")
def script():
    return benchmark("distillation_gradient")


def test_both_gradients_are_the_closed_forms(script, monkeypatch: pytest.MonkeyPatch):
    """0.5 T (q - p), and 0.5 / (T V) q (g - <q, g>) with g = softmax(q) - p."""
    size = 11
    monkeypatch.setattr(script, "VOCABULARY", size)
    teacher, student = torch.randn(2, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
    _, meant = script.ours(student, teacher, torch.tensor([3]), (0.0, 0.5))
    torch.testing.assert_close(meant, 0.5 * 2 * (q - p))
    _, found = script.released(student, teacher)
    g = q.softmax(-1) - p
    torch.testing.assert_close(found, 0.5 / (2 * size) * q * (g - (q * g).sum()))


def test_what_the_page_says_is_what_was_measured():
    rows = json.loads((ROOT / "benchmarks" / "results" / "distillation_gradient.json").read_text())["rows"]
    ratios = [row["words_gradient"] / row["released_gradient"] for row in rows]
    assert math.floor(min(ratios) / 1000) == 16
    assert max(row["released_gradient"] for row in rows) < 1e-6
    assert min(row["released_gradient"] for row in rows if row["disagreement"] == 0) > 0
    quoted = next(row for row in rows if (row["spread"], row["disagreement"]) == (5.0, 2.0))
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    for name in ("meant", "words", "released"):
        assert f"{quoted[f'{name}_gradient']:.1g}" in text.split("## Bort's distillation loss")[1], name
