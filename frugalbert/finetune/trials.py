"""One trial on disk: a folder with predictions and, written last, its result; the model and test answers of one trial.

A finished trial with the same identity (settings, data, weights, precision) is read, never repeated; a damaged one is
done again. `Spec` (a JSON mapping) says which trial, so that it can be done by any process.
"""

from __future__ import annotations

import functools
import io
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from frugalbert import run
from frugalbert.finetune import metrics, models, results, scores, trial
from frugalbert.finetune.tasks import Data
from frugalbert.progress import quiet

Spec = dict[str, Any]
"""`job` (the task's name), `init`, `setting` (of a sweep), `seed`, `keep` (also its model), `identity`, `out`."""
FROM = "from "


def with_setting(job: trial.Job, setting: dict[str, Any]) -> trial.Job:
    """The job with a sweep's values in its recipe."""
    return replace(job, settings=job.settings.model_copy(update=setting)) if setting else job


def identity(job: trial.Job, init: str, seed: int) -> str:
    """Hash of all that decides a trial's result: settings, data, weights, precision; not where it runs."""
    left_out = {"tasks", "data", "model", "seeds", "random_baseline", "per_task", "sweep", "agora", "predict_test"}
    left_out |= {"blimp", "blimp_pairs"}
    settings = job.settings.model_dump(mode="json", exclude=left_out)
    task = [job.data.task.name, job.data.task.type, job.data.task.metrics, job.data.labels]
    return run.fingerprint([settings, job.texts, task, job.source.identity, job.precision, init, seed])


def digest_of(data: Data) -> str:
    """Of all that is trained and scored on; test sets are only predicted."""
    return run.fingerprint(
        {
            name: [[x.digest, x.label, x.id, x.group, x.spans, x.answers, x.starts, x.names] for x in part]
            for name, part in data.sets.items()
            if not name.startswith("test")
        }
    )


def folder_of(task: Spec) -> Path:
    """Of a trial: initialisation, setting (if it is one of a sweep) and seed."""
    setting = f"-{run.fingerprint(task['setting'])[:8]}" if task["setting"] else ""
    return Path(task["out"]) / task["job"] / f"{task['init'].replace(' ', '-')}{setting}-seed{task['seed']}"


def on_disk(task: Spec) -> dict[str, Any] | None:
    """The result of a trial that was finished with the same settings, or None if it has to be (re)done."""
    folder = folder_of(task)
    if not (folder / "result.json").exists():
        return None
    try:
        result = run.read_json(folder / "result.json")
        same = all(run.sha256(folder / name) == digest for name, digest in result["files"].items())
        whole = result["identity"] == task["identity"] and same
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        whole = False
    if not whole:
        run.say(f"{folder}: damaged, or of other settings; done again")
        return None
    places = [folder.parent, *([folder.parent / "test"] if task.get("tests") else [])]
    there = task["init"] == models.AS_IT_IS or (folder.parent / "model" / "config.json").exists()
    kept = there and all(_of(place) == task["identity"] for place in places)
    return result if kept or not task["keep"] else None


def _of(folder: Path) -> str | None:
    """The identity of the trial whose model, or whose test answers, a folder keeps."""
    try:
        return run.read_json(folder / "model.json")["identity"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def one(task: Spec, job: trial.Job, report: trial.Report) -> dict[str, Any]:
    """Result of one trial, from disk if it is there. Predictions and model are written before the result."""
    before = on_disk(task)
    if before:
        return before
    job, folder = with_setting(job, task["setting"]), folder_of(task)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").unlink(missing_ok=True)
    started = time.monotonic()
    init = "pretrained" if task["init"].startswith(FROM) else task["init"]
    try:
        score = None if job.settings.select == "none" else functools.partial(_selection, job)
        model, state = trial.run_trial(job, init, task["seed"], report, folder, score)
    except trial.Diverged as error:
        if not task["setting"]:
            raise
        run.say(str(error))  # of a sweep, this setting has lost
        return _finish(task, job, {"value": None, "metrics": {}, "riders": {}, "selection": None}, started)
    order = models.label_order(job.source, job.data) if init == models.AS_IT_IS else None
    if order:
        run.say(f"{job.source.name} has its classes in another order than {job.data.task.title}; mapped by name")
    found = {name: results.evaluate(job, name, model, order) for name in _evaluated(job, task["keep"])}
    if task["keep"]:
        _keep(task, job, model, found)
    for name in [name for name in found if found[name].scores and name not in ("select", "train")]:
        file = "predictions.jsonl" if name == "dev" else f"predictions-{name}.jsonl"
        run.write_atomic(folder / file, found[name].lines)
    _write_resamples(folder, job, found)
    figures = _figures(job, found)
    best = state.scores[state.best_epoch - 1] if state.scores else None
    figures["selection"] = figures["value"] if best is None else metrics.plain(best)
    if state.scores:
        figures |= {"epoch_scores": [metrics.plain(value) for value in state.scores], "best_epoch": state.best_epoch}
    return _finish(task, job, figures, started)


def _evaluated(job: trial.Job, keep: bool) -> list[str]:
    """Sets that a trial predicts: those with labels, and for the kept model the test sets."""
    skipped = {"train", "select"}
    return [
        name
        for name, features in job.features.items()
        if name not in skipped and (features.targets is not None and not name.startswith("test") or keep)
    ]


def _selection(job: trial.Job, model: Any, scale: tuple[float, float]) -> float:
    """The headline figure on the examples that select."""
    names = ["select"] if job.settings.select == "train" else results.dev_sets(job.data)
    values = []
    for name in names:
        found = results.evaluate(job, name, model, scale=scale)
        values.append(metrics.headline(found.scores, job.data.task.headline))
    return float(np.mean(values))


def _write_resamples(folder: Path, job: trial.Job, found: dict[str, results.Found]) -> None:
    """`bootstrap-TASK.npy` (1000,): the headline figure of the task, and of each rider, under resampled examples."""
    names = {job.data.task.name: results.dev_sets(job.data)}
    names |= {rider.name: [rider.name] for rider in job.data.riders if rider.name in found}
    for task, sets in names.items():
        parts = [
            scores.Part(found[name].task.headline, job.data.sets[name], [found[name].predicted], job.data.labels)
            for name in sets
            if found[name].scores
        ]
        if parts:
            buffer = io.BytesIO()
            np.save(buffer, scores.resamples_of(parts).astype(np.float32))
            run.write_atomic(folder / f"bootstrap-{task}.npy", buffer.getvalue())


def read_resamples(folder: Path, task: str) -> Any:
    """What `_write_resamples` wrote."""
    return np.load(folder / f"bootstrap-{task}.npy")


def _figures(job: trial.Job, found: dict[str, results.Found]) -> dict[str, Any]:
    """The metrics of the dev sets, their headline, and those of the riders."""
    every: dict[str, float] = {}
    for name in results.dev_sets(job.data):
        every |= {f"{metric}{results.suffix(name)}": value for metric, value in found[name].scores.items()}
    riders = {}
    for rider in job.data.riders:
        own = found[rider.name].scores if rider.name in found else {}
        if own:
            plain = {metric: metrics.plain(value) for metric, value in own.items()}
            riders[rider.name] = {"value": metrics.plain(metrics.headline(own, rider.headline)), "metrics": plain}
    return {
        "value": metrics.plain(metrics.headline(every, results.headline_names(job.data))),
        "metrics": {name: metrics.plain(value) for name, value in every.items()},
        "riders": riders,
    }


def _keep(task: Spec, job: trial.Job, model: Any, found: dict[str, results.Found]) -> None:
    """Write the model, and what it says of the test sets and the riders for `frugalbert submit`."""
    out = Path(task["out"]) / task["job"]
    (out / "model.json").unlink(missing_ok=True)
    if task["init"] == models.AS_IT_IS:
        shutil.rmtree(out / "model", ignore_errors=True)  # of an earlier call that trained
    else:
        with run.publish(out / "model") as work, quiet():
            model.cpu().save_pretrained(work)
            model.to(job.device)
            job.source.tokenizer.model_max_length = job.settings.max_length
            job.source.tokenizer.save_pretrained(work)
    about = {"identity": task["identity"], "task": task["job"], "trial": folder_of(task).name}
    sets = submitted(job)
    if sets:
        with run.publish(out / "test") as work:
            for name in sets:
                (work / f"{name}.jsonl").write_text(found[name].lines, encoding="utf-8")
            files = {f"{name}.jsonl": run.sha256(work / f"{name}.jsonl") for name in sets}
            run.write_json(work / "model.json", {**about, "files": files})
    run.write_json(out / "model.json", about)


def submitted(job: trial.Job) -> list[str]:
    """The sets whose predictions are kept for `frugalbert submit`; none without `predict_test`."""
    riders = {rider.name for rider in job.data.riders}
    answered = job.data.task.type == "question-answering" or job.data.task.name.startswith("race")
    sets = [name for name in job.features if name.startswith("test") or name in riders or (answered and name == "dev")]
    return sets if job.settings.predict_test else []


def _finish(task: Spec, job: trial.Job, figures: dict[str, Any], started: float) -> dict[str, Any]:
    folder, title = folder_of(task), job.data.task.title
    result = {
        "task": task["job"],
        "init": task["init"],
        "seed": task["seed"],
        "setting": task["setting"],
        "metric": results.metric_of(job.data),
        **figures,
        "steps": job.num_steps if job.settings.train else 0,
        "seconds": round(time.monotonic() - started, 2),
        "precision": job.precision,
        "identity": task["identity"],
        "files": {path.name: run.sha256(path) for path in sorted([*folder.glob("*.jsonl"), *folder.glob("*.npy")])},
    }
    run.write_json(folder / "result.json", result)
    value = "undefined" if result["value"] is None else f"{result['value']:.4f}"
    run.say(f"{title} · {task['init']} · seed {task['seed']}: {result['metric']} {value} ({result['seconds']:.0f} s)")
    return result
