"""What int8 is said to cost: nothing when the outputs are the same, and exactly what was changed when they are not."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from frugalbert.measure import onnx, quality
from frugalbert.measure.models import load_model
from tests.data.small_shards import SPECIAL, random_documents, write_shards
from tests.measure.conftest import SIZES, spread_out


class Session:
    """Computes with PyTorch what an ONNX file would, and then lets `change` have its way."""

    def __init__(self, model: Any, change: Any = lambda values: values) -> None:
        self.model, self.change = onnx.serving_part(model), change

    def get_inputs(self) -> list[SimpleNamespace]:
        names = ["input_ids", "attention_mask", *(["token_type_ids"] if onnx.takes_token_types(self.model) else [])]
        return [SimpleNamespace(name=name, type="tensor(int64)") for name in names]

    def run(self, names: list[str], arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
        with torch.inference_mode():
            outputs = self.model(**{name: torch.from_numpy(value) for name, value in arrays.items()})
        return [self.change(outputs[names[0]].numpy())]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    documents = random_documents(np.random.default_rng(0), 200, 256, mean=20)
    write_shards(tmp_path, documents, lengths=(32, 128), vocab_size=256)
    return tmp_path


def test_held_out_pieces_are_whole_sequences(shards: Path, stock_dir: Path):
    batches, mask = quality.held_out(shards, load_model(stock_dir))
    assert mask == SPECIAL["mask"]
    rows = [
        row[real.bool()]
        for inputs, _ in batches
        for row, real in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]
    assert len(rows) > 20
    for row in rows:
        assert (row[0], row[-1]) == (SPECIAL["cls"], SPECIAL["sep"])
        assert SPECIAL["cls"] not in row[1:]
        assert len(row) <= 32
    for inputs, positions in batches:
        chosen = inputs["input_ids"].flatten()[positions]
        assert not np.isin(chosen, SPECIAL["all"]).any()
        ordinary = int((~np.isin(inputs["input_ids"], SPECIAL["all"])).sum())
        assert abs(len(positions) - ordinary / quality.MASK_EVERY) <= 1


def test_rows_longer_than_the_model_are_not_used(tmp_path: Path, stock_dir: Path):
    write_shards(tmp_path, random_documents(np.random.default_rng(0), 100, 256), lengths=(128,), vocab_size=256)
    assert quality.held_out(tmp_path, load_model(stock_dir))[0] == []


def test_the_head_alone_is_the_models(stock_dir: Path):
    model = load_model(stock_dir)
    inputs = onnx.make_batch(model, (2, 9))
    with torch.inference_mode():
        hidden = model.base_model(**inputs).last_hidden_state
        expected = model(**inputs).logits
    torch.testing.assert_close(quality._head(model, hidden[1]), expected[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=1e-5)  # and it is left as it was


def test_masked_tokens(shards: Path, stock_dir: Path, monkeypatch: pytest.MonkeyPatch):
    model = load_model(stock_dir)
    texts, mask = quality.held_out(shards, model)
    monkeypatch.setattr(quality, "open_session", lambda path: Session(model))
    same = quality.int8_cost(model, Path(), texts, mask)
    assert same["measured_on"] == "held-out text"
    assert (same["masked_agreement"], same["masked_accuracy_drop"]) == (1.0, 0.0)
    assert same["max_abs_difference"] < 1e-5
    assert same["masked_tokens"] == sum(len(positions) for _, positions in texts)
    monkeypatch.setattr(quality, "open_session", lambda path: Session(model, lambda hidden: -hidden))
    other = quality.int8_cost(model, Path(), texts, mask)
    assert other["mean_cosine"] == pytest.approx(-1.0)
    assert other["masked_agreement"] < 0.5
    monkeypatch.setattr(quality, "open_session", lambda path: Session(model))
    plain = quality.int8_cost(model, Path(), [], None)
    assert plain["measured_on"] == "random tokens"
    assert "masked_agreement" not in plain


# ---- tasks ----------------------------------------------------------------------------------------------------------

TOKENS = [{"input_ids": [2, *range(5 + number, 5 + 2 * number), 3]} for number in range(20)]


def classifier(kind: str, labels: list[str]) -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=256, max_position_embeddings=64, problem_type=kind, **SIZES,
        id2label=dict(enumerate(labels)), label2id={name: number for number, name in enumerate(labels)},
    )  # fmt: skip
    return spread_out(BertForSequenceClassification(config))


def own_answer(model: Any, kind: str, ids: list[int]) -> Any:
    """What the model itself says of an example: as its label it makes the model's score perfect."""
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0]
    if kind == "regression":
        return logits[0].item()
    names = model.config.id2label
    if kind == "multi_label_classification":
        return [names[number] for number in names if logits[number] > 0]
    return names[logits.argmax().item()]


@pytest.mark.parametrize(
    ("kind", "labels", "metric"),
    [
        ("single_label_classification", ["a", "b", "c"], "accuracy"),
        ("multi_label_classification", ["a", "b", "c"], "micro_f1"),
        ("regression", ["score"], "pearson"),
    ],
)
def test_task_metric_and_its_drop(kind: str, labels: list[str], metric: str, monkeypatch: pytest.MonkeyPatch):
    model = classifier(kind, labels)
    examples = [{**tokens, "gold": own_answer(model, kind, tokens["input_ids"])} for tokens in TOKENS]
    monkeypatch.setattr(quality, "open_session", lambda path: Session(model))
    same = quality.task_cost(model, Path(), examples)
    expected = {"metric": metric, "fp32": 1.0, "int8": 1.0, "drop": 0.0, "agreement": 1.0, "examples": 20}
    assert same == pytest.approx(expected)
    monkeypatch.setattr(quality, "open_session", lambda path: Session(model, lambda logits: -logits))
    other = quality.task_cost(model, Path(), examples)
    assert other["fp32"] == pytest.approx(1.0)
    assert other["int8"] < 0.5
    assert other["drop"] == pytest.approx(other["fp32"] - other["int8"])
    assert other["agreement"] < 0.5


def test_padding_of_examples():
    model = classifier("single_label_classification", ["a", "b"])
    examples = [{"input_ids": [2, 7, 3], "token_type_ids": [0, 1, 1]}, {"input_ids": [2, 3]}]
    batch = quality._padded(examples, model)
    assert batch["input_ids"].tolist() == [[2, 7, 3], [2, 3, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["token_type_ids"].tolist() == [[0, 1, 1], [0, 0, 0]]


def test_examples_are_spread_over_the_file(tmp_path: Path):
    folder = tmp_path / "task"
    (folder / "pretrained-seed3").mkdir(parents=True)
    assert quality.task_examples(tmp_path, "task") == []
    lines = [json.dumps({"input_ids": [number]}) for number in range(2000)]
    answers = [json.dumps({"gold": f"label {number}"}) for number in range(2000)]
    (folder / "dev-tokens.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "pretrained-seed3" / "predictions.jsonl").write_text("\n".join(answers) + "\n")
    assert quality.task_examples(tmp_path, "task") == []  # the kept model's trial is seed 0's unless it says otherwise
    (folder / "model.json").write_text(json.dumps({"trial": "pretrained-seed3"}))
    found = quality.task_examples(tmp_path, "task")
    numbers = [example["input_ids"][0] for example in found]
    assert (len(numbers), numbers[0]) == (512, 0)
    assert numbers[-1] > 1990
    assert found[7]["gold"] == f"label {numbers[7]}"
    for text in ('{"gold": "torn', "", "7"):
        (folder / "pretrained-seed3" / "predictions.jsonl").write_text(text)
        with pytest.raises(ValueError, match="do not belong together or are damaged"):
            quality.task_examples(tmp_path, "task")
