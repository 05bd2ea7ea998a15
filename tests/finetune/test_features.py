"""Token ids, batches and padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frugalbert.finetune.features import MULTIPLE, batches, collate, encode, label_array
from frugalbert.finetune.models import open_source
from frugalbert.finetune.tasks import Example

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return open_source(str(tiny), None).tokenizer


def test_pairs_have_types_and_are_cut_from_the_longer_text(tokenizer):
    long, short = "red cat " * 20, "blue dog"
    features = encode(tokenizer, [Example(long, short, 0), Example(short, long, 1)], 2, 16, has_types=True)
    assert features.num_cut == 2
    tail = tokenizer(short, add_special_tokens=False)["input_ids"]
    assert features.ids[0][-3:-1].tolist() == features.ids[1][1:3].tolist() == tail
    assert [len(ids) for ids in features.ids] == [16, 16]
    assert features.types is not None
    assert features.types[0].tolist() == [0] * 13 + [1] * 3
    assert features.types[1].tolist() == [0] * 4 + [1] * 12
    assert encode(tokenizer, [Example(short, None, 0)], 2, 16, has_types=False).types is None


def test_special_tokens_in_a_text_are_text(tokenizer):
    ids = encode(tokenizer, [Example("red [SEP] cat [MASK] [CLS]", None, 0)], 2, 32, has_types=False).ids[0].tolist()
    assert ids.count(tokenizer.cls_token_id) == ids.count(tokenizer.sep_token_id) == 1
    assert tokenizer.mask_token_id not in ids


@settings(derandomize=True, max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 60), min_size=1, max_size=80),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 99),
    epoch=st.integers(0, 3),
)
def test_an_epoch_is_every_example_once(lengths, batch_size, seed, epoch):
    found = batches(np.array(lengths), batch_size, seed, epoch)
    assert sorted(np.concatenate(found)) == list(range(len(lengths)))
    assert sorted(map(len, found), reverse=True)[:-1] == [batch_size] * (len(found) - 1)
    again = batches(np.array(lengths), batch_size, seed, epoch)
    assert [rows.tolist() for rows in found] == [rows.tolist() for rows in again]


def test_batches_differ_by_seed_and_epoch_and_are_of_similar_length():
    lengths = np.random.default_rng(0).integers(4, 100, 512)
    order = {
        (seed, epoch): np.concatenate(batches(lengths, 8, seed, epoch)).tolist() for seed in (0, 1) for epoch in (0, 1)
    }
    assert len({tuple(rows) for rows in order.values()}) == 4
    padded = sum(lengths[rows].max() * len(rows) for rows in batches(lengths, 8, 0, 0))
    assert padded < 1.2 * lengths.sum()


def test_padding_goes_to_a_multiple_of_8_and_never_past_the_longest_input(tokenizer):
    texts = [Example("red " * count, None, 0) for count in (3, 9, 40)]
    features = encode(tokenizer, texts, 2, 20, has_types=True)
    assert [collate(features, np.array(rows), CPU)["input_ids"].shape[1] for rows in ([0], [0, 1], [2, 0])] == [
        MULTIPLE, 2 * MULTIPLE, 20,
    ]  # fmt: skip
    batch = collate(features, np.array([1, 0]), CPU)
    assert batch["attention_mask"].sum(1).tolist() == [11, 5]
    assert (batch["input_ids"][batch["attention_mask"] == 0] == tokenizer.pad_token_id).all()
    assert batch["token_type_ids"].shape == (2, 16)


def test_label_arrays():
    def examples(*labels):
        return [Example("a", None, label) for label in labels]

    assert label_array(examples(1, 0), 2).tolist() == [1, 0]
    assert label_array(examples(0.5, 2.0), 0).dtype == np.float32
    assert label_array(examples((0, 2), (), (1,)), 3).tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
