"""Comparison pages and the errors of single runs: figures against hand-made files, hostile and odd content."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from frugalbert.cli import app
from frugalbert.report import boards, errors
from frugalbert.report.collect import Collected
from frugalbert.report.page import render
from tests.report.conftest import dump, dump_lines, make_run
from tests.report.odd import contents, spoil
from tests.report.test_report_page import PAYLOADS, read

TASKS = {"cola": ("CoLA", "mcc", 0.0), "rte": ("RTE", "accuracy", 0.527), "stsb": ("STS-B", "pearson", None)}


def row(task: str, values: list[float], init: str = "pretrained", **more: Any) -> dict[str, Any]:
    title, metric, majority = TASKS[task]
    mean = sum(values) / len(values)
    return {
        "task": task, "title": title, "type": "classification", "metric": metric, "init": init,
        "seeds": list(range(len(values))), "values": values, "mean": mean, "std": 0.01,
        "interval": [mean - 0.02, mean + 0.02], "all_metrics": {}, "train_examples": 100, "dev_examples": 277,
        "majority_baseline": majority, "labels": ["yes", "no"], "selection": "none", "trials": 3, **more,
    }  # fmt: skip


def make_board(folder: Path, name: str, shift: float, **more: Any) -> Path:
    terms = {"island_effects": 0.6, "ellipsis": 0.5}
    paradigms = {f"p{number}": {"accuracy": 0.5 + 0.04 * number + shift, "interval": [0.4, 0.9]} for number in range(6)}
    pairs = {
        "accuracy": 0.55 + shift, "interval": [0.54 + shift, 0.56 + shift], "method": "exact", "what": "every token",
        "terms": {term: {"accuracy": value + shift, "interval": [value, value + 0.1]} for term, value in terms.items()},
        "paradigms": paradigms,
    }  # fmt: skip
    rows = [row(task, [base + shift + 0.001 * seed for seed in range(3)]) for task, base in
            (("cola", 0.1), ("rte", 0.55), ("stsb", 0.7))]  # fmt: skip
    dump(folder / "board.json", {
        "model": name, "parameters": 5_120_256, "settings": {"seeds": [0, 1, 2]}, "rows": rows,
        "blimp": {"pretrained": pairs},
        "scores": [
            {"init": "pretrained", "board": "glue", "value": None, "mean": 0.45 + shift, "sentence": "No GLUE."}
        ],
        **more,
    })  # fmt: skip
    return folder


def write_predictions(folder: Path, right: list[list[bool]], golds: list[str]) -> None:
    """Of task `rte`: whether each seed got each example right."""
    other = {"yes": "no", "no": "yes"}
    for seed, hits in enumerate(right):
        dump_lines(folder / "rte" / f"pretrained-seed{seed}" / "predictions.jsonl", [
            {"index": number, "id": str(number), "digest": f"d{number}", "gold": gold,
             "prediction": gold if hit else other[gold], "loss": 0.1 if hit else 2.0 + number}
            for number, (gold, hit) in enumerate(zip(golds, hits, strict=True))
        ])  # fmt: skip


def text_of(html: str) -> str:
    return read(html).text.replace("\u00a0", " ")


# ---- several models -------------------------------------------------------------------------------------------------


def test_models_stand_side_by_side(tmp_path: Path):
    html = boards.render([make_board(tmp_path / "a", "small", 0.1), make_board(tmp_path / "b", "tiny", 0.0)])
    text = text_of(html)
    for words in (
        "small · tiny",
        "CoLA mcc 277 0.0 20.1 ± 1.0 [18.1, 22.1] s 10.1 ± 1.0 [8.1, 12.1] s",
        "RTE accuracy 277 52.7 65.1 ± 1.0 [63.1, 67.1] s",
        "STS-B pearson 277 – 80.1",
        "island effects 70.0 [60.0, 70.0] 60.0 [60.0, 70.0]",
        "overall 65.0 [64.0, 66.0] 55.0 [54.0, 56.0]",
        "exact: every token",
        "small beside tiny, 3 tasks: shown better on 3, worse on 0, undecided on 0; mean difference +10.0 points",
        "small beside tiny on BLiMP; mean difference +10.0 points (95 % interval over paradigms +10.0 to +10.0)",
        "3 comparisons at 95 % stand here: about 0.15 would show a difference by chance alone.",
        "Too few dev examples to rank small differences: CoLA (277)",
        "small glue pre-trained No GLUE. – 55.0",
    ):
        assert words in text, words
    assert html.count("<svg ") == 2


def test_nothing_is_called_better_that_the_interval_does_not_show(tmp_path: Path):
    one = make_board(
        tmp_path / "a", "one", 0.0, blimp=None, rows=[row("rte", [0.7, 0.5, 0.6]), row("cola", [0.2, 0.1])]
    )
    two = make_board(
        tmp_path / "b", "two", 0.0, blimp=None, rows=[row("rte", [0.5, 0.6, 0.5]), row("cola", [0.1, 0.2])]
    )
    text = text_of(boards.render([one, two]))
    assert "one beside two, 2 tasks: shown better on 0, worse on 0, undecided on 2" in text
    swapped = text_of(boards.render([make_board(tmp_path / "c", "low", 0.0), make_board(tmp_path / "d", "high", 0.1)]))
    assert "shown better on 0, worse on 3, undecided on 0; mean difference −10.0 points" in swapped


def test_lower_is_better_where_it_is_and_other_metrics_are_not_compared(tmp_path: Path):
    rows = [row("rte", [4.0, 4.1], metric="mse"), row("cola", [0.5, 0.5], metric="f1")]
    base = [row("rte", [5.0, 5.2], metric="mse"), row("cola", [0.5, 0.5])]
    found = Collected("x", "x")
    one, two = (boards.columns([boards.read(make_board(tmp_path / name, name, 0.0, rows=part), found)])[0]
                for name, part in (("a", rows), ("b", base)))  # fmt: skip
    (item,) = boards.differences(one, two)
    assert (item.task, item.gap) == ("RTE", pytest.approx(1.05))


def test_examples_decide_where_both_predicted_them(tmp_path: Path):
    generator = random.Random(0)
    golds = [generator.choice(["yes", "no"]) for _ in range(400)]
    for name, share in (("a", 0.8), ("b", 0.6)):
        make_board(tmp_path / name, name, 0.0, rows=[row("rte", [share, share])], blimp=None)
        write_predictions(tmp_path / name, [[generator.random() < share for _ in golds] for _ in range(2)], golds)
    found = Collected("x", "x")
    one, two = (boards.columns([boards.read(tmp_path / name, found)])[0] for name in "ab")
    (item,) = boards.differences(one, two)
    assert item.over_examples is not None
    gap, low, high = item.over_examples
    assert 15 < gap < 25
    assert 6 < high - low < 10  # 2 · 1.96 · sqrt((0.16 + 0.24) / 2 / 400)
    assert "shown better on 1" in text_of(boards.render([tmp_path / "a", tmp_path / "b"]))
    same = errors.by_example(one.board.predictions["rte"], one.board.predictions["rte"])
    assert same == (0.0, 0.0, 0.0)
    write_predictions(tmp_path / "b", [[True] * 399] * 2, golds[:399])
    other = boards.columns([boards.read(tmp_path / "b", found)])[0]
    assert errors.by_example(one.board.predictions["rte"], other.board.predictions["rte"]) is None


def test_random_weights_are_columns_of_their_own_and_behind(tmp_path: Path):
    rows = [row("rte", [0.53, 0.52], "random"), row("rte", [0.6, 0.62]), row("rte", [0.66, 0.65], "from mnli")]
    shown = boards.columns([boards.read(make_board(tmp_path / "a", "m", 0.0, rows=rows), Collected("x", "x"))])
    assert [column.name for column in shown] == ["m", "m, from mnli", "m, random weights"]
    assert [round(column.tasks["rte"].mean) for column in shown] == [61, 66, 52]


def test_unfair_comparisons_are_named(tmp_path: Path):
    kind = "on the dev set itself: its scores are too kind"
    one = make_board(tmp_path / "a", "one", 0.0, rows=[row("rte", [0.6, 0.7], selection=kind, trials=60)],
                     settings={"learning_rate": 1e-4})  # fmt: skip
    text = text_of(boards.render([one, make_board(tmp_path / "b", "two", 0.0)]))
    assert "The setting learning_rate differs: one 0.0001000; two –." in text
    assert "How settings were chosen:" in text
    assert kind in text
    assert "Trials per task range from 3 to 60" in text


def test_runs_are_boards_too(tmp_path: Path):
    run, board = make_run(tmp_path / "run", steps=0), make_board(tmp_path / "b", "other", 0.0)
    text = text_of(boards.render([run, board]))
    assert "run, random weights" in text
    assert "python-docs accuracy 400 12.5 62.4 ± 0.7" in text
    assert "run and other share no task" in text or "run beside other" not in text


def test_the_verb_writes_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    one, two = make_board(tmp_path / "a", "one", 0.1), make_board(tmp_path / "b", "two", 0.0)
    result = CliRunner().invoke(app, ["report", str(one), str(two)])
    assert (result.exit_code, result.stdout.strip()) == (0, "comparison.html")
    assert "one · two" in (tmp_path / "comparison.html").read_text()
    alone = CliRunner().invoke(app, ["report", str(one)])
    assert alone.stdout.strip() == str(one / "comparison.html")
    for other, words in (("nowhere", "is no directory"), (str(tmp_path), "has no results yet")):
        refused = CliRunner().invoke(app, ["report", str(one), other])
        assert refused.exit_code == 2
        assert words in refused.stderr


# ---- hostile and odd content ----------------------------------------------------------------------------------------


@pytest.mark.fault("S6")
@pytest.mark.parametrize("payload", PAYLOADS)
def test_payloads_are_text(payload: str, tmp_path: Path):
    rows = [row("rte", [0.6, 0.7], title=f"{payload}1", labels=[payload, "no"], selection=payload)]
    score = {"init": payload, "board": payload, "value": 1, "sentence": payload}
    blimp = {"accuracy": 0.6, "method": payload, "what": payload, "terms": {payload: {"accuracy": 0.5}}}
    folder = make_board(tmp_path / "a", payload, 0.0, rows=rows, scores=[score], blimp={payload: blimp},
                        settings={payload: payload})  # fmt: skip
    read(boards.render([folder, make_board(tmp_path / "b", payload, 0.0)]))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("boards")
    make_board(folder / "a", "one", 0.1)
    make_board(folder / "b", "two", 0.0)
    write_predictions(folder / "a", [[True, False, True]], ["yes", "no", "no"])
    files = ("a/board.json", "b/board.json", "a/rte/pretrained-seed0/predictions.jsonl")
    return folder, contents(folder, files)


@settings(max_examples=60)
@given(data=st.data())
def test_no_content_breaks_the_page(two: tuple[Path, dict[str, Any]], data: st.DataObject):
    """Everything but the drawing, which is slow; figures that could break it are its own tests' business."""
    folder, whole = two
    try:
        spoil(folder, whole, data)
        found = Collected("x", "x")
        try:
            shown = boards.columns([boards.read(folder / name, found) for name in "ab"])
        except ValueError as error:
            assert "has no results yet" in str(error)
            return
        boards.findings(shown)
        tables = [boards.results(shown), boards.blimp(shown), *(boards.compared(shown[0], c) for c in shown[1:])]
        for table in tables:
            assert all(len(cells) == len(table.head) for cells in table.rows)
            assert not re.search(r"\b(nan|inf|None)\b", json.dumps([table.rows, table.note]))
    finally:
        for name, value in whole.items():
            (dump_lines if name.endswith("l") else dump)(folder / name, value)


# ---- errors of single runs ------------------------------------------------------------------------------------------


def test_confusions_and_worst_errors(tmp_path: Path):
    golds = ["yes"] * 6 + ["no"] * 4
    right = [[True] * 5 + [False] + [True] * 3 + [False], [True] * 4 + [False, False] + [True] * 4]
    write_predictions(tmp_path / "finetune", right, golds)
    for seed in range(3):  # more than of the model in question, and not shown
        path = tmp_path / "finetune" / "rte" / f"random-seed{seed}" / "predictions.jsonl"
        dump(path, {"gold": "yes", "prediction": "no"})
    (task,) = errors.read(tmp_path / "finetune", [row("rte", [0.8, 0.8])], Collected("x", "x"))
    assert errors.confusion(task) == {("yes", "yes"): 9, ("yes", "no"): 3, ("no", "no"): 7, ("no", "yes"): 1}
    table = errors.worst(task)
    assert [(cells[3], cells[2]) for cells in table.rows] == [
        ("example 5", "2 of 2"), ("example 9", "1 of 2"), ("example 4", "1 of 2"),
    ]  # fmt: skip
    assert table.rows[0][:2] == ["yes", "no"]
    (shown,) = errors.context([task], {"confusion0": object()})
    assert shown.figure == "confusion0"
    assert "2 seeds added up" in shown.caption


def test_the_kept_models_trials_are_shown_of_a_sweep(tmp_path: Path):
    for setting, count in (("-aaaaaaaa", 3), ("-bbbbbbbb", 2)):
        for seed in range(count):
            path = tmp_path / "rte" / f"pretrained{setting}-seed{seed}" / "predictions.jsonl"
            dump_lines(path, [{"gold": setting, "prediction": "x", "loss": 1.0}])
    (most,) = errors.read(tmp_path, [], Collected("x", "x"))
    assert {lines[0]["gold"] for lines in most.seeds} == {"-aaaaaaaa"}
    dump(tmp_path / "rte" / "model.json", {"trial": "pretrained-bbbbbbbb-seed1"})
    (kept,) = errors.read(tmp_path, [], Collected("x", "x"))
    assert [lines[0]["gold"] for lines in kept.seeds] == ["-bbbbbbbb"] * 2


@pytest.mark.parametrize("gold, prediction, wrong", [
    ("a", "a", False), ("a", "b", True), (["x", "y"], "y", False), (["x"], "z", True), ([], "", False), ([], "x", True),
    (["b", "a"], ["b", "a"], False), (["a"], [], True), (1.5, 1.5, False), ([1], 1, False), (None, "a", True),
])  # fmt: skip
def test_what_is_wrong(gold, prediction, wrong):
    assert errors.is_wrong({"gold": gold, "prediction": prediction}) is wrong


def test_numbers_and_lists_have_no_matrix_but_worst_errors(tmp_path: Path):
    lines = [{"index": n, "gold": 4.0, "prediction": 4.0 - n / 10, "loss": (n / 10) ** 2} for n in range(15)]
    dump_lines(tmp_path / "stsb" / "pretrained-seed0" / "predictions.jsonl", lines)
    (task,) = errors.read(tmp_path, [], Collected("x", "x"))
    assert errors.figures([task]) == {}
    table = errors.worst(task)
    assert [cells[3] for cells in table.rows] == [f"example {n}" for n in range(14, 4, -1)]
    assert table.rows[0][:2] == ["4.000", "2.600"]


def test_texts_come_from_the_tokens_the_model_read(tmp_path: Path):
    from tests.finetune.conftest import make_tiny, sentences

    texts = [("the cat runs", "a dog"), ("red fish", "blue bird"), ("<script>x()</script>", "old")]
    make_tiny(tmp_path / "rte" / "model", sentences(20, 0))
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tmp_path / "rte" / "model" / "tokenizer.json"))
    dump_lines(tmp_path / "rte" / "dev-tokens.jsonl", [{"input_ids": tokenizer.encode(*pair).ids} for pair in texts])
    write_predictions(tmp_path, [[False] * 3], ["yes", "no", "no"])
    (task,) = errors.read(tmp_path, [], Collected("x", "x"))
    rows = errors.worst(task).rows
    assert [cells[3] for cells in rows[1:]] == ["red fish | blue bird", "the cat runs | a dog"]
    assert rows[0][3] == "< script > x ( ) < / script > | old"
    (tmp_path / "rte" / "dev-tokens.jsonl").write_text('{"input_ids": [1]}\n')  # of another dev set
    assert [cells[3] for cells in errors.worst(task).rows] == ["example 2", "example 1", "example 0"]


def test_a_runs_page_shows_errors_as_text(tmp_path: Path):
    run = make_run(tmp_path / "run", steps=0)
    payload = PAYLOADS[0]
    dump_lines(run / "finetune" / "python-docs" / "pretrained-seed0" / "predictions.jsonl", [
        {"index": 0, "id": payload, "gold": payload, "prediction": "numpy", "loss": 3.0},
        {"index": 1, "gold": "numpy", "prediction": "numpy", "loss": float("nan")},
        {"index": 2, "text": payload, "gold": "numpy", "prediction": payload, "loss": 1e309},
    ])  # fmt: skip
    html = render(run)
    text = text_of(html)
    assert (
        f"python-docs: worst errors Right Predicted Wrong in Text Loss {payload} numpy 1 of 1 example {payload}" in text
    )
    assert "Confusion matrix of python-docs: 33.3" in html


def test_many_classes_are_a_table(tmp_path: Path):
    lines = [{"index": n, "gold": f"class {n % 20}", "prediction": f"class {n % 19}", "loss": 1.0} for n in range(100)]
    dump_lines(tmp_path / "many" / "pretrained-seed0" / "predictions.jsonl", lines)
    (task,) = errors.read(tmp_path, [], Collected("x", "x"))
    drawn = errors.figures([task])
    assert drawn == {}
    (shown,) = errors.context([task], drawn)
    assert len(shown.confusions.rows) == errors.MOST_ERRORS
