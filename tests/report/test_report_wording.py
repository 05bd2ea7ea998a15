"""Figures, masked secrets, and verdicts that are never kinder than the data."""

from __future__ import annotations

from typing import Any

import pytest
from scipy import stats

from frugalbert.report.collect import Collected
from frugalbert.report.page import _score_tile
from frugalbert.report.plots import thinned
from frugalbert.report.verdicts import comparisons, paired, verdicts
from frugalbert.report.wording import MASKED, big, clean, count, fixed, percent, short, significant, size, tick, took


def said(**parts: Any) -> list[tuple[str, str]]:
    return [(item.mark, item.text.replace("\u00a0", " ")) for item in verdicts(Collected("a", "a", **parts))]


@pytest.mark.parametrize(
    "shown, expected",
    [
        (count(61465), "61,465"), (count(-3), "−3"), (count("x"), "–"), (count(True), "–"), (count(10**400), "–"),
        (big(30_100_442), "30.1 M"), (big(5120), "5,120"), (big(12_700), "12.7 k"), (big(999_999), "1.00 M"),
        (big(2.5e9), "2.50 G"), (significant(0.00000264, 2), "2.6 × 10⁻⁶"), (significant(0.0003), "0.000300"),
        (significant(1234.5), "1,230"), (significant(-0.5), "−0.500"), (significant(0), "0"), (fixed(-0.04), "−0.0"),
        (percent(0.5881), "58.8 %"), (percent(None), "–"), (size(20_493_111), "20.5 MB"), (size(999), "999 bytes"),
        (tick(25000.0), "25 k"), (tick(0.002), "0.002"), (tick(-5.0), "−5"), (took(3725), "1 h 02 min"),
        (short("a" * 50 + "/end", 20), "aaaaaaaaa … aaaa/end"), (short(" a \n b "), "a b"), (big(float("nan")), "–"),
    ],
)  # fmt: skip
def test_figures(shown: str, expected: str):
    assert shown.replace("\u00a0", " ") == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("tokens: 5", "tokens: 5"), ("max_tokens: 12", "max_tokens: 12"),
        ("tokenizer: {path: a}", "tokenizer: {path: a}"),
        ("token: abc", f"token: {MASKED}"), ("{api_key: abc, b: 1}", f"{{api_key: {MASKED}, b: 1}}"),
        ("x?access_token=abc&b=1", f"x?access_token={MASKED}&b=1"), ("Bearer abcdefghijklmnop1", f"Bearer {MASKED}"),
        ("sha256 " + "0a" * 32, "sha256 " + "0a" * 32), ("https://a:b@host", f"https://{MASKED}@host"),
        ("a\u202eb", "a⟨U+202E⟩b"), ("tab\tand\nline", "tab\tand\nline"), ("cls_token: [CLS]", "cls_token: [CLS]"),
    ],
)  # fmt: skip
def test_clean(text: str, expected: str):
    assert clean(text) == expected


def test_adversarial_text_takes_no_time():
    """A megabyte of each pattern's worst case; quadratic matching would take minutes."""
    for part in ("eyJ", "token", "://", "a", "aB1", "api_key:", "sk-", "\u202e", "token ", "_token"):
        clean(part * (1_000_000 // len(part)))


# ---- verdicts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss, mark, words",
    [
        (3.0, "good", "is below the bigram baseline 4.00 and the unigram baseline 5.00."),
        (4.5, "bad", "is below the unigram baseline 5.00 but not below the bigram baseline 4.00"),
        (5.0, "bad", "is not below the bigram baseline 4.00 nor the unigram baseline 5.00"),
    ],
)
def test_language_verdicts(loss: float, mark: str, words: str):
    [(found, text)] = said(summary={"final_validation_loss": loss, "bigram_nll": 4.0, "unigram_nll": 5.0})
    assert found == mark
    assert words in text


def results(pretrained: list[float], random: list[float], **extra: Any) -> list[dict[str, Any]]:
    return [
        {"task": "t", "metric": "accuracy", "init": init, "values": values, "mean": sum(values) / len(values),
         "std": 0.01, **extra}
        for init, values in (("pretrained", pretrained), ("random", random))
        if values
    ]  # fmt: skip


@pytest.mark.parametrize(
    "pretrained, random, mark, words",
    [
        (
            [0.60, 0.61, 0.62],
            [0.40, 0.41, 0.43],
            "good",
            "beats random initialisation by 19.7 points (95 % interval 18.2",
        ),
        (
            [0.60, 0.40, 0.50],
            [0.40, 0.45, 0.50],
            "note",
            "5.0 points above random initialisation, but the 95 % interval",
        ),
        ([0.40, 0.41, 0.43], [0.60, 0.61, 0.62], "bad", "does not beat random initialisation: 19.7 points below it"),
        ([0.35, 0.35], [0.35, 0.35], "note", "no better than random initialisation (95 % interval 0.0 to 0.0)."),
        ([0.60], [0.40], "note", "with one seed; beats random initialisation by 20.0 points (one seed, no interval)."),
        ([0.60, 0.61], [], "note", "no random-initialisation baseline."),
    ],
)
def test_task_verdicts(pretrained: list[float], random: list[float], mark: str, words: str):
    [(found, text)] = said(results=results(pretrained, random))
    assert found == mark
    assert words in text


def test_no_better_than_the_majority_is_said():
    [(mark, text)] = said(results=results([0.5, 0.5], [0.4, 0.4], majority_baseline=0.5))
    assert mark == "bad"
    assert "No better than always answering the majority class (50.0)." in text


def test_lower_is_better_for_errors():
    rows = [{**row, "metric": "mse"} for row in results([1.0, 1.1, 1.2], [2.0, 2.3, 2.1])]
    [comparison] = comparisons(rows)
    assert comparison.gain == pytest.approx(1.0333, abs=1e-3)
    assert not comparison.trained.points
    [(mark, text)] = said(results=rows)
    assert mark == "good"
    assert "beats random initialisation by 1.03 mse" in text


def test_the_headline_is_the_mean_over_tasks():
    rows = [{**row, "task": task} for task in "ab" for row in results([0.6, 0.7], [0.4, 0.4])]
    rows += [{**row, "task": "c", "metric": "mse"} for row in results([3.0], [4.0])]
    assert _score_tile(Collected("a", "a", results=rows[:2])) == [("a", "65.0", "accuracy, from random 40.0")]
    assert _score_tile(Collected("a", "a", results=rows)) == [("Mean of 2 tasks", "65.0", "points, from random 40.0")]
    assert _score_tile(Collected("a", "a")) == []


def test_the_gain_in_the_results_is_the_gain_on_the_page():
    rows = results([0.6, 0.7], [0.4, 0.4])
    own = comparisons(rows)[0]
    rows[0]["gain"] = {"mean": own.gain / 100, "interval": [end / 100 for end in own.interval]}
    stored = comparisons(rows)[0]
    assert stored.gain == pytest.approx(own.gain)
    assert stored.interval == pytest.approx(own.interval)


def test_paired_interval_is_students():
    gaps = [0.3, 0.7, 0.45, 0.5]
    expected = stats.ttest_1samp(gaps, 0).confidence_interval(0.95)
    assert paired(gaps) == pytest.approx((expected.low, expected.high))
    assert paired([0.3]) is None


def test_speed_and_waiting():
    row = {"device": "cpu", "threads": 1, "batch_size": 1, "length": 128}
    rows = [{**row, "kind": "onnx", "median_ms": 2.0}, {**row, "kind": "baseline", "median_ms": 1.0}]
    assert said(latency=rows)[0][0] == "bad"
    assert "0.500 × as fast as BERT-base" in said(latency=rows)[0][1]
    assert said(latency=rows[:1])[0][0] == "note"
    assert said(summary={"cost_seconds": {"train": 97, "wait": 3}})[0][0] == "bad"
    assert said(summary={"cost_seconds": {"train": 99, "wait": 1}})[0][0] == "good"


def test_a_run_that_gave_up_or_stumbled_says_so():
    [(mark, text)] = said(summary={"ended": "early stop: the validation loss 7 is above 6 after 3h"})
    assert mark == "bad"
    assert text.endswith("early stop: the validation loss 7 is above 6 after 3h.")
    assert said(summary={"ended": "budget"}) == []
    assert said(events=["Step 3: step skipped: loss nan."]) == [
        ("note", "Pre-training was not smooth: one event: Step 3: step skipped: loss nan.")
    ]


def test_thinning_keeps_the_mean():
    x, y = list(range(1000)), [float(value % 10) for value in range(1000)]
    xs, means, low, high = thinned(x, y, 100)
    assert xs == [10 * group + 4.5 for group in range(100)]
    assert means == [4.5] * 100
    assert low[0] < 4.5 < high[0]
    assert thinned([1, 2], [3, 4])[:2] == ([1, 2], [3, 4])
