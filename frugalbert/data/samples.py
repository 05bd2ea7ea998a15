"""Sample files of the reference systems (HDF5): theirs in, with the labels put back; our rows out, with fixed masks.

The layout is that of 24hBERT (arXiv 2104.07705) and ExtremeBERT (arXiv 2211.17201), gzip-compressed: `input_ids` N×S
int32, `input_mask` and `segment_ids` N×S int8, `masked_lm_positions` and `masked_lm_ids` N×P int32 padded with zeros,
and, where next sentences were predicted, `next_sentence_labels` N int8. In: every segment becomes a document, the
masked copies of one are kept once, and a hash of its ids decides whether it is held out. Out: files
`{train|test}_shard_{i}.hdf5` with the samples that training with the same seed draws, in the same order.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from frugalbert import run
from frugalbert.config import Mask, SampleFiles, Shards
from frugalbert.data import dedup, packing
from frugalbert.data.rows import INDEX, RowOrder, ShardSet, index_checksum, read_index
from frugalbert.fanout import run_tasks
from frugalbert.progress import number

if TYPE_CHECKING:
    from frugalbert.data.masking import Vocabulary

WHOLE, MASKED = ("input_ids", "input_mask", "segment_ids"), ("masked_lm_positions", "masked_lm_ids")
TYPES = dict(zip((*WHOLE, *MASKED), ("i4", "i1", "i1", "i4", "i4"), strict=True))
NAMES = {"train": "train", "held_out": "test"}
WORK = "work"
BLOCK_TOKENS = 1 << 20  # read at once
LONGEST = 1 << 16
RUN = 8  # tokens
CHUNK = 1024  # rows compressed, and masked, at once


def need_h5py() -> Any:
    """The module h5py. Raises ValueError with the command that installs it."""
    try:
        import h5py
    except ImportError:
        raise ValueError(
            "shards.samples and shards.hdf5 need h5py; install it with `pip install 'frugalbert[hdf5]'` or remove them"
        ) from None
    return h5py


# ---- in --------------------------------------------------------------------------------------------------------------


def prepare(
    section: Shards, folder: Path, common: dict[str, Any], workers: int, scheduler: str | None
) -> list[dict[str, Any]]:
    """Read all sample files once to find the copies; a task of `pack_file` per file, in their order.

    Raises ValueError for files that are missing, damaged, of another layout or of another vocabulary.
    """
    work = Path(common["out"]) / WORK
    work.mkdir(exist_ok=True)
    paths = find(section, folder)
    state = run.fingerprint([[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in paths])
    tasks = [
        {**common, "file": str(path), "files": state, "work": str(work), "position": position}
        for position, path in enumerate(paths)
    ]
    sizes = run_tasks(
        scan,
        tasks,
        journal=work / "scan.jsonl",
        workers=max(2, workers),  # a damaged file may end the process in which HDF5 reads it: not this one
        scheduler=scheduler,
        label="shards: samples",
    )
    starts = np.cumsum([0, *sizes])
    codes = np.zeros(starts[-1], np.uint8)
    dedup.exact(lambda position: _load(tasks[position], "hashes", np.uint64), starts, codes)
    _mark_repeated(tasks, starts, codes)
    for task, first, last in zip(tasks, starts, starts[1:], strict=False):
        (codes[first:last] == dedup.KEPT).tofile(_beside(task, "kept"))
    copies, repeated = (int((codes == code).sum()) for code in (dedup.DUPLICATE, dedup.REPEATED))
    run.say(
        f"shards: {len(paths)} sample files, {number(len(codes))} segments, {number(len(codes) - copies)} different "
        f"ones, {number(repeated)} left out (to be held out, but in training under other cuts)"
    )
    return tasks


def _mark_repeated(tasks: list[dict[str, Any]], starts: np.ndarray, codes: np.ndarray) -> None:
    """Mark the held-out segments half of whose runs of tokens stand in training segments too: the references' copies
    are often cut at other places (short_seq_prob)."""
    held = [_load(task, "held", np.uint64).reshape(-1, 2) for task in tasks]
    wanted = np.unique(np.concatenate([runs[:, 0] for runs in held]))
    seen = np.zeros(len(wanted), bool)
    for task in tasks:
        run.check_stop()
        seen |= np.isin(wanted, _load(task, "train", np.uint64))
    for runs, first, last in zip(held, starts, starts[1:], strict=False):
        segment, repeated = runs[:, 1].astype(np.int64), seen[np.searchsorted(wanted, runs[:, 0])]
        share = np.bincount(segment, repeated, last - first) / np.maximum(np.bincount(segment, None, last - first), 1)
        codes[first:last][(share >= 0.5) & (codes[first:last] == dedup.KEPT)] = dedup.REPEATED


def find(section: Shards, folder: Path) -> list[Path]:
    """The files that `section.samples` (paths, globs, directories) stand for, sorted. Raises ValueError if none."""
    found: dict[Path, None] = {}
    for text in section.samples:
        path = folder / text
        if path.exists():
            matches = sorted(path.rglob("*.hdf5")) if path.is_dir() else [path]
        else:
            matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        if not matches:
            raise ValueError(f"shards.samples: no file matches {text} (looked from {folder}); write another pattern")
        found |= dict.fromkeys(match.resolve() for match in matches)
    return list(found)


def _beside(task: dict[str, Any], what: str) -> Path:
    return Path(task["work"]) / f"{what}-{task['position']:05d}"


def _load(task: dict[str, Any], what: str, kind: Any) -> np.ndarray:
    return np.fromfile(_beside(task, what), kind)


def scan(task: dict[str, Any]) -> int:
    """Write what one file's segments are compared by: hashes, and runs of tokens of training and held-out ones. Their
    number."""
    section = Shards.model_validate(task["section"])
    every, train, held = [np.empty(0, np.uint64)], [np.empty(0, np.uint64)], [np.empty((0, 2), np.uint64)]
    before = 0
    for ids, counts in read_segments(Path(task["file"]), task["special"], task["vocab_size"]):
        run.check_stop()
        every.append(_hashes(ids, counts))
        runs, segment = _runs(ids, counts)
        mine = _held_out(every[-1], section)[segment]
        train.append(runs[~mine])
        held.append(np.stack([runs[mine], (segment[mine] + before).astype(np.uint64)], axis=1))
        before += len(counts)
    for what, found in (("hashes", every), ("train", train), ("held", held)):
        run.write_atomic(_beside(task, what), np.concatenate(found).tobytes())
    return before


def _held_out(hashes: np.ndarray, section: Shards) -> np.ndarray:
    return hashes < np.uint64(int(section.held_out * 2**64))


def _runs(ids: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A quarter of all runs of RUN tokens, as hashes, and the segments they stand in. The hash itself decides which, so
    the same ones are taken wherever a text was cut (Schleimer, Wilkerson and Aiken, "Winnowing", SIGMOD 2003)."""
    segment = np.repeat(np.arange(len(counts)), counts)
    mixed = np.zeros(max(0, len(ids) - RUN + 1), np.uint64)
    for step in range(RUN):
        mixed = (mixed + ids[step : step + len(mixed)] + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    chosen = (segment[: len(mixed)] == segment[RUN - 1 :]) & (mixed >> np.uint64(62) == 0)
    return mixed[chosen], segment[: len(mixed)][chosen]


def _hashes(ids: np.ndarray, counts: np.ndarray, seed: int = 0) -> np.ndarray:
    parts = np.split(ids, np.cumsum(counts)[:-1]) if len(counts) else []
    return np.array([xxhash.xxh3_64_intdigest(part.tobytes(), seed=seed) for part in parts], np.uint64)


def pack_file(task: dict[str, Any]) -> dict[str, Any]:
    """Pack the segments of one file that no earlier one has; the same task gives the same bytes."""
    section = Shards.model_validate(task["section"])
    kept, hashes = _load(task, "kept", bool), _load(task, "hashes", np.uint64)
    held_out = _held_out(hashes, section)
    specials_in_text = place = 0
    with packing.open_writers(task) as writers:
        blocks = read_segments(Path(task["file"]), task["special"], task["vocab_size"]) if kept.any() else ()
        for ids, counts in blocks:
            run.check_stop()
            mine = slice(place, place + len(counts))
            place += len(counts)
            draws = _hashes(ids, counts, packing.DRAW) if section.short_share else None
            chosen, keep = ids[np.repeat(kept[mine], counts)], kept[mine]
            specials_in_text += packing.disarm(chosen, task["special"])
            packing.add(writers, chosen, counts[keep], held_out[mine][keep], None if draws is None else draws[keep])
        return {"sets": packing.finish(writers), "specials_in_text": specials_in_text}


def read_segments(path: Path, special: dict[str, Any], vocab_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The segments of a sample file, with the labels put back and without [CLS], [SEP] and padding, block by block.

    Yields ids (uint32), one segment after the other, and the number of tokens (n,) of each; empty ones are left out.
    Raises ValueError in one sentence if the file is damaged, has another layout or was made with another vocabulary.
    """
    h5py = need_h5py()
    try:
        with h5py.File(path, "r") as file:
            found = {name: _dataset(file, name, path) for name in TYPES}
            rows, length = _check_shapes(found, path)
            step = max(1, BLOCK_TOKENS // length)
            for start in range(0, rows, step):
                block = {name: dataset[start : start + step].astype(np.int64) for name, dataset in found.items()}
                _restore(block, path, start)
                yield _segments(block, special, vocab_size, f"{path}: sample {start}")
    except (OSError, RuntimeError, KeyError, TypeError, MemoryError, UnicodeDecodeError) as error:
        if isinstance(error, PermissionError | FileNotFoundError):
            raise
        why = str(error).split("\n", 1)[0][:160]
        raise ValueError(
            f"{path} is damaged or no HDF5 file ({why}); copy it again or leave it out of shards.samples"
        ) from None


def _foreign(path: Path | str, why: str) -> ValueError:
    return ValueError(f"{path}: {why}; shards.samples takes files of academic-budget-bert and ExtremeBERT only")


def _dataset(file: Any, name: str, path: Path) -> Any:
    """A dataset whose numbers stand in the file itself: links and virtual ones could name any other file."""
    h5py = need_h5py()
    if not isinstance(file.get(name, getlink=True), h5py.HardLink) or not isinstance(file[name], h5py.Dataset):
        raise _foreign(path, f"the dataset {name} is missing")
    dataset = file[name]
    if dataset.dtype.kind not in "iu" or dataset.ndim != 2 or dataset.is_virtual or dataset.external:
        raise _foreign(path, f"the dataset {name} is no table of whole numbers")
    return dataset


def _check_shapes(found: dict[str, Any], path: Path) -> tuple[int, int]:
    """Rows and length of the samples."""
    (rows, length), (_, most) = found["input_ids"].shape, found["masked_lm_ids"].shape
    for names, shape in ((WHOLE, (rows, length)), (MASKED, (rows, most))):
        wrong = [name for name in names if found[name].shape != shape]
        if wrong or not 2 <= length <= LONGEST or most > LONGEST:
            name = (wrong or names)[0]
            raise _foreign(path, f"{name} is {' by '.join(map(str, found[name].shape))}, which does not fit the others")
    return rows, length


def _refuse(wrong: np.ndarray, where: str, why: str) -> None:
    """`wrong` (n,) bool by row; the first such row is named."""
    if wrong.any():
        name, first = where.rsplit(" ", 1)
        raise _foreign(f"{name} {int(first) + int(np.argmax(wrong))}", why)


def _restore(block: dict[str, np.ndarray], path: Path, start: int) -> None:
    """Put the labels back into `input_ids` (n, S), after looking at masks and positions."""
    where, real = f"{path}: sample {start}", block["input_mask"]
    ends, positions = real.sum(1), block["masked_lm_positions"]
    _refuse(((real != 0) & (real != 1)).any(1) | (np.diff(real) > 0).any(1) | (ends < 2), where, "a wrong input_mask")
    _refuse(((positions < 0) | (positions >= ends[:, None])).any(1), where, "a masked position outside the sample")
    rows, slots = np.nonzero(positions)  # 0, the place of [CLS], is what unused slots hold
    block["input_ids"][rows, positions[rows, slots]] = block["masked_lm_ids"][rows, slots]


def _segments(
    block: dict[str, np.ndarray], special: dict[str, Any], vocab_size: int, where: str
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and sizes of the segments: `[CLS] A [SEP]`, or `[CLS] A [SEP] B [SEP]` with B of segment 1."""
    ids, real = block["input_ids"], block["input_mask"] == 1
    every, ends = np.arange(len(ids)), block["input_mask"].sum(1)
    outside = (real & ((ids < 0) | (ids >= vocab_size))).any(1)
    _refuse(outside, where, f"an id outside the {vocab_size} of the tokenizer (another vocabulary?)")
    wrong = (ids[:, 0] != special["cls"]) | (ids[every, ends - 1] != special["sep"])
    _refuse(wrong, where, "it does not begin and end with [CLS] and [SEP] of the tokenizer (another vocabulary?)")
    second = real & (block["segment_ids"] == 1)
    split = ends - second.sum(1)  # where B begins, or the end
    pair = split < ends
    bad = (np.diff(second.astype(np.int8)) < 0) & real[:, 1:]
    wrong = bad.any(1) | (real & ~second & (block["segment_ids"] != 0)).any(1) | (split < 2)
    _refuse(wrong | (ids[every, split - 1] != special["sep"]), where, "wrong segment_ids")
    text = real.copy()
    text[:, 0] = text[every, ends - 1] = text[every, split - 1] = False
    sizes = np.stack([split - 2, np.where(pair, ends - split - 1, 0)], axis=1).ravel()
    return ids[text].astype(np.uint32), sizes[sizes > 0]


# ---- out -------------------------------------------------------------------------------------------------------------


def export(
    section: SampleFiles, index: dict[str, Any], tokenizer: Path, out: Path, workers: int, scheduler: str | None
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Write the rows of every length and split as `hdf5/length-128/train_shard_0.hdf5` …; the index's entry of them.

    File f of copy c is number c * files + f; copy c has the rows in the order of epoch c of a training with this seed.
    """
    work = out / WORK
    work.mkdir(exist_ok=True)
    run.write_json(work / INDEX, index | {"checksum": index_checksum(index)})  # the real one is written last
    common = {"out": str(out.resolve()), "tokenizer": str(tokenizer.resolve()), "section": section.model_dump()}
    tasks: list[dict[str, Any]] = []
    for length, entry in index["sets"].items():
        (out / "hdf5" / f"length-{length}").mkdir(parents=True, exist_ok=True)
        for split, wanted in (("train", section.train_files), ("held_out", section.test_files)):
            shard_set = ShardSet.of(out, index, int(length), split, False)
            files = min(wanted, shard_set.rows)
            for place in range(section.copies * files):
                start, stop = (shard_set.rows * at // files for at in (place, place + 1))
                task = {**common, "length": int(length), "split": split, "start": start, "count": stop - start}
                tasks.append(task | {"name": f"{NAMES[split]}_shard_{place}.hdf5", "identity": shard_set.identity})
        figures = ", ".join(f"{entry[split]['rows']} {NAMES[split]}" for split in packing.SPLITS)
        run.say(f"shards: length {length}: {section.copies} masked copies of each sample ({figures}) as HDF5")
    journal = out / "hdf5.jsonl"
    results = run_tasks(export_file, tasks, journal=journal, workers=workers, scheduler=scheduler, label="shards: HDF5")
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for task, result in zip(tasks, results, strict=True):
        found.setdefault(str(task["length"]), {}).setdefault(task["split"], []).append(result)
    return found


def export_file(task: dict[str, Any]) -> dict[str, Any]:
    """Write one sample file, whole or not at all: the samples `start` … of the sequence that RowOrder describes."""
    out, length, section = Path(task["out"]), task["length"], SampleFiles.model_validate(task["section"])
    shard_set = ShardSet.of(out, read_index(out / WORK), length, task["split"], False)
    vocabulary, order = _vocabulary(task["tokenizer"]), RowOrder(shard_set.rows, section.seed)
    path = out / "hdf5" / f"length-{length}" / task["name"]
    widths = dict.fromkeys(WHOLE, length) | dict.fromkeys(MASKED, section.max_predictions)
    with _new_file(path) as file:
        datasets = {
            name: file.create_dataset(
                name, (task["count"], width), TYPES[name], compression="gzip", chunks=(min(CHUNK, task["count"]), width)
            )
            for name, width in widths.items()
        }
        for first in range(0, task["count"], CHUNK):
            run.check_stop()
            at, size = task["start"] + first, min(CHUNK, task["count"] - first)
            block = _masked(shard_set, order.take(at, size), order.epochs(at, size), section, vocabulary)
            for name, dataset in datasets.items():
                dataset[first : first + size] = block[name]
    return {"name": path.name, "samples": task["count"], "sha256": run.sha256(path)}


def _masked(
    shard_set: ShardSet, row_ids: np.ndarray, copies: np.ndarray, section: SampleFiles, vocabulary: Vocabulary
) -> dict[str, np.ndarray]:
    """The named rows with the masks of these copies, as the datasets of the layout."""
    import torch

    from frugalbert.data.masking import IGNORED, mlm_batch

    rows = torch.from_numpy(shard_set.take(row_ids).astype(np.int64))
    mask = Mask(max_predictions=section.max_predictions, whole_words=section.whole_words)
    numbers = torch.from_numpy(row_ids), torch.from_numpy(copies)
    batch = mlm_batch(rows, *numbers, mask, section.rate, section.seed, vocabulary)
    labels = batch.labels.view(len(rows), -1).numpy()
    used = labels != IGNORED
    slots = (0, section.max_predictions - labels.shape[1])
    positions = batch.masked_positions.view(len(rows), -1).numpy() % shard_set.length
    return {
        "input_ids": batch.input_ids.numpy(),
        "input_mask": (rows != vocabulary.pad).numpy(),
        "segment_ids": np.zeros(rows.shape, np.int8),
        "masked_lm_positions": np.pad(np.where(used, positions, 0), ((0, 0), slots)),
        "masked_lm_ids": np.pad(np.where(used, labels, 0), ((0, 0), slots)),
    }


@functools.lru_cache(2)
def _vocabulary(tokenizer: str) -> Vocabulary:
    from frugalbert.data.masking import Vocabulary
    from frugalbert.data.tokenizer import load

    return Vocabulary.from_tokenizer(load(tokenizer))


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[Any]:
    """An HDF5 file to write, which appears under its name when the block succeeds. Raises OSError if it cannot be."""
    h5py = need_h5py()
    descriptor, temporary = tempfile.mkstemp(prefix=f".tmp-{path.name}-", dir=path.parent)
    try:
        try:
            with h5py.File(temporary, "w") as file:
                yield file
            os.fsync(descriptor)
        except RuntimeError as error:  # what HDF5 makes of a full disk when it closes a file
            raise OSError(f"cannot write {path} ({error})") from None
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        os.close(descriptor)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def forget(out: Path) -> None:
    """Remove the working files; a kill leaves all of them or, under a name that is swept up, none."""
    work, old = out / WORK, out / f".tmp-{WORK}"
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(old, ignore_errors=True)
        work.rename(old)
    shutil.rmtree(old, ignore_errors=True)
