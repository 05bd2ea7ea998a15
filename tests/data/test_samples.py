"""Sample files of the reference systems: out as they read them, in with every label back in its place."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frugalbert import stages
from frugalbert.config import Machine, Mask, SampleFiles, Shards
from frugalbert.data import samples
from frugalbert.data.masking import IGNORED, Vocabulary, mlm_batch, restore
from frugalbert.data.rows import RowOrder, ShardSet
from frugalbert.data.samples import read_segments
from frugalbert.data.shards import build
from frugalbert.data.tokenizer import load
from frugalbert.run import sha256
from frugalbert.yamlfile import parse, validate
from tests.data.small_shards import SPECIAL, small_tokenizer, write_corpus

h5py = pytest.importorskip("h5py")
CLS, SEP, MASK, PAD = (SPECIAL[name] for name in ("cls", "sep", "mask", "pad"))
LENGTH, VOCAB = 16, 100
FILES = SampleFiles(copies=3, rate=0.3, max_predictions=4, train_files=4, test_files=2, seed=5)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A corpus of 120 different documents in two files, and a tokenizer."""
    generator = random.Random(0)
    words = [f"{first}{last}" for first in "abcdefgh" for last in ("an", "ing", "er", "ly", "ous")]
    texts = [" ".join(generator.choices(words, k=generator.choice([1, 4, 12, 40]))) + f" {n}" for n in range(120)]
    documents = [(text, place % 6 == 5) for place, text in enumerate(texts)]
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "corpus").mkdir()
    write_corpus(folder / "corpus", [documents[:50], documents[50:]])
    small_tokenizer("wordpiece", texts, VOCAB).save_pretrained(folder / "tokenizer")
    return {"corpus": folder / "corpus", "tokenizer": folder / "tokenizer", "yaml": folder}


def make(inputs: dict[str, Path], out: Path, workers: int = 1, **values: Any) -> dict[str, Any]:
    out.mkdir(exist_ok=True)
    section = Shards(**{"length": (LENGTH,), "pack": False, **values})
    return build(section, inputs, out, Machine(workers=workers))


@pytest.fixture(scope="module")
def exported(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported")
    make(inputs, out, hdf5=FILES)
    return out


def rows_of(out: Path, split: str) -> np.ndarray:
    return np.asarray(ShardSet.open(out, LENGTH, split).ids, np.int64)


def read(path: Path) -> dict[str, np.ndarray]:
    with h5py.File(path, "r") as file:
        return {name: dataset[()] for name, dataset in file.items()}


def put_back(found: dict[str, np.ndarray]) -> np.ndarray:
    """The reference's own reading of its format: the first 0 among a row's positions ends them."""
    rows = found["input_ids"].copy()
    for row, positions, ids in zip(rows, found["masked_lm_positions"], found["masked_lm_ids"], strict=True):
        for position, token in zip(positions, ids, strict=True):
            if position == 0:
                break
            row[position] = token
    return rows


def copies_of(out: Path, name: str, files: int) -> list[dict[str, np.ndarray]]:
    """Each masked copy, its files joined."""
    folder = out / "hdf5" / f"length-{LENGTH}"
    found = [read(folder / f"{name}_shard_{number}.hdf5") for number in range(FILES.copies * files)]
    groups = [found[first : first + files] for first in range(0, len(found), files)]
    return [{key: np.concatenate([part[key] for part in group]) for key in group[0]} for group in groups]


# ---- out -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split, name, files", [("train", "train", 4), ("held_out", "test", 2)])
def test_the_files_have_the_layout_and_every_row_in_every_copy(exported: Path, split: str, name: str, files: int):
    folder = exported / "hdf5" / f"length-{LENGTH}"
    assert len(list(folder.glob(f"{name}_shard_*.hdf5"))) == FILES.copies * files
    with h5py.File(folder / f"{name}_shard_0.hdf5", "r") as file:
        types = {key: (dataset.dtype, dataset.shape[1], dataset.compression) for key, dataset in file.items()}
    assert types == {
        "input_ids": (np.int32, LENGTH, "gzip"),
        "input_mask": (np.int8, LENGTH, "gzip"),
        "segment_ids": (np.int8, LENGTH, "gzip"),
        "masked_lm_positions": (np.int32, 4, "gzip"),
        "masked_lm_ids": (np.int32, 4, "gzip"),
    }
    rows = rows_of(exported, split)
    masked = []
    for found in copies_of(exported, name, files):
        whole = put_back(found)
        assert sorted(whole.tolist()) == sorted(rows.tolist())
        assert np.array_equal(found["input_mask"], whole != PAD)
        assert not found["segment_ids"].any()
        used = found["masked_lm_positions"] > 0
        assert (np.diff(used.astype(int)) <= 0).all(), "zeros only at the end"
        assert not found["masked_lm_ids"][~used].any()
        limit = np.minimum(4, np.maximum(1, np.round(0.3 * (whole != PAD).sum(1)).astype(int)))
        assert (used.sum(1) == np.minimum(limit, (whole >= 5).sum(1))).all()
        assert {tuple(row) for row in whole.tolist()} == {tuple(row) for row in rows.tolist()}
        masked.append(sorted(found["input_ids"].tolist()))
    assert masked[0] != masked[1] != masked[2] != masked[0], "copies differ in their masks"


def test_the_samples_are_those_of_a_training_with_the_same_seed(exported: Path, inputs: dict[str, Path]):
    """Epoch by epoch: what the loader draws with `mask.copies`, in its order."""
    shard_set = ShardSet.open(exported, LENGTH)
    order, vocabulary = RowOrder(shard_set.rows, 5), Vocabulary.from_tokenizer(load(inputs["tokenizer"]))
    stored = copies_of(exported, "train", 4)
    for epoch in range(5):
        start = epoch * shard_set.rows
        row_ids = order.take(start, shard_set.rows)
        numbers = torch.from_numpy(row_ids), torch.from_numpy(order.epochs(start, shard_set.rows))
        rows = torch.from_numpy(shard_set.take(row_ids).astype(np.int64))
        batch = mlm_batch(rows, *numbers, Mask(max_predictions=4, copies=3), 0.3, 5, vocabulary)
        same = stored[epoch % 3]
        by_row = np.lexsort(rows.numpy().T), np.lexsort(put_back(same).T)
        assert np.array_equal(batch.input_ids.numpy()[by_row[0]], same["input_ids"][by_row[1]])
        if epoch < 3:
            assert np.array_equal(batch.input_ids, same["input_ids"])
            labels = batch.labels.view(len(rows), -1).numpy()
            assert np.array_equal(np.where(labels == IGNORED, 0, labels), same["masked_lm_ids"])
            assert torch.equal(restore(batch), rows)


def hashes(out: Path) -> dict[str, str]:
    return {str(path.relative_to(out)): sha256(path) for path in out.rglob("*") if path.suffix in (".hdf5", ".bin")}


def test_any_number_of_workers_and_a_broken_attempt_give_the_same_files(
    exported: Path, inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    make(inputs, tmp_path / "two", workers=2, hdf5=FILES)
    assert hashes(tmp_path / "two") == hashes(exported)
    index = json.loads((exported / "index.json").read_text())
    assert json.loads((tmp_path / "two/index.json").read_text()) == index
    folder = exported / "hdf5" / f"length-{LENGTH}"
    for entry in index["hdf5"][str(LENGTH)].values():
        assert all(sha256(folder / item["name"]) == item["sha256"] for item in entry)
        assert sum(item["samples"] for item in entry) % FILES.copies == 0
    assert not (exported / "work").exists()
    left, original = 7, samples.export_file

    def breaks(task: dict[str, Any]) -> dict[str, Any]:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError("the disk is full")
        return original(task)

    breaks.__module__, breaks.__qualname__ = original.__module__, original.__qualname__  # the journal's name for it
    monkeypatch.setattr(samples, "export_file", breaks)
    with pytest.raises(OSError, match="full"):
        make(inputs, tmp_path / "again", hdf5=FILES)
    assert not (tmp_path / "again/index.json").exists()
    begun = {path: path.stat().st_mtime_ns for path in (tmp_path / "again").rglob("*.hdf5")}
    assert len(begun) == 7
    left = 100
    make(inputs, tmp_path / "again", hdf5=FILES)
    assert left == 100 - 11, "the seven files of the first attempt are not written again"
    assert hashes(tmp_path / "again") == hashes(exported)
    assert all(path.stat().st_mtime_ns == before for path, before in begun.items())


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path):
    with pytest.raises(OSError, match="x.hdf5"), samples._new_file(tmp_path / "x.hdf5"):
        raise RuntimeError("unable to flush")
    assert list(tmp_path.iterdir()) == []


# ---- out and in again ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def imported(exported: Path, inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("imported")
    inputs = {"tokenizer": inputs["tokenizer"], "yaml": exported}
    make(inputs, out, samples=("hdf5/length-16/*.hdf5",), held_out=0.2)
    return out


def test_export_then_import_gives_the_same_rows(exported: Path, imported: Path):
    """Every row once, whatever its number of copies; which are held out is now decided by their ids."""
    before = [tuple(row) for split in ("train", "held_out") for row in rows_of(exported, split).tolist()]
    after = {split: [tuple(row) for row in rows_of(imported, split).tolist()] for split in ("train", "held_out")}
    assert sorted(after["train"] + after["held_out"]) == sorted(set(before))
    assert len(before) > 150
    assert 0.08 < len(after["held_out"]) / len(set(before)) < 0.32
    assert not (imported / "work").exists()


def test_what_is_held_out_depends_on_the_ids_alone(
    exported: Path, imported: Path, inputs: dict[str, Path], tmp_path: Path
):
    """Other names (train files called test and the reverse), another order, two workers: the same split."""
    files = sorted((exported / "hdf5" / "length-16").iterdir())
    random.Random(1).shuffle(files)
    for number, path in enumerate(files):
        (tmp_path / f"test_shard_{number}.hdf5").symlink_to(path)
    inputs = {"tokenizer": inputs["tokenizer"], "yaml": tmp_path}
    make(inputs, tmp_path / "out", workers=2, samples=(".",), held_out=0.2)
    for split in ("train", "held_out"):
        assert sorted(rows_of(tmp_path / "out", split).tolist()) == sorted(rows_of(imported, split).tolist())


# ---- in --------------------------------------------------------------------------------------------------------------

segment = st.lists(st.integers(5, VOCAB - 1), min_size=1, max_size=6)
sample = st.tuples(segment, st.none() | segment, st.lists(st.integers(1, 15), max_size=4, unique=True))


def write(path: Path, drawn: list[tuple[list[int], list[int] | None, list[int]]], length: int = 16) -> Path:
    """A sample file, written slot by slot as the reference's builder does."""
    shapes = dict.fromkeys(samples.WHOLE, length) | dict.fromkeys(samples.MASKED, 4)
    found = {name: np.zeros((len(drawn), width), samples.TYPES[name]) for name, width in shapes.items()}
    for row, (first, second, places) in enumerate(drawn):
        ids = [CLS, *first, SEP, *(second or []), *([SEP] if second else [])]
        found["input_mask"][row, : len(ids)] = 1
        found["segment_ids"][row, len(first) + 2 : len(ids)] = 1
        masked = sorted(place for place in places if place < len(ids) and ids[place] >= 5)
        found["masked_lm_positions"][row, : len(masked)] = masked
        found["masked_lm_ids"][row, : len(masked)] = [ids[place] for place in masked]
        found["input_ids"][row, : len(ids)] = [MASK if place in masked else token for place, token in enumerate(ids)]
    with h5py.File(path, "w") as file:
        for name, values in found.items():
            file.create_dataset(name, data=values, compression="gzip")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@given(drawn=st.lists(sample, min_size=1, max_size=12), block=st.sampled_from([16, 48, 1 << 20]))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_labels_put_back_give_every_segment(folder: Path, drawn: list[Any], block: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "BLOCK_TOKENS", block)
        found = list(read_segments(write(folder / "drawn.hdf5", drawn), SPECIAL, VOCAB))
    segments = [part.tolist() for ids, counts in found for part in np.split(ids, np.cumsum(counts)[:-1])]
    assert segments == [part for first, second, _ in drawn for part in (first, second) if part]


@given(data=st.data())
@settings(derandomize=True, deadline=None, max_examples=120)
def test_a_damaged_file_is_refused_in_one_sentence_or_harmless(folder: Path, data: st.DataObject):
    """Cut off anywhere: always refused. Bytes changed anywhere: refused, or what is read is still of the vocabulary."""
    whole = write(folder / "whole.hdf5", [([5, 6, 7], [8, 9], [1, 5]), ([10], None, [1])]).read_bytes()
    path = folder / "damaged.hdf5"
    if data.draw(st.booleans()):
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
        with pytest.raises(ValueError, match=r"damaged\.hdf5 is damaged or no HDF5 file"):
            list(read_segments(path, SPECIAL, VOCAB))
        return
    damaged = bytearray(whole)
    for place in data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=8)):
        damaged[place] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    try:
        for ids, counts in read_segments(path, SPECIAL, VOCAB):
            assert len(ids) == counts.sum()
            assert ids.max(initial=0) < VOCAB
    except ValueError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)


@pytest.mark.parametrize("name", list(samples.TYPES))
@pytest.mark.parametrize("how", ["missing", "shape", "type", "link"])
def test_a_file_of_another_layout_is_refused(tmp_path: Path, name: str, how: str):
    path = write(tmp_path / "a.hdf5", [([5, 6], None, [1])])
    with h5py.File(path, "a") as file:
        values = file[name][()]
        del file[name]
        if how == "shape":
            file[name] = np.pad(values, ((0, 1), (0, 0)))
        elif how == "type":
            file[name] = values.astype("f4")
        elif how == "link":
            file[name] = h5py.ExternalLink("/etc/passwd", "/x")
    with pytest.raises(ValueError, match=r"a\.hdf5: .*shards\.samples takes files of academic") as error:
        list(read_segments(path, SPECIAL, VOCAB))
    assert how == "shape" or f"the dataset {name} is" in str(error.value)


@pytest.mark.parametrize(
    "name, place, value, message",
    [
        ("input_ids", (1, 2), VOCAB, "an id outside the 100 of the tokenizer"),
        ("masked_lm_ids", (1, 0), VOCAB, "an id outside the 100 of the tokenizer"),
        ("input_ids", (1, 0), 99, "does not begin and end with"),
        ("input_ids", (1, 3), 99, "does not begin and end with"),
        ("masked_lm_positions", (1, 0), 4, "a masked position outside the sample"),
        ("masked_lm_positions", (1, 0), -1, "a masked position outside the sample"),
        ("input_mask", (1, 1), 0, "a wrong input_mask"),
        ("input_mask", (1, 3), 2, "a wrong input_mask"),
        ("segment_ids", (1, 1), 1, "wrong segment_ids"),
        ("segment_ids", (1, 3), 1, "wrong segment_ids"),
        ("segment_ids", (1, 0), 3, "wrong segment_ids"),
    ],
)
def test_a_sample_that_cannot_be_is_named(
    tmp_path: Path, name: str, place: tuple[int, int], value: int, message: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(samples, "BLOCK_TOKENS", 16)
    path = write(tmp_path / "a.hdf5", [([5], None, []), ([6, 7], None, [1])])
    with h5py.File(path, "a") as file:
        file[name][place] = value
    with pytest.raises(ValueError, match=rf"a\.hdf5: sample 1: .*{message}"):
        list(read_segments(path, SPECIAL, VOCAB))


def test_special_tokens_of_the_text_become_unknown(inputs: dict[str, Path], tmp_path: Path):
    drawn = [([5 + n, 6, 7], [MASK, 8 + n], []) for n in range(40)]
    write(tmp_path / "a.hdf5", drawn)
    inputs = {"tokenizer": inputs["tokenizer"], "yaml": tmp_path}
    metrics = make(inputs, tmp_path / "out", samples=("a.hdf5",), held_out=0.3)
    assert metrics["specials_in_text"] == 40
    rows = np.concatenate([rows_of(tmp_path / "out", split) for split in ("train", "held_out")])
    assert sorted(row[1:4] for row in rows.tolist() if row[4] == SEP) == [[5 + n, 6, 7] for n in range(40)]
    assert sorted(row[2] for row in rows.tolist() if row[1] == SPECIAL["unk"]) == [8 + n for n in range(40)]


def test_text_held_out_is_not_trained_on_under_another_cut(inputs: dict[str, Path], tmp_path: Path):
    """Half of the texts stand in a second copy cut into halves: of those, only what is not in training is held out."""
    generator = np.random.default_rng(0)
    texts = generator.integers(5, VOCAB, (400, 62)).tolist()
    write(tmp_path / "a.hdf5", [(text, None, [3]) for text in texts], 64)
    write(tmp_path / "b.hdf5", [(half, None, [1]) for text in texts[:200] for half in (text[:31], text[31:])], 64)
    inputs = {"tokenizer": inputs["tokenizer"], "yaml": tmp_path}
    make(inputs, tmp_path / "out", length=(64,), samples=(".",), held_out=0.25)
    train, held = ({tuple(row) for row in ShardSet.open(tmp_path / "out", 64, split).ids.tolist()}
                   for split in ("train", "held_out"))  # fmt: skip

    def runs(rows: set[tuple[int, ...]]) -> set[tuple[int, ...]]:
        return {row[place : place + 8] for row in rows for place in range(1, row.index(SEP) - 7)}

    seen = runs(train)
    shares = [len(runs({row}) & seen) / len(runs({row})) for row in held]
    assert sum(share > 0.75 for share in shares) <= 0.02 * len(held), "a quarter of runs is compared: few slip through"
    whole = {tuple(text) for text in texts[200:]}
    untouched = sum(row[1:63] in whole for row in held)
    assert untouched == len(whole) - sum(row[1:63] in whole for row in train) > 30, "texts of one copy lose nothing"
    assert len(held) - untouched < 0.75 * (0.25 * 600), "repeated ones are left out"


# ---- what the user says ----------------------------------------------------------------------------------------------


def test_no_files_and_no_h5py_are_one_sentence(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    inputs = {"tokenizer": inputs["tokenizer"], "yaml": tmp_path}
    with pytest.raises(ValueError, match=r"shards\.samples: no file matches old/\*\.hdf5"):
        make(inputs, tmp_path / "out", samples=("old/*.hdf5",))
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ValueError, match=r"need h5py; install it with `pip install 'frugalbert\[hdf5\]'`"):
        make(inputs, tmp_path / "out", samples=("old/*.hdf5",))


@pytest.mark.parametrize(
    "text, message",
    [
        ("shards: {hdf5: {}}", "write pack: false or remove hdf5"),
        ("shards: {held_out: 0.1}", "write corpus.held_out instead"),
        ("shards: {samples: a.hdf5}\ntokenizer: {}", "shards.samples needs tokenizer.path"),
        ("shards: {samples: a.hdf5}\ntokenizer: {path: b}\ncorpus: {sources: c}", "takes the place of the corpus"),
    ],
)
def test_contradictions_are_refused(text: str, message: str):
    with pytest.raises(ValueError, match=message):
        validate(parse(f"name: t\n{text}\n", "t.yaml"), [], "t.yaml")


def test_a_run_from_sample_files_needs_no_corpus_and_notices_other_files(
    inputs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """The stage itself: built once, skipped, and stopped when a file outside the run changes."""
    drawn = [([5 + n, 6, 7, 8], None, [1, 2]) for n in range(60)]
    write(tmp_path / "train_shard_0.hdf5", drawn)
    text = f"name: t\nmachine: {{workers: 1}}\ntokenizer: {{path: {inputs['tokenizer']}}}\n"
    text += "shards: {samples: '*.hdf5', held_out: 0.2, length: 16}\n"
    (tmp_path / "t.yaml").write_text(text)
    out = stages.run_file(tmp_path / "t.yaml", directory=tmp_path / "run")
    assert "1 sample files, 60 segments, 60 different ones" in capsys.readouterr().err
    assert ShardSet.open(out / "shards", 16).rows > 10
    stages.run_file(tmp_path / "t.yaml", directory=tmp_path / "run")
    assert "shards: done before" in capsys.readouterr().err
    write(tmp_path / "train_shard_0.hdf5", drawn[1:])
    with pytest.raises(ValueError, match=r"(?s)shards was built with other.*train_shard_0\.hdf5: changed"):
        stages.run_file(tmp_path / "t.yaml", directory=tmp_path / "run")
