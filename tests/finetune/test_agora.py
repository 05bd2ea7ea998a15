"""Agora's loop with students that take microseconds: how it ends, what it never does, and that a killed one goes on.

The world: points on a line, 1 from 0.5 on; a student is the majority of its k nearest training points.
"""

from __future__ import annotations

import itertools
import json
import operator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frugalbert import config, run
from frugalbert.finetune import agora
from frugalbert.finetune.agora import Sets, Tools, common, survivors
from frugalbert.finetune.tasks import Example

THETAS = [{"k": k, "shift": shift, "same": 1} for k in (1, 3, 5) for shift in (0.0, -0.2)]


def points(values: Any) -> list[Example]:
    return [Example(f"p{value:.4f}", label=int(value >= 0.5)) for value in values]


def place(example: Example) -> float:
    return float(example.text[1:])


SETS = Sets(
    points([0.05, 0.1, 0.15, 0.2, 0.3, 0.9]), points(np.linspace(0.01, 0.99, 60)), points(np.linspace(0.003, 0.97, 7))
)


class Bench:
    """Tools that count their calls; `fail_at`: the number of the training at which a signal arrives."""

    def __init__(self, fail_at: int = -1) -> None:
        self.trained: list[tuple[int, str]] = []
        self.seen: list[list[Example]] = []
        self.taught, self.fail_at = 0, fail_at

    def fit(self, train: list[Example], thetas: list[agora.Theta], number: int) -> list[list[Any]]:
        if len(self.trained) == self.fail_at:
            raise run.Stopped(15)
        self.seen.append(train)
        known = np.array([place(example) for example in train])
        labels = np.array([example.label for example in train])
        found = []
        for theta in thetas:
            self.trained.append((number, json.dumps(theta)))
            near = [np.argsort(abs(known - place(e) - theta["shift"]))[: theta["k"]] for e in SETS.steer]
            found.append([int(labels[rows].mean() > 0.5) for rows in near])
        return found

    def transform(self, mistakes: list[Example], rng: np.random.Generator) -> list[Example]:
        moved = [np.clip(place(example) + rng.normal(0, 0.05), 0, 1) for example in mistakes]
        return [replace(e, text=f"p{x:.4f}") for e, x in zip(mistakes, moved, strict=True)]

    def teach(self, examples: list[Example]) -> list[Any]:
        self.taught += len(examples)
        return [int(place(example) >= 0.48) for example in examples]

    @property
    def tools(self) -> Tools:
        return Tools(self.fit, self.transform, self.teach)


def chosen(**given: Any) -> config.Agora:
    return config.Agora.model_validate({"teacher": "S", "settings": {}, **given})


def play(path: Path, bench: Bench | None = None, tools: Tools | None = None, **given: Any) -> agora.Outcome:
    return agora.play(chosen(**given), SETS, THETAS, tools or (bench or Bench()).tools, path / "rounds.jsonl", 0)


def plain(outcome: agora.Outcome) -> dict[str, Any]:
    """Without the clock."""
    found = outcome.to_json()
    return {**found, "rounds": [{k: v for k, v in entry.items() if k != "seconds"} for entry in found["rounds"]]}


# ---- the loop -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prune", ["lcs", "worst", "halving"])
def test_it_ends_and_learns(tmp_path: Path, prune: str):
    bench = Bench()
    found = play(tmp_path, bench, prune=prune, per_mistake=3)
    assert len(found.rounds) <= len(THETAS)
    assert found.trainings == len(bench.trained) <= len(THETAS) * (len(THETAS) + 1) / 2
    assert found.best["accuracy"] == max(accuracy for entry in found.rounds for accuracy in entry["accuracy"])
    assert found.best["accuracy"] > max(found.rounds[0]["accuracy"]) + 0.05
    assert found.teacher_calls == bench.taught == found.examples > 0
    sizes = [entry["train_examples"] for entry in found.rounds]
    assert sizes[-1] == len(SETS.train) + found.examples == len(bench.seen[-1])
    assert found.stopped in (agora.ALL_GONE, agora.NO_MISTAKES)
    assert bench.seen[-1][: len(SETS.train)] == SETS.train


def test_new_examples_come_from_the_best_ones_mistakes(tmp_path: Path):
    offered: list[list[Example]] = []
    bench = Bench()

    def transform(mistakes: list[Example], rng: np.random.Generator) -> list[Example]:
        offered.append(mistakes)
        return bench.transform(mistakes, rng)

    found = play(tmp_path, tools=replace(bench.tools, transform=transform), per_mistake=2, max_rounds=1)
    first = Bench().fit(SETS.train, THETAS, 1)
    best = max(first, key=lambda row: sum(p == e.label for p, e in zip(row, SETS.steer, strict=True)))
    wrong = sorted(e.text for p, e in zip(best, SETS.steer, strict=True) if p != e.label)
    assert sorted(e.text for e in offered[0]) == sorted(wrong * 2)
    assert found.rounds[0]["mistakes"] == len(wrong)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"max_rounds": 2}, "agora.max_rounds"),
        ({"max_trainings": 9}, "agora.max_trainings"),
        ({"max_examples": 11}, "agora.max_examples"),
        ({"max_teacher_calls": 7}, "agora.max_teacher_calls"),
        ({"max_minutes": 0.5}, "agora.max_minutes"),
        ({"patience": 1, "labels": "random"}, "agora.patience"),
    ],
)
def test_every_limit_stops_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], reason: str):
    clock = itertools.count(0, 20)
    monkeypatch.setattr(agora.time, "monotonic", lambda: float(next(clock)))
    bench = Bench()
    found = play(tmp_path, bench, prune="worst", **given)
    assert found.stopped == reason
    assert len(found.rounds) < len(THETAS)
    assert found.trainings <= given.get("max_trainings", 99)
    assert found.examples <= given.get("max_examples", 999)
    assert bench.taught <= given.get("max_teacher_calls", 999)
    assert len(found.rounds) <= given.get("max_rounds", 99)
    free = play(tmp_path / "free", prune="worst")
    assert len(free.rounds) > len(found.rounds)


def test_a_round_adds_no_more_than_it_may(tmp_path: Path):
    found = play(tmp_path, max_examples_per_round=3, per_mistake=5, replay=1)
    assert [entry.get("added", 0) for entry in found.rounds[:-1]] == [3] * (len(found.rounds) - 1)


def test_limits_that_allow_nothing_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="max_trainings is 5, but a round trains all 6 settings"):
        play(tmp_path, max_trainings=5)


def test_a_perfect_student_ends_it(tmp_path: Path):
    tools = replace(Bench().tools, fit=lambda train, thetas, number: [[e.label for e in SETS.steer]] * len(thetas))
    found = play(tmp_path, tools=tools)
    assert found.stopped == agora.NO_MISTAKES
    assert found.best == {"round": 1, "setting": THETAS[0], "accuracy": 1.0}


def test_labels(tmp_path: Path):
    given = {"max_rounds": 2, "per_mistake": 4}
    by = {}
    for labels in ("teacher", "gold", "random"):
        bench = Bench()
        found = play(tmp_path / labels, bench, labels=labels, **given)
        by[labels] = bench.seen[-1][len(SETS.train) :]
        assert bench.taught == found.teacher_calls == (found.examples if labels == "teacher" else 0)
        assert by[labels]
    assert [e.label for e in by["teacher"]] == Bench().teach(by["teacher"])
    sources = {e.text: e.label for e in SETS.steer}
    assert {e.text for e in by["gold"]} == {e.text for e in by["teacher"]}
    assert [e.label for e in by["gold"]] != [e.label for e in by["random"]]
    assert not {e.text for e in by["gold"]} & set(sources)


def test_every_round_of_every_seed_draws_for_itself(tmp_path: Path):
    drawn: list[tuple[float, ...]] = []
    bench = Bench()

    def transform(mistakes: list[Example], rng: np.random.Generator) -> list[Example]:
        drawn.append(tuple(rng.random(3)))
        return bench.transform(mistakes, rng)

    for seed in (1, 2):
        tools = replace(bench.tools, transform=transform)
        agora.play(chosen(prune="worst", replay=1), SETS, THETAS, tools, tmp_path / str(seed), seed)
    assert len(drawn) > 8
    assert len(set(drawn)) == len(drawn)


def test_replay_draws_again(tmp_path: Path):
    once, twice = (play(tmp_path / str(replay), max_rounds=2, replay=replay) for replay in (None, 2))
    assert [entry["replayed"] for entry in twice.rounds] == [False, True]
    assert once.rounds[0]["added"] == twice.rounds[0]["added"]
    assert once.rounds[1]["made"] < twice.rounds[1]["made"]


def test_regression_is_right_within_a_tolerance():
    right = agora.within(0.5, [Example("a", label=0.0), Example("b", label=4.0)])
    assert right(1.0, 2.0)
    assert not right(0.9, 2.0)


# ---- what must never happen -----------------------------------------------------------------------------------------


def test_texts_of_other_sets_never_enter(tmp_path: Path):
    """Whatever a transformation returns: steering and test texts, their near copies, known texts."""
    text = "a long text about the cat and the dog that run and eat and sleep every day"
    sets = replace(SETS, steer=[*SETS.steer, Example(text, label=1)])
    bad = [*sets.steer, *sets.forbidden, *SETS.train, Example(text + " now"), Example("P0.0100!")]
    bench = Bench()

    def transform(mistakes: list[Example], rng: np.random.Generator) -> list[Example]:
        return [*bad, *bad, Example("p0.7771", label=1), Example("p0.7771", label=1)]

    def fit(train: list[Example], thetas: list[agora.Theta], number: int) -> list[list[Any]]:
        return [[*row, 0] for row in bench.fit(train, thetas, number)]

    tools = Tools(fit, transform, bench.teach)
    found = agora.play(chosen(), sets, THETAS, tools, tmp_path / "rounds", 0)
    assert found.rounds[0]["added"] == found.examples == 1
    assert found.rounds[0]["copies"] == len({example.text for example in bad}) - len(SETS.train)
    assert [example.text for example in bench.seen[-1]] == [*(e.text for e in SETS.train), "p0.7771"]


@pytest.mark.parametrize("part", ["steer", "forbidden"])
def test_sets_that_overlap_are_refused(tmp_path: Path, part: str):
    sets = replace(SETS, train=[*SETS.train, getattr(SETS, part)[3]])
    with pytest.raises(ValueError, match="is also a steering, dev or test text"):
        agora.play(chosen(), sets, THETAS, Bench().tools, tmp_path / "rounds", 0)


@pytest.mark.parametrize(("shift", "refused"), [(0.0, False), (0.45, True)])
def test_a_teacher_that_is_hardly_right(shift: float, refused: bool):
    def teach(examples: list[Example]) -> list[Any]:
        assert all(example.label is None for example in examples)
        return [int(place(example) >= 0.5 + shift) for example in examples]

    if refused:
        with pytest.raises(ValueError, match="agora.teacher is right on 55.0% of 60 steering examples"):
            agora.assess(chosen(), SETS, teach, operator.eq)
        assert agora.assess(chosen(weak_teacher=True), SETS, teach, operator.eq) == pytest.approx(33 / 60)
    else:
        assert agora.assess(chosen(), SETS, teach, operator.eq) == 1.0
    assert agora.assess(chosen(labels="gold", teacher=None), SETS, None, operator.eq) is None
    assert "this is distillation" in agora.about_teacher(0.9, 0.8)
    assert "distillation" not in agora.about_teacher(0.8, 0.8)


# ---- going on -------------------------------------------------------------------------------------------------------


def test_resumed_equals_uninterrupted(tmp_path: Path):
    whole = Bench()
    expected = play(tmp_path / "whole", whole, replay=2, prune="worst")
    starts = [sum(len(e["settings"]) for e in expected.rounds[:number]) for number in range(len(expected.rounds))]
    for start in starts:
        first, second = Bench(fail_at=start), Bench()
        folder = tmp_path / str(start)
        with pytest.raises(run.Stopped):
            play(folder, first, replay=2, prune="worst")
        with open(folder / "rounds.jsonl", "ab") as file:
            file.write(b"12345678 {torn")
        assert plain(play(folder, second, replay=2, prune="worst")) == plain(expected)
        assert [*first.trained, *second.trained] == whole.trained
        assert second.seen[-1] == whole.seen[-1]
    again = Bench()
    assert plain(play(tmp_path / "whole", again, replay=2, prune="worst")) == plain(expected)
    assert again.trained == []


@pytest.mark.parametrize("change", ["settings", "damage"])
def test_rounds_of_something_else_are_not_used(tmp_path: Path, change: str):
    play(tmp_path, max_rounds=3)
    path = tmp_path / "rounds.jsonl"
    if change == "damage":
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join([lines[0], lines[1].replace(b"round", b"ronud"), *lines[2:]]))
    bench = Bench()
    assert len(play(tmp_path, bench, max_rounds=3 if change == "damage" else 2).rounds) == len(bench.seen) > 1


# ---- step 7 ---------------------------------------------------------------------------------------------------------

tokens = st.lists(st.integers(0, 3), max_size=7)


@given(tokens, tokens)
@settings(derandomize=True, deadline=None, max_examples=150)
def test_common_against_all_subsequences(first: list[int], second: list[int]):
    def of(items: list[int]) -> set[tuple[int, ...]]:
        return {part for size in range(len(items) + 1) for part in itertools.combinations(items, size)}

    assert common(first, second) == max(len(part) for part in of(first) & of(second))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.sampled_from(["lcs", "worst", "halving"]))
@settings(derandomize=True, deadline=None)
def test_the_best_stays_and_the_worst_goes(accuracy: list[float], rule: str):
    thetas = [{"a": number % 3, "b": number // 3} for number in range(len(accuracy))]
    left = survivors(rule, thetas, accuracy)
    best = accuracy.index(max(accuracy))
    if len(accuracy) == 1:
        assert left == []
    else:
        assert best in left
        assert len(left) < len(accuracy)
        assert left == sorted(left)
        assert any(accuracy[gone] == min(accuracy) for gone in set(range(len(accuracy))) - set(left))


@pytest.mark.parametrize(
    ("rule", "left"), [("lcs", ["a1 b1", "a1 b2", "a2 b1", "a2 b2"]), ("worst", None), ("halving", None)]
)
def test_by_hand(rule: str, left: list[str] | None):
    """A 3 x 3 grid whose worst corner is a0 b0: what agrees with it in one value goes, unless it is the best."""
    names = [f"a{a} b{b}" for a in range(3) for b in range(3)]
    thetas = [{"a": a, "b": b, "constant": 7} for a in range(3) for b in range(3)]
    accuracy = [0.1, 0.5, 0.6, 0.2, 0.7, 0.8, 0.3, 0.4, 0.65]
    found = [names[number] for number in survivors(rule, thetas, accuracy)]
    if rule == "lcs":
        assert found == left
        accuracy[2] = 0.9
        assert [names[n] for n in survivors(rule, thetas, accuracy)] == ["a0 b2", *(left or [])]
    elif rule == "worst":
        assert found == names[1:]
    else:
        assert found == ["a0 b1", "a0 b2", "a1 b1", "a1 b2", "a2 b2"]


def test_nothing_in_common_drops_the_worst_alone():
    thetas = [{"rate": rate, "constant": 7} for rate in (1, 2, 3, 4)]
    assert survivors("lcs", thetas, [0.4, 0.1, 0.3, 0.2]) == [0, 2, 3]


def test_settings_name_who_labels():
    kinds: list[tuple[dict[str, Any], str]] = [
        ({"settings": {}}, "write agora.teacher"),
        ({"teacher": "S", "settings": {"method": "tpe"}}, "write method: grid or random"),
    ]
    for given_, sentence in kinds:
        with pytest.raises(ValueError, match=sentence):
            config.Agora.model_validate(given_)
