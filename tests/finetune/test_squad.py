"""SQuAD's JSON and its relatives: counts, places of answers, versions, and damage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frugalbert import config
from frugalbert.finetune.examples import load
from frugalbert.finetune.squad import _nearest
from frugalbert.finetune.tasks import Data, resolve
from tests.finetune.golden.files import CONTEXT, SQUAD, question, squad
from tests.finetune.test_superglue import JSON, mutate

TRAIN, DEV = SQUAD["train-v2.0.json"], SQUAD["dev-v2.0.json"]


def official(name: str, data: Path, **more: Any) -> Data:
    section = config.Finetune(tasks=[name], model="unused", data=str(data), **more)
    return load(resolve([name])[0], section, Path(), None)


def custom(folder: Path, train: str, dev: str | None = None, suffix: str = ".json", **more: Any) -> Data:
    (folder / f"train{suffix}").write_text(train)
    if dev is not None:
        (folder / f"dev{suffix}").write_text(dev)
        more["dev"] = f"dev{suffix}"
    task = config.Task(name="mine", type="question-answering", train=f"train{suffix}", **more)
    return load(resolve([task])[0], config.Finetune(tasks=[task], model="unused"), folder, None)


@pytest.mark.parametrize(("name", "count", "without"), [("squad1", 10570, 0), ("squad2", 11873, 5945)])
def test_no_question_of_the_real_files_is_lost(shared_data, name, count, without):
    data = official(name, shared_data, train=False)
    assert len(data.dev) == len({row.id for row in data.dev}) == count
    assert sum(row.label == 0 for row in data.dev) == without
    for row in data.dev:
        assert row.label == bool(row.answers)
        assert row.text_b is not None
        for answer, start in zip(row.answers, row.starts, strict=True):
            assert row.text_b[start : start + len(answer)] == answer


def test_a_real_training_set_repeats_ids_and_an_unlabelled_one_is_no_dev_set(shared_data):
    folder = shared_data / "squad"
    names = [f"tydiqa.goldp.en.{split}.json" for split in ("train", "dev")]
    task = config.Task(name="mine", type="question-answering", train=names[0])
    data = load(resolve([task])[0], config.Finetune(tasks=[task], model="unused"), folder, None)
    assert len(data.train) + len(data.dev) == 3696
    assert any("questions have the id of another one" in note for note in data.notes)
    assert not {row.text_b for row in data.train} & {row.text_b for row in data.dev}
    task = task.model_copy(update={"dev": names[1]})
    with pytest.raises(ValueError, match=r"has no answer; a file without them, .*cannot be the dev set of mine"):
        load(resolve([task])[0], config.Finetune(tasks=[task], model="unused"), folder, None)


@pytest.mark.parametrize(
    ("text", "start", "found"),
    [("tree", 24, 24), ("tree", 34, 34), ("tree", 60, 34), ("tree", 27, 24), ("tree", 31, 34), ("tree", -5, 24),
     ("sea", 3, -1), ("Birds", 2, 2), ("love it.", 900, 57)],
)  # fmt: skip
def test_the_place_nearest_to_the_start(text, start, found):
    assert _nearest(CONTEXT, text, start) == found
    places = [place for place in range(len(CONTEXT)) if CONTEXT.startswith(text, place)]
    assert found == min(places, key=lambda place: abs(place - start), default=-1)


@pytest.mark.parametrize("answers", [{"text": ["Birds"], "answer_start": [2]}, [{"text": "Birds"}], ["Birds"]])
def test_forms_of_answers_in_rows(tmp_path, answers):
    rows = [{"id": 1, "question": " Who?", "context": CONTEXT, "answers": answers}]
    rows.append({"id": 2, "question": "Where?", "context": CONTEXT, "answers": []})
    text = "\n".join(map(json.dumps, rows))
    data = custom(tmp_path, text, text, ".jsonl")
    assert [(row.id, row.text, row.label, row.answers, row.starts) for row in data.train] == [
        ("1", "Who?", 1, ("Birds",), (2,)), ("2", "Where?", 0, (), ()),
    ]  # fmt: skip
    assert data.task.metrics == ("squad_f1", "squad_em")
    assert data.labels == ()


def test_plausible_answers_are_none(tmp_path):
    data = custom(tmp_path, TRAIN, squad(question("a", "Who is red?", [("Birds", 2)], True)))
    assert [(row.label, row.answers) for row in data.dev] == [(0, ())]
    data = custom(tmp_path, TRAIN, DEV)
    assert [row.answers for row in data.train] == [("Birds",), ()]
    assert [row.label for row in data.dev] == [0, 1]


@pytest.mark.parametrize(
    ("train", "dev", "message"),
    [
        (TRAIN[:-30], DEV, "train.json line 1 is no JSON .*is the file whole"),
        ('{"data": []}', DEV, "train.json has no questions; SQuAD's form is"),
        ('{"date": []}', DEV, "train.json has no list 'data'"),
        ('{"data": [{"paragraphs": 3}]}', DEV, r"data\[0\] has no list 'paragraphs'"),
        (TRAIN, squad(question("a", "Q?", []), question("a", "R?", [])), r"dev.json .*id a has no answer; a file wi"),
        (TRAIN, squad(*[question("a", "Q?", [("Birds", 2)])] * 2), r"id a has the id 'a', as has .*dev.json data\[0\]"),
        (TRAIN, DEV.replace('"answer_start": 2', '"answer_start": "2"'), "the answer_start '2' is no number"),
        (TRAIN, DEV.replace('"context"', '"text"'), "dev.json .*id d1: 'context' is no text"),
        (squad(question("a", "Q?", [("sea", 0)])), DEV, r"task mine has no training examples \(0 train, 2 dev\)"),
    ],
)
def test_bad_files_get_one_sentence(tmp_path, train, dev, message):
    with pytest.raises(ValueError, match=message) as caught:
        custom(tmp_path, train, dev)
    assert "\n" not in str(caught.value)


def test_the_other_version_is_told(tmp_path):
    for version, text in (("v1.1", SQUAD["train-v1.1.json"]), ("v2.0", SQUAD["train-v1.1.json"])):
        for split in ("train", "dev"):
            (tmp_path / f"{split}-{version}.json").write_text(text)
    (tmp_path / "squad").mkdir()
    for path in tmp_path.glob("*.json"):
        path.rename(tmp_path / "squad" / path.name)
    assert len(official("squad1", tmp_path).train) == 2
    with pytest.raises(ValueError, match=r"train-v2.0.json is of SQuAD 1.1, not of SQuAD 2.0; write squad1"):
        official("squad2", tmp_path)
    (tmp_path / "squad" / "dev-v1.1.json").write_text(DEV)
    with pytest.raises(ValueError, match=r"dev-v1.1.json is of SQuAD 2.0, not of SQuAD 1.1; write squad2"):
        official("squad1", tmp_path)


def test_another_ending(tmp_path):
    with pytest.raises(ValueError, match="read from .json .* or .jsonl files"):
        custom(tmp_path, "question,context\n", suffix=".csv")


@settings(derandomize=True, max_examples=100, deadline=None)
@given(path=st.lists(st.integers(0, 9), min_size=1, max_size=9), new=JSON)
def test_any_change_ends_in_examples_or_one_sentence(tmp_path_factory, path, new):
    try:
        data = custom(tmp_path_factory.mktemp("any"), json.dumps(mutate(json.loads(TRAIN), path, new)), DEV)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert data.train
