"""N-gram baselines: proper distributions, equal to a plain dictionary's, and as good as theory says."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from frugalbert.data import ngram
from frugalbert.data.rows import ShardSet
from tests.data.small_shards import ORDINARY, SPECIAL, random_documents, write_shards

VOCAB = 40


def chain(count: int, seed: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Documents of a known Markov chain over 35 tokens, and its transition probabilities."""
    generator = np.random.default_rng(0)
    steps = generator.dirichlet(np.full(VOCAB - ORDINARY, 0.1), VOCAB - ORDINARY)
    generator = np.random.default_rng(seed)
    documents = []
    for _ in range(count):
        draws, token, text = generator.random(200), 0, []
        for draw in draws:
            token = min(int(np.searchsorted(steps[token].cumsum(), draw)), VOCAB - ORDINARY - 1)
            text.append(token + ORDINARY)
        documents.append(np.array(text, np.uint32))
    return documents, steps


@pytest.fixture(scope="module")
def markov(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("markov")
    write_shards(out, chain(1500, 1)[0], lengths=(64,), files=2, vocab_size=VOCAB)
    return out


def masked(rows: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Some ordinary places of the rows with their tokens, and ignored slots between them."""
    places = np.flatnonzero(rows.ravel() >= ORDINARY)
    places = np.random.default_rng(seed).choice(places, 5000, replace=False)
    labels = rows.ravel()[places].astype(np.int64)
    labels[::7] = -100
    places[::7] = 0
    return places, labels


def test_on_a_known_chain_the_bigram_reaches_its_entropy(markov):
    train, held_out = ShardSet.open(markov, 64), ShardSet.open(markov, 64, "held_out")
    places, labels = masked(held_out.ids, 0)
    found = ngram.baselines(train, held_out.ids, places, labels)
    _, steps = chain(0, 0)
    inside = (labels >= 0) & (held_out.ids.ravel()[places - 1] >= ORDINARY)
    truth = -np.log(steps[held_out.ids.ravel()[places - 1][inside] - ORDINARY, labels[inside] - ORDINARY]).mean()
    assert abs(found["bigram_nll"] - truth) < 0.05
    assert found["bigram_nll"] < found["unigram_nll"] - 0.5
    assert found["unigram_nll"] < np.log(VOCAB - ORDINARY)


def test_equal_to_counting_by_hand(tmp_path, monkeypatch):
    """The merged chunks give the counts of a dictionary; chunks of every size give the same."""
    write_shards(tmp_path, random_documents(np.random.default_rng(3), 60, VOCAB, 30), lengths=(16,), vocab_size=VOCAB)
    train = ShardSet.open(tmp_path, 16)
    pairs = Counter(
        (int(left), int(right)) for row in train.ids for left, right in zip(row, row[1:], strict=False)
        if right >= ORDINARY
    )  # fmt: skip
    expected = {left * VOCAB + right: count for (left, right), count in pairs.items()}
    singles = Counter(int(token) for token in train.ids.ravel() if token >= ORDINARY)
    for chunk in (16, 50, 1000, 10**6):
        monkeypatch.setattr(ngram, "CHUNK_TOKENS", chunk)
        counts = ngram.count(train)
        assert dict(zip(counts.keys.tolist(), counts.counts.tolist(), strict=True)) == expected
        assert np.array_equal(counts.keys, np.sort(counts.keys))
        assert {token: count for token, count in enumerate(counts.unigrams.tolist()) if count} == dict(singles)


def test_probabilities_add_up_to_one(markov):
    counts = ngram.count(ShardSet.open(markov, 64))
    ordinary = np.flatnonzero(counts.ordinary)
    assert ngram.unigram(counts, ordinary).sum() == pytest.approx(1)
    for left in (SPECIAL["cls"], SPECIAL["pad"], ORDINARY, 20, VOCAB - 1):  # nothing ever follows [PAD]
        found = ngram.bigram(counts, np.full(len(ordinary), left), ordinary)
        assert found.sum() == pytest.approx(1)
        assert (found > 0).all()


def test_a_bound_on_the_tokens_is_kept(markov):
    train = ShardSet.open(markov, 64)
    few = ngram.count(train, max_tokens=6400)
    assert 0 < few.unigrams.sum() <= 6400
    rows = np.concatenate(list(ngram._chunks(train, 6400)))
    assert len(rows) == 100
    assert np.array_equal(rows[0], train.ids[0])
    assert np.array_equal(rows[-1], train.ids[99 * train.rows // 100])
    assert np.array_equal(np.concatenate(list(ngram._chunks(train, 10**9))), train.ids)


def test_nothing_to_measure_is_an_error(markov):
    train = ShardSet.open(markov, 64)
    with pytest.raises(ValueError, match="give validation more rows"):
        ngram.baselines(train, train.ids[:2], np.array([1, 2]), np.array([-100, -100]))
