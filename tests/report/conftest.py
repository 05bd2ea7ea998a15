"""A made-up but realistic run directory, written by code: every file the report may read, with one place for each text
that comes from outside."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from frugalbert.report.page import render

VERSIONS = {
    "python": "3.11.13", "platform": "Linux-6.8.0-x86_64-with-glibc2.36", "frugalbert": "0.1.0",
    "torch": "2.13.0+cpu", "transformers": "5.23.0", "tokenizers": "0.23.1", "accelerate": "1.15.0",
    "datasets": "5.2.0", "numpy": "2.4.1",
}  # fmt: skip
SECONDS = {
    "corpus": 41.2, "tokenizer": 13.9, "shards": 17.4, "pretrain": 331.8, "finetune": 248.1, "export": 38.6,
    "bench": 61.3,
}  # fmt: skip
TEXTS = {
    "run": "quickstart", "task": "python-docs", "label": "torch", "metric": "accuracy", "config": "expandable",
    "error": "undecodable bytes", "file": "data/notes.txt",
}  # fmt: skip
UNIGRAM, BIGRAM, BUDGET = 6.041, 4.873, 300.0


def dump(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def dump_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_run(folder: Path, texts: dict[str, str] | None = None, steps: int = 1900) -> Path:
    """A finished run below `folder`; `texts` replaces some of `TEXTS`. Without `steps` there are no curves to draw."""
    words = {**TEXTS, **(texts or {})}
    _configuration(folder, words)
    _data(folder, words)
    if steps:
        _pretraining(folder, steps)
    _finetuning(folder, words)
    _serving(folder, words, (1, 8) if steps else (1,))
    for index, (stage, seconds) in enumerate(SECONDS.items()):
        record = {
            "stage": stage, "section": {}, "inputs": {}, "fingerprint": f"{index}f3a9c27d1e84b05", "seconds": seconds,
            "device": "cpu", "versions": VERSIONS, "metrics": {}, 
            "finished": f"2026-11-20T14:{10 + 5 * index}:31+00:00",
        }  # fmt: skip
        dump(folder / stage / "stage.json", record)
    return folder


def _configuration(folder: Path, words: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = f"""# folder: /home/someone/private/configs
name: {words["run"]}
corpus:
  sources: [python-docs, {words["file"]}]
  held_out: 0.02
tokenizer: {{vocab_size: 8192}}
shards: {{length: 128}}
pretrain:
  arch: modern 4x256 heads=4 ffn=640
  budget: 5m
  batch_size: 32
  optimizer: muon
  learning_rate: 0.003
  mask: {{rate: [0.3, 0.15]}}
  optimizer_options: {{note: "{words["config"]}"}}
finetune: {{tasks: [python-docs], seeds: [0, 1, 2]}}
export: {{}}
bench: {{}}
report: {{}}
"""
    (folder / "run.yaml").write_text(text, encoding="utf-8")


def _data(folder: Path, words: dict[str, str]) -> None:
    dropped = {"duplicate": 3127, "too short": 5204, words["error"]: 12}
    sources = [
        {
            "path": "python-docs",
            "read": 69155,
            "documents": 60812,
            "characters": 30_100_442,
            "dropped": dropped,
            "repaired": {"control characters": 41},
        },
        {"path": words["file"], "read": 661, "documents": 653, "characters": 812_345, "dropped": {"duplicate": 8}},
    ]
    dump(folder / "corpus" / "index.json", {
        "format": 1, "files": [], "documents": 61465, "held_out_documents": 1229, "characters": 30_912_787,
        "sources": sources, "licence": "various (installed packages)", "held_out": 0.02,
    })  # fmt: skip
    dump_lines(folder / "corpus" / "dropped.jsonl", [
        {"where": f"{words['file']}:{line}", "reason": words["error"]} for line in (17, 230)
    ])  # fmt: skip
    _tokenizer(folder / "tokenizer")
    sets = {"128": {
        "train": {"files": [{"name": "train-00000.bin"}], "rows": 64890, "tokens": 8_246_113, "fill": 0.9928},
        "held_out": {"files": [{"name": "held_out-00000.bin"}], "rows": 1311, "tokens": 166_402, "fill": 0.9916},
    }}  # fmt: skip
    dump(folder / "shards" / "index.json", {"format": 1, "dtype": "uint16", "vocab_size": 8192, "sets": sets})


def _tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]", "[MASK]"], show_progress=False)
    tokenizer.train_from_iterator(
        ["Returns the number of tokens, or raises ValueError if the input is empty."], trainer
    )
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))


def _pretraining(folder: Path, steps: int) -> None:
    chance, rows = random.Random(0), []
    for step in range(1, steps + 1):
        progress = step / steps
        seconds = 14 + (BUDGET - 14) * progress
        mask = 0.3 - 0.15 * progress
        loss = 3.55 + 5.4 * math.exp(-progress * 9) + 0.9 * (1 - progress) + 2 * (mask - 0.15) + chance.gauss(0, 0.12)
        rate = 0.003 * min(1, progress / 0.05) * min(1, (1 - progress) / 0.6)
        speed = 25400 + chance.gauss(0, 500) - (9000 if chance.random() < 0.02 else 0)
        rows.append({
            "step": step, "progress": progress, "seconds": seconds, "tokens": step * 32 * 127, "loss": loss,
            "learning_rate": rate, "grad_norm": 1 + chance.random(), "tokens_per_second": speed, "mask_rate": mask,
        })  # fmt: skip
        if step == 1000:
            rows.append({"step": step, "progress": progress, "event": "step skipped: loss nan, gradient norm nan"})
        if step % 95 == 0 or step in (20, 45):
            held_out = 3.42 + 5.2 * math.exp(-progress * 9) + 0.85 * (1 - progress)
            rows.append({
                "step": step, "progress": progress, "seconds": seconds, "tokens": step * 32 * 127,
                "validation_loss": held_out, "validation_accuracy": max(0.02, 0.44 - 0.08 * (held_out - 3.42)),
            })  # fmt: skip
    dump_lines(folder / "pretrain" / "metrics.jsonl", rows)
    dump(folder / "pretrain" / "summary.json", {
        "arch": "modern 4x256 heads=4 ffn=640", "arch_json": {}, "parameters": 5_120_256,
        "embedding_parameters": 2_097_152, "encoder_parameters": 3_023_104, "flops_per_token": 2.31e7,
        "tokens": steps * 32 * 127, "steps": steps, "epochs": 0.937, "ended": "budget", "ranks": 1, "seconds": BUDGET,
        "cost_seconds": {"train": 262.4, "wait": 1.1, "validation": 16.8, "checkpoint": 5.7, "compile": 0.0,
                         "setup": 14.0},
        "tokens_per_second": 25300.0, "flop_utilisation_of_measured_ceiling": 0.588, "ceiling_flops": 9.93e11,
        "device": "AMD EPYC 9B45", "cpu": "AMD EPYC 9B45", "threads": 2,
        "precision": "bf16", "micro_batch": 32, "compile": False, "final_validation_loss": 3.421,
        "final_validation_accuracy": 0.4398, "unigram_nll": UNIGRAM, "bigram_nll": BIGRAM, "masked_accuracy": 0.4398,
    })  # fmt: skip


def _finetuning(folder: Path, words: dict[str, str]) -> None:
    values = {"pretrained": [0.6260, 0.6163, 0.6308], "random": [0.4512, 0.4731, 0.4368]}
    ends = {"pretrained": [0.6058, 0.6429], "random": [0.4083, 0.4991]}
    rows = [
        {"task": "python-docs", "title": words["task"], "type": "classification", "metric": words["metric"],
         "init": init,
         "seeds": [0, 1, 2], "values": each, "mean": sum(each) / 3, "std": 0.0074 if init == "pretrained" else 0.0183,
         "interval": ends[init], "all_metrics": {"accuracy": {"mean": sum(each) / 3, "std": 0.01},
         "macro_f1": {"mean": sum(each) / 3 - 0.02, "std": 0.011}}, "train_examples": 1200, "dev_examples": 400,
         "majority_baseline": 0.125, "labels": [words["label"], "numpy"]}
        for init, each in values.items()
    ]  # fmt: skip
    rows[0]["gain"] = {"mean": 0.1707, "interval": [0.1143, 0.2271]}
    dump(folder / "finetune" / "results.json", rows)
    for init, each in values.items():
        for seed, value in enumerate(each):
            dump(folder / "finetune" / "python-docs" / f"{init}-seed{seed}" / "result.json", {"value": value})


def _serving(folder: Path, words: dict[str, str], batches: tuple[int, ...]) -> None:
    dump(folder / "export" / "export.json", {"parameters": 5_120_256, "formats": {
        "hf": {"bytes": 20_493_111, "stock": False, "why_not_stock": "QK-norm has no place in ModernBertModel",
               "class": "FrugalForMaskedLM", "max_abs_difference": 0.0},
        "onnx": {"bytes": 20_611_870, "max_abs_difference": 2.6e-6},
        "onnx-int8": {"bytes": 5_402_118, "max_abs_difference": 0.412, "mean_cosine": 0.99871, "measured_on":
                      "held-out text", "masked_tokens": 2120, "masked_accuracy": 0.4316, "masked_accuracy_drop": 0.0042,
                      "dev_metric_drop": {words["task"]: {"metric": "accuracy", "fp32": 0.626, "int8": 0.6225}}},
    }})  # fmt: skip
    base = {("torch", 1): 3.9, ("onnx", 1): 2.1, ("onnx-int8", 1): 1.24, ("baseline", 1): 69.4}
    rows = []
    for (kind, threads), first in base.items():
        for batch in batches:
            for length in (32, 128):
                median = first * (0.36 if length == 32 else 1) * (1 if batch == 1 else 6.9)
                rows.append({
                    "model": {"torch": "hf", "baseline": "bert-base"}.get(kind, kind), "kind": kind, "device": "cpu",
                    "processor": "AMD EPYC 9B45", "threads": threads, "batch_size": batch, "length": length,
                    "median_ms": round(median, 4), "p90_ms": round(median * 1.08, 4), "min_ms": round(median * 0.97, 4),
                    "tokens_per_second": round(batch * length / median * 1e3, 1), "repeats": 30,
                    "noisy": kind == "baseline" and batch == 8 and length == 128,
                })  # fmt: skip
    dump_lines(folder / "bench" / "latency.jsonl", rows)


@pytest.fixture(scope="session")
def finished_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page about a finished run, written once."""
    return render(make_run(tmp_path_factory.mktemp("runs") / "quickstart"))
