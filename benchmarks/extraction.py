"""Does optimal subarchitecture extraction find what it is after? Every architecture of a micro space, trained.

36 encoders on real Wikipedia text. Each is trained shortly (s steps; SGD, as the theory of OSE has it, and Muon) and
long (with Muon, from other seeds); short and long losses are measured on different held-out rows. Then, without
training anything again (`frugalbert/search/extraction.py` on the recorded losses):
  proxy      rank correlation of the short-training error, of the loss inherited from a super-network, and of sizes
             alone with the loss after long training; and of W by each with W by the long loss; 95 % bootstrap intervals
  intervals  OSE's pick for intervals 1, 2, 4, 8 and each representative: its W over the best W (by the same short
             errors: what the stride loses; and by the long loss: what short training loses too), its long loss
  choices    at equal compute: random architectures instead of strided ones, the super-network's pick, the smallest by
             parameters, by operations, and by both without any training
Everything is for maximum points T of 1, 10 and 100 times the largest architecture's size and operations: the first
favours the small, the last asks for the error alone. What is compared counts steps, not seconds. `--work DIR` is
continued where it stood. Data: FRUGALBERT_DATA or ../shared/data.

    python benchmarks/extraction.py --work /tmp/extraction
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import os
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from evidence import ROOT, run_on_wikipedia

from frugalbert import run
from frugalbert.config import Extraction, Limit, Machine, Pretrain, Supernet
from frugalbert.fanout import run_tasks
from frugalbert.model.arch import Arch
from frugalbert.model.cost import forward_flops, parameter_count, training_flops
from frugalbert.search.candidates import Region
from frugalbert.search.extraction import Errors, Maximum, coefficient, extract, largest, ordered
from frugalbert.space import Space

LENGTH, VOCABULARY, ROWS, BATCH = 64, 1024, 256, 16
YAML = f"""
name: extraction
corpus: {{sources: [text/wiki.txt], held_out: 0.03}}
tokenizer: {{vocab_size: {VOCABULARY}}}
shards: {{length: {LENGTH}}}
space: {{family: modern, depth: [1, 2, 3], hidden: [64, 96, 128], heads: [2, 4], head_dim: [16, 24, 32, 48, 64],
  ffn: [64, 192], qkv_is_hidden: true}}
"""
RECIPES = {
    "sgd": {"optimizer": "sgd", "learning_rate": 2.0, "batch_size": BATCH},
    "muon": {"optimizer": "muon", "learning_rate": 3e-3, "batch_size": BATCH},
}
SCALES, INTERVALS, DRAWS = (1, 10, 100), (1, 2, 4, 8), 2000


def main() -> None:
    options = parse()
    work = options.work.resolve()
    directory = prepare(work, options)
    space = Space.from_json(run.read_json(directory / "space" / "space.json"))
    short, inherited, long = trainings(work, directory, space, options)
    found = analyse(space, short, inherited, long, options)
    from throughput import environment

    found["environment"] = environment(sorted(os.sched_getaffinity(0)))
    run.write_json(options.out, found)
    plot(found, options.out.with_suffix(".png"))
    report(found)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--short", type=int, nargs="+", default=[100, 400, 800], help="steps s of short trainings")
    parser.add_argument("--super-like", type=int, default=400, help="the s whose compute the super-network gets")
    parser.add_argument("--long", type=int, default=1200, help="steps of long ones")
    parser.add_argument("--short-seeds", type=int, default=1)
    parser.add_argument("--long-seeds", type=int, default=2)
    parser.add_argument("--megabytes", type=int, default=12, help="of Wikipedia text")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "extraction.json")
    return parser.parse_args()


# ---- training --------------------------------------------------------------------------------------------------------


def prepare(work: Path, options: argparse.Namespace) -> Path:
    """Text to shards, below `work`/run."""
    return run_on_wikipedia(work, YAML, options.megabytes)


def trainings(
    work: Path, directory: Path, space: Space, options: argparse.Namespace
) -> tuple[dict[Any, Any], dict[str, float], dict[str, list[float]]]:
    """({(recipe, s): {arch: [result per seed]}}, {arch: inherited loss}, {arch: [long loss per seed]})."""
    from frugalbert.train import inherited, short

    archs = [str(arch) for arch in space.enumerate()]
    places = {name: str(directory / name) for name in ("shards", "tokenizer")} | {"yaml": str(work)}
    settings = {"journal": work / "trained.jsonl", "workers": options.workers}
    fixed = {**places, "work": str(work / "trials"), "looks": 4, "rows": ROWS, "device": "cpu", "threads": 1}
    keys = list(itertools.product(RECIPES, options.short, range(options.short_seeds)))
    tasks = [{**fixed, "recipe": RECIPES[recipe], "steps": steps, "seed": seed, "arch": arch}
             for recipe, steps, seed in keys for arch in archs]  # fmt: skip
    results = iter(run_tasks(short.score, tasks, **settings, label="short"))
    shorts: dict[Any, Any] = {(recipe, steps): {arch: [] for arch in archs} for recipe, steps, _ in keys}
    for recipe, steps, _ in keys:
        for arch in archs:
            shorts[recipe, steps][arch].append(next(results))
    about = {**places, "work": str(work)}
    tasks = [{**about, "kind": "super-network", "steps": super_steps(space, options)}]
    for seed in range(
        options.long_seeds
    ):  # the first seed of all before the second of any; others than the short ones'
        tasks += [{**about, "kind": "long", "steps": options.long, "seed": 100 + seed, "arch": arch} for arch in archs]
    results = run_tasks(train, tasks, **settings, label="long")[1:]
    long = {arch: results[place :: len(archs)] for place, arch in enumerate(archs)}
    supernet = {**places, "supernet": str(work / "supernet"), "quality": "loss", "device": "cpu", "rows": ROWS}
    scored = [{**supernet, "threads": 1, "arch": arch} for arch in archs]
    losses = run_tasks(inherited.score, scored, journal=work / "inherited.jsonl", workers=1, label="inherited")
    return shorts, dict(zip(archs, losses, strict=True)), long


def train(task: dict[str, Any]) -> float:
    return (super_network if task["kind"] == "super-network" else train_long)(task)


def train_long(task: dict[str, Any]) -> float:
    """Held-out loss after training alone, on rows that no short training is judged by."""
    import torch

    from frugalbert.train import pretrain

    torch.set_num_threads(1)
    folder = Path(task["work"]) / "long" / run.fingerprint(task)[:16] / "pretrain"
    folder.mkdir(parents=True, exist_ok=True)
    validation = {"rows": 2 * ROWS, "every": 0.0, "begin_every": 0.0, "end_every": 0.0}
    values = {**RECIPES["muon"], "arch": task["arch"], "budget": f"{task['steps']}steps", "seed": task["seed"]}
    section = Pretrain.model_validate({**values, "validation": validation})
    inputs = {name: Path(task[name]) for name in ("shards", "tokenizer", "yaml")}
    loss = pretrain.build(section, inputs, folder, Machine(device="cpu", threads=1))["final_validation_loss"]
    shutil.rmtree(folder.parent)
    return loss


def super_steps(space: Space, options: argparse.Namespace) -> int:
    """Steps of a super-network that cost as much as the short trainings of all architectures by one recipe and seed."""
    from frugalbert.plan import flops_per_token

    alone = sum(training_flops(arch, VOCABULARY, LENGTH, 0.15) for arch in space.enumerate()) * options.super_like
    section = Supernet.model_validate({"budget": "1steps", "batch_size": BATCH})
    return round(alone / flops_per_token(section, space, VOCABULARY, LENGTH))


def super_network(task: dict[str, Any]) -> float:
    """Train the super-network of the space into `work`/supernet, with the record that `inherited` reads."""
    import torch

    from frugalbert.train import supernet

    torch.set_num_threads(1)
    out = Path(task["work"]) / "supernet"
    out.mkdir(exist_ok=True)
    section = Supernet.model_validate({**RECIPES["muon"], "budget": f"{task['steps']}steps"})
    inputs = {name: Path(task[name]) for name in ("shards", "tokenizer", "yaml")}
    inputs["space"] = Path(task["work"]) / "run" / "space"
    found = supernet.build(section, inputs, out, Machine(device="cpu", threads=1))
    run.write_json(out / run.RECORD, {"section": section.model_dump(mode="json"), "fingerprint": run.fingerprint(task)})
    return found["final_validation_loss"]


# ---- what it says ----------------------------------------------------------------------------------------------------


def cost(arch: Arch) -> dict[str, float]:
    return {"parameters": parameter_count(arch, VOCABULARY), "flops": LENGTH * forward_flops(arch, LENGTH)}


def analyse(
    space: Space, short: dict[Any, Any], inherited: dict[str, float], long: dict[str, list[float]],
    options: argparse.Namespace,
) -> dict[str, Any]:  # fmt: skip
    archs = list(long)
    losses = {arch: statistics.fmean(values) for arch, values in long.items()}
    judges: dict[str, dict[str, list[float]]] = {
        f"{recipe}, {steps} steps": {arch: [row["error"] if row else float("nan") for row in rows]
                                     for arch, rows in found.items()}
        for (recipe, steps), found in short.items()
    }  # fmt: skip
    judges["super-network"] = {arch: [loss] for arch, loss in inherited.items()}
    listed = ordered(Region(space, cost, Limit()), "flops")
    top = largest(listed, "flops")
    tops = {str(s): Maximum(top.name, s * top.parameters, s * top.inference) for s in SCALES}
    sizes = {"parameters": {arch: [-cost(Arch.parse(arch))["parameters"]] for arch in archs},
             "operations": {arch: [-cost(Arch.parse(arch))["flops"]] for arch in archs}}  # fmt: skip
    total = {f"{recipe}, {steps} steps": sum(row["tokens"] for rows in found.values() for row in rows if row)
             for (recipe, steps), found in short.items()}  # fmt: skip
    return {
        "options": {key: value for key, value in vars(options).items() if not isinstance(value, Path)},
        "space": len(archs),
        "super_steps": super_steps(space, options),
        "tokens_of_short_trainings": total,
        "architectures": {  # without what diverged
            arch: {
                **cost(Arch.parse(arch)),
                "long": long[arch],
                **{name: found[arch] for name, found in judges.items() if np.isfinite(found[arch]).all()},
            }
            for arch in archs
        },
        "failed": {name: int(sum(np.isnan(found[arch]).any() for arch in archs)) for name, found in judges.items()},
        "spread_of_long_losses": spread(long),
        "proxy": {name: correlations(found, losses, tops) for name, found in (judges | sizes).items()},
        "long_against_long": between_seeds(long),
        "picks": {scale: picks(space, judges, losses, maximum) for scale, maximum in tops.items()},
    }


def spread(long: dict[str, list[float]]) -> dict[str, float | None]:
    """Standard deviation between architectures, and within one between seeds."""
    rows = np.array(list(long.values()))
    within = float(np.sqrt(rows.var(axis=1, ddof=1).mean())) if rows.shape[1] > 1 else None
    return {"between": float(rows.mean(1).std(ddof=1)), "within": within}


def between_seeds(long: dict[str, list[float]]) -> float | None:
    """Kendall's tau of long losses with two seeds: no proxy can be expected to do better."""
    from scipy.stats import kendalltau

    rows = np.array(list(long.values()))
    return float(kendalltau(rows[:, 0], rows[:, 1])[0]) if rows.shape[1] > 1 else None


def w_of(arch: str, error: float, maximum: Maximum) -> float:
    costs = cost(Arch.parse(arch))
    return coefficient(maximum, costs["parameters"], costs["flops"], error, 1e-3)


def correlations(judge: dict[str, list[float]], losses: dict[str, float], tops: dict[str, Maximum]) -> dict[str, Any]:
    """Kendall's tau and Spearman's rho with the long loss, and of W by both for each maximum point (errors only)."""
    archs = [arch for arch in losses if np.isfinite(judge[arch]).all()]
    mine, theirs = [statistics.fmean(judge[arch]) for arch in archs], [losses[arch] for arch in archs]
    found: dict[str, Any] = {"error": ranks(mine, theirs)}
    if min(mine) > 0:
        for scale, maximum in tops.items():
            pairs = [(w_of(arch, statistics.fmean(judge[arch]), maximum), w_of(arch, losses[arch], maximum))
                     for arch in archs]  # fmt: skip
            found[f"W, T x {scale}"] = ranks(*zip(*pairs, strict=True))
    return found


def ranks(one: Any, two: Any) -> dict[str, Any]:
    from scipy.stats import kendalltau, spearmanr

    one, two = np.array(one), np.array(two)
    found: dict[str, Any] = {"architectures": len(one)}
    for name, function in (("tau", kendalltau), ("rho", spearmanr)):
        draws = [
            float(function(one[i], two[i])[0]) for i in np.random.default_rng(0).integers(0, len(one), (1000, len(one)))
        ]
        low, high = np.nanpercentile(draws, [2.5, 97.5])
        found[name] = {"value": float(function(one, two)[0]), "low": float(low), "high": float(high)}
    return found


def picks(
    space: Space, judges: dict[str, dict[str, list[float]]], losses: dict[str, float], maximum: Maximum
) -> dict[str, Any]:
    """What each way of choosing picks, and how good that is by W of the long loss."""
    best_arch = max(losses, key=lambda arch: w_of(arch, losses[arch], maximum))
    best = w_of(best_arch, losses[best_arch], maximum)

    def judged(arch: str) -> dict[str, Any]:
        w = w_of(arch, losses[arch], maximum)
        place = 1 + sum(w_of(other, losses[other], maximum) > w for other in losses)
        return {"arch": arch, "w_long_ratio": w / best if best else 1.0, "rank": place, "long_loss": losses[arch]}

    found: dict[str, Any] = {"best": judged(best_arch), "extraction": {}, "random": {}}
    for name, judge in judges.items():
        for interval, representative in itertools.product(INTERVALS, ("first", "middle", "last")):
            section = Extraction(interval=interval, representative=representative)
            with contextlib.redirect_stderr(io.StringIO()):
                result = extract(space, recorded(judge), cost, Limit(), section, maximum)
            mine = {str(one.candidate.arch): one.w for one in result.ranking}
            chosen = str(result.ranking[0].candidate.arch)
            whole = max(w for w in every_w(judge, maximum).values())
            row = {"visited": len(result.visited), "w_ratio": mine[chosen] / whole if whole else 1.0, **judged(chosen)}
            found["extraction"][f"{name}, interval {interval}, {representative}"] = row
        found["random"][name] = {str(i): random_choice(every_w(judge, maximum), losses, -(-len(losses) // i), judged)
                                 for i in INTERVALS}  # fmt: skip
    smallest = {
        key: min(losses, key=lambda arch, key=key: cost(Arch.parse(arch))[key]) for key in ("parameters", "flops")
    }
    smallest["both"] = max(losses, key=lambda arch: w_of(arch, 1.0, maximum))
    found["without training"] = {key: judged(arch) for key, arch in smallest.items()}
    found["one at random"] = statistics.fmean(judged(arch)["w_long_ratio"] for arch in losses)
    return found


def recorded(judge: dict[str, list[float]]) -> Callable[[list[Arch]], list[list[Errors | None]]]:
    def judged(archs: list[Arch]) -> list[list[Errors | None]]:
        rows = [judge[str(arch)] for arch in archs]
        return [[Errors(tuple(row)) if np.isfinite(row).all() else None] for row in rows]

    return judged


def every_w(judge: dict[str, list[float]], maximum: Maximum) -> dict[str, float]:
    return {arch: statistics.fmean(w_of(arch, error, maximum) for error in errors)
            for arch, errors in judge.items() if np.isfinite(errors).all()}  # fmt: skip


def random_choice(
    ws: dict[str, float], losses: dict[str, float], count: int, judged: Callable[[str], dict[str, Any]]
) -> dict[str, float]:
    """The best by W of `count` random architectures: mean ratios over draws, and the 5 % worst."""
    rng, archs, whole = np.random.default_rng(0), list(ws), max(ws.values())
    chosen = [max(rng.choice(archs, min(count, len(archs)), replace=False), key=lambda arch: ws[str(arch)])
              for _ in range(DRAWS)]  # fmt: skip
    ratios = [ws[str(arch)] / whole if whole else 1.0 for arch in chosen]
    known = {arch: judged(arch) for arch in {str(arch) for arch in chosen}}
    long = [known[str(arch)]["w_long_ratio"] for arch in chosen]
    return {"visited": count, "w_ratio": statistics.fmean(ratios), "w_ratio_worst": float(np.quantile(ratios, 0.05)),
            "w_long_ratio": statistics.fmean(long), "w_long_ratio_worst": float(np.quantile(long, 0.05)),
            "rank": statistics.fmean(known[str(arch)]["rank"] for arch in chosen),
            "long_loss": statistics.fmean(known[str(arch)]["long_loss"] for arch in chosen)}  # fmt: skip


# ---- what a person looks at ------------------------------------------------------------------------------------------


def plot(found: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name in found["proxy"] if name not in ("parameters", "operations")]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    for index, name in enumerate(names):
        rows = [row for row in found["architectures"].values() if name in row]
        tau = found["proxy"][name]["error"]["tau"]["value"]
        points = [(np.mean(row[name]), np.mean(row["long"])) for row in rows]
        left.scatter(*zip(*points, strict=True), s=12, color=f"C{index}", label=f"{name} (tau {tau:.2f})")
    left.set(xlabel="error surrogate, nats", ylabel="held-out loss after long training, nats")
    left.legend(fontsize=8)
    for index, name in enumerate(names):
        for scale, style in zip(found["picks"], ("-", "--", ":"), strict=True):
            part = found["picks"][scale]["extraction"]
            ratios = [part[f"{name}, interval {i}, first"]["w_long_ratio"] for i in INTERVALS]
            label = f"{name}, T x {scale}" if index == 0 or style == "-" else None
            right.plot(INTERVALS, ratios, style, marker="o", ms=3, color=f"C{index}", label=label)
    right.set(xlabel="interval", ylabel="W of the pick / best W, by the long loss", xticks=INTERVALS)  # fmt: skip
    right.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def report(found: dict[str, Any]) -> None:
    within = found["spread_of_long_losses"]
    seeds = f", {within['within']:.3f} between seeds" if within["within"] else ""
    print(f"{found['space']} architectures, all trained; long losses differ by {within['between']:.3f} between "
          f"architectures{seeds}; failed: {found['failed']}")  # fmt: skip
    for name, part in found["proxy"].items():
        told = [f"{what} {row['tau']['value']:.2f} [{row['tau']['low']:.2f}, {row['tau']['high']:.2f}]"
                for what, row in part.items()]  # fmt: skip
        print(f"Kendall's tau with long training, {name:18}", "; ".join(told))
    for scale, part in found["picks"].items():
        print(f"T x {scale}: best {part['best']['arch']}")
        for name, row in part["extraction"].items():
            if "first" in name:
                interval, judge = name.split(", interval ")[1].split(",")[0], name.split(", interval ")[0]
                chance = part["random"][judge][interval]
                print(f"  {name:36} visited {row['visited']:3}: W {row['w_ratio']:.3f} of the best, by long training "
                      f"{row['w_long_ratio']:.3f}, place {row['rank']} (random {chance['w_ratio']:.3f}, "
                      f"{chance['w_long_ratio']:.3f}, {chance['rank']:.1f}), "
                      f"{row['arch']}")  # fmt: skip
        for name, row in part["without training"].items():
            print(
                f"  smallest by {name:10} by long training {row['w_long_ratio']:.3f}, place {row['rank']}, "
                f"{row['arch']}"
            )


if __name__ == "__main__":
    main()
