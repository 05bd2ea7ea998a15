"""When does a teacher pay? One student, equal computing time, with and without a teacher, on real Wikipedia text.

Corpus, tokenizer, shards and the teacher are the product's stages (`--work DIR`, continued where it stood). What a step
of each way costs is measured in CPU seconds of one thread (process_time, in turn, medians), and every way gets the
number of steps that the same seconds buy; so a busy machine changes the waiting, not the result.
  masked words      masked words alone, new masks in every epoch
  masked words, longer   the same, and the seconds that the teacher's training took on top
  teacher           Bort's loss as it was meant: 0.1 words + 0.5 T^2 KL, T = 2; the teacher's forward pass counts; the
                    same masks in every epoch, here and in the next two
  teacher, cached   the same with its 32 likeliest predictions on disk, one masked copy of each row
  teacher, sliced   the same as `teacher`, beginning with a slice of the teacher
  relations         MiniLMv2's, and words
Held-out loss, SST-2 and STS-B (2,000 training examples each), several seeds, paired differences with 95 % intervals.

    python benchmarks/distillation.py --work DIR [--seconds 100] [--teacher-steps 1500] [--seeds 5] [--longer-seeds 5]
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from evidence import DATA, ROOT, interval, run_on_wikipedia

from frugalbert import run
from frugalbert.config import Finetune, Machine, Pretrain
from frugalbert.fanout import run_tasks

TEACHER, STUDENT = "modern 4x320 heads=5 head_dim=64 ffn=640", "modern 3x192 heads=3 head_dim=64 ffn=384"
YAML = """
name: distillation
machine: {{threads: 1}}
corpus: {{sources: [text/wiki.txt], held_out: 0.02}}
tokenizer: {{vocab_size: 4096}}
shards: {{length: 64}}
pretrain: {{arch: "{arch}", budget: {steps}steps, batch_size: 32, optimizer: muon, learning_rate: 2e-3,
  mask: {{rate: 0.15, style: bert}}, checkpoints: {{every: 2m}}, validation: {{rows: 512, every: 0.2}}}}
"""
RECIPE = {"arch": STUDENT, "batch_size": 32, "optimizer": "muon", "learning_rate": 2e-3,
          "mask": {"rate": 0.15, "style": "bert"}, "checkpoints": {"every": "1000000steps"},
          "validation": {"rows": 512, "every": 0.1, "begin_every": 0.1, "end_every": 0.1}}  # fmt: skip
BORT = {"mlm": 0.1, "logits": 0.5, "temperature": 2.0}
RELATIONS = {"mlm": 1.0, "logits": 0.0, "relation": 1.0, "relation_heads": 4}
ONCE = {"mask": {**RECIPE["mask"], "copies": 1}}  # a teacher that is asked once for each row
WAYS: dict[str, dict[str, Any]] = {
    "masked words": {},
    "teacher": {"distill": BORT, **ONCE},
    "teacher, sliced": {"distill": BORT, "start": "from teacher", **ONCE},
    "teacher, cached": {"distill": {**BORT, "top_k": 32, "cache": "cache"}, **ONCE},
    "relations": {"distill": RELATIONS, **ONCE},
    "masked words, longer": {},
}
TASKS = ("sst2", "stsb")
SHORT, LONG = 20, 80  # steps whose difference is a step's cost


def main() -> None:
    options = parse()
    work = options.work.resolve()
    directory = teacher(work, options)
    costs = cost_of_steps(work, directory, options)
    told = {name: str(value) for name, value in vars(options).items() if not isinstance(value, Path)}
    found: dict[str, Any] = {"options": told, "cost_ms": costs}
    found["teacher"] = run.read_json(directory / "pretrain" / "summary.json")
    found["ways"] = students(work, directory, costs, options)
    found["minus_words"] = {
        name: {key: interval(way[key], found["ways"]["masked words"][key]) for key in ("loss", *TASKS)}
        for name, way in found["ways"].items()
        if name != "masked words"
    }
    if "masked words, longer" in found["ways"]:
        both = [found["ways"][name] for name in ("teacher", "masked words, longer")]
        found["teacher_minus_longer"] = {key: interval(both[0][key], both[1][key]) for key in ("loss", *TASKS)}
    from throughput import environment

    found["environment"] = environment()
    run.write_json(options.out, found)
    plot(found, options.out.with_suffix(".png"))
    report(found)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=100.0, help="of one CPU thread for each student")
    parser.add_argument("--teacher-steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--longer-seeds", type=int, default=5, help="of `masked words, longer`")
    parser.add_argument("--megabytes", type=int, default=4, help="of Wikipedia text")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "distillation.json")
    return parser.parse_args()


def teacher(work: Path, options: argparse.Namespace) -> Path:
    """Text, tokenizer, shards and the teacher, below `work`/run."""
    return run_on_wikipedia(work, YAML.format(arch=TEACHER, steps=options.teacher_steps), options.megabytes)


# ---- what a step costs -----------------------------------------------------------------------------------------------


def values_of(name: str, directory: Path, folder: Path) -> dict[str, Any]:
    values = {**RECIPE, **WAYS[name]}
    if "distill" in values:
        values["objective"] = "distill"
        values["distill"] = {"teacher": str(directory / "pretrain" / "model"), **values["distill"]}
        if "cache" in values["distill"]:
            values["distill"]["cache"] = str(folder / "cache")
    return values


def cost(task: dict[str, Any]) -> float:
    """CPU seconds of a run of some steps, of a worker process."""
    import torch

    torch.set_num_threads(1)
    directory, folder = Path(task["run"]), Path(task["folder"])
    shutil.rmtree(folder / "pretrain", ignore_errors=True)
    (folder / "pretrain").mkdir(parents=True)
    values = values_of(task["way"], directory, folder) | {"budget": f"{task['steps']}steps"}
    values["validation"] = {"rows": 32, "every": 0.0, "begin_every": 0.0, "end_every": 0.0}
    started = time.process_time()
    train(values, directory, folder)
    return time.process_time() - started


def train(values: dict[str, Any], directory: Path, folder: Path) -> None:
    from frugalbert.train import pretrain

    inputs = {name: directory / name for name in ("shards", "tokenizer")} | {"yaml": folder}
    machine = Machine(device="cpu", threads=1)
    pretrain.build(Pretrain.model_validate(values), inputs, folder / "pretrain", machine)


def cost_of_steps(work: Path, directory: Path, options: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of CPU per step; `teacher, cached` while it fills and when it is full. And of the teacher's own."""
    kinds = ["masked words", "teacher", "teacher, cached", "relations"]
    tasks = [
        {"way": name, "steps": steps, "round": turn, "run": str(directory),
         "folder": str(work / "cost" / f"{name}-{steps}-{'full' if full else turn}")}
        for turn in range(3) for name in kinds for full in ((False, True) if "cached" in name else (False,))
        for steps in (SHORT, LONG)
    ]  # fmt: skip
    seconds = run_tasks(cost, tasks, journal=work / "costs.jsonl", workers=1, label="costs")
    found: dict[str, list[float]] = {}
    for short, long in zip(range(0, len(tasks), 2), range(1, len(tasks), 2), strict=True):
        name = tasks[short]["way"]
        if tasks[short]["folder"].endswith("full"):
            if tasks[short]["round"] == 0:  # the first one filled it
                continue
            name += ", full"
        found.setdefault(name, []).append((seconds[long] - seconds[short]) / (LONG - SHORT) * 1e3)
    costs = {name: statistics.median(values) for name, values in found.items()}
    costs["teacher, sliced"] = costs["teacher"]
    summary = run.read_json(directory / "pretrain" / "summary.json")
    costs["training the teacher, seconds"] = summary["cost_seconds"]["train"]
    return costs


def steps_of(name: str, costs: dict[str, float], rows: int, options: argparse.Namespace) -> int:
    """How many steps `options.seconds` buy."""
    budget = options.seconds * 1e3
    if name == "masked words, longer":
        return round((budget + 1e3 * costs["training the teacher, seconds"]) / costs["masked words"])
    if name != "teacher, cached":
        return round(budget / costs[name])
    epoch = rows // RECIPE["batch_size"]
    filling = min(epoch, budget / costs[name])
    return round(filling + max(0.0, budget - filling * costs[name]) / costs["teacher, cached, full"])


# ---- the students ----------------------------------------------------------------------------------------------------


def student(task: dict[str, Any]) -> dict[str, float]:
    """Train and fine-tune one: held-out loss (and its course) and the tasks' headline metrics."""
    import torch

    from frugalbert.finetune import runner

    torch.set_num_threads(1)
    directory = Path(task["run"])
    folder = Path(task["work"]) / "students" / run.fingerprint(task)[:16]
    (folder / "pretrain").mkdir(parents=True, exist_ok=True)
    values = values_of(task["way"], directory, folder)
    train({**values, "budget": f"{task['steps']}steps", "seed": task["seed"]}, directory, folder)
    summary = run.read_json(folder / "pretrain" / "summary.json")
    lines = [json.loads(line) for line in (folder / "pretrain" / "metrics.jsonl").read_text().splitlines()]
    course = [[line["step"], line["validation_loss"]] for line in lines if "validation_loss" in line]
    shutil.rmtree(folder / "cache", ignore_errors=True)
    section = Finetune.model_validate(
        {"tasks": list(TASKS), "data": str(DATA / "glue"), "seeds": [task["seed"]], "random_baseline": False,
         "learning_rate": 3e-4, "epochs": 2.0, "max_length": 64, "max_train_examples": 2000}
    )  # fmt: skip
    (folder / "finetune").mkdir(exist_ok=True)
    inputs = {"pretrain": folder / "pretrain", "tokenizer": directory / "tokenizer", "yaml": folder}
    inputs["corpus"] = directory / "corpus"
    runner.build(section, inputs, folder / "finetune", Machine(device="cpu", threads=1))
    found = {"loss": summary["final_validation_loss"], "course": course}
    return found | {row["task"]: row["mean"] for row in run.read_json(folder / "finetune" / "results.json")}


def students(
    work: Path, directory: Path, costs: dict[str, float], options: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    rows = run.read_json(directory / "shards" / "index.json")["sets"]["64"]["train"]
    number = sum(file["rows"] for file in rows["files"])
    tasks = [
        {"way": name, "steps": steps_of(name, costs, number, options), "seed": seed, "run": str(directory),
         "work": str(work)}
        for name in options.ways for seed in range(options.longer_seeds if "longer" in name else options.seeds)
    ]  # fmt: skip
    results = run_tasks(student, tasks, journal=work / "students.jsonl", workers=options.workers, label="students")
    found: dict[str, dict[str, Any]] = {}
    for task, result in zip(tasks, results, strict=True):
        way = found.setdefault(task["way"], {"steps": task["steps"], "cpu_seconds": options.seconds})
        for key, value in result.items():
            way.setdefault(key, []).append(value)
    return found


# ---- what a person looks at ------------------------------------------------------------------------------------------


def plot(found: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    costs = found["cost_ms"]
    for index, (name, way) in enumerate(found["ways"].items()):
        courses = np.array(way["course"])
        steps, losses = courses[0, :, 0], courses[:, :, 1].mean(0)
        seconds = steps / way["steps"] * way["cpu_seconds"]
        if name == "masked words, longer":
            seconds = steps * costs["masked words"] / 1e3
        left.plot(seconds, losses, color=f"C{index}", label=name, marker="o", ms=3)
        right.plot(steps, losses, color=f"C{index}", marker="o", ms=3)
    left.set(xlabel="CPU seconds of one thread", ylabel="held-out masked-LM loss, nats", title="equal time")
    right.set(xlabel="steps", title="equal steps")
    left.legend()
    figure.savefig(path, dpi=110)


def report(found: dict[str, Any]) -> None:
    print("cost of a step, ms: " + ", ".join(f"{k} {v:.1f}" for k, v in found["cost_ms"].items()))
    print(f"teacher: held-out loss {found['teacher']['final_validation_loss']:.3f}, unigram "
          f"{found['teacher']['unigram_nll']:.3f}, bigram {found['teacher']['bigram_nll']:.3f}")  # fmt: skip
    for name, way in found["ways"].items():
        means = {key: statistics.mean(way[key]) for key in ("loss", *TASKS)}
        print(f"{name:18} {way['steps']:6} steps  " + "  ".join(f"{key} {value:.3f}" for key, value in means.items()))
    for name, row in found["minus_words"].items():
        print(f"{name} minus masked words: " + told(row))
    if "teacher_minus_longer" in found:
        print("teacher minus masked words, longer: " + told(found["teacher_minus_longer"]))


def told(row: dict[str, dict[str, float]]) -> str:
    return ", ".join(f"{name} {value['mean']} [{value['low']}, {value['high']}]" for name, value in row.items())


if __name__ == "__main__":
    main()
