"""Examples with gold labels and the predictions of a whole set in; the official metrics out.

A correlation that is not defined (constant predictions, one example) is NaN, never 0; MCC of constant predictions is 0
and F1 without positives is 0, as scikit-learn and the GLUE server have it. Never computed per batch and averaged: every
example gives addends, and a metric is a function of their sums, which is also what makes bootstrap intervals quick.
Tag spans as conlleval reads them (Tjong Kim Sang and Buchholz 2000), SQuAD and ReCoRD: `squad_metrics.py`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from frugalbert.finetune.squad_metrics import answer_scores, record_scores
from frugalbert.finetune.tables import did_you_mean

if TYPE_CHECKING:
    from frugalbert.finetune.tasks import Example

Array = np.ndarray[Any, Any]
Resampled = Callable[[Array], Array]
"""How often each of N examples is there, (R, N), in; the metric of each of the R resamples, (R,), out."""


@dataclass(frozen=True)
class Metric:
    """`prepare(gold, predicted, examples)` for the task types it is made for."""

    prepare: Callable[[Any, Any, Sequence[Example]], Resampled]
    types: tuple[str, ...]


def _sums(addends: Callable[..., Array], value: Callable[[Array], Array]) -> Callable[..., Resampled]:
    """A metric from the addends (N, K) of the examples and a function of their sums (R, K)."""

    def prepare(gold: Any, predicted: Any, examples: Sequence[Example]) -> Resampled:
        table = addends(gold, predicted, examples)
        return lambda counts: value(counts @ table)

    return prepare


def _ratio(above: Array, below: Array, otherwise: float = math.nan) -> Array:
    return np.where(below == 0, otherwise, above / np.where(below == 0, 1, below))


def _mean(sums: Array) -> Array:
    return _ratio(sums[:, 0], sums[:, 1])


# ---- classes and labels ---------------------------------------------------------------------------------------------


def _right(gold: Any, predicted: Any, _: Sequence[Example]) -> Array:
    """[right, 1] of each example: a class, any of the right options, all labels; of tags [right words, words]."""
    if isinstance(predicted, list):
        pairs = list(zip(gold, predicted, strict=True))
        return np.array([[sum(g == p for g, p in zip(*pair, strict=True)), len(pair[0])] for pair in pairs], float)
    if isinstance(gold, list):
        right = [choice in options for options, choice in zip(gold, predicted.tolist(), strict=True)]
    else:
        right = (gold == predicted) if gold.ndim == 1 else (gold == predicted).all(axis=1)
    return np.column_stack([right, np.ones(len(gold))])


def _hits(gold: Array, predicted: Array, _: Sequence[Example]) -> Array:
    """(N, 3C): for every class or label whether it is gold and predicted, gold, predicted."""
    if gold.ndim == 1:
        eye = np.eye(max(2, int(gold.max()) + 1, int(predicted.max()) + 1))
        gold, predicted = eye[gold], eye[predicted]
    return np.hstack([gold * predicted, gold, predicted]).astype(float)


def _f1(sums: Array) -> Array:
    """(R, C)"""
    hits, gold, found = np.split(sums, 3, axis=1)
    return _ratio(2 * hits, gold + found, 0.0)


def _micro_f1(sums: Array) -> Array:
    return _f1(sums.reshape(len(sums), 3, -1).sum(axis=2))[:, 0]


def _macro_f1(gold: Array, predicted: Array, examples: Sequence[Example]) -> Resampled:
    """Over all labels, or over the classes that occur in gold or predictions."""
    table = _hits(gold, predicted, examples)

    def value(counts: Array) -> Array:
        sums = counts @ table
        _, golds, found = np.split(sums, 3, axis=1)
        return _ratio(_f1(sums).sum(axis=1), ((golds + found > 0) | (gold.ndim == 2)).sum(axis=1), 0.0)

    return value


def _balanced_accuracy(sums: Array) -> Array:
    hits, gold, _ = np.split(sums, 3, axis=1)
    return _ratio(_ratio(hits, gold, 0.0).sum(axis=1), (gold > 0).sum(axis=1))


def _mcc(sums: Array) -> Array:
    """Gorodkin's R_K (2004), for any number of classes."""
    hits, gold, found = np.split(sums, 3, axis=1)
    total = gold.sum(axis=1)
    spread = (total**2 - (gold**2).sum(axis=1)) * (total**2 - (found**2).sum(axis=1))
    return _ratio(hits.sum(axis=1) * total - (gold * found).sum(axis=1), np.sqrt(spread), 0.0)


def _by_group(good: Callable[[Array, Array], bool]) -> Callable[..., Array]:
    """[good, 1] at the first example of every group and 0 at the others; `good(gold, predicted)` of one group."""

    def addends(gold: Array, predicted: Array, examples: Sequence[Example]) -> Array:
        groups: dict[str, list[int]] = {}
        for number, example in enumerate(examples):
            groups.setdefault(example.group, []).append(number)
        if not groups or "" in groups:
            raise ValueError("em and gender_parity are over groups of examples, which these examples do not form")
        table = np.zeros((len(examples), 2))
        for numbers in groups.values():
            table[numbers[0]] = good(gold[numbers], predicted[numbers]), 1
        return table

    return addends


def _part(name: str) -> Callable[..., Array]:
    def addends(gold: Any, predicted: Any, examples: Sequence[Example]) -> Array:
        inside = np.array([[example.group == name] for example in examples])
        return _right(gold, predicted, examples) * inside

    return addends


# ---- numbers --------------------------------------------------------------------------------------------------------


def _standard(values: Array) -> Array:
    """Centred, with variance 1 unless they are constant: sums of squares then lose no digits."""
    values = np.asarray(values, float)
    deviation = values.std() if np.ptp(values) > 0 else 0.0
    return (values - values.mean()) / deviation if deviation else np.zeros(len(values))


def _correlation(cov: Array, x: Array, y: Array, total: Array) -> Array:
    """From co-moments; NaN where one side is constant."""
    least = 1e-12 * total
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where((x > least) & (y > least), np.clip(cov / np.sqrt(x * y), -1.0, 1.0), math.nan)


def _pearson(gold: Array, predicted: Array, _: Sequence[Example]) -> Resampled:
    x, y = _standard(gold), _standard(predicted)
    table = np.column_stack([np.ones(len(x)), x, y, x * x, y * y, x * y])

    def value(counts: Array) -> Array:
        total, sx, sy, xx, yy, xy = (counts @ table).T
        return _correlation(xy - sx * sy / total, xx - sx**2 / total, yy - sy**2 / total, total)

    return value


def _ranks(values: Array, counts: Array) -> Array:
    """(R, N) rank of each value in each resample less the mean rank; equal values share theirs."""
    _, places, sizes = np.unique(values, return_inverse=True, return_counts=True)
    order, starts = np.argsort(places, kind="stable"), np.cumsum(sizes) - sizes
    totals = np.add.reduceat(counts[:, order], starts, axis=1)
    middle = np.cumsum(totals, axis=1) - (totals - 1) / 2
    return middle[:, places] - (counts.sum(axis=1, keepdims=True) + 1) / 2


def _spearman(gold: Array, predicted: Array, _: Sequence[Example]) -> Resampled:
    if not np.isfinite(predicted).all():
        return lambda counts: np.full(len(counts), math.nan)

    def value(counts: Array) -> Array:
        x, y = _ranks(gold, counts), _ranks(predicted, counts)
        moments = [(counts * pair).sum(axis=1) for pair in (x * y, x * x, y * y)]
        return _correlation(*moments, counts.sum(axis=1))

    return value


def _errors(power: int) -> Callable[..., Array]:
    return lambda gold, predicted, _: np.column_stack([np.abs(predicted - gold) ** power, np.ones(len(gold))])


def _r2(gold: Array, predicted: Array, _: Sequence[Example]) -> Resampled:
    y, scale = _standard(gold), float(np.std(gold))
    error = np.square((predicted - gold) / scale) if np.any(y) else y
    table = np.column_stack([np.ones(len(y)), y, y * y, error])

    def value(counts: Array) -> Array:
        total, sums, squares, errors = (counts @ table).T
        spread = squares - sums**2 / total
        return 1 - _ratio(errors, np.where(spread > 1e-12 * total, spread, 0.0))

    return value


# ---- tags -----------------------------------------------------------------------------------------------------------


def spans(tags: Sequence[str]) -> Iterator[tuple[int, int, str]]:
    """(first word, behind the last, type) of the spans that conlleval reads in IOB1, IOB2, IOE, BIOES or BILOU tags.

    A span also begins where `I-` follows another type or nothing. `S`, `U` and `L`, which its Perl script of 2004 does
    not know, are single words and ends. Any tag without one of these prefixes is outside.
    """
    start, kind, ended = 0, None, True
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, of = tag.partition("-")
        inside = len(prefix) == 1 and prefix in "BIESUL"
        if kind is not None and (not inside or ended or of != kind or prefix in "BSU"):
            yield start, place, kind
            kind = None
        if inside and kind is None:
            start, kind = place, of
        ended = prefix in "ESUL"


def _spans(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]], _: Sequence[Example]) -> Array:
    """[right, gold, found] of each sentence."""
    pairs = [(set(spans(tags)), set(spans(found))) for tags, found in zip(gold, predicted, strict=True)]
    return np.array([[len(tags & found), len(tags), len(found)] for tags, found in pairs], float)


def _texts(rule: Callable[..., list[tuple[float, float]]], place: int) -> Callable[..., Array]:
    """[score, 1] of every question; `place` 0: exact match, 1: F1. Options are scored by their names."""

    def addends(gold: Any, predicted: Any, examples: Sequence[Example]) -> Array:
        if not isinstance(predicted, list):
            gold = [example.answers for example in examples]
            predicted = [example.names[choice] for example, choice in zip(examples, predicted, strict=True)]
        return np.array([[pair[place], 1.0] for pair in rule(gold, predicted)])

    return addends


# ---- the table ------------------------------------------------------------------------------------------------------

CLASSES, NUMBERS, LABELS = "classification", "regression", "multilabel"
OPTIONS, QUESTIONS, TAGS, PAIRS = "multiple-choice", "question-answering", "token-classification", "minimal-pairs"
METRICS = {
    "accuracy": Metric(_sums(_right, _mean), (CLASSES, OPTIONS, TAGS, PAIRS)),
    "balanced_accuracy": Metric(_sums(_hits, _balanced_accuracy), (CLASSES,)),
    "f1": Metric(_sums(_hits, lambda sums: _f1(sums)[:, 1]), (CLASSES,)),
    "macro_f1": Metric(_macro_f1, (CLASSES, LABELS)),
    "micro_f1": Metric(_sums(_hits, _micro_f1), (CLASSES, LABELS)),
    "mcc": Metric(_sums(_hits, _mcc), (CLASSES,)),
    "f1a": Metric(_sums(_hits, lambda sums: _f1(sums)[:, 1]), (CLASSES,)),
    "em": Metric(_sums(_by_group(lambda gold, found: bool((gold == found).all())), _mean), (CLASSES,)),
    "gender_parity": Metric(_sums(_by_group(lambda _, found: bool((found == found[0]).all())), _mean), (CLASSES,)),
    "exact_match": Metric(_sums(_right, _mean), (LABELS,)),
    "pearson": Metric(_pearson, (NUMBERS,)),
    "spearman": Metric(_spearman, (NUMBERS,)),
    "mse": Metric(_sums(_errors(2), _mean), (NUMBERS,)),
    "mae": Metric(_sums(_errors(1), _mean), (NUMBERS,)),
    "r2": Metric(_r2, (NUMBERS,)),
    "accuracy_middle": Metric(_sums(_part("middle"), _mean), (OPTIONS,)),
    "accuracy_high": Metric(_sums(_part("high"), _mean), (OPTIONS,)),
    "record_f1": Metric(_sums(_texts(record_scores, 1), _mean), (OPTIONS,)),
    "record_em": Metric(_sums(_texts(record_scores, 0), _mean), (OPTIONS,)),
    "squad_f1": Metric(_sums(_texts(answer_scores, 1), _mean), (QUESTIONS,)),
    "squad_em": Metric(_sums(_texts(answer_scores, 0), _mean), (QUESTIONS,)),
    "span_f1": Metric(_sums(_spans, lambda sums: _ratio(2 * sums[:, 0], sums[:, 1] + sums[:, 2], 0.0)), (TAGS,)),
    "span_precision": Metric(_sums(_spans, lambda sums: _ratio(sums[:, 0], sums[:, 2], 0.0)), (TAGS,)),
    "span_recall": Metric(_sums(_spans, lambda sums: _ratio(sums[:, 0], sums[:, 1], 0.0)), (TAGS,)),
}
GROUPED = ("em", "gender_parity")  # what these count are groups of examples, which are therefore drawn whole


def check(names: Sequence[str], kind: str, where: str) -> None:
    """Raises ValueError if a metric does not exist or is not for tasks of this type."""
    fitting = [name for name, metric in METRICS.items() if kind in metric.types]
    for name in names:
        if name not in fitting:
            problem = f"is not for {kind}" if name in METRICS else f"does not exist{did_you_mean(name, fitting)}"
            raise ValueError(f"{where}: the metric {name!r} {problem}; for {kind} there are {', '.join(fitting)}")


def score(names: Sequence[str], examples: Sequence[Example], predicted: Any, labels: Sequence[str]) -> dict[str, float]:
    """Each metric over the whole set; NaN where it is not defined.

    `predicted` of N examples: (N,) ints (classes, options) or floats (numbers), (N, L) of 0 and 1 (labels), N texts
    (answers, "" = none), or N lists with a tag name for each word. `labels`: the names behind the gold numbers.
    Raises ValueError if a metric needs groups of examples and there are none.
    """
    return {name: float(resampled(name, examples, predicted, labels)(np.ones((1, len(examples))))[0]) for name in names}


def resampled(name: str, examples: Sequence[Example], predicted: Any, labels: Sequence[str]) -> Resampled:
    """A metric as a function of how often each example is drawn: what `scores.draws` takes. See `score`."""
    if not examples:
        return lambda counts: np.full(len(counts), math.nan)
    return METRICS[name].prepare(gold_of(examples, predicted, labels), predicted, examples)


def gold_of(examples: Sequence[Example], predicted: Any, labels: Sequence[str]) -> Any:
    """Gold in the form of the predictions: (N,) or (N, L) numbers; lists of right options, answers or tag names."""
    gold: list[Any] = [example.label for example in examples]
    if isinstance(predicted, list):
        if predicted and isinstance(predicted[0], str):
            return [example.answers for example in examples]
        return [[labels[tag] for tag in tags] for tags in gold]
    if predicted.ndim == 2:
        return np.array([[number in applying for number in range(predicted.shape[1])] for applying in gold], int)
    if any(isinstance(label, tuple) for label in gold):
        return [label if isinstance(label, tuple) else (label,) for label in gold]
    return np.array(gold, float if predicted.dtype.kind == "f" else int)


def headline(scores: dict[str, float], names: Sequence[str]) -> float:
    """The figure a task is known by: the mean of its leaderboard metrics (GLUE's rule); NaN if one is."""
    return float(np.mean([scores[name] for name in names]))


def majority(kind: str, train: Sequence[Example], examples: Sequence[Example], labels: Sequence[str]) -> Any:
    """Predictions for `examples`, in `score`'s form, of a model that learned only the frequencies of `train`: the most
    frequent class, tag or position of the right option, the mean, the labels of more than half, no answer. Without
    training examples the frequencies are those of `examples`.
    """
    train = train or examples
    if kind == QUESTIONS:
        return [""] * len(examples)
    if kind in (CLASSES, NUMBERS, LABELS):
        form = np.zeros((0, len(labels))) if kind == LABELS else np.zeros(0, float if kind == NUMBERS else int)
        gold = gold_of(train, form, labels)
        usual = np.bincount(gold).argmax() if kind == CLASSES else gold.mean(axis=0)
        return np.repeat((usual > 0.5).astype(int)[None] if kind == LABELS else usual, len(examples), axis=0)
    counts = Counter(
        number
        for example in train
        for number in (example.label if isinstance(example.label, tuple) else (example.label,))
    )
    best = min(counts, key=lambda number: (-counts[number], number))
    if kind == OPTIONS:
        return np.array([min(best, len(example.options) - 1) for example in examples], int)
    return [[labels[best]] * len(example.words) for example in examples]


def summary(values: Sequence[float]) -> tuple[float, float, tuple[float, float]]:
    """Mean, sample standard deviation and 95 % t-interval of the mean over seeds; NaN where one seed says nothing."""
    import scipy.stats

    count, mean = len(values), float(np.mean(values))
    if count < 2:
        return mean, math.nan, (math.nan, math.nan)
    deviation = float(np.std(values, ddof=1))
    half = float(scipy.stats.t.ppf(0.975, count - 1)) * deviation / math.sqrt(count)
    return mean, deviation, (mean - half, mean + half)


def plain(value: float) -> float | None:
    """For JSON: NaN becomes null."""
    return None if math.isnan(value) else round(value, 6)
