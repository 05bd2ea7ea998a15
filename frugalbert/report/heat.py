"""A table of figures as a picture: shares between 0 and 1 and what stands in the cells in, `svg.Plot` out."""

from __future__ import annotations

from collections.abc import Sequence

from frugalbert.report.plots import SHADES, drawing, new_figure
from frugalbert.report.svg import COLOURS, Plot, plot_of
from frugalbert.report.wording import short

DARK = 0.55  # from this share on, the text of a cell is light


def heatmap(
    rows: Sequence[str], columns: Sequence[str], cells: Sequence[Sequence[tuple[float | None, str]]], alt: str
) -> Plot:
    """`cells[row][column]` = (share, text); the larger the share the deeper the colour, none where it is not known."""
    room = max(5, 64 // max(1, len(columns)))
    with drawing():
        figure = new_figure(44 + 24 * len(rows))
        axes = figure.subplots()
        for y, row in enumerate(cells):
            for x, (share, text) in enumerate(row):
                share = None if share is None else min(1.0, max(0.0, share))
                if share is not None:
                    level = 0.06 + 0.94 * round(share * (SHADES - 1)) / (SHADES - 1)
                    axes.barh(y, 1, left=x, height=1, color=COLOURS["blue"], alpha=level, linewidth=0)
                light = share is not None and share >= DARK
                axes.text(x + 0.5, y, short(text, room), ha="center", va="center", fontsize=10.5,
                          color=COLOURS["ink"], gid="on" if light else None)  # fmt: skip
        axes.set_xticks([x + 0.5 for x in range(len(columns))], [short(name, room) for name in columns])
        axes.set_yticks(range(len(rows)), [short(name, 24) for name in rows])
        axes.xaxis.tick_top()
        axes.tick_params(length=0, labelcolor=COLOURS["ink"])
        axes.set_xlim(0, max(1, len(columns)))
        axes.set_ylim(max(1, len(rows)) - 0.5, -0.5)
        axes.grid(visible=False)
        for spine in axes.spines.values():
            spine.set_visible(False)
        return plot_of(figure, alt)
