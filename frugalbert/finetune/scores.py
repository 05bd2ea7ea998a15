"""Figures of tasks in; board scores with the sentence that defines them, and bootstrap intervals over examples, out.

Boards: GLUE (arXiv 1804.07461), SuperGLUE (1905.00537), and the plain mean of nine columns of 24hBERT (2104.07705); the
three must never be mixed in one comparison. Intervals: percentiles of resampled examples (Efron 1979), paired for the
difference of two models on the same examples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from frugalbert.finetune import metrics
from frugalbert.finetune.metrics import Array, Resampled

if TYPE_CHECKING:
    from frugalbert.finetune.tasks import Example

CELLS = 4_000_000  # of the matrix of resamples that is in memory at a time


@dataclass(frozen=True)
class Board:
    """`columns` = (title, row of our task table, metrics whose mean is the column); the score is their mean."""

    title: str
    definition: str
    columns: tuple[tuple[str, str, tuple[str, ...]], ...]


@dataclass(frozen=True)
class BoardScore:
    """`value` is None if a column is missing; `mean` is over the columns that are there, None if there is none."""

    board: str
    value: float | None
    mean: float | None
    missing: tuple[str, ...]
    sentence: str


def _columns(text: str) -> tuple[tuple[str, str, tuple[str, ...]], ...]:
    """`CoLA=cola:mcc …`, several metrics joined by `+`."""
    rows = (part.replace(":", "=").split("=") for part in text.split())
    return tuple((title, task, tuple(names.split("+"))) for title, task, names in rows)


BOARDS = {
    "glue": Board(
        "GLUE leaderboard score",
        "mean over the 9 tasks; the two metrics of MRPC, QQP and STS-B averaged, MNLI-m and -mm averaged to one, WNLI "
        "in, AX out",
        _columns(
            "CoLA=cola:mcc SST-2=sst2:accuracy MRPC=mrpc:f1+accuracy STS-B=stsb:pearson+spearman QQP=qqp:f1+accuracy "
            "MNLI=mnli:accuracy+accuracy_mismatched QNLI=qnli:accuracy RTE=rte:accuracy WNLI=wnli:accuracy"
        ),
    ),
    "24hbert": Board(
        "24hBERT mean",
        "plain mean of 9 columns, one metric each: MNLI-m, MNLI-mm, QNLI, RTE and SST-2 accuracy, QQP and MRPC F1, "
        "CoLA MCC, STS-B Spearman; no WNLI; not GLUE's leaderboard score",
        _columns(
            "MNLI-m=mnli:accuracy MNLI-mm=mnli:accuracy_mismatched QNLI=qnli:accuracy QQP=qqp:f1 RTE=rte:accuracy "
            "SST-2=sst2:accuracy MRPC=mrpc:f1 CoLA=cola:mcc STS-B=stsb:spearman"
        ),
    ),
    "superglue": Board(
        "SuperGLUE leaderboard score",
        "mean over the 8 tasks; the two metrics of CB, MultiRC and ReCoRD averaged, AX-b and AX-g out",
        _columns(
            "BoolQ=boolq:accuracy CB=cb:macro_f1+accuracy COPA=copa:accuracy MultiRC=multirc:f1a+em "
            "ReCoRD=record:record_f1+record_em RTE=superglue-rte:accuracy WiC=wic:accuracy WSC=wsc:accuracy"
        ),
    ),
}


def board_score(name: str, results: Mapping[str, Mapping[str, float | None]]) -> BoardScore:
    """The score of one of `BOARDS` from {task: {metric: value}}, in whatever scale the values have.

    A task, or a metric of it, that is absent or undefined (None, NaN) leaves the board without a score; the sentence
    says which.
    """
    board = BOARDS[name]
    values: dict[str, float] = {}
    for title, task, names in board.columns:
        given = [results.get(task, {}).get(metric) for metric in names]
        known = [value for value in given if value is not None and not math.isnan(value)]
        if len(known) == len(names):
            values[title] = sum(known) / len(known)
    missing = tuple(title for title, _, _ in board.columns if title not in values)
    mean = sum(values.values()) / len(values) if values else None
    if not missing:
        return BoardScore(name, mean, mean, (), f"{board.title}: {board.definition}.")
    rest = f"; the mean over the {len(values)} that are there is no leaderboard score" if values else ""
    sentence = f"No {board.title} ({board.definition}): missing or undefined are {', '.join(missing)}{rest}."
    return BoardScore(name, None, mean, missing, sentence)


# ---- intervals ------------------------------------------------------------------------------------------------------


def draws(score: Resampled, n: int, seed: int, resamples: int = 1000, groups: Sequence[str] = ()) -> Array:
    """(resamples,) values of a score of `n` examples under resampling of them with replacement.

    `score` takes (R, n): how often each example was drawn. `groups` (n): examples of one group are drawn together.
    """
    generator = np.random.default_rng(seed)
    places = np.unique(np.asarray(groups), return_inverse=True)[1] if len(groups) else None
    units = n if places is None else int(places.max()) + 1
    step = max(1, CELLS // n)
    parts = []
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = generator.integers(0, units, (rows, units)) + np.arange(rows)[:, None] * units
        counts = np.bincount(drawn.ravel(), minlength=rows * units).reshape(rows, units).astype(float)
        parts.append(score(counts if places is None else counts[:, places]))
    return np.concatenate(parts)


def bounds(values: Array, level: float = 0.95) -> tuple[float, float]:
    """The percentile interval; resamples in which the score is not defined are left out, NaN if it never is."""
    known = values[~np.isnan(values)]
    if not len(known):
        return math.nan, math.nan
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class Part:
    """A set and what models say of it: `predictions`, one for each seed, as `metrics.score` takes them."""

    names: Sequence[str]
    examples: Sequence[Example]
    predictions: Sequence[Any]
    labels: Sequence[str]


def resamples_of(parts: Sequence[Part], seed: int = 0, resamples: int = 1000) -> Array:
    """(resamples,) values of a headline figure, the mean over parts (MNLI-m and -mm), predictions and metrics, under
    resampling of the examples. Models that saw the same examples get the same resamples, so differences are paired;
    parts are drawn one by one, so that each keeps its size. Empty if there are no examples.
    """
    values = [
        draws(
            _figure(part),
            len(part.examples),
            seed + number,
            resamples,
            [example.group for example in part.examples] if set(part.names) & set(metrics.GROUPED) else (),
        )
        for number, part in enumerate(parts)
        if part.examples
    ]
    return np.mean(values, axis=0) if values else np.zeros(0)


def _figure(part: Part) -> Resampled:
    scores = [
        metrics.resampled(name, part.examples, predicted, part.labels)
        for predicted in part.predictions
        for name in part.names
    ]
    return lambda counts: np.mean([score(counts) for score in scores], axis=0)
