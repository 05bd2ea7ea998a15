"""What a run has shown, in sentences computed from its data and never kinder than they are.

In: what `collect` found. Out: `Verdict`s and `Comparison`s (fine-tuning beside random initialisation).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from frugalbert.report.collect import Collected
from frugalbert.report.wording import (
    at,
    count,
    figure,
    fixed,
    get,
    list_at,
    milliseconds,
    percent,
    short,
    significant,
    text_at,
)

LOWER_IS_BETTER = {"mse", "rmse", "mae"}
RAW = LOWER_IS_BETTER | {"r2"}  # every other metric lies within [-1, 1] and is shown in points
INITS = {"pretrained": "pre-trained", "random": "random"}
KINDS = {"torch": "PyTorch", "onnx": "ONNX", "onnx-int8": "ONNX int8", "baseline": "BERT-base"}


@dataclass(frozen=True)
class Verdict:
    """`mark` is good, bad or note."""

    mark: str
    text: str


@dataclass(frozen=True)
class Score:
    """One row of the fine-tuning results; values in points (100 × metric) where the metric is bounded by 1."""

    task: str
    metric: str
    init: str
    values: tuple[float, ...]
    mean: float
    std: float | None
    interval: tuple[float, float] | None
    majority: float | None
    points: bool
    row: dict[str, Any]

    @property
    def unit(self) -> str:
        return "points" if self.points else self.metric

    def show(self, value: float | None, digits: int = 3) -> str:
        return fixed(value) if self.points else significant(value, digits)


@dataclass(frozen=True)
class Comparison:
    """A task from pre-trained weights beside the same from random ones. `gain` > 0 means that pre-training helps."""

    task: str
    trained: Score | None
    random: Score | None
    gain: float | None = None
    interval: tuple[float, float] | None = None


# ---- fine-tuning ----------------------------------------------------------------------------------------------------


def scores(results: Sequence[dict[str, Any]]) -> list[Score]:
    """Rows with a usable mean."""
    found = []
    for row in results:
        metric, mean = text_at(row, "metric"), at(row, "mean")
        values = [value for value in map(figure, list_at(row, "values")) if value is not None]
        if mean is None:
            continue
        points = metric not in RAW
        scale = 100.0 if points else 1.0

        def scaled(value: float | None, scale: float = scale) -> float | None:
            return None if value is None else scale * value

        init, task = text_at(row, "init") or "pretrained", text_at(row, "title") or text_at(row, "task") or "unnamed"
        found.append(
            Score(task, metric, init, tuple(scale * value for value in values), scale * mean, scaled(at(row, "std")),
                  interval_of(row, scale), scaled(at(row, "majority_baseline")), points, row)
        )  # fmt: skip
    return found


def comparisons(results: Sequence[dict[str, Any]]) -> list[Comparison]:
    """One per task, in the order of the results."""
    by_task: dict[str, dict[str, Score]] = {}
    for score in scores(results):
        by_task.setdefault(score.task, {}).setdefault(score.init, score)
    found = []
    for task, group in by_task.items():
        random = group.get("random")
        trained = next((score for init, score in group.items() if init != "random"), None)
        found.append(Comparison(task, trained, random, *_gain(trained, random)))
    return found


def _gain(trained: Score | None, random: Score | None) -> tuple[float | None, tuple[float, float] | None]:
    """What the results say was gained, else the difference paired by seed; positive is better for every metric."""
    if trained is None or random is None:
        return None, None
    sign = -1.0 if trained.metric in LOWER_IS_BETTER else 1.0
    mean = at(trained.row, "gain", "mean")
    if mean is not None:
        scale = sign * (100.0 if trained.points else 1.0)
        ends = interval_of(get(trained.row, "gain"), scale)
        return scale * mean, ends
    if len(trained.values) != len(random.values) or not trained.values:
        return sign * (trained.mean - random.mean), None
    gaps = [sign * (first - second) for first, second in zip(trained.values, random.values, strict=True)]
    return sum(gaps) / len(gaps), paired(gaps)


def paired(gaps: Sequence[float]) -> tuple[float, float] | None:
    """95\u00a0% interval of the mean of paired differences (Student 1908); None below two."""
    number = len(gaps)
    if number < 2:
        return None
    from scipy.stats import t

    mean = sum(gaps) / number
    deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / (number - 1))
    half = float(t.ppf(0.975, number - 1)) * deviation / math.sqrt(number)
    return mean - half, mean + half


def interval_of(row: Any, scale: float) -> tuple[float, float] | None:
    """`row["interval"]` in order, scaled; None unless it is two numbers."""
    ends = [figure(end) for end in list_at(row, "interval")]
    low, high = ends if len(ends) == 2 else (None, None)
    if low is None or high is None:
        return None
    return min(scale * low, scale * high), max(scale * low, scale * high)


# ---- sentences ------------------------------------------------------------------------------------------------------


def verdicts(found: Collected) -> list[Verdict]:
    """The sentences at the head of the page."""
    return [
        *_language(found.summary),
        *(verdict for comparison in comparisons(found.results) for verdict in _task(comparison)),
        *_speed(found.latency),
        *_training(found),
    ]


def _language(summary: dict[str, Any]) -> list[Verdict]:
    loss = at(summary, "final_validation_loss")
    levels = [(name, level) for name in ("bigram", "unigram") if (level := at(summary, f"{name}_nll")) is not None]
    if loss is None:
        return []
    if not levels:
        return [
            Verdict("note", f"Held-out loss is {loss:.2f} nats per masked token; there are no baselines beside it.")
        ]
    beaten = [f"the {name} baseline {level:.2f}" for name, level in levels if loss < level]
    missed = [f"the {name} baseline {level:.2f}" for name, level in levels if loss >= level]
    text = f"Held-out loss {loss:.2f} nats per masked token is "
    if not missed:
        return [Verdict("good", f"{text}below {' and '.join(beaten)}.")]
    below = f"below {beaten[0]} but " if beaten else ""
    return [
        Verdict("bad", f"{text}{below}not below {' nor '.join(missed)}: the encoder has not learnt to use context.")
    ]


def _task(comparison: Comparison) -> list[Verdict]:
    trained, random = comparison.trained, comparison.random
    if trained is None:
        return [Verdict("note", f"{comparison.task}: only random initialisation was evaluated.")]
    number = len(trained.values)
    spread = f" ± {trained.show(trained.std, 2)}" if trained.std is not None and number > 1 else ""
    text = f"{comparison.task}: {trained.metric} {trained.show(trained.mean)}{spread}"
    text += f" over {number} seeds" if number > 1 else " with one seed"
    weak = trained.majority is not None and trained.metric not in LOWER_IS_BETTER and trained.mean <= trained.majority
    constant = f" No better than always answering the majority class ({trained.show(trained.majority)})."
    if comparison.gain is None or random is None:
        return [
            Verdict("bad" if weak else "note", f"{text}; no random-initialisation baseline.{constant if weak else ''}")
        ]
    gain, mark, shown = comparison.gain, "note", True
    size = f"{trained.show(abs(gain))} {trained.unit}"
    interval = "one seed, no interval"
    if comparison.interval:
        low, high = comparison.interval
        interval = f"95\u00a0% interval {trained.show(low)} to {trained.show(high)}"
        mark, shown = ("good", True) if low > 0 else ("note", False)
    if trained.show(abs(gain)) == trained.show(0.0):
        text, mark = (
            f"{text}; no better than random initialisation ({interval}).",
            "bad" if comparison.interval and shown else "note",
        )
    elif gain > 0 and not shown:
        text += f"; {size} above random initialisation, but the {interval} includes no gain: not shown to be better."
    elif gain > 0:
        text += f"; beats random initialisation by {size} ({interval})."
    else:
        text += f"; does not beat random initialisation: {size} below it ({interval})."
        mark = "bad"
    return [Verdict("bad" if weak else mark, text + (constant if weak else ""))]


def speedups(latency: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], float | None]]:
    """Every row with a median, and how many times as fast as the baseline of the same setting it is."""
    usable = [row for row in latency if (at(row, "median_ms") or 0) > 0]
    bases = {setting(row): at(row, "median_ms") for row in usable if is_baseline(row)}
    found: list[tuple[dict[str, Any], float | None]] = []
    for row in usable:
        base = bases.get(setting(row))
        found.append((row, None if base is None or is_baseline(row) else base / row["median_ms"]))
    return found


def setting(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(text_at(row, key) for key in ("device", "threads", "batch_size", "length"))


def is_baseline(row: dict[str, Any]) -> bool:
    return text_at(row, "kind").startswith("baseline")


def name_of(row: dict[str, Any]) -> str:
    kind = text_at(row, "kind")
    return KINDS.get(kind, kind or "unnamed")


def headline_setting(latency: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], float | None]]:
    """The rows of one setting: fewest threads, smallest batch, longest sequences."""
    rows = [(row, ratio) for row, ratio in speedups(latency) if not is_baseline(row)]
    if not rows:
        return []

    def order(row: dict[str, Any]) -> tuple[float, float, float]:
        return at(row, "threads") or 0, at(row, "batch_size") or 0, -(at(row, "length") or 0)

    best = setting(min((row for row, _ in rows), key=order))
    return sorted(((row, ratio) for row, ratio in rows if setting(row) == best), key=lambda pair: pair[0]["median_ms"])


def _speed(latency: Sequence[dict[str, Any]]) -> list[Verdict]:
    rows = headline_setting(latency)
    if not rows:
        return []
    row, ratio = rows[0]
    text = f"Fastest form: {name_of(row)}, {milliseconds(row['median_ms'])}\u00a0ms median for {describe_setting(row)}"
    if ratio is None:
        return [Verdict("note", f"{text}; no BERT-base beside it.")]
    others = [f"{name_of(other)} {significant(times)}\u00a0×" for other, times in rows[1:] if times is not None]
    also = f" ({', '.join(others)})" if others else ""
    mark = "good" if ratio > 1 else "bad"
    return [Verdict(mark, f"{text}: {significant(ratio)}\u00a0× as fast as BERT-base in PyTorch{also}.")]


def describe_setting(row: dict[str, Any]) -> str:
    threads, batch, length = (text_at(row, key) or "?" for key in ("threads", "batch_size", "length"))
    device = text_at(row, "device")
    where = f"{threads} CPU thread{'s' * (threads != '1')}" if device in ("", "cpu") else short(device, 30)
    return f"batch {batch} × {length} tokens, {where}"


def _training(found: Collected) -> list[Verdict]:
    """How training went: whether it waited for data, stopped early, or had to go back."""
    step, wait = (at(found.summary, "cost_seconds", name) for name in ("train", "wait"))
    verdicts = []
    if wait is not None and step:
        share = wait / (step + wait)
        text = f"Training waited for data {percent(share)} of its step time"
        verdicts.append(Verdict("good", f"{text}.") if share < 0.02 else Verdict("bad", f"{text}; aim below 2\u00a0%."))
    ended = text_at(found.summary, "ended")
    if ended.startswith("early"):
        verdicts.append(Verdict("bad", f"Pre-training gave up before its budget was used: {ended}."))
    if found.events:
        number = (
            f"one event: {found.events[0]}" if len(found.events) == 1 else f"{count(len(found.events))} events, below."
        )
        verdicts.append(Verdict("note", f"Pre-training was not smooth: {number}"))
    return verdicts
