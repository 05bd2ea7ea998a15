"""Agora with real trials on a tiny encoder: a teacher heard by name, the best student again, going on after a kill."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from frugalbert import config, run
from frugalbert.fanout import run_tasks
from frugalbert.finetune import agora_trials, examples, models, results, runner, trial
from frugalbert.finetune.tasks import Example
from tests.finetune.conftest import sentences

LABELS = ("no", "yes")


def write_task(place: Path, tiny: Path) -> None:
    """A task (is there a `not`? every seventh label is wrong) and a teacher whose classes stand in another order."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    for name, seed, count in (("train", 5, 90), ("dev", 6, 40)):
        texts = dict.fromkeys(sentences(count, seed))
        lines = [f"{text},{LABELS[('not' in text.split()) ^ (place % 7 == 0)]}" for place, text in enumerate(texts)]
        (place / f"{name}.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    settings = AutoConfig.from_pretrained(tiny, id2label={0: "yes", 1: "no"}, label2id={"yes": 0, "no": 1})
    AutoModelForSequenceClassification.from_config(settings).save_pretrained(place / "teacher")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(place / "teacher")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    place = tmp_path_factory.mktemp("agora")
    write_task(place, tiny)
    return place


def section(tiny: Path, **changes: Any) -> config.Finetune:
    agora = {"teacher": "teacher", "weak_teacher": True, "transforms": ["dropout", "swap"], "per_mistake": 1}
    agora["settings"] = {"learning_rate": [3e-3, 1e-2], "epochs": [1, 5]}
    task = {"name": "not", "train": "train.csv", "dev": "dev.csv"}
    base = {"tasks": [task], "model": str(tiny), "batch_size": 8, "max_length": 32, "dropout": 0.0, "seeds": [3, 4]}
    base |= {"select": "train", "select_share": 0.3, "agora": {**agora, **changes.pop("agora", {})}}
    return config.Finetune.model_validate({**base, **changes}, strict=False)


def open_job(settings: config.Finetune, folder: Path, tiny: Path) -> trial.Job:
    (data,) = examples.load_all(settings, folder, None)
    agora_trials.check(settings, [data])
    return runner.make_job(data, settings, models.open_source(str(tiny), None), config.Machine(device="cpu"))


def students_of(job: trial.Job, most: int = 99) -> tuple[agora_trials.Students, list[dict[str, Any]]]:
    """Students in this process, noted; a signal arrives before number `most`."""
    done: list[dict[str, Any]] = []

    def student(task: dict[str, Any]) -> Any:
        if len(done) == most:
            raise run.Stopped(15)
        done.append(task)
        return agora_trials.student(task, job)

    return lambda tasks, journal: run_tasks(student, tasks, journal=journal, workers=1), done


def build(job: trial.Job, folder: Path, out: Path, students: agora_trials.Students) -> Any:
    return agora_trials.build(job, {"inputs": {"yaml": str(folder)}}, out, students)


def same(found: Any) -> str:
    """Without clocks and places."""
    results_, about = json.loads(json.dumps(found))
    for result in results_:
        del result["seconds"], result["folder"]
    for one in about["runs"]:
        for entry in one["rounds"]:
            del entry["seconds"]
    return json.dumps([results_, about])


def test_the_best_student_is_reported(folder: Path, tiny: Path, tmp_path: Path):
    job = open_job(section(tiny), folder, tiny)
    students, done = students_of(job)
    found, about = build(job, folder, tmp_path, students)
    assert [result["seed"] for result in found] == [3, 4]
    assert sum(one["trainings"] for one in about["runs"]) == len(done)
    for result, one in zip(found, about["runs"], strict=True):
        assert result["setting"] == one["best"]["setting"]
        assert 0.0 <= result["value"] <= 1.0
        assert len((Path(result["folder"]) / "predictions.jsonl").read_text().splitlines()) == len(job.data.dev)
        assert one["teacher_accuracy"] is not None
        assert one["steps"] == sum(
            max(1, round(theta["epochs"] * -(-entry["train_examples"] // 8)))
            for entry in one["rounds"]
            for theta in entry["settings"]
        )
    model = tmp_path / "agora" / "not" / "model"
    kept = models.build(models.open_source(str(model), None), job.data, models.AS_IT_IS, 0.0, 0)
    again = results.evaluate(job, "select", kept)
    best = about["runs"][0]["best"]
    assert again.scores["accuracy"] == pytest.approx(best["accuracy"])
    told = [task for task in done if task["setting"] == best["setting"] and task["seed"] == 3000 + best["round"]]
    assert agora_trials.student(told[0], job) == again.predicted.tolist()
    assert len({accuracy for one in about["runs"] for e in one["rounds"] for accuracy in e["accuracy"]}) > 2
    texts = {example.text for name in ("select", "dev") for example in job.data.sets[name]}
    for file in (tmp_path / "agora" / "not").glob("seed*/train-*.json"):
        assert not texts & {line[0] for line in json.loads(file.read_text())}
    rows = results.summary(job, agora_trials.INIT, found)
    assert rows[0]["init"] == "agora"
    assert rows[0]["values"] == [result["value"] for result in found]


def test_resumed_equals_uninterrupted(folder: Path, tiny: Path, tmp_path: Path):
    light = {"settings": {"learning_rate": [3e-3, 1e-2], "epochs": [1, 2]}}
    job = open_job(section(tiny, seeds=[3], agora=light), folder, tiny)
    students, done = students_of(job)
    expected = same(build(job, folder, tmp_path / "whole", students))
    first, begun = students_of(job, most=len(done) // 2 + 1)
    with pytest.raises(run.Stopped):
        build(job, folder, tmp_path / "cut", first)
    second, ended = students_of(job)
    assert same(build(job, folder, tmp_path / "cut", second)) == expected
    assert len(begun) + len(ended) == len(done)
    third, nothing = students_of(job)
    assert same(build(job, folder, tmp_path / "cut", third)) == expected
    assert nothing == []


@pytest.mark.parametrize("change", ["recipe", "teacher", "code"])
def test_rounds_of_something_else_are_not_continued(folder: Path, tiny: Path, tmp_path: Path, change: str):
    here = shutil.copytree(folder, tmp_path / "yaml")
    (here / "mine.py").write_text("def tau(mistakes, rng): return []\n")
    light = {"settings": {"learning_rate": [3e-3]}, "max_rounds": 1, "transforms": ["mine.py:tau"]}
    for number in range(3):
        if number == 2 and change == "teacher":
            settings = json.loads((here / "teacher" / "config.json").read_text())
            (here / "teacher" / "config.json").write_text(json.dumps({**settings, "layer_norm_eps": 0.1}))
        if number == 2 and change == "code":
            (here / "mine.py").write_text("def tau(mistakes, rng): return mistakes\n")
        dropout = 0.1 if number == 2 and change == "recipe" else 0.0
        job = open_job(section(tiny, seeds=[0], agora=light, dropout=dropout), here, tiny)
        log = tmp_path / "out" / "agora" / "not" / "seed0" / "rounds.jsonl"
        before = log.read_text() if log.exists() else ""
        build(job, here, tmp_path / "out", students_of(job)[0])
        assert (log.read_text() == before) == (number == 1)


def test_a_changed_file_of_examples_is_refused(folder: Path, tiny: Path, tmp_path: Path):
    job = open_job(section(tiny), folder, tiny)
    (tmp_path / "train.json").write_text('[["a",null,1]]')
    task = {"train": str(tmp_path / "train.json"), "texts": "other", "setting": {}, "seed": 0}
    with pytest.raises(ValueError, match="train.json changed while Agora ran"):
        agora_trials.student(task, job)
    same_file = task | {"texts": run.fingerprint(run.read_json(tmp_path / "train.json"))}
    with pytest.raises(ValueError, match="the data or the model of not changed"):
        agora_trials.student({**same_file, "identity": "other", "job": "not"}, job)


def test_the_teacher_speaks_by_name(folder: Path, tiny: Path):
    """Its first class is `yes`, the task's is `no`."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    job = open_job(section(tiny), folder, tiny)
    texts = [Example(text, label=0) for text in sentences(20, 9)]
    told = agora_trials.teacher(job, str(folder / "teacher"))(texts)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "teacher").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    for example, label in zip(texts, told, strict=True):
        with torch.no_grad():
            logits = model(**tokenizer(example.text, return_tensors="pt")).logits[0]
        assert LABELS[label] == model.config.id2label[int(logits.argmax())]
    assert set(told) <= {0, 1}


def test_diverged_students_lose(folder: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    job = open_job(section(tiny, seeds=[0]), folder, tiny)
    real: Callable[..., Any] = trial.run_trial

    def run_trial(job: trial.Job, *rest: Any) -> Any:
        assert rest[-1] is not None  # students choose their epoch like any trial
        if job.settings.learning_rate == 1e-2:
            raise trial.Diverged("the loss became inf")
        return real(job, *rest)

    monkeypatch.setattr(trial, "run_trial", run_trial)
    found, about = build(job, folder, tmp_path, students_of(job)[0])
    first = about["runs"][0]["rounds"][0]
    assert [accuracy == 0.0 for accuracy in first["accuracy"]] == [
        t["learning_rate"] == 1e-2 for t in first["settings"]
    ]
    assert found[0]["setting"]["learning_rate"] == 3e-3


def test_where_it_cannot_work(folder: Path, tiny: Path, tmp_path: Path):
    plain = section(tiny)
    (data,) = examples.load_all(plain, folder, None)
    words = replace(data, sets={**data.sets, "train": [Example("a b", label=0, spans=((0, 0, 1),))]})
    cases: list[tuple[config.Finetune, list[Any], str]] = [
        (plain, [data, data], "write one task"),
        (plain, [words], "fine-tune it without agora"),
        (plain, [replace(data, task=replace(data.task, type="multilabel"))], "fine-tune it without agora"),
        (plain.model_copy(update={"select": "dev"}), [data], "write select: train"),
    ]
    for settings, datas, sentence in cases:
        with pytest.raises(ValueError, match=sentence):
            agora_trials.check(settings, datas)
    agora_trials.check(plain, [data])
    job = open_job(section(tiny, agora={"settings": {}}), folder, tiny)
    with pytest.raises(ValueError, match=r"finetune.agora.settings has nothing to try"):
        build(job, folder, tmp_path, students_of(job)[0])
    job = open_job(section(tiny, agora={"teacher": "absent/teacher/here"}), folder, tiny)
    with pytest.raises(ValueError, match=r"finetune.agora.teacher: absent"):
        build(job, folder, tmp_path, students_of(job)[0])


def test_train_texts_of_other_sets_are_left_out(folder: Path, tiny: Path):
    job = open_job(section(tiny), folder, tiny)
    data = replace(job.data, sets={**job.data.sets, "train": [*job.data.train, job.data.dev[0]]})
    assert agora_trials.split(data).train == job.data.train


def test_numbers_and_pairs(folder: Path, tiny: Path, tmp_path: Path):
    """A regression of pairs, without a teacher: new examples keep the number of the mistake."""
    both = list(zip(sentences(60, 1), sentences(60, 2), strict=True))
    lines = [f"{first},{second},{len(set(first.split()) & set(second.split()))}" for first, second in both]
    for name, part in (("train", lines[:45]), ("dev", lines[45:])):
        (folder / f"pairs-{name}.csv").write_text("\n".join(["text,other,label", *part]) + "\n")
    task = {"name": "pairs", "type": "regression", "train": "pairs-train.csv", "dev": "pairs-dev.csv"}
    task |= {"columns": {"text_b": "other"}}
    light = {"labels": "gold", "teacher": None, "settings": {"learning_rate": [1e-3, 3e-3]}, "tolerance": 0.3}
    job = open_job(section(tiny, tasks=[task], seeds=[0], epochs=1.0, agora=light), folder, tiny)
    found, about = build(job, folder, tmp_path, students_of(job)[0])
    (one,) = about["runs"]
    assert found[0]["value"] is not None
    assert one["teacher_accuracy"] is None
    assert one["rounds"][0]["added"] > 0
    new = json.loads((tmp_path / "agora" / "pairs" / "seed0" / "train-2.json").read_text())[len(job.data.train) :]
    assert {line[2] for line in new} <= {example.label for example in job.data.sets["select"]}
    assert all(line[1] for line in new)
