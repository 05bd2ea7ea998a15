"""Distillation through the command line at toy size: two runs on the same shards, one command from search to report."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from frugalbert import run as files
from frugalbert.cli import app
from frugalbert.model.arch import Arch
from frugalbert.progress import number
from tests.search_project import one_sentence
from tests.structure import ROOT
from tests.test_pipeline import _write_project

MACHINE = {"device": "cpu", "threads": 1, "workers": 1, "compile": False, "micro_batch": 8}
TINY = {"batch_size": 8, "learning_rate": 5e-3, "muon_learning_rate": 0.02, "precision": "fp32",
        "validation": {"rows": 16}}  # fmt: skip
CORPUS = {"sources": ["../texts"], "held_out": 0.05, "min_characters": 20}
TASK = {"name": "topic", "train": "../topic.csv", "columns": {"text": "text", "label": "label"}}
CACHED = ["pretrain.distill.top_k=8", "pretrain.distill.cache=../runs/cache", "pretrain.mask.copies=2"]


def write(folder: Path, name: str, sections: dict[str, Any]) -> None:
    (folder / "configs").mkdir(exist_ok=True)
    (folder / "configs" / f"{name}.yaml").write_text(
        yaml.safe_dump(json.loads(json.dumps({"name": name, "machine": MACHINE, **sections})))
    )


def call(folder: Path, verb: str, name: str, *words: str) -> tuple[int, str]:
    """Exit code and output of `frugalbert VERB configs/NAME.yaml …` in `folder`."""
    handlers = {kind: signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setattr(files, "_signal", None)
            patch.setattr(os, "fsync", lambda descriptor: None)
            result = CliRunner().invoke(app, [verb, f"configs/{name}.yaml", *words], env={"COLUMNS": "1000"})
    finally:
        for kind, handler in handlers.items():
            signal.signal(kind, handler)
    return result.exit_code, result.output


def shipped(name: str, **sections: dict[str, Any]) -> dict[str, Any]:
    """The shipped file with these values instead, to the end of pre-training."""
    config = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
    kept = {key: config[key] for key in ("corpus", "tokenizer", "shards", "pretrain")}
    return {key: {**item, **sections.get(key, {})} for key, item in kept.items()}


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """distill-local-teacher.yaml and distill-local.yaml with other sizes."""
    folder = tmp_path_factory.mktemp("two")
    _write_project(folder)
    common = {"corpus": CORPUS, "shards": {"length": 32}}
    teacher = {**TINY, "budget": "20steps", "arch": "modern 3x48 heads=3 ffn=64"}
    write(folder, "distill-local-teacher",
          shipped("distill-local-teacher", tokenizer={"vocab_size": 128}, pretrain=teacher, **common))  # fmt: skip
    student = {**TINY, "budget": "10steps", "arch": "modern 2x32 heads=2 ffn=32"}
    write(folder, "distill-local", shipped("distill-local", pretrain=student, **common))
    for words in (["distill-local-teacher"], ["distill-local", *CACHED]):
        code, said = call(folder, "run", *words)
        assert code == 0, said
    return folder


def test_both_runs_have_the_same_shards_byte_for_byte(two_runs: Path):
    first, second = (two_runs / "runs" / name / "shards" for name in ("distill-local-teacher", "distill-local"))
    names = [path.relative_to(first) for path in sorted(first.rglob("*")) if path.suffix in (".bin", ".npy")]
    assert names
    for name in [*names, Path("index.json"), Path("../tokenizer/tokenizer.json")]:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_the_planned_size_of_the_cache_is_that_of_the_file(two_runs: Path):
    code, said = call(two_runs, "plan", "distill-local", *CACHED, "--dir", str(two_runs / "runs" / "later"))
    assert code == 0, said
    assert "teacher ../runs/distill-local-teacher/pretrain/model: modern 3x48 heads=3 ffn=64" in said
    assert "(there already)" in said
    shutil.copytree(two_runs / "runs" / "distill-local", two_runs / "runs" / "again")
    shutil.rmtree(two_runs / "runs" / "again" / "pretrain")
    code, said = call(two_runs, "plan", "distill-local", *CACHED, "--dir", str(two_runs / "runs" / "again"))
    size = (two_runs / "runs" / "cache" / "length-32.bin").stat().st_size
    assert f"about {number(size)}B when full" in said


def test_what_cannot_be_distilled_is_one_sentence(two_runs: Path):
    def refused(*words: str) -> str:
        code, said = call(two_runs, "run", "distill-local", *words, "--dir", str(two_runs / "runs" / "refused"))
        assert not (two_runs / "runs" / "refused" / "pretrain" / "checkpoints").exists()
        return one_sentence(code, said)

    (two_runs / "empty").mkdir()
    said = refused("pretrain.distill.teacher=../empty")
    assert "pretrain.distill.teacher ../empty is neither a model directory" in said
    other = ["pretrain.distill.teacher=../runs/distill-local/pretrain/model", *CACHED]
    assert "was made with another teacher; name another directory" in refused(*other, "--redo", "pretrain")
    large = ["pretrain.start=from teacher", "pretrain.arch=modern 2x96 heads=3 ffn=64"]
    assert "is no slice of the teacher" in refused(*large, "--redo", "pretrain")


def test_from_the_search_to_the_report_in_one_command(tmp_path: Path):
    """Acceptance check 10: extraction chooses, the super-network teaches, and what it taught is fine-tuned."""
    _write_project(tmp_path)
    sections: dict[str, Any] = {
        "corpus": CORPUS,
        "tokenizer": {"vocab_size": 128},
        "shards": {"length": 32},
        "space": {"depth": [1, 2], "hidden": [16, 32], "heads": [2], "head_dim": 8, "ffn": [16, 32]},
        "supernet": {**TINY, "budget": "10steps"},
        "search": {"method": "extraction", "extraction": {"interval": 2}, "rows": 16},
        "pretrain": {**TINY, "arch": "from search", "budget": "10steps", "objective": "distill",
                     "distill": {"teacher": "from supernet", "hidden": 0.1}},
        "finetune": {"tasks": [TASK], "seeds": [0], "epochs": 1.0, "max_length": 16, "precision": "fp32"},
        "report": {},
    }  # fmt: skip
    write(tmp_path, "whole", sections)
    code, said = call(tmp_path, "run", "whole")
    assert code == 0, said
    run = tmp_path / "runs" / "whole"
    for stage in sections:
        assert (run / stage / "stage.json").is_file(), stage
    picked = Arch.from_json(json.loads((run / "search" / "arch.json").read_text()))
    written = json.loads((run / "pretrain" / "model" / "config.json").read_text())
    assert Arch.parse(written["arch"]) == picked
    line = json.loads((run / "pretrain" / "metrics.jsonl").read_text().splitlines()[0])
    assert {"text_loss", "logits_loss", "hidden_loss"} <= line.keys()
    record = json.loads((run / "finetune" / "stage.json").read_text())
    assert record["section"]["seeds"] == [0]
    assert picked.to_text() in (run / "report" / "report.html").read_text(encoding="utf-8")
