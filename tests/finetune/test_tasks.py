"""The table of tasks and the examples of each: real GLUE files, the hub's form of them, and custom files."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from frugalbert import config
from frugalbert.finetune.examples import limit, load
from frugalbert.finetune.tasks import TABLE, Data, Example, resolve

COUNTS = {
    "cola": (8551, 1043),
    "sst2": (67349, 872),
    "mrpc": (3668, 408),
    "stsb": (5749, 1500),
    "rte": (2490, 277),
    "wnli": (635, 71),
}


def section(tasks: list, **settings: object) -> config.Finetune:
    return config.Finetune(tasks=tasks, model="unused", **settings)


def custom(folder: Path, train: str, dev: str | None = None, suffix: str = ".csv", **settings: object) -> Data:
    """Write the files, load the task."""
    (folder / f"train{suffix}").write_text(train)
    if dev is not None:
        (folder / f"dev{suffix}").write_text(dev)
        settings["dev"] = f"dev{suffix}"
    mine = config.Task(name="mine", train=f"train{suffix}", **settings)
    return load(resolve([mine])[0], section([mine]), folder, None)


# ---- the table ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "task"),
    [("SST-2", "sst2"), ("sst", "sst2"), ("STS-B", "stsb"), ("stsb", "stsb"), ("CoLA", "cola"), ("QNLI", "qnli"),
     ("Python_Docs", "python-docs"), ("MRPC", "mrpc")],
)  # fmt: skip
def test_aliases(name, task):
    assert [found.name for found in resolve([name])] == [task]


def test_glue_is_all_of_its_tasks_and_nothing_comes_twice():
    names = [task.name for task in resolve(["rte", "glue", "SST-2"])]
    assert sorted(names) == sorted("cola sst2 mrpc stsb qqp mnli qnli rte wnli ax".split())


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (["sts-2"], "there is no task 'sts-2'; did you mean"),
        ([config.Task(name="RTE", train="x.csv")], "two tasks are called 'RTE'"),
        ([config.Task(name="a", train="x.csv"), config.Task(name="a", train="y.csv")], "two tasks are called 'a'"),
        ([config.Task(name="a", train="x.csv", metrics=("f2",))], "tasks.a.metrics: the metric 'f2' does not exist"),
    ],
)
def test_wrong_tasks_get_one_sentence(tasks, message):
    with pytest.raises(ValueError, match=message):
        resolve(tasks)


def test_headline_is_the_mean_of_the_leaderboard_metrics():
    names = {task.name: task.metric for task in TABLE}
    assert names["mrpc"] == "(f1 + accuracy) / 2"
    assert names["stsb"] == "(pearson + spearman) / 2"
    assert names["cola"] == "mcc"


# ---- GLUE -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COUNTS)
def test_no_row_of_real_glue_is_lost(shared_data, name):
    task = resolve([name])[0]
    data = load(task, section([name], data=str(shared_data / "glue")), Path(), None)
    assert (len(data.train), len(data.dev)) == COUNTS[name]
    assert all(row.text and row.text_b != "" for row in data.train + data.dev)
    assert (data.train[0].text_b is None) == (name in ("cola", "sst2"))
    if task.limits:
        assert {type(row.label) for row in data.dev} == {float}
        assert (min(row.label for row in data.dev), max(row.label for row in data.dev)) == (0.0, 5.0)
    else:
        assert {row.label for row in data.dev} == {0, 1}


def test_class_order_is_hugging_faces(shared_data):
    """RTE's file says `not_entailment` first; entailment is class 0 all the same. WNLI's 1 is entailment."""
    data = load(resolve(["rte"])[0], section(["rte"], data=str(shared_data / "glue")), Path(), None)
    assert data.labels == ("entailment", "not_entailment")
    assert data.train[0].label == 1
    data = load(resolve(["wnli"])[0], section(["wnli"], data=str(shared_data / "glue")), Path(), None)
    assert data.labels == ("not_entailment", "entailment")
    assert data.train[0].label == 1


def test_a_task_without_its_training_file_is_refused(shared_data):
    with pytest.raises(FileNotFoundError, match=r"QNLI has no train.tsv \(only dev.tsv, test.tsv\)"):
        load(resolve(["qnli"])[0], section(["qnli"], data=str(shared_data / "glue")), Path(), None)


def test_glue_folders_in_any_spelling_and_their_absence(tmp_path):
    (tmp_path / "sst2").mkdir()
    for split in ("train", "dev"):
        (tmp_path / "sst2" / f"{split}.tsv").write_text('sentence\tlabel\n" half a quote\t1\nplain\t0\n')
    data = load(resolve(["sst2"])[0], section(["sst2"], data=str(tmp_path)), Path(), None)
    assert [row.text for row in data.train] == ['" half a quote', "plain"]
    with pytest.raises(FileNotFoundError, match="has no folder RTE"):
        load(resolve(["rte"])[0], section(["rte"], data=str(tmp_path)), Path(), None)
    with pytest.raises(FileNotFoundError, match=r"finetune.data: .*absent is no directory"):
        load(resolve(["rte"])[0], section(["rte"], data=str(tmp_path / "absent")), Path(), None)


def test_a_label_of_another_task_is_named(tmp_path):
    (tmp_path / "RTE").mkdir()
    for split in ("train", "dev"):
        (tmp_path / "RTE" / f"{split}.tsv").write_text("index\tsentence1\tsentence2\tlabel\n0\ta\tb\tneutral\n")
    with pytest.raises(
        ValueError, match="train.tsv line 2: 'neutral' is no label of RTE; its labels are entailment, not_"
    ):
        load(resolve(["rte"])[0], section(["rte"], data=str(tmp_path)), Path(), None)


def test_the_hubs_form_maps_labels_by_name(tmp_path, monkeypatch):
    """A directory shaped like the hub's dataset: one configuration per task, Parquet files, ClassLabel features."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    names = ["not_entailment", "entailment"]  # not the order of our table
    features = datasets.Features(
        {
            **dict.fromkeys(("sentence1", "sentence2"), datasets.Value("string")),
            "label": datasets.ClassLabel(names=names),
        }
    )
    rows = {"sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": ["entailment", "not_entailment"]}
    hub = tmp_path / "hub"
    (hub / "rte").mkdir(parents=True)
    for split in ("train", "validation"):
        part = datasets.Dataset.from_dict(rows, features=features)
        part.to_parquet(hub / "rte" / f"{split}-00000-of-00001.parquet")
    lines = [f"  - split: {split}\n    path: rte/{split}-*\n" for split in ("train", "validation")]
    (hub / "README.md").write_text(f"---\nconfigs:\n- config_name: rte\n  data_files:\n{''.join(lines)}---\n")
    data = load(resolve(["rte"])[0], section(["rte"], data=str(hub)), Path(), None)
    assert data.labels == ("entailment", "not_entailment")
    assert data.train == data.dev == [Example("a", "c", 0, "0"), Example("b", "d", 1, "1")]
    with pytest.raises(FileNotFoundError, match="no folder CoLA with .*put the official files"):
        load(resolve(["cola"])[0], section(["cola"], data=str(hub)), Path(), None)


def test_without_network_the_hub_is_one_sentence(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="cannot get CoLA from nyu-mll/glue .*write it as finetune.data") as caught:
        load(resolve(["cola"])[0], section(["cola"]), Path(), None)
    assert "\n" not in str(caught.value)


# ---- custom files ---------------------------------------------------------------------------------------------------


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


# ---- fewer examples -------------------------------------------------------------------------------------------------


def test_a_subset_is_stable_and_keeps_every_class():
    pool = [Example(f"text {number}", None, int(number == 7)) for number in range(100)]
    chosen = limit(pool, 10)
    assert Counter(example.label for example in chosen) == {0: 9, 1: 1}
    assert set(chosen) == set(limit(pool[::-1], 10))
    assert set(limit(pool, 5)) <= set(chosen)
    assert limit(pool, None) is limit(pool, 100) is pool
