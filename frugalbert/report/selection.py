"""How the architecture was found, for the page: sentences, tables and figures about space, super-network and search.

In: what `collect` found, of stages that may be missing or half done. Out: texts (the template escapes them) and plots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from frugalbert.report import extraction
from frugalbert.report.collect import Collected, Selection
from frugalbert.report.tables import Table
from frugalbert.report.verdicts import Verdict
from frugalbert.report.wording import (
    NARROW,
    NONE,
    at,
    big,
    count,
    figure,
    fixed,
    flops,
    get,
    items_at,
    list_at,
    milliseconds,
    percent,
    significant,
    text_at,
    tick,
    took,
)

QUALITIES = {
    "loss": "held-out loss with inherited weights", "distillation": "held-out distance from the teacher",
    "finetune": "1 − mean metric of short fine-tunings", "training": "held-out loss after a short training",
}  # fmt: skip
PREDICTORS = {
    "linear": "linear in physical terms", "positive": "the same, no negative weights", "trees": "with boosted trees",
    "mlp": "with a small network", "flops": "FLOPs alone (baseline)",
}  # fmt: skip
AXES = {"depth": "Layers", "hidden": "Width", "heads": "Heads", "head_dim": "Head size", "ffn": "Feed-forward"}
MOST_DOTS = 2000
LIMITS = {"latency_ms": "ms", "speedup": "× as fast as the largest", "parameters": "parameters", "flops": "operations"}
TOLERABLE = 0.03  # held-out error of a latency predictor


def context(found: Collected) -> dict[str, Any]:
    """What the section shows besides its figures; `there` says whether there is anything to show."""
    chosen = found.selection
    there = chosen.space or chosen.supernet.train or chosen.supernet.validation or chosen.predictor or chosen.candidates
    return {
        "there": bool(there),
        "choice": choice(found),
        "notes": _notes(found),
        "facts": _facts(found),
        "events": chosen.supernet.events[:20],
        "finalists": finalists(found),
        "predictors": _predictors(chosen),
        "ranking": extraction.ranking(found),
        "sensitivity": extraction.sensitivity(found),
        "captions": {
            "plane": _plane_caption(found),
            "predicted": _predicted_caption(chosen),
            "w": extraction.caption(found),
        },
    }


# ---- sentences ------------------------------------------------------------------------------------------------------


def verdicts(found: Collected) -> list[Verdict]:
    """What the search has shown, and whether what it stands on is sound."""
    picked = extraction.verdicts(found) if extraction.is_there(found) else []
    kept = _chosen(found) if limits_of(found) or not extraction.is_there(found) else []
    return [*picked, *kept, *_trained(found.selection), *_predicts(found.selection)]


def choice(found: Collected) -> str:
    """What was chosen and why, in one or two sentences; empty while nothing is."""
    search = found.selection.search
    kept, rows = get(search, "chosen"), finalists_of(found)
    if not text_at(kept, "arch"):
        return ""
    first = not rows or text_at(rows[0], "arch") == text_at(kept, "arch")
    limits = " and ".join(text for _, _, text in limits_of(found))
    if extraction.is_there(found):
        return extraction.choice(found) + (f" The limit was {limits}.{_missed(rows, first)}" if limits else "")
    what = get(found.stages, "search", "section", "quality")
    rank = "the lowest score" if first else "the lowest score of those that keep the limit when measured"
    why = QUALITIES.get(what, "inherited score") if isinstance(what, str) else "inherited score"
    text = f"{text_at(kept, 'arch')} was chosen: {rank}"
    text += f" ({fixed(at(kept, 'score'), 4)}, {why})"
    text += f" of {count(at(search, 'evaluations'))} architectures that were scored"
    text += f" out of {_size(found)}" if _size(found) else ""
    costs = [f"{milliseconds(ms)}{NARROW}ms predicted" for ms in [at(kept, "latency_ms")] if ms is not None]
    costs += [f"{milliseconds(ms)}{NARROW}ms measured" for ms in [at(kept, "measured_ms")] if ms is not None]
    if costs and get(kept, "noisy") is True:
        costs[-1] += " (noisy)"
    costs += [f"{big(value)} parameters" for value in [at(kept, "parameters")] if value is not None]
    text += f"; {', '.join(costs)}" if costs else ""
    return f"{text}. The limit was {limits}.{_missed(rows, first)}" if limits else f"{text}.{_missed(rows, first)}"


def _missed(rows: Sequence[dict[str, Any]], first: bool) -> str:
    """How many finalists miss the limit when measured."""
    measured = [row for row in rows if at(row, "measured_ms") is not None]
    if not measured:
        return " No latency was measured again."
    missed = sum(row.get("violates") is True for row in measured)
    if not missed:
        return f" Measured again, all of the {len(measured)} best keep it."
    text = f" Measured again, {missed} of the {len(measured)} best miss it"
    if first or measured[0].get("violates") is not True:
        return f"{text}."
    ms = milliseconds(at(measured[0], "measured_ms"))
    return f"{text}, among them the best one, {text_at(measured[0], 'arch')} ({ms}{NARROW}ms)."


def _chosen(found: Collected) -> list[Verdict]:
    kept = get(found.selection.search, "chosen")
    if not text_at(kept, "arch"):
        return []
    limits = " and ".join(text for _, _, text in limits_of(found)) or "the limit"
    number = count(at(found.selection.search, "evaluations"))
    ms = at(kept, "measured_ms")
    took_ms = f" {milliseconds(ms)}{NARROW}ms measured, {milliseconds(at(kept, 'latency_ms'))}{NARROW}ms predicted;"
    text = f"Search over {number} architectures:{took_ms if ms is not None else ''}"
    if get(kept, "violates") is True:
        return [Verdict("bad", f"{text} the chosen encoder misses the limit of {limits}, as all the best did.")]
    sure = get(kept, "noisy") is not True
    doubt = "" if sure else " The measurement was noisy."
    return [Verdict("good" if sure else "note", f"{text} the chosen encoder keeps the limit of {limits}.{doubt}")]


def _trained(selection: Selection) -> list[Verdict]:
    """Whether the slices have learnt enough for their scores to mean something."""
    summary = selection.supernet.summary
    large, small = (at(summary, "final_validation", f"validation_loss{end}") for end in ("", "_smallest"))
    level = at(summary, "unigram_nll")
    if large is None or level is None or not is_text(selection):
        return []
    ends = f"{large:.2f} (largest)" + (f" to {small:.2f} (smallest)" if small is not None else "")
    text = f"Held-out losses of the super-network’s slices: {ends} nats per masked token"
    if large >= level:
        return [
            Verdict("bad", f"{text}, not below the unigram baseline {level:.2f}: too little for scores to mean much.")
        ]
    if small is not None and small >= level:
        return [Verdict("note", f"{text}; the smallest is not below the unigram baseline {level:.2f}.")]
    return [Verdict("good", f"{text}, below the unigram baseline {level:.2f}.")]


def _predicts(selection: Selection) -> list[Verdict]:
    report = get(selection.predictor, "report")
    name = text_at(report, "chosen")
    error, base = (at(report, "methods", key, "held_out_mape") for key in (name, "flops"))
    if error is None:
        return []
    held_out = at(report, "held_out")
    text = f"Latency is predicted within {percent(error)} on average of {count(held_out)} held-out architectures"
    text += _rank(at(report, "methods", name, "held_out_spearman"))
    if name == "flops" or base is None:
        return [Verdict("note", f"{text}; FLOPs alone predict it as well as anything.")]
    rank = _rank(at(report, "methods", "flops", "held_out_spearman"))
    text += f"; a regression on FLOPs is off by {percent(base)}{rank}."
    if (noise := at(report, "repeat_noise")) is not None:
        text += f" Two readings of the same one differ by {percent(noise)}."
    if error >= base:
        return [Verdict("bad", text)]
    return [Verdict("good" if error <= TOLERABLE else "note", text)]


def _rank(value: float | None) -> str:
    return "" if value is None else f" (rank correlation {fixed(value, 3)})"


def _notes(found: Collected) -> list[str]:
    """How the search went, a sentence each."""
    search = found.selection.search
    rows, notes = found.selection.candidates, []
    if rows and not search:
        notes.append(f"{count(len(rows))} architectures are scored so far.")
    if (share := at(search, "feasible_share")) is not None:
        notes.append(f"{percent(share)} of the space {'is' if share else 'seems'} within the limits.")
    if get(search, "walked") is True:
        notes.append("The limits are so tight that random candidates come from walks and are not evenly drawn.")
    ends = {"budget": "Its time was up before", "exhausted": "It ran out of new architectures before"}
    if text_at(search, "stopped") in ends:
        notes.append(f"{ends[text_at(search, 'stopped')]} the evaluations were used up.")
    if extraction.is_there(found):
        return [*notes, *extraction.notes(found)]
    if failed := at(search, "failed"):
        what = "architecture failed and has" if failed == 1 else "architectures failed and have"
        notes.append(f"{count(failed)} {what} no score.")
    if get(found.stages, "search", "section", "quality") == "finetune":
        notes.append(
            "Scores are of the tasks’ development sets, so later results on these are no independent evidence."
        )
    scores = [score for row in finalists_of(found) if (score := at(row, "score")) is not None]
    if len(scores) > 1:
        notes.append(f"The {len(scores)} best scores lie within {significant(max(scores) - min(scores), 2)}.")
    return notes


# ---- facts and tables -----------------------------------------------------------------------------------------------


def _facts(found: Collected) -> list[tuple[str, str]]:
    space, summary = found.selection.space, found.selection.supernet.summary
    metrics = get(found.stages, "space", "metrics")
    ends = {end: at(metrics, f"{end}_parameters") for end in ("smallest", "largest")}
    facts = [("Architectures", _size(found)), ("Family", text_at(space, "family"))]
    facts += [(label, _axis(list_at(space, name))) for name, label in AXES.items()]
    facts += [(f"{end.capitalize()} encoder", f"{big(value)} parameters") for end, value in ends.items() if value]
    facts += [
        ("Super-network", text_at(summary, "arch")),
        ("Steps", _shown(count, at(summary, "steps"))),
        ("Tokens seen", _shown(big, at(summary, "tokens"))),
        ("Trained for", _shown(took, at(summary, "seconds"))),
        ("Compute per token", _shown(flops, at(summary, "flops_per_token"))),
        ("Timed architectures", _shown(count, at(found.selection.predictor, "report", "architectures"))),
        ("Of them noisy", _shown(count, at(found.selection.predictor, "report", "noisy"))),
        ("Timed on", text_at(found.selection.predictor, "setting", "processor")),
    ]
    return [(label, value) for label, value in facts if value]


def _shown(form: Any, value: float | None) -> str:
    return "" if value is None else form(value)


def _axis(values: list[Any]) -> str:
    numbers = [value for value in map(figure, values) if value is not None]
    if len(numbers) <= 4:
        return ", ".join(map(count, numbers))
    return f"{count(min(numbers))} to {count(max(numbers))} ({len(numbers)} values)"


def _size(found: Collected) -> str:
    size = get(found.stages, "space", "metrics", "architectures")
    if isinstance(size, int) and size > 1e15:
        return f"about 10^{len(str(size)) - 1}"
    return "" if figure(size) is None else count(size)


def finalists(found: Collected) -> Table:
    rows: list[list[str]] = []
    chosen = text_at(found.selection.search, "chosen", "arch")
    limited = limits_of(found) or not extraction.is_there(found)
    for row in finalists_of(found):
        measured = at(row, "measured_ms")
        if measured is None and not limited:
            continue
        outcome = "misses the limit" if get(row, "violates") is True else "keeps the limit" if limited else "no limit"
        rows.append([
            text_at(row, "arch") or NONE, outcome + (", chosen" if text_at(row, "arch") == chosen else ""),
            fixed(at(row, "score"), 4), milliseconds(at(row, "latency_ms")),
            milliseconds(measured) + ("*" if measured is not None and get(row, "noisy") is True else ""),
            big(at(row, "parameters")),
        ])  # fmt: skip
    noisy = any(get(row, "noisy") is True for row in finalists_of(found))
    note = "* Noisy: the repeats spread widely or the machine was busy." if noisy else ""
    head = ("Architecture", "Outcome", "Score", "Predicted ms", "Measured ms", "Parameters")
    return Table("The best, measured again", head, rows, 2, note)


def finalists_of(found: Collected) -> list[dict[str, Any]]:
    return [row for row in list_at(found.selection.search, "finalists") if isinstance(row, dict)]


def _predictors(selection: Selection) -> Table:
    report = get(selection.predictor, "report")
    rows = [
        [PREDICTORS.get(name, name) + (", kept" if name == text_at(report, "chosen") else ""),
         *(percent(at(report, "methods", name, f"{kind}_mape")) for kind in ("held_out", "cross_validated")),
         percent(at(report, "methods", name, "unseen_depth_mape")),
         fixed(at(report, "methods", name, "held_out_spearman"), 3)]
        for name, _ in items_at(report, "methods")
    ]  # fmt: skip
    head = ("Predictor", "Held-out error", "Cross-validated", "At unseen depths", "Rank correlation")
    note = (
        "Mean relative errors. The least cross-validated one was kept; no choice has seen the held-out architectures."
    )
    return Table("Latency predictors", head, rows, 1, note)


def limits_of(found: Collected) -> list[tuple[str, float | None, str]]:
    """(cost, most on the plane's axis or None, words) of every limit; a least speed-up is a most latency."""
    limits = []
    for name, unit in LIMITS.items():
        ends = [end for end in map(figure, list_at(found.stages.get("search"), "section", "limit", name)) if end]
        if not ends:
            continue
        form = {"latency_ms": tick, "speedup": tick}.get(name, big)
        words = "at least " if name == "speedup" else "at most "
        words = f"{words}{form(ends[0])}" if len(ends) == 1 else f"{form(ends[0])} to {form(ends[-1])}"
        limits.append((name, ends[0] if name == "speedup" else ends[-1], f"{words}{NARROW}{unit}"))
    return limits


def is_text(selection: Selection) -> bool:
    """Whether losses are those of masked words; with a teacher they are distances, which have no accuracy."""
    return any(at(row, "validation_accuracy") is not None for row in selection.supernet.validation) or (
        at(selection.supernet.summary, "final_validation_accuracy") is not None
    )


# ---- captions --------------------------------------------------------------------------------------------------------


def _plane_caption(found: Collected) -> str:
    rows = found.selection.candidates
    text = "Every candidate that was scored, by where it came from; nothing is both faster and better than the front."
    return text if len(rows) <= MOST_DOTS else f"{text} One in {-(-len(rows) // MOST_DOTS)} is drawn."


def _predicted_caption(selection: Selection) -> str:
    report = get(selection.predictor, "report")
    words = []
    for name, label in ((text_at(report, "chosen"), "The predictor"), ("flops", "FLOPs alone")):
        error, rank = (at(report, "methods", name, f"held_out_{kind}") for kind in ("mape", "spearman"))
        if error is not None:
            words.append(f"{label}: mean error {percent(error)}, rank correlation {fixed(rank, 3)}")
    return f"Held out: {'; '.join(words)}." if words else ""
