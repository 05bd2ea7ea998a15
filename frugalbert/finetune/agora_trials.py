"""Agora with encoders: a task's job in; results of its best students, beside those of the plain recipe, and a log out.

Of every seed: the loop (`agora.py`) with fine-tuning trials as students, then one trial on the examples and with the
setting of the best student seen, which is that student again, now with its dev predictions. The dev set is touched only
there. Students are independent tasks with a journal; a killed run goes on from the round, and the students in it.
"""

from __future__ import annotations

import functools
import json
import math
import operator
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from frugalbert import config, plugins, run
from frugalbert.finetune import agora, metrics, models, results, sweep, transforms, trial, trials
from frugalbert.finetune.features import Lengths, encode
from frugalbert.finetune.tasks import Data, Example

INIT = "agora"
FROM_AGORA = f"{trials.FROM}{INIT}"  # the job's own weights, on other examples
ROUNDS = 1000  # seeds of students are seed * ROUNDS + round
Students = Callable[[list[dict[str, Any]], Path], list[Any]]
"""(tasks, journal) -> `student` of each, by whatever processes there are; see `fanout.run_tasks`."""


def check(section: config.Finetune, datas: list[Data]) -> None:
    """Raises ValueError where Agora cannot work."""
    assert section.agora is not None
    if len(datas) != 1:
        raise ValueError("finetune.agora: its teacher knows one task; write one task, and a run for each other one")
    (data,) = datas
    kinds = ("classification", "regression")
    if data.task.type not in kinds or any(example.spans or example.options for example in data.train):
        raise ValueError(
            f"finetune.agora changes the words of texts and pairs with one label; in {data.task.title} labels, options "
            "or marked words belong to words: fine-tune it without agora"
        )
    if section.select != "train" or not section.train:
        raise ValueError(
            "finetune.agora is steered by examples that are neither trained on nor the dev set; write select: train"
        )


def build(
    job: trial.Job, given: dict[str, Any], out: Path, students: Students
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(results of trials, one per seed, with their `folder`; the report of rounds).

    Args:
        job: with the sets `train`, `select` (which steers) and `dev`.
        given: what a student's task carries so that any process can make the job again; `inputs` names the folders.
        out: `agora/TASK/` below it gets the journals, per-seed reports, predictions and the first seed's model.
    """
    settings, data = job.settings.agora, job.data
    assert settings is not None
    folder = Path(given["inputs"]["yaml"])
    sets = split(data)
    dropped = len(data.train) - len(sets.train)
    if dropped:
        run.say(f"{data.task.title}: {dropped} training texts are also steering, dev or test texts; left out by Agora")
    try:
        thetas = [dict(theta) for theta in sweep.listed(settings.settings, len(sets.train))]
    except ValueError as error:
        raise ValueError(str(error).replace("finetune.sweep", "finetune.agora.settings")) from None
    model = _path(settings.transform_model, folder) if settings.transform_model else job.source.name
    tau = transforms.build(settings.transforms, settings.strength, model, folder)
    teach = teacher(job, _path(settings.teacher, folder)) if settings.labels == "teacher" and settings.teacher else None
    right = agora.within(settings.tolerance, sets.train) if data.task.type == "regression" else operator.eq
    known = agora.assess(settings, sets, teach, right)
    identity = _identity(job, settings, model, folder)
    found, reports = [], []
    for seed in job.settings.seeds:
        place = out / INIT / data.task.name / f"seed{seed}"
        shared = {"job": data.task.name, "given": given, "model": job.source.name, "seed": seed}
        tools = agora.Tools(functools.partial(_fit, job, shared, place, students), tau, teach, right, identity)
        outcome = agora.play(settings, sets, thetas, tools, place / "rounds.jsonl", seed)
        report = outcome.to_json() | {"seed": seed, "steps": num_steps(job, outcome), "teacher_accuracy": known}
        report["about"] = agora.about_teacher(known, outcome.best["accuracy"])
        run.write_json(place / "agora.json", report)
        run.say(f"Agora, {data.task.title}, seed {seed}: {_why(outcome)}; {report['about']}")
        found.append(_best(job, place, outcome, out / INIT, seed))
        reports.append(report)
    return found, {"runs": reports, "settings": len(thetas), "steering_examples": len(sets.steer)}


def split(data: Data) -> agora.Sets:
    """Training examples that are in no other set, those that steer, and all others that must not be copied."""
    others = [example for name, part in data.sets.items() if name not in ("train", "select") for example in part]
    kept = {example.digest for example in [*others, *data.sets["select"]]}
    return agora.Sets([e for e in data.train if e.digest not in kept], data.sets["select"], others)


def grown(job: trial.Job, train: list[Example]) -> trial.Job:
    """The job with other training examples."""
    data = replace(job.data, sets={**job.data.sets, "train": train})
    features = {**job.features, "train": _encode(job, job.source, train)}
    return replace(job, data=data, features=features, texts=trials.digest_of(data))


def _encode(job: trial.Job, source: models.Source, examples: list[Example]) -> Any:
    length = min(job.settings.max_length, source.max_positions or job.settings.max_length)
    task, num_labels = job.data.task, len(job.data.labels)
    return encode(source.tokenizer, task.type, examples, num_labels, Lengths(length, task.cut), source.has_types)


def teacher(job: trial.Job, name: str) -> Callable[[list[Example]], list[Any]]:
    """S: a fine-tuned classifier as it is, with its own tokenizer. Raises ValueError if its classes are others."""
    try:
        source = models.open_source(name, None)
    except ValueError as error:
        raise ValueError(str(error).replace("finetune.model", "finetune.agora.teacher")) from None
    order = models.label_order(source, job.data)
    if order:
        run.say(f"Agora: {name} has its classes in another order than {job.data.task.title}; mapped by name")
    network = models.build(source, job.data, models.AS_IT_IS, 0.0, 0).to(job.device)

    def teach(examples: list[Example]) -> list[Any]:
        asked = [replace(example, label=None) for example in examples]
        data = replace(job.data, sets={**job.data.sets, "asked": asked})
        mine = replace(job, data=data, source=source, features={"asked": _encode(job, source, asked)})
        return [value.item() for value in results.evaluate(mine, "asked", network, order).predicted]

    return teach


def _identity(job: trial.Job, settings: config.Agora, model: str, folder: Path) -> str:
    """Hash of what decides rounds besides Agora's settings and the examples: recipe, weights, teacher, code."""
    named = [_path(settings.teacher, folder)] if settings.labels == "teacher" and settings.teacher else []
    named += [model] if set(settings.transforms) & set(transforms.MODELS) else []
    code = [plugins.plugin_digest(name, folder) for name in settings.transforms if plugins.is_plugin(name)]
    weights = [models.open_source(name, None).identity for name in named]
    return run.fingerprint([trials.identity(job, FROM_AGORA, 0), weights, code])


def _path(name: str, folder: Path) -> str:
    return str(folder / name) if (folder / name).exists() else name


# ---- students -------------------------------------------------------------------------------------------------------


def _fit(
    job: trial.Job, shared: dict[str, Any], place: Path, students: Students, train: list[Example],
    thetas: list[agora.Theta], number: int,
) -> list[list[Any]]:  # fmt: skip
    """Step 1: what a fresh student of each setting says of the steering examples; wrong everywhere if it diverged."""
    file = place / f"train-{number}.json"
    lines = [[example.text, example.text_b, example.label] for example in train]
    run.write_json(file, lines)
    seed = shared["seed"] * ROUNDS + number
    shared = {**shared, "seed": seed, "train": str(file), "texts": run.fingerprint(lines)}
    shared["identity"] = trials.identity(job, FROM_AGORA, seed)
    tasks = [{**shared, "setting": theta, "slot": slot} for slot, theta in enumerate(thetas)]
    count = len(job.data.sets["select"])
    return [told or [math.nan] * count for told in students(tasks, place / "students.jsonl")]


def student(task: dict[str, Any], job: trial.Job) -> list[Any] | None:
    """Train one student and return its predictions on the steering examples; None if it diverged."""
    lines = run.read_json(task["train"])
    if run.fingerprint(lines) != task["texts"]:
        raise ValueError(f"{task['train']} changed while Agora ran; remove its folder and run again")
    if trials.identity(job, FROM_AGORA, task["seed"]) != task["identity"]:
        raise ValueError(f"the data or the model of {task['job']} changed while Agora ran, or differ between machines")
    job = trials.with_setting(grown(job, [Example(*line[:2], label=line[2]) for line in lines]), task["setting"])
    try:
        score = functools.partial(_selection, job)
        model, _ = trial.run_trial(job, "pretrained", task["seed"], lambda step, loss: None, None, score)
    except trial.Diverged as error:
        run.say(str(error))
        return None
    return [value.item() for value in results.evaluate(job, "select", model).predicted]


def _selection(job: trial.Job, model: Any, scale: tuple[float, float]) -> float:
    """What chooses the epoch, as in any trial."""
    found = results.evaluate(job, "select", model, scale=scale)
    return metrics.headline(found.scores, job.data.task.headline)


def _best(job: trial.Job, place: Path, outcome: agora.Outcome, out: Path, seed: int) -> dict[str, Any]:
    """The best student once more, as a trial with all that belongs to one."""
    number, theta = outcome.best["round"], outcome.best["setting"]
    lines = run.read_json(place / f"train-{number}.json")
    job = grown(job, [Example(*line[:2], label=line[2]) for line in lines])
    spec = {"job": job.data.task.name, "init": FROM_AGORA, "setting": theta, "seed": seed * ROUNDS + number}
    spec |= {"out": str(out), "keep": seed == job.settings.seeds[0]}
    spec["identity"] = trials.identity(trials.with_setting(job, theta), FROM_AGORA, spec["seed"])
    result = trials.one(spec, job, lambda step, loss: None)
    return {**result, "seed": seed, "folder": str(trials.folder_of(spec))}


def num_steps(job: trial.Job, outcome: agora.Outcome) -> int:
    """Training steps of all students together, for comparisons at equal cost."""
    total = 0
    for entry in outcome.rounds:
        for theta in entry["settings"]:
            settings = trials.with_setting(job, theta).settings
            assert not isinstance(settings.epochs, str)
            total += max(1, round(settings.epochs * math.ceil(entry["train_examples"] / settings.batch_size)))
    return total


def _why(outcome: agora.Outcome) -> str:
    best = json.dumps(outcome.best["setting"])
    return (
        f"{outcome.stopped} after {len(outcome.rounds)} rounds, {outcome.trainings} trainings, {outcome.examples} new "
        f"examples and {outcome.teacher_calls} labels; best {outcome.best['accuracy']:.4f} in round "
        f"{outcome.best['round']} with {best}"
    )
