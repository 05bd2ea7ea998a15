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
    from frugalbert.search.candidates import Candidate

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
    import numpy as np

    from frugalbert.budget import Clock
    from frugalbert.search.evolution import Settings
    from frugalbert.search.run import search as find
    from frugalbert.search.run import write_result
    from frugalbert.space import Space as Choices

    space = Choices.from_json(run.read_json(inputs["space"] / "space.json"))
    cost = _cost(inputs)
    score = _score(section, inputs, out, machine)
    settings = Settings.of(section, out / "journal.jsonl")
    result = find(space, score, cost, section.limit, np.random.default_rng(section.seed), Clock(), settings)
    summary = write_result(out, result)
    sound = [candidate for candidate in result.candidates if math.isfinite(candidate.score)]
    finalists = sorted(sound, key=lambda candidate: candidate.score)[:FINALISTS]
    measured = _measure(finalists, section.limit, inputs, out)
    kept = next((row for row in measured if not row["violates"]), measured[0])
    if kept is not measured[0]:
        run.say(f"search: the best candidate misses the limit when measured; {kept['arch']} keeps it")
    elif kept["violates"]:
        run.say("search: every finalist misses the limit when measured again; the best one is written all the same")
    arch = Arch.parse(kept["arch"])
    run.write_json(out / "arch.json", arch.to_json())
    _write_model(inputs, arch, out / "model")
    run.say(f"search: {arch}")
    violations = sum(row["violates"] for row in measured)
    run.write_json(out / "search.json", {**summary, "chosen": kept, "finalists": measured, "violations": violations})
    headline = {"arch": str(arch), "score": kept["score"], "evaluations": summary["evaluations"]}
    return {**headline, **{name: kept[name] for name in ("latency_ms", "parameters") if name in kept}}


# ---- costs -----------------------------------------------------------------------------------------------------------


def _cost(inputs: dict[str, Path]) -> Callable[[Arch], dict[str, float]]:
    """Predicted milliseconds (with a stage latency), parameters and operations of an architecture."""
    from frugalbert.data.tokenizer import vocabulary_size
    from frugalbert.measure import predictor
    from frugalbert.model.cost import forward_flops, parameter_count

    vocabulary = vocabulary_size(inputs["tokenizer"])
    found = predictor.load(inputs["latency"] / "predictor.json") if "latency" in inputs else None
    length = found.setting["length"] if found else 128

    def cost(arch: Arch) -> dict[str, float]:
        costs = {"parameters": parameter_count(arch, vocabulary), "flops": length * forward_flops(arch, length)}
        if found is None:
            return costs
        # a speed-up is over the largest one as it was measured, not as it is predicted, in the corner of the space
        known = found.report["largest_ms"] if str(arch) == found.report["largest"] else found.predict(arch)
        return {"latency_ms": known, **costs}

    return cost


def _measure(finalists: list[Candidate], limit: Limit, inputs: dict[str, Path], out: Path) -> list[dict[str, Any]]:
    """A row per finalist: predicted and measured latency, score, and whether a measured limit is violated."""
    from frugalbert.measure import predictor, table
    from frugalbert.search.candidates import windows

    rows = [{**candidate.to_json(), "violates": False} for candidate in finalists]
    if "latency" not in inputs:
        return rows
    found = predictor.load(inputs["latency"] / "predictor.json")
    section = Latency.model_validate(run.read_json(inputs["latency"] / run.RECORD)["section"])
    again = table.remeasure([candidate.arch for candidate in finalists], found, section, out / "measured.jsonl")
    base = found.report["largest_ms"]
    for row, timing in zip(rows, again, strict=True):
        row["measured_ms"], row["noisy"] = timing["median_ms"], timing["noisy"]
        real = {"latency_ms": timing["median_ms"], "speedup": base / timing["median_ms"]}
        for name, (least, most) in windows(limit).items():
            row["violates"] |= name in real and not least <= real[name] <= most
    return rows


# ---- quality ---------------------------------------------------------------------------------------------------------


def _score(
    section: Search, inputs: dict[str, Path], out: Path, machine: Machine
) -> Callable[[list[Arch]], list[float]]:
    """Losses of architectures as the super-network's slices, in this process or many (`machine.workers`, Dask)."""
    if "supernet" not in inputs:
        raise ValueError("search needs the section supernet, whose slices it scores; add it")
    from frugalbert import dist, fanout
    from frugalbert.train import inherited

    distilled = inherited.section_of(inputs["supernet"]).teacher is not None
    if (section.quality == "distillation") != distilled and section.quality != "finetune":
        wanted = "distillation" if distilled else "loss"
        raise ValueError(f"search.quality {section.quality} does not go with this super-network; write {wanted}")
    workers = 1 if machine.workers == "auto" else machine.workers
    if workers == 1 and machine.scheduler is None:
        dist.set_threads(machine)
    fixed = {name: str(inputs[name].resolve()) for name in ("supernet", "shards", "tokenizer", "yaml")}
    fixed |= {"quality": section.quality, "device": machine.device, "rows": section.rows}
    fixed["threads"] = 1 if workers > 1 or machine.scheduler else 0
    function = inherited.score
    if section.quality == "finetune":
        function = finetuned
        assert section.finetune is not None
        fixed |= {"recipe": section.finetune.model_dump(mode="json"), "work": str(out / "trials")}
        fixed |= {"machine": machine.model_dump(mode="json")}

    def score(archs: list[Arch]) -> list[float]:
        tasks = [{**fixed, "arch": str(arch)} for arch in archs]
        found = fanout.run_tasks(
            function, tasks, journal=out / "scores.jsonl", workers=workers, scheduler=machine.scheduler, label="search"
        )
        return [math.nan if value is None else value for value in found]

    return score


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
    found = [row["mean"] for row in run.read_json(out / "results.json")]
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
