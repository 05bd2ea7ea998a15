"""What a plan says about choosing an architecture, before and after the stages have run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from frugalbert import plan
from frugalbert.config import Config
from frugalbert.model.cost import training_flops
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
