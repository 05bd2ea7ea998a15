"""Custom tasks: every type, splits, tests to predict, and whatever may be wrong with the files."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from frugalbert import config
from frugalbert.finetune.examples import load
from frugalbert.finetune.tasks import Data, Example, resolve


def custom(folder: Path, train: str, dev: str | None = None, suffix: str = ".csv", **settings: object) -> Data:
    """Write the files, load the task; `test` is a file to predict."""
    (folder / f"train{suffix}").write_text(train)
    if dev is not None:
        (folder / f"dev{suffix}").write_text(dev)
        settings["dev"] = f"dev{suffix}"
    if "test" in settings:
        (folder / f"test{suffix}").write_text(str(settings["test"]))
        settings["test"] = f"test{suffix}"
    mine = config.Task(name="mine", train=f"train{suffix}", **settings)
    section = config.Finetune(tasks=[mine], model="unused", predict_test="test" in settings)
    return load(resolve([mine])[0], section, folder, None)


def test_classes_by_name_pairs_and_columns(tmp_path):
    data = custom(
        tmp_path,
        "premise\thypothesis\tgold\nx\ty\tno\nz\tw\tyes\n",
        "gold\tpremise\thypothesis\nyes\tq\tr\n",
        suffix=".tsv",
        columns=config.Columns(text="premise", text_b="hypothesis", label="gold"),
    )
    assert data.labels == ("no", "yes")
    assert data.train == [Example("x", "y", 0, "0"), Example("z", "w", 1, "1")]
    assert data.dev == [Example("q", "r", 1, "0")]
    assert data.task.metrics == ("accuracy", "macro_f1", "mcc")


def test_numbered_classes_are_in_order_of_value(tmp_path):
    rows = "".join(f"text {number},{number}\n" for number in (10, 9, 2))
    assert custom(tmp_path, f"text,label\n{rows}", f"text,label\n{rows}").labels == ("2", "9", "10")


def test_regression_and_several_labels(tmp_path):
    data = custom(tmp_path, "text,label\na,1.5\nb,-2\n", "text,label\nc,7\n", type="regression")
    assert [row.label for row in data.train + data.dev] == [1.5, -2.0, 7.0]
    assert data.labels == ()
    lines = '{"text": "a", "label": ["y", "x"]}\n{"text": "b", "label": []}\n'
    data = custom(tmp_path, lines, '{"text": "c", "label": "y;x"}\n', suffix=".jsonl", type="multilabel")
    assert data.labels == ("x", "y")
    assert [row.label for row in data.train + data.dev] == [(0, 1), (), (0, 1)]


def test_the_split_is_drawn_by_the_text(tmp_path):
    """Reordering moves nothing, and one text is never on both sides."""
    lines = [f"text {number % 80},{'ab'[number % 2]}\n" for number in range(160)]
    first = custom(tmp_path, f"text,label\n{''.join(lines)}", dev_share=0.25)
    random.Random(0).shuffle(lines)
    second = custom(tmp_path, f"text,label\n{''.join(lines)}", dev_share=0.25)
    assert {row.text for row in first.dev} == {row.text for row in second.dev}
    assert not {row.text for row in first.dev} & {row.text for row in first.train}
    assert 15 <= len(first.dev) <= 65
    assert len(first.train) + len(first.dev) == 160


def test_a_class_too_rare_to_split_stays_in_training(tmp_path):
    rows = "".join(f"text {number},{'rare' if number in (3, 4) else 'ab'[number % 2]}\n" for number in range(40))
    for share in (0.1, 0.5, 0.9):
        data = custom(tmp_path, f"text,label\n{rows}", dev_share=share)
        assert {row.label for row in data.train} == {0, 1, 2}


def test_dev_texts_seen_in_training_are_told(tmp_path):
    data = custom(tmp_path, "text,label\na,x\nb,y\n", "text,label\na,x\nc,y\n")
    assert data.notes == ("1 of 2 dev texts also stand in the training file; the scores are flattered",)


@pytest.mark.parametrize(
    ("train", "dev", "settings", "message"),
    [
        ("a,x\nb,y", "c,xx", {}, r"dev.csv line 2: the label 'xx' never occurs in training; .*its labels are x, y"),
        ("a,x\nb,x", "c,x", {}, "all 2 training examples have the label 'x'; it needs two"),
        ("a,1\nb,1", "c,1", {"type": "regression"}, "all 2 training examples have the label 1.0"),
        ("a,1\nb,low", "c,1", {"type": "regression"}, 'line 3: the label "low" is no number'),
        ("a,x\nb,", "c,x", {}, "line 3: the label is empty"),
        ("a,x\nb,nan", "c,x", {}, "line 3: the label is nan"),
        ("a,1\nb,NaN", "c,1", {"type": "regression"}, "line 3: the label is nan"),
        ("a,x\nb,y", None, {"dev_share": 0.01}, r"has no dev examples \(2 train, 0 dev\)"),
        ("a,x\nb,y\nc,z", "c,x", {"metrics": ("f1",)}, "f1 is for two classes and there are 3"),
    ],
)  # fmt: skip
def test_bad_data_get_one_sentence(tmp_path, train, dev, settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        custom(tmp_path, f"text,label\n{train}\n", None if dev is None else f"text,label\n{dev}\n", **settings)
    assert "\n" not in str(caught.value)


# ---- multiple choice, keys, files to predict ------------------------------------------------------------------------

OPTIONS = config.Columns(options=("a", "b"))


def choice(folder: Path, *rows: str, **more: object) -> Data:
    text = "\n".join(("text,a,b,label", *rows, ""))
    return custom(folder, text, text, type="multiple-choice", **{"columns": OPTIONS, **more})


def test_the_right_option_by_number_letter_or_text(tmp_path):
    data = choice(tmp_path, "one,red,blue,1", "two,red,blue,A", "three,red,blue,b", "four,red,blue,red")
    assert [row.label for row in data.train] == [(1,), (0,), (1,), (0,)]
    assert data.train[0] == Example("one", None, (1,), "0", options=("red", "blue"), names=("0", "1"))
    assert data.labels == ()


def test_options_in_one_column_and_a_question_that_they_complete(tmp_path):
    line = '{"passage": "p", "asked": "It is _.", "options": ["red", "blue", "old"], "label": 2, "key": 7}\n'
    columns = config.Columns(text="passage", text_b="asked", options=("options",), id="key")
    data = custom(tmp_path, line, line, ".jsonl", type="multiple-choice", columns=columns)
    expected = Example("p", None, (2,), "7", options=("It is red.", "It is blue.", "It is old."), names=tuple("012"))
    assert data.train == [expected]
    text = 'text,many,label\nx,"[""a"", ""b""]",b\n'
    data = custom(tmp_path, text, text, type="multiple-choice", columns=config.Columns(options=("many",)))
    assert (data.train[0].options, data.train[0].label) == (("a", "b"), (1,))


def test_questions_of_one_passage_are_held_out_together(tmp_path):
    rows = [f"passage {number % 30},red,blue,{number // 30 % 2}" for number in range(90)]
    data = custom(
        tmp_path, "\n".join(("text,a,b,label", *rows)), type="multiple-choice", columns=OPTIONS, dev_share=0.3
    )
    assert data.dev
    assert not {row.text for row in data.train} & {row.text for row in data.dev}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("x,red,blue,2", 'line 2: the label "2" is none of the 2 options; write the number'),
        ("x,red,blue,green", 'the label "green" is none of the 2 options'),
        ("x,1,0,0", 'the label "0" could be several of the 2 options'),
        ("x,red,blue,", 'the label "" is none of'),
    ],
)
def test_labels_that_are_no_option(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        choice(tmp_path, row)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (config.Columns(), "tasks.mine: multiple-choice needs columns.options"),
        (config.Columns(options=("a", "c")), r"has no column 'c' \(columns.options\)"),
        (config.Columns(options=("a",)), r"line 2: the options \(columns.options\) are no two texts or more"),
        (config.Columns(options=("a", "b"), id="key"), r"has no column 'key' \(columns.id\)"),
    ],
)
def test_columns_of_a_multiple_choice(tmp_path, columns, message):
    with pytest.raises(ValueError, match=message):
        choice(tmp_path, "x,red,blue,1", columns=columns)


def test_keys_are_the_files_own(tmp_path):
    columns = config.Columns(id="key")
    data = custom(tmp_path, "key,text,label\nr1,a,x\nr2,b,y\n", "key,text,label\nr1,c,x\n", columns=columns)
    assert [row.id for row in data.train + data.dev] == ["r1", "r2", "r1"]
    with pytest.raises(ValueError, match=r"train.csv line 3 has the id 'r1', as has .*train.csv line 2"):
        custom(tmp_path, "key,text,label\nr1,a,x\nr1,b,y\n", "key,text,label\nr1,c,x\n", columns=columns)
    with pytest.raises(ValueError, match=r"line 3: 'key' \(columns.id\) is \"\"; write a number or a text"):
        custom(tmp_path, "key,text,label\nr1,a,x\n,b,y\n", columns=columns)


@pytest.mark.parametrize("kind", ["classification", "regression", "multilabel", "multiple-choice"])
def test_a_file_to_predict_needs_no_labels(tmp_path, kind):
    train = "text,a,b,label\none,red,blue,1\ntwo,red,blue,0\n"
    columns = OPTIONS if kind == "multiple-choice" else config.Columns()
    for test in ("text,a,b\nthree,red,blue\n", "text,a,b,label\nthree,red,blue,1\nfour,red,blue,\n"):
        data = custom(tmp_path, train, train, type=kind, columns=columns, test=test)
        assert {row.label for row in data.sets["test"]} == {None}
    data = custom(tmp_path, train, train, type=kind, columns=columns, test=train)
    assert [row.label for row in data.sets["test"]] == [row.label for row in data.train]
