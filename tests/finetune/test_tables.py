"""Readers: any text survives, any bytes end in rows or one sentence."""

from __future__ import annotations

import csv
import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frugalbert.config import Columns
from frugalbert.finetune.tables import (
    Row,
    class_name,
    class_names,
    did_you_mean,
    read_custom,
    split_lines,
    target,
)

TEXTS = st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), max_size=12)
FAST = settings(derandomize=True, max_examples=60, deadline=None)


def labelled(label: object) -> Row:
    return Row("x.csv line 2", "text", None, label)


def test_only_newlines_end_lines():
    assert split_lines("a\u2028b\x0bc\rd\r\ne\n\nf") == ["a\u2028b\x0bc\rd", "e", "", "f"]


@FAST
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=5))
def test_csv_keeps_every_cell(tmp_path_factory, rows):
    """Commas, quotes and line ends inside quoted cells."""
    path = tmp_path_factory.mktemp("csv") / "train.csv"
    text = io.StringIO()
    csv.writer(text, quoting=csv.QUOTE_ALL).writerows([("label", "text"), *((label, f"x{t}x") for t, label in rows)])
    path.write_bytes(text.getvalue().encode())
    found = read_custom(path, Columns())
    assert [(row.text, row.label) for row in found] == [(f"x{t}x", label) for t, label in rows]


@FAST
@given(st.lists(st.tuples(TEXTS, st.one_of(TEXTS, st.integers(), st.booleans())), min_size=1, max_size=5))
def test_jsonl_keeps_every_value(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("jsonl") / "train.jsonl"
    path.write_text("\n".join(json.dumps({"text": text, "label": label, "more": [1]}) for text, label in rows) + "\n\n")
    found = read_custom(path, Columns())
    assert [(row.text, row.label) for row in found] == [(text.strip(), label) for text, label in rows]


@settings(derandomize=True, max_examples=200, deadline=None)
@given(
    data=st.one_of(
        st.binary(max_size=60),
        st.lists(st.sampled_from(['"', ",", "\t", "\n", "text", "label", "{", "}", ":", "[1e999]", "1", "é"])).map(
            lambda parts: "".join(parts).encode()
        ),
    ),
    kind=st.sampled_from([".csv", ".tsv", ".jsonl"]),
    convert=st.sampled_from([class_name, class_names, target]),
)
def test_any_bytes_end_in_rows_or_one_sentence(tmp_path_factory, data, kind, convert):
    path = tmp_path_factory.mktemp("any") / f"train{kind}"
    path.write_bytes(data)
    try:
        found = [convert(row) for row in read_custom(path, Columns())]
    except ValueError as error:
        assert "train" in str(error)
        assert "\n" not in str(error)
    else:
        assert found


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.csv", b"", "is empty"),
        ("a.csv", b" \n\n", "is empty"),
        ("a.csv", b"text,label\n", "a header but no examples"),
        ("a.csv", b"\x89PNG\0\0", "is binary or UTF-16"),
        ("a.csv", "text,label\na,b\n".encode("utf-16"), "is binary or UTF-16"),
        ("a.tsv", b"text\tlabel\nfine\t1\nna\xefve\t0\n", r"a.tsv line 3 is not UTF-8 \(byte 0xef\)"),
        ("a.csv", b"text,label\na,b,c\n", "line 2 has 3 cells, the header 2; quote"),
        ("a.csv", b'text,label\n"a,b\n', "line 2 is no CSV"),
        ("a.tsv", b"text\tlabel\na\n", "line 2 has 1 cells, the header 2; tabs"),
        ("a.csv", b"texts,label\na,b\n", "has no column 'text' .*did you mean 'texts'"),
        ("a.csv", b"text,lable\na,b\n", r"has no column 'label' \(columns.label\); it has 'text', 'lable'; did you"),
        ("a.jsonl", b'{"text": "a", "label": 1}\n{"text": "b"}\n', "line 2 has no column 'label'"),
        ("a.jsonl", b'{"text": "a", "label": 1}\n{"text": "b", "la', "line 2 is no JSON"),
        ("a.jsonl", b"[" * 100_000, "line 1 is no JSON"),
        ("a.jsonl", b"[1]\n", "line 1 is no object"),
        ("a.jsonl", b'{"text": null, "label": 1}\n', "line 1: 'text' is no text"),
        ("a.xlsx", b"PK", "the ending .xlsx says no format"),
    ],
)
def test_bad_files_get_one_sentence(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        read_custom(tmp_path / name, Columns())
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist; paths are relative to the YAML"):
        read_custom(tmp_path / "a.csv", Columns())
    (tmp_path / "b.csv").mkdir()
    with pytest.raises(ValueError, match="is a directory"):
        read_custom(tmp_path / "b.csv", Columns())


def test_a_very_long_cell_is_read(tmp_path):
    (tmp_path / "a.csv").write_text(f"text,label\n{'x' * 300_000},1\n")
    assert len(read_custom(tmp_path / "a.csv", Columns())[0].text) == 300_000


@pytest.mark.parametrize("label", ["", "  ", "nan", "NaN", float("nan"), None, [1], {}])
def test_what_is_no_class(label):
    with pytest.raises(ValueError, match="x.csv line 2: the label"):
        class_name(labelled(label))


@pytest.mark.parametrize("label", ["", "high", "nan", "inf", float("nan"), float("inf"), None, True, [1.0], 10**400])
def test_what_is_no_number(label):
    with pytest.raises(ValueError, match="x.csv line 2: the label"):
        target(labelled(label))


@pytest.mark.parametrize(
    ("label", "names"),
    [("", ()), ("a", ("a",)), ("b; a;", ("a", "b")), ('["b", "a", "b"]', ("a", "b")), ([2, "x"], ("2", "x")), ([], ())],
)
def test_several_labels(label, names):
    assert class_names(labelled(label)) == names


@pytest.mark.parametrize("label", ["[1, ", 3, None, [None], ["a", ""], "a;nan"])
def test_what_are_no_labels(label):
    with pytest.raises(ValueError, match="x.csv line 2: the label"):
        class_names(labelled(label))


def test_class_names_of_json_values():
    assert [class_name(labelled(value)) for value in (True, 3, 1.5, " x ")] == ["true", "3", "1.5", "x"]
    assert target(labelled(" 2.5 ")) == 2.5


@pytest.mark.parametrize(
    ("name", "text"), [("a.csv", "text,label\na,x\n"), ("a.jsonl", '{"text": "a", "label": "x"}\n')]
)
def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path, name, text):
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert [(row.text, row.label) for row in read_custom(tmp_path / name, Columns())] == [("a", "x")]


def test_halves_of_surrogate_pairs_are_replaced(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a \\ud800 b", "label": "c\\udfff"}\n')
    row = read_custom(tmp_path / "a.jsonl", Columns())[0]
    assert (row.text, class_name(row)) == ("a ? b", "c?")


def test_no_hint_without_a_likeness():
    assert did_you_mean("zzz", ["label"]) == ""
