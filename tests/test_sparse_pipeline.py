"""Learned masks through the command line at toy size: searched, looked at, trained on, exported, told."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from frugalbert import run as files
from frugalbert.cli import app
from frugalbert.model.arch import Arch
from frugalbert.model.patterns import dense, parse
from frugalbert.rehearsal import rehearsal
from frugalbert.yamlfile import load
from tests.search_project import HEAD, finished_run, run_of

YAML = (
    HEAD
    + """\
attention: {arch: modern 2x16 heads=2 ffn=32 max_length=32, budget: 6steps, batch_size: 8, density: 0.2,
  precision: fp32, validation: {rows: 16}}
importance: {arch: modern 2x16 heads=2 ffn=32 max_length=32, budget: 4steps, batch_size: 8, precision: fp32,
  validation: {rows: 16}, study: {steps: 2, looks: 1, recipes: {learning_rate: 0.1, batch_size: 8}}, controls: 1}
pretrain: {arch: from attention, start: from attention, budget: 4steps, batch_size: 8, precision: fp32,
  validation: {rows: 16}}
export: {formats: [hf, onnx]}
bench: {lengths: [16], batch_sizes: [1], repeats: 2, baseline: none}
report: {}
"""
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("sparse"), YAML)


def test_the_masks_are_those_that_are_trained_exported_and_loaded(finished: Path):
    run = run_of(finished)
    arch = Arch.from_json(files.read_json(run / "attention" / "arch.json"))
    assert any(layer.pattern != "dense" for layer in arch.layers)
    assert files.read_json(run / "pretrain" / "summary.json")["arch"] == str(arch)
    export = files.read_json(run / "export" / "export.json")
    assert export["arch"] == str(arch)
    assert export["formats"]["hf"]["stock"] is False
    assert "dense attention and windows only" in export["formats"]["hf"]["why_not_stock"]
    assert export["formats"]["onnx"]["max_abs_difference"] < 1e-5
    from transformers import AutoModelForMaskedLM

    model = AutoModelForMaskedLM.from_pretrained(run / "export" / "hf", trust_remote_code=True).eval()
    assert model.config.arch == str(arch)
    ids = torch.arange(5, 37)[None]
    other = ids.clone()
    other[0, 20] = 50
    states = [model.model(one, output_hidden_states=True).hidden_states[1] for one in (ids, other)]
    moved = (states[0] != states[1]).any(-1)[0].numpy()
    seen = np.any([dense(head, 32)[:, 20] for head in parse(arch.layers[0].pattern)], 0)
    seen[20] = True
    assert 3 < seen.sum() < 30
    np.testing.assert_array_equal(moved, seen)


def test_card_bench_and_report_know_them(finished: Path):
    run = run_of(finished)
    card = (run / "export" / "hf" / "README.md").read_text()
    assert "| attention | learnt masks (toeplitz): " in card
    assert "Training went on from the weights that learnt them." in card
    rows = [json.loads(line) for line in (run / "bench" / "latency.jsonl").read_text().splitlines()]
    assert {row["kind"] for row in rows} == {"torch", "onnx"}
    page = (run / "report" / "report.html").read_text()
    for words in (
        "Probability of every pair", "Pairs that are kept", "Importance of every pair", "One seed shows nothing",
        "no speed-up is to be expected", "With and without the diagonal",
    ):  # fmt: skip
        assert words in page, words


def test_the_plan_knows_what_was_found(finished: Path):
    def plan(*words: str) -> str:
        result = CliRunner().invoke(app, ["plan", str(finished / "search.yaml"), *words])
        assert result.exit_code == 0, result.output
        return " ".join(result.output.replace("│", " ").split())

    done = plan("--dir", str(run_of(finished)))
    assert "drifted" not in done
    assert "unfinished" not in done
    assert "known when the stage has run" in plan("--dir", str(finished / "elsewhere"))


def test_a_rehearsal_makes_them_small(finished: Path):
    small = rehearsal(load(finished / "search.yaml", []))
    assert small.importance is not None
    assert small.importance.study is not None
    assert (small.importance.study.steps, small.importance.study.looks, small.importance.controls) == (2, 1, 1)
    assert str(small.importance.budget) == "20steps"
    many = rehearsal(load(finished / "search.yaml", ["importance.controls=7"]))
    assert many.importance is not None
    assert many.importance.controls == 2
