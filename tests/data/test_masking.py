"""Masks: the right tokens in the right shares, the same for a row wherever and whenever it is drawn."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frugalbert.config import Mask
from frugalbert.data.masking import (
    IGNORED,
    Batch,
    Vocabulary,
    documents,
    mlm_batch,
    replace_tokens,
    restore,
    sample,
)
from frugalbert.data.rows import ShardSet, gather_rows, to_device
from frugalbert.data.slots import num_slots
from tests.data.small_shards import ORDINARY, SPECIAL, random_documents, small_tokenizer, write_shards

VOCAB = 100


def vocabulary(size: int = VOCAB, continuing: range = range(60, 100)) -> Vocabulary:
    special = torch.zeros(size, dtype=torch.bool)
    special[SPECIAL["all"]] = True
    continuation = torch.zeros(size, dtype=torch.bool)
    continuation[list(continuing)] = True
    ordinary = torch.arange(ORDINARY, size)
    return Vocabulary(size, SPECIAL["cls"], SPECIAL["sep"], SPECIAL["pad"], SPECIAL["mask"], special, ordinary,
                      continuation)  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> torch.Tensor:
    """About 8,000 packed rows of 128 tokens, over a million tokens."""
    out = tmp_path_factory.mktemp("shards")
    write_shards(out, random_documents(np.random.default_rng(0), 10_000, VOCAB, mean=120), lengths=(128,))
    shard_set = ShardSet.open(out, 128)
    assert shard_set.tokens > 1_000_000
    return gather_rows(to_device(shard_set, "cpu"), np.arange(shard_set.rows))


def draw(rows: torch.Tensor, mask: Mask | None = None, rate: float = 0.15, seed: int = 0, epoch: int = 0) -> Batch:
    ids = torch.arange(len(rows))
    return mlm_batch(rows, ids, torch.full_like(ids, epoch), mask or Mask(), rate, seed, vocabulary())


def expected_counts(rows: torch.Tensor, rate: float) -> list[int]:
    """The rule of BERT's sample builder, in Python: n = max(1, round(rate * length)), never more than there are."""
    ordinary = (~vocabulary().special[rows]).sum(1).tolist()
    lengths = (rows != SPECIAL["pad"]).sum(1).tolist()
    return [min(max(1, round(rate * n)), room) for n, room in zip(lengths, ordinary, strict=True)]


# ---- which tokens ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole_words", [False, True])
@pytest.mark.parametrize("rate", [0.15, 0.3])
def test_labels_put_back_give_the_exact_rows(rows, rate, whole_words):
    batch = draw(rows, Mask(whole_words=whole_words), rate)
    assert torch.equal(restore(batch), rows)
    used = batch.labels != IGNORED
    assert torch.equal(rows.flatten()[batch.masked_positions[used]], batch.labels[used])
    assert not vocabulary().special[batch.labels[used]].any()
    untouched = torch.ones(rows.numel(), dtype=torch.bool)
    untouched[batch.masked_positions[used]] = False
    assert torch.equal(batch.input_ids.flatten()[untouched], rows.flatten()[untouched])
    assert batch.masked_positions.shape == (len(rows) * num_slots(rate, 128),)


@pytest.mark.parametrize("rate", [0.05, 0.15, 0.3])
def test_each_row_has_the_number_of_masks_of_the_rule(rows, rate):
    short = rows.clone()
    cut = torch.arange(len(rows)) % 128
    short[torch.arange(128) >= cut.clamp(min=3)[:, None]] = SPECIAL["pad"]
    for ids in (rows[:500], short[:500]):
        batch = draw(ids, rate=rate)
        used = (batch.labels != IGNORED).view(len(ids), -1)
        assert used.sum(1).tolist() == expected_counts(ids, rate)
        positions = batch.masked_positions.view(len(ids), -1)
        owners = positions // 128
        assert torch.equal(owners, torch.arange(len(ids))[:, None].expand_as(owners))
        for row in range(len(ids)):
            taken = positions[row][used[row]].tolist()
            assert taken == sorted(set(taken))


@pytest.mark.parametrize("whole_words", [False, True])
def test_no_row_has_more_masks_than_the_cap(rows, whole_words):
    """Long rows stop at the cap, short ones keep the number of the rate; the slots are no more than the cap."""
    short = rows[:400].clone()
    short[200:, 40:] = SPECIAL["pad"]
    whole, capped = (draw(short, Mask(whole_words=whole_words, max_predictions=most)) for most in (None, 12))
    counts = [(batch.labels != IGNORED).view(400, -1).sum(1) for batch in (whole, capped)]
    assert capped.labels.numel() == 400 * 12
    if not whole_words:
        assert torch.equal(counts[1], counts[0].clamp(max=12))
    assert int(counts[0][:200].min()) > 12 == int(counts[1].max())
    assert torch.equal(counts[1][200:], counts[0][200:])
    assert torch.equal(restore(capped), short)
    places = (capped.masked_positions % 128).view(400, -1)[:200]
    assert 55 < float(places.double().mean()) < 71, "spread over the row, not its first ones"


def test_a_rate_of_zero_masks_nothing(rows):
    batch = draw(rows[:8], rate=0.0)
    assert batch.labels.numel() == 0
    assert torch.equal(batch.input_ids, rows[:8])


def chi_square(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((found.double() - expected) ** 2 / expected).sum())


def test_shares_over_a_million_tokens(rows):
    """80/10/10, 15 % and the place within a row by chi-square; a wrong share of one per cent is far outside."""
    batch = draw(rows)
    used = batch.labels != IGNORED
    labels, seen = batch.labels[used], batch.input_ids.flatten()[batch.masked_positions[used]]
    masked, kept = int((seen == SPECIAL["mask"]).sum()), int((seen == labels).sum())
    ordinary = VOCAB - ORDINARY
    shares = torch.tensor([0.8, 0.1 + 0.1 / ordinary, 0.1 - 0.1 / ordinary], dtype=torch.float64)
    found = torch.tensor([masked, kept, len(seen) - masked - kept])
    assert chi_square(found, shares * len(seen)) < 20.0  # 2 degrees of freedom: p < 5e-5
    assert chi_square(found, torch.tensor([0.79, 0.1, 0.11]).double() * len(seen)) > 50.0  # the check can fail
    drawn = seen[(seen != SPECIAL["mask"]) & (seen != labels)]
    each = torch.bincount(drawn, minlength=VOCAB)
    assert each[:ORDINARY].sum() == 0
    assert chi_square(each[ORDINARY:], torch.full((ordinary,), len(drawn) / ordinary)) < ordinary + 5 * 14
    tokens = int((rows != SPECIAL["pad"]).sum())
    assert abs(len(labels) / tokens - 0.15) < 0.002  # 19 of 128 is 0.1484, the rule of the references
    full = (~vocabulary().special[rows]).sum(1) == 126
    places = torch.bincount(batch.masked_positions.view(len(rows), -1)[full].flatten() % 128, minlength=128)[1:127]
    mean = places.sum() / 126
    assert chi_square(places, mean.expand(126)) < 126 + 5 * 16


def test_random_tokens_may_include_special_ones(rows):
    seen = draw(rows, Mask(random_token_includes_special=True)).input_ids
    assert ((seen == SPECIAL["cls"]) & (rows != SPECIAL["cls"])).any()


def test_the_style_mask_always_masks(rows):
    batch = draw(rows, Mask(style="mask"))
    used = batch.labels != IGNORED
    assert (batch.input_ids.flatten()[batch.masked_positions[used]] == SPECIAL["mask"]).all()


# ---- the same wherever it is drawn -----------------------------------------------------------------------------------


@pytest.mark.parametrize("whole_words", [False, True])
def test_a_rows_masks_do_not_depend_on_its_batch(rows, whole_words):
    """Any order, any composition, any number of ranks: row 17 of epoch 3 is always the same sample."""
    mask, ids = Mask(whole_words=whole_words), torch.randperm(64, generator=torch.Generator().manual_seed(0))
    whole = draw(rows[:64], mask, epoch=3)
    slots = num_slots(0.15, 128)
    for group in ids.split([1, 5, 10, 48]):
        epochs = torch.full_like(group, 3)
        part = mlm_batch(rows[group], group, epochs, mask, 0.15, 0, vocabulary())
        assert torch.equal(part.input_ids, whole.input_ids[group])
        assert torch.equal(part.labels.view(-1, slots), whole.labels.view(-1, slots)[group])
        assert torch.equal(part.masked_positions.view(-1, slots) % 128,
                           whole.masked_positions.view(-1, slots)[group] % 128)  # fmt: skip
        assert torch.equal(part.draws.view(-1, slots), whole.draws.view(-1, slots)[group])


def test_epochs_seeds_and_rows_differ_only_in_their_masks(rows):
    one = draw(rows[:200])
    for other in (draw(rows[:200], epoch=1), draw(rows[:200], seed=1)):
        assert torch.equal(restore(one), restore(other))
        assert torch.equal(one.document_ids, other.document_ids)
        same = (one.masked_positions[:, None] == other.masked_positions).any(1).double().mean()
        assert 0.10 < same < 0.20  # 15 % by chance


def test_fixed_copies_come_round_again(rows):
    """Three copies: epochs 0, 1, 2 differ, epoch 3 is epoch 0 again; without copies it is not."""
    fixed = [draw(rows[:200], Mask(copies=3), epoch=epoch) for epoch in range(4)]
    fresh = [draw(rows[:200], epoch=epoch) for epoch in range(4)]
    for epoch in range(4):
        assert torch.equal(fixed[epoch].input_ids, fresh[epoch % 3].input_ids)
        assert torch.equal(fixed[epoch].masked_positions, fresh[epoch % 3].masked_positions)
    assert not torch.equal(fixed[3].masked_positions, fresh[3].masked_positions)


def test_equal_rows_have_different_masks(rows):
    equal_rows = rows[:1].expand(200, -1)
    places = draw(equal_rows).masked_positions.view(200, -1) % 128
    assert len({tuple(row) for row in places.tolist()}) == 200


def test_global_generators_are_not_touched(rows):
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    draw(rows[:8])
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_hash_is_splitmix64():
    """Against the reference numbers of splitmix64 from state 1234567, and numpy's unsigned arithmetic."""
    from frugalbert.data import rows as host
    from frugalbert.data.masking import GOLDEN, _mix

    states = torch.tensor([1234567]) + torch.arange(1, 4) * GOLDEN
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [number % 2**64 for number in _mix(states).tolist()] == expected
    values = np.random.default_rng(0).integers(0, 2**64, 10_000, dtype=np.uint64)
    assert np.array_equal(_mix(torch.from_numpy(values.view(np.int64))).numpy().view(np.uint64), host._mix(values))


def test_compiles_into_one_graph_without_looking_at_values(rows):
    """No synchronisation with the host and no graph break; another epoch, seed or content does not compile again."""
    mask = Mask(whole_words=True)
    words = vocabulary()
    compiled = torch.compile(
        lambda rows, ids, epochs: mlm_batch(rows, ids, epochs, mask, 0.15, 0, words), fullgraph=True, backend="eager"
    )
    ids = torch.arange(8)
    for shift in (0, 1):
        with torch.compiler.set_stance("fail_on_recompile" if shift else "default"):
            found = compiled(rows[shift : shift + 8], ids + shift, ids * 0 + shift)
        expected = mlm_batch(rows[shift : shift + 8], ids + shift, ids * 0 + shift, mask, 0.15, 0, words)
        assert torch.equal(found.input_ids, expected.input_ids)
        assert torch.equal(found.labels, expected.labels)


# ---- documents -------------------------------------------------------------------------------------------------------


def test_documents_and_positions_restart(rows):
    document_ids, position_ids = documents(rows[:100], vocabulary())
    for row, numbers, places in zip(rows[:100].tolist(), document_ids.tolist(), position_ids.tolist(), strict=True):
        document = place = 0
        for token, number, found in zip(row, numbers, places, strict=True):
            document, place = (document + 1, 0) if token == SPECIAL["cls"] else (document, place + 1)
            assert (number, found) == ((0, 0) if token == SPECIAL["pad"] else (document, place))


# ---- whole words -----------------------------------------------------------------------------------------------------


def words_of(row: list[int]) -> list[set[int]]:
    """Places of each word of a row: an ordinary token, and the continuing ones right behind it."""
    words: list[set[int]] = []
    for place, token in enumerate(row):
        if token < ORDINARY:
            continue
        if token >= 60 and words and place - 1 in words[-1]:
            words[-1].add(place)
        else:
            words.append({place})
    return words


@given(
    data=st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=12, max_size=12), min_size=1, max_size=6),
    rate=st.sampled_from([0.1, 0.15, 0.3, 0.5]),
    seed=st.integers(0, 2**70),
)
@settings(derandomize=True, deadline=None, max_examples=80)
def test_words_are_masked_whole_or_not_at_all(data, rate, seed):
    rows = torch.tensor([[SPECIAL["cls"], *row] for row in data])
    ids = torch.arange(len(rows))
    batch = mlm_batch(rows, ids, ids, Mask(whole_words=True), rate, seed, vocabulary())
    assert torch.equal(restore(batch), rows)
    used = (batch.labels != IGNORED).view(len(rows), -1)
    limits = expected_counts(rows, rate)
    for number, row in enumerate(rows.tolist()):
        taken = set((batch.masked_positions.view(len(rows), -1)[number][used[number]] - number * 13).tolist())
        words = words_of(row)
        assert all(word <= taken or not word & taken for word in words)
        left = limits[number] - len(taken)
        assert left >= 0
        assert left == 0 or all(len(word) > 1 for word in words if not word & taken)


def test_whole_words_are_chosen_as_the_reference_does(rows):
    """Share of masks, and of continuing pieces among them, beside BERT's own greedy rule with a shuffled list."""
    batch = draw(rows, Mask(whole_words=True))
    used = batch.labels != IGNORED
    assert abs(int(used.sum()) / sum(expected_counts(rows, 0.15)) - 1) < 0.005
    shuffle, greedy = random.Random(0), []
    for row, limit in zip(rows[:1500].tolist(), expected_counts(rows[:1500], 0.15), strict=True):
        words, taken = words_of(row), 0
        shuffle.shuffle(words)
        for word in words:
            if taken + len(word) <= limit:
                taken += len(word)
                greedy += [row[place] >= 60 for place in word]
    continuing = float((batch.labels[used] >= 60).double().mean())
    assert abs(continuing / (sum(greedy) / len(greedy)) - 1) < 0.03


def test_a_tokenizer_without_word_marks_is_refused_in_one_sentence(rows):
    unmarked = Vocabulary(**(vars(vocabulary()) | {"continuation": None}))
    ids = torch.arange(2)
    with pytest.raises(ValueError, match=r"pretrain\.mask\.whole_words: false"):
        mlm_batch(rows[:2], ids, ids, Mask(whole_words=True), 0.15, 0, unmarked)


TEXTS = ["the misunderstanding of understandings, don't you think", "unbelievable believers believe in standing"] * 20


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "unigram"])
def test_vocabulary_of_a_tokenizer(kind):
    tokenizer = small_tokenizer(kind, TEXTS, 320 if kind == "bpe" else 60)
    found = Vocabulary.from_tokenizer(tokenizer)
    assert found.size == len(tokenizer)
    assert sorted(SPECIAL["all"]) == torch.nonzero(found.special).flatten().tolist()
    assert set(found.ordinary.tolist()) == set(range(found.size)) - set(SPECIAL["all"])
    assert (found.cls, found.sep, found.pad, found.mask) == (2, 3, 0, 4)
    text = "misunderstanding, don't believe"
    tokens = tokenizer.tokenize(text)
    ids = tokenizer.convert_tokens_to_ids(tokens)
    words: list[str] = []
    for place, number in enumerate(ids):
        if place and found.continuation[number]:
            words[-1] += tokens[place].removeprefix("##")
        else:
            words.append(tokens[place])
    words = [word.lstrip("Ġ▁") for word in words if word.strip("Ġ▁")]
    assert {"misunderstanding", "believe"} <= {word.strip(",") for word in words}, words


# ---- replaced-token detection ----------------------------------------------------------------------------------------


def test_samples_follow_the_distribution():
    logits = torch.tensor([0.0, 1.0, -2.0, 3.0, float("-inf")])
    draws = (torch.arange(20_000) + 0.5) / 20_000
    found = torch.bincount(sample(logits.expand(20_000, -1), draws), minlength=5) / 20_000
    assert torch.allclose(found, logits.softmax(0), atol=2e-4)
    impossible = float("-inf")
    edges = sample(torch.tensor([[impossible, 0.0, 0.0, impossible]] * 2), torch.tensor([0.0, 1 - 2.0**-24]))
    assert edges.tolist() == [1, 2]


def test_draws_are_uniform_and_unlike_the_choice_of_mask(rows):
    batch = draw(rows)
    assert float(batch.draws.min()) >= 0
    assert float(batch.draws.max()) < 1
    counts = torch.histc(batch.draws, 50, 0, 1)
    assert chi_square(counts, counts.double().mean().expand(50)) < 50 + 5 * 10
    hidden = batch.input_ids.flatten()[batch.masked_positions] == SPECIAL["mask"]
    assert abs(float(batch.draws[hidden].mean()) - 0.5) < 0.01


def test_replaced_tokens_are_those_that_differ(rows):
    batch = draw(rows[:50])
    tokens = torch.where(batch.draws < 0.5, 50, batch.labels.clamp(min=0))
    ids, replaced = replace_tokens(batch, tokens)
    assert torch.equal(ids != rows[:50], replaced)
    used = batch.labels != IGNORED
    assert torch.equal(ids.flatten()[batch.masked_positions[used]], tokens[used])
    assert int(replaced.sum()) == int(((batch.draws < 0.5) & (batch.labels != 50) & used).sum())
    again, none = replace_tokens(batch, batch.labels.clamp(min=0))
    assert torch.equal(again, rows[:50])
    assert not none.any()
