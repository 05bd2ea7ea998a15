"""One rank of a toy training, run as a script by the tests: `python -m tests.train.ranks FOLDER OPTIONS`.

Every rank prints what it ended with as JSON; the clocks of the ranks differ on purpose.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from frugalbert import dist, run
from frugalbert.budget import Budget
from frugalbert.config import Machine
from frugalbert.train import loop
from tests.train import toy


def main(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    dist.start(Machine(device="cpu", threads=1))
    now = [0.0]

    def skewed() -> float:
        now[0] += 1.0 + 9.0 * dist.rank()
        return now[0]

    recipe = toy.changed(budget=Budget.parse(options.get("budget", "20steps")))
    kind = {"float64": torch.float64, "float32": torch.float32}[options.get("dtype", "float64")]
    names = {key: options[key] for key in ("name", "strategy") if key in options}
    training = toy.make(folder, recipe, dtype=kind, dropout=0.0, now=skewed, **names)
    signal_at = options.get("signal_rank_1_at") or options.get("kill_rank_1_at")
    if signal_at:
        number = signal.SIGTERM if "signal_rank_1_at" in options else signal.SIGKILL
        run.catch_signals()
        inner = training.draw

        def draw(progress: float, samples: dict[str, int], micro_batch: int) -> Any:
            if dist.rank() == 1 and training.state.step == signal_at:
                os.kill(os.getpid(), number)
            return inner(progress, samples, micro_batch)

        training.draw = draw
    stopped = False
    try:
        loop.train(training)
    except run.Stopped:
        stopped = True
    weights = {name: tensor.flatten().tolist() for name, tensor in loop.whole_weights(training.model).items()}
    state = training.state
    return {"step": state.step, "samples": state.samples, "tokens": state.tokens, "seconds": state.seconds,
            "stopped": stopped, "weights": weights, "validation": state.validation}  # fmt: skip


if __name__ == "__main__":
    result = main(Path(sys.argv[1]), json.loads(sys.argv[2]))
    dist.finish()
    print(json.dumps(result), flush=True)
