"""Gold labels and predictions of a whole set in; the official metrics out (scikit-learn and SciPy).

A correlation that is not defined (constant predictions, one example) is NaN, never 0; MCC of constant predictions is 0
and F1 without positives is 0, as scikit-learn and the GLUE server have it. Never computed per batch and averaged.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from frugalbert.finetune.tables import did_you_mean

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Metric:
    """`function(gold, predicted)` for the task types it is made for."""

    function: Callable[[Array, Array], float]
    types: tuple[str, ...]


def _sklearn(name: str, **options: Any) -> Callable[[Array, Array], float]:
    def score(gold: Array, predicted: Array) -> float:
        import sklearn.metrics

        return float(getattr(sklearn.metrics, name)(gold, predicted, **options))

    return score


def _correlation(name: str) -> Callable[[Array, Array], float]:
    def score(gold: Array, predicted: Array) -> float:
        import scipy.stats

        if len(gold) < 2 or np.ptp(gold) == 0 or np.ptp(predicted) == 0:
            return math.nan
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nearly constant input: the value is what it is
            return float(getattr(scipy.stats, name)(gold, predicted).statistic)

    return score


def _r2(gold: Array, predicted: Array) -> float:
    if len(gold) < 2 or np.ptp(gold) == 0:
        return math.nan
    return _sklearn("r2_score")(gold, predicted)


CLASSES, NUMBERS, LABELS = "classification", "regression", "multilabel"
METRICS = {
    "accuracy": Metric(_sklearn("accuracy_score"), (CLASSES,)),
    "balanced_accuracy": Metric(_sklearn("balanced_accuracy_score"), (CLASSES,)),
    "f1": Metric(_sklearn("f1_score", pos_label=1, zero_division=0), (CLASSES,)),
    "macro_f1": Metric(_sklearn("f1_score", average="macro", zero_division=0), (CLASSES, LABELS)),
    "micro_f1": Metric(_sklearn("f1_score", average="micro", zero_division=0), (CLASSES, LABELS)),
    "mcc": Metric(_sklearn("matthews_corrcoef"), (CLASSES,)),
    "exact_match": Metric(_sklearn("accuracy_score"), (LABELS,)),
    "pearson": Metric(_correlation("pearsonr"), (NUMBERS,)),
    "spearman": Metric(_correlation("spearmanr"), (NUMBERS,)),
    "mse": Metric(_sklearn("mean_squared_error"), (NUMBERS,)),
    "mae": Metric(_sklearn("mean_absolute_error"), (NUMBERS,)),
    "r2": Metric(_r2, (NUMBERS,)),
}


def check(names: Sequence[str], kind: str, where: str) -> None:
    """Raises ValueError if a metric does not exist or is not for tasks of this type."""
    fitting = [name for name, metric in METRICS.items() if kind in metric.types]
    for name in names:
        if name not in fitting:
            problem = f"is not for {kind}" if name in METRICS else f"does not exist{did_you_mean(name, fitting)}"
            raise ValueError(f"{where}: the metric {name!r} {problem}; for {kind} there are {', '.join(fitting)}")


def compute(names: Sequence[str], gold: Array, predicted: Array) -> dict[str, float]:
    """Each metric over the whole set. Classes (N,) ints, numbers (N,) floats, multi-label (N, L) of 0 and 1."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a class that is absent from a small dev set is no news
        return {name: METRICS[name].function(gold, predicted) for name in names}


def headline(scores: dict[str, float], names: Sequence[str]) -> float:
    """The figure a task is known by: the mean of its leaderboard metrics (GLUE's rule); NaN if one is."""
    return float(np.mean([scores[name] for name in names]))


def constant(kind: str, gold: Array) -> Array:
    """What a model that learned only the labels' frequencies would predict: a class, the mean, or (L,) labels."""
    if kind == CLASSES:
        return np.asarray(np.bincount(gold).argmax())
    if kind == NUMBERS:
        return gold.mean()
    return (gold.mean(axis=0) > 0.5).astype(gold.dtype)


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
