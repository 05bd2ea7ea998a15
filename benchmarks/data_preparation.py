"""Data preparation: read, clean, tokenise, pack, against bare `tokenizers.encode_batch` and `datasets.map` in one run.

The same English articles (WikiExtractor output, xz) and BERT's uncased vocabulary, all cores of the machine. Arms:
  ours      the stages `corpus` and `shards` from the compressed files on: read, clean, de-duplicate, split,
            checksums, tokenising, packing, writing
  bare      `tokenizers.encode_batch` with all cores on the cleaned text, already in memory: only tokenising
  datasets  `run_mlm.py`'s way on the cleaned text: `datasets` JSON loading, `map` the tokenizer, `map` group_texts
Rounds alternate `ours` and `bare`; the speed ratio is taken within each round. `datasets` runs once, beside them.

  python benchmarks/data_preparation.py --articles 4000 --rounds 3
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from itertools import chain
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
LENGTH = 128


def parse() -> argparse.Namespace:
    data = Path(os.environ.get("FRUGALBERT_DATA", ROOT.parent / "shared" / "data"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", nargs="+", default=[str(path) for path in sorted(data.glob("enwiki*.xz"))])
    parser.add_argument("--vocab", default=str(data / "vocab" / "bert-base-uncased-vocab.txt"))
    parser.add_argument("--articles", type=int, default=4000, help="of each file")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-datasets", action="store_true")
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "data_preparation.json"))
    return parser.parse_args()


def ours(options: argparse.Namespace, folder: Path) -> float:
    """Seconds of the two stages, tokenizer loading outside."""
    from frugalbert.config import Corpus, Machine, Shards, Tokenizer
    from frugalbert.data import corpus, shards, tokenizer

    machine = Machine(workers=options.workers)
    for name in ("corpus", "shards"):
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir()
    if not (folder / "tokenizer").exists():
        (folder / "tokenizer").mkdir()
        tokenizer.build(Tokenizer(path=options.vocab), {"yaml": folder}, folder / "tokenizer", machine)
    sources = [{"path": path, "max_documents": options.articles} for path in options.files]
    started = time.perf_counter()
    corpus.build(Corpus.model_validate({"sources": sources}), {"yaml": folder}, folder / "corpus", machine)
    inputs = {"yaml": folder, "corpus": folder / "corpus", "tokenizer": folder / "tokenizer"}
    shards.build(Shards(length=(LENGTH,)), inputs, folder / "shards", machine)
    return time.perf_counter() - started


def bare(folder: Path, texts: list[str]) -> float:
    """Seconds of encode_batch alone, with all cores."""
    from tokenizers import Tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    backend = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    backend.no_truncation()
    backend.no_padding()
    started = time.perf_counter()
    for start in range(0, len(texts), 1000):
        backend.encode_batch(texts[start : start + 1000])
    return time.perf_counter() - started


def with_datasets(options: argparse.Namespace, folder: Path, texts: list[str]) -> float:
    """Seconds of the preparation in transformers' `run_mlm.py` (tokenise, then group into rows), `num_proc` workers."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    with open(folder / "texts.jsonl", "w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")

    def tokenize(examples: dict[str, list[str]]) -> Any:
        return tokenizer(examples["text"], return_special_tokens_mask=True)

    def group(examples: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = {key: list(chain(*rows)) for key, rows in examples.items()}
        total = len(joined["input_ids"]) // LENGTH * LENGTH
        return {key: [ids[at : at + LENGTH] for at in range(0, total, LENGTH)] for key, ids in joined.items()}

    started = time.perf_counter()
    files = {"train": str(folder / "texts.jsonl")}
    raw = datasets.load_dataset("json", data_files=files, cache_dir=str(folder / "cache"))["train"]
    tokens = raw.map(tokenize, batched=True, num_proc=options.workers, remove_columns=["text"])
    tokens.map(group, batched=True, num_proc=options.workers)
    return time.perf_counter() - started


def main() -> None:
    options = parse()
    if not options.files or not Path(options.vocab).exists():
        sys.exit("no articles or vocabulary: set FRUGALBERT_DATA, or give --files and --vocab")
    from throughput import environment, save

    from frugalbert.data.corpus import read_documents

    rounds: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with contextlib.redirect_stderr(io.StringIO()):
            ours(options, folder)  # warm the page cache, and make the text of the other arms
        texts = [document.text for document in read_documents(folder / "corpus", None)]
        megabytes = sum(len(text.encode()) for text in texts) / 1e6
        for _ in range(options.rounds):
            with contextlib.redirect_stderr(io.StringIO()):
                seconds = {"ours": ours(options, folder)}
            rounds.append(seconds | {"bare": bare(folder, texts)})
            print({arm: f"{megabytes / second:.2f} MB/s" for arm, second in rounds[-1].items()}, flush=True)
        other = None if options.no_datasets else with_datasets(options, folder, texts)
    ratios = sorted(row["bare"] / row["ours"] for row in rounds)
    result = {
        "what": "MB of cleaned text per second: read + clean + tokenise + pack (ours), encode_batch alone (bare)",
        "articles": len(texts),
        "megabytes": round(megabytes, 2),
        "workers": options.workers,
        "rounds": rounds,
        "ours_mb_per_second": megabytes / statistics.median(row["ours"] for row in rounds),
        "bare_mb_per_second": megabytes / statistics.median(row["bare"] for row in rounds),
        "datasets_mb_per_second": None if other is None else megabytes / other,
        "ours_over_bare": {"min": ratios[0], "median": statistics.median(ratios), "max": ratios[-1]},
        "machine": environment(),
    }
    save(options.out, result)
    print(json.dumps({key: value for key, value in result.items() if key not in ("rounds", "machine")}, indent=1))


if __name__ == "__main__":
    main()
