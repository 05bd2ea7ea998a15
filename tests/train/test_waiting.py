"""What a step waits for on a device that works while the host goes on: one reading of its numbers.

The device here is one from which nothing can be read at all; the shards lie on it, rows are masked on it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from frugalbert.config import Machine
from frugalbert.train import pretrain, step
from frugalbert.train.state import Run
from tests.train import small_run


def prepared(folder: Path, **values: Any) -> Run:
    inputs = small_run.prepare(folder)
    section = small_run.section(optimizer="muon", **values)
    machine = Machine(device="cpu", threads=1, micro_batch=4)
    out = folder / "pretrain"
    out.mkdir()
    return pretrain.prepare(section, inputs, out, machine, pretrain.maker(section, inputs), torch.device("meta"))[0]


@pytest.mark.parametrize(
    "values",
    [
        {"clip_norm": 0.5},
        {"isolate_documents": False, "mask": {"style": "bert", "whole_words": True, "rate": [0.3, 0.15]}},
        {"objective": "rtd", "dropout": 0.1},
        {"arch": "bert 2x32 heads=2 ffn=48 max_length=64", "mask": {"copies": 2}},
    ],
)
def test_a_step_reads_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]):
    run, asked = prepared(tmp_path, **values), list[int]()
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: asked.append(len(tensor)) or [1.0] * len(tensor))
    for _ in range(2):
        step.take_step(run)
    figures = 3 if values.get("objective") == "rtd" else 1
    assert (run.state.step, asked) == (2, [figures + 2] * 2)  # and the norm, and the number of tokens
    assert {tensor.device.type for tensor in run.model.parameters()} == {"meta"}


def test_nothing_else_can_be_read(tmp_path: Path):
    run = prepared(tmp_path)
    plain = run.objective
    run.objective = lambda *given: {name: value * bool(value > 0) for name, value in plain(*given).items()}
    with pytest.raises(RuntimeError, match="meta"):
        step.take_step(run)
