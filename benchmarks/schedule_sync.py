"""Schedule length against training length (24hBERT, arXiv 2104.07705): same steps, schedules x1, x3, x9.

The same small model sees the same number of steps in every arm; the learning-rate schedule (linear decay after warm-up)
is made for one, three or nine times as many and cut off (`pretrain.stop_at` 1, 1/3, 1/9 of a budget scaled by 1, 3, 9).
Budgets are counted in steps, so a busy machine changes how long it takes and not what comes out. Two kinds of arm:
  x3, x9                 the same warm-up steps as x1: only the decay differs
  x3-warmup, x9-warmup   warm-up is a share of the schedule, as in the reference, so it is longer too
x1, x3 and x9 are the default, 10 to 13 CPU minutes. Seeds (initial weights, order of samples, masks) pair the arms;
differences to x1 have 95 % intervals (Student's t). Text: the first articles of a WikiExtractor file, WordPiece trained
on them. The budget is large enough to pass the plateau at unigram loss, on which a schedule says nothing.

  python benchmarks/schedule_sync.py
  python benchmarks/schedule_sync.py --steps 100 --seeds 0 1 --articles 300 --out /tmp/look.json
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
ARMS = {"x1": (1, False), "x3": (3, False), "x9": (9, False), "x3-warmup": (3, True), "x9-warmup": (9, True)}


def parse() -> argparse.Namespace:
    data = Path(os.environ.get("FRUGALBERT_DATA", ROOT.parent / "shared" / "data"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", default=str(data / "enwiki2015-AA.txt.xz"))
    parser.add_argument("--articles", type=int, default=400)
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--arch", default="modern 2x128 heads=2 ffn=320")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--warmup", type=float, default=0.06)
    parser.add_argument(
        "--optimizer", default="muon", help="AdamW leaves a model of this size at unigram loss so early"
    )
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--arms", nargs="+", default=["x1", "x3", "x9"], choices=list(ARMS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "schedule_sync.json"))
    return parser.parse_args()


def prepare(options: argparse.Namespace, folder: Path) -> dict[str, Path]:
    """Corpus, tokenizer and shards by their stages; the inputs of the stage `pretrain`."""
    from frugalbert.config import Corpus, Machine, Shards, Tokenizer
    from frugalbert.data import corpus, shards, tokenizer

    machine, inputs = Machine(workers=1), {"yaml": folder}
    sources = [{"path": options.file, "max_documents": options.articles}]
    sections = {
        "corpus": (corpus.build, Corpus.model_validate({"sources": sources, "held_out": 0.05})),
        "tokenizer": (tokenizer.build, Tokenizer(vocab_size=options.vocab_size)),
        "shards": (shards.build, Shards(length=(options.length,))),
    }
    for name, (build, section) in sections.items():
        (folder / name).mkdir()
        build(section, inputs, folder / name, machine)  # type: ignore[operator]
        inputs[name] = folder / name
    return inputs


def train(options: argparse.Namespace, inputs: dict[str, Path], arm: str, seed: int) -> dict[str, Any]:
    """One run of the stage `pretrain`; its summary."""
    from frugalbert.config import Machine, Pretrain
    from frugalbert.train import pretrain

    factor, scaled = ARMS[arm]
    section = Pretrain.model_validate({
        "arch": options.arch, "budget": f"{options.steps * factor}steps", "stop_at": 1.0 / factor, "seed": seed,
        "batch_size": options.batch_size, "optimizer": options.optimizer, "learning_rate": options.learning_rate,
        "warmup": options.warmup if scaled else options.warmup / factor, "curve": "linear",
        "validation": {"every": 0.0, "begin_every": 0.0, "end_every": 0.0}, "checkpoints": {"every": "1000000steps"},
        "mask": {"rate": 0.3},
    })  # fmt: skip
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stderr(io.StringIO()):
        pretrain.build(section, inputs, Path(name), Machine(device="cpu", threads=options.threads))
        summary = json.loads((Path(name) / "summary.json").read_text())
    assert summary["steps"] == options.steps, (arm, summary["steps"])
    return summary


def compare(losses: dict[str, dict[int, float]]) -> dict[str, Any]:
    """Mean and standard deviation of each arm, and its paired difference to x1."""
    from frugalbert.finetune.metrics import summary

    found = {}
    for arm, by_seed in losses.items():
        mean, deviation, _ = summary(list(by_seed.values()))
        found[arm] = {"values": list(by_seed.values()), "mean": mean, "std": deviation}
        if arm != "x1" and "x1" in losses:
            gap, _, interval = summary([loss - losses["x1"][seed] for seed, loss in by_seed.items()])
            found[arm]["minus_x1"] = {"mean": gap, "interval": list(interval)}
    return found


def main() -> None:
    options = parse()
    if not Path(options.file).exists():
        sys.exit("no articles: set FRUGALBERT_DATA, or give --file")
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    from throughput import environment, save

    losses: dict[str, dict[int, float]] = {arm: {} for arm in options.arms}
    started, summary = time.process_time(), {}
    with tempfile.TemporaryDirectory() as name:
        inputs = prepare(options, Path(name))
        for seed in options.seeds:
            for arm in options.arms:
                summary = train(options, inputs, arm, seed)
                losses[arm][seed] = summary["final_validation_loss"]
                print(f"seed {seed} {arm}: {losses[arm][seed]:.4f}", flush=True)
    arms = compare(losses)
    print("| schedule | held-out loss | minus x1 [95 %] |\n|---|---|---|")
    for arm, row in arms.items():
        gap = row.get("minus_x1")
        text = "" if gap is None else "{:+.4f} [{:+.4f}, {:+.4f}]".format(gap["mean"], *gap["interval"])
        print(f"| {arm} | {row['mean']:.4f} ± {row['std']:.4f} | {text} |")
    kept = ("parameters", "tokens", "unigram_nll", "bigram_nll", "precision")
    settings = {key: value for key, value in vars(options).items() if key not in ("out", "file")}
    result = {
        "benchmark": "held-out masked-LM loss after the same steps under schedules of x1, x3, x9 their length",
        "options": settings | {"file": Path(options.file).name}, "arms": arms,
        "training": {key: summary[key] for key in kept}, "cpu_seconds": round(time.process_time() - started, 1),
        "environment": environment(),
    }  # fmt: skip
    save(options.out, result)


if __name__ == "__main__":
    main()
