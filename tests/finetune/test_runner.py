"""The stage as a whole on a tiny stock BERT: real GLUE tasks, kill -9 and resume, what it writes and refuses."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from frugalbert import config, run
from frugalbert.finetune import models, runner, trial
from tests.finetune.conftest import make_tiny, sentences

MACHINE = config.Machine(device="cpu", threads=1)


def write_task(folder: Path, count: int = 48, kind: str = "classification") -> config.Task:
    """Texts whose label is the animal in them, as a class, a number near 1000, or two labels or none."""
    generator = random.Random(1)
    lines = []
    for text in sentences(count, 7):
        animal = generator.choice(["cat", "dog"])
        words = [word for word in text.split() if word not in ("cat", "dog")] + [animal]
        generator.shuffle(words)
        label = {"classification": animal, "regression": 1000.0 + 300.0 * (animal == "dog")}.get(kind)
        if kind == "multilabel":
            label = ["cat", "purrs"] if animal == "cat" else []
        lines.append(json.dumps({"text": " ".join(words), "label": label}) + "\n")
    (folder / f"{kind}.jsonl").write_text("".join(lines))
    return config.Task(name=kind, type=kind, train=f"{kind}.jsonl", dev=f"{kind}.jsonl")


def section(tiny: Path, tasks: list, **settings: object) -> config.Finetune:
    given = {"epochs": 1.0, "batch_size": 8, "seeds": [0, 1], "max_length": 32, "precision": "fp32", "dropout": 0.1}
    return config.Finetune(tasks=tasks, model=str(tiny), **{**given, **settings})


def build(out: Path, given: config.Finetune, folder: Path | None = None) -> dict:
    out.mkdir(exist_ok=True)
    return runner.build(given, {"yaml": folder or out.parent}, out, MACHINE)


def results(out: Path) -> dict[tuple[str, str], dict]:
    return {(row["task"], row["init"]): row for row in run.read_json(out / "results.json")}


def contents(out: Path) -> dict[str, str]:
    """Hash of everything that was written; durations left out."""
    found = {}
    for path in sorted(file for file in out.rglob("*") if file.is_file()):
        if path.name == "result.json":
            found[str(path.relative_to(out))] = json.dumps({**run.read_json(path), "seconds": 0})
        else:
            found[str(path.relative_to(out))] = run.sha256(path)
    return found


# ---- real tasks -----------------------------------------------------------------------------------------------------


def test_every_glue_task_here_for_one_short_epoch(shared_data, tmp_path):
    names = ["CoLA", "SST-2", "MRPC", "STS-B", "RTE", "WNLI"]
    lines = (shared_data / "glue" / "RTE" / "train.tsv").read_text().split("\n")[:500]
    tiny = make_tiny(tmp_path / "model", lines)
    given = section(tiny, names, data=str(shared_data / "glue"), max_train_examples=64, seeds=[0])
    headlines = build(tmp_path / "out", given)
    rows = results(tmp_path / "out")
    assert list(headlines) == ["cola", "sst2", "mrpc", "stsb", "rte", "wnli", "device"]
    assert {row["train_examples"] for row in rows.values()} == {64}
    assert {name: rows[name, "random"]["dev_examples"] for name in ("cola", "stsb")} == {"cola": 1043, "stsb": 1500}
    assert rows["cola", "pretrained"]["majority_baseline"] == 0.0
    assert rows["stsb", "random"]["majority_baseline"] is None  # a constant has no correlation, not one of 0
    assert rows["mrpc", "pretrained"]["metric"] == "(f1 + accuracy) / 2"
    assert set(rows["mrpc", "pretrained"]["all_metrics"]) == {"f1", "accuracy"}
    for name, init in rows:
        lines = (tmp_path / "out" / name / f"{init}-seed0" / "predictions.jsonl").read_text().splitlines()
        found = [json.loads(line) for line in lines]
        assert [line["index"] for line in found] == list(range(rows[name, init]["dev_examples"]))
        if name == "stsb":
            assert all(0.0 <= line["prediction"] <= 5.0 for line in found)
        else:
            agreement = np.mean([line["gold"] == line["prediction"] for line in found])
            assert name == "cola" or agreement == pytest.approx(
                rows[name, init]["all_metrics"]["accuracy"]["mean"], abs=1e-6
            )


# ---- learning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "metric", "least"),
    [("classification", "accuracy", 1.0), ("regression", "r2", 0.99), ("multilabel", "exact_match", 1.0)],
)
def test_every_kind_of_task_overfits_48_examples(tiny, tmp_path, kind, metric, least):
    """Regression targets near 1000: only standardised training gets there; the saved model speaks in their units."""
    task = write_task(tmp_path, kind=kind).model_copy(update={"metrics": (metric,)})
    given = section(tiny, [task], epochs=40.0, learning_rate=2e-3, dropout=0.0, seeds=[0], random_baseline=False)
    headlines = build(tmp_path / "out", given)
    assert headlines[kind]["pretrained"] >= least
    check_saved_model(tmp_path / "out" / kind, tmp_path / f"{kind}.jsonl", kind)


def check_saved_model(folder: Path, dev: Path, kind: str) -> None:
    """`model/` gives the first seed's predictions through stock Auto classes, one text at a time, without padding."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    texts = [json.loads(line)["text"] for line in dev.read_text().splitlines()]
    tokens = [json.loads(line) for line in (folder / "dev-tokens.jsonl").read_text().splitlines()]
    lines = (folder / "pretrained-seed0" / "predictions.jsonl").read_text().splitlines()
    names = ["input_ids", *(["token_type_ids"] if getattr(model.config, "type_vocab_size", 0) > 1 else [])]
    with torch.inference_mode():
        for text, line, token in list(zip(texts, map(json.loads, lines), tokens, strict=True))[:10]:
            inputs = tokenizer(text, return_tensors="pt")
            assert token == {name: inputs[name][0].tolist() for name in names}
            logits = model(**inputs).logits[0]
            if kind == "regression":
                assert logits.item() == pytest.approx(line["prediction"], rel=1e-4)
            elif kind == "classification":
                assert model.config.id2label[int(logits.argmax())] == line["prediction"]
                assert logits.softmax(-1).tolist() == pytest.approx(line["probabilities"], abs=1e-4)
            else:
                assert [model.config.id2label[i] for i in range(len(logits)) if logits[i] > 0] == line["prediction"]
    assert model.config.problem_type == {"classification": "single_label_classification", "regression": "regression",
                                         "multilabel": "multi_label_classification"}[kind]  # fmt: skip


def test_micro_batches_equal_the_whole_batch(tiny, tmp_path):
    given = section(tiny, [write_task(tmp_path)], seeds=[0], dropout=0.0, random_baseline=False)
    found = []
    for micro in ("auto", 3):
        out = tmp_path / f"micro-{micro}"
        out.mkdir()
        runner.build(given, {"yaml": tmp_path}, out, config.Machine(device="cpu", threads=1, micro_batch=micro))
        lines = (out / "classification" / "pretrained-seed0" / "predictions.jsonl").read_text().splitlines()
        found.append([json.loads(line)["probabilities"][0] for line in lines])
    assert found[0] == pytest.approx(found[1], abs=1e-5)


# ---- resuming -------------------------------------------------------------------------------------------------------


def run_until(point: int, given: config.Finetune, out: Path, folder: Path) -> int:
    """Build in a forked child that kills itself at its `point`-th step or write; how many there were if it ends."""
    child = os.fork()
    if child == 0:
        count = 0

        def counted(function):
            def call(*arguments, **options):
                nonlocal count
                count += 1
                if count == point:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **options)

            return call

        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        trial.check_stop = counted(trial.check_stop)
        os.replace, os.rename = counted(os.replace), counted(os.rename)
        try:
            build(out, given, folder)
            os._exit(count)
        finally:
            os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) > 0
    return 0 if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def test_a_chain_of_kills_makes_progress(tiny, tmp_path):
    """Each attempt lives for a little more than one trial; finished trials are not begun again."""
    given = section(tiny, [write_task(tmp_path, count=24)])
    build(tmp_path / "whole", given)
    attempts = 0
    while not run_until(12, given, tmp_path / "out", tmp_path):
        attempts += 1
    assert 2 <= attempts <= 6
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_killed_from_outside(tiny, tmp_path):
    """A process of its own, killed with SIGKILL as soon as its first trial is finished."""
    given = section(tiny, [write_task(tmp_path)], epochs=4.0)
    script = (
        "import sys; from pathlib import Path; from frugalbert import config; from frugalbert.finetune import runner\n"
        "given = config.Finetune.model_validate_json(sys.argv[1], strict=False)\n"
        "runner.build(given, {'yaml': Path(sys.argv[2])}, Path(sys.argv[3]), config.Machine(device='cpu', threads=1))\n"
    )
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, "-c", script, given.model_dump_json(), str(tmp_path), str(out)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "seed 0" in line:
                break
        process.kill()
    first = out / "classification" / "pretrained-seed0" / "result.json"
    seconds = run.read_json(first)["seconds"]
    build(out, given)
    assert run.read_json(first)["seconds"] == seconds  # kept
    build(tmp_path / "whole", given)
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["predictions.jsonl", "result.json", "../model", "settings"])
def test_damage_and_other_settings_are_done_again(tiny, tmp_path, damage):
    given = section(tiny, [write_task(tmp_path, count=24)], seeds=[0], random_baseline=False)
    build(tmp_path / "out", given)
    expected = contents(tmp_path / "out")
    folder = tmp_path / "out" / "classification" / "pretrained-seed0"
    if damage == "../model":
        shutil.rmtree(folder.parent / "model")
    elif damage == "settings":
        build(tmp_path / "out", given.model_copy(update={"learning_rate": 1e-2}))
        assert contents(tmp_path / "out") != expected
    else:
        (folder / damage).write_bytes((folder / damage).read_bytes()[:-20])
    build(tmp_path / "out", given)
    assert contents(tmp_path / "out") == expected


def test_a_signal_stops_between_steps(tiny, tmp_path, monkeypatch):
    given = section(tiny, [write_task(tmp_path)], seeds=[0])
    monkeypatch.setattr(run, "_signal", signal.SIGTERM)
    with pytest.raises(run.Stopped):
        build(tmp_path / "out", given)
    assert not list((tmp_path / "out").rglob("result.json"))


# ---- figures over seeds ---------------------------------------------------------------------------------------------


def test_results_are_the_trials_figures(tiny, tmp_path, capsys):
    task = write_task(tmp_path)
    headlines = build(tmp_path / "out", section(tiny, [task], seeds=[3, 5, 8]))
    rows = results(tmp_path / "out")
    row, other = rows["classification", "pretrained"], rows["classification", "random"]
    values = [run.read_json(path)["value"] for path in sorted((tmp_path / "out").glob("*/pretrained-*/result.json"))]
    assert row["seeds"] == [3, 5, 8]
    assert row["values"] == values
    assert row["mean"] == headlines["classification"]["pretrained"] == pytest.approx(np.mean(values), abs=1e-6)
    assert row["std"] == pytest.approx(np.std(values, ddof=1), abs=1e-6)
    assert row["gain"]["mean"] == pytest.approx(row["mean"] - other["mean"], abs=1e-5)
    assert row["labels"] == ["cat", "dog"]
    golds = [json.loads(line)["label"] for line in (tmp_path / "classification.jsonl").read_text().splitlines()]
    share = max(golds.count("cat"), golds.count("dog")) / len(golds)
    assert row["majority_baseline"] == pytest.approx(share, abs=1e-6)
    assert (tmp_path / "out" / "classification" / "model" / "config.json").exists()
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "pre-trained" in shown.err
    assert f"{row['mean']:.3f}" in shown.err


def test_seeds_and_initialisations_differ(tiny, tmp_path):
    build(tmp_path / "out", section(tiny, [write_task(tmp_path)]))
    found = {(tmp_path / "out" / "classification" / f"{init}-seed{seed}" / "predictions.jsonl").read_bytes()
             for init in ("pretrained", "random") for seed in (0, 1)}  # fmt: skip
    assert len(found) == 4


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_a_diverging_loss_names_the_setting(tiny, tmp_path):
    given = section(tiny, [write_task(tmp_path)], learning_rate=1e30, warmup=0.0)
    with pytest.raises(ValueError, match=r"the loss became .* lower finetune.learning_rate"):
        build(tmp_path / "out", given)
    assert not list((tmp_path / "out").rglob("result.json"))


def test_inputs_longer_than_the_positions(tiny, tmp_path):
    with pytest.raises(ValueError, match="finetune.max_length is 128, but .* has 64 positions"):
        build(tmp_path / "out", section(tiny, [write_task(tmp_path)], max_length=128))


def spoil(model: Path, how: str) -> None:
    settings = run.read_json(model / "config.json")
    if how == "no config":
        (model / "config.json").unlink()
    elif how == "no weights":
        (model / "model.safetensors").unlink()
    elif how == "truncated weights":
        (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:5000])
    elif how == "broken config":
        (model / "config.json").write_text("{")
    elif how == "other shape":
        run.write_json(model / "config.json", {**settings, "intermediate_size": 128})
    elif how == "other model":
        run.write_json(model / "config.json", {**settings, "model_type": "electra", "embedding_size": 32})
    elif how == "own code":
        marker = model.parent / "ran"
        (model / "code.py").write_text(f"open({str(marker)!r}, 'w')")
        auto = {"AutoConfig": "code.Config", "AutoModelForSequenceClassification": "code.Model"}
        run.write_json(model / "config.json", {**settings, "model_type": "mine", "auto_map": auto})
    elif how == "no tokenizer":
        for path in model.glob("token*"):
            path.unlink()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no config", "is not a model: it has no config.json"),
        ("no weights", "is not a model: it has no model.safetensors"),
        ("truncated weights", "cannot be loaded .*; copy it again"),
        ("broken config", "finetune.model: .* cannot be read"),
        ("other shape", "weights of the encoder are missing or of another shape"),
        ("other model", "weights of the encoder are missing or of another shape"),
        ("own code", "needs code of its own, which is never run here"),
        ("no tokenizer", "has no tokenizer that can be used"),
    ],
)
def test_what_is_not_a_model_gets_one_sentence(tiny, tmp_path, how, message):
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    spoil(model, how)
    with pytest.raises(ValueError, match=message) as caught:
        build(tmp_path / "out", section(model, [write_task(tmp_path)]))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
    assert not list((tmp_path / "out").rglob("result.json"))


def test_a_run_stands_for_what_it_pretrained(tmp_path):
    trained = tmp_path / "run" / "pretrain" / "model"
    trained.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (trained / name).touch()
    for model in ("run", "run/pretrain/model"):
        assert models.locate(config.Finetune(tasks=["cola"], model=model), {"yaml": tmp_path}) == str(trained)


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ("./absent", FileNotFoundError, "finetune.model: .*absent does not exist"),
        ("some-org/absent", ValueError, "some-org/absent is no directory here and not found on the hub"),
        ("classification.jsonl", ValueError, "is not a model: it has no config.json"),
        (None, ValueError, "finetune needs a pre-trained model"),
    ],
)
def test_a_model_that_is_not_there(tmp_path, model, error, message):
    given = config.Finetune(tasks=[write_task(tmp_path)], model=model)
    with pytest.raises(error, match=message) as caught:
        build(tmp_path / "out", given)
    assert "\n" not in str(caught.value)
