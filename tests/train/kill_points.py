"""Kill a training at its k-th step phase or file operation, continue it, compare the end: run as a script.

A forked child counts the calls of the hooks below and dies of SIGKILL at the k-th; a second child continues to the end.
The parent imports everything but never runs a backward pass: autograd does not survive a fork after one.
`python -m tests.train.kill_points FOLDER EVERY` prints one JSON object.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from frugalbert import run as files
from frugalbert.budget import Budget
from frugalbert.config import Checkpoints
from frugalbert.train import checkpoint, loop, state, step
from tests.train import toy

RECIPE = toy.changed(
    budget=Budget.parse("12steps"),
    checkpoints=Checkpoints(every=Budget.parse("3steps"), markers=(0.5, 0.9), average=2),
)
HOOKS: list[tuple[Any, str]] = [
    (os, "fsync"), (os, "rename"), (os, "replace"), (loop, "observe"), (loop, "take_step"), (loop, "_validation"),
    (loop, "write_line"), (step, "write_line"), (loop, "write_weights"), (state, "whole_weights"), (step, "_apply"),
    (step, "accumulate"), (checkpoint, "prune"), (files, "write_atomic"), (shutil, "rmtree"),
]  # fmt: skip


os.fsync = lambda descriptor: None  # a kill loses nothing that the system has; waiting for the disk would be all we do


def die_at(count: int) -> None:
    """SIGKILL this process before the count-th call of any hook."""
    left = [count]

    def hook(module: Any, name: str) -> None:
        original: Callable[..., Any] = getattr(module, name)

        def call(*arguments: Any, **named: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **named)

        setattr(module, name, call)

    for module, name in HOOKS:
        hook(module, name)


def in_child(work: Callable[[], None]) -> int:
    """Exit status of a forked child that does `work`."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(3)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def finish(out: Path, name: str) -> None:
    run = toy.go(out, RECIPE, name=name)
    (out / "result").write_text(toy.result(run))


def main(folder: Path, every: int, name: str) -> dict[str, Any]:
    model = toy.Toy()
    optimizer = toy.make_optimizer(model, toy.OptimizerSettings(name))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # imports what torch imports at the first step
    assert in_child(lambda: finish(folder / "whole", name)) == 0
    expected, point, found = (folder / "whole" / "result").read_text(), 1, []
    while True:
        out = folder / f"killed-{point}"
        status = in_child(lambda out=out, point=point: (die_at(point), finish(out, name)))  # type: ignore[misc]
        if status == 0:
            return {"points": len(found), "same": sum(found), "calls": f"more than {point - every}"}
        assert status == -signal.SIGKILL, status
        assert in_child(lambda out=out: finish(out, name)) == 0  # type: ignore[misc]
        found.append((out / "result").read_text() == expected)
        shutil.rmtree(out)
        point += every


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])))
