"""The reader of token shards: what it refuses, what it returns, and the order in which samples are visited."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frugalbert.data import rows
from frugalbert.data.rows import RowOrder, ShardSet, gather_rows, rank_share, to_device
from tests.data.small_shards import random_documents, write_shards
from tests.faults.rows import chance, often


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("shards")
    documents = random_documents(np.random.default_rng(0), 300, 100)
    write_shards(out, documents, lengths=(32, 64), files=3)
    return out


# ---- opening ---------------------------------------------------------------------------------------------------------


def test_all_ways_to_the_rows_agree(directory, monkeypatch):
    shard_set = ShardSet.open(directory, 32, "train")
    assert shard_set.ids.shape == (shard_set.rows, 32)
    chosen = np.random.default_rng(1).integers(0, shard_set.rows, 200)
    expected = shard_set.ids[chosen].astype(np.int64)
    assert np.array_equal(shard_set.take(chosen), expected)
    resident = to_device(shard_set, "cpu")
    assert isinstance(resident, torch.Tensor)
    assert np.array_equal(gather_rows(resident, chosen).numpy(), expected)
    monkeypatch.setattr(rows, "COPY_ROWS", 7)
    assert torch.equal(to_device(shard_set, "cpu"), resident)
    streamed = to_device(shard_set, "cpu", share=0.0)
    assert streamed is shard_set
    assert np.array_equal(gather_rows(streamed, torch.from_numpy(chosen)).numpy(), expected)
    assert shard_set.tokens == (shard_set.ids != shard_set.special["pad"]).sum()
    with pytest.raises(IndexError):
        shard_set.take(np.array([shard_set.rows]))


@pytest.mark.parametrize("vocab_size", [65_536, 65_537])
def test_large_ids_survive_every_way(tmp_path, vocab_size):
    documents = [np.arange(vocab_size - 300, vocab_size, dtype=np.uint32) for _ in range(20)]
    write_shards(tmp_path, documents, vocab_size=vocab_size)
    shard_set = ShardSet.open(tmp_path, 32)
    assert shard_set.files[0].dtype.itemsize == (2 if vocab_size <= 65_536 else 4)
    everything = np.arange(shard_set.rows)
    resident = to_device(shard_set, "cpu")
    assert gather_rows(resident, everything).max() == vocab_size - 1
    assert np.array_equal(gather_rows(resident, everything).numpy(), shard_set.ids.astype(np.int64))


def test_identity_is_that_of_the_rows(directory, tmp_path):
    one = ShardSet.open(directory, 32)
    assert one.identity == ShardSet.open(directory, 32, verify=False).identity
    assert one.identity != ShardSet.open(directory, 32, "held_out").identity
    documents = random_documents(np.random.default_rng(0), 300, 100)
    documents[0][0] ^= 1
    write_shards(tmp_path, documents, lengths=(32,), files=3)
    assert ShardSet.open(tmp_path, 32).identity != one.identity


def test_what_does_not_fit_is_refused_in_one_sentence(directory, tmp_path):
    with pytest.raises(ValueError, match="another tokenizer") as caught:
        ShardSet.open(directory, 32, tokenizer_sha256="f" * 64)
    assert "--redo shards" in str(caught.value)
    assert ShardSet.open(directory, 32, tokenizer_sha256="0" * 64).rows
    with pytest.raises(ValueError, match="rows of 32, 64 tokens, not of 128"):
        ShardSet.open(directory, 128)
    with pytest.raises(FileNotFoundError, match="no finished token shards"):
        ShardSet.open(tmp_path, 32)


@pytest.mark.fault("R6")
def test_every_mutation_is_detected_and_the_file_named(directory, case):
    """Flip, truncate, empty, append, delete, swap: 200 random mutations of shards and index, none trained on."""
    generator = random.Random(chance())
    paths = sorted((directory / "length-32").glob("train-*.bin")) + [directory / "index.json"]
    before = ShardSet.open(directory, 32)
    content, figures = before.ids.copy(), (before.vocab_size, before.special, before.tokens, before.fill)
    harmless = 0
    trials = often(250, 2000)
    for trial in range(trials):
        path = generator.choice(paths)
        whole = path.read_bytes()
        kind = generator.choice(["flip", "flip", "truncate", "empty", "append", "delete", "zeros"])
        place = generator.randrange(len(whole))
        mutated = {
            "flip": whole[:place] + bytes([whole[place] ^ 1 << generator.randrange(8)]) + whole[place + 1 :],
            "truncate": whole[:place],
            "empty": b"",
            "append": whole + generator.randbytes(generator.randrange(1, 70)),
            "zeros": whole[:place] + bytes(len(whole) - place),
        }.get(kind)
        if mutated == whole:  # zeros at its end by nature
            continue
        path.unlink() if mutated is None else path.write_bytes(mutated)
        try:
            opened = ShardSet.open(directory, 32)
        except (ValueError, FileNotFoundError) as error:
            text = str(error)
            with case():
                assert path.name in text, f"{trial} {kind} {path.name}: {text}"
                assert "\n" not in text
                assert len(text) < 400
        else:  # white space of the index may differ without meaning anything
            assert path.name == "index.json", f"{trial} {kind} {path.name} was not detected"
            assert np.array_equal(opened.ids, content)
            assert (opened.vocab_size, opened.special, opened.tokens, opened.fill) == figures
            harmless += 1
        path.write_bytes(whole)
    assert harmless < trials / 10
    assert ShardSet.open(directory, 32).rows == before.rows


@pytest.mark.fault("R6")
def test_a_wrong_size_is_seen_without_reading_the_bytes(directory):
    path = directory / "length-32/train-00001.bin"
    whole = path.read_bytes()
    for data, what in ((whole[:-1], "truncated"), (whole + b"\0", "too long")):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"train-00001.bin is {what}"):
            ShardSet.open(directory, 32, verify=False)
    path.write_bytes(whole)


def leaves(value, path=()):
    """Paths of all numbers and texts in nested JSON."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield path
    for key, item in items or ():
        yield from leaves(item, (*path, key))


@pytest.mark.fault("R6")
def test_every_value_of_the_index_is_guarded(directory, tmp_path):
    text = (directory / "index.json").read_text()
    paths = list(leaves(json.loads(text)))
    assert len(paths) > 50
    for path in paths:
        index = inner = json.loads(text)
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = inner[path[-1]] + (1 if isinstance(inner[path[-1]], int | float) else "0")
        (tmp_path / "index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match=r"index\.json is damaged \(its checksum"):
            ShardSet.open(tmp_path, 32)


def test_index_of_another_format_is_refused(directory, tmp_path):
    from frugalbert.data.rows import index_checksum

    index = json.loads((directory / "index.json").read_text()) | {"format": 2}
    index["checksum"] = index_checksum(index)
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="format 2, this version reads 1"):
        ShardSet.open(tmp_path, 32)


# ---- order -----------------------------------------------------------------------------------------------------------


@given(rows=st.integers(1, 700), seed=st.integers(0, 2**64), epoch=st.integers(0, 2**20))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_each_epoch_visits_every_row_once(rows, seed, epoch):
    order = RowOrder(rows, seed)
    taken = order.take(epoch * rows, rows)
    assert taken.dtype == np.int64
    assert np.array_equal(np.sort(taken), np.arange(rows))
    assert set(order.epochs(epoch * rows, rows)) == {epoch}


def test_each_epoch_of_a_large_set_visits_every_row_once():
    taken = RowOrder(1_000_003, 5).take(3 * 1_000_003, 1_000_003)
    assert np.array_equal(np.sort(taken), np.arange(1_000_003))
    assert abs(np.corrcoef(taken, np.arange(1_000_003))[0, 1]) < 0.005


@pytest.mark.fault("R11")
@given(
    rows=st.integers(1, 100),
    batch=st.integers(1, 40),
    worlds=st.lists(st.integers(1, 4), min_size=1, max_size=6),
    start=st.integers(0, 10**12),
)
@settings(derandomize=True, deadline=None, max_examples=60)
def test_ranks_share_each_batch_whatever_the_world(rows, batch, worlds, start):
    """Any chain of world sizes, one per step, visits exactly the samples of one uninterrupted process."""
    order, position, seen = RowOrder(rows, 7), start, []
    for world in worlds:
        parts = [rank_share(position, batch, rank, world) for rank in range(world)]
        assert max(count for _, count in parts) - min(count for _, count in parts) <= 1
        seen += [order.take(*part) for part in parts]
        position += batch
    assert np.array_equal(np.concatenate(seen), order.take(start, position - start))


@pytest.mark.fault("R11")
def test_resumes_at_the_exact_sample(case):
    order = RowOrder(97, 3)
    whole = order.take(0, 1000)
    for offset in (*range(1, 999, 47), 96, 97, 98, 999):
        with case():
            assert np.array_equal(RowOrder(97, 3).take(offset, 1000 - offset), whole[offset:])


def test_orders_differ_by_seed_and_epoch():
    one = RowOrder(1000, 0).take(0, 1000)
    for other in (RowOrder(1000, 1).take(0, 1000), RowOrder(1000, 0).take(1000, 1000)):
        assert (one == other).mean() < 0.01


@pytest.mark.parametrize("rows", [7, 16, 60, 1000])
def test_order_is_uniform(rows):
    """Chi-square of where a row lands, and of which row follows it, over many epochs."""
    epochs = 200_000 // rows
    places = np.argsort(RowOrder(rows, 11).take(0, epochs * rows).reshape(epochs, rows), axis=1)
    cells = min(rows, 20)
    distance = (places[:, 1] - places[:, 0] - 1) % rows
    for values, limit in ((places[:, 0], rows), (places[:, rows // 2], rows), (distance, rows - 1)):
        found = np.bincount(values * cells // limit, minlength=cells)
        expected = epochs * np.bincount(np.arange(limit) * cells // limit, minlength=cells) / limit
        possible = expected > 0
        assert found[~possible].sum() == 0
        statistic = ((found - expected)[possible] ** 2 / expected[possible]).sum()
        assert statistic < cells - 1 + 5 * (2 * (cells - 1)) ** 0.5, (rows, statistic)


def test_no_rows_is_an_error():
    with pytest.raises(ValueError, match="no rows"):
        RowOrder(0, 0)
