"""Token ids, batches and padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from frugalbert.finetune.features import (
    IGNORED,
    MULTIPLE,
    Features,
    Lengths,
    batches,
    collate,
    encode,
    label_array,
    parts,
)
from frugalbert.finetune.models import open_source
from frugalbert.finetune.tasks import Example
from tests.finetune.conftest import sentences

CPU = torch.device("cpu")


def encoded(tokenizer, examples: list[Example], most: int, has_types: bool = True, kind="classification") -> Features:
    return encode(tokenizer, kind, examples, 2, Lengths(most), has_types)


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return open_source(str(tiny), None).tokenizer


def test_pairs_have_types_and_are_cut_from_the_longer_text(tokenizer):
    long, short = "red cat " * 20, "blue dog"
    features = encoded(tokenizer, [Example(long, short, 0), Example(short, long, 1)], 16)
    assert features.num_cut == 2
    tail = tokenizer(short, add_special_tokens=False)["input_ids"]
    assert features.ids[0][-3:-1].tolist() == features.ids[1][1:3].tolist() == tail
    assert [len(ids) for ids in features.ids] == [16, 16]
    assert features.types is not None
    assert features.types[0].tolist() == [0] * 13 + [1] * 3
    assert features.types[1].tolist() == [0] * 4 + [1] * 12
    assert encoded(tokenizer, [Example(short, None, 0)], 16, has_types=False).types is None


def test_special_tokens_in_a_text_are_text(tokenizer):
    ids = encoded(tokenizer, [Example("red [SEP] cat [MASK] [CLS]", None, 0)], 32, has_types=False).ids[0].tolist()
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
    features = encoded(tokenizer, texts, 20)
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


# ---- the same rows as Hugging Face's own calls -----------------------------------------------------------------------

WORDS = "red green blue cat dog runs the a very not big unbelievable new . , x".split()
texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=40).map(" ".join)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """A RoBERTa tokenizer: byte pieces that carry their space, two separators between texts."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import RobertaTokenizerFast

    folder = tmp_path_factory.mktemp("bytes")
    backend = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    backend.train_from_iterator(sentences(200, 3), vocab_size=400, special_tokens=special, show_progress=False)
    backend.save_model(str(folder))
    return RobertaTokenizerFast(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))


@pytest.fixture(params=["wordpiece", "byte-level"])
def any_tokenizer(request, tokenizer, byte_level):
    return tokenizer if request.param == "wordpiece" else byte_level


@settings(derandomize=True, max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=st.lists(st.tuples(texts, texts), min_size=1, max_size=5), most=st.integers(8, 64))
def test_texts_and_pairs_are_cut_as_hugging_face_cuts_them(any_tokenizer, pairs, most):
    has_types = "token_type_ids" in any_tokenizer.model_input_names
    for second in (True, False):
        found = encoded(any_tokenizer, [Example(a, b if second else None, 0) for a, b in pairs], most, has_types)
        columns = [list(column) for column in zip(*pairs, strict=True)][: 1 + second]
        expected = any_tokenizer(*columns, truncation="longest_first", max_length=most)
        assert [ids.tolist() for ids in found.ids] == expected["input_ids"]
        if has_types:
            assert found.types is not None
            assert [types.tolist() for types in found.types] == expected["token_type_ids"]


@settings(derandomize=True, max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(question=st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map(" ".join), passage=texts,
       stride=st.integers(1, 8))  # fmt: skip
def test_windows_of_a_passage_are_hugging_faces(any_tokenizer, question, passage, stride):
    has_types = "token_type_ids" in any_tokenizer.model_input_names
    found = encode(
        any_tokenizer, "question-answering", [Example(question, passage, 0)], 0, Lengths(48, stride=stride), has_types
    )
    expected = any_tokenizer(
        question, passage, truncation="only_second", max_length=48, stride=stride, return_overflowing_tokens=True
    )
    assert [ids.tolist() for ids in found.ids] == expected["input_ids"]


# ---- what each type adds ---------------------------------------------------------------------------------------------


def test_a_protected_text_keeps_its_tokens(tokenizer):
    long, short = "red cat " * 30, "blue dog runs"
    number = len(tokenizer(short, add_special_tokens=False)["input_ids"])
    for cut, example in (("first", Example(long, short, 0)), ("second", Example(short, long, 0))):
        for most in (12, 24):
            features = encode(tokenizer, "classification", [example], 2, Lengths(most, cut), True)
            kept = np.bincount(features.types[0])[1 if cut == "first" else 0] - (1 if cut == "first" else 2)
            assert kept == number
            assert len(features.ids[0]) == most
    # and gives way once the other one would have next to nothing
    features = encode(tokenizer, "classification", [Example(long, long, 0)], 2, Lengths(43, "first"), True)
    assert np.bincount(features.types[0]).tolist() == [2 + 10, 1 + 30]


def test_words_to_look_at_are_found_and_never_cut_off(tokenizer):
    front = "red cat " * 20
    text = f"{front}unbelievable dog"
    start = text.index("unbelievable")
    example = Example(text, "the unbelievable", 0, spans=((0, start, start + 12), (1, 4, 16)))
    for most in (32, 40, 200):
        features = encoded(tokenizer, [example], most)
        for first, last in features.marks[0]:
            assert tokenizer.decode(features.ids[0][first:last]).replace("##", "").replace(" ", "") == "unbelievable"
        assert len(features.ids[0]) <= most
        assert features.num_cut == (most < 200)


def test_an_option_is_a_row_and_an_example_is_a_unit(tokenizer):
    examples = [
        Example("red cat", label=1, options=("runs", "sleeps", "eats")),
        Example("blue dog", label=(0, 1), options=("sings", "eats")),
    ]
    features = encoded(tokenizer, examples, 16, kind="multiple-choice")
    assert features.owner.tolist() == [0, 0, 0, 1, 1]
    assert features.units.tolist() == [0, 3, 5]
    assert features.targets == [(1,), (0, 1)]
    assert features.rows(np.array([1, 0])).tolist() == [3, 4, 0, 1, 2]
    assert [part.tolist() for part in parts(features, np.array([0, 1]), 3)] == [[0], [1]]
    assert [part.tolist() for part in parts(features, np.array([0, 1]), 5)] == [[0, 1]]


def test_answers_are_found_in_the_windows_that_hold_them(tokenizer):
    passage = " ".join(sentences(20, 4))
    start = passage.index("sings", 200)
    example = Example("the cat", passage, 1, answers=("sings",), starts=(start,))
    features = encode(tokenizer, "question-answering", [example], 0, Lengths(32, stride=10), True)
    assert len(features.ids) > 5
    held = [row for row, (first, last) in enumerate(features.targets) if first > 0]
    assert 1 <= len(held) < len(features.ids)
    for row in held:
        first, last = features.targets[row]
        assert passage[features.marks[row][first, 0] : features.marks[row][last, 1]] == "sings"
    for row, offsets in enumerate(features.marks):
        inside = offsets[:, 0] >= 0
        assert inside[0] == inside[-1] == False  # noqa: E712
        if row not in held:
            assert features.targets[row].tolist() == [0, 0]
            assert "sings" not in [passage[a:b] for a, b in offsets[inside] if a == start]


def test_every_word_is_tagged_once_however_long_the_sentence(any_tokenizer):
    words = tuple(" ".join(sentences(12, 5)).split())
    tags = tuple(number % 3 for number in range(len(words)))
    has_types = "token_type_ids" in any_tokenizer.model_input_names
    example = Example("", words=words, label=tags)
    features = encode(any_tokenizer, "token-classification", [example], 3, Lengths(16), has_types)
    assert len(features.ids) > 4
    marked = np.concatenate(features.marks)
    assert marked[marked >= 0].tolist() == list(range(len(words)))
    for marks, target in zip(features.marks, features.targets, strict=True):
        assert [tags[word] if word >= 0 else IGNORED for word in marks] == target.tolist()
    whole = encode(any_tokenizer, "token-classification", [example], 3, Lengths(512), has_types)
    assert whole.ids[0].tolist() == any_tokenizer(" ".join(words))["input_ids"]


def test_sets_without_labels_have_no_targets(tokenizer):
    assert encoded(tokenizer, [Example("red", None, None), Example("cat", None, 1)], 16).targets is None
