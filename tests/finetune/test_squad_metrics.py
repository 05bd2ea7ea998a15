"""SQuAD's and ReCoRD's figures: against a plain second implementation on thousands of random texts, and against what
the official scripts printed for predictions made from the real development sets.
"""

from __future__ import annotations

import json
import math
import os
import random
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from frugalbert.finetune import metrics
from frugalbert.finetune.squad_metrics import normalise, squad1_evaluate, squad_evaluate
from frugalbert.finetune.tasks import Example

DATA = Path(os.environ.get("FRUGALBERT_DATA", "../shared/data")) / "squad"
PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"


def words_of(text: str) -> list[str]:
    """Normalised words letter by letter, without regular expressions: an article is a run of word characters."""
    kept = "".join(letter for letter in text.lower() if letter not in PUNCTUATION)
    runs, run = [], ""
    for letter in kept + " ":
        if letter.isalnum():
            run += letter
        else:
            runs += ["" if run in ("a", "an", "the") else run, " " if run in ("a", "an", "the") else "", letter]
            run = ""
    return str("".join(runs)).split()


def word_f1(gold: str, text: str, version: int) -> float:
    gold_words, words, same = words_of(gold), words_of(text), 0
    if not gold_words and not words:
        return float(version == 2)
    left = list(gold_words)
    for word in words:
        if word in left:
            left.remove(word)
            same += 1
    return 2 * same / (len(words) + len(gold_words))


def pair_of(golds: tuple[str, ...], text: str, version: int) -> tuple[float, float]:
    if version == 2:
        golds = tuple(gold for gold in golds if words_of(gold)) or ("",)
    exact = max(float(words_of(gold) == words_of(text)) for gold in golds)
    return exact, max(word_f1(gold, text, version) for gold in golds)


PIECES = (
    "the",
    "a",
    "An",
    "cat",
    "Cats",
    "dog.",
    "…",
    "–",
    "«the»",
    "3.14",
    "",
    " ",
    "the-end",
    "ÉTÉ",
    "été",
    "ﬁ",
    "!",
    "a.m.",
    "\t",
    "東京",
    "a–b",
)


def texts(generator: random.Random) -> str:
    return " ".join(generator.choices(PIECES, k=generator.choice((0, 1, 1, 2, 3, 6))))


def question_sets(null: bool) -> Iterator[tuple[list[Example], dict[str, str]]]:
    generator = random.Random(null)
    for _ in range(1000):
        examples, predictions = [], {}
        for number in range(generator.randint(1, 8)):
            golds = tuple(texts(generator) for _ in range(generator.randint(0 if null else 1, 3)))
            examples.append(Example("", label=int(bool(golds)), id=f"q{number}", answers=golds))
            given = generator.choice(golds) if golds and generator.random() < 0.4 else texts(generator)
            predictions[f"q{number}"] = given if generator.random() < 0.8 else given.upper()
        yield examples, predictions


def test_normal_form():
    assert normalise("The  cat's—a «Theatre»\tof AN a.m.") == "cats— «theatre» of am"
    assert normalise("a–b, the.") == "–b"
    assert normalise("\u00a0The\u3000é ") == "é"


@pytest.mark.parametrize("null", [False, True])
def test_questions_as_a_second_implementation(null):
    for examples, predictions in question_sets(null):
        version = 2 if any(not example.answers for example in examples) else 1
        pairs = [pair_of(example.answers, predictions[example.id], version) for example in examples]
        values = metrics.score(["squad_em", "squad_f1"], examples, list(predictions.values()), [])
        assert values["squad_em"] == pytest.approx(np.mean([exact for exact, _ in pairs]))
        assert values["squad_f1"] == pytest.approx(np.mean([f1 for _, f1 in pairs]))
        if version == 1:
            official = squad1_evaluate(examples, predictions)
            assert official == pytest.approx({"exact_match": 100 * values["squad_em"], "f1": 100 * values["squad_f1"]})


def test_record_as_a_second_implementation():
    generator = random.Random(3)
    for _ in range(1000):
        names = tuple(texts(generator) for _ in range(4))
        golds = tuple(generator.choices(names, k=generator.randint(0, 2)))
        choice = generator.randrange(4)
        example = Example("", label=(), names=names, answers=golds)
        values = metrics.score(["record_em", "record_f1"], [example], np.array([choice]), [])
        exact, f1 = pair_of(golds, names[choice], 1) if golds else (0.0, 0.0)
        assert (values["record_em"], values["record_f1"]) == pytest.approx((exact, f1)), example


def evaluate(examples: list[Example], predictions: dict[str, str], cut: set[str]) -> dict[str, float]:
    """The 2.0 script's averages, written down once more; `cut`: questions that are not answered."""
    pairs = {}
    for example in examples:
        null = float(not example.answers)
        pairs[example.id] = (null, null) if example.id in cut else pair_of(example.answers, predictions[example.id], 2)
    found: dict[str, float] = {}
    for prefix, wanted in (("", (True, False)), ("HasAns_", (True,)), ("NoAns_", (False,))):
        chosen = [pairs[example.id] for example in examples if bool(example.answers) in wanted]
        if chosen:
            found[f"{prefix}exact"] = 100 * sum(exact for exact, _ in chosen) / len(chosen)
            found |= {f"{prefix}f1": 100 * sum(f1 for _, f1 in chosen) / len(chosen), f"{prefix}total": len(chosen)}
    return found


def test_the_threshold_sweep_equals_brute_force():
    generator = random.Random(4)
    for examples, predictions in question_sets(True):
        odds = {example.id: generator.uniform(-5, 5) for example in examples}
        values = squad_evaluate(examples, predictions, odds, 0.5)
        plain = evaluate(examples, predictions, {key for key, value in odds.items() if value > 0.5})
        assert list(values) == [*plain, "best_exact", "best_exact_thresh", "best_f1", "best_f1_thresh"]
        assert {key: values[key] for key in plain} == pytest.approx(plain)
        # the script's sweep counts an unanswerable question as answered only where the text is not ""
        blank = {example.id for example in examples if not example.answers and predictions[example.id]}
        for name in ("exact", "f1"):
            tries = []
            for threshold in (-math.inf, *odds.values()):
                cut = {key for key, value in odds.items() if value > threshold}
                wrong = {key: "wrong" if key in blank else text for key, text in predictions.items()}
                tries.append(evaluate(examples, wrong, cut)[name])
            assert values[f"best_{name}"] == pytest.approx(max(tries))
            at = values[f"best_{name}_thresh"]
            cut = {key for key, value in odds.items() if value > at}
            if at != 0.0:
                assert evaluate(examples, wrong, cut)[name] == pytest.approx(max(tries))


def test_a_missing_prediction_is_named():
    examples = [Example("", id="q1", answers=("a",)), Example("", id="q2")]
    with pytest.raises(ValueError, match="1 questions have no prediction, the first is q2"):
        squad_evaluate(examples, {"q1": "a"})
    with pytest.raises(ValueError, match="2 questions have no null odds, the first is q1"):
        squad_evaluate(examples, {"q1": "a", "q2": ""}, {})
    assert squad1_evaluate(examples[:1], {}) == {"exact_match": 0.0, "f1": 0.0}


# ---- real data ------------------------------------------------------------------------------------------------------


def real(version: str) -> tuple[list[Example], dict[str, str], dict[str, float]]:
    """A development set with predictions and null odds drawn by the questions' ids: gold answers, changed gold answers,
    spans of the passage, the punctuation and articles around them, and nothing.
    """
    path = DATA / f"dev-{version}.reconstructed.json"
    if not path.exists():
        pytest.skip(f"no {path}; set FRUGALBERT_DATA")
    examples, predictions, odds = [], {}, {}
    for article in json.loads(path.read_bytes())["data"]:
        for paragraph in article["paragraphs"]:
            for row in paragraph["qas"]:
                golds = tuple(answer["text"] for answer in row["answers"])
                examples.append(
                    Example(row["question"], paragraph["context"], int(bool(golds)), row["id"], answers=golds)
                )
                predictions[row["id"]], odds[row["id"]] = invent(row["id"], paragraph["context"], golds)
    return examples, predictions, odds


def invent(key: str, context: str, golds: tuple[str, ...]) -> tuple[str, float]:
    number = zlib.crc32(key.encode())
    words = context.split()
    span = " ".join(words[number % len(words) :][: 1 + number % 5])
    gold = golds[number % len(golds)] if golds else span
    text = (gold, f"The {gold}.", gold.upper(), f"{gold} {span}", " ".join(gold.split()[1:]), span, "", "the.")[
        number >> 8 & 7
    ]
    return text, (number >> 11) % 10007 / 1000 - 5 - (6 if golds else 0)


# As evaluate-v1.1.py and evaluate-v2.0.py (threshold 0.25) printed them for these very predictions.
PRINTED: dict[str, dict[str, Any]] = {
    "1.1": {"exact_match": 40.567644276253546, "f1": 53.722255949219615},
    "2.0": {
        "exact": 34.84376316011117,
        "f1": 41.49446307935945,
        "total": 11873,
        "HasAns_exact": 40.300269905533064,
        "HasAns_f1": 53.620742264040565,
        "HasAns_total": 5928,
        "NoAns_exact": 29.402859545836836,
        "NoAns_f1": 29.402859545836836,
        "NoAns_total": 5945,
    },
    "2.0, null odds": {
        "exact": 51.772930177714144,
        "f1": 58.42363009696267,
        "total": 11873,
        "HasAns_exact": 40.300269905533064,
        "HasAns_f1": 53.620742264040565,
        "HasAns_total": 5928,
        "NoAns_exact": 63.212783851976454,
        "NoAns_f1": 63.212783851976454,
        "NoAns_total": 5945,
        "best_exact": 62.031500042112356,
        "best_exact_thresh": -4.993,
        "best_f1": 65.98022989627778,
        "best_f1_thresh": -4.95,
    },
}


BEST_F1 = PRINTED["2.0, null odds"]["best_f1"]


def test_official_figures_of_1_1_to_the_digit():
    examples, predictions, _ = real("v1.1")
    assert squad1_evaluate(examples, predictions) == PRINTED["1.1"]


def test_official_figures_of_2_0_to_the_digit():
    examples, predictions, odds = real("v2.0")
    assert squad_evaluate(examples, predictions) == PRINTED["2.0"]
    values = squad_evaluate(examples, predictions, odds, 0.25)
    assert list(values.items()) == list(PRINTED["2.0, null odds"].items())
