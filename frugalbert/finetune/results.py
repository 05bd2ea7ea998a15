"""What a model says of a set of examples: predictions by name, metrics, and figures over trials."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from frugalbert.config import Finetune
from frugalbert.finetune import metrics, scores
from frugalbert.finetune.features import Features
from frugalbert.finetune.models import Source, title
from frugalbert.finetune.tasks import Data, Example, Task
from frugalbert.finetune.trial import Job, predict

if TYPE_CHECKING:
    from torch import nn

SELECTIONS = {
    "none": "none: evaluated once, after the last step",
    "train": "on a share of the training examples; the dev set chose nothing",
    "dev": "on the dev set itself: its scores are too kind",
}
WITH_STARTS = "pretrained, with starts from other tasks"
SHOWN = "dev results (selection {})"


@dataclass(frozen=True)
class Found:
    """`predicted` as `metrics.score` takes it; `lines`: one JSON line per example, in order."""

    task: Task
    predicted: Any
    lines: str
    scores: dict[str, float]
    """Empty if there are no labels."""


def dev_sets(data: Data) -> list[str]:
    """The sets that make a task's figure: `dev`, and MNLI's `dev-mismatched`."""
    return [name for name in data.sets if name.startswith("dev")]


def headline_names(data: Data) -> list[str]:
    """Names of the leaderboard's metrics over all dev sets: `accuracy`, `accuracy_mismatched`."""
    return [f"{metric}{suffix(name)}" for name in dev_sets(data) for metric in data.task.headline]


def metric_of(data: Data) -> str:
    """What the headline figure is, in words."""
    names = headline_names(data)
    return names[0] if len(names) == 1 else f"({' + '.join(names)}) / {len(names)}"


def suffix(name: str) -> str:
    return name.removeprefix("dev").replace("-", "_")


def evaluate(
    job: Job, name: str, model: nn.Module, order: list[int] | None = None, scale: tuple[float, float] = (0.0, 1.0)
) -> Found:
    """Predict one set.

    Args:
        order: where the task's classes stand among the model's outputs; None = in the same order.
        scale: mean and deviation of the targets while a regression is trained on standardised ones.
    """
    from frugalbert.finetune import heads

    features, examples = job.features[name], job.data.sets[name]
    task = next((rider for rider in job.data.riders if rider.name == name), job.data.task)
    found = predict(model, features, job.device)
    if order is not None:
        found = [output[..., order] for output in found]
    if scale != (0.0, 1.0):
        found = [output * scale[1] + scale[0] for output in found]
    extra: dict[str, list[Any]] = {}
    if features.kind == "question-answering":
        empty = any(example.label == 0 for example in job.data.sets.get("train", job.data.dev))
        predicted, extra["null_odds"] = heads.answers(found, features, examples, job.settings.max_answer_length, empty)
    else:
        predicted = heads.decide(features.kind, found, features, examples, task.limits)
        if features.kind == "token-classification":
            predicted = [[job.data.labels[tag] for tag in tags] for tags in predicted]
    extra |= _probabilities(features, found)
    if features.targets is not None:
        values = losses(features, found, len(examples))
        extra["loss"] = [value if math.isfinite(value) else None for value in values]  # no right option: no loss
    lines = _lines(examples, job.data.labels, features.kind, predicted, extra)
    known = features.targets is not None
    scores = metrics.score(task.metrics, examples, predicted, job.data.labels) if known else {}
    return Found(task, predicted, lines, scores)


def losses(features: Features, found: list[Any], count: int) -> list[float]:
    """Loss of each example, the mean over its rows."""
    import torch

    from frugalbert.finetune.heads import Loss

    loss_of = Loss(features)
    if features.kind in ("question-answering", "token-classification"):
        units = [
            float(loss_of(torch.from_numpy(output)[None], np.array([unit]))[0]) for unit, output in enumerate(found)
        ]
        return (np.bincount(features.owner, units, count) / np.bincount(features.owner, minlength=count)).tolist()
    return loss_of(torch.from_numpy(np.stack(found)), np.arange(count)).tolist()


def _probabilities(features: Features, found: list[Any]) -> dict[str, list[Any]]:
    """Of the classes, labels or options of each example."""
    import torch

    if features.kind == "multiple-choice":
        scores, starts = torch.from_numpy(np.concatenate(found)), features.units
        shares = [scores[a:b].softmax(0).tolist() for a, b in zip(starts[:-1], starts[1:], strict=True)]
    elif features.kind in ("classification", "multilabel"):
        logits = torch.from_numpy(np.stack(found))
        shares = (logits.softmax(-1) if features.kind == "classification" else logits.sigmoid()).tolist()
    else:
        return {}
    return {"probabilities": [[round(share, 6) for share in row] for row in shares]}


def _lines(
    examples: list[Example], labels: tuple[str, ...], kind: str, predicted: Any, extra: dict[str, list[Any]]
) -> str:
    """`predictions.jsonl`."""
    found = []
    for index, example in enumerate(examples):
        line: dict[str, Any] = {"index": index, "id": example.id or str(index), "digest": example.digest}
        if example.label is not None:
            line["gold"] = _gold(example, labels, kind)
        line["prediction"] = _named(example, labels, kind, predicted[index])
        line |= {
            name: round(values[index], 6) if isinstance(values[index], float) else values[index]
            for name, values in extra.items()
        }
        found.append(json.dumps(line, ensure_ascii=False) + "\n")
    return "".join(found)


def _named(example: Example, labels: tuple[str, ...], kind: str, value: Any) -> Any:
    """A prediction as the files have it: a number, a class, an option, a text, or lists of labels or tags."""
    if kind == "regression":
        return round(float(value), 6)
    if kind == "classification":
        return labels[int(value)]
    if kind == "multiple-choice":
        return example.names[int(value)] if example.names else int(value)
    if kind == "multilabel":
        return [name for name, applies in zip(labels, value, strict=True) if applies]
    return value


def _gold(example: Example, labels: tuple[str, ...], kind: str) -> Any:
    if kind == "question-answering":
        return list(example.answers)
    if isinstance(example.label, tuple):
        if kind == "multiple-choice":
            return [_named(example, labels, kind, number) for number in example.label]
        return [labels[number] for number in example.label]
    return _named(example, labels, kind, example.label)


def token_lines(job: Job) -> str:
    """`dev-tokens.jsonl`: the dev examples as the model reads them, so that exported models can be measured on them."""
    features = job.features["dev"]
    columns = {"input_ids": features.ids} | ({} if features.types is None else {"token_type_ids": features.types})
    return "".join(
        json.dumps({name: rows[index].tolist() for name, rows in columns.items()}) + "\n"
        for index in range(len(features.ids))
    )


# ---- over seeds -----------------------------------------------------------------------------------------------------


def summary(job: Job, init: str, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of `results.json`: the task from one initialisation over all seeds, then its labelled riders.

    Undefined figures are null. `bootstrap`: 95 % interval over resampled examples of the mean over seeds.
    """
    data = job.data
    sets = {name: data.task for name in dev_sets(data)}
    rows = [_row(job, init, results, data.task, sets, metric_of(data))]
    for rider in data.riders:
        if rider.name in results[0]["riders"]:
            found = [{**result, **result["riders"][rider.name]} for result in results]
            rows.append(_row(job, init, found, rider, {rider.name: rider}, rider.metric))
    return rows


def _row(
    job: Job, init: str, results: list[dict[str, Any]], task: Task, sets: dict[str, Task], metric: str
) -> dict[str, Any]:
    data = job.data
    mean, deviation, interval = _over_seeds([result["value"] for result in results])
    first = next(iter(sets))
    spread = {name: _over_seeds([result["metrics"].get(name) for result in results]) for name in results[0]["metrics"]}
    return {
        "task": task.name,
        "title": task.title,
        "type": task.type,
        "metric": metric,
        "init": init,
        "seeds": [result["seed"] for result in results],
        "values": [result["value"] for result in results],
        "mean": mean,
        "std": deviation,
        "interval": interval,
        "all_metrics": {name: {"mean": value[0], "std": value[1]} for name, value in spread.items()},
        "train_examples": len(data.sets.get("train", ())),
        "dev_examples": sum(len(data.sets[name]) for name in sets),
        "majority_baseline": metrics.plain(_majority(data, sets)),
        "labels": list(data.labels),
        "selection": SELECTIONS[job.settings.select],
        "recipe": {name: getattr(job.settings, name) for name in ("learning_rate", "batch_size", "epochs")},
        "cut": {name: job.features[name].num_cut for name in ("train", first) if name in job.features},
    }


def _majority(data: Data, sets: dict[str, Task]) -> float:
    """The headline figure of always giving the training set's most frequent answer."""
    values = []
    for name, task in sets.items():
        constant = metrics.majority(task.type, data.sets.get("train", ()), data.sets[name], data.labels)
        scores = metrics.score(task.headline, data.sets[name], constant, data.labels)
        values.append(metrics.headline(scores, task.headline))
    return float(np.mean(values))


def _over_seeds(values: list[float | None]) -> tuple[float | None, float | None, list[float | None]]:
    mean, deviation, interval = metrics.summary([math.nan if value is None else value for value in values])
    return metrics.plain(mean), metrics.plain(deviation), [metrics.plain(bound) for bound in interval]


def blimp_row(init: str, found: dict[str, Any]) -> dict[str, Any]:
    """What `blimp.evaluate` found, as a row of `results.json`."""
    accuracy = found["accuracy"]
    return {
        "task": "blimp",
        "title": f"BLiMP ({found['method']})",
        "type": "minimal-pairs",
        "metric": "accuracy",
        "init": init,
        "seeds": [0],
        "values": [accuracy],
        "mean": accuracy,
        "std": None,
        "interval": [None, None],
        "bootstrap": found["interval"],
        "all_metrics": {"accuracy": {"mean": accuracy, "std": None}},
        "train_examples": 0,
        "dev_examples": found["num_pairs"],
        "majority_baseline": 0.5,
        "labels": [],
        "selection": "none: without training",
        "carrier": "blimp",
        "trials": 1,
    }


def board(source: Source, section: Finetune, rows: list[dict[str, Any]], pairs: dict[str, Any]) -> dict[str, Any]:
    """`board.json`, which `frugalbert report` compares: the model, its recipe, rows, BLiMP and the boards' scores."""
    figures: dict[str, dict[str, Any]] = {}
    for row in rows:
        values = {name: value["mean"] for name, value in row["all_metrics"].items()}
        figures.setdefault(row["init"], {})[row["task"]] = values
    transferred = {name: figures.pop(name) for name in list(figures) if name.startswith("from ")}
    for found in transferred.values():  # a board with intermediate training: some tasks start from others
        figures.setdefault(WITH_STARTS, dict(figures["pretrained"])).update(found)
    found = [
        {"init": init, **asdict(scores.board_score(name, figures[init]))}
        for init in figures
        for name, needed in scores.BOARDS.items()
        if sum(task in figures[init] for _, task, _ in needed.columns) > 1
    ]
    return {
        "model": title(source.name),
        "identity": source.identity,
        "parameters": _parameters(Path(source.name)),
        "settings": section.model_dump(mode="json", exclude={"model", "data"}, exclude_defaults=True),
        "rows": rows,
        "blimp": pairs,
        "scores": found,
    }


def _parameters(folder: Path) -> int | None:
    """Weights in a directory's files; None for what is no directory here."""
    from safetensors import safe_open

    total = 0
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return total or None


def gains(rows: list[dict[str, Any]]) -> None:
    """Add to each row how much it gains over random weights: paired by seed, with a 95 % interval over seeds and one
    over examples; the latter also of the figure itself (`bootstrap`, from `resamples`, which goes).
    """
    random = {row["task"]: row for row in rows if row["init"] == "random"}
    drawn = {(row["task"], row["init"]): row.pop("resamples") for row in rows if "resamples" in row}
    for row in rows:
        values = drawn.get((row["task"], row["init"]))
        if values is not None:
            row["bootstrap"] = [metrics.plain(bound) for bound in scores.bounds(values)]
        base = random.get(row["task"])
        if base and base is not row and base["seeds"] == row["seeds"]:
            pairs = zip(row["values"], base["values"], strict=True)
            mean, _, interval = _over_seeds([None if None in pair else pair[0] - pair[1] for pair in pairs])
            row["gain"] = {"mean": mean, "interval": interval}
            if values is not None and (row["task"], "random") in drawn:
                bounds = scores.bounds(values - drawn[row["task"], "random"])
                row["gain"]["bootstrap"] = [metrics.plain(bound) for bound in bounds]


def show(rows: list[dict[str, Any]]) -> None:
    """The table of results, to standard error."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    names = {"pretrained": "pre-trained"}
    inits = [init for init in dict.fromkeys(row["init"] for row in rows) if init != "random"]
    title = SHOWN.format(" / ".join(dict.fromkeys(row["selection"] for row in rows)))
    table = Table(title=title, title_justify="left")
    columns = ["task: metric", "random", *(names.get(init, init) for init in inits)]
    for column in (*columns, "95 % over examples", "gain [95 % over seeds]", "majority"):
        table.add_column(column, overflow="fold")
    for task in dict.fromkeys(row["task"] for row in rows):
        by_init = {row["init"]: row for row in rows if row["task"] == task}
        first = next(row for init, row in by_init.items() if init != "random")
        gain = first.get("gain")
        cells = [
            f"{first['title']}: {first['metric']}",
            *(
                _spread(by_init[init]["mean"], by_init[init]["std"]) if init in by_init else ""
                for init in ("random", *inits)
            ),
            f"[{', '.join(_figure(bound) for bound in first['bootstrap'])}]" if "bootstrap" in first else "",
            f"{_figure(gain['mean'], '+')} [{', '.join(_figure(bound, '+') for bound in gain['interval'])}]"
            if gain
            else "",
            _figure(first["majority_baseline"]),
        ]
        table.add_row(*(Text(cell) for cell in cells))
    Console(stderr=True).print(table)


def show_scores(found: list[dict[str, Any]]) -> None:
    """The sentences of the boards' scores, to standard error."""
    from frugalbert.run import say

    for score in found:
        value = score["mean"] if score["value"] is None else score["value"]
        shown = f" {_figure(value)}." if value is not None else ""
        say(f"{score['init']}: {score['sentence']}{shown}")


def _spread(mean: float | None, deviation: float | None) -> str:
    return _figure(mean) if deviation is None else f"{_figure(mean)} ± {_figure(deviation)}"


def _figure(value: float | None, sign: str = "") -> str:
    return "?" if value is None else f"{value:{sign}.3f}"
