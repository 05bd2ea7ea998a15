"""From a space to the chosen encoder through the command line: stopped, continued, refused, by many workers.

The machine that times encoders is a fake one (a function of the sizes); everything else is the real thing at toy size.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from frugalbert import run as files
from frugalbert import selection, stages
from frugalbert.config import Finetune, Machine, Search
from frugalbert.fanout import Journal
from frugalbert.finetune import runner
from frugalbert.measure import table
from frugalbert.model import slicing
from frugalbert.model.arch import Arch
from frugalbert.model.modeling import FrugalForMaskedLM
from frugalbert.space import Space
from frugalbert.train import inherited
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
space: {depth: [1, 2], hidden: [16, 32], heads: [1, 2], head_dim: 8, ffn: [16, 32, 48]}
supernet: {budget: 30steps, batch_size: 8, learning_rate: 5e-3, precision: fp32, validation: {rows: 16}}
latency: {architectures: 12, length: 16}
search: {limit: {latency_ms: 1.7}, evaluations: 12, population: 4, rows: 64}
pretrain: {arch: from search, start: from search, budget: 4steps, batch_size: 8, precision: fp32}
report: {}
"""
)
RESULTS = ("arch.json", "candidates.jsonl", "pareto.json", "search.json", "model/model.safetensors")
TOPIC = {"name": "topic", "train": "topic.csv"}
RECIPE = {"tasks": [TOPIC], "seeds": [0], "epochs": 1.0, "max_length": 16, "learning_rate": 1e-3, "precision": "fp32"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("selection"), YAML)


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """The finished run up to `latency`: search and what follows have not begun."""
    return copy_without_search(finished, tmp_path / "copy")


def arch_of(folder: Path) -> Arch:
    return Arch.from_json(files.read_json(run_of(folder) / "search" / "arch.json"))


def results(folder: Path) -> dict[str, bytes]:
    return {name: (run_of(folder) / "search" / name).read_bytes() for name in RESULTS}


# ---- what comes out --------------------------------------------------------------------------------------------------


def test_every_stage_runs_and_the_limit_is_kept(finished: Path):
    run = run_of(finished)
    names = [stage.name for stage in stages.STAGES if (run / stage.name / "stage.json").exists()]
    assert names == ["corpus", "tokenizer", "shards", "space", "supernet", "latency", "search", "pretrain", "report"]
    found = files.read_json(run / "search" / "search.json")
    assert found["evaluations"] == 12
    assert found["chosen"]["measured_ms"] == pytest.approx(milliseconds(Arch.parse(found["chosen"]["arch"])), abs=1e-4)
    assert found["chosen"]["measured_ms"] <= 1.7
    lines = [json.loads(line) for line in (run / "search" / "candidates.jsonl").read_text().splitlines()]
    assert len({line["arch"] for line in lines}) == 12
    assert found["chosen"]["score"] == min(line["score"] for line in lines)
    slow = [arch for arch in Space.from_json(files.read_json(run / "space" / "space.json")).enumerate()
            if milliseconds(arch) > 1.7]  # fmt: skip
    assert slow, "the limit leaves something out"


def test_the_written_model_is_the_slice(finished: Path):
    run = run_of(finished)
    arch = arch_of(finished)
    network = FrugalForMaskedLM.from_pretrained(run / "supernet" / "model")
    expected = dict(slicing.extract(network, arch).named_parameters())
    written = FrugalForMaskedLM.from_pretrained(run / "search" / "model")
    assert written.config.to_arch() == arch
    for name, weight in written.named_parameters():
        assert torch.equal(weight, expected.pop(name)), name
    assert not expected


def test_further_training_begins_where_the_slice_stands(finished: Path):
    """Its first validation is the held-out loss that the search has seen, on all held-out rows."""
    run = run_of(finished)
    lines = [json.loads(line) for line in (run / "pretrain" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["learning_rate"] == 0.0, "the first step of a warm-up from 0 changes nothing"
    first = next(line for line in lines if "validation_loss" in line)
    assert first["step"] == 1
    arch = files.read_json(run / "search" / "search.json")["chosen"]["arch"]
    assert first["validation_loss"] == pytest.approx(inherited.score(task_of(finished, arch, rows=10**6)), abs=1e-5)
    record = files.read_json(run / "pretrain" / "stage.json")
    assert record["inputs"]["search"] == files.read_json(run / "search" / "stage.json")["fingerprint"]


def task_of(folder: Path, arch: str, rows: int = 64) -> dict[str, Any]:
    places = {name: str(run_of(folder) / name) for name in ("supernet", "shards", "tokenizer")}
    fixed = {"yaml": str(folder), "quality": "loss", "device": "cpu", "threads": 0, "rows": rows}
    return {**places, **fixed, "arch": arch}


def test_a_super_network_built_anew_is_read_anew(copied: Path):
    """A worker that lives long must not score the slices of the one before."""
    task = task_of(copied, "bert 1x16 heads=1 head_dim=8 ffn=16")
    before = inherited.score(task)
    change_weights(copied, lambda weight: weight * 0.5)
    record = run_of(copied) / "supernet" / "stage.json"
    files.write_json(record, {**files.read_json(record), "fingerprint": "another"})
    assert inherited.score(task) != before


def change_weights(folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    path = run_of(folder) / "supernet" / "model" / "model.safetensors"
    save_file({name: change(weight) for name, weight in load_file(path).items()}, path, {"format": "pt"})


# ---- stopped and continued -------------------------------------------------------------------------------------------


def test_a_search_cut_off_anywhere_ends_the_same(finished: Path, copied: Path):
    """Killed: journals end anywhere, even inside a line; files that are written whole are there or not."""
    rng, out = random.Random(0), run_of(copied) / "search"
    for cut in ("journal.jsonl", "journal.jsonl", "journal.jsonl", "scores.jsonl", "measured.jsonl"):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(run_of(finished) / "search", out, ignore=lambda *_: ["stage.json", "search.json"])
        data = (out / cut).read_bytes()
        (out / cut).write_bytes(data[: rng.randrange(len(data))])
        for name in ("arch.json", "candidates.jsonl", "scores.jsonl"):
            if rng.random() < 0.5 and name != cut:
                (out / name).unlink()
        code, said = call(copied, "--only", "search")
        assert code == 0, said
        assert results(copied) == results(finished)


def test_a_stopped_search_continues_without_asking_twice(finished: Path, copied: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []
    real = inherited.score

    def score(task: dict[str, Any]) -> float | None:
        asked.append(task["arch"])
        if len(asked) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(task)

    monkeypatch.setattr(inherited, "score", score)
    code, said = call(copied, "--only", "search")
    assert code == 143
    assert "everything so far is kept" in said
    assert nothing_half_written(copied)
    code, said = call(copied, "--only", "search")
    assert code == 0, said
    assert len(asked) == len(set(asked)) == 12
    assert results(copied) == results(finished)
    assert "search: continuing" in said


# ---- the clock decides -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slow", [1, 2, 5])
def test_finalists_are_measured_and_the_best_that_keeps_the_limit_is_written(
    slow: int, finished: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
):
    """The `slow` best ones miss the limit on the clock; if all five do, the best is written and the report says so."""
    again = table.remeasure

    def remeasure(archs: list[Arch], *rest: Any) -> list[dict[str, Any]]:
        rows = again(archs, *rest)
        return [{**row, "median_ms": 4.0} if place < slow else row for place, row in enumerate(rows)]

    monkeypatch.setattr(table, "remeasure", remeasure)
    code, said = call(copied, "--only", "search")
    assert code == 0, said
    found = files.read_json(run_of(copied) / "search" / "search.json")
    assert [row["violates"] for row in found["finalists"]] == [place < slow for place in range(5)]
    assert found["violations"] == slow
    chosen = found["finalists"][slow if slow < 5 else 0]
    assert found["chosen"] == chosen
    assert str(arch_of(copied)) == chosen["arch"]
    assert FrugalForMaskedLM.from_pretrained(run_of(copied) / "search" / "model").config.arch == chosen["arch"]
    assert ("misses the limit" if slow < 5 else "every finalist misses") in said


# ---- many workers ----------------------------------------------------------------------------------------------------


def dying_score(task: dict[str, Any]) -> float | None:
    """Kills its process in the middle of the first trial that comes by."""
    mark = Path(task["yaml"]) / "died"
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return inherited.score(task)


def scores(folder: Path, out: Path, **machine: Any) -> list[float]:
    section = load(folder / "search.yaml").search
    assert section is not None
    inputs = {name: run_of(folder) / name for name in ("supernet", "shards", "tokenizer")} | {"yaml": folder}
    space = Space.from_json(files.read_json(run_of(folder) / "space" / "space.json"))
    settings = Machine.model_validate({"device": "cpu", "threads": 1, **machine})
    out.mkdir()
    return selection._score(section, inputs, out, settings)(list(space.enumerate())[:6])


def test_a_speed_up_is_over_the_largest_as_it_was_measured(copied: Path):
    """Whatever the predictor says of the largest, which lies in the corner of the space."""
    path = run_of(copied) / "latency" / "predictor.json"
    value = files.read_json(path)
    value["report"]["largest_ms"] = 123.0
    files.write_json(path, value)
    cost = selection._cost({name: run_of(copied) / name for name in ("tokenizer", "latency")})
    largest = Space.from_json(files.read_json(run_of(copied) / "space" / "space.json")).largest()
    assert cost(largest)["latency_ms"] == 123.0
    assert cost(Arch.parse("bert 1x16 heads=1 head_dim=8 ffn=16"))["latency_ms"] < 10.0


def test_two_workers_score_as_one(finished: Path, tmp_path: Path):
    alone = scores(finished, tmp_path / "one", workers=1)
    assert scores(finished, tmp_path / "two", workers=2) == alone
    assert len(set(alone)) == 6


def test_a_cluster_that_loses_a_worker_in_mid_trial_scores_the_same(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    distributed = pytest.importorskip("distributed", reason="the extra `cluster` is not installed")
    import dask

    alone = scores(finished, tmp_path / "one", workers=1)
    monkeypatch.setattr(inherited, "score", dying_score)
    settings = {"processes": True, "n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with (
        dask.config.set({"distributed.comm.timeouts.connect": "3s"}),
        distributed.LocalCluster(host="127.0.0.1", **settings) as cluster,
    ):
        found = scores(finished, tmp_path / "many", workers=1, scheduler=cluster.scheduler_address)
    (finished / "died").unlink()
    assert found == alone


# ---- quality by fine-tuning ------------------------------------------------------------------------------------------


def test_candidates_are_judged_by_fine_tuning_on_a_task_of_ones_own(copied: Path, tmp_path: Path):
    value = yaml.safe_load((copied / "search.yaml").read_text())
    value["search"] |= {"quality": "finetune", "finetune": RECIPE, "evaluations": 3}
    (copied / "search.yaml").write_text(yaml.safe_dump(value, sort_keys=False))
    code, said = call(copied, "--only", "search")
    assert code == 0, said
    out = run_of(copied) / "search"
    found = files.read_json(out / "search.json")
    assert not any((out / "trials").iterdir()), "a trial leaves nothing"
    inputs = {"yaml": copied, "pretrain": out, "tokenizer": run_of(copied) / "tokenizer"}
    section = Finetune.model_validate({**RECIPE, "random_baseline": False})
    (tmp_path / "alone").mkdir()
    runner.build(section, inputs, tmp_path / "alone", Machine(device="cpu", threads=1, micro_batch=8))
    accuracy = files.read_json(tmp_path / "alone" / "results.json")[0]["mean"]
    assert found["chosen"]["score"] == pytest.approx(1 - accuracy)
    (copied / "topic.csv").write_text((copied / "topic.csv").read_text() + '"one more river",river\n')
    assert "search input" in one_sentence_of_drift(*call(copied, "--only", "search"))


def one_sentence_of_drift(code: int, said: str) -> str:
    assert code == 2
    return said


# ---- refusals --------------------------------------------------------------------------------------------------------

SETTINGS = {
    "start from search, arch of one's own": (
        ["pretrain.arch=bert 1x16 heads=1 ffn=16"], "start: from search needs arch: from search as well"),
    "search without supernet": (["supernet=null"], "search needs the section supernet"),
    "latency limit without latency": (["latency=null"], "add latency: {}"),
    "speed-up limit without latency": (["latency=null", "search.limit={speedup: 2}"], "add latency: {}"),
    "pretrain from search without search": (["search=null"], "from search needs the section search"),
    "nothing can meet": (["search.limit.latency_ms=0.5", "--only", "search"], "nearest is bert 1x16 heads=1 "),
    "distillation loss without teacher": (["search.quality=distillation"], "trained without a teacher; write loss"),
    "loss of a distilled network": (["supernet.teacher=x"], "with a teacher; write distillation"),
    "fine-tuning without tasks": (["search.quality=finetune"], "write both or neither"),
    "no limit": (["search.limit={}"], "limit is empty; write for example"),
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_cannot_work_are_one_sentence(name: str, copied: Path):
    settings, message = SETTINGS[name]
    code, said = call(copied, *settings)
    assert code == 2, said
    assert message in said
    assert "Traceback" not in said
    assert nothing_half_written(copied)
    if name == "nothing can meet":
        assert "latency_ms 0." in one_sentence(code, said)
        assert "(limit at most 0.5)" in said


def other_device(folder: Path) -> None:
    path = run_of(folder) / "latency" / "predictor.json"
    value = files.read_json(path)
    value["setting"]["processor"] = "another processor"
    files.write_json(path, value)


def journal_of_another_space(folder: Path) -> None:
    code, said = call(folder, "--only", "search")
    assert code == 0, said
    out = run_of(folder) / "search"
    entry = Journal(out / "journal.jsonl").entries[0]
    entry["search"]["space"]["hidden"] = [16, 64]
    shutil.rmtree(out)
    with Journal(out / "journal.jsonl") as journal:
        journal.append(entry)


def cut_weights(folder: Path) -> None:
    path = run_of(folder) / "supernet" / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def no_weights(folder: Path) -> None:
    (run_of(folder) / "supernet" / "model" / "model.safetensors").unlink()


def fewer_weights(folder: Path) -> None:
    path = run_of(folder) / "supernet" / "model" / "model.safetensors"
    save_file(dict(list(load_file(path).items())[1:]), path, {"format": "pt"})


def no_settings(folder: Path) -> None:
    (run_of(folder) / "supernet" / "model" / "config.json").write_text("{")


def not_numbers(folder: Path) -> None:
    change_weights(folder, lambda weight: weight * float("nan"))


DAMAGES = {
    other_device: r"predictor.json was measured on another processor, this is .*; measure here",
    journal_of_another_space: r"journal.jsonl belongs to another search \(other space\); delete it to begin anew",
    cut_weights: r"supernet/model is damaged \(.*\); `--redo supernet` trains it again",
    no_weights: r"supernet/model is damaged \(.*\); `--redo supernet` trains it again",
    fewer_weights: r"supernet/model is damaged \(it has no weights .*\); `--redo supernet`",
    no_settings: r"supernet/model is damaged \(.*\); `--redo supernet` trains it again",
    not_numbers: r"none of 12 architectures has a finite score; train the super-network for longer",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_what_was_damaged_or_comes_from_elsewhere_is_one_sentence(damage: Callable[[Path], None], copied: Path):
    damage(copied)
    if damage is not journal_of_another_space:
        noticed = one_sentence(*call(copied, "--only", "search"))
        assert re.search(
            r"(supernet/model/|latency/predictor).* after (supernet|latency) was done; restore it", noticed
        )
    for path in run_of(copied).glob("*/stage.json"):  # as in runs of earlier releases: the stage itself must notice
        record = files.read_json(path)
        files.write_json(path, {key: record[key] for key in record if key not in ("outputs", "checksum")})
    sentence = one_sentence(*call(copied, "--only", "search"))
    assert re.search(DAMAGES[damage], sentence), sentence
    assert nothing_half_written(copied)


def test_a_super_network_that_was_kept_is_asked_for_its_teacher(finished: Path, tmp_path: Path):
    """`--keep supernet` may leave one that was trained otherwise than the YAML says now."""
    section = Search.model_validate({"limit": {"parameters": 1e6}, "quality": "distillation"})
    with pytest.raises(ValueError, match="search.quality distillation does not go with this super-network; write loss"):
        selection._score(section, {"supernet": run_of(finished) / "supernet"}, tmp_path, Machine())
