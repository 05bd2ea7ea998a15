"""The report's tables as plain texts: no HTML here, the template escapes every cell.

In: what `collect` found. Out: `Table`s; an empty one is not shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from frugalbert.report.collect import STAGES, Collected
from frugalbert.report.verdicts import INITS, RAW, Score, comparisons, name_of, scores, setting, speedups
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
    percent,
    plain,
    short,
    significant,
    size,
    text_at,
    took,
)

MOST_ROWS = 60
SETTING = ("threads", "batch_size", "length")
COSTS = {
    "train": "training steps", "wait": "waiting for data", "validation": "validation", "checkpoint": "checkpoints",
    "compile": "compiling", "probe": "trying settings", "setup": "setting up",
}  # fmt: skip
TITLES = {
    "corpus": "Corpus", "tokenizer": "Tokenizer", "shards": "Shards", "space": "Space",
    "supernet": "Super-network", "latency": "Latency table", "search": "Search", "attention": "Attention masks",
    "importance": "Importance of positions", "pretrain": "Pre-training",
    "finetune": "Fine-tuning", "export": "Export", "bench": "Latency",
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """`words` leading columns hold text, the others figures; `swatches` says that rows have the plots' colours."""

    name: str
    head: tuple[str, ...]
    rows: Sequence[Sequence[str]]
    words: int = 1
    note: str = ""
    swatches: bool = False
    breaks: frozenset[int] = frozenset()


def _limited(name: str, head: tuple[str, ...], rows: list[list[str]], words: int = 1, note: str = "") -> Table:
    more = len(rows) - MOST_ROWS
    note = f"{note} {count(more)} more rows are in the run's files.".strip() if more > 0 else note
    return Table(name, head, rows[:MOST_ROWS], words, note)


# ---- data -----------------------------------------------------------------------------------------------------------


def sources(found: Collected) -> Table:
    """One row per source: what was kept and what was dropped, by reason."""
    rows = list_at(found.corpus, "sources")
    kinds = [
        (key, reason)
        for key in ("dropped", "repaired")
        for reason in sorted({reason for row in rows for reason, _ in items_at(row, key)})
    ]
    lines = [
        [short(text_at(row, "path") or "unnamed", 60), count(at(row, "read")), count(at(row, "documents")),
         big(at(row, "characters")), *(count(at(row, *kind) or 0) for kind in kinds)]
        for row in sorted(rows, key=lambda row: -(at(row, "documents") or 0))
    ]  # fmt: skip
    words = [f"{key.capitalize()}: {reason.replace('_', ' ')}" for key, reason in kinds]
    return _limited("Corpus by source", ("Source", "Read", "Kept", "Characters", *words), lines)


def dropped(found: Collected) -> Table:
    rows = [[short(text_at(row, "where"), 70), short(text_at(row, "reason"), 60)] for row in found.dropped]
    return Table("Examples of what was dropped", ("Where", "Reason"), rows, 2)


def shard_sets(found: Collected) -> Table:
    rows: list[list[str]] = []
    for length, splits in items_at(found.shards, "sets"):
        for split, entry in items_at(splits):
            rows.append([
                f"{length} tokens", {"held_out": "held out", "train": "training"}.get(split, split),
                count(at(entry, "rows")), big(at(entry, "tokens")), percent(at(entry, "fill")),
                count(len(list_at(entry, "files"))),
            ])  # fmt: skip
    return _limited("Token shards", ("Row length", "Split", "Rows", "Tokens", "Fill", "Files"), rows, 2)


# ---- training -------------------------------------------------------------------------------------------------------


def sizes(found: Collected) -> Table:
    """What `arch: auto` weighed: the candidates that were timed, and what the law foretells for them."""
    rows, told = [], [row for row in list_at(found.sizing, "rows") if get(row, "timed") is True]
    chosen = text_at(found.sizing, "chosen")
    best = next((at(row, "foretold_loss") for row in told if text_at(row, "arch") == chosen), None)
    for row in told:
        loss, unique = at(row, "foretold_loss"), at(found.sizing, "unique_tokens")
        tokens = at(row, "tokens")
        rows.append([
            text_at(row, "arch") + (" (chosen)" if text_at(row, "arch") == chosen else ""),
            _shown(big, at(row, "encoder_parameters")),
            _shown(big, at(row, "tokens_per_second")),
            _shown(big, tokens),
            fixed(tokens / unique, 2) if tokens is not None and unique else "",
            f"{loss - best:+.3f}" if loss is not None and best is not None else "",
            _shown(milliseconds, at(row, "latency_ms")),
        ])  # fmt: skip
    head = ("Architecture", "Parameters of the layers", "Tokens/s", "Tokens in the budget", "Passes over the data",
            "Foretold loss, less the chosen one’s", "Latency (ms)")  # fmt: skip
    note = "Speeds were measured before the first step; losses come from a law fitted to trainings of many sizes."
    return _limited("Sizes weighed for the budget", head, rows, note=note)


def costs(found: Collected) -> list[tuple[str, float]]:
    """(activity, seconds) of pre-training, in the order of `COSTS`, others last."""
    given = dict(items_at(found.summary, "cost_seconds"))
    names = [*COSTS, *sorted(set(given) - set(COSTS))]
    parts = [(COSTS.get(name, name.replace("_", " ")), at(given, name) or 0.0) for name in names]
    return [(name, seconds) for name, seconds in parts if seconds > 0]


def stage_seconds(found: Collected, most: int) -> list[tuple[str, float]]:
    """(stage, seconds) of at most `most` parts: the shortest stages are summed up."""
    parts = [(title(name), at(record, "seconds") or 0.0) for name, record in found.stages.items()]
    parts = [(name, seconds) for name, seconds in parts if seconds > 0]
    if len(parts) <= most:
        return parts
    longest = sorted(parts, key=lambda part: -part[1])[: most - 1]
    rest = [seconds for part in parts if part not in longest for seconds in part[1:]]
    return [*(part for part in parts if part in longest), (f"{len(rest)} others", sum(rest))]


def shares(name: str, parts: Sequence[tuple[str, float]], colours: int) -> Table:
    """The legend of a stacked bar: its parts with seconds and shares."""
    total = sum(seconds for _, seconds in parts) or 1.0
    rows = [[label, took(seconds), percent(seconds / total)] for label, seconds in parts[:colours]]
    return Table(name, ("", "Time", "Share"), rows, swatches=True)


def title(stage: str) -> str:
    return TITLES.get(stage, stage.replace("_", " ").capitalize())


def training_facts(found: Collected) -> list[tuple[str, str]]:
    """Label and value of what describes the encoder and how it was trained."""
    summary = found.summary
    ceiling, used = at(summary, "ceiling_flops"), at(summary, "flop_utilisation_of_measured_ceiling")
    split = [
        f"{big(value)} {name}"
        for name, value in (
            ("encoder", at(summary, "encoder_parameters")),
            ("embeddings", at(summary, "embedding_parameters")),
        )
        if value is not None
    ]
    total = _shown(count, at(summary, "parameters"))
    accuracy = at(summary, "final_validation_accuracy")
    pairs = at(summary, "final_validation", "validation_pair_accuracy")
    facts = [
        ("Architecture", text_at(summary, "arch")),
        ("Parameters", f"{total} ({', '.join(split)})" if total and split else total),
        ("Steps", _shown(count, at(summary, "steps"))),
        ("Passes over the data", _shown(lambda value: fixed(value, 2), at(summary, "epochs"))),
        ("Tokens seen", _shown(big, at(summary, "tokens"))),
        ("Mean throughput", _shown(lambda value: f"{big(value)} tokens/s", at(summary, "tokens_per_second"))),
        ("Compute per token", _shown(flops, at(summary, "flops_per_token"))),
        ("GEMM ceiling", _shown(lambda value: f"{flops(value)}/s, measured", ceiling)),
        ("FLOP utilisation", _shown(lambda value: f"{percent(value)} of the ceiling", used)),
        ("Held-out accuracy", _shown(lambda value: f"{percent(value)} of masked tokens", accuracy)),
        ("Sentence pairs", _shown(lambda value: f"{percent(value)} told apart, held out", pairs)),
        ("Precision", text_at(summary, "precision")),
        ("Micro-batch", _shown(lambda value: f"{count(value)} sequences", at(summary, "micro_batch"))),
        ("torch.compile", plain(summary.get("compile")) if "compile" in summary else ""),
    ]
    return [(label, value) for label, value in facts if value]


def _shown(form: Any, value: float | None) -> str:
    return "" if value is None else form(value)


# ---- fine-tuning, serving -------------------------------------------------------------------------------------------


def fine_tuning(found: Collected) -> Table:
    rows: list[list[str]] = []
    breaks: set[int] = set()
    for comparison in comparisons(found.results):
        breaks.add(len(rows))
        for score in filter(None, (comparison.trained, comparison.random)):
            gain = comparison.gain if score is comparison.trained else None
            gap = NONE if gain is None else f"{'+' if gain > 0 else ''}{score.show(gain)}"
            rows.append([
                comparison.task, INITS.get(score.init, score.init), score.metric,
                score.show(score.mean) + (f" ± {score.show(score.std, 2)}" if score.std is not None else ""),
                _interval(score), gap, score.show(score.majority) if score.majority is not None else NONE,
                count(len(score.values)), count(score.row.get("train_examples")), count(score.row.get("dev_examples")),
            ])  # fmt: skip
    head = ("Task", "Start", "Metric", "Mean ± std", "95\u00a0% interval", "Gain", "Majority", "Seeds", "Train", "Dev")
    note = (
        "Bounded metrics are in points (100 × metric). Gains are paired by seed; positive is better. Intervals cover "
        "the choice of seed (Student’s t), not of evaluation examples."
    )
    return replace(_limited("Fine-tuning results", head, rows, 3, note), breaks=frozenset(breaks - {0}))


def _interval(score: Score) -> str:
    return NONE if score.interval is None else f"{score.show(score.interval[0])} to {score.show(score.interval[1])}"


def seeds(found: Collected) -> Table:
    """Every seed's value and the other metrics."""
    rows: list[list[str]] = []
    for score in scores(found.results):
        listed = list_at(score.row, "seeds")
        names = listed if len(listed) == len(score.values) else range(len(score.values))
        each = ", ".join(f"{plain(seed)}: {score.show(value)}" for seed, value in zip(names, score.values, strict=True))
        extra = [
            f"{name} {significant(at(entry, 'mean'))} ± {significant(at(entry, 'std'))}"
            for name, entry in items_at(score.row, "all_metrics")
            if at(entry, "mean") is not None and name != score.metric
        ]
        named = short(", ".join(map(plain, list_at(score.row, "labels"))), 90) or NONE
        rows.append([score.task, INITS.get(score.init, score.init), each, ", ".join(extra) or NONE, named])
    head = ("Task", "Start", "Seed: value", "Other metrics", "Labels")
    return _limited("Every seed and every metric", head, rows, 5)


def latency(found: Collected) -> Table:
    """Grouped by setting, so that what is compared stands together."""
    pairs = sorted(speedups(found.latency), key=lambda pair: tuple(at(pair[0], key) or 0.0 for key in SETTING))
    rows = [
        [name_of(row), text_at(row, "device") or "cpu", *(count(row.get(key)) for key in SETTING),
         f"{milliseconds(row.get('median_ms'))}{'*' if row.get('noisy') is True else ''}",
         milliseconds(row.get("p90_ms")), milliseconds(row.get("min_ms")), big(row.get("tokens_per_second")),
         NONE if ratio is None else f"{significant(ratio)}{NARROW}×"]
        for row, ratio in pairs
    ]  # fmt: skip
    breaks = {index for index in range(1, len(pairs)) if setting(pairs[index][0]) != setting(pairs[index - 1][0])}
    compared = any(ratio is not None for _, ratio in pairs)
    note = "Speed-up is against BERT-base in PyTorch at the same setting." if compared else ""
    if any(row.get("noisy") is True for row in found.latency):
        note += " * Noisy: the repeats spread widely or the machine was busy."
    head = ("Model", "Device", "Threads", "Batch", "Length", "Median ms", "p90 ms", "Min ms", "Tokens/s", "Speed-up")
    return replace(_limited("Latency", head, rows, 2, note), breaks=frozenset(breaks))


def formats(found: Collected) -> Table:
    """Exported files: size and how far their outputs are from PyTorch's."""
    rows: list[list[str]] = []
    for name, entry in items_at(found.export, "formats"):
        checks = [
            {"yes": "plain transformers model", "no": "model code included"}.get(plain(get(entry, "stock")), ""),
            _because(text_at(entry, "why_not_stock")),
            "the same outputs"
            if at(entry, "max_abs_difference") == 0
            else _words("outputs differ by at most {}", significant, at(entry, "max_abs_difference"), 2),
            _words("mean cosine {}", fixed, at(entry, "mean_cosine"), 4),
            _words("masked-token accuracy {}", percent, at(entry, "masked_accuracy"), 1),
            _words("({} points)", fixed, _times(-100, at(entry, "masked_accuracy_drop")), 2),
            *(_drop(task, cost) for task, cost in items_at(entry, "dev_metric_drop")),
        ]
        rows.append([name, "; ".join(filter(None, checks)).replace("; (", " (") or NONE, size(get(entry, "bytes"))])
    return Table("Exported files", ("Format", "Checked against PyTorch", "Weights"), rows, 2)


def _words(text: str, form: Any, value: float | None, digits: int) -> str:
    return "" if value is None else text.format(form(value, digits))


def _times(factor: float, value: float | None) -> float | None:
    return None if value is None else factor * value


def _because(reason: str) -> str:
    return f"not a stock model: {reason}" if reason else ""


def _drop(task: str, cost: Any) -> str:
    before, after = at(cost, "fp32"), at(cost, "int8")
    if before is None or after is None:
        return ""
    scale, form = (1.0, significant) if text_at(cost, "metric") in RAW else (100.0, fixed)
    return f"{task} {text_at(cost, 'metric')} {form(scale * before)} → {form(scale * after)}"


# ---- record ---------------------------------------------------------------------------------------------------------


def stage_table(found: Collected) -> Table:
    rows = []
    for name in [*STAGES, *(name for name in found.stages if name not in STAGES)]:
        record = found.stages.get(name, {})
        if name not in found.wanted and not record and name not in found.unfinished:
            continue
        seconds = at(record, "seconds")
        rows.append([
            title(name), state(found, name), took(seconds),
            text_at(record, "device") or NONE,
            text_at(record, "finished").replace("T", " ").replace("+00:00", " UTC") or NONE,
            text_at(record, "fingerprint") or NONE,
        ])  # fmt: skip
    return Table("Stages", ("Stage", "State", "Took", "Device", "Finished", "Fingerprint"), rows, 6)


def state(found: Collected, name: str) -> str:
    if name in found.stages:
        return "kept although settings changed" if get(found.stages[name], "accepted") else "done"
    return "not finished" if name in found.unfinished else "not started"


def environment(found: Collected) -> tuple[list[tuple[str, str]], list[str]]:
    """Versions common to all stages (label, value), and a sentence for each that differs between stages."""
    seen: dict[str, dict[str, list[str]]] = {}
    for name, record in found.stages.items():
        for key, value in items_at(record, "versions"):
            seen.setdefault(key, {}).setdefault(short(value, 90), []).append(title(name))
    facts = [(key, next(iter(values))) for key, values in seen.items() if len(values) == 1]
    mixed = [
        f"{key} differs between stages: " + "; ".join(f"{value} ({', '.join(who)})" for value, who in values.items())
        for key, values in seen.items()
        if len(values) > 1
    ]
    timed = {text_at(row, "device"): text_at(row, "processor") for row in found.latency}
    device, cpu = text_at(found.summary, "device"), text_at(found.summary, "cpu") or timed.get("cpu", "")
    extra = [("device", "" if device == cpu else device), ("CPU", cpu)]
    extra += [("CPU of the timings" if name == "cpu" else "GPU of the timings", processor)
              for name, processor in timed.items() if processor not in (device, cpu)]  # fmt: skip
    extra += [(label, _shown(count, at(found.summary, label))) for label in ("threads", "ranks")]
    return [(label, value) for label, value in extra if value] + facts, mixed


def drifts(found: Collected) -> list[str]:
    """What changed after a stage that was kept nevertheless."""
    lines = []
    for name, record in found.stages.items():
        lines += [f"{title(name)}: {short(change, 200)}" for change in list_at(record, "accepted", "drift")]
    return lines


def corpus_facts(found: Collected) -> list[tuple[str, str]]:
    corpus = found.corpus
    facts = [
        ("Documents", _shown(count, at(corpus, "documents"))),
        ("Held out", _shown(count, at(corpus, "held_out_documents"))),
        ("Characters", _shown(big, at(corpus, "characters"))),
        ("Licence", text_at(corpus, "licence")),
        ("Vocabulary", _shown(count, found.vocabulary or at(found.shards, "vocab_size"))),
        ("Characters per token", _shown(fixed, characters_per_token(found))),
    ]
    return [(label, value) for label, value in facts if value]


def characters_per_token(found: Collected) -> float | None:
    """Of the shortest shard set; [CLS] and [SEP] count as tokens there."""
    characters = at(found.corpus, "characters")
    for _, splits in items_at(found.shards, "sets"):
        tokens = sum(at(splits, split, "tokens") or 0.0 for split in ("train", "held_out"))
        if characters and tokens:
            return characters / tokens
    return None
