"""`frugalbert eval`: a model and a list of tasks in; its board out: a table, `board.json`, and all files of the stage.

The same as the stage `finetune` of a run, for any model directory or hub name, in a directory of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from frugalbert import config, run
from frugalbert.finetune import runner
from frugalbert.lock import Lock


def evaluate(model: str, section: config.Finetune, out: Path, machine: config.Machine) -> dict[str, Any]:
    """Fine-tune and evaluate `model` below `out`; continues what an earlier call left there.

    Relative paths start from the working directory. Returns what the stage returns. Raises ValueError or OSError with
    one sentence.
    """
    path = Path(model)
    name = str(path.resolve()) if path.exists() else model
    section = section.model_copy(update={"model": name})
    if out.is_dir() and any(out.iterdir()) and not (out / MARK).exists():
        raise ValueError(f"{out} exists and is no earlier evaluation; name a new directory with --out")
    before = run.read_json(out / MARK).get("model") if (out / MARK).exists() else name
    if before != name:
        raise ValueError(f"{out} is the evaluation of {before}; name another directory with --out")
    out.mkdir(parents=True, exist_ok=True)
    with Lock(out):
        run.write_json(out / MARK, {"model": name, "settings": section.model_dump(mode="json", exclude_defaults=True)})
        run.sweep(out)
        return runner.build(section, {"yaml": Path.cwd()}, out, machine)


MARK = "eval.json"
"""What was asked for, and the sign that the directory is an evaluation's."""
