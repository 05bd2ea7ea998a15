"""Agora in the stage `finetune`: rows beside `pretrained`, the same from several processes, nothing done twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from frugalbert import config, plan, run, stages
from frugalbert.finetune import agora_trials, runner
from tests.finetune.test_agora_trials import folder, section

__all__ = ["folder"]  # a fixture


def build(folder: Path, tiny: Path, out: Path, workers: int = 1, **changes: Any) -> list[dict[str, Any]]:
    out.mkdir(exist_ok=True)
    given = section(tiny, seeds=[0], random_baseline=False, epochs=1.0, **changes)
    runner.build(given, {"yaml": folder}, out, config.Machine(device="cpu", threads=1, workers=workers))
    return run.read_json(out / "results.json")


def plain(row: dict[str, Any]) -> str:
    text = json.loads(json.dumps(row))
    for one in text["agora"]["runs"]:
        for entry in one["rounds"]:
            del entry["seconds"]
    return json.dumps(text, sort_keys=True)


def test_beside_the_pretrained_row(folder: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    small = {"max_rounds": 1, "settings": {"learning_rate": [3e-3, 1e-2]}}
    first, row = build(folder, tiny, tmp_path / "one", agora=small)
    assert [first["init"], row["init"]] == ["pretrained", "agora"]
    assert row["trials"] == row["agora"]["runs"][0]["trainings"] == 2
    assert row["values"][0] is not None
    assert row["dev_examples"] == first["dev_examples"]
    two = build(folder, tiny, tmp_path / "two", workers=2, agora=small)
    assert plain(two[1]) == plain(row)
    monkeypatch.setattr(agora_trials, "student", None)
    shutil.rmtree(tmp_path / "one" / "agora" / "not" / "model")  # its last trial is done again, students are not
    assert plain(build(folder, tiny, tmp_path / "one", agora=small)[1]) == plain(row)


def test_the_plain_trials_do_not_depend_on_it(folder: Path, tiny: Path, tmp_path: Path):
    before, _ = build(folder, tiny, tmp_path, agora={"max_rounds": 1, "settings": {"learning_rate": [1e-2]}})
    result = next(tmp_path.glob("not/pretrained-seed0/result.json"))
    stamp = result.stat().st_mtime_ns
    limited = {"max_rounds": 1, "settings": {"learning_rate": [3e-3]}}
    after, row = build(folder, tiny, tmp_path, agora=limited)
    assert result.stat().st_mtime_ns == stamp
    assert after["values"] == before["values"]
    assert row["trials"] == 1


def test_refused_before_any_training(folder: Path, tiny: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="write select: train"):
        build(folder, tiny, tmp_path, select="none")
    assert not list(tmp_path.glob("not/*"))


def test_its_files_belong_to_the_stage(tiny: Path):
    stage = next(stage for stage in stages.STAGES if stage.name == "finetune")
    given = section(tiny, agora={"transforms": ["dropout", "mine.py:tau"], "transform_model": "lm"})
    assert {"teacher", "mine.py", "lm", "train.csv"} <= set(stage.outside(given))


def test_plan_says_so(tiny: Path):
    value = {"name": "x", "finetune": section(tiny).model_dump(mode="json")}
    told = plan._finetune(config.Config.model_validate(value, strict=False), Path(), {})
    assert told.endswith("; then rounds of Agora with 4 settings, 2 seeds")
    bort = section(tiny, agora={"settings": {"preset": "bort"}}).model_dump(mode="json")
    told = plan._finetune(config.Config.model_validate({"name": "x", "finetune": bort}, strict=False), Path(), {})
    assert "Agora with all settings of bort" in told
