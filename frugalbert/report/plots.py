"""The report's figures, drawn by matplotlib: plain numbers and labels in, `svg.Plot` out."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from frugalbert.report.svg import COLOURS, POINTS, Plot, plot_of
from frugalbert.report.wording import big, milliseconds, short, tick

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SERIES = ("blue", "orange", "green", "purple", "teal", "red", "grey")
WIDTH = 400  # units of the drawing; an inch has 72
MOST_POINTS = 240
SHADES = 8
SETTINGS = {
    "svg.fonttype": "none", "svg.hashsalt": "frugalbert", "text.parse_math": False, "font.size": 11,
    "axes.facecolor": "none",
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": COLOURS["grid"],
    "axes.labelcolor": COLOURS["muted"], "axes.labelsize": 11, "axes.titlecolor": COLOURS["ink"],
    "axes.titlesize": 11, "axes.grid": True, "axes.axisbelow": True, "grid.color": COLOURS["grid"],
    "grid.linewidth": 0.7, "xtick.color": COLOURS["grid"], "ytick.color": COLOURS["grid"],
    "xtick.labelcolor": COLOURS["muted"], "ytick.labelcolor": COLOURS["muted"], "ytick.major.size": 0,
    "xtick.major.size": 3, "legend.frameon": False, "legend.fontsize": 10.5, "legend.labelcolor": COLOURS["ink"],
    "legend.borderaxespad": 0.0, "legend.handlelength": 1.4, "lines.solid_capstyle": "round",
}  # fmt: skip


@dataclass(frozen=True)
class Curve:
    """One line: `x` and `y` of equal length."""

    label: str
    colour: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Points:
    """One group of a scatter plot. `style` is `dot`, `cross`, `ring`, `line` (with dots) or `steps`."""

    label: str
    colour: str
    x: Sequence[float]
    y: Sequence[float]
    style: str = "dot"


STYLES: dict[str, dict[str, Any]] = {
    "dot": {"marker": "o", "linestyle": "", "markersize": 5, "alpha": 0.6, "markeredgewidth": 0},
    "cross": {"marker": "x", "linestyle": "", "markersize": 6, "markeredgewidth": 1.6},
    "ring": {"marker": "o", "linestyle": "", "markersize": 12, "fillstyle": "none", "markeredgewidth": 1.8},
    "line": {"marker": "o", "markersize": 3.2, "linewidth": 1.4},
    "steps": {"drawstyle": "steps-post", "linewidth": 1.8},
}


# ---- figures --------------------------------------------------------------------------------------------------------


def curves(
    loss: Sequence[Curve],
    levels: dict[str, float],
    below: dict[str, Curve],
    axis: str,
    alt: str,
    title: str = "Loss (nats per masked token)",
) -> Plot:
    """Loss over `axis` (`tokens` or `seconds`) with horizontal `levels`; one small panel per entry of `below`."""
    longest = max((x for curve in loss for x in curve.x), default=1.0)
    size, unit = _unit(axis, longest)
    with drawing():
        height = 250 + 92 * len(below)
        figure = new_figure(height)
        panels = figure.subplots(
            1 + len(below), 1, sharex=True, squeeze=False, height_ratios=[2.5] + [0.75] * len(below)
        )[:, 0]
        top = panels[0]
        for curve in loss:
            _line(top, curve, size, faint=curve.label.startswith("training"))
        for label, value in levels.items():
            top.axhline(value, color=COLOURS["muted"], linewidth=1, linestyle=(0, (4, 3)))
            top.annotate(f"{label} {value:.2f}", (1, value), (0, 3), xycoords=("axes fraction", "data"),
                         textcoords="offset points", ha="right", va="bottom", color=COLOURS["muted"],
                         fontsize=10.5)  # fmt: skip
        _window(top, loss, list(levels.values()))
        _title(top, title)
        top.legend(loc="lower right", bbox_to_anchor=(1.0, 1.01), ncols=2, borderpad=0, columnspacing=1.2)
        for panel, (title, curve) in zip(panels[1:], below.items(), strict=True):
            _line(panel, curve, size)
            panel.set_ylim(bottom=0)
            panel.margins(y=0.15)
            panel.locator_params(axis="y", nbins=4, min_n_ticks=3)
            panel.yaxis.set_major_formatter(lambda value, _: tick(value))
            _title(panel, title)
        panels[-1].set_xlim(left=0)
        panels[-1].set_xlabel(unit, loc="right")
        return plot_of(figure, alt)


def scatter(
    groups: Sequence[Points], titles: tuple[str, str], levels: dict[str, float], alt: str, *, diagonal: bool = False
) -> Plot:
    """`titles` of the vertical and the horizontal axis; `levels` are vertical lines; the diagonal is x = y."""
    with drawing():
        figure = new_figure(290 + 16 * -(-len(groups) // 3))
        axes = figure.subplots()
        if diagonal:
            ends = [value for group in groups for value in (*group.x, *group.y)]
            axes.plot([min(ends), max(ends)], [min(ends), max(ends)], color=COLOURS["muted"], linewidth=1,
                      linestyle=(0, (4, 3)))  # fmt: skip
        for order, group in enumerate(groups):
            axes.plot(group.x, group.y, color=COLOURS[group.colour], label=group.label, zorder=3 + order,
                      **STYLES[group.style])  # fmt: skip
        for label, value in levels.items():
            axes.axvline(value, color=COLOURS["red"], linewidth=1.2, linestyle=(0, (4, 3)))
            axes.annotate(label, (value, 1), (-4, -3), xycoords=("data", "axes fraction"), textcoords="offset points",
                          ha="right", va="top", rotation=90, color=COLOURS["red"], fontsize=10.5)  # fmt: skip
        axes.margins(0.05)
        axes.xaxis.set_major_formatter(lambda value, _: tick(value))
        axes.yaxis.set_major_formatter(lambda value, _: tick(value))
        _title(axes, titles[0])
        axes.set_xlabel(titles[1], loc="right")
        figure.legend(loc="outside lower left", ncols=3, columnspacing=1.2, handletextpad=0.6)
        return plot_of(figure, alt)


def weighted(
    dots: Sequence[tuple[float, float, float]],
    chosen: tuple[float, float] | None,
    hollow: Sequence[float],
    title: str,
    alt: str,
) -> Plot:
    """`dots` (x, error, W), the deeper the larger W; `chosen` (x, error) is marked; `hollow` have no error, only x."""
    low, high = (end(w for _, _, w in dots) for end in (min, max))
    room = (high - low) or 1.0
    shades = [0.2 + 0.8 * level / (SHADES - 1) for level in range(SHADES)]
    with drawing():
        figure = new_figure(330)
        axes, bar = figure.subplots(2, 1, height_ratios=[1, 0.035])
        for level in range(SHADES):
            own = [dot for dot in dots if min(SHADES - 1, int(SHADES * ((dot[2] - low) / room))) == level]
            axes.plot([x for x, _, _ in own], [error for _, error, _ in own], "o", color=COLOURS["blue"], markersize=6,
                      alpha=shades[level], markeredgewidth=0, zorder=3 + level)  # fmt: skip
            bar.barh(0, room / SHADES, left=low + level * room / SHADES, height=1, color=COLOURS["blue"],
                     alpha=shades[level], linewidth=0)  # fmt: skip
        axes.plot([x for x, _, _ in dots], [error for _, error, _ in dots], "o", color=COLOURS["blue"], markersize=6,
                  fillstyle="none", markeredgewidth=0.6, zorder=3 + SHADES)  # fmt: skip
        if hollow:
            axes.plot(hollow, [1] * len(hollow), "o", color=COLOURS["muted"], fillstyle="none", markersize=6,
                      transform=axes.get_xaxis_transform(), clip_on=False, label="beyond T")  # fmt: skip
        if chosen:
            left = chosen[0] <= sum(end(x for x, _, _ in dots) for end in (min, max)) / 2
            axes.plot(*chosen, color=COLOURS["ink"], zorder=20, **STYLES["ring"])
            axes.annotate("chosen", chosen, (12 if left else -12, 0), textcoords="offset points", va="center",
                          ha="left" if left else "right", color=COLOURS["ink"], zorder=21)  # fmt: skip
        axes.margins(0.06)
        axes.xaxis.set_major_formatter(lambda value, _: tick(value))
        axes.yaxis.set_major_formatter(lambda value, _: tick(value))
        _title(axes, "Error (lower is better)")
        axes.set_xlabel(title, loc="right")
        bar.set_xlim(low, low + room)
        bar.set_yticks([])
        bar.grid(visible=False)
        bar.spines["left"].set_visible(False)
        bar.locator_params(axis="x", nbins=5)
        bar.xaxis.set_major_formatter(lambda value, _: tick(value))
        bar.set_xlabel("W", loc="right")
        return plot_of(figure, alt)


def distances(panels: dict[str, Sequence[Curve]], alt: str) -> Plot:
    """A panel by title: curves over distances 0, 1, 2, … on a logarithmic axis; those without a label are faint."""
    with drawing():
        figure = new_figure(60 + 165 * len(panels))
        rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        longest = max((x for curves in panels.values() for curve in curves for x in curve.x), default=1.0)
        for axes, (title, lines) in zip(rows, panels.items(), strict=True):
            for line in lines:
                width, alpha = (1.8, 1.0) if line.label else (0.8, 0.35)
                axes.plot(line.x, line.y, color=COLOURS[line.colour], linewidth=width, alpha=alpha,
                          label=line.label or None)  # fmt: skip
            axes.set_xscale("symlog", linthresh=1.0, linscale=0.4)
            axes.set_xticks([x for x in (0, 1, 2, *(2**power for power in range(2, 20))) if x <= max(1.0, longest)])
            axes.minorticks_off()
            axes.xaxis.set_major_formatter(lambda value, _: tick(value))
            axes.yaxis.set_major_formatter(lambda value, _: tick(value))
            axes.margins(y=0.08)
            _title(axes, title)
        rows[-1].set_xlim(0, max(1.0, longest))
        rows[-1].set_xlabel("distance in tokens", loc="right")
        if any(line.label for line in next(iter(panels.values()))):
            figure.legend(*rows[0].get_legend_handles_labels(), loc="outside lower left", ncols=4, columnspacing=1.2)
        return plot_of(figure, alt)


def throughput(curve: Curve, mean: float | None, tokens_at_ceiling: float | None, alt: str) -> Plot:
    """Tokens per second over time; the right axis is the share of the ceiling, if that many tokens/s is known."""
    size, unit = _unit("seconds", max(curve.x))
    with drawing():
        figure = new_figure(250)
        axes = figure.subplots()
        _line(axes, curve, size)
        if mean:
            axes.axhline(mean, color=COLOURS["muted"], linewidth=1, linestyle=(0, (4, 3)))
            axes.annotate(f"mean {big(mean)}", (0, mean), (2, 3), xycoords=("axes fraction", "data"),
                          textcoords="offset points", va="bottom", color=COLOURS["muted"], fontsize=10.5)  # fmt: skip
        axes.set_ylim(0, 1.15 * max([*curve.y, mean or 0.0, 1e-9]))
        axes.yaxis.set_major_formatter(lambda value, _: tick(value))
        _title(axes, "Tokens per second")
        if tokens_at_ceiling:
            scale = 100 / tokens_at_ceiling
            right = axes.secondary_yaxis("right", functions=(_times(scale), _times(1 / scale)))
            right.spines["right"].set_visible(False)
            right.yaxis.set_major_formatter(lambda value, _: f"{value:.3g} %")
            right.tick_params(length=0)
            axes.set_title("of the GEMM ceiling", loc="right", color=COLOURS["muted"])
        axes.set_xlim(left=0)
        axes.set_xlabel(unit, loc="right")
        return plot_of(figure, alt)


def stacked_bar(parts: Sequence[tuple[str, float]], alt: str) -> Plot:
    """One bar of the parts' shares in the order of `SERIES`; wide enough parts carry their share."""
    with drawing():
        figure = new_figure(46)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        total, left = sum(value for _, value in parts) or 1.0, 0.0
        for index, (_, value) in enumerate(parts):
            share = value / total
            axes.barh(0, share, left=left, color=COLOURS[SERIES[index % len(SERIES)]], height=1, linewidth=0)
            if share >= 0.09:
                axes.text(left + share / 2, 0, f"{100 * share:.0f} %", ha="center", va="center", fontsize=11, gid="on")
            left += share
        axes.set_xlim(0, 1)
        axes.set_ylim(-0.5, 0.5)
        return plot_of(figure, alt)


@dataclass(frozen=True)
class Dots:
    """One task of the dot plot: per initialisation its seeds' values, mean and interval, in points."""

    label: str
    groups: Sequence[tuple[str, Sequence[float], float, tuple[float, float] | None]]
    majority: float | None = None


def dot_plot(tasks: Sequence[Dots], alt: str) -> Plot:
    """Means with intervals and the seeds behind them, one block per task."""
    with drawing():
        figure = new_figure(74 + 50 * len(tasks))
        axes = figure.subplots()
        colours = {"pretrained": "blue", "random": "orange"}
        for row, task in enumerate(tasks):
            for index, (name, seeds, mean, interval) in enumerate(task.groups):
                y = row + 0.34 * (index - (len(task.groups) - 1) / 2)
                colour = COLOURS[colours.get(name, "green")]
                if interval:
                    axes.plot(interval, (y, y), color=colour, linewidth=2, alpha=0.55, zorder=2)
                axes.plot(seeds, [y] * len(seeds), "o", color=colour, markersize=4.5, alpha=0.45, zorder=3,
                          markeredgewidth=0)  # fmt: skip
                axes.plot([mean], [y], "D", color=colour, markersize=6, zorder=4, markeredgewidth=0)
            if task.majority is not None:
                axes.plot([task.majority] * 2, (row - 0.36, row + 0.36), color=COLOURS["muted"], linewidth=1.4,
                          linestyle=(0, (2, 2)), zorder=1)  # fmt: skip
        axes.set_yticks(range(len(tasks)), [short(task.label, 22) for task in tasks])
        axes.tick_params(axis="y", labelcolor=COLOURS["ink"])
        axes.set_ylim(len(tasks) - 0.45, -0.55)
        axes.margins(x=0.06)
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_formatter(lambda value, _: tick(value))
        _title(axes, "Score in points (100 × metric)")
        return plot_of(figure, alt)


def bars(entries: Sequence[tuple[str, float, bool]], title: str, alt: str) -> Plot:
    """Horizontal bars: (label, milliseconds, is it the baseline?)."""
    with drawing():
        figure = new_figure(34 + 19 * len(entries))
        axes = figure.subplots()
        longest = max((value for _, value, _ in entries), default=1.0) or 1.0
        for row, (_, value, baseline) in enumerate(entries):
            axes.barh(row, value, color=COLOURS["grey" if baseline else "blue"], height=0.68, linewidth=0)
            axes.text(value + 0.015 * longest, row, f"{milliseconds(value)} ms", va="center", fontsize=10.5,
                      color=COLOURS["ink"])  # fmt: skip
        axes.set_yticks(range(len(entries)), [short(label, 20) for label, _, _ in entries])
        axes.set_xlim(0, 1.24 * longest)
        axes.set_ylim(len(entries) - 0.5, -0.5)
        axes.xaxis.set_visible(False)
        axes.grid(visible=False)
        for spine in axes.spines.values():
            spine.set_visible(False)
        _title(axes, title)
        return plot_of(figure, alt)


# ---- drawing --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Our settings, and no warnings about glyphs that matplotlib's font lacks (the browser's fonts draw the text)."""
    import matplotlib

    with warnings.catch_warnings(), matplotlib.rc_context(SETTINGS):
        warnings.simplefilter("ignore")
        yield


def _times(factor: float) -> Callable[[Any], Any]:
    return lambda value: factor * value


def new_figure(height: int) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / POINTS, height / POINTS), layout="constrained")
    figure.patch.set_visible(False)
    return figure


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", pad=7)


def _line(axes: Axes, curve: Curve, unit: float, faint: bool = False) -> None:
    """The curve over x in `unit`s, or its means when it has many points (then with their spread, if faint)."""
    x, y, low, high = thinned([value / unit for value in curve.x], curve.y)
    if faint and len(curve.x) > len(x):
        axes.fill_between(x, low, high, color=COLOURS[curve.colour], alpha=0.18, linewidth=0)
    few = len(x) <= 40
    axes.plot(x, y, color=COLOURS[curve.colour], linewidth=1.2 if faint else 1.8, label=curve.label,
              alpha=0.8 if faint else 1.0, marker="o" if few and curve.label else None, markersize=3.2)  # fmt: skip


def thinned(x: Sequence[float], y: Sequence[float], most: int = MOST_POINTS) -> tuple[list[float], ...]:
    """(x, mean, 10th and 90th percentile) of `most` groups of neighbouring points; short curves unchanged."""
    import numpy as np

    if len(x) <= most:
        return list(x), list(y), list(y), list(y)
    groups = np.array_split(np.arange(len(x)), most)
    xs, ys = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    spread = [np.percentile(ys[group], (10, 90)) for group in groups]
    return (
        [float(xs[group].mean()) for group in groups],
        [float(ys[group].mean()) for group in groups],
        [float(low) for low, _ in spread],
        [float(high) for _, high in spread],
    )


def _window(axes: Axes, loss: Sequence[Curve], levels: list[float]) -> None:
    """Leave out a spike far above everything else, so that it does not flatten the rest."""
    import numpy as np

    values = np.array([value for curve in loss for value in thinned(curve.x, curve.y)[1]] or [0.0, 1.0])
    top = max([float(np.percentile(values, 99)), *levels])
    bottom = min([float(values.min()), *levels])
    room = (top - bottom) or 1.0
    axes.set_ylim(bottom - 0.06 * room, top + 0.1 * room)


def _unit(axis: str, longest: float) -> tuple[float, str]:
    """How many tokens or seconds make one unit of the axis, and the unit's name."""
    if axis == "tokens":
        sizes = ((2e9, 1e9, "billion tokens"), (2e6, 1e6, "million tokens"), (2e3, 1e3, "thousand tokens"))
        return next(((size, name) for least, size, name in sizes if longest >= least), (1.0, "tokens"))
    sizes = ((7200.0, 3600.0, "hours"), (120.0, 60.0, "minutes"))
    return next(((size, name) for least, size, name in sizes if longest >= least), (1.0, "seconds"))
