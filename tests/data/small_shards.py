"""Small shard directories and tokenizers for tests, without the corpus stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from frugalbert.config import Shards
from frugalbert.data.packing import SPLITS, RowWriter
from frugalbert.data.rows import FORMAT, INDEX, index_checksum
from frugalbert.run import sha256, write_json

SPECIAL = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4, "all": [0, 1, 2, 3, 4]}
ORDINARY = 5  # the first id that is no special token


def random_documents(generator: np.random.Generator, count: int, vocab_size: int, mean: int = 60) -> list[np.ndarray]:
    """Documents of random ordinary ids; lengths are geometric, some much longer than a row."""
    lengths = generator.geometric(1 / mean, count)
    return [generator.integers(ORDINARY, vocab_size, size).astype(np.uint32) for size in lengths]


def write_shards(
    out: Path, documents: list[np.ndarray], lengths: tuple[int, ...] = (32,), files: int = 1, vocab_size: int = 100
) -> dict[str, Any]:
    """A finished shard directory; every tenth document is held out. Returns its index."""
    task = {"special": SPECIAL, "dtype": "uint16" if vocab_size <= 1 << 16 else "uint32"}
    sets: dict[str, Any] = {}
    for length in lengths:
        entry: dict[str, Any] = {}
        for split in SPLITS:
            mine = [text for place, text in enumerate(documents) if (place % 10 == 9) == (split == "held_out")]
            parts = []
            for number, group in enumerate(np.array_split(np.arange(len(mine)), files)):
                with RowWriter(out, f"{split}-{number:05d}", length, Shards(length=(length,)), task) as writer:
                    chosen = [mine[place] for place in group]
                    writer.add(np.concatenate(chosen), np.array([len(text) for text in chosen]))
                    parts.append(writer.finish())
            rows, tokens = (sum(part[key] for part in parts) for key in ("rows", "tokens"))
            entry[split] = {"files": parts, "rows": rows, "tokens": tokens, "fill": tokens / rows / length}
        sets[str(length)] = entry
    index = {
        "format": FORMAT,
        "dtype": task["dtype"],
        "vocab_size": vocab_size,
        "special": SPECIAL,
        "tokenizer_sha256": "0" * 64,
        "sets": sets,
    }
    write_json(out / INDEX, index | {"checksum": index_checksum(index)})
    return index


def small_tokenizer(kind: str, texts: list[str], vocab_size: int = 384) -> Any:
    """A Hugging Face fast tokenizer (wordpiece, bpe or unigram) trained on a few texts; special ids as above."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    common = {"vocab_size": vocab_size, "special_tokens": names, "show_progress": False}
    if kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=100))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(**common)
    elif kind == "bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(**common, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(**common, unk_token="[UNK]")
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
    )  # fmt: skip


def write_corpus(out: Path, files: list[list[tuple[str, bool]]]) -> Path:
    """A corpus directory in the documented format: one list of (text, held out) per file."""
    import pyarrow

    entries = []
    for number, documents in enumerate(files):
        name = f"documents-{number:05d}.jsonl.zst"
        lines = [json.dumps({"text": text, "source": "test", "held_out": held_out}) for text, held_out in documents]
        with pyarrow.output_stream(str(out / name), compression="zstd") as stream:
            stream.write("".join(line + "\n" for line in lines).encode())
        held_out = sum(held for _, held in documents)
        entries.append({
            "name": name,
            "documents": len(documents),
            "held_out": held_out,
            "characters": sum(len(text) for text, _ in documents),
            "bytes": (out / name).stat().st_size,
            "sha256": sha256(out / name),
        })  # fmt: skip
    keys = {"documents": "documents", "held_out_documents": "held_out", "characters": "characters"}
    totals = {name: sum(entry[key] for entry in entries) for name, key in keys.items()}
    rest = {"sources": [], "licence": "test", "held_out": 0.1}
    write_json(out / "index.json", {"format": 1, "files": entries, **totals, **rest})
    return out
