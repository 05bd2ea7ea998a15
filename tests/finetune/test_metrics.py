"""Metrics against values worked out by hand, and their degenerate cases."""

from __future__ import annotations

import math

import numpy as np
import pytest

from frugalbert.finetune import metrics
from frugalbert.finetune.tasks import Example

GOLD, PREDICTED = np.array([1, 1, 1, 0, 0, 1]), np.array([1, 1, 0, 0, 1, 1])  # tp 3, fn 1, tn 1, fp 1


def compute(names: list[str], gold: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    labels = [tuple(np.flatnonzero(row).tolist()) for row in gold] if gold.ndim == 2 else gold.tolist()
    examples = [Example("", label=label) for label in labels]
    return metrics.score(names, examples, predicted, [str(number) for number in range(gold.shape[-1])])


def test_two_classes_by_hand():
    scores = compute(["accuracy", "f1", "mcc", "macro_f1", "balanced_accuracy"], GOLD, PREDICTED)
    assert scores["accuracy"] == pytest.approx(4 / 6)
    assert scores["f1"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 1))
    assert scores["mcc"] == pytest.approx((3 * 1 - 1 * 1) / math.sqrt(4 * 4 * 2 * 2))
    assert scores["macro_f1"] == pytest.approx((6 / 8 + 2 / 4) / 2)
    assert scores["balanced_accuracy"] == pytest.approx((3 / 4 + 1 / 2) / 2)


def test_three_classes_by_hand():
    gold, predicted = np.array([0, 0, 1, 2]), np.array([0, 1, 1, 1])
    scores = compute(["macro_f1", "mcc"], gold, predicted)
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 2 / 4 + 0) / 3)
    # Gorodkin's R_K from the confusion matrix: c = 2 right, s = 4, t = (2, 1, 1), p = (1, 3, 0)
    assert scores["mcc"] == pytest.approx((2 * 4 - (2 + 3)) / math.sqrt((16 - 10) * (16 - 6)))


@pytest.mark.parametrize("predicted", [0, 1])
def test_constant_predictions_have_no_correlation(predicted):
    constant = np.full(6, predicted)
    assert compute(["mcc"], GOLD, constant)["mcc"] == 0.0


@pytest.mark.parametrize(("gold", "predicted"), [([0, 0], [0, 0]), ([0, 0], [1, 1]), ([1, 1], [0, 0])])
def test_f1_without_hits_is_zero(gold, predicted):
    assert compute(["f1"], np.array(gold), np.array(predicted))["f1"] == 0.0


def test_numbers_by_hand():
    gold, predicted = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 3.0, 2.0, 10.0])
    scores = compute(["pearson", "spearman", "mse", "mae", "r2"], gold, predicted)
    assert scores["pearson"] == pytest.approx(13.0 / math.sqrt(5.0 * 50.0))
    assert scores["spearman"] == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert scores["mse"] == pytest.approx((0 + 1 + 1 + 36) / 4)
    assert scores["mae"] == pytest.approx(8 / 4)
    assert scores["r2"] == pytest.approx(1 - 38 / 5)


@pytest.mark.parametrize("name", ["pearson", "spearman"])
@pytest.mark.parametrize(("gold", "predicted"), [([1.0, 2.0], [3.0, 3.0]), ([3.0, 3.0], [1.0, 2.0]), ([1.0], [1.0])])
def test_undefined_correlations_are_nan(name, gold, predicted):
    value = compute([name], np.array(gold), np.array(predicted))[name]
    assert math.isnan(value)
    assert metrics.plain(value) is None


def test_several_labels_by_hand():
    gold = np.array([[1, 0, 1], [0, 1, 0], [0, 0, 0]])
    predicted = np.array([[1, 0, 0], [0, 1, 0], [0, 1, 0]])
    scores = compute(["micro_f1", "macro_f1", "exact_match"], gold, predicted)
    assert scores["micro_f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert scores["macro_f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert scores["exact_match"] == pytest.approx(1 / 3)


def test_headline_is_the_mean_and_undefined_if_one_is():
    assert metrics.headline({"f1": 0.8, "accuracy": 0.6}, ("f1", "accuracy")) == pytest.approx(0.7)
    assert math.isnan(metrics.headline({"pearson": math.nan, "spearman": 0.5}, ("pearson", "spearman")))


def test_interval_over_seeds_is_students():
    mean, deviation, interval = metrics.summary([0.60, 0.62, 0.64])
    assert mean == pytest.approx(0.62)
    assert deviation == pytest.approx(0.02)
    half = 4.302652729911275 * 0.02 / math.sqrt(3)  # t of 2 degrees of freedom at 0.975
    assert interval == pytest.approx((0.62 - half, 0.62 + half))


def test_one_seed_has_no_spread_and_an_undefined_value_no_mean():
    mean, deviation, interval = metrics.summary([0.6])
    assert mean == 0.6
    assert math.isnan(deviation)
    assert all(math.isnan(bound) for bound in interval)
    assert math.isnan(metrics.summary([0.6, math.nan])[0])


@pytest.mark.parametrize(
    ("name", "message"), [("acuracy", "did you mean 'accuracy'"), ("pearson", "is not for classification")]
)
def test_a_wrong_metric_is_named(name, message):
    with pytest.raises(ValueError, match=message):
        metrics.check([name], "classification", "finetune.tasks.mine.metrics")
