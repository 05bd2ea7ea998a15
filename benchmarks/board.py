"""What half an hour of pre-training is worth downstream: small tasks, beside the same architecture untrained.

The small tasks of GLUE and SuperGLUE fine-tuned from the encoder and from random weights (same recipe, same seeds,
nothing chosen on any score) and BLiMP without training. Intervals: over seeds (Student's t of paired differences) and
over examples (bootstrap). At most 2,000 training examples a task and 50 pairs of a BLiMP paradigm; RTE is the same in
both boards; MultiRC takes an hour here and is left out; WNLI and WSC are there though they rank nothing. The scores are
not leaderboard scores.

  frugalbert run benchmarks/board_encoder.yaml          # the encoder: 30 minutes of Wikipedia on two cores
  python benchmarks/board.py runs/board-encoder/pretrain/model --data ../shared/data
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from evidence import ROOT, told

TASKS = "cola sst2 mrpc stsb cb copa superglue-rte axb axg wic wnli wsc blimp".split()
TINY = {name: {"epochs": 20.0} for name in ("cb", "copa")}
RECIPE: dict[str, Any] = {
    "learning_rate": 1e-3,
    "batch_size": 32,
    "epochs": 5.0,
    "max_length": 128,
    "max_train_examples": 2000,
    "blimp_pairs": 50,
    "per_task": TINY,
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a pre-trained encoder's directory")
    parser.add_argument("--data", default=str(ROOT.parent / "shared" / "data"))
    parser.add_argument("--work", default=str(ROOT / "evals" / "board"), help="continues where it stands")
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--pooling", choices=["cls", "mean"], default="mean", help="what the classifiers read")
    parser.add_argument("--workers", type=int, default=2, help="trials at a time")
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "board.json"))
    return parser.parse_args()


@told()
def main() -> None:
    from pretrained_vs_random import with_pooling
    from throughput import environment, save

    from frugalbert import config, run
    from frugalbert.finetune import board

    options = parse()
    work = Path(options.work)
    model = with_pooling(Path(options.model), options.pooling, work.parent)
    settings = {**RECIPE, "tasks": tuple(options.tasks), "seeds": tuple(options.seeds), "data": options.data}
    section = config.Finetune.model_validate(settings)
    board.evaluate(str(model), section, work, config.Machine(threads=options.threads, workers=options.workers))
    found = run.read_json(work / "board.json")
    for pairs in found["blimp"].values():
        pairs.pop("paradigms")
    about = run.read_record(Path(options.model).parent) or {}
    pretraining = {name: about.get(name) for name in ("section", "metrics", "seconds")}
    what = (__doc__ or "").split("\n", 1)[0]
    save(options.out, {"benchmark": what, "pretraining": pretraining, **found, "environment": environment()})


if __name__ == "__main__":
    main()
