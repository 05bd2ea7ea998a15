"""How to train a super-network: which slices a step trains, what they learn, what it may move.

Variants with the same steps, batches and number of architectures per step, several seeds, on the shards and the space
of a finished run (`benchmarks/architecture_search.py --work DIR` leaves one in DIR/run). Held-out loss of the largest,
the median and the smallest slice; seconds, because the variants do not cost the same.
    python benchmarks/supernet_training.py RUN [--steps 300] [--seeds 2]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from frugalbert import run  # noqa: E402
from frugalbert.config import Machine, Supernet  # noqa: E402
from frugalbert.fanout import run_tasks  # noqa: E402

VARIANTS: dict[str, dict[str, Any]] = {
    "sandwich": {},
    "sandwich, no in-place distillation": {"inplace_weight": 0.0},
    "random, only sampled weights move": {"sampling": "random", "random_archs": 4},
    "random, all weights move": {"sampling": "random", "random_archs": 4, "update": "all"},
}
SIZES = ("", "_median", "_smallest")


def train(task: dict[str, Any]) -> dict[str, float]:
    import torch

    from frugalbert.train import supernet

    torch.set_num_threads(1)
    directory, out = Path(task["run"]), Path(task["out"])
    out.mkdir(parents=True, exist_ok=True)
    inputs = {name: directory / name for name in ("shards", "tokenizer", "space")} | {"yaml": directory}
    section = Supernet.model_validate(
        {"budget": f"{task['steps']}steps", "batch_size": 32, "optimizer": "muon",
         "learning_rate": 2e-3, "seed": task["seed"],
         "checkpoints": {"every": "1000000steps"}, **task["variant"],
         "validation": {"rows": 256, "every": 0.0, "begin_every": 0.0, "end_every": 0.0}}
    )  # fmt: skip
    supernet.build(section, inputs, out, Machine(device="cpu", threads=1))
    summary = run.read_json(out / "summary.json")
    losses = {size: summary["final_validation"][f"validation_loss{size}"] for size in SIZES}
    return {**losses, "seconds": summary["cost_seconds"]["train"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "supernet_training.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tasks = [
            {"run": str(options.run.resolve()), "out": f"{folder}/{number}-{seed}", "variant": variant,
             "steps": options.steps, "seed": seed}
            for number, variant in enumerate(VARIANTS.values()) for seed in range(options.seeds)
        ]  # fmt: skip
        results = iter(
            run_tasks(train, tasks, journal=Path(folder) / "journal", workers=options.workers, label="train")
        )
        rows = {name: [next(results) for _ in range(options.seeds)] for name in VARIANTS}
    from throughput import environment

    where = environment()
    run.write_json(options.out, {"steps": options.steps, "variants": rows, "environment": where})
    print(f"{'variant':38}{'largest':>16}{'median':>16}{'smallest':>16}{'seconds':>9}")
    for name, found in rows.items():
        cells = []
        for size in SIZES:
            values = [row[size] for row in found]
            cells.append(f"{statistics.mean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0:.3f}")
        seconds = statistics.mean(row["seconds"] for row in found)
        print(f"{name:38}" + "".join(f"{cell:>16}" for cell in cells) + f"{seconds:9.0f}")


if __name__ == "__main__":
    main()
