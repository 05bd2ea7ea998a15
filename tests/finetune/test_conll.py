"""CoNLL columns: sentences, tags, test files, and lines that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frugalbert import config
from frugalbert.finetune.conll import read_conll
from frugalbert.finetune.examples import load
from frugalbert.finetune.tasks import Data, resolve

TEXT = "-DOCSTART- -X- -X- O\n\nAnn NNP B-NP B-PER\nsings VBZ B-VP O\n\n\nIn IN B-PP O\nOslo NNP B-NP B-LOC\n"
WORDS = st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=4)


def tags(folder: Path, train: str, predict_test: bool = False, **more: Any) -> Data:
    (folder / "train.conll").write_bytes(train.encode())
    for split in ("dev", "test"):
        if split in more:
            (folder / f"{split}.conll").write_bytes(more[split].encode())
            more[split] = f"{split}.conll"
    task = config.Task(name="mine", type="token-classification", train="train.conll", **more)
    section = config.Finetune(tasks=[task], model="unused", predict_test=predict_test)
    return load(resolve([task])[0], section, folder, None)


@pytest.mark.parametrize("text", [TEXT, TEXT.replace(" ", "\t"), TEXT.replace("\n", "\r\n"), "\ufeff" + TEXT.strip()])
def test_words_and_their_last_column(tmp_path, text):
    data = tags(tmp_path, text, dev=TEXT)
    assert data.labels == ("O", "B-LOC", "B-PER")
    assert [(row.words, row.label, row.id) for row in data.train] == [
        (("Ann", "sings"), (2, 0), "0"), (("In", "Oslo"), (0, 1), "1"),
    ]  # fmt: skip
    assert data.task.metrics == ("span_f1",)


def test_a_file_to_predict_needs_no_tags(tmp_path):
    data = tags(tmp_path, TEXT, predict_test=True, dev=TEXT, test="Bob\nsleeps\n\nAnn\n")
    assert [(row.words, row.label) for row in data.sets["test"]] == [(("Bob", "sleeps"), None), (("Ann",), None)]
    assert "test" not in tags(tmp_path, TEXT, dev=TEXT, test="Bob\n").sets


def test_words_between_tabs_may_hold_spaces(tmp_path):
    (tmp_path / "a.conll").write_text("New York\tB-LOC\n# one\tO\n")
    assert read_conll(tmp_path / "a.conll", True)[0].words == ("New York", "# one")


def test_sentences_are_held_out_by_their_words(tmp_path):
    lines = "".join(f"w{number % 40} O\nx B\n\n" for number in range(80))
    data = tags(tmp_path, lines, dev_share=0.3)
    assert len(data.train) + len(data.dev) == 80
    assert data.dev
    assert not {row.words for row in data.train} & {row.words for row in data.dev}


@pytest.mark.parametrize(
    ("train", "dev", "message"),
    [
        ("Ann B-PER\nsings\n", TEXT, "train.conll line 2 has 1 columns; every line is a word and, last, its tag"),
        ("Ann\nsings\n", TEXT, "train.conll line 1 has 1 columns"),
        (TEXT, "Ann\n", "dev.conll line 1 has 1 columns"),
        (TEXT, "\nAnn B-PRE\n", "dev.conll line 2: the label 'B-PRE' never occurs in training; did you mean 'B-PER'"),
        ("-DOCSTART- O\n\n", TEXT, "train.conll has no sentences"),
        ("a\t\n", TEXT, "line 1 has an empty tag"),
        ("\tO\n", TEXT, "line 1 has an empty word"),
        ("a O\n", "a O\n", "all words have the tag 'O'; it needs two or more"),
        ("", TEXT, "train.conll is empty"),
    ],
)
def test_bad_files_get_one_sentence(tmp_path, train, dev, message):
    with pytest.raises(ValueError, match=message) as caught:
        tags(tmp_path, train, dev=dev)
    assert "\n" not in str(caught.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist; paths are relative to the YAML"):
        read_conll(tmp_path / "a.conll", True)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4), min_size=1, max_size=4),
    st.sampled_from([" ", "\t", " x y "]),
)
def test_every_word_survives(tmp_path_factory, sentences, between):
    path = tmp_path_factory.mktemp("conll") / "a.conll"
    path.write_text("\n\n".join("\n".join(f"{word}{between}{tag}" for word, tag in words) for words in sentences))
    found = read_conll(path, True)
    assert [list(zip(row.words, row.label, strict=True)) for row in found] == sentences
