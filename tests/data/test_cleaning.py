"""Cleaning: what goes, what stays, what is counted; and nothing hostile takes long."""

from __future__ import annotations

import time
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frugalbert.data.cleaning import MAX_DOCUMENT, MAX_WORD, Counts, clean, pieces, tidy

WHERE = ("a.txt", 7)


@pytest.mark.parametrize(
    "raw, expected",
    [
        ("one\r\ntwo\rthree\nfour", "one\ntwo\nthree\nfour"),
        ("a\x00b\x07c\x7fd\x9ee", "abcde"),
        ("a\x0bb\x0cc\x85d\u2028e\u2029f\x1cg", "a b c d e f g"),
        ("\ufeffbyte \ufefforder", "byte order"),
        ("cafe\u0301 \u1e9b\u0323", "café \u1e9b\u0323"),  # NFC, not NFKC
        ("שלום 👩‍👩‍👧 ᾳ\u200f x\u200c", "שלום 👩‍👩‍👧 ᾳ\u200f x\u200c"),
        ("  \n a \n\n\n\n\n b\t\n ", "a \n\n b"),
        ("<p>x &amp; y</p>", "<p>x &amp; y</p>"),
    ],
)
def test_tidy(raw, expected):
    assert tidy(raw) == expected


@settings(derandomize=True, max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=200), st.integers(0, 3))
def test_tidy_leaves_clean_text_alone_and_loses_no_letter(text, repeat):
    text = text * (1 + 40 * repeat)
    once = tidy(text)
    assert tidy(once) == once
    assert unicodedata.is_normalized("NFC", once)
    assert all(len(word) <= MAX_WORD for word in once.split())
    assert not any(unicodedata.category(letter) == "Cc" and letter not in "\n\t" for letter in once)
    composed = unicodedata.normalize("NFC", once.replace(" ", ""))
    kept = [letter for letter in unicodedata.normalize("NFC", text) if unicodedata.category(letter)[0] == "L"]
    assert [letter for letter in composed if unicodedata.category(letter)[0] == "L"] == kept


def test_long_words_are_split_and_counted():
    counts = Counts()
    word = "x" * 2500
    text = tidy(f"before {word}\tafter", WHERE, counts)
    assert text == f"before {'x' * 1000} {'x' * 1000} {'x' * 500}\tafter"
    assert counts.repaired == {"words over 1,000 characters split": 1}
    assert tidy("y" * 1000) == "y" * 1000
    for start in range(0, 520, 13):  # wherever it lies
        assert max(map(len, tidy("a " * start + "z" * 1001 + " b" * 300).split())) == 1000


@pytest.mark.parametrize("text", ["x" * 999 + " ", "x", "\n", " \n", "a\u0301", "<", "\x00", "é"])
def test_adversarial_text_is_quick(text):
    long = text * (1_000_000 // len(text))
    start = time.process_time()
    tidy(long)
    assert time.process_time() - start < 2  # the limit of specs: quadratic work would take minutes


@pytest.mark.parametrize(
    "text, what, line",
    [("good\nbad \udcff\udcfe bytes", "byte 0xFF", 8), ("lone \ud800 surrogate", "the surrogate U+D800", 7)],
)
def test_undecodable_text_by_policy(text, what, line):
    counts = Counts()
    assert clean(text, WHERE, "skip", counts) is None
    assert counts.dropped == {"undecodable": 1}
    assert counts.examples == [{"where": f"a.txt:{line}", "reason": "undecodable"}]
    with pytest.raises(ValueError, match=rf"a\.txt:{line}: {what.replace('+', '.')} is not UTF-8; convert the file"):
        clean(text, WHERE, "strict", counts)
    counts = Counts()
    cleaned = clean(text, WHERE, "replace", counts)
    assert cleaned is not None
    assert cleaned[1] == cleaned[0].encode()
    assert counts.repaired["undecodable bytes replaced"] == cleaned[0].count("\ufffd") > 0


def test_good_text_is_not_touched_by_the_policy():
    for policy in ("replace", "skip", "strict"):
        assert clean("naïve \ufffd text", WHERE, policy, Counts()) == (
            "naïve \ufffd text",
            "naïve \ufffd text".encode(),
        )


@settings(derandomize=True, max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(["word", " ", "\n", "é" * 300_000, "x" * 700_000]), max_size=12))
def test_pieces_join_to_the_whole_and_are_bounded(parts):
    text = "".join(parts)
    found = list(pieces(text))
    assert "".join(found) == text
    assert all(len(piece) <= MAX_DOCUMENT for piece in found)


def test_pieces_are_cut_between_words():
    assert [len(piece) for piece in pieces("ab " * 400_000)] == [999_999, 200_001]


def test_examples_are_bounded():
    counts = Counts()
    for number in range(3000):
        counts.drop(f"f:{number}", "too short")
    assert len(counts.examples) == 1000
    assert counts.dropped["too short"] == 3000
