"""`benchmarks/serving.py`: ratios within a round, excess over the staircase's line; what a stopped study knows."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.structure import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import serving  # noqa: E402
from evidence import Finished  # noqa: E402


def reading(model: str, kind: str, ms: float, number: int, **cell: Any) -> dict[str, Any]:
    shape = cell or {"batch_size": 1, "length": 16}
    return {"model": model, "kind": kind, "asked_precision": "fp32", "threads": 1, "round": number, "precision": "fp32",
            "median_ms": ms, "noisy": False, **shape}  # fmt: skip


def test_ratios_are_taken_within_a_round():
    rows = [
        reading("bert-base", "torch", 100.0, 0), reading("small", "torch", 10.0, 0), reading("small", "onnx", 5.0, 0),
        reading("bert-base", "torch", 300.0, 1), reading("small", "torch", 20.0, 1), reading("small", "onnx", 10.0, 1),
        reading("bert-base", "onnx", 50.0, 0), reading("bert-base", "onnx", 80.0, 1),
    ]  # fmt: skip
    found = {(row["model"], row["kind"]): row for row in serving.summarise(rows)}
    assert found["small", "torch"]["over_bert-base"] == {"min": 10.0, "median": 12.5, "max": 15.0}
    assert found["small", "onnx"]["over_bert-base"] == {"min": 8.0, "median": 9.0, "max": 10.0}
    assert found["small", "onnx"]["over_bert-base_in_fp32"] == {"min": 20.0, "median": 25.0, "max": 30.0}
    assert found["small", "onnx"]["ms"] == {"min": 5.0, "median": 7.5, "max": 10.0}
    assert "over_bert-base" not in found["bert-base", "torch"]
    assert "over_minilm-l6-h384" not in found["small", "torch"]


def test_batches_by_length_are_compared_with_those_in_order():
    rows = [
        reading("small", "torch", 30.0, 0, batching="in order"),
        reading("small", "torch", 20.0, 0, batching="by length"),
    ]
    found = {row["batching"]: row for row in serving.summarise(rows)}
    assert found["by length"]["over_batches_in_order"]["median"] == 1.5
    assert "over_batches_in_order" not in found["in order"]


def test_excess_is_over_the_line_through_multiples_of_64():
    line = {64: 1.0, 72: 1.25, 80: 1.25, 88: 1.75, 96: 1.5, 100: 3.125, 128: 2.0}
    found = serving.excess(line)
    assert {power: values["max"] for power, values in found.items()} == pytest.approx(
        {"4": 1.0, "8": 0.273, "16": 0.0, "32": 0.0}
    )
    assert "64" not in found


def test_what_a_study_has_finished_is_not_done_again(tmp_path: Path):
    asked = {"arm": "small", "round": 0}
    with Finished(tmp_path / "journal") as finished:
        assert finished.get(asked) is None
        assert finished.result(asked, lambda: [1.5]) == [1.5]
    with open(tmp_path / "journal", "ab") as file:
        file.write(b"0000")  # killed while it wrote
    with Finished(tmp_path / "journal") as finished:
        assert finished.result({"round": 0, "arm": "small"}, lambda: [2.5]) == [1.5]
        assert finished.result({**asked, "round": 1}, lambda: [2.5]) == [2.5]
