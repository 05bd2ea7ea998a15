"""The whole pipeline through the command line at toy size: from text to report, and through kill -9 in every stage."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.rows import chance

STAGES = ("corpus", "tokenizer", "shards", "pretrain", "finetune", "export", "bench", "report")
DATA = """
corpus: {sources: [texts], held_out: 0.05, min_characters: 20}
tokenizer: {vocab_size: 128}
"""
"""What is made of the texts of `_write_project`."""
YAML = f"""
name: tiny
machine: {{device: cpu, threads: 1, workers: 2, compile: false, micro_batch: 8}}
{DATA}
shards: {{length: 64}}
pretrain:
  arch: modern 2x32 heads=2 ffn=64
  budget: 40steps
  batch_size: 8
  optimizer: muon
  dropout: 0.1
  mask: {{rate: [0.3, 0.15]}}
  checkpoints: {{every: 5steps, markers: [0.5]}}
  validation: {{rows: 16}}
finetune:
  tasks: [{{name: topic, train: topic.csv, columns: {{text: text, label: label}}}}]
  seeds: [0, 1]
  epochs: 1.0
  max_length: 32
export: {{formats: [hf, onnx, onnx-int8]}}
bench: {{lengths: [16], batch_sizes: [1], repeats: 2, baseline: none}}
report: {{}}
"""
SUBJECTS = {
    "river": "water bank stream fish boat bridge flood delta mouth source",
    "music": "note song chord drum voice opera string tune rhythm concert",
    "metal": "iron steel copper forge alloy rust smelt bronze nail anvil",
}


NAMES = ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "COMET_API_KEY", "DB_PASSWORD")
SECRETS = {name: f"secret-{number}-9f8e7d6c5b4a" for number, name in enumerate(NAMES)}


def _write_project(folder: Path) -> None:
    """A small synthetic corpus with real structure (topics) and a task on it; any seeded generator would do."""
    generator = random.Random(0)
    common = "the of a in is was and to with from by old new long great small seen near under about".split()

    def sentence(subject: str) -> str:
        words = [generator.choice(SUBJECTS[subject].split() if generator.random() < 0.4 else common) for _ in range(12)]
        return " ".join(words).capitalize() + "."

    (folder / "texts").mkdir()
    for index in range(3):
        documents = [" ".join(sentence(generator.choice(list(SUBJECTS))) for _ in range(6)) for _ in range(120)]
        (folder / "texts" / f"part{index}.txt").write_text("\n\n".join(documents))
    rows = [(subject, sentence(subject)) for _ in range(60) for subject in SUBJECTS]
    (folder / "topic.csv").write_text("text,label\n" + "".join(f'"{text}",{subject}\n' for subject, text in rows))
    (folder / "tiny.yaml").write_text(YAML)


def _start(folder: Path, *arguments: str) -> subprocess.Popen:
    environment = {**os.environ, **SECRETS, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "frugalbert.cli", "run", "tiny.yaml", *arguments]
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def _finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out + err


def _results(run: Path) -> dict[str, str]:
    """What must not depend on how often the run was killed: every file of substance, by hash."""
    patterns = (
        "corpus/documents-*", "tokenizer/tokenizer.json", "shards/**/*.bin", "pretrain/model/model.safetensors",
        "pretrain/markers/*/model.safetensors", "finetune/**/predictions.jsonl", "export/hf/model.safetensors",
    )  # fmt: skip
    found = {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
        for pattern in patterns
        for path in sorted(run.glob(pattern))
    }
    losses = [json.loads(line) for line in (run / "pretrain" / "metrics.jsonl").read_text().splitlines()]
    found["losses"] = str([(line["step"], line.get("loss"), line.get("validation_loss")) for line in losses])
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    _write_project(folder)
    (folder / "said").write_text(_finish(_start(folder)))
    return folder


def test_every_stage_leaves_what_the_next_and_the_user_need(finished):
    run = finished / "runs" / "tiny"
    for stage in STAGES:
        record = json.loads((run / stage / "stage.json").read_text())
        assert record["seconds"] > 0
        assert not (run / stage / "stage.part.json").exists()
    assert (run / "export" / "hf" / "README.md").exists()
    assert (run / "export" / "onnx" / "model.onnx").exists()
    assert "<html" in (run / "report" / "report.html").read_text()[:200]
    assert not (run / "lock").exists()


@pytest.mark.fault("S10")
@pytest.mark.parametrize(
    "place", ["said", "runs/tiny/run.yaml", "runs/tiny/report", "runs/tiny/pretrain", "runs/tiny/export"]
)
def test_secrets_of_the_environment_are_nowhere(finished, place, case):
    path = finished / place
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    assert files
    for secret in SECRETS.values():
        with case():
            assert not [file for file in files if secret.encode() in file.read_bytes()]


def test_a_second_run_does_nothing_and_says_so(finished):
    run = finished / "runs" / "tiny"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name != "run.yaml"}
    said = _finish(_start(finished))
    assert said.count("done before") == len(STAGES)
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.fault("R3")
def test_sigterm_in_training_is_143_and_continues_to_the_same_weights(finished, tmp_path):
    _write_project(tmp_path)
    run = tmp_path / "runs" / "tiny"
    process = _start(tmp_path)
    while not (run / "pretrain" / "checkpoints").is_dir() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 143, err
    assert "Continue with: frugalbert run tiny.yaml" in err
    _finish(_start(tmp_path))
    assert _results(run) == _results(finished / "runs" / "tiny")


@pytest.mark.fault("R2")
def test_killed_again_and_again_in_every_stage_it_ends_the_same(finished, tmp_path, case):
    """At least 20 kill points: every stage is killed again and again, early to late in its usual time."""
    _write_project(tmp_path)
    run, generator, killed = tmp_path / "runs" / "tiny", random.Random(1 + chance()), 0
    for stage in STAGES:
        seconds = json.loads((finished / "runs" / "tiny" / stage / "stage.json").read_text())["seconds"]
        kills = 0
        for share in (0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 0.05, 0.02, 0.01, 0.0):
            process = _start(tmp_path)
            while not (run / stage / "stage.part.json").exists() and process.poll() is None:
                time.sleep(0.005)
            time.sleep(seconds * generator.uniform(0.5, 1.5) * share)
            process.kill()
            process.communicate()
            done = (run / stage / "stage.json").exists()
            kills += not done
            if kills >= 3 and (done or share == 0.7):
                break
            if done:  # the machine is faster now than it was when the stage was timed
                shutil.rmtree(run / stage)
                seconds /= 3
        killed += kills
    assert killed >= 20
    _finish(_start(tmp_path))
    assert _results(run) == _results(finished / "runs" / "tiny")
    assert not list(run.rglob(".tmp-*")), "a killed writer's leftovers are swept up"
    case.add(killed, killed)
