"""Choosing an architecture: the two stages that join siblings. `space` writes down what may be chosen; `search` asks
the super-network for losses (`train`), the predictor for milliseconds (`measure`) and a method for proposals
(`search`).

Selection is on held-out rows that validation does not use. The finalists are measured again, extracted; the best of
those that keep the limits on the clock is written: `arch.json`, and `model/` with the weights it inherits.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frugalbert import run
from frugalbert.config import Finetune, Latency, Limit, Machine, Search, Space
from frugalbert.model.arch import Arch
from frugalbert.progress import number

if TYPE_CHECKING:
    from frugalbert.search.extraction import Errors, Judge
    from frugalbert.space import Space as Choices

FINALISTS = 5


def write_space(section: Space, inputs: dict[str, Path], out: Path, machine: Machine) -> dict[str, Any]:
    """The stage `space`: space.json, and how many architectures of what size there are."""
    from frugalbert.data.tokenizer import vocabulary_size
    from frugalbert.model.cost import parameter_count
    from frugalbert.space import Space as Choices

    space = Choices.of(section)
    run.write_json(out / "space.json", space.to_json())
    vocabulary = vocabulary_size(inputs["tokenizer"])
    ends = [parameter_count(arch, vocabulary) for arch in (space.smallest(), space.largest())]
    run.say(f"space: {number(space.size())} architectures from {space.smallest()} to {space.largest()}")
    return {"architectures": space.size(), "smallest_parameters": ends[0], "largest_parameters": ends[1]}


def search(section: Search, inputs: dict[str, Path], out: Path, machine: Machine) -> dict[str, Any]:
    """The stage `search`; returns its summary. Raises ValueError for what the user can mend, Stopped on a signal."""
    find = _extract if section.method == "extraction" else _find
    summary, finalists = find(section, inputs, out, machine)
    measured = _measure(finalists, section.limit, inputs, out)
    kept = next((row for row in measured if not row["violates"]), measured[0])
    if kept is not measured[0]:
        run.say(f"search: the best candidate misses the limit when measured; {kept['arch']} keeps it")
    elif kept["violates"]:
        run.say("search: every finalist misses the limit when measured again; the best one is written all the same")
    arch = Arch.parse(kept["arch"])
    run.write_json(out / "arch.json", arch.to_json())
    if section.quality != "training":
        _write_model(inputs, arch, out / "model")
    run.say(f"search: {arch}" + (", the best of the visited ones under W" if "w" in kept else ""))
    violations = sum(row["violates"] for row in measured)
    run.write_json(out / "search.json", {**summary, "chosen": kept, "finalists": measured, "violations": violations})
    headline = {"arch": str(arch), "score": kept["score"], "evaluations": summary["evaluations"]}
    return {**headline, **{name: kept[name] for name in ("w", "latency_ms", "parameters") if name in kept}}


Found = tuple[dict[str, Any], list[dict[str, Any]]]
"""The summary for search.json, and the rows of the best few."""


def _find(section: Search, inputs: dict[str, Path], out: Path, machine: Machine) -> Found:
    """By a method that proposes what to score next."""
    import numpy as np

    from frugalbert.budget import Clock
    from frugalbert.search.evolution import Settings
    from frugalbert.search.run import search as find
    from frugalbert.search.run import write_result

    space, score = _space(inputs), _score(section, inputs, out, machine)
    settings = Settings.of(section, out / "journal.jsonl")
    result = find(space, score, _cost(inputs), section.limit, np.random.default_rng(section.seed), Clock(), settings)
    summary = write_result(out, result)
    sound = [candidate for candidate in result.candidates if math.isfinite(candidate.score)]
    best = sorted(sound, key=lambda candidate: candidate.score)[:FINALISTS]
    return summary, [candidate.to_json() for candidate in best]


def _extract(section: Search, inputs: dict[str, Path], out: Path, machine: Machine) -> Found:
    """By every n-th of the whole space (`search/extraction.py`)."""
    from frugalbert.search import extraction

    space, cost, judge = _space(inputs), _cost(inputs), _judge(section, inputs, out, machine)
    settings, kinds, sizes = section.extraction, list(extraction.INFERENCE), _sizes(inputs)

    def point(arch: Arch, kind: str) -> extraction.Maximum:
        costs = sizes(arch)
        inference = costs["flops"]
        if kind == "latency" and space.contains(arch):
            inference = cost(arch)["latency_ms"]
        elif kind == "latency":  # the predictor knows the space, not what lies beyond it
            inference = _time([arch], inputs, out / "maximum.jsonl")[0]["median_ms"]
        return extraction.Maximum(str(arch), costs["parameters"], inference)

    maximum = None
    if settings.maximum is not None:
        maximum = point(Arch.load(settings.maximum, inputs["yaml"]), settings.inference)
    found = extraction.extract(space, judge, cost, section.limit, settings, maximum)
    other, arch = next(kind for kind in kinds if kind != settings.inference), Arch.parse(found.maximum.name)
    known = other != "latency" or ("latency" in inputs and space.contains(arch))
    summary = extraction.write_result(out, found, point(arch, other) if known else None)
    if len(found.ranking) > 1 and found.cheapest.candidate.costs == found.ranking[0].candidate.costs:
        run.say(
            "search: size and inference cost alone, without the error, pick the same; if that is too small, write a "
            "larger search.extraction.maximum or a smaller space"
        )
    return summary, [one.to_json() for one in found.ranking[:FINALISTS]]


def _space(inputs: dict[str, Path]) -> Choices:
    from frugalbert.space import Space as Choices

    return Choices.from_json(run.read_json(inputs["space"] / "space.json"))


# ---- costs -----------------------------------------------------------------------------------------------------------


def _sizes(inputs: dict[str, Path]) -> Callable[[Arch], dict[str, float]]:
    """Parameters and operations of an architecture."""
    from frugalbert.data.tokenizer import vocabulary_size
    from frugalbert.measure import predictor
    from frugalbert.model.cost import forward_flops, parameter_count

    vocabulary, length = vocabulary_size(inputs["tokenizer"]), 128
    if "latency" in inputs:
        length = predictor.load(inputs["latency"] / "predictor.json").setting["length"]
    return lambda arch: {"parameters": parameter_count(arch, vocabulary), "flops": length * forward_flops(arch, length)}


def _cost(inputs: dict[str, Path]) -> Callable[[Arch], dict[str, float]]:
    """Predicted milliseconds (with a stage latency), parameters and operations of an architecture."""
    from frugalbert.measure import predictor

    sizes = _sizes(inputs)
    if "latency" not in inputs:
        return sizes
    found = predictor.load(inputs["latency"] / "predictor.json")

    def cost(arch: Arch) -> dict[str, float]:
        # a speed-up is over the largest one as it was measured, not as it is predicted, in the corner of the space
        known = found.report["largest_ms"] if str(arch) == found.report["largest"] else found.predict(arch)
        return {"latency_ms": known, **sizes(arch)}

    return cost


def _measure(finalists: list[dict[str, Any]], limit: Limit, inputs: dict[str, Path], out: Path) -> list[dict[str, Any]]:
    """The rows of the finalists with measured latency, and whether a measured limit is violated."""
    from frugalbert.measure import predictor
    from frugalbert.search.candidates import windows

    rows = [{**row, "violates": False} for row in finalists]
    if "latency" not in inputs:
        return rows
    again = _time([Arch.parse(row["arch"]) for row in rows], inputs, out / "measured.jsonl")
    base = predictor.load(inputs["latency"] / "predictor.json").report["largest_ms"]
    for row, timing in zip(rows, again, strict=True):
        row["measured_ms"], row["noisy"] = timing["median_ms"], timing["noisy"]
        real = {"latency_ms": timing["median_ms"], "speedup": base / timing["median_ms"]}
        for name, (least, most) in windows(limit).items():
            row["violates"] |= name in real and not least <= real[name] <= most
    return rows


def _time(archs: list[Arch], inputs: dict[str, Path], file: Path) -> list[dict[str, Any]]:
    """A row of the latency table per architecture, measured now; `file` is its journal."""
    from frugalbert.measure import predictor, table

    found = predictor.load(inputs["latency"] / "predictor.json")
    section = Latency.model_validate((run.read_record(inputs["latency"]) or {})["section"])
    return table.remeasure(archs, found, section, file)


# ---- quality ---------------------------------------------------------------------------------------------------------


def _score(
    section: Search, inputs: dict[str, Path], out: Path, machine: Machine
) -> Callable[[list[Arch]], list[float]]:
    """Losses of architectures as the super-network's slices, in this process or many (`machine.workers`, Dask)."""
    if section.quality == "training":
        judge = _judge(section, inputs, out, machine)
        return lambda archs: [_mean_of_best(trials) for trials in judge(archs)]
    if "supernet" not in inputs:
        raise ValueError("search needs the section supernet, whose slices it scores; add it")
    from frugalbert.search.run import fan_out
    from frugalbert.train import inherited

    distilled = inherited.section_of(inputs["supernet"]).teacher is not None
    if (section.quality == "distillation") != distilled and section.quality != "finetune":
        wanted = "distillation" if distilled else "loss"
        raise ValueError(f"search.quality {section.quality} does not go with this super-network; write {wanted}")
    fixed = {name: str(inputs[name].resolve()) for name in inherited.PLACES}
    fixed |= {"quality": section.quality, "device": machine.device, "rows": section.rows}
    function = inherited.score
    if section.quality == "finetune":
        function = finetuned
        assert section.finetune is not None
        fixed |= {"recipe": section.finetune.model_dump(mode="json"), "work": str(out / "trials")}
        fixed |= {"machine": machine.model_dump(mode="json")}

    def score(archs: list[Arch]) -> list[float]:
        found = fan_out(function, [{**fixed, "arch": str(arch)} for arch in archs], out, machine, "search")
        return [math.nan if value is None else value for value in found]

    return score


def _judge(section: Search, inputs: dict[str, Path], out: Path, machine: Machine) -> Judge:
    """Of architectures what each recipe makes of them; the super-network counts as one recipe with one seed."""
    from frugalbert.search.extraction import Errors
    from frugalbert.search.run import fan_out
    from frugalbert.train import short

    if section.quality != "training":
        score = _score(section, inputs, out, machine)
        return lambda archs: [[Errors((loss,)) if math.isfinite(loss) else None] for loss in score(archs)]
    settings = section.training
    assert settings is not None
    outside = sorted({recipe.optimizer for recipe in settings.recipes} - {"sgd"})
    if outside and section.method == "extraction":
        run.say(f"search: optimizer {', '.join(outside)} is outside the theory of extraction, which assumes SGD")
    fixed: dict[str, Any] = {name: str(inputs[name].resolve()) for name in short.PLACES}
    fixed |= {"work": str(out.resolve() / "trials"), "steps": settings.steps, "looks": settings.looks}
    fixed |= {"rows": section.rows, "device": machine.device}

    def judge(archs: list[Arch]) -> list[list[Errors | None]]:
        trials = [
            {"recipe": r.model_dump(mode="json"), "seed": seed} for r in settings.recipes for seed in settings.seeds
        ]
        tasks = [{**fixed, **trial, "arch": str(arch)} for trial in trials for arch in archs]  # a worker keeps the data
        found = fan_out(short.score, tasks, out, machine, "search")
        rows = [found[place :: len(archs)] for place in range(len(archs))]
        count = len(settings.seeds)
        return [[_errors(row[start : start + count]) for start in range(0, len(row), count)] for row in rows]

    return judge


def _errors(rows: list[dict[str, Any] | None]) -> Errors | None:
    """The trainings of one recipe, one row per seed; None if one of them diverged."""
    from frugalbert.search.extraction import Errors

    sound = [row for row in rows if row is not None]
    if len(sound) < len(rows):
        return None
    columns = [tuple(row[name] for row in sound) for name in ("error", "errors", "half_error")]
    return Errors(columns[0], tuple(map(tuple, columns[1])), columns[2])


def _mean_of_best(trials: list[Errors | None]) -> float:
    return min((sum(trial.final) / len(trial.final) for trial in trials if trial is not None), default=math.nan)


def finetuned(task: dict[str, Any]) -> float | None:
    """1 - the mean headline metric of the slice `task["arch"]` fine-tuned by `task["recipe"]`, None if a metric is
    undefined; for `fanout.run_tasks`."""
    import torch

    from frugalbert.finetune import runner

    if task["threads"]:
        torch.set_num_threads(task["threads"])
    inputs = {name: Path(task[name]) for name in ("supernet", "tokenizer", "yaml")}
    inputs["corpus"] = inputs["supernet"].parent / "corpus"
    folder = Path(task["work"]) / run.fingerprint(task["arch"])[:16]
    _write_model(inputs, Arch.parse(task["arch"]), folder / "pretrain" / "model")
    section = Finetune.model_validate({**task["recipe"], "random_baseline": False})
    out = folder / "finetune"
    out.mkdir(exist_ok=True)
    machine = Machine.model_validate(task["machine"])
    runner.build(section, {**inputs, "pretrain": folder / "pretrain"}, out, machine)
    found = [row["mean"] for row in run.read_json(out / "results.json") if row["task"] == row["carrier"]]
    shutil.rmtree(folder)
    return None if None in found else 1.0 - sum(found) / len(found)


def _write_model(inputs: dict[str, Path], arch: Arch, path: Path) -> None:
    """The slice `arch` with its inherited weights as a Hugging Face directory with tokenizer."""
    from frugalbert.data import tokenizer
    from frugalbert.train import inherited

    path.parent.mkdir(parents=True, exist_ok=True)
    with run.publish(path) as work:
        inherited.extract(inputs["supernet"], arch).save_pretrained(work)
        tokenizer.load(inputs["tokenizer"]).save_pretrained(work)
