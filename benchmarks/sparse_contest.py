"""Which pairs of tokens are worth keeping? Learned and fixed attention masks of one density, trained from scratch.

Corpus, tokenizer and shards are the product's stages on real Wikipedia text (`--work DIR`, continued where it stood).
512 pieces are its vocabulary, so that what stands near matters and a small encoder sees it within minutes.
Every mask keeps 1,666 of 128 x 128 pairs, LogSparse's number (10.2 %), exact to one pair of pairs; the families of the
others are filled up (`frugalbert.search.densities`). Then the same encoder is trained with each, same data, order,
steps and seeds.
  unstructured, toeplitz, block   masks learnt by the stage `attention` (DAMu, DAMs, and blocks of 8), one search per
                                  seed, of as many steps as a training; then trained anew from scratch
  ..., continued                  the same masks, going on from the weights that learnt with them: twice the steps
  band, strided, fixed, longformer, logsparse, bigbird, star   fixed patterns, all heads alike
  random 0 ... 4                  five draws, each head with pairs of its own
  dense                           all pairs: another density, for scale
Held-out masked-LM loss and SST-2 (2,000 training examples), paired by seed, with 95 % intervals of differences to band.

    python benchmarks/sparse_contest.py --work DIR [--steps 600] [--seeds 3] [--random-seeds 1] [--workers 2]
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from evidence import DATA, ROOT, interval, run_on_wikipedia

from frugalbert import run
from frugalbert.config import Attention, Finetune, Machine, Pretrain
from frugalbert.fanout import run_tasks
from frugalbert.model.arch import Arch
from frugalbert.model.patterns import blocks, parse
from frugalbert.search.densities import filled, scattered

ARCH, LENGTH, HEADS, DENSITY = "modern 2x128 heads=4 ffn=256", 128, 4, 1666 / 128**2
YAML = """
name: sparse-contest
machine: {threads: 1}
corpus: {sources: [text/wiki.txt], held_out: 0.02}
tokenizer: {kind: bpe, vocab_size: 512}
shards: {length: 128}
"""
RECIPE = {"batch_size": 32, "optimizer": "muon", "learning_rate": 2e-3, "mask": {"rate": 0.15, "style": "bert"},
          "checkpoints": {"every": "1000000steps"},
          "validation": {"rows": 512, "every": 0.25, "begin_every": 0.25, "end_every": 0.25}}  # fmt: skip
LEARNED = {"unstructured": {"structure": "unstructured"}, "toeplitz": {"structure": "toeplitz"},
           "block": {"structure": "block", "block": 8}}  # fmt: skip
FAMILIES = {"band": "window:{}", "strided": "strided:{}/16", "fixed": "fixed:{}/1/16", "longformer": "window:{}&0+64",
            "bigbird": "bigbird:1/{}/0/128&0", "star": "window:{}&0"}  # fmt: skip
DRAWS = 5


def main() -> None:
    options = parse_options()
    work = options.work.resolve()
    directory = run_on_wikipedia(work, YAML, options.megabytes)
    seeds = range(options.seeds)
    shared = {"run": str(directory), "work": str(work), "steps": options.steps}
    searches = [{**shared, "name": name, "seed": seed} for seed in seeds for name in LEARNED]
    found = run_tasks(search, searches, journal=work / "searches.jsonl", workers=options.workers, label="searches")
    tasks = fixed(shared, options)
    for task, facts in zip(searches, found, strict=True):
        more = {**shared, "seed": task["seed"], "pattern": facts["pattern"]}
        tasks.append({**more, "name": task["name"], "start": None})
        if options.continued:
            tasks.append({**more, "name": f"{task['name']}, continued", "start": facts["model"]})
    tasks.sort(key=lambda task: task["seed"])
    results = run_tasks(train, tasks, journal=work / "trainings.jsonl", workers=options.workers, label="trainings")
    rows = summarise(tasks, results)
    from throughput import environment

    searched = [{key: value for key, value in facts.items() if key != "model"} for facts in found]
    settings = {"arch": ARCH, "density": DENSITY, "steps": options.steps, "seeds": options.seeds, "recipe": RECIPE}
    run.write_json(options.out, {**settings, "searches": searched, "rows": rows, "environment": environment()})
    plot(rows, options.out.with_suffix(".png"))
    report(rows)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--random-seeds", type=int, default=1, help="trainings of each random mask")
    parser.add_argument("--megabytes", type=int, default=8, help="of Wikipedia text")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--no-continued", dest="continued", action="store_false")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "sparse_contest.json")
    return parser.parse_args()


def fixed(shared: dict[str, Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Trainings under masks that nobody learnt. Random masks take seeds in turn, so that all seeds are used."""
    patterns = {name: filled(family, DENSITY, LENGTH) for name, family in FAMILIES.items()}
    patterns |= {"logsparse": "logsparse", "dense": "dense"}
    tasks = [
        {**shared, "name": name, "pattern": pattern, "start": None, "seed": seed}
        for name, pattern in patterns.items() for seed in range(options.seeds)
    ]  # fmt: skip
    for draw in range(DRAWS):
        pattern = "|".join(scattered(DENSITY, LENGTH, HEADS * draw + head) for head in range(HEADS))
        for turn in range(options.random_seeds):
            seed = (draw + turn) % options.seeds
            tasks.append({**shared, "name": f"random {draw}", "pattern": pattern, "start": None, "seed": seed})
    return tasks


# ---- tasks -----------------------------------------------------------------------------------------------------------


def inputs_of(task: dict[str, Any], kind: str) -> tuple[dict[str, Path], Path]:
    import torch

    torch.set_num_threads(1)
    directory = Path(task["run"])
    folder = Path(task["work"]) / kind / run.fingerprint(task)[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return {name: directory / name for name in ("shards", "tokenizer", "corpus")} | {"yaml": folder}, folder


def search(task: dict[str, Any]) -> dict[str, Any]:
    """A search of one structure; its pattern, facts and weights."""
    from frugalbert.search import attention

    inputs, folder = inputs_of(task, "searches")
    out = folder / "attention"
    out.mkdir(exist_ok=True)
    values = {**RECIPE, **LEARNED[task["name"]], "arch": ARCH, "density": DENSITY, "mask_learning_rate": 0.05}
    values |= {"budget": f"{task['steps']}steps", "seed": task["seed"]}
    attention.build(Attention.model_validate(values), inputs, out, Machine(device="cpu", threads=1))
    facts = run.read_json(out / "masks.json")
    keep = ("density", "densities", "occupancy", "expected_density", "threshold_density", "undecided", "repaired")
    return {
        "name": task["name"], "seed": task["seed"], "pattern": facts["patterns"][0], "model": str(out / "model"),
        **{name: facts[name] for name in keep},
    }  # fmt: skip


def train(task: dict[str, Any]) -> dict[str, Any]:
    """Train and fine-tune under one pattern."""
    from frugalbert.finetune import runner
    from frugalbert.train import pretrain

    inputs, folder = inputs_of(task, "trainings")
    (folder / "pretrain").mkdir(exist_ok=True)
    arch = str(Arch.parse(f"{ARCH} pattern={task['pattern']}"))
    values = {**RECIPE, "arch": arch, "start": task["start"], "budget": f"{task['steps']}steps", "seed": task["seed"]}
    machine = Machine(device="cpu", threads=1)
    pretrain.build(Pretrain.model_validate(values), inputs, folder / "pretrain", machine)
    section = Finetune.model_validate(
        {"tasks": ["sst2"], "data": str(DATA / "glue"), "seeds": [task["seed"]], "random_baseline": False,
         "learning_rate": 3e-4, "epochs": 2.0, "max_length": 64, "max_train_examples": 2000}
    )  # fmt: skip
    (folder / "finetune").mkdir(exist_ok=True)
    runner.build(section, {**inputs, "pretrain": folder / "pretrain"}, folder / "finetune", machine)
    summary = run.read_json(folder / "pretrain" / "summary.json")
    (row,) = run.read_json(folder / "finetune" / "results.json")
    found = {"loss": summary["final_validation_loss"], "sst2": row["mean"]}
    return found | {name: summary[f"{name}_nll"] for name in ("unigram", "bigram")}


# ---- tables ----------------------------------------------------------------------------------------------------------


def summarise(tasks: list[dict[str, Any]], results: list[dict[str, Any]]) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for task, result in zip(tasks, results, strict=True):
        name = "random" if task["name"].startswith("random") else task["name"]
        row = rows.setdefault(name, {"seed": [], "loss": [], "sst2": [], "occupancy_32": []})
        heads = parse(task["pattern"])
        row["occupancy_32"].append(sum(float(blocks(head, LENGTH, 32).mean()) for head in heads) / len(heads))
        row["seed"].append(task["seed"])
        for key in ("loss", "sst2"):
            row[key].append(result[key])
    band = rows["band"]
    for row in rows.values():
        for key in ("loss", "sst2"):
            other = [band[key][band["seed"].index(seed)] for seed in row["seed"]]
            row[f"{key}_minus_band"] = interval(row[key], other)
    return dict(sorted(rows.items(), key=lambda item: statistics.mean(item[1]["loss"]))) | {
        "baselines": {name: results[0][name] for name in ("unigram", "bigram")}
    }


def plot(rows: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 5), constrained_layout=True)
    names = [name for name in rows if name != "baselines"]
    for place, name in enumerate(reversed(names)):
        axis.scatter(rows[name]["loss"], [place] * len(rows[name]["loss"]), s=14, color="C0", alpha=0.5)
        axis.scatter(statistics.mean(rows[name]["loss"]), place, s=60, marker="|", color="C3")
    axis.set_yticks(range(len(names)), list(reversed(names)))
    axis.axvline(rows["baselines"]["bigram"], color="0.6", ls=":", label="bigram")
    axis.set(xlabel="held-out masked-LM loss, nats (a dot per training, a bar for the mean)")
    axis.set_title(f"Attention masks at {DENSITY:.1%} of the pairs, trained from scratch")
    axis.legend()
    figure.savefig(path, dpi=110)


def report(rows: dict[str, Any]) -> None:
    for name, row in rows.items():
        if name != "baselines":
            gap = row["loss_minus_band"]
            print(f"{name:24} loss {statistics.mean(row['loss']):.3f}  minus band {gap['mean']:+.3f} "
                  f"[{gap['low']:+.3f}, {gap['high']:+.3f}]  sst2 {statistics.mean(row['sst2']):.3f}  "
                  f"32 x 32 blocks {statistics.mean(row['occupancy_32']):.0%}  n {len(row['loss'])}")  # fmt: skip
    print(rows["baselines"])


if __name__ == "__main__":
    main()
