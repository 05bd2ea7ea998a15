"""Token shards: documents packed into rows of fixed length, no token discarded.

In: the tokenizer, and the corpus or the sample files of a reference system. Out: `index.json` (written last) and
`length-128/train-00000.bin` …, raw little-endian rows of `[CLS] piece [SEP]` pieces and [PAD]. Since text never yields
a [CLS], the boundaries of a row's pieces are in the row itself. One file that is read makes one shard per length and
split, wherever and by however many workers, so the bytes do not depend on who wrote them. With `pairs` a row is a pair
of segments (`pairs.py`), and `train-00000.labels` has a byte for each.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from frugalbert import run
from frugalbert.config import Machine, Shards
from frugalbert.data import packing, pairs, samples
from frugalbert.data.packing import SPLITS
from frugalbert.data.rows import FORMAT, INDEX, RowOrder, ShardSet, gather_rows, index_checksum, rank_share, to_device
from frugalbert.dist import usable_cores
from frugalbert.fanout import run_tasks
from frugalbert.progress import number

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["RowOrder", "ShardSet", "build", "gather_rows", "pack_file", "rank_share", "to_device"]
BATCH_CHARACTERS = 1_000_000  # tokenised at once: about 60 MB of the tokenizer's objects
PIECE_CHARACTERS = 50_000  # longer documents reach the tokenizer in parts
DRAWN = 8  # documents that random next sentences are drawn from, at least; a corpus file with fewer borrows them


# ---- the stage -------------------------------------------------------------------------------------------------------


def build(section: Shards, inputs: dict[str, Path], out: Path, machine: Machine) -> dict[str, Any]:
    """Pack the corpus (or `section.samples`) into rows of every length of `section`; returns the figures of the first.

    Raises ValueError if a split is empty or a file of the corpus, the samples or the tokenizer is damaged.
    """
    from frugalbert.data import tokenizer

    if section.samples or section.hdf5:
        samples.need_h5py()
    digest = tokenizer.digest(inputs["tokenizer"])
    special, vocab_size = _special(inputs["tokenizer"]), tokenizer.vocabulary_size(inputs["tokenizer"])
    dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    workers = usable_cores() if machine.workers == "auto" else machine.workers
    common = {
        "tokenizer": str((inputs["tokenizer"] / "tokenizer.json").resolve()),
        "tokenizer_sha256": digest,
        "out": str(out.resolve()),
        "special": special,
        "vocab_size": vocab_size,
        "dtype": dtype,
        "section": section.model_dump(mode="json", exclude={"hdf5"}),
    }
    if section.samples:
        function, tasks = (
            samples.pack_file,
            samples.prepare(section, inputs["yaml"], common, workers, machine.scheduler),
        )
    else:
        function = pack_file if section.pairs == "none" else pack_pairs
        tasks = _corpus_tasks(inputs["corpus"], common, workers)
    journal = out / "journal.jsonl"
    results = run_tasks(function, tasks, journal=journal, workers=workers, scheduler=machine.scheduler, label="shards")
    sets = {str(length): _sum_up(length, results, bool(section.samples)) for length in section.length}
    _remove_others(out, sets)
    index: dict[str, Any] = {
        "format": FORMAT,
        "dtype": dtype,
        "vocab_size": vocab_size,
        "special": special,
        "tokenizer_sha256": digest,
        "pairs": section.pairs,
        "sets": sets,
    }
    if section.hdf5 is not None:
        index["hdf5"] = samples.export(section.hdf5, index, inputs["tokenizer"], out, workers, machine.scheduler)
    run.write_json(out / INDEX, index | {"checksum": index_checksum(index)})
    samples.forget(out)
    first = sets[str(section.length[0])]
    return {
        "tokens": first["train"]["tokens"],
        "rows": first["train"]["rows"],
        "fill": first["train"]["fill"],
        "held_out_tokens": first["held_out"]["tokens"],
        "truncated_tokens": first["train"].get("truncated", 0),
        "specials_in_text": sum(result["specials_in_text"] for result in results),
        "documents": first["train"]["documents"],
        "vocab_size": vocab_size,
    }


def _corpus_tasks(directory: Path, common: dict[str, Any], workers: int) -> list[dict[str, Any]]:
    """A task of `pack_file` per file of the corpus."""
    from frugalbert.data import corpus

    names = corpus.list_files(directory)
    common = {**common, "corpus": str(directory.resolve()), "threads": max(1, workers // len(names))}
    return [{**common, "file": name, "position": position} for position, name in enumerate(names)]


def _special(directory: Path) -> dict[str, Any]:
    """The index's `special` entry."""
    from frugalbert.data.tokenizer import load

    tokenizer = load(directory)
    special: dict[str, Any] = {
        name: getattr(tokenizer, f"{name}_token_id") for name in ("cls", "sep", "pad", "mask", "unk")
    }
    special["all"] = sorted(tokenizer.all_special_ids)
    return special


def _sum_up(length: int, results: Sequence[dict[str, Any]], from_samples: bool) -> dict[str, Any]:
    """The index's entry of one length, said aloud. Raises ValueError if a split has no row."""
    what, keys = ("the samples have", ("shards.samples", "shards.held_out"))
    if not from_samples:
        what, keys = "the corpus has", ("corpus.sources", "corpus.held_out")
    entry: dict[str, Any] = {}
    for split in SPLITS:
        parts = [found for result in results if (found := result["sets"][str(length)][split])["rows"]]
        if not parts:
            wanted = keys[split == "held_out"]
            raise ValueError(f"{what} no {split.replace('_', '-')} text to make rows of; give more in {wanted}")
        total = {key: sum(part[key] for part in parts) for key in parts[0] if isinstance(parts[0][key], int)}
        files = [{key: part[key] for key in part if key not in total or key in ("rows", "tokens")} for part in parts]
        entry[split] = {"files": files, **total, "fill": round(total["tokens"] / (total["rows"] * length), 6)}
        labels = f", {total['random'] / total['rows']:.1%} random or swapped" if "random" in total else ""
        run.say(
            f"shards: length {length} {split}: {number(total['documents'])} documents, {number(total['tokens'])} "
            f"tokens in {number(total['rows'])} rows, {entry[split]['fill']:.1%} filled, "
            f"{number(total.get('truncated', 0))} tokens discarded{labels}"
        )
    return entry


def _remove_others(out: Path, sets: dict[str, Any]) -> None:
    """Remove what attempts that were killed left behind."""
    wanted = {
        out / f"length-{length}" / item["name"]
        for length, entry in sets.items()
        for split in SPLITS
        for item in entry[split]["files"]
    }
    wanted |= {path.with_suffix(packing.LABELS) for path in wanted}
    for path in {*out.glob("length-*/*"), *out.glob(f".tmp-{INDEX}-*")} - wanted:
        path.unlink()


# ---- one corpus file -------------------------------------------------------------------------------------------------


def pack_file(task: dict[str, Any]) -> dict[str, Any]:
    """Tokenise and pack one corpus file into one shard per length and split; the same task gives the same bytes."""
    from frugalbert.data.corpus import read_documents

    specials_in_text = 0
    documents = read_documents(Path(task["corpus"]), None, [task["file"]])
    with _threads(task["threads"]), packing.open_writers(task) as writers:
        tokenizer = open_tokenizer(task["tokenizer"])
        for batch in batches((document.text, document.held_out) for document in documents):
            run.check_stop()
            ids, counts = encode(tokenizer, [text for text, _ in batch])
            specials_in_text += packing.disarm(ids, task["special"])
            held_out = np.array([held for _, held in batch])
            packing.add(writers, ids, counts, held_out, _draws([text for text, _ in batch], task["section"]))
        return {"sets": packing.finish(writers), "specials_in_text": specials_in_text}


def pack_pairs(task: dict[str, Any]) -> dict[str, Any]:
    """Make the sentence pairs of one corpus file, one shard per length and split; the same task gives the same bytes.

    Raises ValueError if there is no other document to draw next sentences from.
    """
    from frugalbert.data.corpus import read_documents

    section, directory = Shards.model_validate(task["section"]), Path(task["corpus"])
    specials_in_text = 0
    with _threads(task["threads"]), packing.open_writers(task) as writers:
        tokenizer = open_tokenizer(task["tokenizer"])
        for split in packing.SPLITS:
            texts = (document.text for document in read_documents(directory, split, [task["file"]]))
            documents, forged = _sentences(tokenizer, texts, task["special"])
            specials_in_text += forged
            own = len(documents.sizes)
            if own and section.pairs == "nsp":
                documents = _with_others(documents, tokenizer, task, split)
            for (length, name), writer in writers.items():
                if name == split and own:
                    made = pairs.make_rows(documents, own, section, length, task["file"], task["special"])
                    writer.add_pairs(*made[:2], own, made[2])
        return {"sets": packing.finish(writers), "specials_in_text": specials_in_text}


def _sentences(tokenizer: Tokenizer, texts: Iterable[str], special: dict[str, Any]) -> tuple[pairs.Documents, int]:
    """Texts as sentences of token ids, and how many special tokens were made harmless in them."""
    none = np.empty(0, np.int64)
    parts, forged = [(np.empty(0, np.uint32), none, none)], 0
    for batch in batches((text, False) for text in texts):
        run.check_stop()
        split = [pairs.sentences(text) for text, _ in batch]
        ids, counts = encode(tokenizer, [sentence for found in split for sentence in found])
        forged += packing.disarm(ids, special)
        parts.append((ids, counts, np.array([len(found) for found in split], np.int64)))
    return pairs.Documents.of(*(np.concatenate(part) for part in zip(*parts, strict=True))), forged


def _with_others(documents: pairs.Documents, tokenizer: Tokenizer, task: dict[str, Any], split: str) -> pairs.Documents:
    """The documents, and if they are few the beginnings of some of the files that follow in the corpus."""
    from frugalbert.data import corpus

    directory = Path(task["corpus"])
    names = corpus.list_files(directory)
    after = names.index(task["file"]) + 1
    for name in [*names[after:], *names[: after - 1]]:
        if len(set(documents.hashes().tolist())) >= DRAWN:
            return documents
        found = itertools.islice(corpus.read_documents(directory, split, [name]), DRAWN)
        more, _ = _sentences(tokenizer, (document.text[:PIECE_CHARACTERS] for document in found), task["special"])
        documents += more
    if len(set(documents.hashes().tolist())) < 2:
        key = "corpus.held_out" if split == "held_out" else "corpus.sources"
        raise ValueError(
            f"shards.pairs: nsp draws sentences of other documents, and all {split.replace('_', '-')} documents are "
            f"the same; give more in {key}, or write pairs: sop"
        )
    return documents


def _draws(texts: Sequence[str], section: dict[str, Any]) -> np.ndarray | None:
    """64 bits of each text for `short_share`, others than those that decide about holding out."""
    if not section["short_share"]:
        return None
    return np.array([xxhash.xxh3_64_intdigest(text.encode(), seed=packing.DRAW) for text in texts], np.uint64)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """The tokenizer's own threads: none beside one worker per core, some where there are fewer files than cores."""
    wanted = {"TOKENIZERS_PARALLELISM": "true" if count > 1 else "false", "RAYON_NUM_THREADS": str(count)}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


# ---- tokenising ------------------------------------------------------------------------------------------------------


def open_tokenizer(path: str) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`, without padding and truncation, blind to special tokens in the text."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(path)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    return tokenizer


def batches(documents: Iterable[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    """Documents in order, about a million characters at a time."""
    batch: list[tuple[str, bool]] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document[0])
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """All texts' ids one after the other (uint32), and how many each has (int64). No special tokens are added."""

    def ids_of(texts: Sequence[str]) -> list[np.ndarray]:
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    parts: list[np.ndarray] = []
    counts = np.zeros(len(texts), dtype=np.int64)
    short = [position for position, text in enumerate(texts) if len(text) <= PIECE_CHARACTERS]
    found = dict(zip(short, ids_of([texts[position] for position in short]), strict=True))
    for position, text in enumerate(texts):
        if position in found:
            pieces = [found[position]]
        else:  # one part at a time: a document of 50 MB costs no more memory than any other
            pieces = [ids_of([part])[0] for part in split_text(text, ids_of, PIECE_CHARACTERS)]
        counts[position] = sum(map(len, pieces))
        parts += pieces
    return np.concatenate(parts) if parts else np.empty(0, np.uint32), counts


def split_text(text: str, ids_of: Callable[[Sequence[str]], list[np.ndarray]], limit: int) -> Iterator[str]:
    """A long text in parts of at most `limit` characters whose ids, joined, are those of the whole.

    Cuts beside a space, where the tokenizer itself shows on the surrounding characters that the cut
    changes nothing; text without such a place is cut anyway.
    """
    start = 0
    while len(text) - start > limit:
        end = start + limit
        for place in _spaces(text, start + limit // 2, end):
            if cut := next((cut for cut in (place, place + 1) if _harmless(text, cut, ids_of)), 0):
                end = cut
                break
        yield text[start:end]
        start = end
    yield text[start:]


def _spaces(text: str, low: int, high: int, attempts: int = 20) -> Iterator[int]:
    """Positions of the last 20 spaces in text[low : high - 1], from its end backwards."""
    high -= 1  # also the cut behind a space stays within the limit
    for _ in range(attempts):
        high = text.rfind(" ", low, high)
        if high < 0:
            return
        yield high


def _harmless(text: str, cut: int, ids_of: Callable[[Sequence[str]], list[np.ndarray]], around: int = 200) -> bool:
    before, after = text[max(0, cut - around) : cut], text[cut : cut + around]
    whole, left, right = ids_of([before + after, before, after])
    return np.array_equal(whole, np.concatenate([left, right]))
