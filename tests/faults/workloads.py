"""The kinds of work that are killed and continued: small, on real files, each with a digest of what it leaves."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frugalbert.budget import Budget
from frugalbert.config import Checkpoints, Machine, Shards
from frugalbert.data import corpus, packing, parts, shards
from frugalbert.finetune import agora_trials, trial
from frugalbert.run import sha256
from frugalbert.search.evolution import Settings
from frugalbert.train import checkpoint, learned_masks, loop, probe, state, step, teacher_cache
from tests.data import small_shards, test_corpus, test_pairs, test_shards
from tests.finetune import conftest as tiny_bert
from tests.finetune import test_agora_trials, test_runner
from tests.search import toy as toy_search
from tests.train import small_run, super_run, test_distillation, toy

Hooks = list[tuple[Any, str]]
TRAINING: Hooks = [
    (probe, "settle"), (loop, "observe"), (loop, "take_step"), (loop, "_validation"), (loop, "write_line"),
    (step, "write_line"), (loop, "write_weights"), (state, "whole_weights"), (step, "_apply"), (step, "accumulate"),
    (checkpoint, "prune"),
]  # fmt: skip
SHORT = {"budget": "6steps", "checkpoints": {"every": "2steps", "markers": [0.5]}, "dropout": 0.1}


@dataclass(frozen=True)
class Workload:
    """`prepare(common)` makes what all runs read; `run(common, out)` works or goes on and returns a digest of all that
    a finished run leaves; before each call of a hook it may be killed."""

    prepare: Callable[[Path], Any]
    run: Callable[[Path, Path], str]
    hooks: Hooks


def nothing(common: Path) -> None:
    pass


def digest(out: Path, *patterns: str) -> str:
    """Of the files of these patterns and of the metrics without the wall clock."""
    found = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in out.glob(pattern)}):
        found.update(f"{path.relative_to(out)} {sha256(path)}\n".encode())
    for line in toy.lines(out) if (out / "metrics.jsonl").exists() else []:
        kept = {key: value for key, value in line.items() if key not in (*toy.WALL_CLOCK, "cached_share")}
        found.update(json.dumps(kept, sort_keys=True).encode())
    return found.hexdigest()


# ---- trainings -------------------------------------------------------------------------------------------------------


def bag_of_words(name: str) -> Workload:
    """The loop with every kind of thing to save, on a model that costs nothing."""
    recipe = toy.changed(
        budget=Budget.parse("12steps"),
        checkpoints=Checkpoints(every=Budget.parse("3steps"), markers=(0.5, 0.9), average=2),
    )
    return Workload(nothing, lambda common, out: toy.result(toy.go(out, recipe, name=name)), TRAINING)


def inputs_of(common: Path) -> dict[str, Path]:
    names = ("shards", "tokenizer", "space")
    return {name: common / name for name in names if (common / name).exists()} | {"yaml": common}


def pretraining(common: Path, out: Path) -> str:
    small_run.run(inputs_of(common), out, **SHORT)
    return digest(out, "model/*", "markers/*/model.safetensors")


def teach(common: Path) -> None:
    inputs = small_run.prepare(common)
    small_run.run(inputs, common / "teacher", arch=test_distillation.BIG, budget="10steps")


def distillation(common: Path, out: Path) -> str:
    settings = {"top_k": 4, "cache": str(out / "cache")}
    mask = {"rate": 0.15, "copies": 2}
    test_distillation.distilled(inputs_of(common), out, settings, mask=mask, **SHORT)
    return digest(out, "model/*", "markers/*/model.safetensors")


def super_network(common: Path, out: Path) -> str:
    super_run.run(inputs_of(common), out, sampling="random", inplace_weight=0.5, **SHORT)
    return digest(out, "model/*", "markers/*/model.safetensors")


def masks(common: Path, out: Path) -> str:
    import numpy as np

    small_run.run(inputs_of(common), out, structure="toeplitz", density=0.3, **SHORT)
    logits = np.load(out / "masks.npz")["logits"].tobytes()
    return digest(out, "arch.json", "masks.json", "model/model.safetensors") + hashlib.sha256(logits).hexdigest()


# ---- fine-tuning -----------------------------------------------------------------------------------------------------


def tiny(common: Path) -> Path:
    return tiny_bert.make_tiny(common / "tiny", tiny_bert.sentences(200, 0))


def fine_tuning(common: Path, out: Path) -> str:
    given = test_runner.section(common / "tiny", [test_runner.write_task(common, count=24)])
    test_runner.build(out, given, common)
    return json.dumps(test_runner.contents(out), sort_keys=True)


def agora(common: Path, out: Path) -> str:
    light = {"settings": {"learning_rate": [3e-3, 1e-2], "epochs": [1]}}
    section = test_agora_trials.section(common / "tiny", seeds=[3], agora=light)
    job = test_agora_trials.open_job(section, common, common / "tiny")
    students, _ = test_agora_trials.students_of(job)
    return test_agora_trials.same(test_agora_trials.build(job, common, out, students))


# ---- data ------------------------------------------------------------------------------------------------------------


def read_corpus(common: Path, out: Path) -> str:
    parts.PART_CHARACTERS, corpus.UNIT_BYTES = 2000, 3000
    test_corpus.build(common, out, test_corpus.as_config(test_corpus.SOURCES))
    return digest(out, "documents-*", "index.json", "dropped.jsonl", "identity")


def write_texts(common: Path) -> None:
    generator = random.Random(0)
    documents = [(test_pairs.story(generator, number), number % 5 == 3) for number in range(60)]
    small_shards.small_tokenizer("wordpiece", [text for text, _ in documents], 120).save_pretrained(
        common / "tokenizer"
    )
    (common / "corpus").mkdir()
    small_shards.write_corpus(common / "corpus", [documents[:50], documents[50:51], documents[51:54]])


def packing_rows(common: Path, out: Path, section: Shards) -> str:
    shards.build(section, {name: common / name for name in ("corpus", "tokenizer")}, out, Machine(workers=1))
    return json.dumps(test_shards.hashes(out), sort_keys=True)


# ---- search ----------------------------------------------------------------------------------------------------------


def searching(common: Path, out: Path) -> str:
    settings = Settings("evolution", evaluations=20, population=6, journal=out / "journal.jsonl")
    found = toy_search.run(settings)
    return repr((found.candidates, found.best, found.stopped))


ROWS: Hooks = [(packing.RowWriter, "_write")]
WORKLOADS: dict[str, Workload] = {
    "adamw": bag_of_words("adamw"),
    "muon": bag_of_words("muon"),
    "lamb": bag_of_words("lamb"),
    "pretraining": Workload(small_run.prepare, pretraining, TRAINING),
    "distillation": Workload(teach, distillation, [*TRAINING, (teacher_cache.Cache, "write")]),
    "super-network": Workload(super_run.prepare, super_network, TRAINING),
    "attention masks": Workload(small_run.prepare, masks, [*TRAINING, (learned_masks.Masked, "_step")]),
    "fine-tuning": Workload(tiny, fine_tuning, [(trial, "check_stop")]),
    "agora": Workload(lambda common: test_agora_trials.write_task(common, tiny(common)), agora,
                      [(agora_trials, "student"), (trial, "check_stop")]),
    "corpus": Workload(test_corpus.write_mixed, read_corpus, [(parts, "clean")]),
    "shards": Workload(write_texts, lambda common, out: packing_rows(common, out, Shards(length=(16,))), ROWS),
    "pairs": Workload(write_texts, lambda common, out: packing_rows(common, out, test_pairs.section()), ROWS),
    "search": Workload(nothing, searching, [(toy_search, "loss")]),
}  # fmt: skip
"""By name."""
