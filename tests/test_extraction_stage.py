"""Extraction through the command line at toy size: short trainings, no super-network; stopped, continued, refused."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from frugalbert import run as files
from frugalbert import selection
from frugalbert.config import Machine
from frugalbert.model.arch import Arch
from frugalbert.search import extraction
from frugalbert.space import Space
from frugalbert.train import short
from frugalbert.yamlfile import load
from tests.search_project import (
    HEAD,
    call,
    copy_without_search,
    finished_run,
    milliseconds,
    nothing_half_written,
    one_sentence,
    run_of,
)

YAML = (
    HEAD
    + """\
space: {depth: [1, 2], hidden: [16, 32], heads: [1, 2], head_dim: 8, ffn: [16, 32]}
search:
  method: extraction
  quality: training
  extraction: {interval: 2, maximum: bert 4x48 heads=4 ffn=64}
  training: {steps: 6, looks: 2, seeds: [0, 1], recipes: [{learning_rate: 0.5, batch_size: 8}, {optimizer: adamw,
    learning_rate: 5e-3, batch_size: 8}]}
  rows: 16
pretrain: {arch: from search, budget: 2steps, batch_size: 8, precision: fp32}
report: {}
"""
)
RESULTS = ("arch.json", "candidates.jsonl", "pareto.json", "search.json")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("extraction"), YAML)


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """The finished run up to `space`."""
    return copy_without_search(finished, tmp_path / "copy")


def results(folder: Path) -> dict[str, bytes]:
    return {name: (run_of(folder) / "search" / name).read_bytes() for name in RESULTS}


def found(folder: Path) -> dict[str, Any]:
    return files.read_json(run_of(folder) / "search" / "search.json")


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_of(folder) / "search" / "candidates.jsonl").read_text().splitlines()]


# ---- what comes out --------------------------------------------------------------------------------------------------


def test_an_untrained_architecture_comes_out_and_is_trained(finished: Path):
    out = run_of(finished) / "search"
    assert not (out / "model").exists()
    assert list((out / "trials").iterdir()) == []
    arch = Arch.from_json(files.read_json(out / "arch.json"))
    assert str(arch) == found(finished)["chosen"]["arch"] == found(finished)["extraction"]["ranking"][0]["arch"]
    assert files.read_json(run_of(finished) / "pretrain" / "summary.json")["arch"] == str(arch)
    assert "optimal" not in (finished / "said").read_text()
    assert "best of the visited ones under W" in (finished / "said").read_text()
    assert "adamw is outside the theory" in (finished / "said").read_text()


def test_the_files_say_what_was_done(finished: Path):
    told = found(finished)["extraction"]
    expected = {"maximum": "bert 4x48 heads=4 ffn=64", "interval": 2, "space": 16, "visited": 8, "rejected": 0}
    expected |= {"floored": 0, "inference": "flops"}
    assert {key: told[key] for key in expected} == expected
    best = max(rows(finished), key=lambda row: row["w"])
    saved = (told["maximum_parameters"] - best["parameters"]) / told["maximum_parameters"]
    saved *= (told["maximum_inference"] - best["flops"]) / told["maximum_inference"]
    assert best == told["ranking"][0]
    assert best["w"] == pytest.approx(saved / best["error"], rel=1e-3), "W is averaged over two seeds, errors too"
    assert best["w_std"] > 0
    assert {row["theta"] for row in rows(finished)} <= {0, 1}
    assert set(told["sensitivity"]) == {"maximum", "interval", "inference", "looks", "half_of_the_rows"}


def test_every_training_has_the_same_data(finished: Path):
    """2 recipes and 2 seeds for each of 8 architectures, once; tokens depend on recipe and seed alone."""
    entries = [json.loads(line.split(" ", 1)[1]) for line in (run_of(finished) / "search" / "scores.jsonl").open()]
    assert len(entries) == len({entry["key"] for entry in entries}) == 32
    tokens = [entry["result"]["tokens"] for entry in entries]
    assert [len(set(tokens[start : start + 8])) for start in range(0, 32, 8)] == [1] * 4


# ---- stopped and continued, by many ----------------------------------------------------------------------------------


def test_stopped_anywhere_it_ends_the_same_and_trains_nothing_twice(
    finished: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: list[str] = []
    real = short.score

    def score(task: dict[str, Any]) -> dict[str, Any] | None:
        asked.append(json.dumps([task["arch"], task["recipe"], task["seed"]]))
        if len(asked) in (7, 20):
            os.kill(os.getpid(), signal.SIGTERM)
        return real(task)

    monkeypatch.setattr(short, "score", score)
    for _ in range(2):
        code, said = call(copied, "--only", "search")
        assert code == 143, said
        assert nothing_half_written(copied)
    journal = run_of(copied) / "search" / "scores.jsonl"
    journal.write_bytes(journal.read_bytes()[:-10])  # killed while it wrote a line
    code, said = call(copied, "--only", "search")
    assert code == 0, said
    assert len(set(asked)) == 32
    assert len(asked) <= 32 + 3, "the torn line, and those in which the signals came"
    assert results(copied) == results(finished)


def test_two_workers_train_every_trial_once(finished: Path, tmp_path: Path):
    section = load(finished / "search.yaml").search
    assert section is not None
    inputs = {name: run_of(finished) / name for name in ("shards", "tokenizer")} | {"yaml": finished}
    machine = Machine.model_validate({"device": "cpu", "threads": 1, "workers": 2})
    archs = list(Space.from_json(files.read_json(run_of(finished) / "space" / "space.json")).enumerate())[:3]
    judged = selection._judge(section, inputs, tmp_path, machine)(archs)
    entries = [json.loads(line.split(" ", 1)[1]) for line in (tmp_path / "scores.jsonl").open()]
    assert len({entry["key"] for entry in entries}) == len(entries) == 12
    alone = Machine.model_validate({"device": "cpu", "threads": 1, "workers": 1})
    (tmp_path / "one").mkdir()
    assert selection._judge(section, inputs, tmp_path / "one", alone)(archs[:1]) == judged[:1]


# ---- other judges ----------------------------------------------------------------------------------------------------


def test_evolution_may_ask_short_trainings_too(copied: Path):
    code, said = call(copied, "--only", "search", "search.method=evolution", "search.extraction=null",
                      "search.limit.parameters=30000", "search.evaluations=4", "search.population=4")  # fmt: skip
    assert code == 2, "an extraction section without its method"
    text = (copied / "search.yaml").read_text().replace("extraction: {interval: 2, maximum: bert 4x48 heads=4 ffn=64}",
                                                        "limit: {parameters: 30000}")  # fmt: skip
    (copied / "search.yaml").write_text(text.replace("method: extraction", "method: evolution"))
    code, said = call(copied, "--only", "search", "search.evaluations=4", "search.population=4")
    assert code == 0, said
    assert found(copied)["evaluations"] == 4
    scores = {row["arch"]: row["score"] for row in rows(copied)}
    assert found(copied)["chosen"]["score"] == min(scores.values())


def test_the_inherited_loss_may_be_the_error(copied: Path):
    """Our extension: both families of search on the same space."""
    text = (copied / "search.yaml").read_text()
    head, tail = text.split("  quality: training\n")
    tail = tail.split("  rows: 16")[1]
    supernet = "supernet: {budget: 4steps, batch_size: 8, precision: fp32, validation: {rows: 16}}\nsearch:"
    head = head.replace("search:\n  method", f"{supernet}\n  method")
    (copied / "search.yaml").write_text(head + "  extraction: {interval: 3, representative: last}\n  rows: 16" + tail)
    for stage in ("supernet", "search"):
        code, said = call(copied, "--only", stage)
        assert code == 0, said
    told = found(copied)
    assert (run_of(copied) / "search" / "model" / "model.safetensors").exists()
    assert (told["extraction"]["visited"], told["extraction"]["space"]) == (6, 16)
    assert told["extraction"]["maximum"] == "bert 2x32 heads=2 head_dim=8 ffn=32"
    assert rows(copied)[-1]["w"] == 0.0, "the maximum point itself"
    assert "looks" not in told["extraction"]["sensitivity"]


def test_latency_as_cost_times_a_maximum_point_that_the_predictor_does_not_know(copied: Path):
    text = (
        (copied / "search.yaml")
        .read_text()
        .replace("search:\n  method", "latency: {architectures: 12, length: 16}\nsearch:\n  method")
    )
    (copied / "search.yaml").write_text(text.replace("{interval: 2,", "{interval: 2, inference: latency,"))
    for stage in ("latency", "search"):
        code, said = call(copied, "--only", stage)
        assert code == 0, said
    told, top = found(copied)["extraction"], Arch.parse("bert 4x48 heads=4 ffn=64")
    assert told["inference"] == "latency_ms"
    assert "extrapolated" not in said
    assert told["maximum_inference"] == pytest.approx(milliseconds(top), abs=1e-4), "measured, not predicted"
    assert set(told["sensitivity"]["inference"]) == {"flops"}
    chosen = found(copied)["chosen"]
    assert chosen["measured_ms"] == pytest.approx(milliseconds(Arch.parse(chosen["arch"])), abs=1e-4)
    assert len(found(copied)["finalists"]) == 5


# ---- refusals --------------------------------------------------------------------------------------------------------

MAXIMUM = "search.extraction.maximum=bert 4x48 heads=4 ffn=64"
SETTINGS = {
    "interval": (["search.extraction.interval=17"], "interval 17 is more than the 16 architectures"),
    "limits": (["search.limit={parameters: 10}"], "no architecture of the space is within search.limit"),
    "mixed": ([], "space.mixed makes endless; remove mixed"),
    "small maximum": (["search.extraction.maximum=bert 1x8 heads=1 ffn=8"], "beyond the maximum point bert 1x8"),
    "no architecture": (["search.extraction.maximum=bort9"], "is no architecture"),
    "latency": (["search.extraction.inference=latency"], "needs the section latency; add latency: {}"),
    "evaluations": (["search.evaluations=5"], "evaluations does not go with method: extraction"),
    "budget": (["search.budget=1h"], "budget does not go with method: extraction"),
    "weights": (["pretrain.start=from search"], "gives an architecture without weights; remove pretrain.start"),
    "looks": (["search.training.looks=9"], "looks 9 is more than steps 6"),
    "recipes": (["search.training.recipes=[]"], "recipes"),
    "optimizer": (["search.training.recipes=[{optimizer: sdg, learning_rate: 1}]"], "sgd"),
    "training without quality": (["search.quality=loss"], "belong together; write both or neither"),
    "method": (["search.method=evolution", "search.limit={parameters: 1e9}"], "extraction belongs to method"),
    "diverged": (["search.training.recipes=[{learning_rate: 1e30}]"], "none of 8 architectures has a finite error"),
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_cannot_work_are_one_sentence(name: str, copied: Path):
    settings, message = SETTINGS[name]
    if name == "mixed":
        path = run_of(copied) / "space" / "space.json"
        files.write_json(path, {**files.read_json(path), "mixed": True})
    code, said = call(copied, "--only", "search", *settings)
    assert message in said, said
    assert code == 2, said
    if "error: " in said:
        one_sentence(code, said)
    assert nothing_half_written(copied)


def test_no_dominating_member_names_the_two_that_conflict(copied: Path, monkeypatch: pytest.MonkeyPatch):
    def opposed(inputs: dict[str, Path]) -> Any:
        return lambda arch: {"parameters": arch.hidden + len(arch.layers), "flops": 100.0 / arch.hidden}

    monkeypatch.setattr(selection, "_cost", opposed)
    text = (copied / "search.yaml").read_text().replace(", maximum: bert 4x48 heads=4 ffn=64", "")
    (copied / "search.yaml").write_text(text)
    sentence = one_sentence(*call(copied, "--only", "search"))
    assert "largest in both parameters (bert 2x32" in sentence
    assert "and flops (bert 2x16" in sentence
    assert "write search.extraction.maximum" in sentence
    assert extraction.INFERENCE["flops"] == "flops"
