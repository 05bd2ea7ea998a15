"""What several benchmarks stand on: stages run on real Wikipedia text, and intervals of paired differences."""

from __future__ import annotations

import lzma
import os
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from frugalbert import run, stages  # noqa: E402
from frugalbert.finetune.metrics import summary  # noqa: E402
from frugalbert.yamlfile import load  # noqa: E402

DATA = Path(os.environ.get("FRUGALBERT_DATA", ROOT.parent / "shared" / "data"))


def run_on_wikipedia(work: Path, yaml: str, megabytes: int) -> Path:
    """The stages of `yaml`, whose source is text/wiki.txt, below `work`/run; continued where they stood."""
    text = work / "text" / "wiki.txt"
    text.parent.mkdir(parents=True, exist_ok=True)
    if not text.exists():
        with lzma.open(DATA / "enwiki2015-AA.txt.xz", "rb") as file:
            run.write_atomic(text, file.read(megabytes << 20))
    (work / "run.yaml").write_text(yaml)
    stages.run(load(work / "run.yaml", []), work / "run", work)
    return work / "run"


def interval(mine: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Mean of paired differences and its 95 % interval (Student's t), of the pairs that there are."""
    mean, _, (low, high) = summary([one - two for one, two in zip(mine, other, strict=False)])
    return {"mean": round(mean, 4), "low": round(low, 4), "high": round(high, 4)}
