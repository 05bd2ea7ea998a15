"""One head per task type: outputs of the model, the loss they are trained with, and what they predict.

Classification, several labels and regression read `[CLS]` or the model's pooler. A multiple choice scores each option
as an input of its own with one logit, softmax over the options (so their order does not matter). Extractive questions
have two logits per token (Devlin et al. 2019, section 4.2), tags one per class and token. Words to look at (WiC, WSC)
enter as the mean of their pieces' vectors beside `[CLS]` (Wang et al. 2019, SuperGLUE).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from frugalbert.finetune.features import IGNORED, Features, collate

if TYPE_CHECKING:
    from frugalbert.finetune.tasks import Example

SPAN_HEAD = "span_head.safetensors"
N_BEST = 20
"""Starts and ends of an answer that are combined."""
LOWEST = -1e9


class SpanClassifier(nn.Module):
    """`[CLS]` and the mean vectors of S spans -> linear -> classes. `encoder` is any Hugging Face encoder."""

    base_model_prefix = "encoder"

    def __init__(self, encoder: Any, num_spans: int, num_labels: int, dropout: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.config = encoder.config
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear((1 + num_spans) * encoder.config.hidden_size, num_labels)
        nn.init.normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, weights: Tensor, **inputs: Tensor) -> Tensor:
        """`weights` (B, 1 + S, T): how much each token counts in each vector. Logits (B, L)."""
        hidden = self.encoder(**inputs).last_hidden_state
        return self.classifier(self.dropout((weights.to(hidden.dtype) @ hidden).flatten(1)))

    def save_pretrained(self, path: Path) -> None:
        """The encoder as Hugging Face files, the linear layer beside it."""
        from safetensors.torch import save_file

        self.encoder.save_pretrained(path)
        save_file(self.classifier.state_dict(), Path(path) / SPAN_HEAD)


def span_weights(features: Features, rows: np.ndarray[Any, Any], width: int) -> Tensor:
    """(B, 1 + S, width): one row that reads the first token, and one for the mean of each span."""
    assert features.marks is not None
    weights = torch.zeros(len(rows), 1 + len(features.marks[rows[0]]), width)
    weights[:, 0, 0] = 1.0
    for place, row in enumerate(rows):
        for number, (start, end) in enumerate(features.marks[row], 1):
            weights[place, number, start:end] = 1.0 / (end - start)
    return weights


def outputs(model: nn.Module, features: Features, rows: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    """What the model says of some rows: (R, C), or (R, T, C) for tags and (R, T, 2) for answers."""
    batch = collate(features, rows, device)
    if isinstance(model, SpanClassifier):
        return model(span_weights(features, rows, batch["input_ids"].shape[1]).to(device), **batch)
    found = model(**batch)
    if features.kind == "question-answering":
        both = torch.stack((found.start_logits, found.end_logits), -1)
        return both.masked_fill(batch["attention_mask"][:, :, None] == 0, LOWEST)
    return found.logits


@dataclass(frozen=True)
class Loss:
    """Turns outputs into one loss per unit. `class_weights` (C,) or None; regression targets are standardised."""

    features: Features
    class_weights: Tensor | None = None
    mean: float = 0.0
    scale: float = 1.0

    def __call__(self, found: Tensor, units: np.ndarray[Any, Any]) -> Tensor:
        """(U,) losses from the outputs of the units' rows."""
        kind, targets, found = self.features.kind, self.features.targets, found.float()
        if kind == "multiple-choice":
            return self._choice(found.squeeze(-1), units)
        if kind == "question-answering":
            places = torch.from_numpy(targets[units]).to(found.device)
            ends = [functional.cross_entropy(found[..., side], places[:, side], reduction="none") for side in (0, 1)]
            return (ends[0] + ends[1]) / 2
        if kind == "token-classification":
            return self._tags(found, units)
        expected = torch.from_numpy(targets[units]).to(found.device)
        if kind == "classification":
            return functional.cross_entropy(found, expected, weight=self.class_weights, reduction="none")
        if kind == "regression":
            return (found.squeeze(-1) - (expected - self.mean) / self.scale) ** 2
        return functional.binary_cross_entropy_with_logits(found, expected, reduction="none").mean(-1)

    def _choice(self, found: Tensor, units: np.ndarray[Any, Any]) -> Tensor:
        """Minus the log of the share that the right options have together."""
        sizes = (self.features.units[units + 1] - self.features.units[units]).tolist()
        losses = []
        for unit, logits in zip(units, found.split(sizes), strict=True):
            right = logits[list(self.features.targets[unit])]
            losses.append(logits.logsumexp(0) - right.logsumexp(0))
        return torch.stack(losses)

    def _tags(self, found: Tensor, units: np.ndarray[Any, Any]) -> Tensor:
        """Mean over each row's tagged words."""
        expected = torch.full(found.shape[:2], IGNORED)
        for place, unit in enumerate(units):
            tags = self.features.targets[unit]
            expected[place, : len(tags)] = torch.from_numpy(tags)
        expected = expected.to(found.device)
        losses = functional.cross_entropy(
            found.transpose(1, 2), expected, weight=self.class_weights, ignore_index=IGNORED, reduction="none"
        )
        return losses.sum(1) / (expected != IGNORED).sum(1).clamp(min=1)


# ---- from outputs to predictions ------------------------------------------------------------------------------------


def decide(
    kind: str, found: list[Any], features: Features, examples: list[Example], limits: tuple[float, float] | None
) -> Any:
    """Predictions of whole examples from the outputs of their rows (`found[r]` without padding).

    Classes (N,) and right options (N,) as numbers, numbers (N,) within `limits`, labels (N, L) of 0 and 1, tags (N
    lists of numbers). Answers come from `answers`.
    """
    if kind == "multiple-choice":
        starts = features.units
        scores = np.concatenate(found)
        return np.array([scores[a:b].argmax() for a, b in zip(starts[:-1], starts[1:], strict=True)])
    if kind == "token-classification":
        return _tags(found, features, examples)
    table = np.stack(found)
    if kind == "classification":
        return table.argmax(axis=1)
    if kind == "multilabel":
        return (table > 0).astype(np.int64)
    return table[:, 0] if limits is None else table[:, 0].clip(*limits)


def _tags(found: list[Any], features: Features, examples: list[Example]) -> list[list[int]]:
    """The likeliest tag of each word; words that were cut off get tag 0."""
    assert features.marks is not None
    tags = [[0] * len(example.words) for example in examples]
    for row, logits in enumerate(found):
        words = features.marks[row]
        for place in np.flatnonzero(words >= 0):
            tags[features.owner[row]][words[place]] = int(logits[place].argmax())
    return tags


def answers(
    found: list[Any], features: Features, examples: list[Example], longest: int, empty: bool
) -> tuple[list[str], list[float]]:
    """(texts, null odds) of extractive questions: the best span over all windows, as the passage writes it.

    A span starts and ends in the passage, within `longest` tokens. The null odds are the lowest score of `[CLS]` over
    the windows minus the best span's (SQuAD 2.0, arXiv 1806.03822); with `empty` they answer nothing when above 0.
    """
    assert features.marks is not None
    best: list[tuple[float, str]] = [(LOWEST, "")] * len(examples)
    null = np.full(len(examples), np.inf)
    for row, logits in enumerate(found):
        example, offsets = features.owner[row], features.marks[row]
        first = int(np.flatnonzero(offsets[:, 0] < 0)[0]) if (offsets[:, 0] < 0).any() else 0
        null[example] = min(null[example], float(logits[first].sum()))
        score, start, end = best_span(logits, offsets[:, 0] >= 0, longest)
        if score > best[example][0]:
            text = examples[example].text_b or ""
            best[example] = (score, text[offsets[start, 0] : offsets[end, 1]])
    odds = [round(float(null[number] - best[number][0]), 6) for number in range(len(examples))]
    texts = ["" if empty and odd > 0 else text for odd, (_, text) in zip(odds, best, strict=True)]
    return texts, odds


def best_span(logits: Any, inside: Any, longest: int) -> tuple[float, int, int]:
    """(score, first, last) of the best span whose tokens are all `inside`, from the `N_BEST` best starts and ends.

    Args:
        logits: (T, 2) scores of start and end.
        inside: (T,) whether a token belongs to the passage.
    """
    places = np.flatnonzero(inside)
    if not len(places):
        return LOWEST, 0, 0
    starts, ends = (places[np.argsort(-logits[places, side], kind="stable")[:N_BEST]] for side in (0, 1))
    lengths = ends[None, :] - starts[:, None] + 1
    scores = logits[starts, 0][:, None] + logits[ends, 1][None, :]
    scores = np.where((lengths >= 1) & (lengths <= longest), scores, LOWEST)
    top = np.unravel_index(int(scores.argmax()), scores.shape)
    return float(scores[top]), int(starts[top[0]]), int(ends[top[1]])
