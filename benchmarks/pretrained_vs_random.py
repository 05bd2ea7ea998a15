"""What pre-training is worth: one run's encoder and the same architecture from random weights, fine-tuned alike.

Takes a finished run directory (the quickstart's) and gives its model, tokenizer and corpus to the `finetune` stage
itself: same recipe, same seeds, one evaluation after the last step. Seeds pair a pre-trained trial with a random one
(same order of examples), so the gain is a mean of paired differences with its 95 % interval (Student's t).
Lists of settings make every combination; `--no-random` looks at the pre-trained side alone. Seconds are those of a
machine in use; steps are what a setting costs.

  python benchmarks/pretrained_vs_random.py runs/quickstart
  python benchmarks/pretrained_vs_random.py runs/quickstart --seeds 0 --no-random --learning-rate 2e-4 5e-4 1e-3 \\
      --epochs 3 4 6 --pooling cls mean --out /tmp/grid.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", default=str(ROOT / "runs" / "quickstart"), help="a finished run directory")
    parser.add_argument("--task", default="python-docs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4, 5, 6])
    parser.add_argument("--learning-rate", type=float, nargs="+", default=[5e-4])
    parser.add_argument("--epochs", type=float, nargs="+", default=[4.0])
    parser.add_argument("--pooling", nargs="+", choices=["cls", "mean"], default=["cls"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-random", action="store_true")
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "pretrained_vs_random.json"))
    return parser.parse_args()


def with_pooling(model: Path, pooling: str, folder: Path) -> Path:
    """A copy of the model's directory whose classification head reads `[CLS]` or the mean of the tokens."""
    copy = folder / f"model-{pooling}"
    folder.mkdir(parents=True, exist_ok=True)
    if not copy.exists():
        shutil.copytree(model, copy)
        settings = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**settings, "classifier_pooling": pooling}))
    return copy


def measure(options: argparse.Namespace, folder: Path, setting: tuple[float, float, str]) -> dict[str, Any]:
    """One row: the settings, and the stage's own results for them."""
    from frugalbert import config
    from frugalbert.finetune import runner
    from frugalbert.run import read_json

    learning_rate, epochs, pooling = setting
    directory = Path(options.run).resolve()
    section = config.Finetune.model_validate({
        "tasks": [options.task], "seeds": options.seeds, "learning_rate": learning_rate, "epochs": epochs,
        "model": str(with_pooling(directory / "pretrain" / "model", pooling, folder)),
        "random_baseline": not options.no_random,
    })  # fmt: skip
    out = folder / f"{learning_rate:g}-{epochs:g}-{pooling}"
    out.mkdir()
    inputs = {"yaml": folder, "tokenizer": directory / "tokenizer", "corpus": directory / "corpus"}
    runner.build(section, inputs, out, config.Machine(device="cpu", threads=options.threads))
    rows = {row["init"]: row for row in read_json(out / "results.json")}
    first = read_json(next(out.glob("*/pretrained-seed*/result.json")))
    row: dict[str, Any] = {"learning_rate": learning_rate, "epochs": epochs, "pooling": pooling}
    row |= {"steps": first["steps"], "metric": first["metric"], "gain": rows["pretrained"].get("gain")}
    for init, found in rows.items():
        row[init] = {name: found[name] for name in ("values", "mean", "std", "interval")}
    return row


def show(row: dict[str, Any]) -> None:
    """One line of a Markdown table."""
    cells = [f"{row['learning_rate']:g}", f"{row['epochs']:g}", row["pooling"], str(row["steps"])]
    for init in ("pretrained", "random"):
        found = row.get(init)
        spread = f" ± {found['std']:.3f}" if found and found["std"] is not None else ""
        cells.append(f"{found['mean']:.3f}{spread}" if found else "")
    gain = row["gain"]
    bounds = "" if gain is None or None in gain["interval"] else " [{:+.3f}, {:+.3f}]".format(*gain["interval"])
    print(f"| {' | '.join(cells)} | {'' if gain is None else format(gain['mean'], '+.3f') + bounds} |", flush=True)


def main() -> None:
    options = parse()
    if not (Path(options.run) / "pretrain" / "summary.json").exists():
        sys.exit(f"{options.run} has no finished pre-training; run `frugalbert run configs/quickstart.yaml` first")
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    from throughput import environment, save

    print("| learning rate | epochs | pooling | steps | pre-trained | random | gain [95 %] |\n" + "|---" * 7 + "|")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for setting in itertools.product(options.learning_rate, options.epochs, options.pooling):
            rows.append(measure(options, Path(name), setting))
            show(rows[-1])
    summary = json.loads((Path(options.run) / "pretrain" / "summary.json").read_text())
    kept = ("arch", "steps", "tokens", "seconds", "final_validation_loss")
    result = {
        "benchmark": "pre-trained against random weights, fine-tuned alike; gain = mean of differences paired by seed",
        "task": options.task, "seeds": options.seeds, "rows": rows,
        "pretraining": {key: summary[key] for key in kept},
        "environment": environment(),
    }  # fmt: skip
    save(options.out, result)


if __name__ == "__main__":
    main()
