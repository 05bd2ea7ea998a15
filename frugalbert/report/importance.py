"""Which attention positions matter, for the page: soft masks by kind of pair, and the study of the diagonal.

In: what `collect` found of the stage importance. Out: sentences, tables, a figure and a grid of pictures.
"""

from __future__ import annotations

from typing import Any

from frugalbert.report import plots
from frugalbert.report.attention import curves_of
from frugalbert.report.collect import Collected
from frugalbert.report.pictures import Grid, grid
from frugalbert.report.svg import Plot
from frugalbert.report.tables import Table
from frugalbert.report.verdicts import Verdict, interval_of
from frugalbert.report.wording import NONE, at, count, fixed, get, items_at, list_at, percent, significant, text_at

KINDS = {
    "diagonal": "a token and itself", "neighbours": "neighbours", "cls": "[CLS] and any other",
    "sep": "[SEP] and any other", "rest": "all other pairs",
}  # fmt: skip
COMPARED = {"no_diagonal": "Without the diagonal", "random": "With as many random pairs dropped"}


def context(found: Collected) -> dict[str, Any]:
    """What the section shows besides its figures; `there` says whether there is anything to show."""
    return {
        "there": bool(found.importance.facts or found.importance.training.train or found.importance.study),
        "ranking": _ranking(found.importance.facts), "grid": _grid(found), "study": _study(found.importance.study),
        "notes": _notes(found.importance.study), "sentence": _sentence(found.importance.study),
    }  # fmt: skip


def verdicts(found: Collected) -> list[Verdict]:
    """The ranking, and what the study shows, if it shows anything."""
    ranked, lines = _ranked(found.importance.facts), []
    if ranked:
        words = ", ".join(f"{KINDS.get(name, name)} {fixed(value, 3)}" for name, value in ranked)
        lines.append(Verdict("note", f"Importance of attention positions, mean probability: {words}."))
    if text := _sentence(found.importance.study):
        lines.append(Verdict("note", text))
    return lines


def _ranked(facts: dict[str, Any]) -> list[tuple[str, float]]:
    known = [(name, value) for name, _ in items_at(facts, "groups") if (value := at(facts, "groups", name)) is not None]
    return sorted(known, key=lambda pair: -pair[1])


def _ranking(facts: dict[str, Any]) -> Table:
    maps, rows = list_at(facts, "maps"), list[list[str]]()
    for name, value in _ranked(facts):
        own = [share for one in maps if (share := at(one, name)) is not None]
        least = sum(
            at(one, name) == min((v for k in KINDS if (v := at(one, k)) is not None), default=None) for one in maps
        )
        spread = f"{fixed(min(own), 3)} to {fixed(max(own), 3)}" if own else NONE
        rows.append([KINDS.get(name, name), fixed(value, 3), spread, f"{count(least)} of {count(len(maps))}",
                     percent(at(facts, "pairs", name))])  # fmt: skip
    head = ("Pairs", "Mean probability", "Over the maps", "Lowest in", "Of all pairs")
    note = "Means over the pairs that held-out documents have. Probabilities begin at 0.5; only their order means much."
    return Table("Kinds of pairs by importance", head, rows, 1, note)


# ---- the study -------------------------------------------------------------------------------------------------------


def _change(name: str, entry: Any) -> str:
    ends, mean = interval_of(entry, 1.0), at(entry, "mean")
    if mean is None:
        return ""
    text = f"{name} the held-out loss changes by {_signed(mean)}"
    if ends is None:
        return f"{text} (one seed, no interval)"
    shown = "" if ends[0] > 0 or ends[1] < 0 else ": no difference is shown"
    return f"{text} (95\u00a0% interval {_signed(ends[0])} to {_signed(ends[1])}){shown}"


def _signed(value: float | None) -> str:
    return NONE if value is None else f"{'+' if value > 0 else ''}{significant(value, 2)}"


def _sentence(study: dict[str, Any]) -> str:
    """Both changes, and whether the diagonal matters less than other pairs."""
    parts = [_change(words, get(study, "differences", name)) for name, words in COMPARED.items()]
    parts = [part for part in parts if part]
    if not parts:
        return ""
    gap = interval_of(get(study, "differences", "no_diagonal_to_random"), 1.0)
    both = "; ".join([parts[0], *(part[0].lower() + part[1:] for part in parts[1:])])
    text = f"{both}. "
    if gap is None:
        return f"{text}One seed shows nothing of the two."
    if gap[1] < 0:
        return f"{text}The diagonal matters less than other pairs do."
    if gap[0] > 0:
        return f"{text}The diagonal matters more than other pairs do."
    return f"{text}It is not shown that the diagonal matters less, or more, than other pairs."


def _study(study: dict[str, Any]) -> Table:
    rows: list[list[str]] = []
    for place, row in enumerate(list_at(study, "variants")):
        ends, mean = interval_of(get(row, "difference"), 1.0), at(row, "difference", "mean")
        interval = f"{_signed(ends[0])} to {_signed(ends[1])}" if ends and place else NONE
        change = _signed(mean) if place else NONE
        own = [text_at(row, "name") or NONE, fixed(at(row, "mean"), 4), change, interval]
        rows.append([*own, percent(at(row, "dropped"), 2)])
    head = ("Attention", "Held-out loss", "To full attention", "95 % interval", "Pairs dropped")
    seeds, steps = len(list_at(study, "seeds")), at(study, "steps")
    note = f"{count(steps)} steps from scratch, {seeds} seed{'s' * (seeds != 1)}; differences are paired by seed."
    return Table("With and without the diagonal", head, rows, 1, note)


def _notes(study: dict[str, Any]) -> str:
    """Whether the random drops took as much as the diagonal is."""
    shares = [share for row in list_at(study, "variants")[1:] if (share := at(row, "dropped")) is not None]
    if len(shares) < 2 or not shares[0]:
        return ""
    own, others = shares[0], sum(shares[1:]) / len(shares[1:])
    if abs(others / own - 1.0) < 0.05:
        return ""
    return (
        "In a whole row each control drops as many pairs as the diagonal has. In documents shorter than a row fewer "
        f"of them lie inside: {percent(others, 2)} of these documents’ pairs, where the diagonal is {percent(own, 2)}."
    )


# ---- pictures and figures --------------------------------------------------------------------------------------------


def _grid(found: Collected) -> Grid:
    import numpy as np

    facts, squares = found.importance.facts, found.importance.arrays.get("probability")
    known = squares[np.isfinite(squares)] if squares is not None else np.zeros(0)
    low, high = np.percentile(known, (1, 99)).tolist() if known.size else (0.0, 1.0)
    maps = list_at(facts, "maps")

    def words(number: int) -> tuple[str, str]:
        own = maps[number] if number < len(maps) else None
        if at(own, "diagonal") is None:
            return "one map", ""
        return f"diagonal {fixed(at(own, 'diagonal'), 3)}, rest {fixed(at(own, 'rest'), 3)}", ""

    ends = (low, high, lambda value: fixed(value, 3))
    return grid("Importance of every pair", squares, list_at(facts, "rows"), ends, words)


def figures(found: Collected) -> dict[str, Plot | None]:
    """Importance by distance."""
    import numpy as np

    lines = found.importance.arrays.get("by_distance")
    if getattr(lines, "ndim", 0) != 2 or not lines.size or not np.isfinite(lines).any():
        return {"importance_distances": None}
    panel = curves_of(list(lines), float(lines.shape[1]))
    ends = panel[-1].y or [0.0]
    alt = (
        f"Curves over the distance of two tokens: mean probability from {fixed(max(ends), 3)} to {fixed(min(ends), 3)}."
    )
    return {"importance_distances": plots.distances({"Mean probability by distance": panel}, alt)}
