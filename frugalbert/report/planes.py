"""The figures of an architecture search: the quality-latency plane, progress, predicted latency, the slices' losses.

In: what `collect` found, of stages that may be missing or half done. Out: a `Plot` for each that there are data for.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from frugalbert.report import extraction, plots
from frugalbert.report.collect import Collected, Selection
from frugalbert.report.plots import Curve, Points
from frugalbert.report.selection import MOST_DOTS, finalists_of, is_text, limits_of
from frugalbert.report.svg import Plot
from frugalbert.report.wording import (
    at,
    big,
    count,
    figure,
    get,
    list_at,
    milliseconds,
    percent,
    short,
    significant,
    text_at,
)

ORIGINS = {"random": "grey", "fast": "purple", "design": "teal", "mutation": "blue", "crossover": "orange"}
SLICES = (("", "largest", "blue"), ("_median", "median", "green"), ("_smallest", "smallest", "purple"))


def figures(found: Collected) -> dict[str, Plot | None]:
    """The section's figures by name."""
    steered = not extraction.is_there(found)  # otherwise candidates come in the order of the list
    return {
        **extraction.figures(found), "plane": _plane(found) if steered else None,
        "progress": _progress(found) if steered else None, "predicted": _predicted(found.selection),
        "slices": _slices(found.selection),
    }  # fmt: skip


def _levels(found: Collected, axis: str) -> dict[str, float]:
    """The limit on the plane's horizontal axis, where it is one."""
    levels = {}
    for name, value, _ in limits_of(found):
        if name == axis and value is not None:
            levels["limit"] = value
        elif name == "speedup" and axis == "latency_ms" and value:
            pairs = [(at(row, "latency_ms"), at(row, "speedup")) for row in found.selection.candidates]
            base = next((ms * times for ms, times in pairs if ms and times), None)
            levels |= {"limit": base / value} if base else {}
    return levels


def _points(rows: Sequence[dict[str, Any]], x: str, y: str = "score") -> tuple[list[float], list[float]]:
    pairs = [(a, b) for row in rows if (a := at(row, x)) is not None and (b := at(row, y)) is not None]
    return [a for a, _ in pairs], [b for _, b in pairs]


def _plane(found: Collected) -> Plot | None:
    """Quality against latency: every candidate by origin, the front, the finalists as measured, and the chosen one."""
    selection = found.selection
    axis = "latency_ms" if any(at(row, "latency_ms") is not None for row in selection.candidates) else "parameters"
    step = -(-len(selection.candidates) // MOST_DOTS)
    groups = []
    for origin in dict.fromkeys([*ORIGINS, *(text_at(row, "origin") for row in selection.candidates)]):
        rows = [row for row in selection.candidates if text_at(row, "origin") == origin]
        groups.append(
            Points(short(origin, 24) or "candidate", ORIGINS.get(origin, "red"), *_points(rows[:: step or 1], axis))
        )
    groups = [group for group in groups if group.x][:7]
    if not groups:
        return None
    xs, ys = _points(selection.candidates, axis)
    chosen = _points([get(selection.search, "chosen") or {}], axis)
    groups.append(Points("Pareto front", "green", *_points(selection.front, axis), "line"))
    if axis == "latency_ms":
        groups.append(Points("measured again", "red", *_points(finalists_of(found), "measured_ms"), "cross"))
    groups.append(Points("chosen", "ink", *chosen, "ring"))
    levels = _levels(found, axis)
    unit, form = ("ms", milliseconds) if axis == "latency_ms" else ("parameters", big)
    alt = f"Scatter plot of {count(len(xs))} candidates: scores from {significant(min(ys), 4)} to "
    alt += f"{significant(max(ys), 4)} against {form(min(xs))} to {form(max(xs))} {unit}"
    alt += f"; {len(selection.front)} are on the front" if selection.front else ""
    alt += f"; chosen is {form(chosen[0][0])} {unit} with {significant(chosen[1][0], 4)}" if chosen[0] else ""
    alt += f"; the limit is {form(levels['limit'])} {unit}" if levels else ""
    titles = ("Score (lower is better)", "predicted latency (ms)" if axis == "latency_ms" else "parameters")
    return plots.scatter([group for group in groups if group.x], titles, levels, f"{alt}.")


def _progress(found: Collected) -> Plot | None:
    """The best score so far over the evaluations, above every candidate's."""
    numbered = [{**row, "number": number} for number, row in enumerate(found.selection.candidates, 1)]
    x, y = _points(numbered, "number")
    if not x:
        return None
    best = list(itertools.accumulate(y, min))
    step = -(-len(x) // MOST_DOTS)
    dots, line = Points("candidates", "grey", x[::step], y[::step]), Points("best so far", "blue", x, best, "steps")
    first, last, reached = y[0], best[-1], x[best.index(best[-1])]
    alt = f"Best score over {count(len(found.selection.candidates))} evaluations: from {significant(first, 4)} to "
    alt += f"{significant(last, 4)}, reached after {count(reached)}."
    return plots.scatter([dots, line], ("Score (lower is better)", "evaluations"), {}, alt)


def _predicted(selection: Selection) -> Plot | None:
    """Predicted against measured latency: held-out architectures of the table, and the finalists."""
    pairs = [pair for pair in list_at(selection.predictor, "report", "points") if isinstance(pair, list)]
    ends = [[figure(end) for end in pair] for pair in pairs if len(pair) == 2]
    known = [(a, b) for a, b in ends if a is not None and b is not None]
    rows = [row for row in list_at(selection.search, "finalists") if isinstance(row, dict)]
    groups = [Points("held out", "blue", [a for a, _ in known], [b for _, b in known])]
    groups.append(Points("the best, measured again", "red", *_points(rows, "measured_ms", "latency_ms"), "cross"))
    groups = [group for group in groups if group.x]
    if not groups:
        return None
    off = [abs(b / a - 1) for group in groups for a, b in zip(group.x, group.y, strict=True) if a]
    alt = f"Predicted against measured latency of {len(off)} architectures with the line of equality"
    alt += f"; the largest error is {percent(max(off))}." if off else "."
    return plots.scatter(groups, ("Predicted (ms)", "measured (ms)"), {}, alt, diagonal=True)


def _slices(selection: Selection) -> Plot | None:
    """Held-out losses of the largest, a median and the smallest slice, and the mean training loss."""
    training, text = selection.supernet, is_text(selection)
    curves = []
    for records, key, label, colour in (
        (training.train, "text_loss" if text else "loss", "training", "orange"),
        *((training.validation, f"validation_loss{end}", label, colour) for end, label, colour in SLICES),
    ):
        pairs = [(at(row, "tokens"), at(row, key)) for row in records]
        known = [(x, y) for x, y in pairs if x is not None and y is not None]
        if known:
            curves.append(Curve(label, colour, [x for x, _ in known], [y for _, y in known]))
    if not curves:
        return None
    names = ("unigram", "bigram") if text else ()
    levels = {name: level for name in names if (level := at(training.summary, f"{name}_nll")) is not None}
    words = "; ".join(f"{curve.label} from {curve.y[0]:.2f} to {curve.y[-1]:.2f}" for curve in curves)
    alt = f"Losses of the super-network’s slices over the tokens seen: {words}."
    title = "Loss (nats per masked token)" if text else "Distance from the teacher"
    return plots.curves(curves, levels, {}, "tokens", alt, title)
