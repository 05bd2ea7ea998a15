"""Does Agora pay for a small encoder? SST-2 and QQP with a few hundred labelled examples, at equal training steps.

Of each training file three parts, disjoint, by a hash of the text: up to 20,000 examples for the teacher, a logistic
regression on words and pairs of words; `--examples` for the student, of which a bit more than a quarter steers (E) and
the rest is D; and texts whose labels nobody sees. QQP is the 9k sample, so its scores are not GLUE's. Students are
trials of `frugalbert.finetune`, best epoch on E, two settings (learning rates, once picked with the dev set in sight).
Accuracy on the official dev set, which chooses nothing here; intervals: 95 %, Student's t over paired seeds. Compared:

  agora          frugalbert.finetune.agora; new texts by a masked LM (the encoder) and by dropout, three per mistake
  plain          the grid on D, chosen by E, again with other seeds until Agora's steps are spent
  plain D+E      the grid on D and three quarters of E, chosen by the rest; all the same steps
  near training  Agora's loop, new texts from random training examples
  distillation   as many unseen texts as Agora had labelled, labelled by the teacher, added to D; grid
  gold           Agora with the labels of the mistakes instead of a teacher's

  python benchmarks/agora_tasks.py --model RUN/pretrain/model --work DIR     adds `tasks` to results/agora.json
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from evidence import DATA, interval  # noqa: E402  (after the path)

from frugalbert import config, dist, run  # noqa: E402
from frugalbert.finetune import agora, agora_trials, examples, models, results, runner, transforms, trial  # noqa: E402
from frugalbert.finetune.tasks import Example, digest  # noqa: E402

RATES, EPOCHS = (5e-4, 1e-3), (4.0,)
THETAS: list[dict[str, Any]] = [{"learning_rate": rate, "epochs": epochs} for rate in RATES for epochs in EPOCHS]
TEACHER = 20_000
METHODS = ("agora", "plain", "plain D+E", "near training", "distillation", "gold")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a pre-trained encoder of ours or Hugging Face's")
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--tasks", nargs="+", default=["SST-2", "QQP"], choices=["SST-2", "QQP"])
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--examples", type=int, default=160)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "agora.json"))
    return parser.parse_args()


# ---- data ------------------------------------------------------------------------------------------------------------


def read(task: str, split: str) -> list[dict[str, str]]:
    """Rows with `text`, `text_b` (pairs) and `label`, in an order by hash."""
    if task == "SST-2":
        lines = (DATA / "glue" / "SST-2" / f"{split}.tsv").read_text(encoding="utf-8").split("\n")[1:]
        rows = [dict(zip(("text", "label"), line.rsplit("\t", 1), strict=True)) for line in lines if line]
    else:
        found = sorted((DATA / "glue_samples").rglob(f"*{split}*.jsonl"))
        (path,) = [path for path in found if "qqp" in str(path).lower()]
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        rows = [{"text": r["text_a"], "text_b": r["text_b"], "label": str(r["label"])} for r in records]
    unique = {digest(row["text"].strip(), row.get("text_b")): row for row in rows}
    return [unique[key] for key in sorted(unique)]


def write(path: Path, rows: list[dict[str, str]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def prepare(task: str, options: argparse.Namespace) -> tuple[dict[str, str], list[dict[str, str]], list[Example]]:
    """Files of the student, rows of the teacher, and the texts that are left."""
    rows, dev = read(task, "train"), read(task, "dev")
    known = {(row["text"].strip(), row.get("text_b")) for row in dev}
    rows = [row for row in rows if (row["text"].strip(), row.get("text_b")) not in known]
    size = min(TEACHER, len(rows) - 2 * options.examples - 100)
    parts = {"student": rows[size : size + options.examples], "dev": dev}
    files = {name: write(options.work / task / f"{name}.csv", part) for name, part in parts.items()}
    rest = rows[size + options.examples :][:2000]
    return files, rows[:size], [Example(row["text"], row.get("text_b")) for row in rest]


def section(task: str, files: dict[str, str], options: argparse.Namespace) -> config.Finetune:
    columns = {} if task == "SST-2" else {"text_b": "text_b"}
    custom = {
        "name": f"few-{task}",
        "train": files["student"],
        "dev": files["dev"],
        "columns": columns,
    }
    base = {"tasks": [custom], "model": options.model, "batch_size": 16, "max_length": 48, "precision": "auto"}
    return config.Finetune.model_validate({**base, "select": "train", "select_share": 0.28}, strict=False)


def mean_pooled(model: str, work: Path) -> str:
    """A copy of our encoder whose head reads the mean of the tokens: its [CLS] has learnt nothing in pre-training."""
    copy = work / "model"
    shutil.copytree(model, copy, dirs_exist_ok=True)
    settings = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**settings, "classifier_pooling": "mean"}))
    return str(copy)


def open_job(settings: config.Finetune, options: argparse.Namespace) -> trial.Job:
    machine = config.Machine(device="cpu", threads=options.threads)
    dist.set_threads(machine)
    (data,) = examples.load_all(settings, Path("/"), None)
    return runner.make_job(data, settings, models.open_source(options.model, None), machine)


def make_teacher(rows: list[dict[str, str]]) -> Callable[[list[Example]], list[Any]]:
    """Logistic regression on TF-IDF of words and word pairs; of two texts, on what they share and what they do not."""
    from scipy.sparse import hstack
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    vectors = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2, token_pattern=r"\w+|[^\w\s]")
    vectors.fit([row["text"] for row in rows] + [row["text_b"] for row in rows if "text_b" in row])

    def features(texts: list[str], others: list[str | None]) -> Any:
        first = vectors.transform(texts)
        if others[0] is None:
            return first
        second = vectors.transform([other or "" for other in others])
        return hstack([abs(first - second), first.multiply(second)]).tocsr()

    model = LogisticRegression(C=4.0, max_iter=1000)
    model.fit(features([r["text"] for r in rows], [r.get("text_b") for r in rows]), [int(r["label"]) for r in rows])
    return lambda asked: [int(v) for v in model.predict(features([e.text for e in asked], [e.text_b for e in asked]))]


# ---- methods ---------------------------------------------------------------------------------------------------------


class Bench:
    """Students of one task: trained, scored on steering and dev examples, their steps counted."""

    def __init__(self, job: trial.Job, teach: Callable[[list[Example]], list[Any]]) -> None:
        self.job, self.teach, self.steps, self.best = job, teach, 0, -1.0
        self.sets = agora_trials.split(job.data)

    def student(self, train: list[Example], judges: list[Example], theta: dict[str, Any], seed: int) -> dict[str, Any]:
        """Predictions on the judges, their accuracy, and, if that is the best so far, accuracy on the dev set."""
        data = replace(self.job.data, sets={**self.job.data.sets, "select": judges})
        features = {**self.job.features, "select": agora_trials._encode(self.job, self.job.source, judges)}
        job = agora_trials.grown(replace(self.job, data=data, features=features), train)
        job = replace(job, settings=job.settings.model_copy(update=theta))
        score = lambda model, scale: agora_trials._selection(job, model, scale)  # noqa: E731
        model, _ = trial.run_trial(job, "pretrained", seed, lambda step, loss: None, None, score)
        self.steps += job.num_steps
        told = results.evaluate(job, "select", model).predicted
        right = sum(int(a) == b.label for a, b in zip(told, judges, strict=True)) / len(judges)
        found = {"told": [int(a) for a in told], "steering": right}
        if right > self.best:  # others are never asked for; the loop does not see it
            self.best = right
            found["accuracy"] = results.evaluate(job, "dev", model).scores["accuracy"]
        return found

    def play(
        self, folder: Path, seed: int, tau: Any, source: str = "mistakes", labels: str = "teacher"
    ) -> dict[str, Any]:
        self.steps, self.best, found = 0, -1.0, {}

        def fit(train: list[Example], thetas: list[agora.Theta], number: int) -> list[list[Any]]:
            for theta in thetas:
                key = json.dumps([number, theta])
                found[key] = self.student(train, self.sets.steer, theta, 1000 * seed + number)
            return [found[json.dumps([number, theta])]["told"] for theta in thetas]

        def transform(mistakes: list[Example], rng: Any) -> list[Example]:
            if source == "training":
                places = rng.integers(len(self.sets.train), size=len(mistakes)).tolist()
                mistakes = [self.sets.train[place] for place in places]
            return tau(mistakes, rng)

        given = {"teacher": "S", "settings": {}, "per_mistake": 3, "labels": labels, "weak_teacher": True}
        settings = config.Agora.model_validate(given)
        log = folder / "rounds.jsonl"
        log.unlink(missing_ok=True)
        tools = agora.Tools(fit, transform, self.teach)
        outcome = agora.play(settings, self.sets, THETAS, tools, log, seed)
        best = found[json.dumps([outcome.best["round"], outcome.best["setting"]])]
        row = {"accuracy": best["accuracy"], "steering": best["steering"], "steps": self.steps}
        keys = ("round", "train_examples", "mistakes", "made", "copies", "added")
        rounds = [{key: entry.get(key) for key in keys} for entry in outcome.rounds]
        return row | {
            "trainings": outcome.trainings, "examples": outcome.examples, "best_round": outcome.best["round"],
            "setting": outcome.best["setting"], "stopped": outcome.stopped, "rounds": rounds,
        }  # fmt: skip

    def grid(self, train: list[Example], judges: list[Example], seed: int, budget: int) -> dict[str, Any]:
        """The whole grid once, and again with other seeds until the budget is spent."""
        self.steps, self.best, number, best = 0, -1.0, 0, {"steering": -1.0}
        while self.steps < budget or number < len(THETAS):
            theta = THETAS[number % len(THETAS)]
            one = self.student(train, judges, theta, 1000 * seed + number // len(THETAS))
            best = one | {"setting": theta} if one["steering"] > best["steering"] else best
            number += 1
        row = {key: best[key] for key in ("accuracy", "steering", "setting")}
        return row | {"steps": self.steps, "trainings": number}


def one_seed(bench: Bench, seed: int, unseen: list[Example], tau: Any, options: argparse.Namespace) -> dict[str, Any]:
    folder, sets = options.work / f"seed{seed}", bench.sets
    rows = {"agora": bench.play(folder, seed, tau)}
    budget = rows["agora"]["steps"]
    cut = 3 * len(sets.steer) // 4
    picked = [unseen[(seed * 997 + place) % len(unseen)] for place in range(max(1, rows["agora"]["examples"]))]
    labelled = [replace(e, label=label) for e, label in zip(picked, bench.teach(picked), strict=True)]
    todo: dict[str, Callable[[], dict[str, Any]]] = {
        "plain": lambda: bench.grid(sets.train, sets.steer, seed, budget),
        "plain D+E": lambda: bench.grid([*sets.train, *sets.steer[:cut]], sets.steer[cut:], seed, budget),
        "near training": lambda: bench.play(folder, seed, tau, source="training"),
        "distillation": lambda: bench.grid([*sets.train, *labelled], sets.steer, seed, budget),
        "gold": lambda: bench.play(folder, seed, tau, labels="gold"),
    }
    for name in [name for name in todo if name in options.methods]:
        started = time.monotonic()
        rows[name] = todo[name]()
        shown = {key: rows[name].get(key) for key in ("accuracy", "steering", "steps", "trainings", "examples")}
        print(f"  seed {seed}: {name} {shown} {time.monotonic() - started:.0f} s", flush=True)
    return rows


def measure(task: str, options: argparse.Namespace) -> dict[str, Any]:
    files, rows, unseen = prepare(task, options)
    job = open_job(section(task, files, options), options)
    teach = make_teacher(rows)
    bench = Bench(job, teach)
    told = {name: teach(job.data.sets[name]) for name in ("select", "dev")}
    quality = {
        name: sum(a == b.label for a, b in zip(found, job.data.sets[name], strict=True)) / len(found)
        for name, found in told.items()
    }
    tau = transforms.build(["masked-lm", "dropout"], 0.15, options.model, Path("/"))
    sizes = {name: len(part) for name, part in job.data.sets.items()}
    print(f"{task}: {sizes}, teacher {quality}", flush=True)
    seeds = [one_seed(bench, seed, unseen, tau, options) for seed in range(options.seeds)]
    table = []
    for method in seeds[0]:
        values = [rows[method]["accuracy"] for rows in seeds]
        line: dict[str, Any] = {"method": method, "accuracy": sum(values) / len(values), "values": values}
        line["steps"] = sum(rows[method]["steps"] for rows in seeds) / len(seeds)
        if method != "agora":
            line["agora_minus_it"] = interval([rows["agora"]["accuracy"] for rows in seeds], values)
        table.append(line)
        print(json.dumps(line), flush=True)
    majority = max(sum(e.label == label for e in job.data.dev) for label in (0, 1)) / len(job.data.dev)
    return {"task": task, "sizes": sizes, "majority": majority, "teacher": quality, "table": table, "runs": seeds}


def main() -> None:
    from throughput import environment, save

    options = parse()
    options.model = mean_pooled(str(Path(options.model).resolve()), options.work.resolve())
    run.say = lambda text: None
    out, found = Path(options.out), []
    for task in options.tasks:
        found.append(measure(task, options))
        before = run.read_json(out) if out.exists() else {}
        part = {"settings": THETAS, "tasks": found, "environment": environment()}
        save(out, {**before, "benchmark": "agora", "tasks": part})


if __name__ == "__main__":
    main()
