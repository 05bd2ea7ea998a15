"""SuperGLUE's official files: counts, spans, candidates, ids, and whatever else may stand in a JSONL line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frugalbert import config
from frugalbert.finetune.examples import load
from frugalbert.finetune.superglue import find_span
from frugalbert.finetune.tasks import SUPERGLUE, TABLE, Data, resolve
from tests.finetune.golden.files import SUPERGLUE as OURS
from tests.finetune.golden.files import changed

COUNTS = {
    "boolq": (0, 3270, 3245),  # the copy at hand has no training file
    "cb": (250, 56, 250),
    "copa": (400, 100, 500),
    "multirc": (27243, 4848, 9693),
    "superglue-rte": (2490, 277, 3000, 1104, 356),
    "wic": (5428, 638, 1400),
    "wsc": (554, 104, 146),
    "wsc-text": (554, 104, 146),
}
ROWS = {task.name: task for task in SUPERGLUE}


def read(name: str, data: Path, **more: Any) -> Data:
    section = config.Finetune(tasks=[name], model="unused", data=str(data), **more)
    return load(resolve([name])[0], section, Path(), None, [task for task in TABLE if task.rides == name])


def place(folder: Path, name: str, **contents: str) -> Path:
    """Our own files of a task below `folder`, some replaced (`train`, `val`, `test`)."""
    title = ROWS[name].layout.folder  # type: ignore[union-attr]
    for file, text in OURS.items():
        if file.startswith((f"{title}/", "AX-")):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(text)
    for stem, text in contents.items():
        (folder / title / f"{stem}.jsonl").write_text(text)
    return folder


@pytest.mark.parametrize("name", COUNTS)
def test_no_row_of_the_real_files_is_lost(shared_data, name):
    """Counts of Wang et al. 2019; MultiRC's are answers."""
    data = read(name, shared_data / "superglue", predict_test=True, train=name != "boolq")
    assert tuple(len(part) for part in data.sets.values()) == COUNTS[name]
    for split, part in data.sets.items():
        assert len({row.id for row in part}) == len(part)
        assert {row.label is None for row in part} <= {split == "test"}
    if name == "multirc":
        counts = [len({row.group for row in part}) for part in data.sets.values()]
        assert counts == [5131, 953, 1820]
        assert [len({row.id.split(".")[0] for row in part}) for part in data.sets.values()] == [456, 83, 166]
    if name == "superglue-rte":
        groups = [row.group for row in data.sets["axg"]]
        assert groups == [str(number // 2) for number in range(356)]
        pairs = zip(data.sets["axg"][::2], data.sets["axg"][1::2], strict=True)
        assert all(one.text_b == two.text_b and one.label == two.label for one, two in pairs)


def test_spans_of_the_real_files_are_the_words(shared_data):
    """WiC's may be another form of the word; WSC's are the span's text, but for two rows whose passage has it not."""
    for row in read("wic", shared_data / "superglue").train:
        found = [(row.text if side == 0 else row.text_b or "")[first:end] for side, first, end in row.spans]
        assert all(word == word.strip() and word for word in found)
    data = read("wsc", shared_data / "superglue", predict_test=True)
    assert data.notes == (
        "dev: 1 spans not at their index, the nearest occurrence was taken",
        "test: 2 spans not in the text, the words at their index were taken",
        "test: 1 spans not at their index, the nearest occurrence was taken",
    )
    wrong = []
    for name, file in (("train", "train"), ("dev", "val"), ("test", "test")):
        path = shared_data / "superglue" / "WSC" / f"{file}.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()]
        for row, record in zip(data.sets[name], records, strict=True):
            for number, (_, first, end) in enumerate(row.spans, 1):
                wanted = " ".join(record["target"][f"span{number}_text"].split()).lower().removesuffix(".")
                if wanted != " ".join(row.text[first:end].split()).lower():
                    wrong.append((name, row.id, number))
    assert wrong == [("test", "80", 1), ("test", "82", 1)]


@pytest.mark.parametrize(
    ("text", "words", "index", "found", "oddity"),
    [
        ("A cat ate it.", "it", 3, "it", ""),
        ("Ann's dog.", "Ann", 0, "Ann", ""),
        ("Ann saw.", "Ann's", 0, "Ann", ""),  # the span has the ending, the text has not
        ('He said "Bob Lee" ran.', "Bob Lee", 2, "Bob Lee", ""),
        ("A red\nbird", "red bird", 1, "red\nbird", ""),
        ("A red bird", "red\nbird", 1, "red bird", ""),
        ("THE cat", "the cat", 0, "THE cat", ""),
        ("it ran to it and it", "it", 4, "it", "nearest"),
        ("with it he bit it", "it", 3, "it", "nearest"),  # not the one inside `bit`
        ("One, two three.", "one three", 0, "One, two", "indexed"),
        ("One (two) three.", "ten", 1, "two", "indexed"),
        ("- one", "ten", 0, "-", "indexed"),
    ],
)
def test_a_span_by_index_then_by_text_then_by_index_alone(text, words, index, found, oddity):
    first, end, said = find_span(text, words, index, "f line 1")
    assert text[first:end] == found
    assert not text[max(0, first - 1) : first].isalnum()
    expected = {"": "", "nearest": "the nearest occurrence was taken", "indexed": "the words at their index were taken"}
    assert said.endswith(expected[oddity])
    assert bool(said) == bool(oddity)


def test_the_nearest_occurrence_is_counted_in_words():
    text = "it ran to it and then it slept"
    assert find_span(text, "it", 4, "")[:2] == (10, 12)
    assert find_span(text, "it", 5, "")[:2] == (22, 24)


def test_a_span_behind_the_text():
    with pytest.raises(ValueError, match="f line 1: the span 'ten' is not in the text, which has no word 7"):
        find_span("one two", "ten", 7, "f line 1")


# ---- ReCoRD ---------------------------------------------------------------------------------------------------------


def test_candidates_of_record(tmp_path):
    """Distinct surface strings with their last character; training draws wrong ones by hash, evaluation keeps all."""
    place(tmp_path, "record")
    data = read("record", tmp_path, negatives=1)
    assert [row.id for row in data.train] == ["0", "1"]
    assert data.dev[0].names == ("Ann Lee", "Bob", "Oslo")
    assert data.dev[0].options[0] == "Ann Lee stays"
    assert (data.dev[0].label, data.dev[0].answers) == ((0,), ("Ann Lee",))
    for row in data.train:
        assert len(row.names) == 2
        assert isinstance(row.label, tuple)
        assert {row.names[number] for number in row.label} == set(row.answers)
    again = read("record", tmp_path, negatives=1)
    assert again.train == data.train
    everything = read("record", tmp_path, negatives=5).train
    assert [set(row.names) for row in everything] == [{"Ann Lee", "Bob", "Oslo"}] * 2


def test_a_query_without_its_answer_among_the_candidates(tmp_path):
    record = json.loads(OURS["ReCoRD/train.jsonl"])
    record["qas"].append({"query": "@placeholder ran", "idx": 2, "answers": [{"start": 8, "end": 10, "text": "met"}]})
    text = json.dumps(record) + "\n"
    data = read("record", place(tmp_path, "record", train=text, val=text))
    assert [row.id for row in data.train] == ["0", "1"]
    assert data.notes == ("train: 1 queries without the answer among their candidates left out",)
    assert (data.dev[2].label, data.dev[2].answers) == ((), ("met",))  # it cannot be right, and counts


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("boolq", {"train": OURS["CB/train.jsonl"]}, "line 1: BoolQ needs the field 'question', .*those of CB"),
        ("cb", {"train": OURS["COPA/train.jsonl"]}, "CB needs the field 'hypothesis', .*those of COPA"),
        ("boolq", {"train": OURS["MultiRC/train.jsonl"]}, "BoolQ needs the field .*those of MultiRC"),
        ("multirc", {"train": OURS["ReCoRD/train.jsonl"]}, "line 1 has no questions; is it the official file"),
        ("wsc", {"train": OURS["WiC/train.jsonl"]}, "WSC needs the field 'text', .*those of WiC"),
        ("cb", {"train": OURS["RTE/train.jsonl"]}, "line 1: 'not_entailment' is no label of CB"),
        ("cb", {"val": OURS["CB/test.jsonl"]}, "val.jsonl line 1 has no label; a file without them"),
        ("cb", {"train": OURS["CB/train.jsonl"][:-20]}, "train.jsonl line 3 is no JSON"),
        ("cb", {"train": changed("CB/train.jsonl", '"idx": 2', '"idx": 0')}, "id '0', as has .*train.jsonl line 1;"),
        ("cb", {"train": changed("CB/train.jsonl", '"idx": 2', '"idx": "x"')}, "line 3: the idx 'x' is no number"),
        ("cb", {"train": changed("CB/train.jsonl", '"Do cats sing?"', "null")}, "line 3: 'premise' is no text"),
        ("cb", {"train": "\n"}, "train.jsonl is empty"),
        ("copa", {"train": changed("COPA/train.jsonl", "effect", "result")}, "asks for 'cause' or 'effect'"),
        ("wic", {"train": changed("WiC/train.jsonl", '"end1": 19', '"end1": 99')}, "is at 14–99, .* has 20 characters"),
        ("record", {"train": changed("ReCoRD/train.jsonl", "@placeholder", "somebody")}, "query has no @placeholder"),
        ("record", {"train": changed("ReCoRD/train.jsonl", '"end": 38', '"end": 999')}, "as places inside the pas"),
    ],
)  # fmt: skip
def test_bad_files_get_one_sentence(tmp_path, name, contents, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        read(name, place(tmp_path, name, **contents))
    assert "\n" not in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 50) | st.floats(allow_nan=True) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["text", "idx", "start"]), inner),
    max_leaves=3,
)


def mutate(value: Any, path: list[int], new: Any) -> Any:
    """The JSON value with the part that `path` leads to replaced."""
    if isinstance(value, dict) and value and path:
        key = list(value)[path[0] % len(value)]
        return {**value, key: mutate(value[key], path[1:], new)}
    if isinstance(value, list) and value and path:
        place = path[0] % len(value)
        return [*value[:place], mutate(value[place], path[1:], new), *value[place + 1 :]]
    return new


@settings(derandomize=True, max_examples=250, deadline=None)
@given(name=st.sampled_from(sorted(ROWS)), path=st.lists(st.integers(0, 9), min_size=1, max_size=7), new=JSON)
def test_any_change_of_a_record_ends_in_examples_or_one_sentence(tmp_path_factory, name, path, new):
    if ROWS[name].rides:
        name = "superglue-rte"
    folder = place(tmp_path_factory.mktemp("any"), name)
    title = ROWS[name].layout.folder  # type: ignore[union-attr]
    lines = OURS[f"{title}/train.jsonl"].splitlines()
    lines[0] = json.dumps(mutate(json.loads(lines[0]), path, new))
    place(folder, name, train="\n".join(lines))
    try:
        data = read(name, folder)
    except ValueError as error:
        assert "\n" not in str(error)
        assert "train" in str(error)
    else:
        assert data.train
