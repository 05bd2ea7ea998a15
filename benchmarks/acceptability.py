"""A small task that pre-training should help: which single sentences are grammatical, learnt from BLiMP's pairs.

Of each of BLiMP's 67 paradigms (Warstadt et al. 2020, arXiv 1912.00582) 30 pairs give 60 labelled sentences to train on
and 30 others 60 to evaluate on; pairs never straddle. Not the benchmark's own use (that is `blimp`, without training).
The encoder against the same architecture from random weights: same recipe, seeds, epochs; nothing chosen on the scores.

  python benchmarks/acceptability.py RUN/pretrain/model --work DIR
"""

from __future__ import annotations

import argparse
import csv
import json
import random
from pathlib import Path

from evidence import DATA, ROOT, told

PAIRS = 30


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a pre-trained encoder's directory")
    parser.add_argument("--work", required=True, type=Path, help="continues where it stands")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--epochs", type=float, default=5.0)
    parser.add_argument("--pooling", choices=["cls", "mean"], default="mean")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "acceptability.json"))
    return parser.parse_args()


def write_task(blimp: Path, folder: Path) -> None:
    """train.csv and dev.csv below `folder`."""
    chance, sets = random.Random(0), {"train": [], "dev": []}
    for path in sorted(blimp.glob("*.jsonl")):
        pairs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        chosen = chance.sample(pairs, 2 * PAIRS)
        for name, part in (("train", chosen[:PAIRS]), ("dev", chosen[PAIRS:])):
            sets[name] += [(pair[f"sentence_{label}"], label) for pair in part for label in ("good", "bad")]
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in sets.items():
        with open(folder / f"{name}.csv", "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *rows])


@told()
def main() -> None:
    from pretrained_vs_random import with_pooling
    from throughput import environment, save

    from frugalbert import config, run
    from frugalbert.finetune import board

    options = parse()
    write_task(DATA / "blimp", options.work / "task")
    task = {"name": "acceptability", "train": str(options.work / "task" / "train.csv"),
            "dev": str(options.work / "task" / "dev.csv"), "columns": {"text": "text", "label": "label"}}  # fmt: skip
    section = config.Finetune.model_validate({
        "tasks": [task], "seeds": options.seeds, "learning_rate": options.learning_rate, "epochs": options.epochs,
        "batch_size": 32, "max_length": 64,
    })  # fmt: skip
    model = with_pooling(Path(options.model), options.pooling, options.work)
    machine = config.Machine(threads=1, workers=options.workers)
    board.evaluate(str(model), section, options.work / "evaluation", machine)
    found = run.read_json(options.work / "evaluation" / "board.json")
    what = (__doc__ or "").split("\n", 1)[0]
    settings = {name: getattr(options, name) for name in ("seeds", "learning_rate", "epochs", "pooling")}
    save(options.out, {"benchmark": what, "options": settings, "rows": found["rows"], "environment": environment()})


if __name__ == "__main__":
    main()
