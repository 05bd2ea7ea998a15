"""Board scores against the published rows; bootstrap intervals against analytic cases and a loop over resamples."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from frugalbert.finetune import metrics, scores
from frugalbert.finetune.tasks import TABLE, Example

GLUE_ROWS = {
    # CoLA, SST-2, MRPC, STS-B, QQP, MNLI, QNLI, RTE, WNLI as published (arXiv 2010.10499, table 4)
    "Bort": ("63.9 96.2 94.1/92.3 89.2/88.3 66.0/85.9 88.1/87.8 92.3 82.7 71.2", 83.6),
    "BERT-large": ("60.5 94.9 89.3/85.4 87.6/86.5 72.1/89.3 86.7/85.9 92.7 70.1 65.1", 80.5),
}
DAY_ROWS = {
    # MNLI-m, MNLI-mm, QNLI, QQP, RTE, SST-2, MRPC, CoLA, STS-B as published (arXiv 2104.07705)
    "24hBERT": ("84.4 83.8 90.6 70.7 75.3 93.0 88.5 57.1 86.8", 81.1),
    "BERT-base": ("84.6 84.0 90.6 72.0 76.5 92.8 89.9 55.1 87.7", 81.5),
    "BERT-large": ("86.0 85.2 92.6 72.0 78.3 94.5 89.9 60.9 87.5", 83.0),
    "RoBERTa-base": ("87.0 86.5 92.4 72.5 79.6 95.8 89.7 58.8 88.3", 83.4),
}
SUPERGLUE_ROWS = {
    # BoolQ, CB, COPA, MultiRC, ReCoRD, RTE, WiC, WSC as published (arXiv 2010.10499, table 5)
    "Bort": ("83.7 81.9/86.5 89.6 83.7/54.1 49.8/49.0 81.2 70.1 65.8", 74.1),
    "BERT-large": ("77.4 75.7/83.6 70.6 70.0/24.1 72.0/71.3 71.7 69.6 64.4", 69.0),
}
CASES = [
    (board, model, *row)
    for board, rows in (("glue", GLUE_ROWS), ("24hbert", DAY_ROWS), ("superglue", SUPERGLUE_ROWS))
    for model, row in rows.items()
]


def published(board: str, row: str) -> dict[str, dict[str, float | None]]:
    results: dict[str, dict[str, float | None]] = {}
    for (_, task, names), cell in zip(scores.BOARDS[board].columns, row.split(), strict=True):
        for name, value in zip(names, cell.split("/"), strict=True):
            results.setdefault(task, {})[name] = float(value)
    return results


@pytest.mark.parametrize(("board", "model", "row", "expected"), CASES)
def test_published_scores_are_reproduced(board, model, row, expected):
    found = scores.board_score(board, published(board, row))
    assert found.value == found.mean
    assert round(found.value, 1) == expected, model
    assert scores.BOARDS[board].definition in found.sentence
    assert found.missing == ()


def test_24hberts_columns_are_one_metric_each():
    columns = {title: names for title, _, names in scores.BOARDS["24hbert"].columns}
    assert columns["CoLA"] == ("mcc",)
    assert columns["MRPC"] == columns["QQP"] == ("f1",)
    assert columns["STS-B"] == ("spearman",)


def test_ax_changes_no_score():
    results = published("glue", GLUE_ROWS["Bort"][0])
    assert scores.board_score("glue", results | {"ax": {"mcc": 0.0}}) == scores.board_score("glue", results)


@pytest.mark.parametrize("value", [None, math.nan])
def test_a_missing_figure_leaves_no_score(value):
    results = published("glue", GLUE_ROWS["Bort"][0])
    results["stsb"]["spearman"] = value
    del results["qqp"]
    found = scores.board_score("glue", results)
    assert found.value is None
    assert found.missing == ("STS-B", "QQP")
    assert found.sentence.startswith("No GLUE leaderboard score (mean over the 9 tasks; ")
    assert found.sentence.endswith(
        "missing or undefined are STS-B, QQP; the mean over the 7 that are there is no leaderboard score."
    )
    assert found.mean == pytest.approx((63.9 + 96.2 + 93.2 + 87.95 + 92.3 + 82.7 + 71.2) / 7)


def test_no_task_has_no_mean():
    found = scores.board_score("superglue", {})
    assert (found.value, found.mean, len(found.missing)) == (None, None, 8)
    assert found.sentence.endswith("BoolQ, CB, COPA, MultiRC, ReCoRD, RTE, WiC, WSC.")


@pytest.mark.parametrize("board", scores.BOARDS)
def test_columns_are_rows_of_the_task_table(board):
    rows = {task.name: task for task in TABLE}
    for _, task, names in scores.BOARDS[board].columns:
        assert {name.removesuffix("_mismatched") for name in names} <= set(rows[task].metrics)


# ---- intervals ------------------------------------------------------------------------------------------------------


def classified(gold: np.ndarray) -> list[Example]:
    return [Example("", label=int(label)) for label in gold]


def test_interval_of_an_accuracy_is_the_binomials():
    """Resampled hits are binomial with the observed share, so the interval's ends are its quantiles."""
    n, hits = 872, 785
    gold = np.zeros(n, int)
    predicted = (np.arange(n) >= hits).astype(int)
    accuracy = metrics.resampled("accuracy", classified(gold), predicted, "ab")
    low, high = scores.bounds(scores.draws(accuracy, n, seed=0, resamples=20_000))
    expected = scipy.stats.binom.ppf([0.025, 0.975], n, hits / n) / n
    assert (low, high) == pytest.approx(tuple(expected), abs=2 / n)
    values = scores.draws(accuracy, n, seed=0, resamples=20_000)
    share = hits / n
    assert values.mean() == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / n / 20_000))
    assert values.std() == pytest.approx(math.sqrt(share * (1 - share) / n), rel=0.03)


def test_a_seed_fixes_the_interval():
    gold = np.arange(50) % 2
    accuracy = metrics.resampled("accuracy", classified(gold), gold ^ (np.arange(50) % 7 == 0), "ab")
    assert scores.bounds(scores.draws(accuracy, 50, seed=1)) == scores.bounds(scores.draws(accuracy, 50, seed=1))
    assert not np.array_equal(scores.draws(accuracy, 50, seed=1), scores.draws(accuracy, 50, seed=2))


def test_memory_bounds_change_nothing(monkeypatch):
    """Resamples are made in pieces; the hits stay whole numbers of examples and as many as asked for."""
    monkeypatch.setattr(scores, "CELLS", 130)
    seen = []

    def score(counts: np.ndarray) -> np.ndarray:
        seen.append(counts.shape)
        assert (counts.sum(axis=1) == 40).all()
        return counts[:, 0] / 40

    assert len(scores.draws(score, 40, seed=0, resamples=10)) == 10
    assert seen == [(3, 40), (3, 40), (3, 40), (1, 40)]


SAMPLES = {
    "classification": ("accuracy", "balanced_accuracy", "f1", "macro_f1", "micro_f1", "mcc", "f1a"),
    "regression": ("pearson", "spearman", "mse", "mae", "r2"),
    "multilabel": ("micro_f1", "macro_f1", "exact_match"),
    "token-classification": ("accuracy", "span_f1", "span_precision", "span_recall"),
}


@pytest.mark.parametrize("kind", SAMPLES)
def test_a_resample_scores_as_the_examples_it_repeats(kind):
    """Counts are a short form: the metric of them is the metric of the set with every example that often."""
    generator = np.random.default_rng(3)
    labels = ["O", "B-X", "I-X"]
    for _ in range(60):
        n = int(generator.integers(2, 15))
        gold, predicted = generator.integers(0, 2 if kind == "classification" else 3, (2, n))
        if kind == "regression":
            examples, given = [Example("", label=float(value)) for value in gold], predicted * 0.5
        elif kind == "multilabel":
            examples = [Example("", label=tuple({int(value), 0})) for value in gold]
            given = np.eye(3, dtype=int)[predicted]
        elif kind == "token-classification":
            examples = [Example("", label=(int(value), 2), words=("a", "b")) for value in gold]
            given = [[labels[value], labels[2]] for value in predicted]
        else:
            examples, given = classified(gold), predicted
        counts = np.bincount(generator.integers(0, n, n), minlength=n)
        places = np.repeat(np.arange(n), counts)
        again = [given[place] for place in places] if isinstance(given, list) else given[places]
        for name in SAMPLES[kind]:
            short = metrics.resampled(name, examples, given, labels)(counts[None].astype(float))[0]
            long = metrics.score([name], [examples[place] for place in places], again, labels)[name]
            assert short == pytest.approx(long, nan_ok=True, abs=1e-12), (name, gold, predicted, counts)


def grouped(pairs: int) -> tuple[list[Example], np.ndarray]:
    gold = np.arange(2 * pairs) // 2 % 2
    predicted = np.where(np.arange(2 * pairs) % 8 == 0, 1 - gold, gold)
    examples = [Example("", label=int(label), group=str(number // 2)) for number, label in enumerate(gold)]
    return examples, predicted


@pytest.mark.parametrize("name", metrics.GROUPED)
def test_groups_are_drawn_whole(name):
    """The share of whole groups is binomial over groups, whatever their size."""
    examples, predicted = grouped(178)
    part = scores.Part([name], examples, [predicted], "ab")
    share = metrics.score([name], examples, predicted, "ab")[name]
    expected = scipy.stats.binom.ppf([0.025, 0.975], 178, share) / 178
    values = scores.resamples_of([part], resamples=20_000)
    assert scores.bounds(values) == pytest.approx(tuple(expected), abs=2 / 178)
    assert np.allclose(values * 178, np.round(values * 178))  # of single examples some groups would have no first


def test_paired_intervals_are_narrower_than_unpaired_ones():
    generator = np.random.default_rng(0)
    gold = generator.integers(0, 2, 300)
    one = np.where(generator.random(300) < 0.2, 1 - gold, gold)
    other = np.where(generator.random(300) < 0.02, 1 - one, one)
    ours = [scores.Part(["accuracy"], classified(gold), [one], "ab")]
    theirs = [scores.Part(["accuracy"], classified(gold), [other], "ab")]
    low, high = scores.bounds(scores.resamples_of(ours, resamples=4000) - scores.resamples_of(theirs, resamples=4000))
    gain = (one == gold).astype(float) - (other == gold)
    half = 1.96 * gain.std() / math.sqrt(300)
    assert (low, high) == pytest.approx((gain.mean() - half, gain.mean() + half), abs=0.004)
    alone = scores.bounds(scores.resamples_of(ours, resamples=4000))
    assert high - low < 0.5 * (alone[1] - alone[0])
    assert not (scores.resamples_of(ours) - scores.resamples_of(ours)).any()


def test_headline_interval_is_over_parts_seeds_and_metrics():
    """Two sets of different size, two seeds, two metrics: all perfect but one prediction set that is all wrong."""
    examples = classified(np.arange(40) % 2)
    right, wrong = np.arange(40) % 2, 1 - np.arange(40) % 2
    parts = [
        scores.Part(["accuracy", "f1"], examples, [right, wrong], "ab"),
        scores.Part(["accuracy", "f1"], examples[:10], [right[:10], right[:10]], "ab"),
    ]
    assert scores.bounds(scores.resamples_of(parts)) == (0.75, 0.75)


def test_undefined_resamples_are_left_out():
    examples = [Example("", label=float(value)) for value in (1, 2, 3)]
    predicted = np.array([1.0, 2.0, 4.0])
    pearson = metrics.resampled("pearson", examples, predicted, ())
    values = scores.draws(pearson, 3, seed=0)
    assert np.isnan(values).any()
    assert np.isnan(values).mean() == pytest.approx(1 / 9, abs=0.05)  # three of 27 resamples repeat one example
    low, high = scores.bounds(values)
    assert low <= high <= 1.0
    undefined = metrics.resampled("pearson", examples, np.ones(3), ())
    assert all(math.isnan(bound) for bound in scores.bounds(scores.draws(undefined, 3, seed=0)))
    nothing = scores.resamples_of([scores.Part(["mcc"], [], [np.zeros(0, int)], "ab")])
    assert all(math.isnan(bound) for bound in scores.bounds(nothing))
