"""An extraction search for the page: which architecture W picks among those visited, and on what that depends.

In: what `collect` found; `search.json` has an object `extraction`, candidates have `w` and `error`. Out: texts, tables
and two planes, parameters and inference cost against error, coloured by W.
"""

from __future__ import annotations

from typing import Any

from frugalbert.report import plots
from frugalbert.report.collect import Collected
from frugalbert.report.svg import Plot
from frugalbert.report.tables import Table
from frugalbert.report.verdicts import Verdict
from frugalbert.report.wording import (
    NARROW,
    NONE,
    at,
    big,
    count,
    fixed,
    flops,
    get,
    items_at,
    list_at,
    milliseconds,
    short,
    significant,
    text_at,
)

RANKED = 10
MOST_DOTS = 2000
SETTINGS = {
    "maximum": "T × {}", "interval": "interval {}", "inference": "inference cost: {}",
    "looks": "error looked at {} times", "half_of_the_rows": "half of the held-out rows",
}  # fmt: skip


def is_there(found: Collected) -> bool:
    return bool(items_at(found.selection.search, "extraction"))


def _told(found: Collected) -> Any:
    return get(found.selection.search, "extraction")


def _cost_of(found: Collected) -> tuple[str, str]:
    """The inference cost's key in a row, and its name."""
    if text_at(_told(found), "inference") == "latency_ms":
        return "latency_ms", "latency"
    return "flops", "operations"


def _cost(name: str, value: float | None) -> str:
    return f"{milliseconds(value)}{NARROW}ms" if name == "latency_ms" else flops(value)


# ---- sentences -------------------------------------------------------------------------------------------------------


def choice(found: Collected) -> str:
    """What was picked, among how many, with which T."""
    told, kept = _told(found), get(found.selection.search, "chosen")
    key, _ = _cost_of(found)
    if not text_at(kept, "arch"):
        return ""
    first = next((text_at(row, "arch") for row in _ranked(found)), "") in ("", text_at(kept, "arch"))
    text = f"{text_at(kept, 'arch')} was chosen: the best of the visited architectures under W"
    text += "" if first else " of those that keep the limit when measured"
    text += f" (W {significant(at(kept, 'w'), 4)}, error {fixed(at(kept, 'error'), 4)}, "
    text += f"{big(at(kept, 'parameters'))} parameters, {_cost(key, at(kept, key))}). "
    text += f"{count(at(told, 'visited'))} of {count(at(told, 'space'))} architectures were visited."
    interval = at(told, "interval")
    if interval == 1:
        return f"{text} Interval 1: all of them were."
    if interval is None:
        return text
    text += f" Interval {count(interval)}: one in {count(interval)} of the list by rising parameters and inference cost"
    return f"{text}; from interval 2 on the published bound on the error, |1 − interval|, is vacuous."


def verdicts(found: Collected) -> list[Verdict]:
    """How firm the pick is: under the other settings, and against what the seeds differ by."""
    arch = text_at(get(found.selection.search, "chosen"), "arch")
    others = [pick for _, pick in _picks(found)]
    if not arch or not others:
        return []
    same = sum(pick == arch for pick in others)
    text = f"Extraction: {arch} is the best of {count(at(_told(found), 'visited'))} visited architectures under W; "
    text += f"of {len(others)} other settings {same if same < len(others) else 'all'} give the same pick."
    ranked = _ranked(found)[:2]
    ws = [w for row in ranked if (w := at(row, "w")) is not None]
    if len(ws) == 2 and ws[0] - ws[1] < (at(ranked[0], "w_std") or 0.0):
        text += " The best two differ by less than the standard deviation over the seeds."
        return [Verdict("note", text)]
    return [Verdict("good" if same == len(others) else "note", text)]


def notes(found: Collected) -> list[str]:
    told, lines = _told(found), []
    rejected = at(told, "rejected")
    failed = (at(found.selection.search, "failed") or 0) - (rejected or 0)
    for number, why in ((rejected, "larger than T and not judged"), (failed, "without a finite error")):
        if number and number > 0:
            lines.append(f"{count(number)} visited {'one is' if number == 1 else 'ones are'} {why}.")
    arch = text_at(found.selection.search, "chosen", "arch")
    judged = [(w * error, text_at(row, "arch")) for row in found.selection.candidates
              if (w := at(row, "w")) is not None and (error := at(row, "error")) is not None]  # fmt: skip
    if arch and len(judged) > 1 and max(judged)[1] == arch:
        lines.append("Size and inference cost alone, without the error, would have picked the same.")
    if floored := at(told, "floored"):
        lines.append(f"{count(floored)} errors are below {significant(at(told, 'floor'))} and count as that.")
    return lines


def caption(found: Collected) -> str:
    """What the colours mean; the same for both planes."""
    if not is_there(found):
        return ""
    told, (key, name) = _told(found), _cost_of(found)
    ends = f"{big(at(told, 'maximum_parameters'))} parameters and {_cost(key, at(told, 'maximum_inference'))}"
    text = f"W = (1 − parameters / T’s) × (1 − {name} / T’s) / error, to be maximised. T, the maximum point, is "
    text += f"{text_at(told, 'maximum') or 'unknown'} with {ends}: it sets the trade-off."
    if any(_is_rejected(row) for row in found.selection.candidates):
        text += " Hollow at the upper edge: beyond T, not judged."
    step = _step(found)
    return text if step == 1 else f"{text} One in {step} is drawn."


# ---- tables ----------------------------------------------------------------------------------------------------------


def _ranked(found: Collected) -> list[dict[str, Any]]:
    return [row for row in list_at(_told(found), "ranking") if isinstance(row, dict)]


def ranking(found: Collected) -> Table:
    """The first ten by W."""
    key, _ = _cost_of(found)
    chosen, ranked = text_at(found.selection.search, "chosen", "arch"), _ranked(found)[:RANKED]
    spread = any(at(row, "w_std") is not None for row in ranked)
    rows = [
        [(text_at(row, "arch") or NONE) + (", chosen" if text_at(row, "arch") == chosen else ""),
         significant(at(row, "w"), 4), *([significant(at(row, "w_std"), 2)] if spread else []),
         fixed(at(row, "error"), 4), big(at(row, "parameters")), _cost(key, at(row, key))]
        for row in ranked
    ]  # fmt: skip
    head = ("Architecture", "W", *(["± over seeds"] if spread else []), "Error", "Parameters", "Inference")
    return Table("The first ten by W" if len(rows) == RANKED else "By W", head, rows)


def _picks(found: Collected) -> list[tuple[str, str]]:
    """(setting, pick) for every setting but the search's own."""
    told, picks = _told(found), []
    own = {"maximum": "1", "interval": text_at(told, "interval")}
    for name, entry in items_at(told, "sensitivity"):
        form = SETTINGS.get(name, short(name, 24) + " {}")
        pairs = list(entry.items()) if isinstance(entry, dict) else [("", entry)]
        for value, pick in pairs[:RANKED]:
            if value != own.get(name) and not (name == "looks" and value == pairs[-1][0]):
                words = form.replace("{}", short(value, 24)).strip()
                picks.append((words, short(pick) if isinstance(pick, str) and pick else "none"))
    return picks


def sensitivity(found: Collected) -> Table:
    """What would have been picked under other settings, from the same judgements."""
    chosen = text_at(found.selection.search, "chosen", "arch")
    rows = [[setting, "the same" if pick == chosen else pick] for setting, pick in _picks(found)]
    note = "From the same short trainings; nothing was trained again."
    return Table("The pick under other settings", ("Setting", "Pick"), rows, 2, note)


# ---- figures ---------------------------------------------------------------------------------------------------------


def figures(found: Collected) -> dict[str, Plot | None]:
    """Parameters and inference cost against error, coloured by W."""
    key, name = _cost_of(found)
    titles = {"parameters": "parameters", key: "latency (ms)" if key == "latency_ms" else "operations"}
    return {f"w_{axis}": _plane(found, axis, title) for axis, title in titles.items()} if is_there(found) else {}


def _step(found: Collected) -> int:
    return max(1, -(-len(found.selection.candidates) // MOST_DOTS))


def _is_rejected(row: dict[str, Any]) -> bool:
    return at(row, "w") is None and bool(get(row, "rejected"))


def _plane(found: Collected, axis: str, title: str) -> Plot | None:
    drawn = found.selection.candidates[:: _step(found)]
    rows = [(at(row, axis), at(row, "error"), at(row, "w")) for row in drawn]
    dots = [(x, error, w) for x, error, w in rows if x is not None and error is not None and w is not None]
    if not dots:
        return None
    kept = get(found.selection.search, "chosen")
    x, error = at(kept, axis), at(kept, "error")
    chosen = None if x is None or error is None else (x, error)
    hollow = [x for row in drawn if _is_rejected(row) and (x := at(row, axis)) is not None]
    ends = [significant(end(dot[2] for dot in dots), 3) for end in (min, max)]
    alt = f"Scatter plot of {count(len(dots))} architectures: error from "
    alt += " to ".join(significant(end(dot[1] for dot in dots), 4) for end in (min, max))
    alt += f" against {big(min(dot[0] for dot in dots))} to {big(max(dot[0] for dot in dots))} {title}, coloured by W "
    alt += f"from {ends[0]} to {ends[1]}"
    alt += f"; chosen is {big(chosen[0])} with error {significant(chosen[1], 4)}" if chosen else ""
    alt += f"; {len(hollow)} are beyond T" if hollow else ""
    return plots.weighted(dots, chosen, hollow, title, f"{alt}.")
