"""Learned attention masks for the page: how dense, how blocky, how settled, and what they look like.

In: what `collect` found of the stage attention. Out: sentences, facts, a table, figures and grids of pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from frugalbert.report import plots
from frugalbert.report.collect import Collected
from frugalbert.report.pictures import Grid, are_squares, grid
from frugalbert.report.plots import Curve
from frugalbert.report.svg import Plot
from frugalbert.report.tables import Table
from frugalbert.report.verdicts import Verdict
from frugalbert.report.wording import at, count, figure, fixed, items_at, list_at, percent, significant, text_at

SMALL_BOUND, UNSETTLED, FULL_BLOCKS = 1.15, 0.2, 0.5
FAINT, NAMED, MOST_POINTS = 24, 6, 64
SHARED = {"layers": "layers", "heads": "the heads of a layer", "all": "all heads", "none": "nobody"}
STRUCTURES = {
    "unstructured": "single pairs", "toeplitz": "distances", "block": "blocks", "block-toeplitz": "distances of blocks",
    "toeplitz-priced": "distances that pay for blocks",
}  # fmt: skip


def context(found: Collected) -> dict[str, Any]:
    """What the section shows besides its figures; `there` says whether there is anything to show."""
    masks = found.attention
    return {
        "there": bool(masks.facts or masks.training.train),
        "choice": " ".join(_kept(masks.facts)),
        "facts": _facts(masks.facts),
        "blocks": _blocks(masks.facts),
        "grids": [
            _grid(found, "probability", "Probability of every pair"),
            _grid(found, "kept", "Pairs that are kept"),
        ],
        "events": masks.training.events[:20],
    }


# ---- sentences -------------------------------------------------------------------------------------------------------


def verdicts(found: Collected) -> list[Verdict]:
    """What the masks are worth, and whether they were settled."""
    facts = found.attention.facts
    if at(facts, "density") is None:
        return []
    lines = [Verdict("note", f"Attention masks: {' '.join([*_kept(facts)[:1], *_speed(facts)])}")]
    undecided, gap = at(facts, "undecided"), _gap(facts)
    if undecided is not None and (undecided > UNSETTLED or gap > 0.05):
        text = f"{percent(undecided, 0)} of the masks’ logits are undecided"
        text += f", and expected and thresholded density differ by {percent(gap)}" if gap > 0.05 else ""
        lines.append(Verdict("bad", f"{text}: what is kept depends on small differences. Train for longer, or with a "
                                    "larger attention.mask_learning_rate."))  # fmt: skip
    return lines


def _kept(facts: dict[str, Any]) -> list[str]:
    density, length = at(facts, "density"), at(facts, "length")
    if density is None:
        return []
    target = at(facts, "target")
    text = f"{percent(density)} of the pairs are kept"
    text += f" at {count(length)} tokens" if length else ""
    text += f" (asked for: {percent(target)})" if target is not None else ""
    lines = [f"{text}."]
    if repaired := at(facts, "repaired"):
        lines.append(f"{count(repaired)} logits were added for queries that would have seen nothing.")
    return [*lines, *_speed(facts)]


def _speed(facts: dict[str, Any]) -> list[str]:
    """Amdahl's bound in plain words, at the occupancy that there is."""
    share, bound = at(facts, "attention_share"), at(facts, "bound")
    if share is None or bound is None:
        return []
    text = f"Attention is {percent(share, 0)} of the dense encoder’s work at this length, so that leaving out all of it"
    lines = [f"{text} makes the encoder at most {fixed(bound, 2)} times as fast."]
    occupied = at(facts, "occupancy", "64")
    if bound < SMALL_BOUND:
        lines.append("No speed-up is to be expected from these masks.")
    elif occupied is not None and occupied > FULL_BLOCKS:
        lines.append(f"{percent(occupied, 0)} of the 64 × 64 blocks hold a kept pair, and hardware skips blocks, not "
                     "pairs: no speed-up is to be expected.")  # fmt: skip
    elif occupied is not None:
        most = 1.0 / (1.0 - share + share * occupied)
        lines.append(f"With {percent(occupied, 0)} of the 64 × 64 blocks left it is at most {fixed(most, 2)} times.")
    return lines


def _gap(facts: dict[str, Any]) -> float:
    ends = [at(facts, f"{name}_density") for name in ("expected", "threshold")]
    return abs(ends[0] - ends[1]) if ends[0] is not None and ends[1] is not None else 0.0


def _facts(facts: dict[str, Any]) -> list[tuple[str, str]]:
    own = text_at(facts, "structure")
    found = [
        ("Learnt", STRUCTURES.get(own, own)),
        ("Masks", count(len(list_at(facts, "densities"))) if list_at(facts, "densities") else ""),
        ("Shared by", SHARED.get(text_at(facts, "share"), "")),
        *((label, percent(at(facts, key)) if at(facts, key) is not None else "") for label, key in (
            ("Density kept", "density"), ("Expected density", "expected_density"),
            ("Thresholded density", "threshold_density"), ("Undecided logits", "undecided"))),
        ("Repaired rows", count(at(facts, "repaired")) if at(facts, "repaired") is not None else ""),
        ("Amdahl’s bound", f"{significant(at(facts, 'bound'))} ×" if at(facts, "bound") is not None else ""),
    ]  # fmt: skip
    return [(label, value) for label, value in found if value]


def _blocks(facts: dict[str, Any]) -> Table:
    rows = [
        [f"{size} × {size}", percent(figure(share)), count(at(facts, "most_blocks", size))]
        for size, share in items_at(facts, "occupancy")
    ]
    head = ("Block", "Blocks with a kept pair", "Most key blocks of a query block")
    return Table("Block occupancy", head, rows, 1, "What skipping blocks still computes, whatever the density is.")


# ---- pictures and figures --------------------------------------------------------------------------------------------


def _grid(found: Collected, name: str, title: str) -> Grid:
    facts = found.attention.facts
    shares = [figure(value) for value in list_at(facts, "densities")]

    def words(number: int) -> tuple[str, str]:
        share = shares[number] if number < len(shares) else None
        return (f"{percent(share)} of the pairs kept", percent(share)) if share is not None else ("one mask", "")

    def form(share: float) -> str:
        return percent(share, 0)

    return grid(title, found.attention.arrays.get(name), list_at(facts, "rows"), (0.0, 1.0, form), words)


def figures(found: Collected) -> dict[str, Plot | None]:
    """Shares by distance, and densities while training."""
    return {"mask_distances": _distances(found), "mask_density": _densities(found)}


def _distances(found: Collected) -> Plot | None:
    arrays, length = found.attention.arrays, at(found.attention.facts, "length")
    titles: dict[str, str] = {"probability": "Mean probability by distance", "kept": "Share kept by distance"}
    panels: dict[str, list[Curve]] = {}
    for name, title in titles.items():
        squares: Any = arrays.get(name)
        if not are_squares(squares):
            continue
        panels[title] = curves_of([means_by_distance(square) for square in squares], length or squares.shape[1])
    if not panels:
        return None
    ends = {title: lines[-1].y for title, lines in panels.items()}
    words = "; ".join(
        f"{title.lower()} from {fixed(max(y), 2)} at most to {fixed(min(y), 2)}" for title, y in ends.items()
    )
    return plots.distances(panels, f"Curves over the distance of two tokens, mean of all masks: {words}.")


def means_by_distance(square: Any) -> Any:
    """(s,) means of (s, s) by |i - j|."""
    import numpy as np

    place = np.arange(len(square))
    distance, known = abs(place[:, None] - place[None]).ravel(), ~np.isnan(square).ravel()
    with np.errstate(invalid="ignore"):
        return np.bincount(distance[known], square.ravel()[known], len(square)) / np.bincount(
            distance[known], minlength=len(square)
        )


def curves_of(lines: Sequence[Any], length: float) -> list[Curve]:
    """A curve for each mask, named if they are few, and their mean at last; distances are those of `length` tokens."""
    import numpy as np

    size = len(lines[0])
    edges = np.unique(np.rint(np.geomspace(1, size, MOST_POINTS)).astype(int) - 1)
    x = (_means(np.arange(size, dtype=float), edges) * length / size).tolist()
    table = np.stack([_means(line, edges) for line in lines])
    few = len(lines) <= NAMED
    shown = table[:: max(1, -(-len(lines) // FAINT))]
    found = [
        _curve(f"mask {number + 1}" if few else "", plots.SERIES[number] if few else "grey", x, line)
        for number, line in enumerate(shown)
    ]  # fmt: skip
    if len(lines) > 1:
        found.append(_curve("mean", "ink", x, _means(table.T.ravel(), np.arange(0, table.size, len(table)))))
    return found


def _means(line: Any, edges: Any) -> Any:
    """Of the stretches of a line that begin at the edges, without its NaNs."""
    import numpy as np

    known = ~np.isnan(line)
    with np.errstate(invalid="ignore"):
        return np.add.reduceat(np.where(known, line, 0.0), edges) / np.add.reduceat(known.astype(float), edges)


def _curve(label: str, colour: str, x: list[float], y: Any) -> Curve:
    known = [(a, float(b)) for a, b in zip(x, y, strict=True) if figure(float(b)) is not None]
    return Curve(label, colour, [a for a, _ in known], [b for _, b in known])


def _densities(found: Collected) -> Plot | None:
    names = {
        "density_expected": ("expected", "blue"),
        "density_kept": ("kept", "green"),
        "undecided": ("undecided", "orange"),
    }
    lines = []
    for key, (label, colour) in names.items():
        pairs = [(at(row, "tokens"), at(row, key)) for row in found.attention.training.train]
        known = [(x, y) for x, y in pairs if x is not None and y is not None]
        if known:
            lines.append(Curve(label, colour, [x for x, _ in known], [y for _, y in known]))
    if not lines:
        return None
    target = at(found.attention.facts, "target")
    levels = {} if target is None else {"asked for": target}
    words = "; ".join(f"{line.label} from {fixed(line.y[0], 2)} to {fixed(line.y[-1], 2)}" for line in lines)
    return plots.curves(lines, levels, {}, "tokens", f"Densities over the tokens seen: {words}.", "Share of pairs")
