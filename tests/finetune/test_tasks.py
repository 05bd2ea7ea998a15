"""The table of tasks: names, groups, riders, metrics and headlines."""

from __future__ import annotations

import pytest

from frugalbert import config
from frugalbert.finetune import metrics
from frugalbert.finetune.tasks import DEFAULT_METRICS, GLUE, SUPERGLUE, TABLE, resolve, spellings

ALIASES = {
    "sst2": "SST-2 sst SST2 glue/sst2",
    "stsb": "STS-B stsb STS glue/stsb",
    "cola": "CoLA glue/cola",
    "mrpc": "MRPC",
    "qqp": "QQP",
    "mnli": "MNLI mnli-mm MNLI-m glue/mnli",
    "qnli": "QNLI",
    "rte": "RTE glue/rte",
    "wnli": "WNLI",
    "boolq": "BoolQ super_glue/boolq superglue/boolq",
    "cb": "CB",
    "copa": "COPA",
    "multirc": "MultiRC",
    "record": "ReCoRD super_glue/record",
    "superglue-rte": "SuperGLUE-RTE super_glue/rte",
    "wic": "WiC",
    "wsc": "WSC super_glue/wsc",
    "wsc-text": "WSC-text",
    "squad1": "squad SQuAD SQuAD-1.1 squad_v1.1 SQuAD1",
    "squad2": "squad_v2 SQuAD2.0 squad2",
    "race": "RACE race/all",
    "race-middle": "RACE-M race/middle race_middle",
    "race-high": "RACE-H race/high",
    "blimp": "BLiMP",
    "python-docs": "Python_Docs",
}


@pytest.mark.parametrize("name", ALIASES)
def test_aliases_without_case_and_punctuation(name):
    for alias in (name, *ALIASES[name].split()):
        assert [task.name for task in resolve([alias])] == [name]


@pytest.mark.parametrize(
    ("alias", "name"), [("AX", "ax"), ("diagnostic", "ax"), ("AXb", "axb"), ("AX-b", "axb"), ("ax_g", "axg")]
)
def test_aliases_of_riders(alias, name):
    carrier = {"ax": "mnli"}.get(name, "superglue-rte")
    assert [task.name for task in resolve([carrier, alias])] == [carrier, name]
    with pytest.raises(ValueError, match=f"has no training set, the model of {carrier} predicts it; add {carrier} to"):
        resolve([alias])


def test_every_row_is_asked_for_by_its_own_names():
    owners = [(alias, task.name) for task in TABLE for alias in spellings(task) if task.name != "wsc-text"]
    assert len({alias for alias, _ in owners}) == len(owners)
    assert set(ALIASES) | {"ax", "axb", "axg"} == {task.name for task in TABLE}


def test_groups_are_all_of_their_tasks_and_nothing_comes_twice():
    names = {task.name: task.optional for task in resolve(["rte", "glue", "SST-2"])}
    assert sorted(names) == sorted("cola sst2 mrpc stsb qqp mnli qnli rte wnli ax".split())
    assert [name for name, optional in names.items() if not optional] == ["rte", "sst2"]
    names = [task.name for task in resolve(["SuperGLUE"])]
    assert names == "boolq cb copa multirc record superglue-rte wic wsc axb axg".split()
    assert (len(GLUE), len(SUPERGLUE)) == (10, 10)


def test_every_metric_exists_and_is_for_its_type():
    for task in TABLE:
        if task.type != "minimal-pairs":
            metrics.check(task.metrics, task.type, task.title)
        assert set(task.headline) <= set(task.metrics)
    for kind, names in DEFAULT_METRICS.items():
        metrics.check(names, kind, kind)


def test_custom_tasks_of_every_type_have_metrics():
    for kind in DEFAULT_METRICS:
        task = resolve([config.Task(name="mine", type=kind, train="x")])[0]
        assert (task.metrics, task.headline) == (DEFAULT_METRICS[kind], DEFAULT_METRICS[kind][:1])


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
    assert names["cb"] == "(macro_f1 + accuracy) / 2"
    assert names["multirc"] == "(f1a + em) / 2"
    assert names["record"] == "(record_f1 + record_em) / 2"
    assert names["race"] == "accuracy"
