"""The race of benchmarks/time_to_loss.py and the recipes of gpu_30min.sh: what each arm is, how it is measured, and
that what is finished is never done again."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from frugalbert.config import Pretrain
from frugalbert.model.arch import Arch
from frugalbert.model.configuration import FrugalConfig
from frugalbert.model.cost import matmul_parameters
from frugalbert.model.interop import to_stock
from frugalbert.model.modeling import FrugalForMaskedLM
from frugalbert.run import fingerprint
from frugalbert.yamlfile import load
from tests.structure import ROOT
from tests.train.small_run import prepare

BENCHMARKS = ROOT / "benchmarks"
ARCH = "bert 1x32 heads=2 ffn=48 max_length=64"


@pytest.fixture(scope="module")
def race():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import time_to_loss

        yield time_to_loss


@pytest.fixture(scope="module")
def arm(race):
    return sys.modules["time_to_loss_arm"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    prepare(folder)
    return folder


# ---- the arms --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_arm_is_a_recipe_and_all_differ(race, device: str):
    arms = race.ours(device)
    sections = {name: Pretrain.model_validate({**values, "budget": "20m"}) for name, values in arms.items()}
    assert len({section.model_dump_json() for section in sections.values()}) == len(arms)
    parts = {name: values for name, values in arms.items() if name.startswith("ours")}
    changed = {name: {key for key in {*values, *arms["ours"]} if values.get(key) != arms["ours"].get(key)}
               for name, values in parts.items()}  # fmt: skip
    assert changed["ours"] == set()
    assert changed["ours-masks"] == {"mask"}
    assert changed["ours-muon"] == {"optimizer", "learning_rate"}
    assert changed["ours+lengths"] == {"phases", "batch_size"}
    single = {name: keys for name, keys in changed.items() if "small-batch" not in name and "weight-decay" not in name}
    assert all(1 <= len(keys) <= 2 for name, keys in single.items() if name != "ours")
    small, heavy = "ours+small-batch", "ours+weight-decay"
    for name, more in (("-isolation", "isolate_documents"), ("+many-masks", "mask")):
        assert arms[small + name] == {**arms["ours" + name], "batch_size": arms[small]["batch_size"]}
        assert changed[small + name] == {"batch_size", more}
    for name in ("-muon", "+large-batch", "+small-batch+lengths"):
        assert arms[heavy + name] == {**arms["ours" + name], "weight_decay": 0.1}
    tokens = [values["batch_size"] * (64 if "phases" in values else 128) for values in
              (arms["ours+lengths"], arms["ours"], arms[f"{small}+lengths"], arms[small])]  # fmt: skip
    assert tokens[0] == tokens[1] == 2 * tokens[2] == 2 * tokens[3]
    both = arms[f"{small}+lengths+many-masks"]
    assert both == {**arms[f"{small}+lengths"], "mask": arms["ours+many-masks"]["mask"]}
    sizes = [matmul_parameters(Arch.parse(text)) for text in
             (arms["ours"]["arch"], arms["24hbert"]["arch"], race.trainers(device)["run_mlm"]["arch"])]  # fmt: skip
    assert max(sizes) < 1.06 * min(sizes)


def test_an_arm_is_set_beside_the_one_it_changes(race):
    arms = ["24hbert", "run_mlm", "run_mlm-best", "ours", "ours-muon", "ours+a", "ours+a-muon", "ours+ab"]
    assert [race.changed(name, arms) for name in arms] == [*["ours"] * 3, "", "ours", "ours", "ours+a", "ours"]


def test_24hbert_has_the_values_of_its_config(race):
    published = load(ROOT / "configs" / "academic-24h.yaml").pretrain
    assert published is not None
    mine = Pretrain.model_validate({**race.ours("cpu")["24hbert"], "budget": "24h"})
    same = "optimizer learning_rate betas epsilon weight_decay clip_norm warmup curve dropout mask objective".split()
    assert [getattr(mine, name) for name in same] == [getattr(published, name) for name in same]
    assert Arch.parse(mine.arch).family == Arch.parse(published.arch).family


def test_run_mlm_is_as_documented(race, arm, tmp_path: Path):
    task = {"trainer": race.trainers("cpu")["run_mlm"], "device": "cpu", "seed": 1, "minutes": 1.0}
    found = arm.arguments(task, tmp_path)
    from transformers import TrainingArguments

    default = TrainingArguments(str(tmp_path))
    chosen = "learning_rate lr_scheduler_type per_device_train_batch_size optim warmup_steps weight_decay max_grad_norm"
    chosen += " num_train_epochs max_steps bf16 torch_compile remove_unused_columns adam_beta2 save_strategy save_steps"
    for name in chosen.split():
        assert getattr(found, name) == getattr(default, name), name
    best = arm.arguments(
        {**task, "trainer": race.trainers("cpu")[race.BEST], "speed": {"steps_in_time": 100.7}}, tmp_path
    )
    assert (best.max_steps, best.warmup_steps, best.save_strategy) == (100, 6, "no")


# ---- one arm ---------------------------------------------------------------------------------------------------------


def test_one_function_measures_ours_and_stock(arm, data: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(arm, "LENGTH", 32)
    from frugalbert.data import tokenizer
    from frugalbert.data.masking import Vocabulary

    names = tokenizer.load(data / "tokenizer")
    known = Vocabulary.from_tokenizer(names)
    torch.manual_seed(0)
    model = FrugalForMaskedLM(FrugalConfig.from_arch(Arch.parse(ARCH), known.size, known.pad, 0.0)).eval()
    model.save_pretrained(tmp_path / "ours")
    to_stock(model).save_pretrained(tmp_path / "stock")
    named = {"data": str(data)}
    whole = {**named, "pretrain": {"isolate_documents": False}}
    cpu = torch.device("cpu")
    ours, stock = (arm.held_out(tmp_path / name, task, cpu, 64) for name, task in
                   (("ours", whole), ("stock", {**named, "trainer": {}})))  # fmt: skip
    assert ours["loss"] == pytest.approx(stock["loss"], abs=1e-5)
    alone = arm.held_out(tmp_path / "ours", {**named, "pretrain": {}}, cpu, 64)
    assert alone["loss"] != pytest.approx(ours["loss"], abs=1e-5)  # packed rows: the others of a row are hidden


def test_the_trainers_schedule_ends_with_its_steps(race, arm, data: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(arm, "LENGTH", 32)
    told = race.trainers("cpu")[race.BEST] | {"arch": ARCH, "length": 32, "batch_size": 4, "learning_rate": 1e-2}
    task = {"arm": race.BEST, "seed": 0, "minutes": 10.0, "device": "cpu", "data": str(data), "trainer": told}
    task["speed"] = {"steps_in_time": 12.3, "closing": 0.1}
    started = time.time()
    found = arm.with_trainer(task, tmp_path, started)
    assert (found["steps"], found["tokens"]) == (12, 12 * 4 * 32)
    assert found["rate_left"] == 0.0
    found = arm.measured(task, tmp_path, started)
    assert found["loss"] < 10.0
    assert found["curve"][-1][0] == pytest.approx(found["seconds"] / 60, abs=2e-4)
    over = {**task, "minutes": 0.0, "speed": {"steps_in_time": 50, "closing": 0.0}}
    assert arm.with_trainer(over, tmp_path / "over", started)["steps"] == 1  # ended by the clock


def test_padding_is_no_training_row(arm, data: Path):
    from frugalbert.data.rows import ShardSet

    found, rows = ShardSet.open(data / "shards", 32, "train"), arm.full_rows(data / "shards", 32)
    pad = found.special["pad"]
    assert len(rows) == int((found.ids != pad).all(1).sum())
    item = rows[0]
    assert item["special_tokens_mask"][0] == 1
    assert sum(item["special_tokens_mask"]) == sum(number in found.special["all"] for number in item["input_ids"])


def test_ours_is_the_stage_with_what_is_left_of_the_clock(arm, data: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(arm, "LENGTH", 32)
    asked = {}

    def build(section: Pretrain, inputs: dict[str, Path], out: Path, machine: Any) -> None:
        asked["section"] = section
        names = "tokens steps tokens_per_second cost_seconds precision micro_batch compile"
        (out / "summary.json").write_text(json.dumps(dict.fromkeys(names.split())))

    monkeypatch.setattr("frugalbert.train.pretrain.build", build)
    recipe = {"arch": ARCH, "checkpoints": {"average": 3}}
    task = {"arm": "ours", "seed": 5, "minutes": 1.0, "device": "cpu", "data": str(data), "pretrain": recipe}
    arm.with_ours(task, tmp_path, time.time() - 20.0)
    section = asked["section"]
    assert 30.0 < section.budget.amount <= 39.0
    assert (section.seed, section.checkpoints.average, section.checkpoints.markers) == (5, 3, arm.MARKERS)


# ---- the study -------------------------------------------------------------------------------------------------------


def options(work: Path, **values: Any) -> argparse.Namespace:
    told = {"work": work, "minutes": 20.0, "seeds": 2, "arms": ["run_mlm-best", "ours"], "trial_share": 0.1}
    return argparse.Namespace(
        **{**told, "device": "cpu", "report": False, "machine": None, "downstream": False, **values}
    )


def pretend(calls: list[dict[str, Any]]) -> Any:
    """Runs whose loss is known: 5.0 at the best rate and batch, less for ours."""

    def done(task: dict[str, Any], folder: Path, data: Path) -> dict[str, Any]:
        calls.append(task)
        if task.get("probe"):
            return {"steps_in_time": 900 if task["trainer"]["compile"] else 1000}
        told = task.get("trainer")
        loss = 4.0 if told is None else 5.0 + abs(told["learning_rate"] - 2e-3) + abs(told["batch_size"] - 8)
        loss += 0.01 * task["seed"]
        return {"loss": loss, "tokens": 10**6, "steps": 100, "seconds": 1199.0, "curve": [[1.0, 6.0], [20.0, loss]]}

    return done


def test_a_study_that_was_interrupted_goes_on(race, tmp_path: Path, monkeypatch):
    calls: list[dict[str, Any]] = []
    work = pretend(calls)

    def dies(task: dict[str, Any], folder: Path, data: Path) -> dict[str, Any]:
        if len(calls) == 8:
            raise ValueError("the machine went down")
        return work(task, folder, data)

    def go(**values: Any) -> dict[str, Any]:
        with race.Finished(tmp_path / "journal.jsonl") as finished:
            told = options(tmp_path, **values)
            return race.study(told, race.Study(told, finished))

    monkeypatch.setattr(race, "done", dies)
    with pytest.raises(ValueError, match="went down"):
        go()
    monkeypatch.setattr(race, "done", work)
    assert go(report=True)["arms"] == {}  # its settings are not chosen yet, and nothing is run
    assert len(calls) == 8
    found = go()
    assert len(calls) == len({fingerprint(task) for task in calls}) == 7 + 2 + 4  # trials, probes, two arms twice
    settings = found["arms"]["run_mlm-best"]["settings"]
    assert (settings["learning_rate"], settings["batch_size"], settings["compile"]) == (2e-3, 8, False)
    assert go(report=True) == go() == found
    assert len(calls) == 13
    minus = found["arms"]["run_mlm-best"]["minus"]
    assert minus == {"arm": "ours", "mean": 1.0, "low": 1.0, "high": 1.0}  # paired: the seeds' own part is gone
    assert found["arms"]["ours"]["loss"]["mean"] == 4.005
    lines = race.race(found).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:4]] == ["ours", "run_mlm-best"]
    assert "+1.000 [+1.000, +1.000]" in lines[3]
    race.plot(found, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_a_report_of_nothing_writes_nothing(race, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(race, "done", pretend([]))
    out, journal = tmp_path / "out.json", tmp_path / "journal.jsonl"
    with race.Finished(journal) as finished:
        told = options(tmp_path, arms=["ours"], seeds=1)
        race.study(told, race.Study(told, finished))
    here = race.dist.processor_name()
    command = ["time_to_loss.py", "--work", tmp_path, "--journal", journal, "--report", "--arms", "ours", "--out", out]
    for machine, status in (("another", 2), (here, 0)):
        monkeypatch.setattr(sys, "argv", [*map(str, command), "--machine", machine])
        if status:
            with pytest.raises(SystemExit, match="2"):
                race.main()
            assert f"no such run of another; --machine: {here}" in capsys.readouterr().err
            assert not out.exists()
        else:
            race.main()
            assert json.loads(out.read_text())["environment"]["cpu"] == here


def test_a_changed_arm_is_run_again(race, tmp_path: Path, monkeypatch):
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(race, "done", pretend(calls))
    for minutes in (20.0, 20.0, 10.0):
        with race.Finished(tmp_path / "journal.jsonl") as finished:
            study = race.Study(options(tmp_path, minutes=minutes, arms=["ours"], seeds=1), finished)
            assert [study.result(task)["loss"] for task in study.tasks()] == [4.0]
    assert [task["minutes"] for task in calls] == [20.0, 10.0]


def test_an_arm_that_fails_says_where(race, tmp_path: Path, monkeypatch):
    (tmp_path / "arm.py").write_text("raise SystemExit('there is no memory left')")
    monkeypatch.setattr(race, "ARM", tmp_path / "arm.py")
    with pytest.raises(ValueError, match=r"run_mlm failed: there is no memory left \(see .*log\.txt\)"):
        race.spawn({"arm": "run_mlm", "probe": True}, tmp_path / "arm")


# ---- the half hour on a GPU ------------------------------------------------------------------------------------------


def test_gpu_recipes():
    """85 M matrix parameters, and 38 M with replaced-token detection, from the same rows in half an hour."""
    mlm, rtd = (load(BENCHMARKS / f"gpu_{name}.yaml") for name in ("mlm_85m", "rtd_38m"))
    assert mlm.pretrain is not None
    assert rtd.pretrain is not None
    for config in (mlm, rtd):
        assert str(config.pretrain.budget) == "30m"
    assert [mlm.corpus, mlm.tokenizer, mlm.shards] == [rtd.corpus, rtd.tokenizer, rtd.shards]
    assert matmul_parameters(Arch.parse(mlm.pretrain.arch)) == pytest.approx(85e6, rel=0.01)
    assert matmul_parameters(Arch.parse(rtd.pretrain.arch)) == pytest.approx(38e6, rel=0.02)
    assert rtd.pretrain.objective == "rtd"


FAKE = """#!/bin/sh
case "$2" in frugalbert.cli) echo "$@" >> "$LOG"; [ -z "$CODE" ] || exit $CODE ;; *) cat > /dev/null; echo table ;; esac
for word in "$@"; do
  case "$last" in --dir) place=$word ;; --only) mkdir -p $place/$word; echo {} > $place/$word/stage.json ;; esac
  last=$word
done
"""


def script(folder: Path, **values: str) -> tuple[int, str, list[str]]:
    """gpu_30min.sh with a program that only notes what it was called with: status, output, calls."""
    (folder / "fake").write_text(FAKE)
    (folder / "fake").chmod(0o755)
    log = folder / "log"
    log.write_text("")
    known = {"PATH": "/usr/bin:/bin", "PYTHON": str(folder / "fake"), "LOG": str(log), "WORK": str(folder / "work")}
    command = ["bash", str(BENCHMARKS / "gpu_30min.sh")]
    found = subprocess.run(command, env=known | values, capture_output=True, text=True, check=False)
    return found.returncode, found.stdout + found.stderr, log.read_text().splitlines()


def test_the_script_makes_rows_once_and_goes_on(tmp_path: Path):
    status, said, calls = script(tmp_path, TASKS="rte sst2", SCALE="100", PIECE="540")
    assert (status, said.strip()) == (0, "table")
    assert [word for call in calls for word in ("corpus", "tokenizer", "shards") if f"--only {word}" in call] == [
        "corpus", "tokenizer", "shards"
    ]  # fmt: skip
    assert "tokenizer.vocab_size=2048" in calls[0]
    mlm, rtd = calls[3:]
    assert "gpu_mlm_85m.yaml" in mlm
    assert "finetune.tasks=[rte, sst2, blimp]" in mlm
    assert "finetune.tasks=[rte, sst2]" in rtd
    assert all("pretrain.budget=18s" in call and "--keep shards" in call for call in (mlm, rtd))
    assert (tmp_path / "work" / "mlm_85m" / "shards" / "stage.json").is_symlink()
    status, said, calls = script(tmp_path, ARMS="rtd_38m", SHARDS=str(tmp_path / "work" / "rows"))
    assert [call.split()[3] for call in calls] == ["benchmarks/gpu_rtd_38m.yaml"]  # the rows are there
    assert "pretrain.budget" not in calls[0]


def test_a_piece_that_is_over_is_no_failure(tmp_path: Path):
    assert script(tmp_path, ARMS="", PIECE="540")[0] == 0
    status, said, calls = script(tmp_path, PIECE="540", CODE="124")  # as `timeout` says it
    assert (status, len(calls)) == (75, 1)
    assert "call the same command again" in said
    status, _, calls = script(tmp_path, PIECE="540", CODE="2")
    assert (status, len(calls)) == (2, 1)


@pytest.mark.slow
def test_the_rehearsal(tmp_path: Path, shared_data: Path):
    """Text, rows, both trainings in pieces, fine-tuning and the table, at a thousandth of the time."""
    source = f"[{{path: {shared_data / 'enwiki2015-AA.txt.xz'}, max_documents: 100}}]"
    values = {"PYTHON": sys.executable, "TEXT": source, "TASKS": "rte", "SCALE": "1000", "DATA": str(shared_data)}
    status, said, _ = script(tmp_path, **values)
    assert status == 0, said[-2000:]
    table = [line for line in said.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in table] == ["arm", "---", "mlm_85m", "rtd_38m"]
    status, again, _ = script(tmp_path, **values)
    assert (status, [line for line in again.splitlines() if line.startswith("|")]) == (0, table)
