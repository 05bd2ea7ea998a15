"""Outputs of finished trials in; predictions by name, figures over seeds and the table out."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

from frugalbert.finetune import metrics
from frugalbert.finetune.trial import Job, losses

SELECTION = "none: evaluated once, after the last step"


def gold(labels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Labels as metrics want them: multi-label rows as integers."""
    return labels.astype(np.int64) if labels.ndim == 2 else labels


def decide(job: Job, outputs: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Predictions from outputs (N, C): the likeliest class, the number within the task's limits, labels above 0.5."""
    kind, limits = job.data.task.type, job.data.task.limits
    if kind == "classification":
        return outputs.argmax(axis=1)
    if kind == "multilabel":
        return (outputs > 0).astype(np.int64)
    return outputs[:, 0] if limits is None else outputs[:, 0].clip(*limits)


def token_lines(job: Job) -> str:
    """`dev-tokens.jsonl`: the dev examples as the model reads them, so that exported models can be measured on them."""
    features = job.dev
    columns = {"input_ids": features.ids} | ({} if features.types is None else {"token_type_ids": features.types})
    return "".join(
        json.dumps({name: rows[index].tolist() for name, rows in columns.items()}) + "\n"
        for index in range(len(features.ids))
    )


def _named(job: Job, label: Any) -> float | str | list[str]:
    """A label or prediction as the files have it: a number, a class, or the labels that apply."""
    names = job.data.labels
    if job.data.task.type == "regression":
        return round(float(label), 6)
    if job.data.task.type == "classification":
        return names[int(label)]
    return [name for name, applies in zip(names, label, strict=True) if applies]


def lines(job: Job, outputs: np.ndarray[Any, Any], predicted: np.ndarray[Any, Any]) -> str:
    """`predictions.jsonl`: one line per dev example, in order."""
    import torch

    kind, logits = job.data.task.type, torch.from_numpy(outputs)
    loss = losses(kind, logits, torch.from_numpy(job.dev.labels)).tolist()
    shares = (logits.softmax(-1) if kind == "classification" else logits.sigmoid()).tolist()
    found = []
    for index, example in enumerate(job.data.dev):
        line: dict[str, Any] = {"index": index, "id": example.digest}
        line |= {"gold": _named(job, job.dev.labels[index]), "prediction": _named(job, predicted[index])}
        if kind != "regression":
            line["probabilities"] = [round(share, 6) for share in shares[index]]
        found.append(json.dumps({**line, "loss": round(loss[index], 6)}, ensure_ascii=False) + "\n")
    return "".join(found)


def summary(job: Job, init: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of `results.json`: a task from one initialisation over all seeds. Undefined figures are null."""
    task = job.data.task
    mean, deviation, interval = _over_seeds([result["value"] for result in results])
    constant = metrics.constant(task.type, gold(job.train.labels))
    repeated = np.broadcast_to(constant, job.dev.labels.shape)
    baseline = metrics.headline(metrics.compute(task.metrics, gold(job.dev.labels), repeated), task.headline)
    spread = {name: _over_seeds([result["metrics"][name] for result in results]) for name in task.metrics}
    return {
        "task": task.name,
        "title": task.title,
        "type": task.type,
        "metric": task.metric,
        "init": init,
        "seeds": [result["seed"] for result in results],
        "values": [result["value"] for result in results],
        "mean": mean,
        "std": deviation,
        "interval": interval,
        "all_metrics": {name: {"mean": value[0], "std": value[1]} for name, value in spread.items()},
        "train_examples": len(job.data.train),
        "dev_examples": len(job.data.dev),
        "majority_baseline": metrics.plain(baseline),
        "labels": list(job.data.labels),
        "selection": SELECTION,
    }


def _over_seeds(values: list[float | None]) -> tuple[float | None, float | None, list[float | None]]:
    mean, deviation, interval = metrics.summary([math.nan if value is None else value for value in values])
    return metrics.plain(mean), metrics.plain(deviation), [metrics.plain(bound) for bound in interval]


def gains(rows: list[dict[str, Any]]) -> None:
    """Add to each pre-trained row how much it gains over random weights: paired by seed, with a 95 % interval."""
    random = {row["task"]: row["values"] for row in rows if row["init"] == "random"}
    for row in rows:
        if row["init"] == "pretrained" and row["task"] in random:
            pairs = zip(row["values"], random[row["task"]], strict=True)
            mean, _, interval = _over_seeds([None if None in pair else pair[0] - pair[1] for pair in pairs])
            row["gain"] = {"mean": mean, "interval": interval}


def show(rows: list[dict[str, Any]]) -> None:
    """The table of results, to standard error."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"dev results (selection {SELECTION})", title_justify="left")
    for column in ("task: metric", "random", "pre-trained", "gain [95 %]", "majority"):
        table.add_column(column, overflow="fold")
    for task in dict.fromkeys(row["task"] for row in rows):
        by_init = {row["init"]: row for row in rows if row["task"] == task}
        first = by_init["pretrained"]
        random, gain = by_init.get("random"), first.get("gain")
        cells = [
            f"{first['title']}: {first['metric']}",
            _spread(random["mean"], random["std"]) if random else "",
            _spread(first["mean"], first["std"]),
            f"{_figure(gain['mean'], '+')} [{', '.join(_figure(bound, '+') for bound in gain['interval'])}]"
            if gain
            else "",
            _figure(first["majority_baseline"]),
        ]
        table.add_row(*(Text(cell) for cell in cells))
    Console(stderr=True).print(table)


def _spread(mean: float | None, deviation: float | None) -> str:
    return _figure(mean) if deviation is None else f"{_figure(mean)} ± {_figure(deviation)}"


def _figure(value: float | None, sign: str = "") -> str:
    return "?" if value is None else f"{value:{sign}.3f}"
