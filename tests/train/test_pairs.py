"""Sentence pairs in the stage: their loss falls beside that of the words, runs continue, ranks agree, models load."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from frugalbert.config import Machine, Shards
from frugalbert.data import shards
from frugalbert.model.modeling import FrugalForMaskedLM, FrugalForPairs, FrugalForSequenceClassification
from frugalbert.train import pretrain
from frugalbert.train.objectives import MaskedLM
from tests.data.small_shards import small_tokenizer, write_corpus
from tests.train import small_run, toy
from tests.train.test_pretrain import sampler_of
from tests.train.test_ranks import launch

BERT = "bert 1x32 heads=2 ffn=48 max_length=64"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Documents that go through the alphabet, sentence by sentence: which of two parts was first can be seen."""
    folder, rng = tmp_path_factory.mktemp("pairs"), random.Random(0)
    words = [f"{letter}{letter}" for letter in "abcdefghijklmnopqrst"]
    texts = [
        " ".join(" ".join(rng.choices(words[place : place + 4], k=3)).capitalize() + "." for place in range(0, 16, 2))
        for _ in range(300)
    ]
    small_tokenizer("wordpiece", texts, 80).save_pretrained(folder / "tokenizer")
    (folder / "corpus").mkdir()
    write_corpus(folder / "corpus", [[(text, place % 5 == 3) for place, text in enumerate(texts)]])
    (folder / "shards").mkdir()
    section = Shards.model_validate({"length": [16, 32], "pack": False, "pairs": "sop"})
    places = {"shards": folder / "shards", "tokenizer": folder / "tokenizer", "yaml": folder}
    shards.build(section, {**places, "corpus": folder / "corpus"}, folder / "shards", Machine(workers=1))
    return places


RARELY = {"every": "10000steps"}


def curve_of(out: Path) -> list[dict[str, Any]]:
    return [line for line in toy.lines(out) if "pair_loss" in line]


LEARNS = {"batch_size": 32, "learning_rate": 1e-2, "validation": {"every": 0.5, "rows": 60}}


@pytest.fixture(scope="module")
def trained(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    small_run.run(inputs, out, {"micro_batch": 32}, arch=BERT, budget="300steps", checkpoints=RARELY, **LEARNS)
    return out


def test_the_loss_of_the_pairs_falls(trained: Path):
    lines, summary = curve_of(trained), json.loads((trained / "summary.json").read_text())
    first, last = (np.mean([line["pair_loss"] for line in part]) for part in (lines[:20], lines[-20:]))
    assert first > 0.6
    assert last < 0.2
    for line in lines:
        assert line["loss"] == pytest.approx(line["masked_loss"] + line["pair_loss"], rel=1e-5)
    measured = summary["final_validation"]
    assert measured["validation_pair_accuracy"] > 0.85
    assert measured["validation_pair_loss"] < 0.4
    assert summary["final_validation_loss"] == measured["validation_loss"] > 1.0


def test_the_pooler_is_what_fine_tuning_begins_with(trained: Path):
    weights = FrugalForPairs.from_pretrained(trained / "model").state_dict()
    tuned = FrugalForSequenceClassification.from_pretrained(trained / "model").state_dict()
    assert torch.equal(tuned["model.pooler.weight"], weights["model.pooler.weight"])
    before = FrugalForPairs.from_pretrained(trained / "checkpoints" / "step-00000000").state_dict()
    assert (weights["model.pooler.weight"] - before["model.pooler.weight"]).abs().mean() > 0.01
    words = FrugalForMaskedLM.from_pretrained(trained / "model").state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in words.items())


def test_a_weight_of_0_is_masked_words_alone(inputs: dict[str, Path], tmp_path: Path):
    small_run.run(inputs, tmp_path, arch=BERT, budget="3steps", pair_weight=0.0)
    assert not curve_of(tmp_path)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["architectures"] == ["FrugalForMaskedLM"]


def test_segments_need_types_of_tokens(inputs: dict[str, Path], tmp_path: Path):
    with pytest.raises(ValueError, match="need token_types=2"):
        small_run.run(inputs, tmp_path, arch=BERT + " token_types=1")


def test_micro_batches_add_up(inputs: dict[str, Path]):
    """Shares of rows and of masked tokens: the gradient of the parts is that of the whole batch."""
    sampler = sampler_of(inputs, arch=BERT, batch_size=7)
    words = sampler.vocabulary
    model = pretrain.make_model(small_run.section(arch=BERT), inputs["yaml"], 16, words, pairs=True)
    found = []
    for at_once in (7, 3):
        model.zero_grad()
        sums: dict[str, float] = {}
        for micro in sampler.draw(0.0, {}, at_once).micros:
            figures = MaskedLM(True, 0.5)(model, micro, 0.0)
            figures["loss"].backward()
            sums = {name: sums.get(name, 0.0) + value.item() for name, value in figures.items()}
        found.append((sums, model.pair.weight.grad.clone(), model.model.embeddings.token_type.weight.grad.clone()))
    (sums, *whole), (others, *parts) = found
    assert others == pytest.approx(sums, rel=1e-5)
    assert sums["loss"] == pytest.approx(sums["masked_loss"] + 0.5 * sums["pair_loss"], rel=1e-6)
    for one, two in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-4)


# ---- runs ------------------------------------------------------------------------------------------------------------

CHANGING = {
    "arch": BERT, "dropout": 0.1, "optimizer": "lamb", "curve": "poly", "warmup": 0.3, "stop_at": 1.0,
    "optimizer_options": {"minimum_ratio": 0.0, "maximum_ratio": 0.0, "trust_undecayed": False},
    "phases": [{"length": 32, "share": 0.4, "learning_rate": 2e-3, "warmup": 0.2, "batch_size": 6}],
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    small_run.run(inputs, out, **CHANGING)
    return out


@pytest.mark.parametrize("share", [0.5, 0.75])
def test_a_run_continues_through_the_change_of_phase(
    inputs: dict[str, Path], whole: Path, tmp_path: Path, share: float
):
    """Stopped before it and after it: weights and figures end as those of the whole run, bit for bit."""
    small_run.run(inputs, tmp_path, **CHANGING | {"stop_at": share})
    assert (tmp_path / "model/model.safetensors").read_bytes() != (whole / "model/model.safetensors").read_bytes()
    small_run.run(inputs, tmp_path, **CHANGING)
    for name in ("model.safetensors", "training.safetensors"):
        path = f"checkpoints/step-00000020/{name}"
        assert (tmp_path / path).read_bytes() == (whole / path).read_bytes()


@pytest.mark.slow
def test_two_ranks_are_one(inputs: dict[str, Path], whole: Path, tmp_path: Path):
    """Shares of rows over ranks with unequal parts; without dropout, which each rank draws for itself."""
    options = CHANGING | {"dropout": 0.0, "batch_size": 7, "budget": "10steps"}
    small_run.run(inputs, tmp_path / "one", **options)
    place = [sys.executable, "-m", "tests.train.small_run", str(inputs["yaml"]), str(tmp_path / "two")]
    launch(tmp_path, 2, command=[*place, json.dumps(options)])
    one, two = (curve_of(tmp_path / name) for name in ("one", "two"))
    for name in ("loss", "masked_loss", "pair_loss"):
        assert [line[name] for line in two] == pytest.approx([line[name] for line in one], abs=2e-4)
    assert len(one) == 10


def test_begins_with_berts_own_pre_training(inputs: dict[str, Path], tmp_path: Path):
    """A published checkpoint can be trained on, next-sentence head and pooler included (NVIDIA's #651)."""
    from transformers import BertConfig, BertForPreTraining

    words = sampler_of(inputs, arch=BERT).vocabulary
    config = BertConfig(vocab_size=words.size, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=48, max_position_embeddings=64)  # fmt: skip
    stock = BertForPreTraining(config).eval()
    stock.save_pretrained(tmp_path / "stock")
    section = small_run.section(arch=BERT, start="stock")
    model = pretrain.make_model(section, tmp_path, 32, words, pairs=True).eval()
    ids = torch.randint(5, words.size, (2, 16))
    with torch.no_grad():
        expected, found = stock(input_ids=ids), model(input_ids=ids)
    torch.testing.assert_close(found.pair_logits, expected.seq_relationship_logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.logits, expected.prediction_logits, atol=1e-5, rtol=1e-5)


# ---- later stages ----------------------------------------------------------------------------------------------------


def test_it_is_exported_with_its_pooler(trained: Path, inputs: dict[str, Path], tmp_path: Path):
    """As stock BertForPreTraining, whose encoder others fine-tune; the card and int8 know its words."""
    from transformers import AutoModel

    from frugalbert.config import Export
    from frugalbert.measure.export import export_model

    export_model(trained / "model", Export(formats=("hf",)), tmp_path / "export")
    said = json.loads((tmp_path / "export" / "export.json").read_text())
    assert said["formats"]["hf"]["class"] == "BertForPreTraining"
    encoder = AutoModel.from_pretrained(tmp_path / "export" / "hf")
    weights = FrugalForPairs.from_pretrained(trained / "model").state_dict()
    assert torch.equal(encoder.pooler.dense.weight, weights["model.pooler.weight"])
    assert "fill-mask" in (tmp_path / "export" / "hf" / "README.md").read_text()
