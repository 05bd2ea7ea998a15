"""The stage `finetune`: a model and tasks in; predictions, results over seeds and one fine-tuned model per task out.

Each task is trained from the pre-trained weights and, for comparison, from random ones: same recipe, same seeds, one
evaluation on the dev set after the last step. No dev score chooses anything. A finished trial is never repeated; a
killed one is, from its beginning and with its seed, so it ends the same.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from frugalbert import config, dist, run
from frugalbert.finetune import examples, metrics, models, results, trial
from frugalbert.finetune.features import encode
from frugalbert.finetune.tasks import Data, resolve
from frugalbert.progress import quiet


def build(section: config.Finetune, inputs: dict[str, Path], out: Path, machine: config.Machine) -> dict[str, Any]:
    """Fine-tune on every task and write `results.json`; see `docs/tour.md` for the files.

    Args:
        inputs: `yaml` (folder of relative paths), and where there are any `pretrain`, `tokenizer`, `corpus`.
    Returns `{task: {"metric", "pretrained": mean, "random": mean}}`.
    Raises ValueError or OSError with one sentence for tasks, data or models that cannot be used, before any training.
    """
    datas = [examples.load(task, section, inputs["yaml"], inputs.get("corpus")) for task in resolve(section.tasks)]
    dist.set_threads(machine)
    device = dist.pick_device(machine)
    precision = dist.pick_precision(section.precision, device)
    source = models.open_source(models.locate(section, inputs), inputs.get("tokenizer"))
    if source.max_positions and section.max_length > source.max_positions:
        raise ValueError(
            f"finetune.max_length is {section.max_length}, but {source.name} has {source.max_positions} positions; "
            "write at most that"
        )
    micro = section.batch_size if machine.micro_batch == "auto" else machine.micro_batch
    jobs = [_job(data, section, source, device, precision, micro) for data in datas]
    _sweep(out)
    for job in jobs:
        (out / job.data.task.name).mkdir(exist_ok=True)
        run.write_atomic(out / job.data.task.name / "dev-tokens.jsonl", results.token_lines(job))
    inits = ("pretrained", "random") if section.random_baseline else ("pretrained",)
    plan = [(job, init, seed) for job in jobs for init in inits for seed in section.seeds]
    finished: list[dict[str, Any]] = []
    with run.Progress("fine-tune", sum(job.num_steps for job, _, _ in plan), "steps") as progress:
        done = 0
        for job, init, seed in plan:
            name = f"{job.data.task.title} {init} {seed}"
            finished.append(_trial(job, init, seed, out, _reporter(progress, done, name)))
            done += job.num_steps
            progress.update(done)
    rows = [
        results.summary(job, init, [r for r in finished if r["task"] == job.data.task.name and r["init"] == init])
        for job in jobs
        for init in inits
    ]
    results.gains(rows)
    run.write_json(out / "results.json", rows)
    results.show(rows)
    headlines: dict[str, Any] = {}
    for row in rows:
        headlines.setdefault(row["task"], {"metric": row["metric"]})[row["init"]] = row["mean"]
    return {**headlines, "device": str(device)}


# ---- one task -------------------------------------------------------------------------------------------------------


def _job(
    data: Data, section: config.Finetune, source: models.Source, device: Any, precision: str, micro_batch: int
) -> trial.Job:
    """Tokenise once, and say what will be done."""
    sets = [
        encode(source.tokenizer, part, len(data.labels), section.max_length, source.has_types)
        for part in (data.train, data.dev)
    ]
    job = trial.Job(data, sets[0], sets[1], section, source, device, precision, micro_batch)
    classes = f"{len(data.labels)} classes" if data.labels else "regression"
    cut = sets[0].num_cut + sets[1].num_cut
    run.say(
        f"{data.task.title}: {len(data.train)} train and {len(data.dev)} dev examples, {classes}, median "
        f"{np.median(job.train.lengths):.0f} tokens, {cut} cut at {section.max_length}, {job.num_steps} steps a trial"
    )
    for note in data.notes:
        run.say(f"{data.task.title}: {note}")
    return job


def identity(job: trial.Job, init: str, seed: int) -> str:
    """Hash of all that decides a trial's result: settings, data, weights, precision; not where it runs."""
    settings = job.settings.model_dump(mode="json", exclude={"tasks", "data", "model", "seeds", "random_baseline"})
    texts = [[example.digest, example.label] for part in (job.data.train, job.data.dev) for example in part]
    task = [job.data.task.name, job.data.task.type, job.data.task.metrics, job.data.labels]
    return run.fingerprint([settings, texts, task, job.source.identity, job.precision, init, seed])


def _finished(folder: Path, expected: str) -> dict[str, Any] | None:
    """The result of a trial that was finished with the same settings, or None if it has to be (re)done."""
    if not (folder / "result.json").exists():
        return None
    try:
        result = run.read_json(folder / "result.json")
        digest = run.sha256(folder / "predictions.jsonl")
        whole = result["identity"] == expected and result["predictions_sha256"] == digest
    except (ValueError, KeyError, TypeError, OSError):
        whole = False
    if not whole:
        run.say(f"{folder}: damaged, or of other settings; done again")
    return result if whole else None


def _trial(job: trial.Job, init: str, seed: int, out: Path, report: Callable[[int, float], None]) -> dict[str, Any]:
    """Result of one trial, from disk if it is there. Predictions and model are written before the result."""
    task = job.data.task
    folder, expected = out / task.name / f"{init}-seed{seed}", identity(job, init, seed)
    keep = init == "pretrained" and seed == job.settings.seeds[0]
    model_path = out / task.name / "model"
    before = _finished(folder, expected)
    if before and (not keep or (model_path / "config.json").exists()):
        return before
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").unlink(missing_ok=True)
    started = time.monotonic()
    model, outputs = trial.run_trial(job, init, seed, report)
    if keep:
        with run.publish(model_path) as work, quiet():
            model.cpu().save_pretrained(work)
            job.source.tokenizer.model_max_length = job.settings.max_length
            job.source.tokenizer.save_pretrained(work)
    predicted = results.decide(job, outputs)
    scores = metrics.compute(task.metrics, results.gold(job.dev.labels), predicted)
    run.write_atomic(folder / "predictions.jsonl", results.lines(job, outputs, predicted))
    result = {
        "task": task.name,
        "init": init,
        "seed": seed,
        "metric": task.metric,
        "value": metrics.plain(metrics.headline(scores, task.headline)),
        "metrics": {name: metrics.plain(value) for name, value in scores.items()},
        "steps": job.num_steps,
        "seconds": round(time.monotonic() - started, 2),
        "precision": job.precision,
        "identity": expected,
        "predictions_sha256": run.sha256(folder / "predictions.jsonl"),
    }
    run.write_json(folder / "result.json", result)
    value = "undefined" if result["value"] is None else f"{result['value']:.4f}"
    run.say(f"{task.title} · {init} · seed {seed}: {task.metric} {value} ({result['seconds']:.0f} s)")
    return result


def _sweep(out: Path) -> None:
    """Remove what a kill in the middle of a write left behind."""
    for leftover in [*out.glob(".tmp-*"), *out.glob("*/.tmp-*"), *out.glob("*/*/.tmp-*")]:
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def _reporter(progress: run.Progress, done: int, name: str) -> Callable[[int, float], None]:
    return lambda step, loss: progress.update(done + step, trial=name, loss=loss)
