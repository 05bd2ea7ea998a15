"""A pre-training of seconds: real text of this repository's own making, a small tokenizer, shards, the real stage. As a
script it is one rank of several."""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np

from frugalbert.config import Attention, Machine, Pretrain
from frugalbert.data.rows import INDEX, index_checksum
from frugalbert.run import sha256, write_json
from frugalbert.search import attention
from frugalbert.train import pretrain
from tests.data.small_shards import small_tokenizer, write_shards

SECTION: dict[str, Any] = {
    "arch": "modern 2x32 heads=2 ffn=48 max_length=64",
    "budget": "20steps",
    "batch_size": 8,
    "learning_rate": 5e-3,
    "muon_learning_rate": 0.02,
    "precision": "fp32",
    "checkpoints": {"every": "5steps", "markers": [0.5]},
    "validation": {"every": 0.25, "begin_every": 0.25, "end_every": 0.25, "rows": 16},
}


def sentences(count: int, seed: int = 0) -> list[str]:
    """Documents with something to learn: the word after an adjective and after a verb is decided by it."""
    rng = random.Random(seed)
    adjectives = ["red", "green", "small", "old", "quick", "silent"]
    nouns = ["stone", "river", "house", "clock", "horse", "forest"]
    verbs = ["holds", "finds", "leaves", "paints", "follows", "hears"]
    documents = []
    for _ in range(count):
        words = []
        for _ in range(rng.randrange(3, 12)):
            subject, action, thing = rng.randrange(6), rng.randrange(6), rng.randrange(6)
            words += ["the", adjectives[subject], nouns[subject], verbs[action], "the", adjectives[thing], nouns[thing]]
        documents.append(" ".join(words))
    return documents


def prepare(folder: Path, lengths: tuple[int, ...] = (32,), documents: int = 300) -> dict[str, Path]:
    """Inputs of the stage below `folder`."""
    texts = sentences(documents)
    tokenizer = small_tokenizer("wordpiece", texts, vocab_size=96)
    tokenizer.save_pretrained(folder / "tokenizer")
    ids = [np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.uint32) for text in texts]
    shards = folder / "shards"
    shards.mkdir(parents=True)
    index = write_shards(shards, ids, lengths=lengths, vocab_size=len(tokenizer))
    index |= {"tokenizer_sha256": sha256(folder / "tokenizer" / "tokenizer.json")}
    write_json(shards / INDEX, index | {"checksum": index_checksum(index)})
    return {"shards": shards, "tokenizer": folder / "tokenizer", "yaml": folder}


def seal(inputs: dict[str, Path]) -> None:
    """Make the index agree with shard files that a test has rewritten."""
    index = json.loads((inputs["shards"] / INDEX).read_text())
    del index["checksum"]
    for length, entry in index["sets"].items():
        for split in entry.values():
            for file in split["files"]:
                file["sha256"] = sha256(inputs["shards"] / f"length-{length}" / file["name"])
    write_json(inputs["shards"] / INDEX, index | {"checksum": index_checksum(index)})


def section(**values: Any) -> Pretrain:
    return Pretrain.model_validate({**SECTION, **values})


def run(inputs: dict[str, Path], out: Path, machine: dict[str, Any] | None = None, **values: Any) -> dict[str, Any]:
    """Run the stage, or, with a `structure`, the stage `attention`; its summary."""
    out.mkdir(parents=True, exist_ok=True)
    settings = Machine.model_validate({"device": "cpu", "threads": 1, "micro_batch": 4, **(machine or {})})
    if "structure" in values:
        attention.build(Attention.model_validate({**SECTION, **values}), inputs, out, settings)
    else:
        pretrain.build(section(**values), inputs, out, settings)
    return json.loads((out / "summary.json").read_text()) if os.environ.get("RANK", "0") == "0" else {}


if __name__ == "__main__":
    place = Path(sys.argv[1])
    read = {name: place / name for name in ("shards", "tokenizer")} | {"yaml": place}
    run(read, Path(sys.argv[2]), **json.loads(sys.argv[3]))
