"""Does Agora pay? On tasks whose distribution is known, against other ways to spend the same training steps.

Points of the plane (two moons, two rings), labels by Bayes' rule of the distribution. D is scarce and biased: 30
points, nearly all from one half of the plane. E, the steering set, has 100 points of the true distribution. Students
are scikit-learn networks of one hidden layer; the settings are its width, learning rate and epochs (12). The teacher S
is the true label, wrong at random for a share of all points, or a logistic regression, which is wrong where the border
bends. Accuracy on 4,000 fresh points; intervals: 95 %, Student's t over paired seeds. What is compared:

  agora          as frugalbert.finetune.agora plays it; new points lie near mistakes (normal noise, sd 0.15)
  plain          the grid on D, chosen by E, again with other seeds until Agora's steps are spent
  plain D+E      the grid on D and 80 of E, chosen by the other 20; the best setting is trained on D and E at the end
  agora D+E      Agora with these 80 in D from the start, steered by the 20
  distilled D+E  plain D+E with the points of `distillation` as well
  near training  Agora's loop, new points near random training points
  near any       Agora's loop, new points near random steering points, right or wrong
  distillation   as many fresh points of the true distribution as Agora had labelled, labelled by S, added to D; grid
  ablations      labels (gold, random), pruning (worst, halving), replay, other transformations

  python benchmarks/agora.py --seeds 8             writes results/agora.json (its part `synthetic`) and agora.png
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from evidence import interval  # noqa: E402  (after the path)

from frugalbert import config, run  # noqa: E402
from frugalbert.finetune import agora  # noqa: E402
from frugalbert.finetune.tasks import Example  # noqa: E402

WORLDS = ("moons", "rings")
THETAS = [
    {"hidden": hidden, "rate": rate, "epochs": epochs}
    for hidden in (4, 16)
    for rate in (0.003, 0.03)
    for epochs in (10, 30, 100)
]
BATCH, TRAIN, STEER, FRESH = 32, 30, 100, 4000
ABLATIONS: dict[str, dict[str, Any]] = {
    "labels: gold": {"settings": {"labels": "gold"}},
    "labels: random": {"settings": {"labels": "random"}},
    "prune: worst": {"settings": {"prune": "worst"}},
    "prune: halving": {"settings": {"prune": "halving"}},
    "replay: 1": {"settings": {"replay": 1}},
    "tau: noise of 0.5": {"tau": "far"},
    "tau: between two mistakes": {"tau": "between"},
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "agora.json"))
    return parser.parse_args()


# ---- worlds, students, teachers --------------------------------------------------------------------------------------


class World:
    """A distribution of points, the true label of any point, and the students' bookkeeping of steps."""

    def __init__(self, name: str, seed: int) -> None:
        self.name = name
        self.rng = np.random.default_rng([WORLDS.index(name), seed])
        self.steps = 0
        pool = self.points(4000)
        left = pool[:, 0] < np.median(pool[:, 0])
        biased = np.concatenate([pool[left][: TRAIN - 2], pool[~left][:2]])
        self.train = self.examples(biased)
        self.steer = self.examples(self.points(STEER))
        self.fresh = self.points(FRESH)
        self.gold = self.truth(self.fresh)

    def points(self, count: int) -> np.ndarray:
        from sklearn import datasets

        make = datasets.make_moons if self.name == "moons" else datasets.make_circles
        state = int(self.rng.integers(2**31))
        options = {"noise": 0.2} if self.name == "moons" else {"noise": 0.15, "factor": 0.5}
        return make(count, random_state=state, **options)[0].round(4)

    def truth(self, points: np.ndarray) -> np.ndarray:
        """Bayes' rule: the likelier of the two curves with normal noise around them."""
        angles = np.linspace(0, math.pi if self.name == "moons" else 2 * math.pi, 200)
        curve = np.stack([np.cos(angles), np.sin(angles)], 1)
        other = np.stack([1 - np.cos(angles), 0.5 - np.sin(angles)], 1) if self.name == "moons" else 0.5 * curve
        noise = 0.2 if self.name == "moons" else 0.15
        density = [np.exp(-((points[:, None] - line) ** 2).sum(-1) / (2 * noise**2)).mean(1) for line in (curve, other)]
        return (density[1] > density[0]).astype(int)

    def examples(self, points: np.ndarray) -> list[Example]:
        return [
            Example(f"{x:.4f} {y:.4f}", label=int(label))
            for (x, y), label in zip(points, self.truth(points), strict=True)
        ]

    def student(self, examples: list[Example], theta: dict[str, Any], seed: int) -> Any:
        from sklearn.neural_network import MLPClassifier

        network = MLPClassifier(
            (theta["hidden"],), learning_rate_init=theta["rate"], max_iter=theta["epochs"], random_state=seed,
            batch_size=min(BATCH, len(examples)), tol=0.0, n_iter_no_change=10**6,
        )  # fmt: skip
        self.steps += theta["epochs"] * -(-len(examples) // BATCH)
        return network.fit(array(examples), [example.label for example in examples])

    def score(self, student: Any) -> float:
        return float((student.predict(self.fresh) == self.gold).mean())


def array(examples: list[Example]) -> np.ndarray:
    return np.array([[float(number) for number in example.text.split()] for example in examples])


def teacher(world: World, name: str, seed: int) -> Callable[[list[Example]], list[Any]]:
    """`0.75`: wrong for a quarter of all points, always the same. `linear`: a logistic regression of 500 points."""
    if name == "linear":
        from sklearn.linear_model import LogisticRegression

        points = world.points(500)
        model = LogisticRegression().fit(points, world.truth(points))
        return lambda examples: [int(label) for label in model.predict(array(examples))]

    def told(examples: list[Example]) -> list[Any]:
        luck = [int(run.fingerprint([seed, example.text])[:8], 16) / 16**8 for example in examples]
        labels = world.truth(array(examples))
        return [
            int(label) if share < float(name) else 1 - int(label) for label, share in zip(labels, luck, strict=True)
        ]

    return told


def near(sources: list[Example], rng: np.random.Generator, spread: float = 0.15) -> list[Example]:
    points = array(sources) + rng.normal(0, spread, (len(sources), 2))
    return [replace(e, text=f"{x:.4f} {y:.4f}") for e, (x, y) in zip(sources, points, strict=True)]


def between(sources: list[Example], rng: np.random.Generator) -> list[Example]:
    points = array(sources)
    share = rng.uniform(0, 1, (len(points), 1))
    mixed = share * points + (1 - share) * points[rng.permutation(len(points))]
    return [replace(e, text=f"{x:.4f} {y:.4f}") for e, (x, y) in zip(sources, mixed, strict=True)]


# ---- what is compared ------------------------------------------------------------------------------------------------


def settings_of(**changes: Any) -> config.Agora:
    given = {"teacher": "S", "settings": {}, "weak_teacher": True, "per_mistake": 4}
    return config.Agora.model_validate({**given, **changes})


def play(world: World, teach: Any, seed: int, change: dict[str, Any], source: str = "mistakes") -> dict[str, Any]:
    """One run of the loop: accuracy of its best student on fresh points, and what it cost."""
    students: dict[tuple[int, str], Any] = {}
    sets = agora.Sets(world.train, world.steer)
    if source == "most of E":
        sets, source = agora.Sets([*world.train, *world.steer[20:]], world.steer[:20]), "mistakes"
    world.steps = 0

    def fit(examples: list[Example], thetas: list[agora.Theta], number: int) -> list[list[Any]]:
        for theta in thetas:
            students[number, json.dumps(theta)] = world.student(examples, theta, 1000 * seed + number)
        return [students[number, json.dumps(theta)].predict(array(sets.steer)).tolist() for theta in thetas]

    def tau(mistakes: list[Example], rng: np.random.Generator) -> list[Example]:
        pool = {"mistakes": mistakes, "training": world.train, "steering": world.steer}[source]
        if source != "mistakes":
            mistakes = [pool[place] for place in rng.integers(len(pool), size=len(mistakes)).tolist()]
        if change.get("tau") == "between":
            return between(mistakes, rng)
        return near(mistakes, rng, 0.5 if change.get("tau") == "far" else 0.15)

    options = change.get("settings", {})
    if options.get("labels") == "gold":  # known here, for the new points themselves
        options, teach = {}, lambda examples: world.truth(array(examples)).tolist()
    tools = agora.Tools(fit, tau, teach)
    with tempfile.TemporaryDirectory() as folder:
        outcome = agora.play(settings_of(**options), sets, THETAS, tools, Path(folder) / "rounds", seed)
    found = students[outcome.best["round"], json.dumps(outcome.best["setting"])]
    by_round = [
        world.score(students[entry["round"], json.dumps(entry["settings"][int(np.argmax(entry["accuracy"]))])])
        for entry in outcome.rounds
    ]
    return {
        "accuracy": world.score(found), "steering": outcome.best["accuracy"], "steps": world.steps,
        "trainings": outcome.trainings, "rounds": len(outcome.rounds), "best_round": outcome.best["round"],
        "examples": outcome.examples, "stopped": outcome.stopped, "by_round": by_round,
        "steering_by_round": [max(entry["accuracy"]) for entry in outcome.rounds],
    }  # fmt: skip


def grid(
    world: World, examples: list[Example], judges: list[Example], seed: int, budget: int
) -> tuple[Any, float, Any]:
    """The grid again and again with other seeds until `budget` steps are spent: student, its accuracy, setting."""
    world.steps, best, number = 0, (None, -1.0, THETAS[0]), 0
    gold = np.array([example.label for example in judges])
    while world.steps < budget:
        theta = THETAS[number % len(THETAS)]
        student = world.student(examples, theta, 1000 * seed + number // len(THETAS))
        accuracy = float((student.predict(array(judges)) == gold).mean())
        if accuracy > best[1]:
            best = (student, accuracy, theta)
        number += 1
    return best


def controls(world: World, teach: Any, seed: int, base: dict[str, Any]) -> dict[str, Any]:
    """The same number of steps without the loop."""
    found: dict[str, Any] = {}

    def note(name: str, student: Any, steering: float) -> None:
        found[name] = {"accuracy": world.score(student), "steering": steering, "steps": world.steps}

    student, accuracy, _ = grid(world, world.train, world.steer, seed, base["steps"])
    note("plain", student, accuracy)
    held = world.steer[:20]
    _, accuracy, theta = grid(world, [*world.train, *world.steer[20:]], held, seed, base["steps"])
    note("plain D+E", world.student([*world.train, *world.steer], theta, 1000 * seed), accuracy)
    fresh = world.examples(world.points(max(1, base["examples"])))
    labelled = [replace(e, label=label) for e, label in zip(fresh, teach(fresh), strict=True)]
    student, accuracy, _ = grid(world, [*world.train, *labelled], world.steer, seed, base["steps"])
    note("distillation", student, accuracy)
    both = [*world.train, *world.steer[20:], *labelled]
    _, accuracy, theta = grid(world, both, held, seed, base["steps"])
    note("distilled D+E", world.student([*both, *held], theta, 1000 * seed), accuracy)
    found["agora D+E"] = play(world, teach, seed, {}, "most of E")
    found["near training"] = play(world, teach, seed, {}, "training")
    found["near any"] = play(world, teach, seed, {}, "steering")
    return found


def measure(name: str, teacher_name: str, seed: int) -> dict[str, Any]:
    world = World(name, seed)
    teach = teacher(world, teacher_name, seed)
    points = world.examples(world.points(FRESH))
    rows: dict[str, Any] = {"agora": play(world, teach, seed, {})}
    rows |= controls(world, teach, seed, rows["agora"])
    if teacher_name == "0.75":
        rows |= {label: play(world, teach, seed, change) for label, change in ABLATIONS.items()}
    told = float(np.mean([label == e.label for label, e in zip(teach(points), points, strict=True)]))
    return {"world": name, "teacher": teacher_name, "seed": seed, "teacher_accuracy": told, "rows": rows}


# ---- tables ----------------------------------------------------------------------------------------------------------


def table(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line per world, teacher and method: mean accuracy, and Agora minus it, paired by seed."""
    found = []
    for world, name in dict.fromkeys((one["world"], one["teacher"]) for one in runs):
        mine = [one["rows"] for one in runs if (one["world"], one["teacher"]) == (world, name)]
        for method in mine[0]:
            values = [rows[method]["accuracy"] for rows in mine]
            line = {"world": world, "teacher": name, "method": method, "accuracy": round(float(np.mean(values)), 4)}
            line["std"] = round(float(np.std(values, ddof=1)), 4)
            line["values"] = [round(value, 4) for value in values]
            line["steps"] = round(float(np.mean([rows[method]["steps"] for rows in mine])))
            if method != "agora":
                line["agora_minus_it"] = interval([rows["agora"]["accuracy"] for rows in mine], values)
            if method.endswith(" D+E") and method != "plain D+E":
                line["it_minus_plain_D+E"] = interval(values, [rows["plain D+E"]["accuracy"] for rows in mine])
            if "rounds" in mine[0][method]:
                for key in ("rounds", "trainings", "examples", "best_round"):
                    line[key] = round(float(np.mean([rows[method][key] for rows in mine])), 2)
            found.append(line)
    return found


def teachers(runs: list[dict[str, Any]]) -> dict[str, float]:
    """How often each teacher is right on points of the true distribution."""
    kinds = dict.fromkeys((one["world"], one["teacher"]) for one in runs)
    told = {kind: [one["teacher_accuracy"] for one in runs if (one["world"], one["teacher"]) == kind] for kind in kinds}
    return {" ".join(kind): round(float(np.mean(values)), 4) for kind, values in told.items()}


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """Accuracy per teacher and method, one panel per world."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(WORLDS), figsize=(10, 4), layout="constrained", sharey=True)
    methods = ["plain", "plain D+E", "near training", "near any", "distillation", "distilled D+E", "agora D+E", "agora"]
    for axes, world in zip(panels, WORLDS, strict=True):
        names = list(dict.fromkeys(line["teacher"] for line in lines if line["world"] == world))
        for place, method in enumerate(methods):
            rows = [line for line in lines if line["world"] == world and line["method"] == method]
            where = [names.index(line["teacher"]) + (place - 3.5) * 0.1 for line in rows]
            axes.errorbar(
                where, [line["accuracy"] for line in rows], [line["std"] for line in rows],
                fmt="s" if method == "agora" else "o", label=method,
            )  # fmt: skip
        axes.set(xticks=range(len(names)), xticklabels=names, xlabel="teacher", title=world)
    panels[0].set_ylabel("accuracy on fresh points (bars: sd over seeds)")
    panels[1].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from throughput import environment, save

    options = parse()
    warnings.simplefilter("ignore", ConvergenceWarning)
    run.say = lambda text: None  # the loop speaks of every round
    started, runs = time.monotonic(), []
    for seed in range(options.seeds):
        for world in WORLDS:
            for name in ("0.67", "0.75", "0.9", "linear"):
                runs.append(measure(world, name, seed))
                scores = {method: round(row["accuracy"], 3) for method, row in runs[-1]["rows"].items()}
                print(f"{time.monotonic() - started:.0f} s: {world} {name} {seed} {scores}", flush=True)
    lines = table(runs)
    out = Path(options.out)
    before = run.read_json(out) if out.exists() else {}
    part = {
        "seeds": options.seeds, "settings": THETAS, "train": TRAIN, "steer": STEER, "fresh": FRESH,
        "teachers": teachers(runs), "table": lines, "environment": environment(),
    }  # fmt: skip
    save(out, {**before, "benchmark": "agora", "synthetic": part})
    draw(lines, out.with_suffix(".png"))
    for line in lines:
        print(json.dumps(line))


if __name__ == "__main__":
    main()
