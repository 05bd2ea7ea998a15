"""Teachers of classes that we cannot copy: every document as if it stood alone, and the whole stage with one."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from frugalbert.train import stock_teacher
from tests.train import small_run
from tests.train.test_slices import VOCABULARY, make_batch


def distilbert(size: int) -> Any:
    from transformers import DistilBertConfig, DistilBertForMaskedLM

    torch.manual_seed(0)
    config = DistilBertConfig(vocab_size=size, dim=24, n_layers=2, n_heads=2, hidden_dim=32, max_position_embeddings=64)
    return DistilBertForMaskedLM(config).eval()


@pytest.mark.parametrize("isolate", [True, False])
def test_each_document_is_read_as_if_it_stood_alone(isolate: bool):
    model, batch = distilbert(VOCABULARY), make_batch()
    states, logits = stock_teacher.read(model, batch, [0, 2], isolate=isolate)
    assert set(states) == {0, 2}
    assert logits.shape == (len(batch.masked_positions), VOCABULARY)
    documents = batch.document_ids if isolate else (batch.document_ids > 0).long()
    for row in range(3):
        for number in documents[row].unique():
            places = (documents[row] == number).nonzero()[:, 0]
            if number == 0:
                assert not states[2][row, places].any()
                continue
            alone = model(batch.input_ids[row, places][None], output_hidden_states=True)
            torch.testing.assert_close(states[2][row, places], alone.hidden_states[2][0], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(states[0][row, places], alone.hidden_states[0][0], atol=1e-5, rtol=1e-4)
            for slot, place in enumerate(batch.masked_positions.tolist()):
                if place // 10 == row and place % 10 in places.tolist():
                    expected = alone.logits[0, places.tolist().index(place % 10)]
                    torch.testing.assert_close(logits[slot], expected, atol=1e-5, rtol=1e-4)
    other = replace(batch, input_ids=batch.input_ids.masked_fill(batch.document_ids == 0, 9))
    torch.testing.assert_close(stock_teacher.read(model, other, [2], isolate=isolate)[1][:5], logits[:5])


def test_the_stage_learns_from_it(tmp_path: Path):
    inputs = small_run.prepare(tmp_path / "inputs", documents=60)
    size = json.loads((inputs["shards"] / "index.json").read_text())["vocab_size"]
    distilbert(size + 8).save_pretrained(tmp_path / "inputs" / "distil")  # rows that only pad its table
    shutil.copy(inputs["tokenizer"] / "tokenizer.json", tmp_path / "inputs" / "distil")
    values = {"arch": "modern 2x32 heads=2 ffn=48 max_length=64", "objective": "distill", "budget": "8steps",
              "mask": {"rate": 0.15, "copies": 1}}  # fmt: skip
    distil = {"teacher": "distil", "logits": 0.5, "top_k": 8}
    live, cached = tmp_path / "live", tmp_path / "cached"
    small_run.run(inputs, live, distill=distil, **values)
    small_run.run(inputs, cached, distill={**distil, "cache": "cache"}, **values)
    contents = [(out / "model" / "model.safetensors").read_bytes() for out in (live, cached)]
    assert contents[0] == contents[1]
    small_run.run(inputs, tmp_path / "hidden", distill={"teacher": "distil", "hidden": 0.5, "layers": "even"}, **values)
    lines = (tmp_path / "hidden" / "metrics.jsonl").read_text().splitlines()
    assert all({"hidden_loss", "logits_loss"} <= json.loads(line).keys() for line in lines if '"loss"' in line)
    with pytest.raises(ValueError, match="whose attention cannot be read, so relation cannot be compared"):
        small_run.run(inputs, tmp_path / "no", distill={**distil, "relation": 1.0}, **values)
    with pytest.raises(ValueError, match="remove start"):
        small_run.run(inputs, tmp_path / "no", distill=distil, start="from teacher", **values)
