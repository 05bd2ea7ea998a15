"""Where tasks stand, what is in the way, and copies of the hub's datasets."""

from __future__ import annotations

from pathlib import Path

import pytest

from frugalbert import config
from frugalbert.finetune.examples import load, load_all, patterns
from frugalbert.finetune.sources import Absent, collect, locate
from frugalbert.finetune.tasks import TABLE, Data, Example, resolve
from tests.finetune.golden import files

TASKS = {task.name: task for task in TABLE}


def section(*tasks: str, **settings: object) -> config.Finetune:
    return config.Finetune(tasks=tasks, model="unused", **settings)


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return files.write(tmp_path_factory.mktemp("official"))


def find(name: str, data: Path) -> Path | str:
    return locate(TASKS[name], data, patterns(TASKS[name]))


# ---- folders --------------------------------------------------------------------------------------------------------


def test_the_two_rtes_are_told_apart_by_their_files(official):
    assert find("rte", official) == official / "glue" / "RTE"
    assert find("superglue-rte", official) == official / "superglue" / "RTE"
    with pytest.raises(Absent, match=r"has no folder RTE with \*.jsonl"):
        find("superglue-rte", official / "glue")


@pytest.mark.parametrize(
    ("spelling", "task"),
    [("cola", "cola"), ("SST-2", "sst2"), ("SST", "sst2"), ("sts_b", "stsb"), ("diagnostic", "ax"), ("MNLI", "ax")],
)
def test_folders_in_any_spelling_at_two_levels(tmp_path, spelling, task):
    for folder in (tmp_path / spelling, tmp_path / "deep" / "glue" / spelling):
        folder.mkdir(parents=True)
        (folder / "diagnostic.tsv").touch()
        assert find(task, folder.parent) == folder
        assert find(task, folder) == folder  # the folder itself
        if folder.parent.name == "glue":
            assert find(task, tmp_path / "deep") == folder
        (folder / "diagnostic.tsv").unlink()


def test_a_folder_without_the_files_is_passed_over(tmp_path):
    for name in ("BoolQ", "deeper/boolq"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "deeper" / "boolq" / "val.jsonl").touch()
    files.write(tmp_path / "glue")
    (tmp_path / "glue" / "glue" / "AX").rename(tmp_path / "glue" / "glue" / "diagnostic")
    assert find("ax", tmp_path / "glue") == tmp_path / "glue" / "glue" / "diagnostic"  # not MNLI, which comes first
    assert find("boolq", tmp_path) == tmp_path / "deeper" / "boolq"


def test_no_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"finetune.data: .*absent is no directory"):
        find("rte", tmp_path / "absent")


# ---- groups and riders ----------------------------------------------------------------------------------------------


def test_absent_members_of_a_group_are_left_out_aloud(official, tmp_path, capsys):
    for name in ("CoLA", "MNLI", "QNLI"):
        (tmp_path / name).symlink_to(official / "glue" / name)
    (tmp_path / "QNLI").unlink()
    (tmp_path / "QNLI").mkdir()
    (tmp_path / "QNLI" / "dev.tsv").write_text(files.GLUE["QNLI/dev.tsv"])
    datas = load_all(section("glue", data=str(tmp_path)), Path(), None)
    assert [data.task.name for data in datas] == ["cola", "mnli"]
    said = capsys.readouterr().err
    assert "QNLI left out: " in said
    assert "has no train.tsv (only dev.tsv)" in said
    assert "SST-2 left out: finetune.data: " in said
    mnli = datas[1]
    assert mnli.riders == ()
    assert any(note.startswith("AX left out: ") for note in mnli.notes)


def test_a_task_asked_for_by_name_may_not_be_absent(official, tmp_path):
    (tmp_path / "CoLA").symlink_to(official / "glue" / "CoLA")
    with pytest.raises(Absent, match="no folder RTE"):
        load_all(section("glue", "rte", data=str(tmp_path)), Path(), None)
    (tmp_path / "MNLI").symlink_to(official / "glue" / "MNLI")
    with pytest.raises(Absent, match=r"no folder AX with diagnostic.tsv"):
        load_all(section("mnli", "ax", data=str(tmp_path)), Path(), None)


def test_nothing_left(tmp_path):
    with pytest.raises(ValueError, match="no task is left; CoLA left out: "):
        load_all(section("glue", data=str(tmp_path)), Path(), None)


def test_riders_are_sets_of_the_task_that_predicts_them(official):
    glue = {data.task.name: data for data in load_all(section("glue", data=str(official)), Path(), None)}
    assert set(glue) == {"cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"}
    mnli = glue["mnli"]
    assert list(mnli.sets) == ["train", "dev", "dev-mismatched", "ax"]
    assert [row.name for row in mnli.riders] == ["ax"]
    assert {row.label for row in mnli.sets["ax"]} == {None}
    rte = load_all(section("superglue-rte", "axb", "AX-g", data=str(official)), Path(), None)
    assert len(rte) == 1
    assert [(row.label, row.group) for row in rte[0].sets["axg"]] == [(0, "0"), (0, "0"), (0, "1"), (0, "1")]
    assert [row.id for row in rte[0].sets["axb"]] == ["0", "1"]  # text in the file


def test_test_sets_only_when_they_are_to_be_predicted(official):
    data = load(TASKS["mnli"], section("mnli", data=str(official), predict_test=True), Path(), None)
    assert list(data.sets) == ["train", "dev", "dev-mismatched", "test", "test-mismatched"]
    assert [row.label for name in ("test", "test-mismatched") for row in data.sets[name]] == [None, None]
    assert data.sets["test-mismatched"][0].id == "9796"


def test_a_model_that_is_only_evaluated_needs_no_training_file(official, tmp_path):
    (tmp_path / "BoolQ").mkdir()
    (tmp_path / "BoolQ" / "val.jsonl").write_text(files.SUPERGLUE["BoolQ/val.jsonl"])
    data = load(TASKS["boolq"], section("boolq", data=str(tmp_path), train=False), Path(), None)
    assert (len(data.train), len(data.dev)) == (0, 1)
    with pytest.raises(Absent, match=r"has no train.jsonl \(only val.jsonl\)"):
        load(TASKS["boolq"], section("boolq", data=str(tmp_path)), Path(), None)


# ---- ids ------------------------------------------------------------------------------------------------------------


def test_an_id_that_occurs_twice_is_told_with_both_places():
    pairs = [(f"f line {number}", Example("a", None, 0, key)) for number, key in enumerate(["1", "2", "1"])]
    with pytest.raises(ValueError, match="f line 2 has the id '1', as has f line 0"):
        collect(pairs, "dev", TASKS["cb"], [])
    notes: list[str] = []
    assert len(collect(pairs, "train", TASKS["squad1"], notes)) == 3  # real training sets have such
    assert notes == ["train: 1 questions have the id of another one"]


# ---- the hub's form -------------------------------------------------------------------------------------------------


def classes(*names: str):
    import datasets

    return datasets.ClassLabel(names=list(names))


BOOLEAN = ("False", "True")
HUB: dict[str, tuple[dict, dict]] = {
    "boolq": ({"question": "q", "passage": "p", "idx": 4, "label": "True"}, {"label": BOOLEAN}),
    "cb": (
        {"premise": "p", "hypothesis": "h", "idx": 4, "label": "neutral"},
        {"label": ("entailment", "contradiction", "neutral")},
    ),
    "copa": (
        {"premise": "p.", "choice1": "a", "choice2": "b", "question": "cause", "idx": 4, "label": "choice2"},
        {"label": ("choice1", "choice2")},
    ),
    "multirc": (
        {
            "paragraph": "p", "question": "q", "answer": "a", "idx": {"paragraph": 1, "question": 2, "answer": 3},
            "label": "True",
        },
        {"label": BOOLEAN},
    ),
    "record": (
        {
            "passage": "Bob met Ann", "query": "@placeholder met", "entities": ["Ann", "Bob"], "answers": ["Bob"],
            "entity_spans": {"text": ["Bob"], "start": [0], "end": [3]}, "idx": {"passage": 1, "query": 2},
        },
        {},
    ),
    "wic": (
        {
            "word": "a", "sentence1": "an a", "sentence2": "as", "start1": 3, "start2": 0, "end1": 4, "end2": 2,
            "idx": 4, "label": "False",
        },
        {"label": BOOLEAN},
    ),
    "wsc": (
        {
            "text": "Bob saw it", "span1_index": 0, "span2_index": 2, "span1_text": "Bob", "span2_text": "it",
            "idx": 4, "label": "True",
        },
        {"label": BOOLEAN},
    ),
    "mnli": (
        {"premise": "p", "hypothesis": "h", "idx": 4, "label": "neutral"},
        {"label": ("entailment", "neutral", "contradiction")},
    ),
    "mrpc": (
        {"sentence1": "a", "sentence2": "b", "idx": 4, "label": "equivalent"},
        {"label": ("not_equivalent", "equivalent")},
    ),
    "stsb": ({"sentence1": "a", "sentence2": "b", "idx": 4, "label": 2.5}, {}),
    "squad2": (
        {
            "id": "x4", "title": "t", "context": " c d", "question": "q",
            "answers": {"text": ["d"], "answer_start": [3]},
        },
        {},
    ),
    "race": (
        {"example_id": "high4.txt", "article": "a", "answer": "B", "question": "q _ .", "options": [*"xyzw"]},
        {},
    ),
}  # fmt: skip
EXPECTED = {
    "boolq": Example("q", "p", 1, "4"),
    "cb": Example("p", "h", 2, "4"),
    "copa": Example("p. because", None, (1,), "4", options=("a", "b"), names=("0", "1")),
    "multirc": Example("p", "q a", 1, "1.2.3", group="1.2"),
    "record": Example(
        "Bob met Ann", None, (1,), "2", options=("Ann met", "Bob met"), names=("Ann", "Bob"), answers=("Bob",)
    ),
    "wic": Example("an a", "as", 0, "4", spans=((0, 3, 4), (1, 0, 2))),
    "wsc": Example("Bob saw it", None, 1, "4", spans=((0, 0, 3), (0, 8, 10))),
    "mnli": Example("p", "h", 1, "4"),
    "mrpc": Example("a", "b", 1, "4"),
    "stsb": Example("a", "b", 2.5, "4"),
    "squad2": Example("q", " c d", 1, "x4", answers=("d",), starts=(3,)),
    "race": Example(
        "a", None, (1,), "high4.txt-0", "high", options=("q x .", "q y .", "q z .", "q w ."), names=tuple("ABCD")
    ),
}


def hub_copy(name: str, folder: Path, record: dict, names: dict, splits: tuple[str, ...]) -> None:
    """A directory like the hub's repository: a README with the configuration, and Parquet files."""
    import datasets

    layout = TASKS[name].layout
    assert layout is not None
    features = None
    if names:
        plain = datasets.Dataset.from_list([{key: value for key, value in record.items() if key not in names}]).features
        features = datasets.Features({**plain, **{key: classes(*values) for key, values in names.items()}})
    lines = []
    for split in splits:
        path = folder / layout.subset / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list([record], features=features).to_parquet(path)
        lines.append(f"  - split: {split}\n    path: {layout.subset}/{split}-*\n")
    (folder / "README.md").write_text(
        f"---\nconfigs:\n- config_name: {layout.subset}\n  data_files:\n{''.join(lines)}---\n"
    )


def load_copy(name: str, data: Path) -> Data:
    return load(TASKS[name], section(name, data=str(data), train=False), Path(), None)


@pytest.mark.parametrize("name", HUB)
def test_every_form_of_the_hub(tmp_path, monkeypatch, name):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    record, names = HUB[name]
    layout = TASKS[name].layout
    assert layout is not None
    mnli = ("train", "validation_matched", "validation_mismatched")
    splits = mnli if name == "mnli" else ("train", "validation")
    hub_copy(name, tmp_path / layout.hub.split("/")[-1], record, names, splits)
    data = load_copy(name, tmp_path)
    assert {row for part in data.sets.values() for row in part} == {EXPECTED[name]}
    assert load_copy(name, tmp_path / layout.hub.split("/")[-1]).dev == data.dev  # the copy itself


def test_hidden_labels_of_the_hub_are_not_known(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    record, names = HUB["cb"]
    hub_copy("cb", tmp_path, {**record, "label": -1}, names, ("train", "validation", "test"))
    with pytest.raises(ValueError, match=r"train 0 has no label; a file without them, .*cannot be the train set of CB"):
        load(TASKS["cb"], section("cb", data=str(tmp_path)), Path(), None)


@pytest.mark.parametrize("name", ["boolq", "cb", "mnli", "mrpc", "squad2", "race", "record"])
def test_a_column_that_the_hubs_form_lacks(tmp_path, monkeypatch, name):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    record, names = HUB[name]
    missing = [column for column in record if column not in (*names, "idx", "title", "entity_spans", "answers")][-1]
    other = {f"{column}s" if column == missing else column: value for column, value in record.items()}
    hub_copy(name, tmp_path, other, names, ("train", "validation", "validation_matched", "validation_mismatched"))
    with pytest.raises(ValueError, match=rf"train 0: .* needs .*{missing!r}") as caught:
        load(TASKS[name], section(name, data=str(tmp_path)), Path(), None)
    assert f"'{missing}s'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_broken_copy_is_one_sentence(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "cb").mkdir()
    (tmp_path / "cb" / "train-00000-of-00001.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(ValueError, match="cannot get CB from .*put the official files below a directory") as caught:
        load(TASKS["cb"], section("cb", data=str(tmp_path)), Path(), None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["boolq", "squad1", "race"])
def test_without_network_the_hub_is_one_sentence(monkeypatch, name):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    layout = TASKS[name].layout
    assert layout is not None
    with pytest.raises(ValueError, match=f"cannot get .* from {layout.hub} .*write it as finetune.data"):
        load_all(section(name), Path(), None)


def test_a_rider_without_the_task_that_predicts_it():
    with pytest.raises(
        ValueError, match="AX-b has no training set, the model of superglue-rte predicts it; add superg"
    ):
        resolve(["axb"])
