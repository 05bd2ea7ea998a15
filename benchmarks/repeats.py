"""Which words does a masked language model know: those that stand in the same text once more, or all others?

A masked word whose other copy is in sight can be copied. Whether an encoder has learned that within its budget differs
from seed to seed, and is most of what differs. For every model that `time_to_loss.py` has left in its folder: the loss
at the held-out masks of words besides the 256 most frequent, with and without another copy in the same document.

  python benchmarks/repeats.py --work DIR      # after time_to_loss.py --work DIR; writes results/repeats.json
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import time_to_loss_arm as arm
import torch
from throughput import ROOT, environment, save
from torch.nn import functional

from frugalbert import dist, run
from frugalbert.config import Machine

FREQUENT, ROWS = 256, 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="of time_to_loss.py")
    parser.add_argument("--least-minutes", type=float, default=5.0, help="of the clock, for a run to be looked at")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "repeats.json")
    options = parser.parse_args()
    rows = []
    for path in sorted((options.work / "arms").glob("*/result.json")):
        task = run.read_json(path.with_name("task.json"))
        if not task.get("probe") and task["minutes"] >= options.least_minutes:
            rows.append({name: task[name] for name in ("arm", "seed", "minutes")} | losses(path.parent, task))
            print(rows[-1], flush=True)
    if not rows:
        raise SystemExit(f"error: {options.work} has no finished run of time_to_loss.py")
    save(options.out, {"benchmark": "loss of words with and without another copy in sight", "frequent": FREQUENT,
                       "held_out_rows": ROWS, "environment": environment(), "rows": rows})  # fmt: skip


def losses(folder: Path, task: dict[str, Any]) -> dict[str, float]:
    device = dist.pick_device(Machine(device=task["device"]))
    net, objective, text = arm.opened(folder / "pretrain" / "model", task, device, ROWS)
    counts = torch.bincount(torch.from_numpy(text.set.ids.astype("int64")).flatten())
    frequent = torch.zeros(len(counts), dtype=torch.bool)
    frequent[counts.topk(FREQUENT).indices] = True

    def score(batch: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        loss = functional.cross_entropy(objective._call(net, batch).logits.float(), batch.labels, reduction="none")
        real = batch.labels >= 0  # a slot that a row has no use for is -100, and its loss 0
        copied = (in_sight(batch) & real).cpu()
        rare = real.cpu() & ~frequent[batch.labels.clamp(min=0).cpu()]
        split = {"all": real.cpu(), "copy_in_sight": rare & copied, "no_copy": rare & ~copied}
        return {name: (loss.cpu()[chosen].sum(), chosen.sum()) for name, chosen in split.items()}

    with torch.no_grad():
        return {name: round(value, 4) for name, value in text.measure(score, 64, lambda: None).items()}


def in_sight(batch: Any) -> torch.Tensor:
    """(B*k,): whether a slot's label is among the ids of its document as the model sees it."""
    length = batch.input_ids.shape[1]
    row = batch.masked_positions // length
    document = batch.document_ids.flatten()[batch.masked_positions]
    same = (batch.input_ids[row] == batch.labels[:, None]) & (batch.document_ids[row] == document[:, None])
    return same.any(1)


if __name__ == "__main__":
    main()
