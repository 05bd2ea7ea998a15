"""What is common to all sources: fewer examples, and tasks' own limits."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from frugalbert import config
from frugalbert.finetune.examples import limit, load_all
from frugalbert.finetune.tasks import Example
from tests.finetune.golden import files


def test_a_subset_is_stable_and_keeps_every_class():
    pool = [Example(f"text {number}", None, int(number == 7)) for number in range(100)]
    chosen = limit(pool, 10)
    assert Counter(example.label for example in chosen) == {0: 9, 1: 1}
    assert set(chosen) == set(limit(pool[::-1], 10))
    assert set(limit(pool, 5)) <= set(chosen)
    assert limit(pool, None) is limit(pool, 100) is pool


def test_a_task_has_a_limit_of_its_own(tmp_path):
    files.write(tmp_path)
    own = {"rte": config.TaskSettings(max_train_examples=2)}
    section = config.Finetune(
        tasks=["cola", "rte"], model="unused", data=str(tmp_path), max_train_examples=1, per_task=own
    )
    assert [len(data.train) for data in load_all(section, Path(), None)] == [1, 2]


def test_minimal_pairs_are_not_loaded(tmp_path):
    files.write(tmp_path)
    section = config.Finetune(tasks=["blimp", "cola"], model="unused", data=str(tmp_path))
    assert [data.task.name for data in load_all(section, Path(), None)] == ["cola"]
    assert load_all(config.Finetune(tasks=["blimp"], model="unused"), Path(), None) == []
