"""Sweeps: what to try and how trials came out in; the chosen setting and an honest table out.

Pure logic: the caller trains. A setting is chosen by its mean over seeds, never by its luckiest one. Methods: the grid;
random search (Bergstra and Bengio, JMLR 2012); the tree-structured Parzen estimator (Bergstra et al., NeurIPS 2011) by
Optuna. `keep` is successive halving (Jamieson and Talwalkar, arXiv 1502.07943) whose resource is the number of seeds.
Nothing is stored here: a driver that died asks for the same again, and finds what is done in its journal.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from frugalbert.config import Sweep
from frugalbert.finetune import metrics
from frugalbert.run import check_stop

Setting = dict[str, int | float]
Axis = tuple[int | float, ...] | str
Pair = tuple[Setting, int]
Evaluate = Callable[[list[Pair]], Sequence[float | None]]
AXES = ("learning_rate", "batch_size", "epochs", "warmup", "weight_decay", "layer_decay")
LIMITS = {"learning_rate": (0.0, math.inf), "epochs": (0.0, math.inf), "layer_decay": (0.0, 1.0), "warmup": (-1.0, 1.0)}
"""(more than, at most) of an axis; the others are bounded by their types."""
LARGE = 100_000  # training examples; MNLI, QQP and QNLI have more, SST-2 (67,349) is among the small tasks there
_RECIPE: dict[str, Axis] = {"warmup": (0.06,), "weight_decay": (0.1,)}
_SMALL: dict[str, Axis] = {"learning_rate": (1e-5, 3e-5, 5e-5, 8e-5), "batch_size": (16, 32), "epochs": (3, 5, 10)}
_LARGE: dict[str, Axis] = {"learning_rate": (5e-5, 8e-5), "batch_size": (32,), "epochs": (3, 5)}
_BORT: dict[str, Axis] = {
    "learning_rate": (1e-4, 1e-5, 9e-6), "batch_size": (8, 16), "warmup": (0.35, 0.4, 0.45, 0.5),
    "weight_decay": (0, 10, 100, 350),
}  # fmt: skip
PRESETS: dict[str, tuple[dict[str, Axis], dict[str, Axis], int]] = {
    "24hbert": (_SMALL | _RECIPE, _LARGE | _RECIPE, 5),
    "extremebert": (_SMALL | _RECIPE, _LARGE | _RECIPE, 1),
    "bort": (_BORT, _BORT, 5),
}
"""Axes below and from `LARGE` training examples, and seeds (arXiv 2104.07705, 2211.17201, 2010.10499). Bort's epochs
(50 to 1,000) stay the recipe's."""
MOST_ROWS = 20


@dataclass(frozen=True)
class Outcome:
    """What a sweep found. `rows` are the settings in the order they were first tried: `setting`, `seeds`, `values`
    (None = diverged or undefined), `mean`, `median`, `std`, `min`, `max` (None unless every seed has a value).

    `best` is a row's number, `score` its `statistic` (mean; the preset 24hbert: median). `num_trials` counts different
    (setting, seed) pairs. `by_chance`: by how much the best mean would exceed the average one if all settings were
    equally good, from the spread of seeds within settings; None where that spread is not known.
    """

    method: str
    preset: str | None
    tried: dict[str, list[Any]]
    rows: list[dict[str, Any]]
    best: int
    statistic: str
    score: float
    num_settings: int
    num_trials: int
    num_failed: int
    by_chance: float | None

    @property
    def setting(self) -> Setting:
        return self.rows[self.best]["setting"]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def seeds_for(sweep: Sweep, seeds: Sequence[int]) -> tuple[int, ...]:
    """The seeds of every setting: the recipe's, or as many as the preset's protocol has if that is more."""
    least = PRESETS[sweep.preset][2] if sweep.preset else 1
    return tuple(seeds) if len(seeds) >= least else tuple(range(least))


def axes(sweep: Sweep, num_train: int) -> dict[str, Axis]:
    """What is varied, by name, in the order of `AXES`: different values, or a range `low..high`.

    Raises ValueError for nothing to try, values out of bounds and ranges that `method` cannot take.
    """
    small, large, _ = PRESETS[sweep.preset] if sweep.preset else ({}, {}, 0)
    preset = large if num_train >= LARGE else small
    found: dict[str, Axis] = {}
    for name in AXES:
        values = getattr(sweep, name) or preset.get(name, ())
        if values:
            found[name] = _checked(name, values, sweep.method)
    if not found:
        raise ValueError(
            "finetune.sweep has nothing to try; write values such as learning_rate: [1e-5, 5e-5], or preset: 24hbert"
        )
    return found


def _checked(name: str, values: Axis, method: str) -> Axis:
    ends = [float(end) for end in values.split("..")] if isinstance(values, str) else [float(value) for value in values]
    more_than, most = LIMITS.get(name, (-math.inf, math.inf))
    if not all(more_than < end <= most and math.isfinite(end) for end in ends):
        bound = "more than 0" if more_than == 0.0 else "0 or more"
        raise ValueError(
            f"finetune.sweep.{name}: {values if isinstance(values, str) else list(values)} has a value out of bounds; "
            f"write {bound}{'' if most == math.inf else f', at most {most:g}'}"
        )
    if not isinstance(values, str):
        return tuple(dict.fromkeys(values))
    if not 0.0 < ends[0] < ends[1]:
        raise ValueError(f"finetune.sweep.{name}: {values} is no range of positive numbers; write it as 1e-5..1e-3")
    if method == "grid":
        raise ValueError(
            f"finetune.sweep.{name}: a grid needs values, not {values}; write a list, or method: random (or tpe)"
        )
    return values


# ---- what is tried --------------------------------------------------------------------------------------------------


def run(sweep: Sweep, base: Setting, seeds: Sequence[int], num_train: int, evaluate: Evaluate) -> Outcome:
    """Try settings and choose one.

    Args:
        base: the recipe: a value for every name of `AXES`; settings are this with the varied ones replaced.
        seeds: of every setting; see `seeds_for`.
        num_train: training examples; published grids depend on it.
        evaluate: scores of (setting, seed) pairs in their order, larger is better, None = diverged or undefined. It is
            asked for the same pair again, also by a later process: a pair that is done is not to be done again.
    Raises ValueError if nothing can be tried, or no setting has a score.
    """
    varied = axes(sweep, num_train)
    scores: dict[str, dict[int, float | None]] = {}
    settings: dict[str, Setting] = {}

    def rungs(batch: list[Setting]) -> list[float | None]:
        return _rungs(batch, seeds, sweep.keep, lambda pairs: _ask(pairs, evaluate, settings, scores), scores)

    if sweep.method == "grid":
        rungs([base | setting for setting in _product(varied)])
    elif sweep.method == "random":
        rungs([base | setting for setting in _draws(varied, sweep.trials, sweep.seed)])
    else:
        _tpe(sweep, varied, lambda batch: rungs([base | setting for setting in batch]))
    return _outcome(sweep, varied, settings, scores)


def listed(sweep: Sweep, num_train: int) -> list[Setting]:
    """What a grid or a random search would try, the varied values alone. Raises ValueError as `axes` does."""
    varied = axes(sweep, num_train)
    return _product(varied) if sweep.method == "grid" else _draws(varied, sweep.trials, sweep.seed)


def _key(setting: Setting) -> str:
    return json.dumps(setting, sort_keys=True)


def _ask(
    pairs: list[Pair], evaluate: Evaluate, settings: dict[str, Setting], scores: dict[str, dict[int, float | None]]
) -> None:
    """Have `pairs` scored; `settings` and `scores` take the answers."""
    check_stop()
    for (setting, seed), score in zip(pairs, evaluate(pairs), strict=True):
        settings.setdefault(_key(setting), setting)
        known = score is not None and math.isfinite(score)
        scores.setdefault(_key(setting), {})[seed] = float(score) if known and score is not None else None


def _rungs(
    batch: list[Setting], seeds: Sequence[int], keep: float, ask: Callable[[list[Pair]], None],
    scores: dict[str, dict[int, float | None]],
) -> list[float | None]:  # fmt: skip
    """Mean over its seeds of each setting, None if one is undefined. With `keep` < 1 only the best go on."""
    rest = list({_key(setting): setting for setting in batch}.values())
    for rung in [list(seeds)] if keep == 1.0 else [[seed] for seed in seeds]:
        ask([(setting, seed) for setting in rest for seed in rung])
        defined = [setting for setting in rest if mean(scores[_key(setting)]) is not None]
        ranked = sorted(defined, key=lambda setting: -(mean(scores[_key(setting)]) or 0.0))[
            : math.ceil(keep * len(rest))
        ]
        rest = [setting for setting in rest if setting in ranked]
        if not rest:
            break
    return [mean(scores[_key(setting)]) for setting in batch]


def mean(values: dict[int, float | None]) -> float | None:
    """Over the seeds; None if one of them has none."""
    known = [value for value in values.values() if value is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None


def _product(varied: dict[str, Axis]) -> list[Setting]:
    """All combinations; the last axis changes fastest."""
    lists = {name: values for name, values in varied.items() if not isinstance(values, str)}
    return [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]


def _draws(varied: dict[str, Axis], count: int, seed: int) -> list[Setting]:
    """Different settings by chance, fewer if there are no more; a smaller `count` gives the first of a larger one's."""
    generator = np.random.default_rng(seed)
    if not any(isinstance(values, str) for values in varied.values()):
        everything = _product(varied)
        return [everything[number] for number in generator.permutation(len(everything))[:count]]
    found: dict[str, Setting] = {}
    for _ in range(100 * count):
        if len(found) == count:
            break
        setting = {name: _drawn(values, generator) for name, values in varied.items()}
        found.setdefault(_key(setting), setting)
    return list(found.values())


def _drawn(values: Axis, generator: np.random.Generator) -> int | float:
    if not isinstance(values, str):
        return values[int(generator.integers(len(values)))]
    low, high = (float(end) for end in values.split(".."))
    return rounded(math.exp(generator.uniform(math.log(low), math.log(high))), low, high)


def rounded(value: float, low: float, high: float) -> float:
    """Four significant digits, within the range."""
    return min(max(float(f"{value:.4g}"), low), high)


def _tpe(sweep: Sweep, varied: dict[str, Axis], score: Callable[[list[Setting]], list[float | None]]) -> None:
    """Batches of `at_once` proposals, told in order; an undefined score counts as the worst there can be."""
    for study, size in _study(sweep):
        trials = [study.ask() for _ in range(size)]
        batch = [{name: _proposed(trial, name, values) for name, values in varied.items()} for trial in trials]
        for trial, value in zip(trials, score(batch), strict=True):
            study.tell(trial, -math.inf if value is None else value)


def _study(sweep: Sweep) -> Iterator[tuple[Any, int]]:
    """(Optuna's study, how many to ask for now) until all trials are proposed. In memory, with a seeded sampler."""
    try:
        import optuna
    except ImportError:
        raise ValueError(
            "finetune.sweep: tpe needs Optuna; install it with `pip install 'frugalbert[sweeps]'`, or try random"
        ) from None
    import warnings

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # constant_liar, which keeps a batch apart, calls itself experimental
            sampler = optuna.samplers.TPESampler(seed=sweep.seed, constant_liar=True)
            study = optuna.create_study(direction="maximize", sampler=sampler)
        for start in range(0, sweep.trials, sweep.at_once):
            yield study, min(sweep.at_once, sweep.trials - start)
    finally:
        optuna.logging.set_verbosity(before)


def _proposed(trial: Any, name: str, values: Axis) -> int | float:
    if not isinstance(values, str):
        return trial.suggest_categorical(name, list(values))
    low, high = (float(end) for end in values.split(".."))
    return rounded(trial.suggest_float(name, low, high, log=True), low, high)


# ---- what came of it ------------------------------------------------------------------------------------------------


def _outcome(
    sweep: Sweep, varied: dict[str, Axis], settings: dict[str, Setting], scores: dict[str, dict[int, float | None]]
) -> Outcome:
    rows = [_row(settings[key], scores[key]) for key in settings]
    usable = [number for number, row in enumerate(rows) if row["mean"] is not None]
    if not usable:
        raise ValueError(
            f"none of the {len(rows)} settings of the sweep has a score with every seed: they diverged, or the metric "
            "is undefined; write smaller values into finetune.sweep.learning_rate"
        )
    best = max(usable, key=lambda number: (len(rows[number]["seeds"]), rows[number]["mean"], -number))
    statistic = "median" if sweep.preset == "24hbert" else "mean"
    values = [value for row in rows for value in row["values"]]
    return Outcome(
        method=sweep.method,
        preset=sweep.preset,
        tried={name: [values] if isinstance(values, str) else list(values) for name, values in varied.items()},
        rows=rows,
        best=best,
        statistic=statistic,
        score=rows[best][statistic],
        num_settings=len(rows),
        num_trials=len(values),
        num_failed=sum(value is None for value in values),
        by_chance=_by_chance([rows[number] for number in usable], len(rows[best]["seeds"])),
    )


def _row(setting: Setting, scores: dict[int, float | None]) -> dict[str, Any]:
    values = list(scores.values())
    known = [value for value in values if value is not None]
    whole = bool(known) and len(known) == len(values)
    figures = {"mean": np.mean, "median": np.median, "min": np.min, "max": np.max}
    row: dict[str, Any] = {"setting": setting, "seeds": list(scores), "values": values}
    row |= {name: float(function(known)) if whole else None for name, function in figures.items()}
    row["std"] = metrics.plain(metrics.summary(known)[1]) if whole else None
    return row


def _by_chance(rows: list[dict[str, Any]], num_seeds: int) -> float | None:
    """Pooled deviation of seeds within settings / sqrt(seeds) · E[the largest of that many normal draws]."""
    spreads = [row["std"] ** 2 for row in rows if row["std"] is not None]
    if not spreads or len(rows) < 2:
        return None
    return math.sqrt(float(np.mean(spreads)) / num_seeds) * expected_maximum(len(rows))


def expected_maximum(count: int) -> float:
    """Mean of the largest of `count` independent standard normal numbers: 0, 0.564, 0.846, …, 2.51 for 100."""
    from scipy.special import ndtr

    edges = np.linspace(-9.0, 9.0, 4001)
    below = ndtr(edges) ** count
    return float(9.0 - np.trapezoid(below, edges))  # E[X] = 9 - the integral of P(X <= x) up to there


def notes(outcome: Outcome, num_selecting: int) -> list[str]:
    """What has to be known to believe the choice: how many were tried, and on how many examples."""
    lines = [
        f"{outcome.num_settings} settings, {outcome.num_trials} trials ({outcome.num_failed} diverged or undefined), "
        f"chosen by the mean over seeds on {num_selecting} examples; the best has "
        f"{len(outcome.rows[outcome.best]['seeds'])} seeds"
    ]
    if outcome.by_chance is not None:
        lines.append(
            f"if all settings were equally good, the best of {outcome.num_settings} would still look "
            f"{outcome.by_chance:.4f} better than their average, from the choice of seeds alone"
        )
    lines.append(
        f"one accuracy on {num_selecting} examples has a standard error of up to {0.5 / math.sqrt(num_selecting):.3f}: "
        "the best score on the examples that chose it is too kind"
    )
    return lines


def table(outcome: Outcome) -> list[dict[str, Any]]:
    """Rows for people, best first: rank, what was varied, the figures; the chosen one has rank 1."""

    def order(number: int) -> tuple[bool, int, float, int]:
        row = outcome.rows[number]
        return row["mean"] is None, -len(row["seeds"]), -(row["mean"] or 0.0), number

    found = []
    for rank, number in enumerate(sorted(range(len(outcome.rows)), key=order), 1):
        row = outcome.rows[number]
        varied = {
            name: row["setting"][name]
            for name, values in outcome.tried.items()
            if len(values) > 1 or ".." in str(values[0])
        }
        figures = {name: row[name] for name in ("mean", "median", "std", "min", "max")}
        found.append({"rank": rank, **varied, **figures, "num_seeds": len(row["seeds"])})
    return found


def show(outcome: Outcome, title: str, num_selecting: int) -> None:
    """The table and its notes, to standard error."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = table(outcome)
    shown = Table(title=Text(title), title_justify="left")
    for name in rows[0]:
        shown.add_column(name.replace("_", " ").replace("num ", ""), overflow="fold")
    for row in rows[:MOST_ROWS]:
        shown.add_row(*(Text("?" if value is None else f"{value:.4g}") for value in row.values()))
    console = Console(stderr=True)
    console.print(shown)
    more = len(rows) - MOST_ROWS
    for line in [
        *([f"{more} more settings are in the results file"] if more > 0 else []),
        *notes(outcome, num_selecting),
    ]:
        console.print(Text(line))
