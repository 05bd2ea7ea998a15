"""What int8 costs: an ONNX file beside its PyTorch model on held-out text and on a task's development examples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from frugalbert import run
from frugalbert.measure import onnx
from frugalbert.measure.models import max_length
from frugalbert.measure.session import feed, open_session

ROWS = 64
BATCH = 8
EXAMPLES = 512
MASK_EVERY = 7
Batch = dict[str, torch.Tensor]


def held_out(shards: Path, model: Any) -> tuple[list[tuple[Batch, torch.Tensor]], int]:
    """Pieces of held-out documents, each a sequence of its own, where to mask them, and the mask's id.

    Per batch of 8 pieces (inputs, positions (P,) into batch x tokens); every seventh token is one to mask.
    """
    from frugalbert.data.shards import ShardSet

    lengths = sorted(int(length) for length in run.read_json(shards / "index.json")["sets"])
    length = next((length for length in lengths if length <= (max_length(model.config) or length)), None)
    if length is None:
        return [], 0
    rows = ShardSet.open(shards, length, "held_out")
    special = rows.special
    pieces: list[np.ndarray] = []
    for row in np.asarray(rows.ids[:ROWS]).astype(np.int64):
        starts = np.flatnonzero(row == special["cls"])
        ends = [*starts[1:], int((row != special["pad"]).sum())]
        pieces += [row[start:end] for start, end in zip(starts, ends, strict=True) if end - start > 2]
    pieces = sorted(pieces[:ROWS], key=len)
    batches = [_batch(pieces[start : start + BATCH], special, model) for start in range(0, len(pieces), BATCH)]
    return batches, special["mask"]


def _batch(pieces: list[np.ndarray], special: dict[str, Any], model: Any) -> tuple[Batch, torch.Tensor]:
    ids = np.full((len(pieces), max(map(len, pieces))), special["pad"], dtype=np.int64)
    for number, piece in enumerate(pieces):
        ids[number, : len(piece)] = piece
    ordinary = np.flatnonzero(~np.isin(ids, special["all"]))
    inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy((ids != special["pad"]) * 1)}
    if onnx.takes_token_types(model):
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    return inputs, torch.from_numpy(ordinary[MASK_EVERY // 2 :: MASK_EVERY])


def int8_cost(model: Any, path: Path, texts: list[tuple[Batch, torch.Tensor]], mask: int | None) -> dict[str, Any]:
    """Largest difference and mean cosine of the hidden states of an int8 file, on held-out text if there is any.

    For a masked language model also how often both choose the same token for a mask, and the accuracy of both.
    """
    serving = onnx.serving_part(model)
    session = open_session(path)
    batches = [inputs for inputs, _ in texts] or onnx.parity_batches(serving)
    cost: dict[str, Any] = {**onnx.difference(serving, session, batches)}
    cost["measured_on"] = "held-out text" if texts else "random tokens"
    if not texts or mask is None or not type(model).__name__.endswith(("ForMaskedLM", "ForPairs")):
        return cost
    same = right_before = right_after = total = 0
    for inputs, positions in texts:
        labels = inputs["input_ids"].flatten()[positions]
        ids = inputs["input_ids"].flatten().index_fill(0, positions, mask).view_as(inputs["input_ids"])
        before, after = _predictions(model, session, {**inputs, "input_ids": ids}, positions)
        same += int((before == after).sum())
        right_before += int((before == labels).sum())
        right_after += int((after == labels).sum())
        total += len(labels)
        run.check_stop()
    if total:
        cost |= {
            "masked_tokens": total,
            "masked_agreement": same / total,
            "masked_accuracy": right_after / total,
            "masked_accuracy_drop": (right_before - right_after) / total,
        }
    return cost


def _predictions(model: Any, session: Any, inputs: Batch, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens (P,) that PyTorch's and the file's hidden states lead to, both through the model's own head."""
    with torch.inference_mode():
        plain = model.base_model(**inputs).last_hidden_state
    file = torch.from_numpy(session.run(["last_hidden_state"], feed(session, inputs))[0])
    both = [hidden.flatten(0, 1)[positions] for hidden in (plain, file)]
    first, second = (_head(model, hidden).argmax(-1) for hidden in both)
    return first, second


def _head(model: Any, hidden_PD: torch.Tensor) -> torch.Tensor:
    """Scores (P, V) of a masked-LM model's head: its encoder's output is exchanged for `hidden_PD` on the way."""

    def exchange(module: Any, args: Any, output: Any) -> Any:
        output.last_hidden_state = hidden_PD[None]
        return output

    handle = model.base_model.register_forward_hook(exchange)
    try:
        with torch.inference_mode():
            return model(input_ids=torch.zeros((1, 1), dtype=torch.long)).logits[0]
    finally:
        handle.remove()


# ---- fine-tuned models ----------------------------------------------------------------------------------------------


def has_metric(model: Any) -> bool:
    """Whether `task_cost` can measure it: classes, labels or a number for a text (not options, words or answers)."""
    kinds = ("single_label_classification", "multi_label_classification", "regression")
    return type(model).__name__.endswith("ForSequenceClassification") and model.config.problem_type in kinds


def task_examples(finetune: Path, task: str) -> list[dict[str, Any]]:
    """Up to 512 of a task's development examples, evenly from all that the stage `finetune` kept; [] if it kept none.

    `input_ids`, perhaps `token_type_ids`, and `gold`: a class, a list of labels or a number. Raises ValueError for a
    damaged file.
    """
    tokens = finetune / task / "dev-tokens.jsonl"
    about = finetune / task / "model.json"
    kept = run.read_json(about)["trial"] if about.is_file() else "pretrained-seed0"
    answers = sorted((finetune / task).glob(f"{kept}/predictions.jsonl"))
    if not tokens.is_file() or not answers:
        return []
    rows, golds = (path.read_text(encoding="utf-8").splitlines() for path in (tokens, answers[0]))
    count = len(rows)
    chosen = range(count) if count <= EXAMPLES else [number * count // EXAMPLES for number in range(EXAMPLES)]
    try:
        return [{**json.loads(rows[number]), "gold": json.loads(golds[number])["gold"]} for number in chosen]
    except (ValueError, LookupError, TypeError):
        raise ValueError(
            f"{tokens} and {answers[0]} do not belong together or are damaged; build them again (`--redo finetune`)"
        ) from None


def task_cost(model: Any, path: Path, examples: list[dict[str, Any]]) -> dict[str, Any]:
    """A classifier's metric on its development examples, by PyTorch and by its int8 file, and how often they agree.

    Accuracy for classes, micro-averaged F1 for several labels, Pearson's correlation for numbers (agreement: between
    the two).
    """
    session = open_session(path)
    outputs: list[list[np.ndarray]] = [[], []]
    examples = sorted(examples, key=lambda example: len(example["input_ids"]))
    for start in range(0, len(examples), BATCH):
        inputs = _padded(examples[start : start + BATCH], model)
        for found, values in zip(outputs, onnx.outputs_of(model, session, inputs), strict=True):
            found.append(values.numpy())
        run.check_stop()
    kind = model.config.problem_type
    gold = _gold([example["gold"] for example in examples], model.config, kind)
    before, after = (_decide(np.concatenate(found), kind) for found in outputs)
    score = {name: _score(found, gold, kind) for name, found in (("fp32", before), ("int8", after))}
    same = _score(after, before, kind) if kind == "regression" else float(np.mean(before == after))
    name = {"regression": "pearson", "multi_label_classification": "micro_f1"}.get(kind or "", "accuracy")
    return {
        "metric": name,
        **score,
        "drop": score["fp32"] - score["int8"],
        "agreement": same,
        "examples": len(examples),
    }


def _padded(examples: list[dict[str, Any]], model: Any) -> Batch:
    shape = (len(examples), max(len(example["input_ids"]) for example in examples))
    batch = {"input_ids": torch.full(shape, model.config.pad_token_id or 0)}
    batch["attention_mask"] = torch.zeros(shape, dtype=torch.long)
    if onnx.takes_token_types(model):
        batch["token_type_ids"] = torch.zeros(shape, dtype=torch.long)
    for row, example in enumerate(examples):
        length = len(example["input_ids"])
        batch["attention_mask"][row, :length] = 1
        for name in batch.keys() & example.keys():
            batch[name][row, :length] = torch.tensor(example[name])
    return batch


def _gold(golds: list[Any], config: Any, kind: str | None) -> np.ndarray:
    if kind == "regression":
        return np.array(golds, dtype=np.float64)
    if kind == "multi_label_classification":
        return np.array([[config.id2label[number] in gold for number in range(config.num_labels)] for gold in golds])
    return np.array([config.label2id[gold] for gold in golds])


def _decide(logits: np.ndarray, kind: str | None) -> np.ndarray:
    if kind == "regression":
        return logits[:, 0].astype(np.float64)
    return logits > 0 if kind == "multi_label_classification" else logits.argmax(-1)


def _score(found: np.ndarray, gold: np.ndarray, kind: str | None) -> float:
    if kind == "regression":
        with np.errstate(invalid="ignore", divide="ignore"):
            return float(np.nan_to_num(np.corrcoef(found, gold)[0, 1]))
    if kind == "multi_label_classification":
        return float(2 * (found & gold).sum() / max(1, found.sum() + gold.sum()))
    return float(np.mean(found == gold))
