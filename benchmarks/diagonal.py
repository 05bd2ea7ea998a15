"""Does attention need the diagonal? The stage `importance` on real Wikipedia text, with its study.

The published claim (SparseBERT, arXiv 2102.12871): the diagonal matters least and can go without harm. An importance
map is trained, then full attention, attention without the diagonal and five random drops of as many other pairs, each
from scratch with three seeds: same data, order, steps. 128 of 128 x 128 pairs are dropped, 0.8 %: little can show.

    python benchmarks/diagonal.py --work DIR [--steps 600]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from evidence import ROOT, run_on_wikipedia

from frugalbert import run

YAML = """
name: diagonal
machine: {{threads: 1, workers: 2}}
corpus: {{sources: [text/wiki.txt], held_out: 0.02}}
tokenizer: {{kind: bpe, vocab_size: 512}}
shards: {{length: 128}}
importance:
  {{arch: modern 2x128 heads=4 ffn=256, budget: {steps}steps, batch_size: 32, optimizer: muon, learning_rate: 2e-3,
  mask_learning_rate: 0.05, checkpoints: {{every: 100m}}, validation: {{rows: 512, every: 0.25}}, controls: 5,
  study: {{steps: {steps}, seeds: [0, 1, 2], looks: 1,
  recipes: {{optimizer: muon, learning_rate: 2e-3, batch_size: 32}}}}}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--megabytes", type=int, default=8, help="of Wikipedia text")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "diagonal.json")
    options = parser.parse_args()
    folder = (
        run_on_wikipedia(options.work.resolve(), YAML.format(steps=options.steps), options.megabytes) / "importance"
    )
    from throughput import environment

    study = run.read_json(folder / "results.json")
    groups = {name: run.read_json(folder / "importance.json")[name] for name in ("groups", "pairs", "documents")}
    run.write_json(options.out, {"steps": options.steps, **groups, "study": study, "environment": environment()})
    print(groups["groups"])
    for name, found in study["differences"].items():
        print(f"{name} minus full attention: {found}")


if __name__ == "__main__":
    main()
