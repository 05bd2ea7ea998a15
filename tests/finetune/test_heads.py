"""Heads: losses by hand, options in any order, words that matter, answers against brute force, padding."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frugalbert.finetune import heads, models
from frugalbert.finetune.features import Features, Lengths, encode
from frugalbert.finetune.tasks import Data, Example, Task
from frugalbert.finetune.trial import predict
from tests.finetune.conftest import sentences

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def source(tiny):
    return models.open_source(str(tiny), None)


def task_of(kind: str) -> Task:
    return Task("mine", "mine", kind, ("accuracy",), ("accuracy",))


def model_for(source: models.Source, kind: str, examples: list[Example], labels: tuple[str, ...]) -> torch.nn.Module:
    data = Data(task_of(kind), labels, {"train": examples, "dev": examples})
    return models.build(source, data, "random", 0.0, 3).eval()


def features_of(source: models.Source, kind: str, examples: list[Example], labels: int = 0, most: int = 64) -> Features:
    return encode(source.tokenizer, kind, examples, labels, Lengths(most, stride=8), source.has_types)


# ---- losses ---------------------------------------------------------------------------------------------------------


def features(kind: str, targets: object, units: list[int]) -> Features:
    rows = units[-1]
    return Features(kind, [], None, np.arange(rows), np.array(units), targets, None, 0, 16, 0)


def test_choice_loss_is_minus_the_log_of_the_right_options_share():
    loss = heads.Loss(features("multiple-choice", [(1,), (0, 2)], [0, 2, 5]))
    found = loss(torch.tensor([[0.0], [1.0], [2.0], [0.5], [1.0]]), np.array([0, 1]))
    share = math.exp(1) / (1 + math.exp(1))
    both = (math.exp(2) + math.exp(1)) / (math.exp(2) + math.exp(0.5) + math.exp(1))
    assert found.tolist() == pytest.approx([-math.log(share), -math.log(both)])


def test_answer_loss_is_the_mean_of_start_and_end():
    loss = heads.Loss(features("question-answering", np.array([[0, 2]]), [0, 1]))
    found = loss(torch.tensor([[[1.0, 0.0], [0.0, 0.0], [0.0, 3.0]]]), np.array([0]))
    start = -math.log(math.e / (math.e + 2))
    end = -math.log(math.exp(3) / (math.exp(3) + 2))
    assert found.item() == pytest.approx((start + end) / 2)


def test_tag_loss_is_the_mean_over_tagged_words():
    loss = heads.Loss(features("token-classification", [np.array([-100, 1, 0])], [0, 1]))
    logits = torch.tensor([[[5.0, 0.0], [0.0, 1.0], [0.0, 1.0], [9.0, 9.0]]])
    right, wrong = math.log(1 + math.exp(-1)), math.log(1 + math.exp(1))
    assert loss(logits, np.array([0])).item() == pytest.approx((right + wrong) / 2)


# ---- what the heads depend on ---------------------------------------------------------------------------------------


def test_options_may_come_in_any_order(source):
    options = tuple(sentences(4, 8))
    order = [2, 0, 3, 1]
    examples = [Example("the cat runs", label=0, options=options),
                Example("the cat runs", label=0, options=tuple(options[number] for number in order))]  # fmt: skip
    model = model_for(source, "multiple-choice", examples, ())
    found = np.concatenate(predict(model, features_of(source, "multiple-choice", examples), CPU))
    assert found[4:] == pytest.approx(found[:4][order], abs=1e-6)
    assert len(set(found[:4].round(6))) == 4


def test_the_answer_depends_on_the_word_that_is_pointed_at(source):
    text = "red cat runs red dog"
    words = [Example(text, "a cat", 0, spans=((0, start, start + 3), (1, 2, 5))) for start in (0, 4, 13)]
    model = model_for(source, "classification", words, ("no", "yes"))
    assert isinstance(model, heads.SpanClassifier)
    found = np.stack(predict(model, features_of(source, "classification", words, 2), CPU))
    assert found.shape == (3, 2)
    assert len({tuple(row.round(6)) for row in found}) == 3


EXAMPLES = {
    "classification": [Example("red cat", "blue", 0), Example("red " * 20, "cat dog", 1)],
    "regression": [Example("red cat", None, 0.5), Example("red " * 20, None, 1.5)],
    "multiple-choice": [Example("red", label=0, options=("cat", "dog " * 20)),
                        Example("blue", label=1, options=("a", "b"))],
    "question-answering": [Example("cat", "red cat runs", 1, answers=("cat",), starts=(4,)),
                           Example("dog", "red dog " * 15, 1, answers=("dog",), starts=(4,))],
    "token-classification": [Example("", words=("red", "cat"), label=(0, 1)),
                             Example("", words=("red", "dog") * 12, label=(0, 1) * 12)],
}  # fmt: skip


@pytest.mark.parametrize("kind", EXAMPLES)
def test_padding_changes_nothing(source, kind):
    examples, labels = EXAMPLES[kind], ("no", "yes") if kind in ("classification", "token-classification") else ()
    model = model_for(source, kind, examples, labels)
    together = predict(model, features_of(source, kind, examples, len(labels)), CPU)
    alone = [row for e in examples for row in predict(model, features_of(source, kind, [e], len(labels)), CPU)]
    assert len(together) == len(alone)
    for one, other in zip(together, alone, strict=True):
        assert one == pytest.approx(other, abs=2e-6)


# ---- answers --------------------------------------------------------------------------------------------------------


@settings(derandomize=True, max_examples=150, deadline=None)
@given(st.integers(1, 18), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_the_best_span_is_that_of_brute_force(length, longest, seed):
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(length, 2)).round(2)
    inside = generator.random(length) < 0.8
    score, first, last = heads.best_span(logits, inside, longest)
    spans = [(a, b) for a in range(length) for b in range(a, min(length, a + longest)) if inside[a] and inside[b]]
    if not spans:
        assert score <= heads.LOWEST
        return
    assert (first, last) in spans
    assert score == pytest.approx(max(logits[a, 0] + logits[b, 1] for a, b in spans))


def test_answers_come_from_the_best_window_as_the_passage_writes_them():
    passage = "The  Cat sat. It (Dog) ran."
    places = [[(0, 3), (5, 8)], [(14, 16), (18, 21)]]
    marks = [np.array([[-1, -1], *part, [-1, -1]]) for part in places]
    shown = Features("question-answering", [], None, np.zeros(2, int), np.arange(3), None, marks, 0, 16, 0)
    weak = np.array([[1.0, 1.0], [0.0, 0.0], [1.0, 1.5], [9.0, 9.0]])  # the last is no part of the passage
    strong = np.array([[0.5, 1.0], [0.0, 0.0], [2.0, 2.0], [9.0, 9.0]])
    example = Example("?", passage, 1)
    texts, odds = heads.answers([weak, strong], shown, [example], 30, empty=True)
    assert texts == ["Dog"]
    assert odds == [1.5 - 4.0]  # the lowest null score of the windows minus the best span
    sure = np.array([[5.0, 5.0], [0.0, 0.0], [1.0, 1.0], [9.0, 9.0]])
    assert heads.answers([sure, sure], shown, [example], 30, empty=True)[0] == [""]
    assert heads.answers([sure, sure], shown, [example], 30, empty=False)[0] == ["Cat"]
