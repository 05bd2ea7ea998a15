"""What a plan says about choosing an architecture, before and after the stages have run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from frugalbert import plan, plan_training
from frugalbert.config import Config
from frugalbert.model.arch import Arch
from frugalbert.model.cost import forward_flops, parameter_count, training_flops
from frugalbert.progress import number
from frugalbert.space import Space
from frugalbert.train.slices import Sampling

SPACE = {"depth": [1, 2, 3], "hidden": [64, 96, 128], "heads": [1, 2, 4], "head_dim": 32, "ffn": [64, 256, 512]}
YAML: dict[str, Any] = {
    "name": "found", "corpus": {"sources": ["a.txt"]}, "tokenizer": {"vocab_size": 2048}, "shards": {"length": 64},
    "space": SPACE, "supernet": {"budget": "1e6tok", "batch_size": 32}, "latency": {"architectures": 40},
    "search": {"limit": {"latency_ms": 8, "parameters": [1e5, 1e6]}, "budget": "1h"},
    "pretrain": {"budget": "1e6tok", "arch": "from search", "start": "from search"},
}  # fmt: skip


def said(folder: Path, **sections: Any) -> dict[str, str]:
    rows = plan.rows(Config.model_validate(YAML | sections), folder / "run", folder)
    return {name: text for name, _, text in rows}


def test_every_stage_of_a_search_is_described(tmp_path: Path):
    rows = said(tmp_path)
    assert rows["space"] == (
        "81 architectures from bert 1x64 heads=1 head_dim=32 ffn=64 (185k parameters) to bert 3x128 heads=4 ffn=512 "
        "(940k parameters)"
    )
    assert "4 of its slices a step" in rows["supernet"]
    assert "for 1M tokens" in rows["supernet"]
    assert rows["latency"].startswith("40 architectures, 3 readings each: torch on 1 CPU thread, 1 x 128 tokens; rough")
    assert rows["search"] == (
        "evolution: 200 evaluations or 1h within latency ms at most 8, parameters 100k to 1M; by loss on 256 rows"
    )
    tuned = {"limit": {"speedup": 2}, "quality": "finetune", "finetune": {"tasks": ["cola", "rte"]}}
    assert said(tmp_path, search=tuned)["search"].endswith("within speedup at least 2; by cola, rte fine-tuned")
    small = said(tmp_path, space=SPACE | {"depth": 1, "hidden": 64}, latency={"architectures": 40})
    assert small["latency"].startswith("9 architectures")


def test_the_largest_is_the_bound_until_something_is_found(tmp_path: Path):
    assert said(tmp_path)["pretrain"].startswith("from search, at most bert 3x128 heads=4 ffn=512, 942k parameters")
    record = {
        "stage": "search",
        "section": {},
        "inputs": {},
        "fingerprint": "x",
        "seconds": 1.0,
        "metrics": {"arch": "bert 2x64 heads=2 ffn=256"},
    }
    (tmp_path / "run" / "search").mkdir(parents=True)
    (tmp_path / "run" / "search" / "stage.json").write_text(json.dumps(record))
    assert said(tmp_path)["pretrain"].startswith("bert 2x64 heads=2 ffn=256, ")


def test_sizes_that_tensor_cores_dislike_are_told(tmp_path: Path):
    """One sentence for a space and for an architecture; none where no GPU will work, and nothing is refused."""
    sentence = " of 8, without which a GPU's tensor cores are slower (multiples of 64 are best)"
    odd = SPACE | {"hidden": [60, 64], "ffn": [64, 90]}
    rows = said(tmp_path, space=odd, pretrain={"budget": "1e6tok", "arch": "autotinybert-kd-s3"})
    assert rows["space"].endswith(f"; hidden 60, ffn 90 are no multiples{sentence}")
    many = said(tmp_path, space=SPACE | {"head_dim": "20..32/2"})["space"]
    assert many.endswith(f"; head_dim 20, head_dim 22, head_dim 26 and 2 more are no multiples{sentence}")
    assert f"; head_dim 23 is no multiple{sentence}, budget" in rows["pretrain"]
    cpu = {"machine": {"device": "cpu"}, "space": odd}
    assert "multiple" not in said(tmp_path, **cpu)["space"]
    assert "multiple" in said(tmp_path, **cpu, latency={"device": "cuda"})["space"]
    assert "multiple" not in said(tmp_path)["space"] + said(tmp_path)["pretrain"]


def test_spaces_of_any_size_are_counted(tmp_path: Path):
    wide = {"depth": 24, "hidden": 64, "heads": "1..12", "head_dim": "16..64", "ffn": "64..3072/8", "mixed": True}
    assert said(tmp_path, space=wide)["space"].startswith("10^128 architectures")


@pytest.mark.parametrize("stratified", [True, False])
@pytest.mark.parametrize("sampling", ["sandwich", "random", "random-linear", "alternate", "all"])
def test_a_step_costs_what_its_architectures_cost(sampling: str, stratified: bool):
    small = SPACE if sampling != "all" else SPACE | {"depth": 1}
    section = Config.model_validate(
        YAML | {"space": small, "supernet": {"budget": "1h", "sampling": sampling, "stratified": stratified}}
    )
    assert section.space
    assert section.supernet
    space = Space.of(section.space)
    draws = Sampling.of(section.supernet, space)
    batches = [draws.draw(position, position / 1000) for position in range(1000 if sampling != "all" else 1)]
    cost = np.mean([sum(training_flops(arch, 2048, 64, 0.15) for arch in batch) for batch in batches])
    assert plan.flops_per_token(section.supernet, space, 2048, 64) == pytest.approx(cost, rel=0.1)


# ---- a teacher -------------------------------------------------------------------------------------------------------


def taught(folder: Path, distill: dict[str, Any], known: dict[str, Any] | None = None, **values: Any) -> str:
    """What is said of `pretrain` with this teacher, before anything has run, or knowing what the stages have found."""
    arch = "modern 2x64 heads=2 ffn=64"
    section = {"budget": "1e6tok", "arch": arch, "objective": "distill", "distill": distill, "mask": {"rate": 0.2}}
    config = Config.model_validate(
        {**{key: YAML[key] for key in ("name", "corpus", "tokenizer", "shards", "space", "supernet")},
         "machine": {"device": "cpu"}, "pretrain": section | values}
    )  # fmt: skip
    return plan._pretrain(config, folder, known or {})


def seconds(text: str) -> float:
    return float(text.split("roughly ")[1].split(" ")[0])


def test_the_teacher_is_named_and_its_forward_pass_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plan_training, "duration", str)
    (tmp_path / "big").mkdir()
    content = {"model_type": "frugalbert", "arch": "modern 4x256 heads=4 ffn=256", "vocab_size": 4096}
    (tmp_path / "big" / "config.json").write_text(json.dumps(content))
    big, small = Arch.parse(content["arch"]), Arch.parse("modern 2x64 heads=2 ffn=64")
    known = {"tokenizer": {"vocab_size": 2048}}
    student = training_flops(small, 2048, 64, 0.2, whole=True)
    speed = dict(plan_training.speeds(Config.model_validate({"name": "x", "machine": {"device": "cpu"}}))).popitem()[1]
    for settings, masked in (({}, 0.2), ({"logits": 0.0, "hidden": 1.0}, 0.0)):
        said = taught(tmp_path, {"teacher": "big", **settings}, known)
        teacher = forward_flops(big, 64, vocab_size=2048, masked=masked, head="mlm")
        assert f"teacher big: modern 4x256 heads=4 ffn=256, {number(parameter_count(big, 4096, 'mlm'))} param" in said
        assert seconds(said) == pytest.approx(1e6 * (student + teacher) / speed)
    elsewhere = taught(tmp_path, {"teacher": "roberta-base"}, known)
    assert "teacher roberta-base (size not known beforehand: not in the pace)" in elsewhere
    assert seconds(elsewhere) == pytest.approx(1e6 * student / speed)
    assert "teacher from supernet: bert 3x128 heads=4 ffn=512" in taught(tmp_path, {"teacher": "from supernet"})


def test_sizes_are_of_the_vocabulary_that_is_loaded(tmp_path: Path):
    """Of a tokenizer on disk, whatever its form; of a hub's it is assumed, and said so."""

    def sizes(path: str) -> dict[str, str]:
        return said(tmp_path, tokenizer={"path": path}, pretrain={"budget": "1h", "arch": "modern 2x64 heads=2 ffn=64"})

    small, words = Arch.parse("modern 2x64 heads=2 ffn=64"), [f"w{number}" for number in range(700)]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    (tmp_path / "own").mkdir()
    for name, vocabulary in (("own", dict.fromkeys(words, 0)), ("list.json", [[word, 0.0] for word in words])):
        file = tmp_path / name / "tokenizer.json" if name == "own" else tmp_path / name
        file.write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": [{"id": 2}, {"id": 702}]}))
    for path, entries in (("vocab.txt", 700), ("own", 703), ("list.json", 703)):
        rows = sizes(path)
        assert rows["tokenizer"] == f"load {path}, {entries} entries"
        assert f"{number(parameter_count(small, entries, 'mlm'))} parameters" in rows["pretrain"]
    rows = sizes("roberta-base")
    assert rows["tokenizer"] == "load roberta-base, size not known beforehand: 30522 assumed"
    assert f"{number(parameter_count(small, 30522, 'mlm'))} parameters" in rows["pretrain"]


def test_a_full_cache_needs_no_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plan, "duration", str)
    kept = {"teacher": "from supernet", "top_k": 16, "cache": "cache"}
    mask = {"rate": 0.2, "copies": 3}
    record = 4 + 13 * (4 + 16 * (2 + 2))  # a sum; for each of 13 masked places the rest, and 16 scores and ids
    assert f"cache cache, {3 * record / 1e3:.3g}kB for each row of 64 tokens" in taught(tmp_path, kept, mask=mask)
    known = {"tokenizer": {"vocab_size": 2048}, "shards": {"rows": 1000, "tokens": 60_000}}
    asked = taught(tmp_path, kept, known, mask=mask)
    assert f"about {number(3000 * record)}B when full" in asked
    wide = taught(tmp_path, kept, {**known, "tokenizer": {"vocab_size": 70_000}}, mask=mask)
    assert f"about {number(3000 * (record + 13 * 16 * 2))}B when full" in wide
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "index.json").write_text("{}")
    there = taught(tmp_path, kept, known, mask=mask)
    assert "(there already)" in there
    assert seconds(there) < seconds(asked) / 2
