"""Held-out loss at a fixed wall clock, from the start of the process, on real Wikipedia text: who is lowest?

Inside the clock: imports, compiling (from a cold cache), reading data, checkpoints, the final model on disk. Outside
and shared: corpus, tokenizer (4,096 WordPieces) and token rows, by the product's own stages. Each arm is a process of
its own, on all cores or the GPU; one runs at a time. The loss is at 15 % masks, of the same rows and masks for all, and
is taken after the clock.
  run_mlm       transformers' examples/pytorch/language-modeling/run_mlm.py as documented: its defaults, 8 rows of 512,
                three epochs, fp32, dropout; ended by the clock. The model has our size, not BERT-base's
  run_mlm-best  what an expert gets out of it: ModernBertForMaskedLM (BERT's own class stays at the unigrams' loss for
                most of the clock), rows of 128, bf16, sdpa, no dropout, warm-up and weight decay, the best of 5 rates
                and 2 smaller batch sizes (trials of `--trial-share` of the clock, beside it; larger batches are no
                faster on a CPU), torch.compile if a probe says that it pays; a probe before each run sets the steps:
                the schedule ends with the clock
  24hbert       the recipe of 24hBERT (configs/academic-24h.yaml) on our engine. Scaled as its authors chose batch and
                size, for enough updates: our size in its family, and a batch that leaves thousands of updates
  ours          the toolkit's recipe, found by hand in two dozen trainings of 1 to 8 million tokens, then eight of
                the whole clock with one seed (masks, row length, batch, weight decay, documents apart; docs/LOG.md),
                where run_mlm-best has 7 of a fifth of it; `ours-X` is without one part, `ours+X` with one more (below)
  run_mlm-bert-base   run_mlm as documented with its true default model, only when it is asked for
Every finished run is in a journal, by default the committed one, and is not done again, so a study may be spread over
days and machines of one kind: a run is known by its settings, its token rows and the name of the processor.

  python benchmarks/time_to_loss.py --work DIR                       # 20 minutes, 3 seeds, all arms
  python benchmarks/time_to_loss.py --work DIR --arms ours run_mlm-best --seeds 1
  python benchmarks/time_to_loss.py --work DIR --downstream          # BLiMP, SST-2, STS-B of the two final models
  python benchmarks/time_to_loss.py --work DIR --report              # table, results/time_to_loss.json and .png
  python benchmarks/time_to_loss.py --work DIR --parts               # ours, and ours with a part less or more
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from evidence import DATA, ROOT, Finished, interval, told
from tables import race
from time_to_loss_arm import LENGTH, TASKS, scores

from frugalbert import dist, run, stages
from frugalbert.config import Machine
from frugalbert.data.rows import ShardSet
from frugalbert.finetune.metrics import summary
from frugalbert.lock import Lock
from frugalbert.measure.predictor import device_name
from frugalbert.yamlfile import load

RESULTS = ROOT / "benchmarks" / "results"
ARM = Path(__file__).with_name("time_to_loss_arm.py")
SIZES: dict[str, dict[str, Any]] = {
    "cpu": {"family": "4x256 heads=4", "ffn": (640, 1024), "batch": 32, "24hbert": 32, "trials": (16, (4, 8))},
    "cuda": {"family": "12x512 heads=8", "ffn": (1408, 2048), "batch": 512, "24hbert": 1024,
             "trials": (256, (64, 128, 512))},
}  # fmt: skip
"""What fits a device: width of GeGLU and of GELU, rows of 128 tokens a step (ours, 24hBERT; trials: the size at which
rates are tried, and the other sizes)."""
RATES = (3e-4, 6e-4, 1e-3, 2e-3, 4e-3)
BEST, DOWNSTREAM = "run_mlm-best", ("run_mlm-best", "ours")
YAML = """
name: time-to-loss
corpus: {{sources: {sources}, held_out: 0.01}}
tokenizer: {{kind: wordpiece, vocab_size: 4096, lowercase: true}}
shards: {{length: [128, 64, 512]}}
"""


# ---- the arms: a new part is a line here -----------------------------------------------------------------------------


def ours(device: str) -> dict[str, dict[str, Any]]:
    """Arms of our engine: their section `pretrain`."""
    size = SIZES[device]
    modern, stock, preln = (
        f"{family} {size['family']} ffn={size['ffn'][family != 'modern']}"
        for family in ("modern", "bert", "bert-preln")
    )
    recipe = {
        "arch": modern, "batch_size": size["batch"], "optimizer": "muon", "muon_learning_rate": 0.01,
        "learning_rate": 2e-3, "weight_decay": 0.01, "warmup": 0.05, "curve": "linear",
        "mask": {"rate": [0.3, 0.15]},  # GPT-BERT's schedule
    }  # fmt: skip
    short = {"phases": [{"length": 128, "share": 0.4}], "batch_size": 2 * size["batch"]}  # rows of 64 first
    parts: dict[str, dict[str, Any]] = {
        "": {},
        "-muon": {"optimizer": "adamw", "learning_rate": 3e-3},
        "-masks": {"mask": {"rate": 0.15}},
        "-decay": {"curve": "constant"},
        "-modern": {"arch": stock},
        "-isolation": {"isolate_documents": False},
        "+many-masks": {"mask": {"rate": [0.8, 0.15]}},
        "+wsd": {"curve": "wsd", "curve_options": {"cooldown": 0.5}},
        "+ramp": {"batch_size": 2 * size["batch"], "batch_ramp": {"start": size["batch"] // 2, "share": 0.5}},
        "+lengths": short,
        "+average": {"checkpoints": {"average": 3}},
        "+large-batch": {"batch_size": 2 * size["batch"]},
    }
    few = {"batch_size": size["batch"] // 2}
    small = {name: parts[name] | few for name in ("", "-isolation", "+many-masks")}
    small |= {"+lengths": short | {"batch_size": size["batch"]}}
    small |= {"+lengths+many-masks": small["+lengths"] | parts["+many-masks"]}
    parts |= {f"+small-batch{name}": part for name, part in small.items()}
    # the recipe had this part, and two of those above, when most of its others were tried
    parts |= {f"+weight-decay{name}": part | {"weight_decay": 0.1} for name, part in parts.items()}
    academic = {
        "arch": preln, "batch_size": size["24hbert"], "optimizer": "adamw", "learning_rate": 1e-3, "epsilon": 1e-6,
        "betas": [0.9, 0.98], "weight_decay": 0.01, "clip_norm": 0.0, "warmup": 0.06, "curve": "linear",
        "dropout": 0.1, "mask": {"rate": 0.15, "style": "bert", "random_token_includes_special": True},
    }  # fmt: skip
    return {"24hbert": academic} | {"ours" + name: recipe | part for name, part in parts.items()}


def trainers(device: str) -> dict[str, dict[str, Any]]:
    """Arms of Hugging Face's Trainer; those of `run_mlm-best` before its trials."""
    size = SIZES[device]
    stock, modern = (f"{name} {size['family']} ffn={size['ffn'][name == 'bert']}" for name in ("bert", "modern"))
    default = {
        "arch": stock, "length": 512, "batch_size": 8, "learning_rate": 5e-5, "warmup": 0.0, "weight_decay": 0.0,
        "dropout": 0.1, "bf16": False, "compile": False, "remove_unused_columns": True, "save_steps": 500,
        "workers": 0,
    }  # fmt: skip
    best = default | {
        "arch": modern, "length": 128, "batch_size": size["trials"][0], "warmup": 0.06, "weight_decay": 0.01,
        "dropout": 0.0, "bf16": dist.pick_precision("auto", dist.pick_device(Machine())) == "bf16",
        "remove_unused_columns": False, "save_steps": 0, "workers": 8 if device == "cuda" else 0,
    }  # fmt: skip
    base = default | {"arch": "bert 12x768 heads=12 ffn=3072"}
    return {"run_mlm": default, BEST: best, "run_mlm-bert-base": base}


# ---- the study -------------------------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    device = dist.pick_device(Machine()).type
    arms = ["run_mlm", BEST, *ours(device)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "time-to-loss", help="data and models")
    parser.add_argument("--journal", type=Path, default=RESULTS / "time_to_loss.jsonl", help="what is finished")
    parser.add_argument("--minutes", type=float, default=20.0, help="of the clock")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", choices=[*arms, "run_mlm-bert-base"], metavar="ARM",
                        help="default: all without a +, in a report all")  # fmt: skip
    parser.add_argument("--trial-share", type=float, default=0.2, help="of the clock, for each trial of run_mlm-best")
    sources = [str(DATA / f"enwiki2015-{part}.txt.xz") for part in ("AA", "AB")]
    parser.add_argument("--sources", nargs="+", default=sources, help="text, for the first call")
    parser.add_argument("--max-documents", type=int, default=None, help="of each source, for a rehearsal")
    parser.add_argument("--parts", action="store_true", help="arms of ours alone, to results/time_to_loss_parts.json")
    parser.add_argument("--downstream", action="store_true", help="also " + ", ".join(TASKS) + " of finished models")
    parser.add_argument("--report", action="store_true", help="nothing is run: write what is there")
    parser.add_argument("--machine", help="of a report: the processor whose runs it tells (default: this one)")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.arms = options.arms or [
        arm for arm in arms if ("ours" in arm or not options.parts) and ("+" not in arm or options.report)
    ]
    options.out = options.out or RESULTS / f"time_to_loss{'_parts' if options.parts else ''}.json"
    options.work, options.device = options.work.resolve(), device
    return options


@told()
def main() -> None:
    options = parse()
    options.work.mkdir(parents=True, exist_ok=True)
    with Lock(options.work), Finished(options.journal) as finished:
        if not options.report:
            prepare(options)
        found = study(options, Study(options, finished))
    print(race(found))
    if options.report:
        from throughput import environment

        if not found["arms"]:
            there = sorted({entry["task"]["machine"] for entry in finished.entries})
            raise ValueError(f"{options.journal} has no such run of {found['machine']}; --machine: {'; '.join(there)}")
        picture, about = options.out.with_suffix(".png"), environment()
        if options.machine:  # of which no more is known than its name
            about = {"cpu": options.machine} | {name: about[name] for name in ("versions", "commit", "date")}
        run.write_json(options.out, found | {"picture": picture.name, "environment": about})
        plot(found, picture)


def study(options: argparse.Namespace, known: Study) -> dict[str, Any]:
    """All that is not finished yet, unless only a report is asked for; then what is."""
    for task in known.tasks() if not options.report else []:
        known.result(task)
        if options.downstream:
            known.worth(task)
    return summed_up(known)


def prepare(options: argparse.Namespace) -> None:
    """Corpus, tokenizer and token rows, once."""
    if not (options.work / "data.yaml").exists():
        limit = {} if options.max_documents is None else {"max_documents": options.max_documents}
        sources = [{"path": str(Path(path).resolve()), **limit} for path in options.sources]
        run.write_atomic(options.work / "data.yaml", YAML.format(sources=json.dumps(sources)))
    stages.run(load(options.work / "data.yaml", []), options.work / "data", options.work)


class Study:
    """The runs of a study and its journal: what is finished is looked up, the rest done (unless it only reports)."""

    def __init__(self, options: argparse.Namespace, finished: Finished) -> None:
        self.options, self.finished = options, finished
        self.rows = next((entry["task"]["rows"] for entry in finished.entries), None)
        if (place := options.work / "data" / "shards").exists():
            self.rows = ShardSet.open(place, LENGTH, verify=False).identity[:12]
        self.machine = (options.report and options.machine) or device_name(options.device)

    def tasks(self) -> list[dict[str, Any]]:
        """All runs, one seed of every arm after the other; without `run_mlm-best` while its settings are unknown."""
        engine, trainer = ours(self.options.device), trainers(self.options.device)
        best = self.chosen() if BEST in self.options.arms else None
        found = []
        for seed in range(self.options.seeds):
            for arm in self.options.arms:
                if arm == BEST and best is None:
                    continue
                part = (
                    {"pretrain": engine[arm]} if arm in engine else {"trainer": best if arm == BEST else trainer[arm]}
                )
                found.append(self.task(arm, seed, self.options.minutes, part))
        return found

    def task(self, arm: str, seed: int, minutes: float, part: dict[str, Any]) -> dict[str, Any]:
        named = {"arm": arm, "seed": seed, "minutes": minutes, **part}
        return named | {"device": self.options.device, "machine": self.machine, "rows": self.rows}

    def trial(self, **values: Any) -> dict[str, Any]:
        """A short run of run_mlm-best."""
        minutes = self.options.minutes * self.options.trial_share
        return self.task(BEST, 0, minutes, {"trainer": trainers(self.options.device)[BEST] | values})

    def trials(self) -> list[dict[str, Any]]:
        """The rates at one batch size, then the other sizes at the best rate (as far as it is known)."""
        rates = [self.trial(learning_rate=rate) for rate in RATES]
        best = self.lowest(rates)
        sizes = SIZES[self.options.device]["trials"][1]
        others = [self.trial(**{**best["trainer"], "batch_size": size}) for size in sizes] if best else []
        return rates + others

    def lowest(self, tasks: list[dict[str, Any]]) -> dict[str, Any] | None:
        losses = [self.result(task) for task in tasks]
        if any(found is None for found in losses):
            return None
        return min(zip(losses, tasks, strict=True), key=lambda pair: pair[0]["loss"])[1]

    def chosen(self) -> dict[str, Any] | None:
        """The settings of run_mlm-best, from its trials and probes; None if they are not there yet."""
        best = self.lowest(self.trials())
        if best is None:
            return None
        both = []
        for compiled in (False, True):
            part = {"probe": True, "trainer": {**best["trainer"], "compile": compiled}}
            both.append(self.result(self.task(BEST, 0, self.options.minutes, part)))
        if None in both:
            return None
        return {**best["trainer"], "compile": both[1]["steps_in_time"] > both[0]["steps_in_time"]}

    def result(self, task: dict[str, Any]) -> dict[str, Any] | None:
        """What a run found: from the journal, or done now; None if it is not there and this is only a report."""
        if self.options.report:
            return self.finished.get(task)

        def work() -> dict[str, Any]:
            what = " (a probe)" if task.get("probe") else f", {task['minutes']:g} minutes"
            run.say(f"time_to_loss: {task['arm']}, seed {task['seed']}{what}")
            return done(task, self.folder(task), self.options.work / "data")

        return self.finished.result(task, work)

    def folder(self, task: dict[str, Any]) -> Path:
        return self.options.work / "arms" / f"{task['arm']}-{task['seed']}-{run.fingerprint(task)}"

    def worth(self, task: dict[str, Any]) -> dict[str, Any] | None:
        """BLiMP and GLUE scores of a finished run's model, from the journal or done now; None for other arms."""
        asked = {**task, "tasks": TASKS}
        there = task["arm"] in DOWNSTREAM and (self.folder(task) / "pretrain" / "model").exists()
        if self.options.report or not there:  # models stay on the machine that trained them
            return self.finished.get(asked)
        return self.finished.result(asked, lambda: scores(self.folder(task), self.options.device))


def done(task: dict[str, Any], folder: Path, data: Path) -> dict[str, Any]:
    """Run a task in a process of its own; a schedule that is set by a probe has its probe first."""
    task = task | {"data": str(data)}
    if task["arm"] == BEST and not task.get("probe"):
        task["speed"] = spawn(task | {"probe": True}, folder)
    try:
        found = spawn(task, folder)
    except ValueError as error:
        if not (task.get("probe") and task["trainer"]["compile"]):
            raise
        run.say(f"time_to_loss: torch.compile fails here ({error})")
        return {"steps_in_time": 0}
    return found | {"speed": task.get("speed")}


def spawn(task: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A process of time_to_loss_arm.py, from its start; a signal ends it. Raises ValueError if it fails."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    run.write_json(folder / "task.json", task)
    with open(folder / "log.txt", "w") as log:
        cold = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
        command = [sys.executable, str(ARM), repr(time.time()), str(folder)]
        process = subprocess.Popen(command, env=cold, stdout=log, stderr=log)
        while process.poll() is None:
            try:
                process.wait(1.0)
            except subprocess.TimeoutExpired:
                if run.stop_requested():
                    process.kill()
                    process.wait()
    shutil.rmtree(folder / "inductor", ignore_errors=True)
    run.check_stop()
    if process.returncode:
        lines = (folder / "log.txt").read_text().strip().splitlines() or ["nothing was said"]
        raise ValueError(f"{task['arm']} failed: {lines[-1][:200]} (see {folder / 'log.txt'})")
    return run.read_json(folder / "result.json")


# ---- what came of it -------------------------------------------------------------------------------------------------


def changed(name: str, arms: Iterable[str]) -> str:
    """The arm that this one is set beside: of `ours-X+Y` the longest that begins its name, of all others `ours`."""
    begins = [other for other in arms if other.startswith("ours") and name.startswith((f"{other}-", f"{other}+"))]
    return max(begins, key=len, default="" if name == "ours" else "ours")


def summed_up(study: Study) -> dict[str, Any]:
    """Per arm: seeds, losses, their interval and that of the differences, seed by seed, from what it is a change of."""
    options = study.options
    arms: dict[str, dict[str, Any]] = {}
    kept = "loss accuracy tokens steps tokens_per_second seconds curve rate_left speed cost_seconds".split()
    for task in study.tasks():
        found = study.finished.get(task)
        if found is None:
            continue
        arm = arms.setdefault(task["arm"], {"settings": task.get("pretrain", task.get("trainer")), "runs": []})
        entry = {"seed": task["seed"]} | {name: found[name] for name in kept if name in found}
        worth = study.finished.get({**task, "tasks": TASKS})
        arm["runs"].append(entry | ({"downstream": worth} if worth else {}))
    for name, arm in arms.items():
        losses = [entry["loss"] for entry in arm["runs"]]
        mean, _, ends = summary(losses)
        arm["loss"] = {
            "mean": round(mean, 4),
            "interval": None if math.isnan(ends[0]) else [round(end, 4) for end in ends],
        }
        other = changed(name, arms)
        base = {entry["seed"]: entry["loss"] for entry in arms[other]["runs"]} if other in arms else {}
        pairs = [(entry["loss"], base[entry["seed"]]) for entry in arm["runs"] if entry["seed"] in base]
        if len(pairs) > 1:
            arm["minus"] = {"arm": other, **interval(*zip(*pairs, strict=True))}
        elif pairs:
            arm["minus"] = {"arm": other, "mean": round(pairs[0][0] - pairs[0][1], 4)}
    tried = study.trials() if BEST in options.arms else []
    trials = [
        {"settings": task["trainer"], "minutes": task["minutes"], "loss": result["loss"]}
        for task in tried if (result := study.finished.get(task))
    ]  # fmt: skip
    return {"benchmark": (__doc__ or "").split("\n", 1)[0], "minutes": options.minutes, "device": options.device,
            "machine": study.machine, "trials": trials, "arms": arms,
            "commits": study.finished.commits([*study.tasks(), *tried])}  # fmt: skip


def plot(found: dict[str, Any], path: Path) -> None:
    """Loss over minutes, the mean of the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    figure, axes = plt.subplots(figsize=(8, 5), constrained_layout=True)
    for number, (name, arm) in enumerate(found["arms"].items()):
        points = min(len(entry["curve"]) for entry in arm["runs"])
        curve = np.array([entry["curve"][-points:] for entry in arm["runs"]]).mean(0)
        main_arm = not name.startswith(("ours-", "ours+"))
        style: dict[str, Any] = {"lw": 2, "marker": "o", "ms": 3} if main_arm else {"lw": 0.8, "alpha": 0.7}
        axes.plot(curve[:, 0], curve[:, 1], label=name, color=f"C{number % 10}", **style)
    axes.set(xlabel="minutes since the process was started", ylabel="held-out masked-LM loss, nats")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
