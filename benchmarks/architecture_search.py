"""Is the search worth its while? One super-network on real Wikipedia text, and what it knows about its slices.

The run itself is the product's: corpus, tokenizer, shards, space, supernet, latency, search (`--work DIR`, continued
where it stood). Then:
  table      the inherited loss and predicted latency of every architecture of the space
             (for `benchmarks/search_methods.py DIR/table.jsonl`)
  proxy      Kendall's tau between the inherited loss and the loss after training alone, equal steps, 18 architectures,
             beside the number of parameters and of operations; 95 % bootstrap intervals
  end        under half the largest one's latency: the found architecture, a uniformly scaled BERT and a random one, all
             starting from their slice (and the found one from random weights), the same further training, several
             seeds: held-out loss, CoLA and RTE; every latency measured, extracted
Step budgets, so that a busy machine changes the waiting, not the result.
    python benchmarks/architecture_search.py --work DIR [--steps 1500] [--alone 200] [--further 300] [--seeds 3]
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from evidence import DATA, ROOT, interval, run_on_wikipedia

from frugalbert import run
from frugalbert.config import Finetune, Latency, Machine, Pretrain
from frugalbert.fanout import run_tasks
from frugalbert.model.arch import Arch
from frugalbert.model.cost import encoder_parameters, forward_flops
from frugalbert.space import Space

YAML = """
name: search
corpus: {{sources: [text/wiki.txt], held_out: 0.02}}
tokenizer: {{vocab_size: 4096}}
shards: {{length: 64}}
space: {{family: modern, depth: 1..4, hidden: 64..192/32, heads: 1..6, head_dim: 32, ffn: 128..512/64}}
supernet: {{budget: {steps}steps, batch_size: 32, optimizer: muon, learning_rate: 2e-3, mask: {{rate: [0.3, 0.15]}},
  checkpoints: {{every: 2m}}, validation: {{rows: 256, every: 0.1, begin_every: 0.1, end_every: 0.1}}}}
latency: {{architectures: 60, length: 64}}
search: {{limit: {{speedup: 2}}, evaluations: 150, rows: 256}}
"""
RECIPE = {"batch_size": 32, "optimizer": "muon", "learning_rate": 2e-3, "checkpoints": {"every": "1000000steps"},
          "validation": {"rows": 256, "every": 0.0, "begin_every": 0.0, "end_every": 0.0}}  # fmt: skip
TASKS = ("cola", "rte")


def main() -> None:
    options = parse()
    work = options.work.resolve()
    directory = pipeline(work, options)
    table = whole_table(directory, work, options)
    told = {name: str(value) for name, value in vars(options).items() if not isinstance(value, Path)}
    found: dict[str, Any] = {"space": len(table), "options": told}
    found["supernet"] = run.read_json(directory / "supernet" / "summary.json")["final_validation"]
    found["search"] = run.read_json(directory / "search" / "search.json")
    found["latency"] = run.read_json(directory / "latency" / "predictor.json")["report"]
    found["proxy"] = proxy(directory, work, table, options)
    found["end_to_end"] = end_to_end(directory, work, table, options)
    from throughput import environment

    found["environment"] = environment()
    run.write_json(options.out, found)
    plot(table, found, options.out.with_suffix(".png"))
    report(found)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500, help="of the super-network")
    parser.add_argument("--alone", type=int, default=200, help="steps of each architecture trained alone")
    parser.add_argument("--archs", type=int, default=18, help="trained alone")
    parser.add_argument("--further", type=int, default=300, help="steps after extraction")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=20, help="of Wikipedia text")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "architecture_search.json")
    return parser.parse_args()


# ---- the run ---------------------------------------------------------------------------------------------------------


def pipeline(work: Path, options: argparse.Namespace) -> Path:
    """The stages up to search, below `work`/run."""
    return run_on_wikipedia(work, YAML.format(steps=options.steps), options.megabytes)


def whole_table(directory: Path, work: Path, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """{arch: {score, latency_ms}} of the whole space, also written to `work`/table.jsonl."""
    from frugalbert.measure import predictor
    from frugalbert.train import inherited

    space = Space.from_json(run.read_json(directory / "space" / "space.json"))
    archs = list(space.enumerate())
    fixed = {name: str(directory / name) for name in ("supernet", "shards", "tokenizer")}
    fixed |= {"yaml": str(work), "quality": "loss", "device": "cpu", "rows": 256, "threads": 1}
    tasks = [{**fixed, "arch": str(arch)} for arch in archs]
    journal = work / "table-journal.jsonl"
    scores = run_tasks(inherited.score, tasks, journal=journal, workers=options.workers, label="table")
    times = predictor.load(directory / "latency" / "predictor.json").predict_many(archs)
    rows = {str(a): {"score": s, "latency_ms": float(t)} for a, s, t in zip(archs, scores, times, strict=True)}
    lines = [json.dumps({"arch": arch, **row}) for arch, row in rows.items()]
    run.write_atomic(work / "table.jsonl", "\n".join(lines) + "\n")
    return rows


# ---- training one architecture ---------------------------------------------------------------------------------------


def train(task: dict[str, Any]) -> dict[str, Any]:
    """Pre-train `arch` (from its slice with `inherit`), fine-tune it if there are tasks; held-out loss and metrics."""
    import torch

    from frugalbert.finetune import runner
    from frugalbert.train import inherited, pretrain

    torch.set_num_threads(1)
    directory, folder = Path(task["run"]), Path(task["work"]) / "trained" / run.fingerprint(task)[:16]
    folder.mkdir(parents=True, exist_ok=True)
    machine = Machine(device="cpu", threads=1)
    values = {**RECIPE, "arch": task["arch"], "budget": f"{task['steps']}steps", "seed": task["seed"]}
    if task["inherit"]:
        inherited.extract(directory / "supernet", Arch.parse(task["arch"])).save_pretrained(folder / "start")
        values["start"] = str(folder / "start")
    inputs = {name: directory / name for name in ("shards", "tokenizer")} | {"yaml": folder}
    (folder / "pretrain").mkdir(exist_ok=True)
    pretrain.build(Pretrain.model_validate(values), inputs, folder / "pretrain", machine)
    summary = run.read_json(folder / "pretrain" / "summary.json")
    found = {"loss": summary["final_validation_loss"]}
    if task["tasks"]:
        section = Finetune.model_validate(
            {"tasks": task["tasks"], "data": str(DATA / "glue"), "seeds": [task["seed"]], "random_baseline": False,
             "learning_rate": 3e-4, "epochs": 3.0}
        )  # fmt: skip
        (folder / "finetune").mkdir(exist_ok=True)
        places = {"pretrain": folder / "pretrain", "tokenizer": directory / "tokenizer", "yaml": folder}
        runner.build(section, places, folder / "finetune", machine)
        found |= {row["task"]: row["mean"] for row in run.read_json(folder / "finetune" / "results.json")}
    return found


def trainings(work: Path, directory: Path, tasks: list[dict[str, Any]], options: argparse.Namespace) -> list[Any]:
    fixed = {"run": str(directory), "work": str(work)}
    journal = work / "trained-journal.jsonl"
    return run_tasks(train, [{**fixed, **t} for t in tasks], journal=journal, workers=options.workers, label="train")


# ---- does the inherited loss say anything? ---------------------------------------------------------------------------


def proxy(directory: Path, work: Path, table: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    from scipy.stats import kendalltau

    space = Space.from_json(run.read_json(directory / "space" / "space.json"))
    rng, chosen = np.random.default_rng(1), dict[str, Arch]()
    while len(chosen) < options.archs:
        arch = space.sample_stratified(rng)
        chosen[str(arch)] = arch
    tasks = [{"arch": text, "steps": options.alone, "seed": 0, "inherit": False, "tasks": []} for text in chosen]
    alone = [item["loss"] for item in trainings(work, directory, tasks, options)]
    signs = {
        "inherited loss": [table[text]["score"] for text in chosen],
        "parameters": [-encoder_parameters(arch) for arch in chosen.values()],
        "operations": [-forward_flops(arch, 64) for arch in chosen.values()],
    }
    rows = [
        {"arch": text, "alone": alone[i], **{k: float(v[i]) for k, v in signs.items()}} for i, text in enumerate(chosen)
    ]
    found: dict[str, Any] = {"architectures": rows, "steps_alone": options.alone}
    for name, values in signs.items():
        draws = [kendalltau(np.array(values)[i], np.array(alone)[i]).statistic
                 for i in np.random.default_rng(0).integers(0, len(alone), (2000, len(alone)))]  # fmt: skip
        low, high = np.nanpercentile(draws, [2.5, 97.5])
        found[name] = {"tau": float(kendalltau(values, alone).statistic), "interval": [float(low), float(high)]}
    return found


# ---- at equal latency, what is better? -------------------------------------------------------------------------------


def uniform_bert(table: dict[str, Any], limit: float) -> str:
    """The slowest architecture within the limit that has BERT's proportions: heads fill hidden, ffn 8/3 hidden (with a
    gate that has the parameters of BERT's 4 hidden) as near as the grid allows. Of those within 10 % of its time, the
    one whose depth : width is nearest to 12 : 768."""
    rows = []
    for text, row in table.items():
        layer = Arch.parse(text).layers[0]
        if abs(layer.ffn - 8 / 3 * layer.hidden) <= 32 and layer.qkv == layer.hidden and row["latency_ms"] <= limit:
            depth = len(Arch.parse(text).layers)
            rows.append((row["latency_ms"], abs(depth / layer.hidden - 12 / 768), text))
    best = max(row[0] for row in rows)
    return min((row for row in rows if row[0] >= 0.9 * best), key=lambda row: row[1])[2]


def end_to_end(directory: Path, work: Path, table: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    from frugalbert.measure import predictor
    from frugalbert.measure import table as timings

    found = predictor.load(directory / "latency" / "predictor.json")
    largest = Space.from_json(run.read_json(directory / "space" / "space.json")).largest()
    limit = found.predict(largest) / 2
    searched = str(Arch.from_json(run.read_json(directory / "search" / "arch.json")))
    near = [text for text, row in table.items() if 0.85 * limit <= row["latency_ms"] <= limit]
    rng = np.random.default_rng(7)
    arms: dict[str, list[str]] = {
        "found by the search": [searched] * options.seeds,
        "uniformly scaled BERT": [uniform_bert(table, limit)] * options.seeds,
        "random within the limit": [near[int(rng.integers(len(near)))] for _ in range(options.seeds)],
        "found, from random weights": [searched] * options.seeds,
    }
    tasks = [
        {"arch": text, "steps": options.further, "seed": seed, "inherit": "random weights" not in name, "tasks": TASKS}
        for name, texts in arms.items()
        for seed, text in enumerate(texts)
    ]
    results = iter(trainings(work, directory, tasks, options))
    section = Latency.model_validate(run.read_json(directory / "latency" / "stage.json")["section"])
    texts = sorted({text for texts in arms.values() for text in texts})
    rows = timings.remeasure([Arch.parse(text) for text in texts], found, section, work / "measured.jsonl")
    measured = dict(zip(texts, (row["median_ms"] for row in rows), strict=True))
    out: dict[str, Any] = {"limit_ms": limit, "largest": str(largest), "arms": {}}
    for name, texts in arms.items():
        mine = [next(results) for _ in texts]
        out["arms"][name] = {
            "archs": texts,
            "predicted_ms": [table[text]["latency_ms"] for text in texts],
            "measured_ms": [measured[text] for text in texts],
            "violations": sum(measured[text] > limit for text in set(texts)),
            **{key: [item[key] for item in mine] for key in mine[0]},
        }
    out["found_minus"] = {
        other: {key: interval(out["arms"]["found by the search"][key], out["arms"][other][key])
                for key in ("loss", *TASKS)}
        for other in arms if other != "found by the search"
    }  # fmt: skip
    return out


# ---- what a person looks at ------------------------------------------------------------------------------------------


def plot(table: dict[str, Any], found: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    rows = list(table.values())
    left.scatter([r["latency_ms"] for r in rows], [r["score"] for r in rows], s=5, color="0.7", label="whole space")
    chosen = found["search"]["finalists"]
    left.scatter([r["latency_ms"] for r in chosen], [r["score"] for r in chosen], s=22, color="C3", label="finalists")
    left.axvline(found["end_to_end"]["limit_ms"], color="k", lw=0.8, ls=":", label="limit")
    left.set(xlabel="predicted latency, ms", ylabel="inherited held-out loss, nats")
    left.legend()
    archs = found["proxy"]["architectures"]
    right.scatter([r["inherited loss"] for r in archs], [r["alone"] for r in archs], s=22)
    tau = found["proxy"]["inherited loss"]["tau"]
    right.set(xlabel="inherited loss, nats", ylabel="loss after training alone, nats", title=f"Kendall's tau {tau:.2f}")
    figure.savefig(path, dpi=110)


def report(found: dict[str, Any]) -> None:
    print(f"space {found['space']} architectures; super-network "
          + ", ".join(f"{k} {v:.3f}" for k, v in found["supernet"].items() if "loss" in k))  # fmt: skip
    for name in ("inherited loss", "parameters", "operations"):
        row = found["proxy"][name]
        print(f"proxy {name:15} tau {row['tau']:.2f} [{row['interval'][0]:.2f}, {row['interval'][1]:.2f}]")
    for name, arm in found["end_to_end"]["arms"].items():
        means = {key: statistics.mean(arm[key]) for key in ("measured_ms", "loss", *TASKS)}
        print(f"{name:28}" + "  ".join(f"{key} {value:.3f}" for key, value in means.items()), arm["archs"][0])
    for other, row in found["end_to_end"]["found_minus"].items():
        print(
            f"found minus {other}: " + ", ".join(f"{k} {v['mean']} [{v['low']}, {v['high']}]" for k, v in row.items())
        )


if __name__ == "__main__":
    main()
