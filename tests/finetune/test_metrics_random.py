"""Every metric on a thousand random cases and more against scikit-learn, SciPy, or a plain loop over the definition.

A third of the cases are degenerate: one example, constant predictions, one gold class, all right, no positives.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import scipy.stats
import sklearn
import sklearn.metrics

from frugalbert.finetune import metrics
from frugalbert.finetune.tasks import Example

CASES = 1000


def close(value: float, expected: float) -> bool:
    return math.isclose(value, expected, rel_tol=1e-9, abs_tol=1e-9) or (math.isnan(value) and math.isnan(expected))


def class_cases(classes: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    generator = np.random.default_rng(classes)
    for case in range(CASES):
        count = 1 if case % 12 == 0 else int(generator.integers(2, 30))
        gold, predicted = generator.integers(0, classes, (2, count))
        if case % 6 == 1:
            predicted[:] = predicted[0]
        elif case % 12 == 2:
            gold[:] = gold[0]
        elif case % 24 == 3:
            predicted = gold.copy()
        elif case % 24 == 15:
            gold[:] = predicted[:] = 0
        yield gold, predicted


CLASS_ORACLES: dict[str, Callable[..., float]] = {
    "accuracy": sklearn.metrics.accuracy_score,
    "balanced_accuracy": sklearn.metrics.balanced_accuracy_score,
    "macro_f1": lambda gold, found: sklearn.metrics.f1_score(gold, found, average="macro", zero_division=0),
    "micro_f1": lambda gold, found: sklearn.metrics.f1_score(gold, found, average="micro", zero_division=0),
    "mcc": sklearn.metrics.matthews_corrcoef,
    "f1": lambda gold, found: sklearn.metrics.f1_score(gold, found, zero_division=0),
}


@pytest.mark.parametrize(
    ("name", "classes"), [(name, 2) for name in CLASS_ORACLES] + [(name, 4) for name in list(CLASS_ORACLES)[:5]]
)
def test_classes_as_scikit_learn(name, classes):
    labels = [str(number) for number in range(classes)]
    with warnings.catch_warnings(), sklearn.config_context(skip_parameter_validation=True):
        warnings.simplefilter("ignore")
        for gold, predicted in class_cases(classes):
            examples = [Example("", label=int(label)) for label in gold]
            value = metrics.score([name], examples, predicted, labels)[name]
            assert close(value, CLASS_ORACLES[name](gold, predicted)), (gold, predicted)
            if name == "f1":
                assert metrics.score(["f1a"], examples, predicted, labels) == {"f1a": value}


def number_cases() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    generator = np.random.default_rng(5)
    for case in range(CASES):
        count = 1 if case % 12 == 0 else int(generator.integers(2, 30))
        gold, predicted = generator.normal(size=(2, count)) * 10.0 ** generator.integers(-3, 4)
        if case % 4 == 1:  # many ties
            gold, predicted = np.round(gold / 3), np.round(predicted / 3)
        elif case % 12 == 2:
            predicted[:] = 0.1
        elif case % 12 == 3:
            gold[:] = 0.3
        elif case % 12 == 4:
            predicted = gold + 1e-9 * generator.normal(size=count)
        elif case % 12 == 6:
            predicted = predicted + 1e6
        yield gold, predicted


def correlation(function: Callable[..., Any]) -> Callable[..., float]:
    def value(gold: np.ndarray, predicted: np.ndarray) -> float:
        return float(function(gold, predicted).statistic) if len(gold) > 1 else math.nan

    return value


NUMBER_ORACLES: dict[str, Callable[..., float]] = {
    "pearson": correlation(scipy.stats.pearsonr),
    "spearman": correlation(scipy.stats.spearmanr),
    "mse": sklearn.metrics.mean_squared_error,
    "mae": sklearn.metrics.mean_absolute_error,
    "r2": lambda gold, found: sklearn.metrics.r2_score(gold, found) if np.ptp(gold) > 0 else math.nan,
}


@pytest.mark.parametrize("name", NUMBER_ORACLES)
def test_numbers_as_scipy_and_scikit_learn(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for gold, predicted in number_cases():
            examples = [Example("", label=float(label)) for label in gold]
            value, expected = (
                metrics.score([name], examples, predicted, [])[name],
                NUMBER_ORACLES[name](gold, predicted),
            )
            # offsets of a million cost the oracles themselves digits
            assert math.isclose(value, expected, rel_tol=1e-6, abs_tol=1e-9) or close(value, expected), (
                gold,
                predicted,
            )


def test_predictions_that_are_no_numbers_have_no_correlation():
    examples = [Example("", label=float(label)) for label in range(3)]
    values = metrics.score(["pearson", "spearman", "mse"], examples, np.array([0.0, math.nan, 1.0]), [])
    assert all(math.isnan(value) for value in values.values())


LABEL_ORACLES: dict[str, Callable[..., float]] = {
    "micro_f1": lambda gold, found: sklearn.metrics.f1_score(gold, found, average="micro", zero_division=0),
    "macro_f1": lambda gold, found: sklearn.metrics.f1_score(gold, found, average="macro", zero_division=0),
    "exact_match": sklearn.metrics.accuracy_score,
}


@pytest.mark.parametrize("name", LABEL_ORACLES)
def test_several_labels_as_scikit_learn(name):
    generator = np.random.default_rng(6)
    for case in range(CASES):
        shape = (int(generator.integers(1, 12)), int(generator.integers(2, 5)))
        gold = (generator.random(shape) < generator.choice([0.0, 0.3, 0.5, 1.0])).astype(int)
        predicted = (
            gold.copy() if case % 10 == 0 else (generator.random(shape) < generator.choice([0.0, 0.5])).astype(int)
        )
        examples = [Example("", label=tuple(np.flatnonzero(row).tolist())) for row in gold]
        value = metrics.score([name], examples, predicted, "abcd"[: shape[1]])[name]
        assert close(value, LABEL_ORACLES[name](gold, predicted)), (gold, predicted)


def test_groups_as_a_loop_over_them():
    """MultiRC's EM and AX-g's parity; the groups' examples need not stand together."""
    generator = np.random.default_rng(7)
    for case in range(CASES):
        count = 1 if case % 12 == 0 else int(generator.integers(2, 20))
        names = [f"0.{number}" for number in generator.integers(0, 6, count)]
        gold = generator.integers(0, 2, count)
        predicted = np.where(generator.random(count) < generator.choice([0.0, 0.2, 1.0]), 1 - gold, gold)
        examples = [Example("", label=int(label), group=name) for label, name in zip(gold, names, strict=True)]
        right: dict[str, bool] = {}
        choices: dict[str, set[int]] = {}
        for name, label, found in zip(names, gold.tolist(), predicted.tolist(), strict=True):
            right[name] = right.get(name, True) and label == found
            choices.setdefault(name, set()).add(found)
        values = metrics.score(["em", "gender_parity"], examples, predicted, ["0", "1"])
        assert close(values["em"], sum(right.values()) / len(right))
        assert close(values["gender_parity"], sum(len(found) == 1 for found in choices.values()) / len(choices))


def test_examples_without_groups_are_refused():
    with pytest.raises(ValueError, match="which these examples do not form"):
        metrics.score(["em"], [Example("", label=1)], np.array([1]), ["0", "1"])


def test_options_as_a_loop_over_them():
    generator = np.random.default_rng(8)
    for case in range(CASES):
        count = int(generator.integers(1, 20))
        predicted = generator.integers(0, 4, count)
        several = case % 2 == 0
        gold = [
            tuple(set(generator.integers(0, 4, 2).tolist())) if several else int(generator.integers(4))
            for _ in predicted
        ]
        parts = generator.choice(["middle", "high"] if case % 5 else ["high"], count).tolist()
        examples = [Example("", label=label, group=part) for label, part in zip(gold, parts, strict=True)]
        right = [
            found in label if isinstance(label, tuple) else found == label
            for label, found in zip(gold, predicted.tolist(), strict=True)
        ]
        values = metrics.score(["accuracy", "accuracy_middle", "accuracy_high"], examples, predicted, [])
        assert close(values["accuracy"], sum(right) / count)
        for part in ("middle", "high"):
            chosen = [hit for hit, own in zip(right, parts, strict=True) if own == part]
            assert close(values[f"accuracy_{part}"], sum(chosen) / len(chosen) if chosen else math.nan)


# ---- tags -----------------------------------------------------------------------------------------------------------

# Pairs of prefixes between which conlleval (version 2004-01-26) sees a chunk end, and begin, though the type stays
# (`E` then `B` is ours: the Perl script's list lacks it, and reads two adjacent BIOES spans as one).
ENDS = {"BB", "BO", "IB", "IO", "EE", "EI", "EO", "EB"}
STARTS = {"BB", "IB", "OB", "OI", "EE", "EI", "OE", "EB"}


def stream(gold: list[list[str]], predicted: list[list[str]]) -> tuple[int, int, int]:
    """(right, gold, found) chunks by conlleval's one pass over words, which remembers no spans."""
    right = golds = founds = 0
    for pair in zip(gold, predicted, strict=True):
        last, inside = [("O", ""), ("O", "")], False
        for words in [*zip(*pair, strict=True), ("O", "O")]:
            now = [(word[0], word[2:]) for word in words]
            changes = list(zip(last, now, strict=True))
            ends = [a[0] + b[0] in ENDS or (a[0] != "O" and a[1] != b[1]) for a, b in changes]
            starts = [a[0] + b[0] in STARTS or (b[0] != "O" and a[1] != b[1]) for a, b in changes]
            if inside and all(ends):
                right, inside = right + 1, False
            elif inside and (ends[0] != ends[1] or now[0][1] != now[1][1]):
                inside = False
            inside = inside or (all(starts) and now[0][1] == now[1][1])
            golds, founds, last = golds + starts[0], founds + starts[1], now
    return right, golds, founds


TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC", "E-LOC", "E-PER", "B", "I")


def test_spans_as_conlleval_counts_them():
    generator = np.random.default_rng(9)
    for case in range(2 * CASES):
        tags = TAGS[: 3 + case % 7]
        shape = int(generator.integers(1, 4)), int(generator.integers(1, 9))
        gold = generator.integers(0, len(tags), shape)
        keep = generator.random(shape) < generator.choice([0.0, 0.7, 0.9, 1.0])
        predicted = np.where(keep, gold, generator.integers(0, len(tags), shape))
        if case % 20 == 0:
            predicted[:] = 0
        names = [[tags[tag] for tag in row] for row in predicted]
        examples = [Example("", label=tuple(row.tolist()), words=("word",) * len(row)) for row in gold]
        values = metrics.score(["span_f1", "span_precision", "span_recall", "accuracy"], examples, names, tags)
        right, golds, founds = stream([[tags[tag] for tag in row] for row in gold], names)
        precision, recall = (right / founds if founds else 0.0), (right / golds if golds else 0.0)
        assert close(values["span_precision"], precision), (gold, names)
        assert close(values["span_recall"], recall)
        assert close(values["span_f1"], 2 * precision * recall / (precision + recall) if right else 0.0)
        assert close(values["accuracy"], float((gold == predicted).mean()))


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("B-X I-X B-X O I-Y", [(0, 2, "X"), (2, 3, "X"), (4, 5, "Y")]),  # IOB2, with a span that only continues
        ("I-X I-X B-X I-Y", [(0, 2, "X"), (2, 3, "X"), (3, 4, "Y")]),  # IOB1: B only between neighbours
        ("S-X S-X B-X I-X E-X B-X E-X", [(0, 1, "X"), (1, 2, "X"), (2, 5, "X"), (5, 7, "X")]),  # BIOES
        ("U-X B-X L-X U-X", [(0, 1, "X"), (1, 3, "X"), (3, 4, "X")]),  # BILOU
        ("B-a-b I-a-b B-a", [(0, 2, "a-b"), (2, 3, "a")]),  # hyphens in types
        ("NOUN VERB O X-Y", []),  # tags that mark no spans
        ("", []),
    ],
)
def test_spans_of_every_scheme(tags, expected):
    assert list(metrics.spans(tags.split())) == expected


# ---- majority -------------------------------------------------------------------------------------------------------


def test_majority_of_every_type():
    def labelled(*labels: Any, **rest: Any) -> list[Example]:
        return [Example("", label=label, **rest) for label in labels]

    two = labelled(0, 0)
    assert metrics.majority("classification", labelled(2, 0, 2), two, "abc").tolist() == [2, 2]
    assert metrics.majority("classification", [], labelled(1, 0, 1), "ab").tolist() == [
        1,
        1,
        1,
    ]  # nothing to learn from
    assert metrics.majority("regression", labelled(1.0, 2.0), two, ()).tolist() == [1.5, 1.5]
    assert metrics.majority("multilabel", labelled((0,), (0, 1), (2,)), two, "abc").tolist() == [[1, 0, 0]] * 2
    options = labelled(0, 0, options=("a", "b", "c")) + labelled(0, options=("a", "b"))
    assert metrics.majority("multiple-choice", labelled(2, 2, 1), options, ()).tolist() == [2, 2, 1]
    assert metrics.majority("multiple-choice", labelled((0, 1), (1,)), options, ()).tolist() == [1, 1, 1]
    assert metrics.majority("question-answering", labelled(1), two, ()) == ["", ""]
    words = labelled((0,), words=("a", "b"))
    assert metrics.majority("token-classification", labelled((1, 0), (1,)), words, ["O", "B"]) == [["B", "B"]]


@pytest.mark.parametrize("name", metrics.METRICS)
def test_no_examples_have_no_score(name):
    assert math.isnan(metrics.score([name], [], np.zeros(0, int), ["a", "b"])[name])


@pytest.mark.parametrize("name", metrics.METRICS)
def test_every_metric_is_found_for_its_types_alone(name):
    kinds = (
        "classification",
        "regression",
        "multilabel",
        "multiple-choice",
        "question-answering",
        "token-classification",
        "minimal-pairs",
    )
    for kind in kinds:
        if kind in metrics.METRICS[name].types:
            metrics.check([name], kind, "here")
        else:
            with pytest.raises(ValueError, match=f"here: the metric '{name}' is not for {kind}; for {kind} there are "):
                metrics.check([name], kind, "here")
