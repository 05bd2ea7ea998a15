"""`benchmarks/serving.py`: ratios within a round, excess over the staircase's line; what a stopped study knows."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from frugalbert import run
from frugalbert.measure import latency
from frugalbert.model.arch import Arch
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


def test_two_calls_do_not_write_one_journal(tmp_path: Path):
    with Finished(tmp_path / "journal") as finished:
        with pytest.raises(ValueError, match="journal is being written by another call"):
            Finished(tmp_path / "journal")
        finished.result({"round": 0}, lambda: [1.5])
    with Finished(tmp_path / "journal") as finished:
        assert finished.get({"round": 0}) == [1.5]


def staircase_of(out: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[dict[str, Any]]:
    """The tasks that `serving.py --only staircase` asks for; a call takes its size in ms, and more in later rounds."""
    asked: list[dict[str, Any]] = []

    def time_apart(task: dict[str, Any]):
        asked.append(task)
        if len(asked) == 3:
            raise ValueError("the machine is on fire")
        for text in task["archs"]:
            arch = Arch.parse(text)
            yield {"arch": text, "min_ms": float(arch.hidden + arch.layers[0].ffn + len(asked)), "median_ms": 1e6}

    monkeypatch.setattr(latency, "time_apart", time_apart)
    monkeypatch.setattr(sys, "argv", ["serving.py", "--only", "staircase", "--out", str(out), *arguments])
    monkeypatch.setattr(run, "catch_signals", lambda: None)
    try:
        serving.main()
    except SystemExit as end:
        assert end.code == 2
    return asked


def test_a_staircase_goes_on_and_takes_the_least(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert len(staircase_of(tmp_path, monkeypatch, "--rounds", "1")) == 3
    assert len((tmp_path / "staircase.jsonl").read_text().splitlines()) == 2
    assert not (tmp_path / "staircase.json").exists()
    staircase_of(tmp_path, monkeypatch, "--quick", "--rounds", "1")
    assert (tmp_path / "staircase.jsonl").exists(), "a short look leaves the journal alone"
    monkeypatch.setattr(serving, "draw", lambda result, path: None)
    for _ in range(7):  # with the first, two tasks each: 4 backends, 2 axes, 2 rounds
        staircase_of(tmp_path, monkeypatch, "--rounds", "1")
    assert not (tmp_path / "staircase.jsonl").exists()
    found = json.loads((tmp_path / "staircase.json").read_text())["backends"]
    assert found["fp32, PyTorch"]["hidden"]["least_ms"]["257"] == 257 + 1024 + 1
    assert set(found) == {"fp32, PyTorch", "bf16, PyTorch", "fp32, ONNX", "int8, ONNX"}
    assert found["int8, ONNX"]["ffn"]["excess"]["1"]["max"] == 0
