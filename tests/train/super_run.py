"""A super-network of seconds: the small run's text, and the real stage. As a script it is one rank of several."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from frugalbert.config import Machine, Supernet
from frugalbert.run import write_json
from frugalbert.space import Space
from frugalbert.train import supernet
from tests.train import small_run

SPACE: dict[str, Any] = {
    "family": "modern", "depth": [1, 2], "hidden": [16, 24, 32], "heads": [1, 2], "head_dim": [8], "ffn": [16, 32, 48],
}  # fmt: skip
SECTION = {name: value for name, value in small_run.SECTION.items() if name != "arch"} | {"batch_size": 8}


def prepare(folder: Path, documents: int = 300, **space: Any) -> dict[str, Path]:
    inputs = small_run.prepare(folder, documents=documents)
    return inputs | {"space": write_space(folder / "space", **space)}


def write_space(folder: Path, **space: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "space.json", Space.from_json({**SPACE, **space}).to_json())
    return folder


def run(inputs: dict[str, Path], out: Path, **values: Any) -> dict[str, Any]:
    """Run the stage; its summary. Leaves the record that `stages` would write."""
    out.mkdir(parents=True, exist_ok=True)
    section = Supernet.model_validate({**SECTION, **values})
    machine = Machine(device="cpu", threads=1, micro_batch=4)
    supernet.build(section, inputs, out, machine)
    if os.environ.get("RANK", "0") == "0":
        write_json(out / "stage.json", {"section": section.model_dump(mode="json"), "fingerprint": "x"})
        return json.loads((out / "summary.json").read_text())
    return {}


if __name__ == "__main__":
    place = Path(sys.argv[1])
    read = {name: place / name for name in ("shards", "tokenizer", "space")} | {"yaml": place}
    run(read, Path(sys.argv[2]), **json.loads(sys.argv[3]))
