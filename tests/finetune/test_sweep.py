"""Sweeps: what is tried and chosen, on scores made up by arithmetic; a driver that dies asks for the same again."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from frugalbert import config, fanout
from frugalbert.finetune import sweep

BASE = {
    "learning_rate": 1e-4,
    "batch_size": 32,
    "epochs": 3.0,
    "warmup": 0.06,
    "weight_decay": 0.01,
    "layer_decay": 1.0,
}


def quadratic(setting, seed):
    """Best at a rate of 1e-4 and small batches; seeds move it by less than a neighbouring setting does."""
    distance = math.log10(setting["learning_rate"]) + 4
    return 0.9 - 0.1 * distance**2 - setting["batch_size"] / 1000 + 0.001 * seed


class Asked:
    """An `evaluate` that remembers what it was asked for, call by call."""

    def __init__(self, score=quadratic):
        self.score, self.calls = score, []

    def __call__(self, pairs):
        self.calls.append([(json.dumps(setting, sort_keys=True), seed) for setting, seed in pairs])
        return [self.score(setting, seed) for setting, seed in pairs]

    @property
    def pairs(self):
        return [pair for call in self.calls for pair in call]


def sweeping(**settings):
    return config.Sweep(**settings)


def tried(settings, score=quadratic, seeds=(0, 1, 2), num_train=1000):
    asked = Asked(score)
    return sweep.run(sweeping(**settings), BASE, seeds, num_train, asked), asked


# ---- methods --------------------------------------------------------------------------------------------------------


def test_a_grid_is_every_combination_with_every_seed_once():
    found, asked = tried({"learning_rate": (1e-5, 1e-4, 1e-4), "batch_size": (16, 32)})
    assert len(asked.calls) == 1  # all at once: whoever fans out has the most to do
    assert len(set(asked.pairs)) == len(asked.pairs) == found.num_trials == 2 * 2 * 3
    assert found.num_settings == 4
    assert found.setting == BASE | {"learning_rate": 1e-4, "batch_size": 16}
    assert found.score == pytest.approx(0.9 - 0.016 + 0.001)


def test_random_settings_differ_lie_in_their_ranges_and_grow_by_adding():
    several = {"method": "random", "learning_rate": "1e-5..1e-3", "batch_size": (16, 32), "seed": 4}
    few, _ = tried({**several, "trials": 5})
    many, _ = tried({**several, "trials": 40})
    settings = [row["setting"] for row in many.rows]
    assert settings[:5] == [row["setting"] for row in few.rows]
    rates = [setting["learning_rate"] for setting in settings]
    assert len(set(rates)) == 40
    assert all(1e-5 <= rate <= 1e-3 for rate in rates)
    assert 10 < sum(rate < 1e-4 for rate in rates) < 30  # by logarithm: half of them below the middle
    assert {setting["batch_size"] for setting in settings} == {16, 32}


def test_random_search_of_a_small_grid_is_the_grid():
    values = {"learning_rate": (1e-5, 1e-4), "epochs": (2.0, 3.0)}
    grid, _ = tried(values)
    found, _ = tried({**values, "method": "random", "trials": 50})
    assert sorted(json.dumps(row) for row in found.rows) == sorted(json.dumps(row) for row in grid.rows)


def test_tpe_learns_and_is_the_same_again():
    pytest.importorskip("optuna")
    settings = {"method": "tpe", "learning_rate": "1e-6..1e-1", "trials": 32, "at_once": 4}
    found, asked = tried(settings)
    again, _ = tried(settings)
    assert found == again
    assert [len(call) for call in asked.calls] == [4 * 3] * 8
    first, last = ([row["mean"] for row in found.rows[part]] for part in (slice(0, 10), slice(-10, None)))
    assert np.mean(last) > np.mean(first) + 0.05
    other, _ = tried({**settings, "seed": 1})
    assert other.rows != found.rows
    one_by_one, _ = tried({**settings, "at_once": 1})
    assert one_by_one.rows != found.rows


def test_tpe_flees_what_diverges():
    pytest.importorskip("optuna")

    def score(setting, seed):
        return None if setting["learning_rate"] > 1e-3 else quadratic(setting, seed) - 2  # 0 would be good

    found, _ = tried({"method": "tpe", "learning_rate": "1e-6..1e-1", "trials": 40}, score)
    assert found.num_failed < 0.3 * found.num_trials  # 0.4 of the range diverges
    assert sum(None in row["values"] for row in found.rows[-12:]) <= 2


def test_tpe_without_optuna_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ValueError, match=r"pip install 'frugalbert\[sweeps\]'"):
        tried({"method": "tpe", "learning_rate": "1e-5..1e-3"})


def train(task):
    with open(task["log"], "a") as log:
        log.write(json.dumps([task["setting"], task["seed"]]) + "\n")
    return quadratic(task["setting"], task["seed"])


@pytest.mark.fault("R16")
@pytest.mark.parametrize("method", ["grid", "random", "tpe"])
@pytest.mark.parametrize("stop_after", [0, 3, 7])
def test_a_driver_that_dies_continues_and_ends_the_same(method, stop_after, tmp_path: Path):
    """Everything comes from the journal: no trial is done twice or is missing, and the outcome is the same."""
    if method == "tpe":
        pytest.importorskip("optuna")
    values = {"learning_rate": (1e-5, 1e-4, 1e-3)} if method == "grid" else {"learning_rate": "1e-5..1e-3"}
    section = sweeping(**values, batch_size=(16, 32), method=method, trials=6, at_once=2, keep=0.5)
    done: list[int] = []

    def evaluate(pairs, limit=10**9):
        found = []
        for setting, seed in pairs:
            if len(done) == limit:
                raise KeyboardInterrupt
            work = [{"setting": setting, "seed": seed, "log": str(tmp_path / "log")}]
            found += fanout.run_tasks(train, work, journal=tmp_path / "journal", workers=1)
            done.append(seed)
        return found

    with pytest.raises(KeyboardInterrupt):
        sweep.run(section, BASE, (0, 1), 1000, lambda pairs: evaluate(pairs, stop_after))
    found = sweep.run(section, BASE, (0, 1), 1000, evaluate)
    assert found == sweep.run(section, BASE, (0, 1), 1000, Asked())
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == len(set(lines)) == found.num_trials


@contextlib.contextmanager
def four_dask_workers():
    distributed = pytest.importorskip("distributed", reason="the extra `cluster` is not installed")
    settings = {"processes": True, "n_workers": 4, "threads_per_worker": 1, "dashboard_address": None}
    with distributed.LocalCluster(host="127.0.0.1", **settings) as found:
        yield found.scheduler_address


@pytest.mark.fault("R16")
@pytest.mark.parametrize("place", [contextlib.nullcontext, four_dask_workers], ids=["pool", "dask"])
def test_four_workers_try_two_hundred_settings_once_each(place, tmp_path: Path, case):
    section = sweeping(method="random", learning_rate="1e-6..1e-2", trials=200)

    def evaluate(pairs):
        work = [{"setting": setting, "seed": seed, "log": str(tmp_path / "log")} for setting, seed in pairs]
        return fanout.run_tasks(train, work, journal=tmp_path / "journal", workers=4, scheduler=scheduler)

    with place() as scheduler:
        found = sweep.run(section, BASE, (0,), 1000, evaluate)
    assert found == sweep.run(section, BASE, (0,), 1000, Asked())
    lines = (tmp_path / "log").read_text().splitlines()
    for row in found.rows:
        with case():
            assert sum(json.loads(line)[0] == row["setting"] for line in lines) == 1
    assert len(lines) == len(found.rows) == 200


# ---- choice ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.one_of(st.none(), st.floats(-1, 1)), min_size=3, max_size=3), min_size=1, max_size=6))
def test_the_best_mean_wins_and_ties_go_to_the_earlier(scores):
    rates = [1e-5 * (number + 1) for number in range(len(scores))]

    def score(setting, seed):
        return scores[rates.index(setting["learning_rate"])][seed]

    defined = [float(np.mean(row)) if None not in row else -math.inf for row in scores]
    if max(defined) == -math.inf:
        with pytest.raises(ValueError, match="none of the [0-9]+ settings of the sweep has a score with every seed"):
            tried({"learning_rate": tuple(rates)}, score)
        return
    found, _ = tried({"learning_rate": tuple(rates)}, score)
    assert found.best == int(np.argmax(defined))
    assert found.num_failed == sum(value is None for row in scores for value in row)
    for row, values in zip(found.rows, scores, strict=True):
        assert row["values"] == values
        if None in values:
            assert row["mean"] is row["std"] is row["min"] is None
        else:
            assert (row["mean"], row["median"]) == pytest.approx((np.mean(values), np.median(values)))
            assert row["std"] == pytest.approx(np.std(values, ddof=1), abs=1e-6)
            assert (row["min"], row["max"]) == (min(values), max(values))
    json.dumps(found.as_json(), allow_nan=False)


def test_not_a_number_loses_like_none():
    found, _ = tried(
        {"learning_rate": (1e-4, 1e-3)}, lambda setting, seed: math.nan if setting["learning_rate"] == 1e-4 else 0.1
    )
    assert (found.best, found.num_failed) == (1, 3)


def test_keep_gives_further_seeds_to_the_best_alone():
    rates = tuple(1e-6 * 2**power for power in range(8))
    found, asked = tried({"learning_rate": rates, "keep": 0.5}, seeds=(0, 1, 2))
    assert [len(call) for call in asked.calls] == [8, 4, 2]
    assert [len(row["seeds"]) for row in found.rows] == [1, 1, 1, 1, 2, 2, 3, 3]
    everything, _ = tried({"learning_rate": rates})
    assert found.setting == everything.setting
    assert found.num_trials == 14


def test_keep_prefers_more_seeds_to_one_lucky_one():
    def score(setting, seed):
        lucky = setting["learning_rate"] == 1e-5
        return {0: 0.9, 1: None}[seed] if lucky else {0: 0.8, 1: 0.7}[seed]

    found, _ = tried({"learning_rate": (1e-5, 2e-5, 3e-5, 4e-5), "keep": 0.5}, score, (0, 1))
    assert found.setting["learning_rate"] == 2e-5  # whose mean is 0.75 over two seeds; 1e-5 diverged with the second


# ---- presets --------------------------------------------------------------------------------------------------------


def test_extremebert_has_its_156_runs():
    sizes = {"mnli": 392702, "qqp": 363846, "qnli": 104743, "sst2": 67349, "cola": 8551, "stsb": 5749, "mrpc": 3668,
             "rte": 2490, "wnli": 635}  # fmt: skip
    section = sweeping(preset="extremebert")
    counts = [math.prod(len(values) for values in sweep.axes(section, size).values()) for size in sizes.values()]
    assert sum(counts) == 156
    assert sweep.seeds_for(section, (7,)) == (7,)


def test_bort_has_its_480_and_24hbert_reports_the_median_of_five():
    bort = sweeping(preset="bort")
    assert math.prod(map(len, sweep.axes(bort, 1000).values())) * len(sweep.seeds_for(bort, (0,))) == 480
    found, asked = tried({"preset": "24hbert"}, lambda setting, seed: [0.1, 0.2, 0.3, 0.4, 9.0][seed],
                         sweep.seeds_for(sweeping(preset="24hbert"), (0, 1, 2)))  # fmt: skip
    assert (found.num_settings, len(asked.pairs)) == (24, 120)
    assert (found.statistic, found.score) == ("median", 0.3)
    assert {row["setting"]["weight_decay"] for row in found.rows} == {0.1}


def test_what_is_written_beside_a_preset_takes_its_place():
    section = sweeping(preset="24hbert", batch_size=(64,), layer_decay=(0.8, 1.0))
    found = sweep.axes(section, 500_000)
    assert found["batch_size"] == (64,)
    assert found["layer_decay"] == (0.8, 1.0)
    assert found["epochs"] == (3, 5)


# ---- mistakes, words ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings, sentence", [
    ({}, "has nothing to try; write values such as"),
    ({"learning_rate": "1e-5..1e-3"}, "a grid needs values, not 1e-5..1e-3; write a list, or method: random"),
    ({"method": "random", "warmup": "0..0.5"}, "warmup: 0..0.5 is no range of positive numbers"),
    ({"method": "random", "learning_rate": "1e-3..1e-5"}, "is no range of positive numbers"),
    ({"learning_rate": (0.0,)}, r"learning_rate: \[0.0\] has a value out of bounds; write more than 0$"),
    ({"warmup": (0.1, 1.5)}, "write 0 or more, at most 1"),
    ({"method": "random", "layer_decay": "0.5..2"}, "write more than 0, at most 1"),
])  # fmt: skip
def test_mistakes_are_one_sentence(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        tried(settings)


def test_the_expected_maximum_of_normal_draws():
    assert sweep.expected_maximum(1) == pytest.approx(0.0, abs=1e-6)
    assert sweep.expected_maximum(2) == pytest.approx(1 / math.sqrt(math.pi), abs=1e-6)
    assert sweep.expected_maximum(3) == pytest.approx(1.5 / math.sqrt(math.pi), abs=1e-6)
    draws = np.random.default_rng(0).standard_normal((20_000, 50)).max(axis=1).mean()
    assert sweep.expected_maximum(50) == pytest.approx(draws, abs=0.02)


def test_equal_settings_look_as_much_better_as_is_said():
    """Scores of pure chance: the best mean exceeds the average one by `by_chance`, on average over many sweeps."""
    rates, excess, said = tuple(1e-5 * (1 + number) for number in range(12)), [], []
    generator = np.random.default_rng(1)
    for _ in range(150):
        found, _ = tried({"learning_rate": rates}, lambda setting, seed: float(generator.normal()))
        means = [row["mean"] for row in found.rows]
        excess.append(max(means) - np.mean(means))
        said.append(found.by_chance)
    assert np.mean(said) == pytest.approx(np.mean(excess), rel=0.08)


def test_the_table_is_ranked_and_says_how_many_were_tried(capsys):
    found, _ = tried(
        {"learning_rate": (1e-3, 1e-4, 1.0)}, lambda s, seed: None if s["learning_rate"] == 1 else quadratic(s, seed)
    )
    rows = sweep.table(found)
    assert [row["learning_rate"] for row in rows] == [1e-4, 1e-3, 1.0]
    assert "batch_size" not in rows[0]  # not varied
    assert rows[2]["mean"] is None
    sweep.show(found, "[bold]RTE", 277)
    text = capsys.readouterr().err
    assert "[bold]RTE" in text
    assert "3 settings, 9 trials (3 diverged or undefined), chosen by the mean over seeds on 277 examples" in text
    assert "one accuracy on 277 examples has a standard error of up to 0.030" in text


# ---- kills ----------------------------------------------------------------------------------------------------------

DRIVER = """
import json, sys
from pathlib import Path
from frugalbert import config, fanout
from frugalbert.finetune import sweep
from tests.finetune.test_sweep import BASE, mortal

def main():
    folder = Path(sys.argv[1])
    def evaluate(pairs):
        tasks = [{"setting": setting, "seed": seed, "folder": str(folder)} for setting, seed in pairs]
        return fanout.run_tasks(mortal, tasks, journal=folder / "journal", workers=2)
    section = config.Sweep(method="random", learning_rate="1e-5..1e-3", trials=5)
    found = sweep.run(section, BASE, (0, 1), 1000, evaluate)
    (folder / "outcome.json").write_text(json.dumps(found.as_json()))

if __name__ == "__main__":
    main()
"""


def mortal(task):
    """A trial whose process kills itself once, at the first trial with seed 1, and waits once while a mark is there."""
    folder = Path(task["folder"])
    if task["seed"] == 1 and not (folder / "killed").exists():
        (folder / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    while (folder / "wait").exists() and (folder / "journal").read_bytes().count(b"\n") >= 4:
        time.sleep(0.02)
    return quadratic(task["setting"], task["seed"])


@pytest.mark.fault("R21")
def test_a_killed_worker_and_a_killed_driver_lose_and_repeat_nothing(tmp_path: Path, root: Path):
    (tmp_path / "driver.py").write_text(DRIVER)
    command = [sys.executable, str(tmp_path / "driver.py"), str(tmp_path)]
    places = {"cwd": root, "env": {**os.environ, "PYTHONPATH": str(root)}}
    (tmp_path / "wait").touch()
    driver = subprocess.Popen(command, **places)
    while not (tmp_path / "journal").exists() or (tmp_path / "journal").read_bytes().count(b"\n") < 4:
        assert driver.poll() is None
        time.sleep(0.02)
    driver.kill()
    driver.wait()
    (tmp_path / "wait").unlink()
    assert (tmp_path / "killed").exists()
    assert not (tmp_path / "outcome.json").exists()
    subprocess.run(command, **places, check=True)
    section = sweeping(method="random", learning_rate="1e-5..1e-3", trials=5)
    expected = sweep.run(section, BASE, (0, 1), 1000, Asked())
    assert json.loads((tmp_path / "outcome.json").read_text()) == json.loads(json.dumps(expected.as_json()))
    with fanout.Journal(tmp_path / "journal") as journal:
        keys = [entry["key"] for entry in journal.entries]
    assert len(keys) == len(set(keys)) == expected.num_trials == 10
