"""Transformations: by seed alone, near the text but not the text, both sides of a pair; the guard against copies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from frugalbert.finetune import transforms
from frugalbert.finetune.tasks import Example
from frugalbert.finetune.transforms import LONGEST, build, copies, grams
from tests.finetune.conftest import WORDS, sentences

NAMES = ["dropout", "delete", "swap", "mix", "masked-lm", "synonym"]


def texts(count: int = 40) -> list[Example]:
    return [Example(text, label=number % 2) for number, text in enumerate(sentences(count, 3))]


def pairs(count: int = 40) -> list[Example]:
    both = zip(sentences(count, 3), sentences(count, 4), strict=True)
    return [Example(first, second, label=number % 2) for number, (first, second) in enumerate(both)]


@pytest.mark.parametrize("name", NAMES)
def test_a_function_of_the_seed(name: str, tiny: Path, tmp_path: Path):
    tau = build([name], 0.2, str(tiny), tmp_path)
    for examples in (texts(), pairs()):
        found = [tau(examples, np.random.default_rng(seed)) for seed in (1, 1, 2)]
        assert found[0] == found[1] != found[2]
        assert len(found[0]) > 20
        before = {example.digest for example in examples}
        assert all(example.digest not in before for example in found[0])
        assert all((example.text_b is None) == (examples[0].text_b is None) for example in found[0])
        assert all(example.text and example.text_b != "" and example.label in (0, 1) for example in found[0])


@pytest.mark.parametrize("name", [name for name in NAMES if name != "mix"])
def test_one_side_of_a_pair_changes(name: str, tiny: Path, tmp_path: Path):
    tau, sides = build([name], 0.2, str(tiny), tmp_path), set()
    for number, example in enumerate(pairs()):
        for new in tau([example], np.random.default_rng(number)):
            assert (new.text == example.text) != (new.text_b == example.text_b)
            assert new.label == example.label
            sides.add(new.text == example.text)
    assert sides == {True, False}


@pytest.mark.parametrize(("name", "longer"), [("dropout", -2), ("delete", -2), ("swap", 0), ("synonym", 0)])
def test_how_much_is_touched(name: str, longer: int, tiny: Path, tmp_path: Path):
    example = Example("red green blue yellow cat dog bird fish runs sleeps")
    (new,) = build([name], 0.2, str(tiny), tmp_path)([example], np.random.default_rng(0))
    before, after = example.text.split(), new.text.split()
    assert len(after) == len(before) + longer
    if longer:
        assert set(after) < set(before)
    elif name == "swap":
        assert sorted(after) == sorted(before)
    else:
        assert sum(a != b for a, b in zip(before, after, strict=True)) == 2
        assert all(word.isalpha() for word in after)


def test_one_word_is_never_lost(tmp_path: Path):
    for name in ("dropout", "delete", "swap"):
        assert build([name], 0.5, None, tmp_path)([Example("word"), Example("")], np.random.default_rng(0)) == []


def test_mixing_takes_halves(tmp_path: Path):
    made = build(["mix"], 0.1, None, tmp_path)([Example("a b c d", "k l"), Example("w x y z", "m n")], FixedOrder())
    assert [(new.text, new.text_b) for new in made] == [("a b y z", "k n"), ("w x c d", "m l")]


class FixedOrder(np.random.Generator):
    def __init__(self) -> None:
        super().__init__(np.random.PCG64(0))

    def permutation(self, x, axis=0):  # noqa: ARG002
        return np.arange(x)[::-1]


def test_long_texts_are_changed_within_a_window(tiny: Path, tmp_path: Path):
    words = WORDS * 20
    (new,) = build(["masked-lm"], 0.05, str(tiny), tmp_path)([Example(" ".join(words))], np.random.default_rng(0))
    changed = [place for place, (a, b) in enumerate(zip(words, new.text.split(), strict=True)) if a != b]
    assert 1 <= len(changed) <= round(0.05 * len(words))
    assert changed[-1] - changed[0] < LONGEST


def test_what_the_masked_model_is_asked(tiny: Path):
    """The hidden word's place, among its neighbours, by a forward pass of our own."""
    import torch

    network, tokenizer = transforms._open(str(tiny))
    words = "the red cat sleeps not".split()
    (guess,) = transforms._guess(network, tokenizer, [(words, [1, 3])])
    batch = tokenizer("the [MASK] cat [MASK] not", return_tensors="pt")
    with torch.no_grad():
        logits = network(input_ids=batch["input_ids"]).logits[0]
    assert list(guess) == [1, 3]
    assert guess[1][:10] == logits[2].topk(10).indices.tolist()
    assert guess[3][:10] == logits[4].topk(10).indices.tolist()
    known = transforms._whole_words(tokenizer)
    assert {"red", "cat"} <= set(known.values())
    assert not {"[MASK]", "##a", "?"} & set(known.values())
    text = "[MASK] stays text"
    assert transforms._guess(network, tokenizer, [(text.split(), [2])])[0].keys() == {2}


def test_whole_words_of_other_tokenizers():
    """Byte pairs and sentence pieces mark where words begin; a word is never drawn for itself."""

    class Marked:
        def get_vocab(self) -> dict[str, int]:
            return {"Ġcat": 0, "dog": 1, "Ġa1": 2, "Ġ": 3}

        def convert_tokens_to_string(self, pieces: list[str]) -> str:
            return pieces[0].replace("Ġ", " ")

    assert transforms._whole_words(Marked()) == {0: "cat"}
    rng = np.random.default_rng(0)
    assert {transforms._draw(["Cat", "cat", "dog", "cow"], "cat", rng) for _ in range(20)} == {"dog", "cow"}
    assert transforms._draw(["CAT"], "cat", rng) == "cat"


def test_several_take_turns(tmp_path: Path):
    made = build(["swap", "dropout"], 0.3, None, tmp_path)(texts(20), np.random.default_rng(0))
    rng = np.random.default_rng(0)
    first, second = (build([name], 0.3, None, tmp_path) for name in ("swap", "dropout"))
    assert made == first(texts(20)[::2], rng) + second(texts(20)[1::2], rng)


def test_a_function_of_the_users(tmp_path: Path):
    (tmp_path / "mine.py").write_text(
        "from dataclasses import replace\n"
        "def shout(mistakes, rng):\n"
        "    return [replace(e, text=e.text.upper() + '!' * int(rng.integers(1, 9))) for e in mistakes]\n"
        "def wrong(mistakes, rng): return [e.text for e in mistakes]\n"
    )
    (new,) = build(["mine.py:shout"], 0.1, None, tmp_path)([Example("a b", label=1)], np.random.default_rng(0))
    assert new.text.startswith("A B!")
    assert new.label == 1
    with pytest.raises(ValueError, match="must return a list of examples"):
        build(["mine.py:wrong"], 0.1, None, tmp_path)([Example("a")], np.random.default_rng(0))


@pytest.mark.parametrize(
    ("name", "model", "sentence"),
    [
        ("drop", None, "there is no 'drop'; write dropout"),
        ("masked-lm", None, "write agora.transform_model"),
        ("absent.py:f", None, "there is no file"),
        ("synonym", "nothing-here", "cannot be read|not found"),
    ],
)
def test_refusals(name: str, model: str | None, sentence: str, tmp_path: Path):
    if model:
        model = str(tmp_path / model)
        Path(model).mkdir()
    with pytest.raises((ValueError, OSError), match=sentence):
        build([name], 0.1, model, tmp_path)


def test_grams():
    assert grams(Example("One, two; THREE four")) == {("one", "two", "three"), ("two", "three", "four")}
    assert grams(Example("a b", "c")) == {("a", "b"), ("c",)}
    assert grams(Example("?!")) == frozenset()


def test_copies():
    text = "the old dog sleeps and the new cat eats fish all day"
    forbidden = [Example("unrelated words here"), Example(text), Example("first side", "second side")]
    new = [
        Example(text.upper() + "!"),  # equal but for case and punctuation
        Example(text + " long"),  # 10 of 11 runs
        Example("the old dog"),  # one run of ten
        Example("second side", "first side"),  # the same pair, turned round
        Example("something else entirely"),
        Example("first side", "other side"),
    ]
    assert copies(new, forbidden, 0.8) == {0, 1, 3}
    assert copies(new, forbidden, 0.95) == {0, 3}
    assert copies(new, forbidden, 1.0) == {0, 3}
    assert copies(new, [], 0.8) == set()


@pytest.mark.parametrize("seed", range(5))
def test_copies_against_the_definition(seed: int):
    some = [Example(" ".join(text.split()[:5])) for text in sentences(100, seed)]
    kept = [Example(" ".join(text.split()[:4])) for text in sentences(300, 10 + seed)]
    slow = set()
    for place, example in enumerate(some):
        mine = grams(example)
        for other in kept:
            theirs = grams(other)
            if mine == theirs or len(mine & theirs) / len(mine | theirs) > 0.2:
                slow.add(place)
    assert copies(some, kept, 0.2) == slow
    assert slow
