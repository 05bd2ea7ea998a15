"""What `plan` says of a distillation: who teaches, what asking it costs, how large its cache becomes. No torch here.

In: the section and what is known of shards and tokenizer. Out: a text, and operations per token.
"""

from __future__ import annotations

from pathlib import Path

from frugalbert.config import Pretrain, Shards
from frugalbert.data.slots import num_slots, record_type
from frugalbert.model import cost
from frugalbert.model.arch import Arch
from frugalbert.progress import number
from frugalbert.run import read_json


def describe(
    section: Pretrain, shards: Shards, folder: Path, largest: Arch | None, vocabulary: int,
    known: tuple[float | None, int | None],
) -> tuple[str, float]:  # fmt: skip
    """The text, and the operations per token of the teacher's forward pass: 0 if its size is not known, or if its
    answers are on disk.

    `largest`: the super-network, if that teaches; `known`: the tokens and the rows of the shards' first length.
    """
    distill, length = section.distill, shards.length[0]
    assert distill is not None
    said, flops = f"teacher {distill.teacher} (size not known beforehand: not in the pace)", 0.0
    teacher = (largest, vocabulary) if largest else _stored(folder / distill.teacher / "config.json")
    if teacher is not None:
        arch, size = teacher
        masked = section.mask.rate[0] if distill.logits else 0.0
        flops = cost.forward_flops(arch, length, head="mlm", vocab_size=vocabulary, masked=masked)
        count = number(cost.parameter_count(arch, size, "mlm"))
        said = f"teacher {distill.teacher}: {arch.to_text()}, {count} parameters, {number(flops)}FLOP/token forward"
    if distill.cache is None:
        return said, flops
    said += f"; cache {distill.cache}, {_cache_size(section, shards, vocabulary, *known)}"
    return (f"{said} (there already)", 0.0) if (folder / distill.cache / "index.json").exists() else (said, flops)


def _stored(path: Path) -> tuple[Arch, int] | None:
    """Arch and vocabulary of a model of our own kind; None for another, or if there is none."""
    content = read_json(path) if path.is_file() else {}
    return (Arch.parse(content["arch"]), content["vocab_size"]) if "arch" in content else None


def _cache_size(section: Pretrain, shards: Shards, vocabulary: int, tokens: float | None, rows: int | None) -> str:
    """Of the files that `train/teacher_cache.py` fills: a record for each masked copy of a row of each length."""
    assert section.distill is not None
    assert section.distill.top_k is not None
    later, total = [phase.length for phase in section.phases], 0.0
    for length in {next((length for length in shards.length if length not in later), shards.length[0]), *later}:
        slots = num_slots(section.mask.rate[0], length, section.mask.max_predictions)
        record = record_type(slots, section.distill.top_k, vocabulary).itemsize * (section.mask.copies or 1)
        if tokens is None:
            return f"{number(record)}B for each row of {length} tokens"
        total += record * (rows if rows and length == shards.length[0] else tokens / length)
    return f"about {number(total)}B when full"
