"""Write the report: one HTML file about a run, from the run's files alone.

In: a run directory, finished or not. Out: `report.html`, self-contained: no script, no address outside, a content
security policy that would refuse both; readable on a phone, on paper, in the light and in the dark.
"""

from __future__ import annotations

import base64
import hashlib
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from frugalbert.report import attention, errors, importance, planes, plots, selection, tables
from frugalbert.report.collect import POSITIONS, SAMPLE, SELECTION, STAGES, Collected, collect
from frugalbert.report.plots import Curve, Dots
from frugalbert.report.svg import Plot, finish
from frugalbert.report.verdicts import (
    INITS,
    comparisons,
    describe_setting,
    headline_setting,
    is_baseline,
    name_of,
    setting,
    speedups,
    verdicts,
)
from frugalbert.report.wording import (
    at,
    big,
    clean,
    count,
    fixed,
    get,
    items_at,
    list_at,
    milliseconds,
    percent,
    short,
    significant,
    text_at,
    took,
)
from frugalbert.run import write_atomic

MOST_PANELS = 6
TERMS = {
    "logits_loss": "Distance of predictions (T² KL)", "attention_loss": "Distance of attention logits",
    "hidden_loss": "Distance of hidden states", "relation_loss": "Divergence of relations",
}  # fmt: skip
MOST_TASKS = 12


def build(section: Any, inputs: dict[str, Path], out: Path, machine: Any) -> dict[str, Any]:
    """The stage function: writes `out/report.html` about `inputs["run"]`; `section.title` overrides the heading."""
    html = render(inputs["run"], section.title)
    write_atomic(out / "report.html", html)
    return {"file": "report.html", "bytes": len(html.encode())}


def render(run: Path, title: str | None = None) -> str:
    """The page about a run directory; the same files give the same page. Raises ValueError if there is no such run."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    found = collect(Path(run))
    wrong = errors.read(Path(run) / "finetune", found.results, found)
    figures, rules = _figures(found, wrong)
    environment = Environment(
        loader=PackageLoader("frugalbert.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("page.html.j2")
    style = environment.get_template("page.css").render().strip() + "\n" + rules
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return template.render(
        **_context(found),
        mistakes=errors.context(wrong, figures),
        title=clean(title) if title else found.name,
        figures=figures,
        style=style,
        style_hash=digest,
    )


# ---- figures --------------------------------------------------------------------------------------------------------


def _figures(found: Collected, wrong: list[errors.Predictions]) -> tuple[dict[str, Plot], str]:
    """Every figure there is data for, by name, and the rules for their classes."""
    drawn: dict[str, Plot | None] = {
        **planes.figures(found),
        **attention.figures(found),
        **importance.figures(found),
        **errors.figures(wrong),
        "over_tokens": _loss(found, "tokens"),
        "over_time": _loss(found, "seconds"),
        "throughput": _throughput(found),
        "costs": _bar(tables.costs(found), "Pre-training time by activity"),
        "stages": _bar(tables.stage_seconds(found, len(plots.SERIES)), "Time of the whole run by stage"),
        "dots": _dots(found),
    }
    drawn |= {f"latency{index}": plot for index, plot in enumerate(_latencies(found))}
    names = [name for name, plot in drawn.items() if plot is not None]
    finished, rules = finish([plot for plot in drawn.values() if plot is not None])
    return dict(zip(names, finished, strict=True)), rules


def _curve(label: str, colour: str, records: Sequence[dict[str, Any]], axis: str, key: str) -> Curve:
    pairs = [(x, y) for record in records if (x := at(record, axis)) is not None and (y := at(record, key)) is not None]
    return Curve(label, colour, [x for x, _ in pairs], [y for _, y in pairs])


def _loss(found: Collected, axis: str) -> Plot | None:
    told = found.train[0] if found.train else {}
    key = next((name for name in ("generator_loss", "text_loss") if name in told), "loss")  # as validation measures
    train = _curve("training", "orange", found.train, axis, key)
    held_out = _curve("held out", "blue", found.validation, axis, "validation_loss")
    loss = [curve for curve in (train, held_out) if curve.x]
    if not loss:
        return None
    levels = {name: level for name in ("unigram", "bigram") if (level := at(found.summary, f"{name}_nll")) is not None}
    below: dict[str, Curve] = {}
    rate = _curve("", "green", found.train, axis, "learning_rate")
    masks = _curve("", "purple", [_percent(record) for record in found.train], axis, "mask_rate")
    if rate.x:
        below["Learning rate"] = rate
    if masks.x:
        below["Masked tokens (%)"] = masks
    for name, label in TERMS.items():
        if (term := _curve("", "purple", found.train, axis, name)).x:
            below[label] = term
    over = "tokens seen" if axis == "tokens" else "training time"
    parts = [f"{curve.label} loss from {curve.y[0]:.2f} to {curve.y[-1]:.2f}" for curve in loss]
    parts += [f"{name} baseline at {level:.2f}" for name, level in levels.items()]
    return plots.curves(loss, levels, below, axis, f"Line chart over {over}: {'; '.join(parts)}.")


def _percent(record: dict[str, Any]) -> dict[str, Any]:
    rate = at(record, "mask_rate")
    return {**record, "mask_rate": None if rate is None else 100 * rate}


def _throughput(found: Collected) -> Plot | None:
    curve = _curve("", "blue", found.train, "seconds", "tokens_per_second")
    if not curve.x:
        return None
    mean, used = at(found.summary, "tokens_per_second"), at(found.summary, "flop_utilisation_of_measured_ceiling")
    flops, ceiling = at(found.summary, "flops_per_token"), at(found.summary, "ceiling_flops")
    at_ceiling = ceiling / flops if flops and ceiling else mean / used if mean and used else None
    alt = f"Line chart of throughput over training time: {big(min(curve.y))} to {big(max(curve.y))} tokens per second"
    alt += f", {big(mean)} on average" if mean else ""
    return plots.throughput(curve, mean, at_ceiling, alt + ".")


def _bar(parts: list[tuple[str, float]], what: str) -> Plot | None:
    if not parts:
        return None
    total = sum(seconds for _, seconds in parts)
    shares = ", ".join(f"{name} {percent(seconds / total)}" for name, seconds in parts)
    return plots.stacked_bar(parts[: len(plots.SERIES)], f"{what}: {shares}.")


def _dots(found: Collected) -> Plot | None:
    """Tasks whose metric is bounded: they share one axis."""
    tasks = []
    for comparison in comparisons(found.results):
        pair = [score for score in (comparison.trained, comparison.random) if score is not None and score.points]
        if pair:
            groups = [(score.init, score.values or (score.mean,), score.mean, score.interval) for score in pair]
            tasks.append(Dots(comparison.task, groups, pair[0].majority))
    if not tasks:
        return None
    words = [
        f"{task.label}: " + ", ".join(f"{INITS.get(init, init)} {fixed(mean)}" for init, _, mean, _ in task.groups)
        for task in tasks[:MOST_TASKS]
    ]
    return plots.dot_plot(tasks[:MOST_TASKS], f"Dot plot of scores in points. {'; '.join(words)}.")


def _latencies(found: Collected) -> list[Plot]:
    """One figure per setting, from the smallest on."""
    panels: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row, _ in speedups(found.latency):
        panels.setdefault(setting(row), []).append(row)
    drawn = []
    for rows in list(panels.values())[:MOST_PANELS]:
        where = describe_setting(rows[0])
        entries = [(name_of(row), row["median_ms"], is_baseline(row)) for row in rows]
        words = ", ".join(f"{name} {milliseconds(value)}\u00a0ms" for name, value, _ in entries)
        drawn.append(plots.bars(entries, where, f"Bar chart of median latency, {where}: {words}."))
    return drawn


# ---- words ----------------------------------------------------------------------------------------------------------


def _context(found: Collected) -> dict[str, Any]:
    """Everything the template shows besides the figures; it escapes every text."""
    environment, mixed = tables.environment(found)
    costs, stage_seconds = tables.costs(found), tables.stage_seconds(found, len(plots.SERIES))
    return {
        "found": found,
        "lead": _lead(found),
        "tiles": _tiles(found),
        "verdicts": [
            *selection.verdicts(found), *attention.verdicts(found), *importance.verdicts(found), *verdicts(found)
        ],
        "selection": selection.context(found),
        "attention": attention.context(found),
        "importance": importance.context(found),
        "missing": _missing(found),
        "problems": found.problems[:20],
        "drifts": tables.drifts(found),
        "mixed": mixed,
        "notes": _notes(found),
        "has_baseline": any(map(is_baseline, found.latency)),
        "has_random": any(comparison.random for comparison in comparisons(found.results)),
        "events": found.events[:20],
        "training_facts": tables.training_facts(found),
        "corpus_facts": tables.corpus_facts(found),
        "environment": environment,
        "sample": SAMPLE,
        "commands": _commands(found),
        "snippet": _snippet(found),
        "finished": max((text_at(record, "finished") for record in found.stages.values()), default="")[:10],
        "tables": {
            "fine_tuning": tables.fine_tuning(found), "seeds": tables.seeds(found), "latency": tables.latency(found),
            "formats": tables.formats(found), "sources": tables.sources(found), "dropped": tables.dropped(found),
            "shards": tables.shard_sets(found), "stages": tables.stage_table(found),
            "sizes": tables.sizes(found),
            "costs": tables.shares("Pre-training by activity", costs, len(plots.SERIES)),
            "stage_seconds": tables.shares("Whole run by stage", stage_seconds, len(plots.SERIES)),
        },
    }  # fmt: skip


def _lead(found: Collected) -> list[tuple[str, bool]]:
    """What was trained, on what, how long, as (words, emphasised) pieces of one sentence."""
    summary, pieces = found.summary, []
    parameters, seconds = at(summary, "parameters"), at(summary, "seconds")
    if parameters is not None or text_at(summary, "arch"):
        pieces = [("An encoder", False)]
        if text_at(summary, "arch"):
            pieces += [(" of the form ", False), (text_at(summary, "arch"), True)]
        if parameters is not None:
            pieces += [(" with ", False), (f"{big(parameters)} parameters", True)]
        pieces += [(", pre-trained", False)]
        pieces += [(" for ", False), (took(seconds), True)] if seconds is not None else []
    if at(found.corpus, "documents") is not None:
        paths = [text_at(row, "path") for row in list_at(found.corpus, "sources")]
        named = " and ".join(filter(None, paths[:2])) if len(paths) <= 2 else f"{len(paths)} sources"
        pieces += [
            (" on " if pieces else "A corpus of ", False),
            (f"{count(found.corpus['documents'])} documents", True),
        ]
        pieces += [(f" from {named}", False)] if named else []
    where = [text_at(summary, key) for key in ("device", "precision") if text_at(summary, key)]
    pieces += [(f" ({', '.join(where)})", False)] if where and pieces else []
    return [*pieces, (".", False)] if pieces else []


def _tiles(found: Collected) -> list[tuple[str, str, str]]:
    """(label, figure, what it means) of the headline numbers there are."""
    summary, tiles = found.summary, []
    if (loss := at(summary, "final_validation_loss")) is not None:
        bigram = at(summary, "bigram_nll")
        tiles.append(("Held-out loss", fixed(loss, 2), f"bigram {fixed(bigram, 2)}" if bigram is not None else "nats"))
    tiles += _score_tile(found)
    if (parameters := at(summary, "parameters")) is not None:
        encoder = at(summary, "encoder_parameters")
        tiles.append(("Parameters", big(parameters), f"{big(encoder)} without embeddings" if encoder else ""))
    if (tokens := at(summary, "tokens")) is not None:
        rate = at(summary, "tokens_per_second")
        tiles.append(("Tokens seen", big(tokens), f"{big(rate)} a second" if rate else ""))
    if (used := at(summary, "flop_utilisation_of_measured_ceiling")) is not None:
        tiles.append(("FLOP utilisation", percent(used, 0), "of the measured GEMM ceiling"))
    if rows := headline_setting(found.latency):
        row, ratio = rows[0]
        note = f"{name_of(row)}, {text_at(row, 'batch_size')} × {text_at(row, 'length')} tokens"
        note += f"; BERT-base takes {significant(ratio)} times as long" if ratio else ""
        tiles.append(("Latency", f"{milliseconds(row['median_ms'])}\u00a0ms", note))
    return tiles


def _score_tile(found: Collected) -> list[tuple[str, str, str]]:
    """The task's score, or the mean over tasks with bounded metrics that were also tried from random weights."""
    pairs = [(item.trained, item.random) for item in comparisons(found.results) if item.trained]
    both = [(trained, random) for trained, random in pairs if random and trained.points and random.points]
    if len(both) > 1:
        means = [sum(score.mean for score in side) / len(both) for side in zip(*both, strict=True)]
        return [(f"Mean of {len(both)} tasks", fixed(means[0]), f"points, from random {fixed(means[1])}")]
    return [
        (short(trained.task, 24), trained.show(trained.mean),
         trained.metric + (f", from random {random.show(random.mean)}" if random else ""))
        for trained, random in pairs[:1]
    ]  # fmt: skip


def _missing(found: Collected) -> list[str]:
    """One sentence per stage that should be there and is not done."""
    lines = []
    for name in found.wanted or [stage for stage in STAGES if stage not in (*SELECTION, *POSITIONS)]:
        if name in found.stages:
            continue
        begun = name in found.unfinished
        more = f" ({found.trials} trials so far)" if name == "finetune" and found.trials else ""
        records = {
            "pretrain": found.train, "supernet": found.selection.supernet.train,
            "attention": found.attention.training.train, "importance": found.importance.training.train,
        }.get(name, [])  # fmt: skip
        if begun and records:
            more = f" ({percent(records[-1].get('progress'), 0)} of the budget so far)"
        lines.append(f"{tables.title(name)} has {'not finished' if begun else 'not run'}{more}.")
    return lines


def _notes(found: Collected) -> str:
    """What has to be known to read the curves."""
    rates = [rate for record in found.train if (rate := at(record, "mask_rate")) is not None]
    notes = []
    if rates and abs(rates[0] - rates[-1]) < 1e-3:
        notes.append(f"Training masks {percent(rates[0], 0)} of the tokens.")
    elif rates:
        notes.append(
            f"Training masks {percent(rates[0], 0)} of the tokens at first and {percent(rates[-1], 0)} at the end."
        )
    if found.validation:
        notes.append("Held-out loss is always measured on the same rows with the same masks.")
    if at(found.summary, "bigram_nll") is not None:
        notes.append("The dashed lines are what a unigram and a bigram model reach on exactly these tokens.")
    if len(found.train) > plots.MOST_POINTS:
        notes.append("Training losses are averaged over short stretches; the band holds their middle 80\u00a0%.")
    return " ".join(notes)


def _commands(found: Collected) -> str:
    """What to type to get the same run again."""
    versions: dict[str, str] = {}
    for record in found.stages.values():
        versions |= {key: str(value) for key, value in items_at(record, "versions")}
    packages = ("frugalbert", "torch", "transformers", "tokenizers", "numpy")
    pins = [f"{name}=={versions[name].split('+')[0]}" for name in packages if name in versions]
    install = [f"pip install {' '.join(map(shlex.quote, pins))}"] if pins else []
    return "\n".join([*install, f"frugalbert run {shlex.quote(f'{found.name}.yaml')}"])


def _snippet(found: Collected) -> str:
    """Python that loads what the run produced."""
    exported = get(found.export, "formats", "hf")
    if exported is None and not found.summary:
        return ""
    folder = f"{found.folder}/export/hf" if exported is not None else f"{found.folder}/pretrain/model"
    stock = get(exported, "stock") is True
    trust = "" if stock else ", trust_remote_code=True"
    lines = [
        "from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer",
        "",
        f"folder = {folder!r}",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        f"model = AutoModelForMaskedLM.from_pretrained(folder{trust})",
        'inputs = tokenizer(f"Returns the {tokenizer.mask_token} of the list.", return_tensors="pt")',
        "logits = model(**inputs).logits",
        "masked = (inputs.input_ids == tokenizer.mask_token_id).nonzero()[:, 1]",
        "print(tokenizer.convert_ids_to_tokens(logits[0, masked].topk(5).indices[0]))",
        "",
        f"encoder = AutoModel.from_pretrained(folder{trust})  # hidden states, to fine-tune or to embed",
    ]
    if get(found.export, "formats", "onnx") is not None:
        lines += [
            "",
            "import onnxruntime",
            f"session = onnxruntime.InferenceSession({f'{found.folder}/export/onnx/model.onnx'!r})",
        ]
    return "\n".join(lines)
