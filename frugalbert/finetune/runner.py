"""The stage `finetune`: a model and tasks in; predictions, results over seeds and one fine-tuned model per task out.

Each task is trained from the pre-trained weights and, for comparison, from random ones, with the same recipe (or the
same sweep) and seeds; with `start: from task mnli` also from that task's encoder. A trial is a folder that is whole or
not there, its result written last, so a finished one is never repeated, whoever dies; a killed one goes on from its
last checkpoint or its beginning, to the same end. Trials fan out over processes, GPUs or a Dask cluster.
"""

from __future__ import annotations

import functools
import json
import math
import multiprocessing
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from frugalbert import config, dist, run
from frugalbert.fanout import run_tasks
from frugalbert.finetune import agora_trials, blimp, examples, models, results, sweep, trial, trials
from frugalbert.finetune.features import Lengths, encode
from frugalbert.finetune.tasks import Data, Example, Task, digest, resolve

TRIALS = "trials.jsonl"
"""What one call has finished, while it lasts; the folders of the trials are the truth."""
Pair = tuple[dict[str, Any], int]


def build(section: config.Finetune, inputs: dict[str, Path], out: Path, machine: config.Machine) -> dict[str, Any]:
    """Fine-tune on every task and write `results.json`; see `docs/tour.md` for the files.

    Args:
        inputs: `yaml` (folder of relative paths), and where there are any `pretrain`, `tokenizer`, `corpus`.
    Returns `{task: {"metric", "pretrained": mean, "random": mean}}`.
    Raises ValueError or OSError with one sentence for tasks, data or models that cannot be used, before any training.
    """
    bench = Bench(section, inputs, out, machine)
    jobs = bench.jobs()
    check(section, [job.data for job in jobs])
    scorers = bench.scorers()
    _sweep_up(out)
    for job in jobs:
        (out / job.data.task.name).mkdir(exist_ok=True)
        run.write_atomic(out / job.data.task.name / "dev-tokens.jsonl", results.token_lines(job))
    rows: list[dict[str, Any]] = []
    for wave in _waves(section, jobs):
        rows += bench.run([(_started(job, init, out), init) for job, init in wave])
    if section.agora:
        rows += bench.agora(jobs[0])
    order = [job.data.task.name for job in jobs]
    rows.sort(key=lambda row: order.index(row["carrier"]))  # stable: what starts from another task comes last
    pairs = {
        init: blimp.evaluate(scorer, bench.data, out / "blimp" / init, section.blimp_pairs)
        for init, scorer in scorers.items()
    }
    rows += [results.blimp_row(init, found) for init, found in pairs.items()]
    results.gains(rows)
    run.write_json(out / "results.json", rows)
    board = results.board(bench.source, section, rows, pairs)
    run.write_json(out / "board.json", board)
    _sweep_up(out)  # of workers that were killed
    results.show(rows)
    results.show_scores(board["scores"])
    headlines: dict[str, Any] = {}
    for row in rows:
        headlines.setdefault(row["task"], {"metric": row["metric"]})[row["init"]] = row["mean"]
    return {**headlines, "device": str(dist.pick_device(machine))}


def check(section: config.Finetune, datas: Sequence[Data]) -> None:
    """Raises ValueError for settings that contradict the tasks."""
    if section.agora:
        agora_trials.check(section, datas)
    names = {data.task.name for data in datas}
    for name, settings in section.per_task.items():
        if name not in names:
            raise ValueError(f"finetune.per_task: {name!r} is none of the tasks; they are {', '.join(sorted(names))}")
        source = (settings.start or "").removeprefix("from task ")
        if settings.start and (source not in names or source == name):
            raise ValueError(f"finetune.per_task.{name}.start: add the task {source!r} to finetune.tasks")
        if settings.start and source in section.per_task and section.per_task[source].start:
            raise ValueError(
                f"finetune.per_task.{name}.start: {source!r} starts from a task itself; one step is enough"
            )
    if not section.train and (section.sweep or any(settings.start for settings in section.per_task.values())):
        raise ValueError("finetune.train: false evaluates the model as it is; remove sweep and start, or train")
    if section.patience and section.select == "none":
        raise ValueError("finetune.patience waits for a better epoch: write select: train (or dev), or remove it")
    if section.sweep and section.select == "none":
        raise ValueError(
            "finetune.sweep chooses by scores: write select: train (the dev set stays untouched) or select: dev"
        )
    if section.sweep:
        for data in datas:
            sweep.axes(section.sweep, len(data.train))


def _waves(section: config.Finetune, jobs: list[trial.Job]) -> list[list[tuple[trial.Job, str]]]:
    """(task, initialisation) pairs; a later wave starts from models of an earlier one."""
    if not section.train:
        return [[(job, models.AS_IT_IS) for job in jobs]]
    inits = ("pretrained", "random") if section.random_baseline else ("pretrained",)
    later = [
        (job, section.per_task[job.data.task.name].start) for job in jobs if job.data.task.name in section.per_task
    ]
    transfers = [(job, start.replace("from task ", trials.FROM)) for job, start in later if start]
    return [[(job, init) for job in jobs for init in inits], *([transfers] if transfers else [])]


# ---- who does what --------------------------------------------------------------------------------------------------


class Bench:
    """One call of the stage: what its trials share, and how they are handed out."""

    def __init__(self, section: config.Finetune, inputs: dict[str, Path], out: Path, machine: config.Machine) -> None:
        self.section, self.out, self.machine = section, out, machine
        self.given = {
            "section": section.model_dump(mode="json"),
            "inputs": {name: str(path) for name, path in inputs.items()},
            "machine": machine.model_dump(mode="json"),
            "model": models.locate(section, inputs),
        }
        self.source = _source(self.given["model"], self.given["inputs"].get("tokenizer"))
        self.data = inputs["yaml"] / section.data if section.data else None
        self.workers = 1 if machine.workers == "auto" else machine.workers

    def jobs(self) -> list[trial.Job]:
        """Every task with its examples, tokenised; said in a line each."""
        dist.set_threads(self.machine)
        source = self.source
        lengths = {"": self.section.max_length}
        lengths |= {f"per_task.{name}.": own.max_length or 0 for name, own in self.section.per_task.items()}
        for where, length in lengths.items():
            if source.max_positions and length > source.max_positions:
                raise ValueError(
                    f"finetune.{where}max_length is {length}, but {source.name} has {source.max_positions} positions; "
                    "write at most that"
                )
        inputs = self.given["inputs"]
        corpus = Path(inputs["corpus"]) if "corpus" in inputs else None
        found = []
        for data in examples.load_all(self.section, Path(inputs["yaml"]), corpus):
            found.append(make_job(data, self.section, source, self.machine))
            describe(found[-1])
        return found

    def scorers(self) -> dict[str, blimp.Scorer]:
        """The masked LMs that BLiMP is asked of, by initialisation; none if it is not among the tasks."""
        if not any(task.type == "minimal-pairs" for task in resolve(self.section.tasks)):
            return {}
        blimp.read(self.data)
        device = dist.pick_device(self.machine)
        inits = ("pretrained", "random") if self.section.random_baseline and self.section.train else ("pretrained",)
        found = {}
        for init in inits:
            found[init] = blimp.open_scorer(self.source, init, self.section.seeds[0], self.section.blimp, device)
        return found

    def run(self, wave: list[tuple[trial.Job, str]]) -> list[dict[str, Any]]:
        """Rows of the results of some (task, initialisation) pairs."""
        rows: list[dict[str, Any]] = []
        if self.section.sweep is None:
            pairs = [({}, seed) for seed in (self.section.seeds if self.section.train else self.section.seeds[:1])]
            todo = [(job, init, pair) for job, init in wave for pair in pairs]
            found = self.trials(todo)
            for number, (job, init) in enumerate(wave):
                part = found[number * len(pairs) : (number + 1) * len(pairs)]
                rows += self._rows(job, init, part, {})
            return rows
        for job, init in wave:
            outcome = self._sweep(job, init)
            seeds = outcome.rows[outcome.best]["seeds"]
            final = self.trials([(job, init, (outcome.setting, seed)) for seed in seeds], keep=True)
            rows += self._rows(trials.with_setting(job, outcome.setting), init, final, outcome.as_json())
        return rows

    def _rows(self, job: trial.Job, init: str, found: list[Any], outcome: dict[str, Any]) -> list[dict[str, Any]]:
        rows = results.summary(job, init, found)
        for row in rows:
            drawn = [trials.read_resamples(Path(result["folder"]), row["task"]) for result in found]
            row["resamples"] = np.mean(drawn, axis=0)
        extra = {"carrier": job.data.task.name, "trials": outcome.get("num_trials", len(found))}
        return [{**row, **extra, **({"sweep": outcome} if outcome else {})} for row in rows]

    def _sweep(self, job: trial.Job, init: str) -> sweep.Outcome:
        assert self.section.sweep is not None
        base = {name: getattr(job.settings, name) for name in sweep.AXES}
        seeds = sweep.seeds_for(self.section.sweep, self.section.seeds)

        def evaluate(pairs: list[Pair]) -> list[float | None]:
            return [found["selection"] for found in self.trials([(job, init, pair) for pair in pairs])]

        outcome = sweep.run(self.section.sweep, base, seeds, len(job.data.train), evaluate)
        chosen_on = job.data.sets["select" if self.section.select == "train" else "dev"]
        sweep.show(outcome, f"{job.data.task.title}, {init}", len(chosen_on))
        return outcome

    def trials(self, todo: list[tuple[trial.Job, str, Pair]], keep: bool = False) -> list[dict[str, Any]]:
        """Results of some trials, in their order: from disk, or done by as many as the machine section says.

        `keep`: also write the model and the test predictions of the first seed (without a sweep that is always so).
        """
        tasks = []
        for number, (job, init, (setting, seed)) in enumerate(todo):
            task = {"job": job.data.task.name, "init": init, "setting": setting, "seed": seed, "slot": number}
            first = seed == (todo[0][2][1] if keep else self.section.seeds[0])
            own = self.section.per_task.get(job.data.task.name, config.TaskSettings())
            start = own.start.replace("from task ", trials.FROM) if own.start else "pretrained"
            kept = init in (start, models.AS_IT_IS) and first and (keep or not setting)
            expected = trials.identity(trials.with_setting(job, setting), init, seed)
            places = {"out": str(self.out), "given": self.given, "model": job.source.name}
            tests = bool(trials.submitted(job))
            tasks.append({**task, **places, "keep": kept, "tests": tests, "identity": expected})
        steps = [trials.with_setting(job, setting).num_steps for job, _, (setting, _) in todo]
        if self.workers > 1 or self.machine.scheduler:
            return self._elsewhere(tasks)
        with run.Progress("fine-tune", sum(steps), "steps") as progress:
            found = []
            for number, ((job, _, _), task) in enumerate(zip(todo, tasks, strict=True)):
                name = f"{job.data.task.title} {task['init']} {task['seed']}"
                result = trials.one(task, job, _reporter(progress, sum(steps[:number]), name))
                found.append({**result, "folder": str(trials.folder_of(task))})
                progress.update(sum(steps[: number + 1]))
        return found

    def agora(self, job: trial.Job) -> list[dict[str, Any]]:
        """Rows of a task from the same weights, trained by Agora."""

        def students(tasks: list[dict[str, Any]], journal: Path) -> list[Any]:
            places: dict[str, Any] = {"workers": self.workers, "scheduler": self.machine.scheduler}
            return run_tasks(student, tasks, journal=journal, **places, label="Agora")

        found, about = agora_trials.build(job, self.given, self.out, students)
        trained = sum(one["trainings"] for one in about["runs"])
        return [{**row, "trials": trained, "agora": about} for row in self._rows(job, agora_trials.INIT, found, {})]

    def _elsewhere(self, tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The trials that are not on disk, by worker processes or machines."""
        journal = self.out / TRIALS
        journal.unlink(missing_ok=True)
        todo = [task for task in tasks if trials.on_disk(task) is None]
        places: dict[str, Any] = {"journal": journal, "workers": self.workers, "scheduler": self.machine.scheduler}
        run_tasks(remote, todo, **places, label="fine-tune")
        journal.unlink(missing_ok=True)
        folders = [trials.folder_of(task) for task in tasks]
        return [{**run.read_json(folder / "result.json"), "folder": str(folder)} for folder in folders]


def remote(task: dict[str, Any]) -> str:
    """One trial in a process of its own, for `fanout.run_tasks`; returns its identity."""
    import torch

    machine = task["given"]["machine"]
    torch.set_num_threads(1 if machine["threads"] == "auto" else machine["threads"])
    job = _job_elsewhere(json.dumps(task["given"]), task["job"], task["model"])
    job = replace(job, device=dist.pick_device(config.Machine.model_validate(machine), task["slot"]))
    if trials.identity(trials.with_setting(job, task["setting"]), task["init"], task["seed"]) != task["identity"]:
        raise ValueError(f"the data or the model of {task['job']} changed while trials ran, or differ between machines")
    trials.one(task, job, lambda step, loss: None)
    return task["identity"]


def student(task: dict[str, Any]) -> list[Any] | None:
    """One student of Agora, for `fanout.run_tasks`, in this process or another."""
    import torch

    machine = task["given"]["machine"]
    if multiprocessing.parent_process() is not None:
        torch.set_num_threads(1 if machine["threads"] == "auto" else machine["threads"])
    job = _job_elsewhere(json.dumps(task["given"]), task["job"], task["model"])
    device = dist.pick_device(config.Machine.model_validate(machine), task["slot"])
    return agora_trials.student(task, replace(job, device=device))


@functools.lru_cache(maxsize=2)
def _job_elsewhere(given: str, name: str, model: str) -> trial.Job:
    """The job of a task in a worker process."""
    parts = json.loads(given)
    section = config.Finetune.model_validate(parts["section"], strict=False)
    machine = config.Machine.model_validate(parts["machine"], strict=False)
    inputs = parts["inputs"]
    corpus = Path(inputs["corpus"]) if "corpus" in inputs else None
    tasks = {task.name: task for task in resolve(section.tasks)}
    riders = [task for task in tasks.values() if task.rides == name]
    data = examples.load(tasks[name], section, Path(inputs["yaml"]), corpus, riders)
    return make_job(data, section, _source(model, inputs.get("tokenizer")), machine)


def _source(name: str, tokenizer: str | None) -> models.Source:
    return models.open_source(name, Path(tokenizer) if tokenizer else None)


def _started(job: trial.Job, init: str, out: Path) -> trial.Job:
    """The job with the weights of an initialisation: those of another task's model for `from mnli`."""
    if not init.startswith(trials.FROM):
        return job
    return replace(job, source=_source(str(out / init.removeprefix(trials.FROM) / "model"), None))


# ---- one task -------------------------------------------------------------------------------------------------------


def make_job(data: Data, section: config.Finetune, source: models.Source, machine: config.Machine) -> trial.Job:
    """A task with its own settings, its split and its token ids."""
    settings = own_settings(section, data)
    if section.train and settings.select == "train":
        train, held = hold_out(data.task, data.train, settings.select_share)
        if not train or not held:
            raise ValueError(
                f"task {data.task.title}: select: train leaves {len(train)} examples to train on and {len(held)} to "
                "select by; write another select_share, or select: none"
            )
        data = replace(data, sets={**data.sets, "train": train, "select": held})
    if not section.train:
        data = replace(data, sets={name: part for name, part in data.sets.items() if name != "train"})
    lengths = Lengths(settings.max_length, data.task.cut, settings.stride, settings.max_question_length)
    features = {
        name: encode(source.tokenizer, data.task.type, part, len(data.labels), lengths, source.has_types)
        for name, part in data.sets.items()
    }
    device = dist.pick_device(machine)
    micro = settings.batch_size if machine.micro_batch == "auto" else machine.micro_batch
    precision = dist.pick_precision(settings.precision, device)
    return trial.Job(data, features, settings, source, device, precision, micro, trials.digest_of(data))


def hold_out(task: Task, part: list[Example], share: float) -> tuple[list[Example], list[Example]]:
    """(the rest, about `share` of the examples), by a hash of the texts; all questions of one passage stay together."""
    if task.type == "question-answering" or task.cut == "second":
        units = [example.text_b or "" for example in part]
    else:
        units = [example.text if task.cut == "first" else example.digest for example in part]
    keys = [int(digest("select", unit), 16) / 2**64 for unit in units]
    return (
        [example for example, key in zip(part, keys, strict=True) if key >= share],
        [example for example, key in zip(part, keys, strict=True) if key < share],
    )


def own_settings(section: config.Finetune, data: Data) -> config.Finetune:
    """The section with what `per_task` says of this one, and epochs as a number."""
    own = section.per_task.get(data.task.name, config.TaskSettings())
    given = own.model_dump(exclude={"start"}, exclude_none=True)
    settings = section.model_copy(update=given)
    if settings.epochs == "auto":
        sizes = ((1000, 20.0), (5000, 10.0), (50_000, 5.0), (math.inf, 3.0))
        epochs = next(epochs for most, epochs in sizes if len(data.train) < most)
        settings = settings.model_copy(update={"epochs": epochs})
    return settings


def describe(job: trial.Job) -> None:
    """Say what will be done."""
    data = job.data
    classes = {"regression": "regression", "question-answering": "answers", "multiple-choice": "options"}
    kind = classes.get(data.task.type, f"{len(data.labels)} {'tags' if 'token' in data.task.type else 'classes'}")
    sizes = ", ".join(f"{len(part)} {name}" for name, part in data.sets.items())
    cut = sum(features.num_cut for features in job.features.values())
    what = f"{job.num_steps} steps a trial" if "train" in data.sets else "evaluated as it is"
    median = np.median(job.features["dev"].lengths)
    run.say(
        f"{data.task.title}: {sizes} examples, {kind}, median {median:.0f} tokens, {cut} cut at "
        f"{job.settings.max_length}, {what}"
    )
    if job.settings.class_weights != "none" and data.task.type not in ("classification", "token-classification"):
        run.say(f"{data.task.title}: class_weights are for classes and tags; here they do nothing")
    for note in data.notes:
        run.say(f"{data.task.title}: {note}")


def _sweep_up(out: Path) -> None:
    """Remove what a kill in the middle of a write left behind."""
    for leftover in [*out.glob(".tmp-*"), *out.glob("*/.tmp-*"), *out.glob("*/*/.tmp-*")]:
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def _reporter(progress: run.Progress, done: int, name: str) -> Callable[[int, float], None]:
    return lambda step, loss: progress.update(done + step, trial=name, loss=loss)
