"""Sentence pairs: what follows is what followed, random is from elsewhere, half and half, whoever makes them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frugalbert.config import Config, Machine, Mask, Shards
from frugalbert.data import pairs, shards
from frugalbert.data.masking import IGNORED, Vocabulary, mlm_batch, restore, with_pairs
from frugalbert.data.pairs import Documents, make_rows, sentences
from frugalbert.data.rows import ShardSet
from tests.data.small_shards import SPECIAL, small_tokenizer, write_corpus
from tests.data.test_shards import hashes

ROOM = 29  # of rows of 32 tokens


def section(kind: str = "nsp", **values: Any) -> Shards:
    return Shards.model_validate({"length": 32, "pack": False, "pairs": kind, **values})


def numbered(sizes: list[list[int]], first: int = 5) -> Documents:
    """Documents of sentences of so many tokens, every token of all documents another number."""
    counts = np.array([count for document in sizes for count in document], np.int64)
    ids = np.arange(first, first + counts.sum(), dtype=np.uint32)
    return Documents.of(ids, counts, np.array([len(document) for document in sizes], np.int64))


def spans_of(row: list[int]) -> tuple[list[int], list[int]]:
    """A and B of a row, whose form is checked."""
    while row and row[-1] == SPECIAL["pad"]:
        row.pop()
    assert (row[0], row[-1], row.count(SPECIAL["sep"])) == (SPECIAL["cls"], SPECIAL["sep"], 2)
    middle = row.index(SPECIAL["sep"])
    first, second = row[1:middle], row[middle + 1 : -1]
    assert first
    assert second
    return first, second


# ---- sentences -------------------------------------------------------------------------------------------------------


def test_sentences():
    text = 'He said: "Go!" Then (see p. 3, e.g. here.) he left… and\nA new line.\n\n\nWhat? 彼は来た。「はい。」見た'
    assert sentences(text) == [
        'He said: "Go!"', " Then (see p.", " 3, e.g. here.) he left… and", "\nA new line.", "\n\n\nWhat?",
        " 彼は来た。", "「はい。」", "見た",
    ]  # fmt: skip


@given(st.text(alphabet="aB.!? \n\"')。」", max_size=60))
@settings(derandomize=True, deadline=None, max_examples=200)
def test_sentences_join_to_the_text(text: str):
    assert "".join(sentences(text)) == text
    assert all(sentences(text)) or not text


def test_sentences_take_linear_time():
    for text in ("." * 300_000, '."' * 200_000, "\n" * 300_000, ". " * 200_000, "." + " " * 300_000):
        assert "".join(sentences(text)) == text


# ---- pairs -----------------------------------------------------------------------------------------------------------

SIZES = st.lists(st.lists(st.integers(1, 70), min_size=1, max_size=12), min_size=2, max_size=6)


@given(sizes=SIZES, short=st.sampled_from([0.0, 0.5]), kind=st.sampled_from(["nsp", "sop"]))
@settings(derandomize=True, deadline=None, max_examples=150)
def test_a_pair_is_what_its_label_says(sizes: list[list[int]], short: float, kind: str):
    documents, starts = numbered(sizes), np.cumsum([0, *map(sum, sizes)]) + 5
    rows, labels, lost = make_rows(documents, len(sizes), section(kind, short_share=short), 32, "x", SPECIAL)
    seen: list[int] = []
    for row, label in zip(rows.tolist(), labels.tolist(), strict=True):
        a, b = spans_of(row)
        assert len(a) + len(b) <= ROOM
        owners = [int(np.searchsorted(starts, part[0], "right")) for part in (a, b)]
        for part, owner in zip((a, b), owners, strict=True):  # a run of one document's tokens
            assert part == list(range(part[0], part[0] + len(part)))
            assert starts[owner - 1] <= part[0] <= part[-1] < starts[owner]
        if kind == "nsp":
            assert (owners[0] != owners[1]) == bool(label)
        else:
            assert owners[0] == owners[1]
        if owners[0] == owners[1]:
            assert (b[-1] < a[0]) if label else (a[-1] < b[0])
        seen += a + (b if owners[0] == owners[1] else [])
    assert len(set(seen)) == len(seen), "what was not used is put back, and used once"
    assert lost == len(documents.ids) - len(seen)


def test_only_what_is_too_long_for_its_row_is_lost():
    """Of sentences of one token nothing is: whatever stood behind a random segment's A begins the next pair."""
    sizes = [[1] * count for count in range(2, 120)]
    lost = [make_rows(numbered(sizes), len(sizes), section(kind), 32, "x", SPECIAL)[2] for kind in ("nsp", "sop")]
    assert lost == [0, sum(count % ROOM == 1 for count in range(2, 120))], "one token alone has no order"


@pytest.mark.parametrize("kind", ["nsp", "sop"])
def test_half_of_the_pairs_are_random(kind: str):
    """Within four standard deviations, for passages and for sentences that stand alone."""
    rng = random.Random(0)
    for most in (1, 30):
        sizes = [[rng.randrange(2, 20) for _ in range(rng.randrange(1, most + 1))] for _ in range(6000 // most)]
        labels = make_rows(numbered(sizes), len(sizes), section(kind), 32, "x", SPECIAL)[1]
        assert abs(labels.mean() - 0.5) < 4 * 0.5 / len(labels) ** 0.5, (most, len(labels))


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_short_targets(share: float):
    """The first pair of a document of sentences of one token is as long as its target: evenly from 2 to all."""
    sizes = [[1] * 40] * 3000
    rows, _, _ = make_rows(numbered(sizes), len(sizes), section("sop", short_share=share), 32, "x", SPECIAL)
    found = [sum(spans_of(row), []) for row in rows.tolist()]
    first = [tokens for tokens in found if (min(tokens) - 5) % 40 == 0]
    counts = np.bincount([len(tokens) for tokens in first], minlength=ROOM + 1)
    assert (len(first), counts[:2].sum()) == (3000, 0)
    assert abs(counts[2:ROOM].sum() / 3000 - share * 27 / 28) <= 4 * (share * (1 - share * 27 / 28) / 3000) ** 0.5
    assert share < 1.0 or ((counts[2:] - 3000 / 28) ** 2 / (3000 / 28)).sum() < 27 + 5 * 54**0.5


def test_truncation_is_berts():
    """The counts are those of its loop, and which end loses a token is drawn for each."""

    def loop(a: int, b: int, room: int) -> tuple[int, int]:
        while a + b > room:
            a, b = (a - 1, b) if a > b else (a, b - 1)
        return a, b

    fronts = []
    for a, b, room in [(10, 3, 13), (10, 4, 13), (4, 20, 13), (20, 20, 13), (7, 6, 12), (6, 7, 12), (30, 1, 29)]:
        for seed in range(40):
            one, two = pairs._truncated((100, 100 + a), (300, 300 + b), room, random.Random(seed))
            assert (one[1] - one[0], two[1] - two[0]) == loop(a, b, room)
            assert 100 <= one[0] <= one[1] <= 100 + a
            assert 300 <= two[0] <= two[1] <= 300 + b
            if (a, b) == (20, 20):
                fronts.append(one[0] - 100)
    assert 5 < np.mean(fronts) < 8
    assert min(fronts) < 5 < 8 < max(fronts), "of 13 tokens"


def test_a_copy_of_the_document_is_not_another_one():
    """NVIDIA's #421: what is drawn from the same text may be its true next, and was called random."""
    once = numbered([[5, 5, 5, 5, 5, 5]])
    copies = once + once + once + once + numbered([[9, 9]], first=900)
    seen: set[tuple[int, ...]] = set()
    for name in "abcdefgh":
        rows, labels, _ = make_rows(copies, 4, section(), 32, name, SPECIAL)
        for row, label in zip(rows.tolist(), labels.tolist(), strict=True):
            assert (spans_of(list(row))[1][0] >= 900) == bool(label)
            seen.add((label, *row))
    assert len(seen) > 10, "each copy makes pairs of its own"
    assert {label for label, *_ in seen} == {0, 1}


def test_what_happens_to_be_the_true_next_is_not_random():
    """Another document with the same sentences: what is drawn and the same as the true next has its label."""
    ids = np.array([5, 6, 7, 8, 9, 7, 8], np.uint32)
    documents = Documents.of(ids, np.ones(7, np.int64), np.array([4, 3]))
    found = set()
    for name in map(str, range(60)):
        rows, labels, _ = make_rows(documents, 1, section(), 8, name, SPECIAL)
        for row, label in zip(rows.tolist(), labels.tolist(), strict=True):
            text = sum(spans_of(row), [])
            found.add((text == list(range(text[0], text[0] + len(text))) and 9 not in text, int(label)))
    assert found == {(True, 0), (False, 1)}


# ---- the stage -------------------------------------------------------------------------------------------------------


def story(rng: random.Random, number: int) -> str:
    words = [f"{letter}{number % 10}" for letter in "abcdef"]
    return " ".join(
        " ".join(rng.choices(words, k=rng.randrange(2, 9))).capitalize() + "." for _ in range(rng.randrange(4, 25))
    )


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A corpus of three files; the second has one document, the third one that is held out."""
    folder, rng = tmp_path_factory.mktemp("pairs"), random.Random(0)
    documents = [(story(rng, number), number % 5 == 3) for number in range(60)]
    small_tokenizer("wordpiece", [text for text, _ in documents], 120).save_pretrained(folder / "tokenizer")
    (folder / "corpus").mkdir()
    write_corpus(folder / "corpus", [documents[:50], documents[50:51], documents[51:54]])
    return {name: folder / name for name in ("corpus", "tokenizer")}


def make(inputs: dict[str, Path], out: Path, chosen: Shards, workers: int = 1) -> dict[str, Any]:
    out.mkdir(exist_ok=True)
    return shards.build(chosen, inputs, out, Machine(workers=workers))


@pytest.mark.fault("R11")
@pytest.mark.parametrize("kind", ["nsp", "sop"])
def test_any_number_of_workers_gives_the_same_bytes(inputs, tmp_path, monkeypatch, kind, capsys):
    chosen = section(kind, length=(16, 32), short_share=0.1)
    figures = make(inputs, tmp_path / "one", chosen)
    assert "tokens discarded, 5" in capsys.readouterr().err
    make(inputs, tmp_path / "two", chosen, workers=2)
    monkeypatch.setattr(shards, "BATCH_CHARACTERS", 300)
    make(inputs, tmp_path / "batches", chosen)
    expected = hashes(tmp_path / "one")
    assert hashes(tmp_path / "two") == hashes(tmp_path / "batches") == expected
    assert "length-16/train-00001.labels" in expected
    entry = json.loads((tmp_path / "one/index.json").read_text())["sets"]["16"]["train"]
    found = ShardSet.open(tmp_path / "one", 16)
    assert found.labels is not None
    assert (len(found.labels), found.labels.sum()) == (found.rows, entry["random"])
    assert (found.ids != SPECIAL["pad"]).sum() == entry["tokens"] == figures["tokens"]
    assert figures["truncated_tokens"] == entry["truncated"] > 0
    assert figures["documents"] == 43


@pytest.mark.fault("R6")
def test_damaged_labels_are_noticed(inputs, tmp_path):
    make(inputs, tmp_path / "out", section())
    before = ShardSet.open(tmp_path / "out", 32).identity
    path = tmp_path / "out/length-32/train-00000.labels"
    labels = bytearray(path.read_bytes())
    labels[3] ^= 1
    path.write_bytes(labels)
    with pytest.raises(ValueError, match=r"train-00000\.labels is corrupted"):
        ShardSet.open(tmp_path / "out", 32)
    path.write_bytes(labels[:-1])
    with pytest.raises(ValueError, match=r"train-00000\.labels is truncated"):
        ShardSet.open(tmp_path / "out", 32, verify=False)
    make(inputs, tmp_path / "other", section(short_share=0.5))
    assert ShardSet.open(tmp_path / "other", 32).identity != before


def test_one_document_has_no_other_one_but_an_order(inputs, tmp_path):
    (tmp_path / "corpus").mkdir()
    text = story(random.Random(1), 1)
    write_corpus(tmp_path / "corpus", [[(text, False), (text + " More.", True)], [(text, False)]])
    with pytest.raises(ValueError, match=r"all train documents are the same; .* pairs: sop") as error:
        make({**inputs, "corpus": tmp_path / "corpus"}, tmp_path / "nsp", section())
    assert "\n" not in str(error.value)
    assert make({**inputs, "corpus": tmp_path / "corpus"}, tmp_path / "sop", section("sop"))["rows"] > 1


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"pack": True}, "write pack: false"),
        ({"hdf5": {}}, "remove samples and hdf5"),
        ({"samples": ["a.hdf5"]}, "remove samples and hdf5"),
    ],
)
def test_contradictions(values: dict[str, Any], sentence: str):
    with pytest.raises(ValueError, match=sentence):
        section(**values)


def test_only_masked_words_go_with_pairs():
    base = {"name": "x", "corpus": {"sources": ["a"]}, "tokenizer": {}, "shards": {"pack": False, "pairs": "sop"}}
    Config.model_validate({**base, "pretrain": {"budget": "1h", "pair_weight": 0.5}})
    with pytest.raises(ValueError, match="objective: mlm alone"):
        Config.model_validate({**base, "pretrain": {"budget": "1h", "objective": "rtd"}})
    with pytest.raises(ValueError, match="pair_weight belongs to shards.pairs"):
        Config.model_validate({**base, "shards": {}, "pretrain": {"budget": "1h", "pair_weight": 0.5}})


# ---- batches ---------------------------------------------------------------------------------------------------------


def test_masks_and_segments(inputs, tmp_path):
    """15 % of a row's tokens, never [CLS] or [SEP]; segments and labels are those of the row; both see each other."""
    from transformers import AutoTokenizer

    make(inputs, tmp_path / "out", section())
    found = ShardSet.open(tmp_path / "out", 32)
    words = Vocabulary.from_tokenizer(AutoTokenizer.from_pretrained(inputs["tokenizer"]))
    rows, numbers = torch.from_numpy(found.ids.astype(np.int64)), torch.arange(found.rows)
    mask = Mask(random_token_includes_special=True)
    plain = mlm_batch(rows, numbers, torch.zeros_like(numbers), mask, 0.15, 0, words)
    batch = with_pairs(plain, rows, torch.from_numpy(found.labels), words)
    real = rows != SPECIAL["pad"]
    masked = (batch.labels != IGNORED).view(found.rows, -1).sum(1)
    assert torch.equal(masked, (real.sum(1).double() * 0.15).round().long().clamp(min=1))
    assert torch.equal(restore(batch), rows)
    chosen = batch.labels[batch.labels != IGNORED]
    assert not torch.isin(chosen, torch.tensor(SPECIAL["all"])).any()
    assert torch.equal(batch.document_ids, real.long()), "a row is one document"
    assert torch.equal(batch.pair_labels, torch.from_numpy(found.labels).long())
    for row, types in zip(rows.tolist(), batch.token_type_ids.tolist(), strict=True):
        a, b = spans_of(list(row))
        assert types == [0] * (len(a) + 2) + [1] * (len(b) + 1) + [0] * (32 - len(a) - len(b) - 3)
