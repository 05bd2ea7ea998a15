"""The suite through the stage: every type of task, transfer, models as they are, sweeps, several processes."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from frugalbert import config, run
from frugalbert.finetune import models, runner, trial
from tests.finetune.conftest import sentences
from tests.finetune.test_runner import build, contents, results, section, write_task

ANIMALS = ("cat", "dog")


def texts(count: int = 32) -> list[list[str]]:
    """Sentences with exactly one animal."""
    generator = random.Random(2)
    found = []
    for text in sentences(count, 11):
        words = [word for word in text.split() if word not in ANIMALS]
        words.insert(generator.randint(0, len(words)), generator.choice(ANIMALS))
        found.append(words)
    return found


def write_kind(folder: Path, kind: str) -> config.Task:
    """A task of 32 examples that can be learnt by heart, its dev set the training set."""
    if kind == "multiple-choice":
        lines = [{"text": " ".join(words), "a": "runs cat", "b": "runs dog", "label": int("dog" in words)}
                 for words in texts()]  # fmt: skip
        columns = config.Columns(options=("a", "b"))
        (folder / "choice.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return config.Task(name="choice", type=kind, train="choice.jsonl", dev="choice.jsonl", columns=columns)
    if kind == "question-answering":
        asked = []
        for number, words in enumerate(texts()):
            place = next(place for place, word in enumerate(words) if word in ANIMALS)
            start = len(" ".join(words[:place])) + (place > 0)
            answer = {"text": words[place], "answer_start": start}
            row = {"id": str(number), "question": "the animal", "answers": [answer]}
            asked.append({"context": " ".join(words), "qas": [row]})
        (folder / "answers.json").write_text(json.dumps({"version": "1.1", "data": [{"paragraphs": asked}]}))
        return config.Task(name="answers", type=kind, train="answers.json", dev="answers.json")
    lines = ["\n".join(f"{word} {'B-animal' if word in ANIMALS else 'O'}" for word in words) for words in texts()]
    (folder / "tags.txt").write_text("\n\n".join(lines) + "\n")
    return config.Task(name="tags", type="token-classification", train="tags.txt", dev="tags.txt")


# ---- every type -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "metric"),
    [("multiple-choice", "accuracy"), ("question-answering", "squad_em"), ("token-classification", "span_f1")],
)
def test_every_type_overfits_32_examples(tiny, tmp_path, kind, metric):
    task = write_kind(tmp_path, kind).model_copy(update={"metrics": (metric,)})
    given = section(tiny, [task], epochs=40.0, learning_rate=3e-3, dropout=0.0, seeds=[0], random_baseline=False)
    headlines = build(tmp_path / "out", given)
    assert headlines[task.name]["pretrained"] == 1.0
    lines = (tmp_path / "out" / task.name / "pretrained-seed0" / "predictions.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    assert first["loss"] < 0.5
    assert first["prediction"] in (first["gold"], *first["gold"])


def test_a_saved_model_is_evaluated_as_it_is(tiny, tmp_path):
    """The model of every type, opened again without training, predicts what it predicted."""
    (tmp_path / "words").mkdir()
    tasks = [write_task(tmp_path), *(write_kind(tmp_path, kind) for kind in
             ("multiple-choice", "question-answering", "token-classification"))]  # fmt: skip
    given = section(tiny, tasks, seeds=[0], random_baseline=False)
    build(tmp_path / "out", given)
    for task in tasks:
        model = tmp_path / "out" / task.name / "model"
        again = section(model, [task], train=False)
        build(tmp_path / f"again-{task.name}", again)
        before, after = (
            (folder / task.name / trial_name / "predictions.jsonl").read_text().splitlines()
            for folder, trial_name in ((tmp_path / "out", "pretrained-seed0"),
                                       (tmp_path / f"again-{task.name}", "as-it-is-seed0"))
        )  # fmt: skip
        assert [json.loads(line)["prediction"] for line in before] == [json.loads(line)["prediction"] for line in after]
        row = run.read_json(tmp_path / f"again-{task.name}" / "results.json")[0]
        assert row["init"] == models.AS_IT_IS
        assert row["train_examples"] == 0
        result = tmp_path / f"again-{task.name}" / task.name / "as-it-is-seed0" / "result.json"
        written = result.stat().st_mtime_ns
        build(tmp_path / f"again-{task.name}", again)
        assert result.stat().st_mtime_ns == written  # finished is finished


def test_labels_are_mapped_by_name(tiny, tmp_path, capsys):
    """A model whose classes stand in another order gives the same answers; one with other classes is refused."""
    task = write_task(tmp_path)
    build(tmp_path / "out", section(tiny, [task], seeds=[0], random_baseline=False, epochs=20.0, learning_rate=2e-3))
    model = tmp_path / "out" / "classification" / "model"
    loaded = models.open_source(str(model), None)
    weights = trial_model(model)
    with torch.no_grad():
        for parameter in (weights.classifier.weight, weights.classifier.bias):
            parameter.copy_(parameter.flip(0))
    weights.config.id2label = {0: "Dog", 1: "Cat"}
    weights.save_pretrained(tmp_path / "turned")
    loaded.tokenizer.save_pretrained(tmp_path / "turned")
    found = build(tmp_path / "again", section(tmp_path / "turned", [task], train=False))
    before = results(tmp_path / "out")["classification", "pretrained"]["mean"]
    assert found["classification"][models.AS_IT_IS] == before > 0.6
    assert "in another order" in capsys.readouterr().err
    weights.config.id2label = {0: "fish", 1: "bird"}
    weights.save_pretrained(tmp_path / "turned")
    with pytest.raises(ValueError, match="knows the classes fish, bird, and classification has cat, dog"):
        build(tmp_path / "other", section(tmp_path / "turned", [task], train=False))
    with pytest.raises(ValueError, match="has no head for this task"):
        build(tmp_path / "none", section(tiny, [task], train=False))


def trial_model(path: Path) -> torch.nn.Module:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(path)


# ---- from another task ----------------------------------------------------------------------------------------------


def test_a_task_starts_from_another_ones_encoder_with_a_new_head(tiny, tmp_path, monkeypatch):
    first = write_task(tmp_path)
    second = first.model_copy(update={"name": "other"})  # as many classes: its head would fit
    seen = {}
    original = models.build

    def spy(source, data, init, dropout, seed):
        model = original(source, data, init, dropout, seed)
        seen[data.task.name, Path(source.name).name] = {k: v.clone() for k, v in model.state_dict().items()}
        return model

    monkeypatch.setattr(models, "build", spy)
    per_task = {"other": config.TaskSettings(start="from task classification")}
    build(tmp_path / "out", section(tiny, [first, second], seeds=[0], per_task=per_task, random_baseline=False))
    rows = results(tmp_path / "out")
    assert ("other", "pretrained") in rows
    assert ("other", "from classification") in rows
    from safetensors.torch import load_file

    source = load_file(tmp_path / "out" / "classification" / "model" / "model.safetensors")
    started, plain = seen["other", "model"], seen["other", tiny.name]
    same = {name for name in started if torch.equal(started[name], source[name])}
    assert same == {name for name in started if name.startswith("bert.")}
    moved = {name for name in started if not torch.equal(started[name], plain[name])}
    assert {"bert.embeddings.word_embeddings.weight", "classifier.weight"} <= moved
    assert run.read_json(tmp_path / "out" / "other" / "model.json")["trial"] == "from-classification-seed0"


@pytest.mark.parametrize(
    ("name", "start", "message"),
    [("absent", None, "'absent' is none of the tasks"),
     ("classification", "from task mnli", "add the task 'mnli' to finetune.tasks"),
     ("classification", "from task classification", "add the task 'classification'")],
)  # fmt: skip
def test_starts_that_cannot_be(tiny, tmp_path, name, start, message):
    given = section(tiny, [write_task(tmp_path)], per_task={name: config.TaskSettings(start=start)})
    with pytest.raises(ValueError, match=message):
        build(tmp_path / "out", given)


# ---- epochs, checkpoints, recipes -----------------------------------------------------------------------------------


def test_a_trial_goes_on_from_its_checkpoint_to_the_same_weights(tiny, tmp_path, monkeypatch):
    """Stopped by a signal again and again, each time a little later, with the best epoch to remember."""
    given = section(tiny, [write_task(tmp_path)], seeds=[0], epochs=3.0, select="train", random_baseline=False)
    build(tmp_path / "whole", given)
    looks, attempts = 0, 0

    def look():
        nonlocal looks
        looks += 1
        if looks > 3 + attempts:
            raise run.Stopped(15)

    begun = []
    original = trial.Keeper.resume

    def resume(self):
        state = original(self)
        begun.append(state.step)
        return state

    monkeypatch.setattr(trial.Keeper, "resume", resume)
    while True:
        with monkeypatch.context() as patch:
            patch.setattr(trial, "check_stop", look)
            try:
                build(tmp_path / "out", given)
                break
            except run.Stopped:
                looks, attempts = 0, attempts + 1
    assert attempts >= 3
    assert begun == sorted(begun)
    assert begun[-1] > 6
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_the_best_epoch_is_kept_and_patience_ends_a_trial(tiny, tmp_path, monkeypatch):
    values = iter([0.2, 0.9, 0.5, 0.9, 0.1, 0.3])
    monkeypatch.setattr("frugalbert.finetune.trials._selection", lambda job, model, scale: next(values))
    given = section(tiny, [write_task(tmp_path)], seeds=[0], epochs=6.0, select="train", patience=2)
    given = given.model_copy(update={"random_baseline": False})
    build(tmp_path / "out", given)
    result = run.read_json(tmp_path / "out" / "classification" / "pretrained-seed0" / "result.json")
    assert result["epoch_scores"] == [0.2, 0.9, 0.5, 0.9]
    assert result["best_epoch"] == 2
    assert result["selection"] == 0.9
    row = results(tmp_path / "out")["classification", "pretrained"]
    assert row["train_examples"] < 48
    assert "share of the training examples" in row["selection"]


def test_an_undefined_epoch_is_the_worst_one(tiny, tmp_path, monkeypatch):
    values = iter([float("nan"), 0.1, 0.05])
    monkeypatch.setattr("frugalbert.finetune.trials._selection", lambda job, model, scale: next(values))
    given = section(tiny, [write_task(tmp_path)], seeds=[0], epochs=3.0, select="train", random_baseline=False)
    build(tmp_path / "out", given)
    result = run.read_json(tmp_path / "out" / "classification" / "pretrained-seed0" / "result.json")
    assert (result["epoch_scores"], result["best_epoch"], result["selection"]) == ([None, 0.1, 0.05], 2, 0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"select": "train", "select_share": 0.001}, "leaves 24 examples to train on and 0 to select by"),
     ({"patience": 2}, "finetune.patience waits for a better epoch")],
)  # fmt: skip
def test_selections_that_cannot_be(tiny, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path / "out", section(tiny, [write_task(tmp_path, count=24)], **settings))


def test_other_gold_answers_are_another_trial(tiny, tmp_path):
    task = write_kind(tmp_path, "question-answering")
    given = section(tiny, [task], seeds=[0], random_baseline=False)
    build(tmp_path / "out", given)
    before = run.read_json(tmp_path / "out" / "answers" / "pretrained-seed0" / "result.json")["identity"]
    path = tmp_path / "answers.json"
    path.write_text(path.read_text().replace('{"text": "cat", "answer_start": 0}', '{"text": "ca", "answer_start": 0}'))
    build(tmp_path / "out", given)
    after = run.read_json(tmp_path / "out" / "answers" / "pretrained-seed0" / "result.json")["identity"]
    assert before != after


def test_layer_decay_and_class_weights(tiny):
    model = trial_model(tiny)
    groups = trial.parameter_groups(model, 0.1, 0.5)
    factors = {id(p): group["factor"] for group in groups for p in group["params"]}
    assert len(factors) == len(list(model.parameters()))
    expected = {"classifier.weight": 1.0, "bert.encoder.layer.0.output.dense.weight": 0.5,
                "bert.embeddings.word_embeddings.weight": 0.25}  # fmt: skip
    assert {name: factors[id(p)] for name, p in model.named_parameters() if name in expected} == expected
    assert {group["factor"] for group in trial.parameter_groups(model, 0.1, 1.0)} == {1.0}


def test_epochs_by_size_and_settings_of_one_task(tiny, tmp_path):
    given = section(tiny, [write_task(tmp_path, count=24)], epochs="auto", seeds=[0], random_baseline=False)
    build(tmp_path / "out", given)
    assert results(tmp_path / "out")["classification", "pretrained"]["recipe"]["epochs"] == 20.0
    own = {"classification": config.TaskSettings(epochs=2.0, max_train_examples=16)}
    build(tmp_path / "own", given.model_copy(update={"per_task": own}))
    row = results(tmp_path / "own")["classification", "pretrained"]
    assert (row["recipe"]["epochs"], row["train_examples"]) == (2.0, 16)


def test_class_weights_favour_the_rare(tiny, tmp_path):
    lines = [{"text": "the cat runs" if place % 8 else "the dog runs", "label": "many" if place % 8 else "few"}
             for place in range(64)]  # fmt: skip
    (tmp_path / "rare.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = config.Task(name="rare", train="rare.jsonl", dev="rare.jsonl")
    shares = []
    for weights in ("none", "balanced"):
        given = section(tiny, [task], seeds=[0], epochs=1.0, class_weights=weights, random_baseline=False)
        build(tmp_path / weights, given)
        found = (tmp_path / weights / "rare" / "pretrained-seed0" / "predictions.jsonl").read_text().splitlines()
        shares.append(np.mean([json.loads(line)["probabilities"][0] for line in found]))
    assert shares[0] < shares[1]


# ---- sweeps and processes -------------------------------------------------------------------------------------------


def test_a_sweep_chooses_by_the_mean_and_keeps_the_chosen_ones_model(tiny, tmp_path):
    sweep = config.Sweep(learning_rate=(1e-6, 2e-3), epochs=(2.0,))
    given = section(tiny, [write_task(tmp_path)], select="train", sweep=sweep, random_baseline=False)
    build(tmp_path / "out", given)
    row = results(tmp_path / "out")["classification", "pretrained"]
    assert row["trials"] == 4
    assert row["sweep"]["rows"][row["sweep"]["best"]]["setting"]["learning_rate"] == row["recipe"]["learning_rate"]
    folders = sorted((tmp_path / "out" / "classification").glob("pretrained-*-seed*"))
    assert len(folders) == 4
    kept = run.read_json(tmp_path / "out" / "classification" / "model.json")["trial"]
    chosen = run.read_json(tmp_path / "out" / "classification" / kept / "result.json")
    assert chosen["setting"]["learning_rate"] == row["recipe"]["learning_rate"]
    before = contents(tmp_path / "out")
    build(tmp_path / "out", given)
    assert contents(tmp_path / "out") == before  # nothing is done twice
    with pytest.raises(ValueError, match="write select: train"):
        build(tmp_path / "other", given.model_copy(update={"select": "none"}))


def test_a_setting_that_diverges_loses(tiny, tmp_path):
    sweep = config.Sweep(learning_rate=(1e30, 1e-3), warmup=(0.0,))
    given = section(tiny, [write_task(tmp_path)], select="dev", sweep=sweep, seeds=[0], random_baseline=False)
    build(tmp_path / "out", given)
    row = results(tmp_path / "out")["classification", "pretrained"]
    assert row["sweep"]["num_failed"] == 1
    assert row["recipe"]["learning_rate"] == 1e-3
    assert "dev set itself" in row["selection"]


def test_two_processes_give_what_one_gives(tiny, tmp_path):
    given = section(tiny, [write_task(tmp_path, count=24)])
    build(tmp_path / "one", given)
    out = tmp_path / "two"
    out.mkdir()
    runner.build(given, {"yaml": tmp_path}, out, config.Machine(device="cpu", threads=1, workers=2))
    assert contents(out) == contents(tmp_path / "one")
