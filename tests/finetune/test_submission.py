"""Submission files: what is written byte for byte, what is refused and how, and foreign files with any damage."""

from __future__ import annotations

import io
import json
import random
import re
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from frugalbert.cli import app
from frugalbert.finetune import glue, submission, submission_forms, superglue
from frugalbert.finetune.examples import patterns
from frugalbert.finetune.sources import Absent, locate
from frugalbert.finetune.submission_forms import BOARDS, MULTIRC, File, check_file, check_zip
from frugalbert.finetune.tasks import TABLE
from tests.finetune import test_squad_metrics as squad

# Spec: rows, and what stands in them, as the servers' pages and nyu-mll/jiant have it.
ROWS = {
    "CoLA.tsv": 1063, "SST-2.tsv": 1821, "MRPC.tsv": 1725, "STS-B.tsv": 1379, "QQP.tsv": 390_965, "MNLI-m.tsv": 9796,
    "MNLI-mm.tsv": 9847, "QNLI.tsv": 5463, "RTE.tsv": 3000, "WNLI.tsv": 146, "AX.tsv": 1104, "BoolQ.jsonl": 3245,
    "CB.jsonl": 250, "COPA.jsonl": 500, "MultiRC.jsonl": 166, "ReCoRD.jsonl": 10_000, "RTE.jsonl": 3000,
    "WiC.jsonl": 1400, "WSC.jsonl": 146, "AX-b.jsonl": 1104, "AX-g.jsonl": 356,
}  # fmt: skip
FILES = {file.name: file for files in BOARDS.values() for file in files}


def lines_of(file: File, seed: int = 0) -> list[dict[str, Any]]:
    """Predictions as a trial leaves them."""
    generator = random.Random(f"{file.name} {seed}")
    choices: list[Any] = list(file.labels) or (["Paris", "Zoë"] if file.name == "ReCoRD.jsonl" else [0.5, 4.25, 3.0])
    keys = [str(number) for number in range(file.rows)]
    if file.name == "MultiRC.jsonl":
        shares = [0, *sorted(generator.sample(range(1, MULTIRC["question"]), file.rows - 1)), MULTIRC["question"]]
        passage = [p for p, (a, b) in enumerate(zip(shares[:-1], shares[1:], strict=True)) for _ in range(a, b)]
        cuts = [0, *sorted(generator.sample(range(1, MULTIRC["answer"]), MULTIRC["question"] - 1)), MULTIRC["answer"]]
        question = [q for q, (a, b) in enumerate(zip(cuts[:-1], cuts[1:], strict=True)) for _ in range(a, b)]
        keys = [f"{passage[question[answer]]}.{question[answer]}.{answer}" for answer in range(MULTIRC["answer"])]
    return [{"index": n, "id": key, "prediction": generator.choice(choices)} for n, key in enumerate(keys)]


def leave(root: Path, task: str, name: str, rows: list[dict[str, Any]], about: dict[str, Any] | None = None) -> None:
    folder = root / task / "test"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "model.json").write_text(
        json.dumps({"identity": f"{task}-1", "task": task, "trial": "a/0"} | (about or {}))
    )


def fill(root: Path, board: str) -> Path:
    for file in BOARDS[board]:
        leave(root, file.task, file.set, lines_of(file))
    return root


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The boards with four rows in every file."""
    for board, files in list(BOARDS.items()):
        monkeypatch.setitem(BOARDS, board, tuple(replace(file, rows=4) for file in files))
    monkeypatch.setitem(MULTIRC, "question", 6)
    monkeypatch.setitem(MULTIRC, "answer", 12)


def members(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def packed(contents: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in contents:
            archive.writestr(name, data)
    return buffer.getvalue()


# ---- the table ------------------------------------------------------------------------------------------------------


def test_the_table_is_the_servers():
    assert {name: file.rows for name, file in FILES.items()} == ROWS
    labels = {name: "".join(json.dumps(label) for label in file.known) for name, file in FILES.items()}
    for name in ("CoLA.tsv", "SST-2.tsv", "MRPC.tsv", "QQP.tsv", "WNLI.tsv"):
        assert labels[name] == '"0""1"'  # text of a table
    assert labels["COPA.jsonl"] == labels["MultiRC.jsonl"] == "01"  # JSON numbers
    assert labels["BoolQ.jsonl"] == labels["WiC.jsonl"] == '"false""true"'
    assert labels["WSC.jsonl"] == '"False""True"'
    for name in ("MNLI-m.tsv", "MNLI-mm.tsv", "AX.tsv", "CB.jsonl"):
        assert set(FILES[name].known) == {"entailment", "neutral", "contradiction"}
    for name in ("QNLI.tsv", "RTE.tsv", "RTE.jsonl", "AX-b.jsonl", "AX-g.jsonl"):
        assert set(FILES[name].known) == {"entailment", "not_entailment"}


def test_every_class_of_our_tasks_has_a_label():
    rows = {task.name: task for task in TABLE}
    for file in FILES.values():
        task = rows[file.set] if file.set.startswith("ax") else rows[file.task]
        assert not task.rides or task.rides == file.task
        if task.type == "classification":
            assert [name for _, name in task.classes] == list(file.labels) or file.name in ("CB.jsonl",)
            assert {name for _, name in task.classes} == set(file.labels)


# ---- whole boards ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("board", BOARDS)
def test_a_whole_board_is_written_and_accepted(board, tmp_path):
    fill(tmp_path / "run" / "finetune", board)
    (path,) = submission.submit(tmp_path / "run", board)
    assert path == tmp_path / "run" / f"{board}-submission.zip"
    contents = members(path.read_bytes())
    assert list(contents) == [file.name for file in BOARDS[board]]
    for file in BOARDS[board]:
        text = contents[file.name].decode()
        assert text.endswith("\n")
        assert text.count("\n") == file.rows + file.name.endswith(".tsv")


@pytest.mark.parametrize("board", BOARDS)
@pytest.mark.usefixtures("small")
def test_the_same_predictions_make_the_same_bytes(board, tmp_path):
    root = fill(tmp_path / "run" / "finetune", board)
    (path,) = submission.submit(tmp_path / "run", board)
    assert submission.check(path, board) == f"{path} is as {board} takes it"
    (again,) = submission.submit(root, board, out=tmp_path / "again.zip")  # the folder of an evaluation
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.usefixtures("small")
def test_lines_byte_for_byte(tmp_path):
    given = {
        "CoLA.tsv": ["unacceptable", "acceptable", "acceptable", "unacceptable"],
        "STS-B.tsv": [-0.25, 5.5, 2.34567, 3],
        "QNLI.tsv": ["entailment", "not_entailment", "not_entailment", "entailment"],
        "AX.tsv": ["neutral", "contradiction", "entailment", "neutral"],
        "BoolQ.jsonl": ["true", "false", "false", "true"],
        "CB.jsonl": ["contradiction", "neutral", "entailment", "neutral"],
        "COPA.jsonl": ["1", "0", "0", "1"],
        "ReCoRD.jsonl": ["Zoë", 'the "Duke"', "a\tb", "New York"],
        "WSC.jsonl": ["true", "false", "false", "true"],
        "AX-b.jsonl": ["not_entailment", "entailment", "entailment", "entailment"],
    }
    expected = {
        "CoLA.tsv": "index\tprediction\n0\t0\n1\t1\n2\t1\n3\t0\n",
        "STS-B.tsv": "index\tprediction\n0\t0.000\n1\t5.000\n2\t2.346\n3\t3.000\n",
        "QNLI.tsv": "index\tprediction\n0\tentailment\n1\tnot_entailment\n2\tnot_entailment\n3\tentailment\n",
        "AX.tsv": "index\tprediction\n0\tneutral\n1\tcontradiction\n2\tentailment\n3\tneutral\n",
        "BoolQ.jsonl": '{"idx": 0, "label": "true"}\n{"idx": 1, "label": "false"}\n{"idx": 2, "label": "false"}\n'
        '{"idx": 3, "label": "true"}\n',
        "CB.jsonl": '{"idx": 0, "label": "contradiction"}\n{"idx": 1, "label": "neutral"}\n'
        '{"idx": 2, "label": "entailment"}\n{"idx": 3, "label": "neutral"}\n',
        "COPA.jsonl": RECORDS,
        "ReCoRD.jsonl": '{"idx": 0, "label": "Zo\\u00eb"}\n{"idx": 1, "label": "the \\"Duke\\""}\n'
        '{"idx": 2, "label": "a\\tb"}\n{"idx": 3, "label": "New York"}\n',
        "WSC.jsonl": '{"idx": 0, "label": "True"}\n{"idx": 1, "label": "False"}\n{"idx": 2, "label": "False"}\n'
        '{"idx": 3, "label": "True"}\n',
        "AX-b.jsonl": '{"idx": 0, "label": "not_entailment"}\n{"idx": 1, "label": "entailment"}\n'
        '{"idx": 2, "label": "entailment"}\n{"idx": 3, "label": "entailment"}\n',
    }
    for board in BOARDS:
        for file in BOARDS[board]:
            rows = lines_of(file)
            if file.name in given:
                rows = [row | {"prediction": value} for row, value in zip(rows, given[file.name], strict=True)]
            leave(tmp_path, file.task, file.set, rows)
        contents = members(submission.submit(tmp_path, board)[0].read_bytes())
        for name in set(expected) & set(contents):
            assert contents[name].decode() == expected[name]


@pytest.mark.usefixtures("small")
def test_multirc_is_nested_by_its_ids(tmp_path, monkeypatch):
    monkeypatch.setitem(BOARDS, "superglue", tuple(replace(file, rows=2) for file in BOARDS["superglue"]))
    monkeypatch.setitem(MULTIRC, "question", 3)
    monkeypatch.setitem(MULTIRC, "answer", 4)
    keys, labels = ("0.0.0", "0.0.1", "0.1.2", "1.2.3"), ("true", "false", "false", "true")
    rows = [
        {"index": n, "id": key, "prediction": label} for n, (key, label) in enumerate(zip(keys, labels, strict=True))
    ]
    leave(tmp_path, "multirc", "test", rows)
    contents = members(submission.submit(tmp_path, "superglue", partial=True)[0].read_bytes())
    assert contents["MultiRC.jsonl"].decode() == (
        '{"idx": 0, "passage": {"questions": [{"idx": 0, "answers": [{"idx": 0, "label": 1}, {"idx": 1, "label": 0}]}, '
        '{"idx": 1, "answers": [{"idx": 2, "label": 0}]}]}}\n'
        '{"idx": 1, "passage": {"questions": [{"idx": 2, "answers": [{"idx": 3, "label": 1}]}]}}\n'
    )


@pytest.mark.parametrize("board", BOARDS)
def test_keys_of_the_real_test_sets_are_the_servers(board):
    """Every official test file that is there: as many rows as the server wants, with the keys that it wants."""
    root, seen = squad.DATA.parent / board, []
    if not root.is_dir():
        pytest.skip(f"no {root}; set FRUGALBERT_DATA")
    rows = {task.name: task for task in TABLE}
    for file in BOARDS[board]:
        task = rows[file.set] if file.set.startswith("ax") else rows[file.task]
        split = "test" if task.rides else file.set
        try:
            source = locate(task, root, patterns(task))
            read = (
                glue.read(task, source, split, []) if board == "glue" else superglue.read(task, source, split, None, [])
            )
            examples = [example for _, example in read]
        except Absent:
            continue
        lines = [
            {"index": n, "id": example.id, "prediction": next(iter(file.labels), 2.5)}
            for n, example in enumerate(examples)
        ]
        assert check_file(file, submission.render(file, lines)) == [], file.name
        seen.append(file.name)
    assert len(seen) >= 8


# ---- refusals of what is to be written ------------------------------------------------------------------------------


def refusal(folder: Path, board: str, partial: bool = False) -> list[str]:
    """The problems; nothing may have been written."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(ValueError, match="nothing is written") as caught:
        submission.submit(folder, board, partial)
    assert sorted(folder.rglob("*")) == before
    first, *problems = str(caught.value).split("\n  ")
    assert first == f"{board}: nothing is written:"
    return problems


@pytest.mark.usefixtures("small")
def test_all_problems_are_listed_at_once(tmp_path):
    fill(tmp_path, "glue")
    (tmp_path / "wnli" / "test" / "test.jsonl").unlink()
    (tmp_path / "mnli" / "test" / "ax.jsonl").unlink()
    leave(tmp_path, "cola", "test", [row | {"prediction": "maybe"} for row in lines_of(BOARDS["glue"][0])])
    leave(tmp_path, "sst2", "test", lines_of(BOARDS["glue"][1])[:-1])
    leave(tmp_path, "stsb", "test", [row | {"prediction": float("nan")} for row in lines_of(BOARDS["glue"][3])])
    cut = tmp_path / "qqp" / "test" / "test.jsonl"
    cut.write_bytes(cut.read_bytes()[:-5])
    leave(tmp_path, "rte", "test", [{"index": 0, "id": "0"}])
    (tmp_path / "qnli" / "test" / "model.json").unlink()
    wnli, ax = (tmp_path / task / "test" / name for task, name in (("wnli", "test.jsonl"), ("mnli", "ax.jsonl")))
    how = "(predict it with finetune.predict_test: true, or --partial)"
    assert refusal(tmp_path, "glue") == [
        f"QQP.tsv: {cut} line 4 is damaged (Unterminated string starting at: line 1 column 39 (char 38))",
        f"RTE.tsv: {tmp_path / 'rte' / 'test' / 'test.jsonl'} line 1 has no prediction",
        f"WNLI.tsv: there is no {wnli} {how}",
        f"AX.tsv: there is no {ax} {how}",
        f"{tmp_path / 'qnli' / 'test' / 'model.json'} does not say what model predicted test (identity)",
        "CoLA.tsv: line 2: 'maybe' is none of 0, 1 (and 3 more)",
        "SST-2.tsv: has 3 rows, not 4",
        "SST-2.tsv: the index 3 is missing",
        "STS-B.tsv: line 2: 'nan' is no decimal number from 0 to 5 (and 3 more)",
    ]


@pytest.mark.usefixtures("small")
def test_partial_leaves_out_what_is_missing_and_nothing_else(tmp_path):
    leave(tmp_path, "wnli", "test", lines_of(BOARDS["glue"][9]))
    (path,) = submission.submit(tmp_path, "glue", partial=True)
    assert list(members(path.read_bytes())) == ["WNLI.tsv"]
    assert "missing: CoLA.tsv, SST-2.tsv" in refusal_of_check(path, "glue")[0]
    assert submission.check(path, "glue", partial=True).endswith("is as glue takes it")
    leave(tmp_path, "wnli", "test", lines_of(BOARDS["glue"][9])[::-1])
    path.unlink()
    assert refusal(tmp_path, "glue", partial=True) == [
        "WNLI.tsv: the index 3 stands in the place of 0; they are in the order of the test set"
    ]
    assert len(refusal(tmp_path / "wnli", "superglue", partial=True)) == 1
    with pytest.raises(FileNotFoundError, match="is no directory"):
        submission.submit(tmp_path / "absent", "glue")


def refusal_of_check(path: Path, board: str) -> list[str]:
    with pytest.raises(ValueError, match="is not as") as caught:
        submission.check(path, board)
    return str(caught.value).split("\n  ")[1:]


@pytest.mark.parametrize(
    ("about", "problem"),
    [
        ({"identity": ""}, "does not say what model predicted test, test-mismatched, ax (identity)"),
        ({"task": "rte"}, 'is of the task "rte", not of mnli'),
        ({"identity": "canned"}, "names another model than"),
        ({"files": {"test.jsonl": "0" * 64}}, "is not the file that the model of model.json wrote"),
    ],
)
@pytest.mark.usefixtures("small")
def test_ax_must_be_predicted_by_mnlis_model(about, problem, tmp_path):
    fill(tmp_path, "glue")
    (tmp_path / "mnli" / "model.json").write_text('{"identity": "mnli-1"}')
    submission.submit(tmp_path, "glue", out=tmp_path.parent / "whole.zip")
    leave(tmp_path, "mnli", "ax", lines_of(BOARDS["glue"][-1]), about)
    problems = refusal(tmp_path, "glue")
    assert len(problems) == (3 if "files" in about else 1)
    assert problem in problems[0]


@pytest.mark.usefixtures("small")
def test_another_model_makes_other_diagnostics(tmp_path):
    """AX, AX-b and AX-g are what the model of MNLI and RTE says of them, not a canned file."""
    for board, names in (("glue", ("AX.tsv",)), ("superglue", ("AX-b.jsonl", "AX-g.jsonl"))):
        first = members(submission.submit(fill(tmp_path, board), board)[0].read_bytes())
        for file in BOARDS[board]:
            if file.name in names:
                leave(tmp_path, file.task, file.set, lines_of(file, seed=1))
        second = members(submission.submit(tmp_path, board)[0].read_bytes())
        assert {name for name in first if first[name] != second[name]} == set(names)


# ---- foreign zips: one test for every rule --------------------------------------------------------------------------

TSV = "index\tprediction\n0\t0\n1\t1\n2\t1\n3\t0\n"
RECORDS = '{"idx": 0, "label": 1}\n{"idx": 1, "label": 0}\n{"idx": 2, "label": 0}\n{"idx": 3, "label": 1}\n'
NESTED = (
    '{"idx": 0, "passage": {"questions": [{"idx": 0, "answers": [{"idx": 0, "label": 1}, {"idx": 1, "label": 0}]}]}}\n'
    '{"idx": 1, "passage": {"questions": [{"idx": 1, "answers": [{"idx": 2, "label": 0}]}]}}\n'
)
RULES: list[tuple[str, str, str | bytes, str | bytes, list[str]]] = [
    ("CoLA.tsv", TSV, "index\tprediction", "id\tlabel", ["the first line is 'id\\tlabel', not 'index<TAB>prediction'"]),
    ("CoLA.tsv", TSV, "3\t0\n", "", ["has 3 rows, not 4", "the index 3 is missing"]),
    ("CoLA.tsv", TSV, "3\t0\n", "3\t0\n4\t0\n", ["has 5 rows, not 4", "there is no index 4; they are 0 to 3"]),
    ("CoLA.tsv", TSV, "1\t1", "1\t2", ["line 3: '2' is none of 0, 1"]),
    ("CoLA.tsv", TSV, "1\t1", "1\tacceptable", ["line 3: 'acceptable' is none of 0, 1"]),
    ("CoLA.tsv", TSV, "1\t1\n2\t1", "2\t1\n1\t1",
     ["the index 2 stands in the place of 1; they are in the order of the test set"]),
    ("CoLA.tsv", TSV, "2\t1", "1\t1", ["the index 1 is there twice", "the index 2 is missing"]),
    ("CoLA.tsv", TSV, "2\t1", "-2\t1", ["the index \"-2\" is no whole number", "the index 2 is missing"]),
    ("CoLA.tsv", TSV, "2\t1", "2,1", ["line 4 has 1 columns; there are two, index and prediction",
                                      'the index "2,1" is no whole number', "the index 2 is missing"]),
    ("CoLA.tsv", TSV, "2\t1", "2\t1\t0", ["line 4 has 3 columns; there are two, index and prediction"]),
    ("CoLA.tsv", TSV, "2\t1", '2\t"1"', ["line 4 is quoted"]),
    ("CoLA.tsv", TSV, "index", "\ufeffindex", ["begins with a byte order mark"]),
    ("CoLA.tsv", TSV, b"2\t1", b"2\t\xff", ["is not UTF-8 (byte 27)"]),
    ("CoLA.tsv", TSV, TSV, "", ["the first line is '', not 'index<TAB>prediction'", "has 0 rows, not 4"]),
    ("STS-B.tsv", TSV, "1\t1", "1\t5.001", ["line 3: '5.001' is no decimal number from 0 to 5"]),
    ("STS-B.tsv", TSV, "1\t1", "1\t-0.100", ["line 3: '-0.100' is no decimal number from 0 to 5"]),
    ("STS-B.tsv", TSV, "1\t1", "1\tnan", ["line 3: 'nan' is no decimal number from 0 to 5"]),
    ("MNLI-m.tsv", TSV.replace("\t0", "\tneutral").replace("\t1", "\tentailment"), "1\tentailment", "1\tEntailment",
     ["line 3: 'Entailment' is none of entailment, neutral, contradiction"]),
    ("COPA.jsonl", RECORDS, '"label": 0', '"label": "0"', ['line 2: the label "0" is none of 0, 1 (and 1 more)']),
    ("COPA.jsonl", RECORDS, '"label": 0', '"label": false', ["line 2: the label false is none of 0, 1 (and 1 more)"]),
    ("COPA.jsonl", RECORDS, '"idx": 1,', '"idx": "1",',
     ['the idx "1" is no whole number', "the idx 1 is missing"]),
    ("COPA.jsonl", RECORDS, '"idx": 1,', '"idx": true,',
     ["the idx true is no whole number", "the idx 1 is missing"]),
    ("COPA.jsonl", RECORDS, '"idx": 1,', '"index": 1,',
     ["line 2 has 'index', 'label' instead of idx, label", "the idx null is no whole number", "the idx 1 is missing"]),
    ("COPA.jsonl", RECORDS, '1, "label": 0}', '1, "label": 0',
     ["line 2 is no JSON (Expecting ',' delimiter: line 1 column 22 (char 21))", "the idx null is no whole number",
      "the idx 1 is missing"]),
    ("COPA.jsonl", RECORDS, '{"idx": 1, "label": 0}', "[1, 0]",
     ["line 2 is no JSON object", "the idx null is no whole number", "the idx 1 is missing"]),
    ("COPA.jsonl", RECORDS, RECORDS, "[" * 100_000,
     ["line 1 is no JSON (maximum recursion depth exceeded while decoding a JSON array)", "has 1 rows, not 4",
      "the idx null is no whole number", "the idx 0 is missing (and 3 more)"]),
    ("WSC.jsonl", RECORDS.replace("1}", '"True"}').replace("0}", '"False"}'), '"True"', '"true"',
     ['line 1: the label "true" is none of "False", "True" (and 1 more)']),
    ("BoolQ.jsonl", RECORDS.replace("1}", '"true"}').replace("0}", '"false"}'), '"true"', "true",
     ['line 1: the label true is none of "false", "true" (and 1 more)']),
    ("ReCoRD.jsonl", RECORDS.replace("1}", '"a"}').replace("0}", '"b"}'), '"b"', '" "',
     ["line 2: the label \" \" is no entity's text (and 1 more)"]),
    ("MultiRC.jsonl", NESTED, '"idx": 2', '"idx": 1',
     ["the answer idx 1 is there twice", "the answer idx 2 is missing"]),
    ("MultiRC.jsonl", NESTED, '"label": 1', '"label": "1"', ['line 1, answer 0: the label "1" is none of 0, 1']),
    ("MultiRC.jsonl", NESTED, '{"questions": [{"idx": 1, "answers": [{"idx": 2, "label": 0}]}]}', "[]",
     ["has 1 questions, not 2", "the question idx 1 is missing", "has 2 answers, not 3",
      "the answer idx 2 is missing"]),
    ("MultiRC.jsonl", NESTED, '{"idx": 2, "label": 0}', "7",
     ["line 2, an answer has no object instead of idx, label", "line 2, answer None: the label null is none of 0, 1",
      "the answer idx null is no whole number", "the answer idx 2 is missing"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "old", "new", "expected"), RULES)
def test_a_rule_of_files(name, text, old, new, expected, monkeypatch):
    nested = name == "MultiRC.jsonl"
    monkeypatch.setitem(MULTIRC, "question", 2)
    monkeypatch.setitem(MULTIRC, "answer", 3)
    file = replace(FILES[name], rows=2 if nested else 4)
    data = text.encode()
    assert check_file(file, data) == []
    assert check_file(file, data.replace(b"\n", b"\r\n")) == []  # Python's csv writer ends lines so
    old, new = (value.encode() if isinstance(value, str) else value for value in (old, new))
    assert old in data
    assert check_file(file, data.replace(old, new)) == expected


def test_ax_b_may_keep_its_keys_as_text():
    file = replace(FILES["AX-b.jsonl"], rows=2)
    data = b'{"idx": "0", "label": "entailment"}\n{"idx": "1", "label": "not_entailment"}\n'
    assert check_file(file, data) == []
    assert check_file(replace(FILES["AX-g.jsonl"], rows=2), data) != []


def test_the_old_qnli_is_told():
    text = "index\tprediction\n" + "".join(f"{number}\tentailment\n" for number in range(5740))
    assert check_file(FILES["QNLI.tsv"], text.encode()) == [
        "has 5,740 rows, not 5,463",
        "there is no index 5463; they are 0 to 5462 (and 276 more)",
        "5740 rows are those of the old QNLI; the server takes the current one",
    ]


ZIP_RULES: list[tuple[Callable[[dict[str, bytes]], list[tuple[str, bytes]]], list[str]]] = [
    (lambda files: [(name, data) for name, data in files.items() if name != "AX.tsv"],
     ["missing: AX.tsv; --partial allows it"]),
    (lambda files: [(f"glue/{name}", data) for name, data in files.items()],
     ["'glue/CoLA.tsv' is a folder or in one; files stand at the root (and 10 more)"]),
    (lambda files: [("glue/", b""), *files.items()], ["'glue/' is a folder or in one; files stand at the root"]),
    (lambda files: [*files.items(), ("CoLA.tsv", files["CoLA.tsv"])], ["CoLA.tsv stands in it 2 times"]),
    (lambda files: [("cola.tsv" if name == "CoLA.tsv" else name, data) for name, data in files.items()],
     ["'cola.tsv' is no file of this board; did you mean 'CoLA.tsv'?", "missing: CoLA.tsv; --partial allows it"]),
    (lambda files: [*files.items(), (".DS_Store", b"")], ["'.DS_Store' is no file of this board"]),
    (lambda files: [(name, b"" if name == "RTE.tsv" else data) for name, data in files.items()],
     ["RTE.tsv: the first line is '', not 'index<TAB>prediction'", "RTE.tsv: has 0 rows, not 4"]),
]  # fmt: skip


@pytest.mark.fault("S7")
@pytest.mark.parametrize(("change", "expected"), ZIP_RULES)
@pytest.mark.usefixtures("small")
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_rule_of_zips(change, expected, tmp_path):
    contents = members(submission.submit(fill(tmp_path, "glue"), "glue")[0].read_bytes())
    assert check_zip(packed(list(contents.items())), "glue") == []
    assert check_zip(packed(change(contents)), "glue") == expected


@pytest.mark.fault("S7")
def test_other_files_are_no_zips(tmp_path):
    for data in (b"", b"PK\x03\x04", b"index\tprediction\n", zipfile.ZipFile.__doc__.encode()):
        (problem,) = check_zip(data, "glue")
        assert problem.startswith("this is no zip file that can be read (BadZipFile")
    assert check_zip(packed([]), "superglue", partial=True) == ["there is no file of this board in it"]
    (tmp_path / "a.zip").write_bytes(b"no")
    assert refusal_of_check(tmp_path / "a.zip", "glue")[0].startswith("this is no zip file that can be read")
    with pytest.raises(ValueError, match="--board gleu: there are glue, superglue, squad, race"):
        submission.check(tmp_path / "a.zip", "gleu")


@pytest.mark.fault("S7")
@pytest.mark.usefixtures("small")
def test_one_damaged_member_hides_no_other():
    data = packed([("CoLA.tsv", TSV.encode()), ("SST-2.tsv", TSV.encode() + b"4\t1\n")])
    problems = check_zip(data.replace(TSV.encode(), TSV.encode()[:-2] + b"9\n", 1), "glue", partial=True)
    assert problems[0].startswith("CoLA.tsv: cannot be read (BadZipFile: Bad CRC-32")
    assert problems[1:] == ["SST-2.tsv: has 5 rows, not 4", "SST-2.tsv: there is no index 4; they are 0 to 3"]


@pytest.mark.fault("S7")
def test_a_bomb_is_not_unpacked(monkeypatch):
    monkeypatch.setattr(submission_forms, "MOST_BYTES", 1000)
    data = submission.zipped({"WNLI.tsv": b"0" * 1001})
    assert check_zip(data, "glue", partial=True) == ["WNLI.tsv: has 1,001 bytes, which is too many for 146 rows"]


SMALL = {
    "CoLA.tsv": TSV.encode(), "STS-B.tsv": TSV.encode(), "COPA.jsonl": RECORDS.encode(),
    "MultiRC.jsonl": NESTED.encode(),
}  # fmt: skip


@pytest.mark.usefixtures("small")
@settings(max_examples=300, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    board=st.sampled_from(["glue", "superglue"]),
    inside=st.booleans(),
    place=st.floats(0, 1),
    length=st.integers(0, 12),
    new=st.one_of(
        st.binary(max_size=12), st.sampled_from([b"\n", b"\t", b"[", b"{}", b"null", b"1e999", b'"\\ud800"'])
    ),
)
def test_damage_of_any_kind_is_a_list_of_sentences(board, inside, place, length, new):
    contents = {name: data for name, data in SMALL.items() if name in {file.name for file in BOARDS[board]}}
    if inside:
        contents = {name: cut(data, place, length, new) for name, data in contents.items()}
    data = submission.zipped(contents)
    if not inside:
        data = cut(data, place, length, new)
    problems = check_zip(data, board)
    assert problems
    assert all(problem and "\n" not in problem for problem in problems)
    assert len("".join(problems)) < 4000
    "".join(problems).encode()


@settings(max_examples=300, derandomize=True, deadline=None)
@given(place=st.floats(0, 1), length=st.integers(0, 3), new=st.text("01234\t\n\r x-٣", max_size=4))
def test_only_tables_of_the_right_form_are_accepted(place, length, new):
    data = cut(TSV.encode(), place, length, new.encode())
    form = rb"index\tprediction\r?\n0\t[01]\r?\n1\t[01]\r?\n2\t[01]\r?\n3\t[01]\r?\n?"
    assert (check_file(replace(FILES["CoLA.tsv"], rows=4), data) == []) == bool(re.fullmatch(form, data))


def cut(data: bytes, place: float, length: int, new: bytes) -> bytes:
    start = int(place * len(data))
    return data[:start] + new + data[start + length :]


# ---- SQuAD and RACE -------------------------------------------------------------------------------------------------


def test_squads_files_and_the_official_figures(tmp_path):
    """Predictions of the real 2.0 set: written from a run's lines, and evaluated as the official script does."""
    examples, predictions, odds = squad.real("v2.0")
    rows = [
        {"index": n, "id": e.id, "prediction": predictions[e.id], "null_odds": odds[e.id]}
        for n, e in enumerate(examples)
    ]
    leave(tmp_path, "squad2", "dev", rows)
    written = submission.submit(tmp_path, "squad", out=tmp_path / "out")
    assert [str(path.relative_to(tmp_path / "out")) for path in written] == [
        "squad2/predictions.json",
        "squad2/null_odds.json",
    ]
    assert json.loads(written[0].read_bytes()) == predictions
    assert json.loads(written[1].read_bytes()) == odds
    data = squad.DATA / "dev-v2.0.reconstructed.json"
    assert json.loads(submission.check(written[0], "squad", data=data))["best_f1"] == squad.BEST_F1
    written[1].unlink()
    assert json.loads(submission.check(written[0], "squad", data=data)) == squad.PRINTED["2.0"]
    examples, predictions, _ = squad.real("v1.1")
    (tmp_path / "predictions.json").write_text(json.dumps(predictions))
    data = squad.DATA / "dev-v1.1.reconstructed.json"
    assert json.loads(submission.check(tmp_path / "predictions.json", "squad", data=data)) == squad.PRINTED["1.1"]


def test_squads_rules(tmp_path):
    row = {"index": 0, "id": "q", "prediction": "a", "null_odds": 0.5}
    assert refusal(tmp_path, "squad")[0].startswith(f"{tmp_path} has neither squad1/test/dev.jsonl nor squad2")
    leave(tmp_path, "squad1", "dev", [row])
    leave(tmp_path, "squad2", "dev", [row, row | {"prediction": None, "null_odds": None}])
    one, two = (tmp_path / task / "test" / "dev.jsonl" for task in ("squad1", "squad2"))
    assert refusal(tmp_path, "squad") == [
        f"{one}: has 1 rows, not 10,570",
        f"{two}: has 2 rows, not 11,873",
        f'{two}: the id "q" is there 2 times',
        f"{two}: question q: no text",
        f"{two}: question q has no null_odds",
    ]
    for text, what in (
        ("{", "is no JSON"),
        ("[]", "from question ids to texts"),
        ('{"q": 1}', "from question ids to texts"),
    ):
        (tmp_path / "predictions.json").write_text(text)
        with pytest.raises(ValueError, match=what):
            submission.check(tmp_path / "predictions.json", "squad")
    (tmp_path / "predictions.json").write_text('{"q": "a"}')
    assert submission.check(tmp_path / "predictions.json", "squad").endswith("has 1 predictions")
    paragraph: dict[str, Any] = {"context": "a b", "qas": [{"id": "q", "question": "?", "answers": []}]}
    data = tmp_path / "data.json"
    data.write_text(json.dumps({"data": [{"paragraphs": [paragraph]}]}))
    with pytest.raises(ValueError, match="it is no dev set"):
        submission.check(tmp_path / "predictions.json", "squad", data=data)


def races(count: int, answer: str = "A") -> list[dict[str, Any]]:
    return [{"index": n, "id": f"middle{n}.txt-0", "prediction": answer} for n in range(count)]


def test_race_is_lines_of_ids_and_letters(tmp_path):
    leave(tmp_path, "race-middle", "test", races(1436))
    (path,) = submission.submit(tmp_path, "race")
    assert path == tmp_path / "race-submission" / "race-middle.jsonl"
    assert path.read_text().splitlines()[1] == '{"id": "middle1.txt-0", "answer": "A"}'
    assert submission.check(path, "race") == f"{path} is as race takes it"
    path.unlink()
    path.parent.rmdir()
    leave(tmp_path, "race-middle", "test", [*races(2, "E"), *races(1)])
    lines = tmp_path / "race-middle" / "test" / "test.jsonl"
    assert refusal(tmp_path, "race") == [
        f"{lines}: has 3 rows, not 1,436",
        f'{lines}: line 1: the answer "E" is no letter from A to D (and 1 more)',
        f'{lines}: the id "middle0.txt-0" is there 2 times',
    ]
    (tmp_path / "race.jsonl").write_text('{"id": 1}\n{"id"')
    assert refusal_of_check(tmp_path / "race.jsonl", "race")[0].startswith("line 2 is damaged")
    (tmp_path / "race.jsonl").write_text('{"id": 1}\n')
    assert refusal_of_check(tmp_path / "race.jsonl", "race") == [
        "has 1 rows, not 4,934 or 1,436 or 3,498",
        "line 1 needs id and answer, it has 'id'",
    ]
    assert refusal(tmp_path / "race-middle" / "test", "race")[0].endswith("finetune.predict_test: true")


# ---- the verb -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small")
def test_the_verb(tmp_path):
    fill(tmp_path / "run" / "finetune", "glue")
    runner, out = CliRunner(), str(tmp_path / "mine.zip")
    done = runner.invoke(app, ["submit", str(tmp_path / "run"), "--board", "glue", "--out", out])
    assert (done.exit_code, done.output) == (0, f"{out}\n")
    checked = runner.invoke(app, ["submit", "--check", out, "--board", "glue"])
    assert (checked.exit_code, checked.output) == (0, f"{out} is as glue takes it\n")
    refused = runner.invoke(app, ["submit", out, "--check", "--board", "superglue"])
    assert refused.exit_code == 2
    assert refused.output.startswith(
        f"error: {out} is not as superglue takes it:\n  'CoLA.tsv' is no file of this board"
    )
    assert refused.output.count("\n") == 3
    (tmp_path / "run" / "finetune" / "rte" / "test" / "test.jsonl").unlink()
    refused = runner.invoke(app, ["submit", str(tmp_path / "run"), "--board", "glue"])
    assert refused.exit_code == 2
    assert "RTE.tsv: there is no " in refused.output
    assert not list((tmp_path / "run").glob("*.zip"))
