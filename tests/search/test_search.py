"""Every method stays within the limits, never repeats itself, and continues from any line of its journal."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from frugalbert import config
from frugalbert.budget import Clock
from frugalbert.fanout import Journal
from frugalbert.model.arch import Arch
from frugalbert.run import read_json
from frugalbert.search import candidates
from frugalbert.search.candidates import front
from frugalbert.search.evolution import METHODS, Settings, proportioned
from frugalbert.search.run import search, summary, write_result
from frugalbert.space import Space
from tests.search.toy import LIMIT, SPACE, cost, loss, run, score

WINDOW = config.Limit.model_validate({"latency_ms": [2.0, 3.0], "parameters": 3e5, "speedup": [2.0, 100.0]})
SMALL = Settings(evaluations=60, population=12)
METHOD = pytest.mark.parametrize("method", METHODS)


@METHOD
def test_within_the_limits_and_never_twice(method):
    result = run(replace(SMALL, method=method, evaluations=100), limit=WINDOW)
    archs = [candidate.arch for candidate in result.candidates]
    assert len(archs) == len(set(archs)) == 100
    assert result.stopped == "evaluations"
    for candidate in result.candidates:
        assert SPACE.contains(candidate.arch)
        assert candidate.score == loss(candidate.arch)
        assert candidate.costs == cost(candidate.arch) | {"speedup": candidate.costs["speedup"]}
        assert 2.0 <= candidate.costs["latency_ms"] <= 3.0
        assert candidate.costs["parameters"] <= 3e5
    assert result.best.score == min(score(archs))


@METHOD
def test_the_seed_decides(method):
    settings = replace(SMALL, method=method)
    assert run(settings, seed=1) == run(settings, seed=1)
    assert run(settings, seed=1).candidates != run(settings, seed=2).candidates


@pytest.mark.fault("R16")
@METHOD
@pytest.mark.parametrize("mixed", [False, True])
def test_continued_from_any_line_equals_uninterrupted(method, mixed, tmp_path, monkeypatch):
    monkeypatch.setattr(candidates, "TRIES", 100)  # a mixed space hardly ever obeys the rule of fast
    space = replace(SPACE, mixed=mixed)
    settings = Settings(method, evaluations=20, population=6, journal=tmp_path / "whole.jsonl")
    whole = run(settings, space=space)
    lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 21
    for count in range(0, len(lines) + 1, 4 if mixed else 1):
        torn = lines[count][:20] if count < len(lines) else b""
        (tmp_path / "part.jsonl").write_bytes(b"".join(lines[:count]) + torn)
        scored: list[Arch] = []

        def watched(archs, scored=scored):
            scored.extend(archs)
            return score(archs)

        assert run(replace(settings, journal=tmp_path / "part.jsonl"), space=space, of=watched) == whole
        assert len(scored) == 20 - max(0, count - 1)


@pytest.mark.fault("R16")
def test_a_damaged_line_is_scored_again(tmp_path, capsys):
    settings = replace(SMALL, journal=tmp_path / "journal.jsonl")
    whole = run(settings)
    lines = (tmp_path / "journal.jsonl").read_bytes().splitlines(keepends=True)
    lines[7] = lines[7].replace(b"bert", b"brt")
    (tmp_path / "journal.jsonl").write_bytes(b"".join(lines))
    assert run(settings) == whole
    (tmp_path / "journal.jsonl").write_bytes(b"x" + b"".join(lines))
    with pytest.raises(ValueError, match="its first line is damaged.*delete it to begin anew"):
        run(settings)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"space": replace(SPACE, hidden=(32, 48))}, "other costs, space"),
        ({"limit": config.Limit(latency_ms=(3.5,))}, "other limit"),
        ({"seed": 1}, "other seed"),
        ({"settings": {"evaluations": 61}}, "other settings"),
        ({"settings": {"method": "pareto"}}, "other settings"),
    ],
)
def test_the_journal_of_another_search_is_refused(change, what, tmp_path):
    settings = replace(SMALL, journal=tmp_path / "journal.jsonl")
    run(settings)
    before = (tmp_path / "journal.jsonl").read_bytes()
    with pytest.raises(ValueError, match=rf"journal.jsonl belongs to another search \({what}\); delete it"):
        run(replace(settings, **change.pop("settings", {})), **change)
    assert (tmp_path / "journal.jsonl").read_bytes() == before


def test_time_ends_a_search_for_good(tmp_path):
    """A second look at a search that ran out of time finds the same, however much time it would have."""
    seconds = [0.0]

    def slow(archs):
        seconds[0] += 10.0 * len(archs)
        return score(archs)

    def one(limit_seconds: float):
        settings = replace(SMALL, seconds=limit_seconds, journal=tmp_path / "journal.jsonl")
        clock = Clock(lambda: seconds[0])
        result = search(SPACE, slow, cost, LIMIT, np.random.default_rng(0), clock, settings)
        return result, clock

    first, _ = one(200.0)
    assert first.stopped == "budget"
    assert len(first.candidates) == 12 + 9  # a generation that has begun is finished
    again, clock = one(200.0)
    assert again == first
    assert clock.seconds() == 210.0
    with Journal(tmp_path / "journal.jsonl") as journal:
        entries = journal.entries
    (tmp_path / "journal.jsonl").unlink()
    with Journal(tmp_path / "journal.jsonl") as journal:  # the last score came just before the time was over
        for entry in entries:
            journal.append(entry | ({"seconds": 0.0} if "seconds" in entry else {}))
    assert one(200.0)[0] == first


def test_time_used_before_a_kill_counts(tmp_path):
    seconds = [0.0]
    calls = [0]

    def dying(archs):
        calls[0] += 1
        if calls[0] == 2:
            raise KeyboardInterrupt
        seconds[0] += 150.0
        return score(archs)

    settings = replace(SMALL, seconds=400.0, journal=tmp_path / "journal.jsonl")
    with pytest.raises(KeyboardInterrupt):
        search(SPACE, dying, cost, LIMIT, np.random.default_rng(0), Clock(lambda: seconds[0]), settings)
    result = search(SPACE, dying, cost, LIMIT, np.random.default_rng(0), Clock(lambda: seconds[0]), settings)
    assert result.stopped == "budget"
    assert calls[0] == 4
    assert len(result.candidates) == 12 + 9 + 9


def test_a_space_that_runs_out():
    few = Space((1, 2), (32, 48), (2,), (8,), (32, 64, 96))
    for method in METHODS:
        result = run(replace(SMALL, method=method), space=few, limit=config.Limit(latency_ms=(100.0,)))
        assert len({candidate.arch for candidate in result.candidates}) == few.size() == 12
        assert result.stopped == "exhausted"
    alone = Space((1,), (32,), (2,), (8,), (32,))
    for method in METHODS:
        assert len(run(replace(SMALL, method=method), space=alone).candidates) == 1


@METHOD
def test_an_impossible_limit_scores_nothing(method, tmp_path):
    def never(archs):
        raise AssertionError

    with pytest.raises(ValueError, match=r"nearest is bert 1x32 .* with latency_ms 0\.\d+ \(limit at most 0.1\)"):
        run(replace(SMALL, method=method), limit=config.Limit(latency_ms=(0.1,)), of=never)


# ---- the methods -----------------------------------------------------------------------------------------------------


def test_fast_keeps_its_rule_as_long_as_it_can(capsys):
    space = Space((1, 2, 3), (32, 48, 64), (2, 3, 4), (8, 16), (32, 56, 64, 80, 112))
    obeying = {arch for arch in space.enumerate() if proportioned(arch)}
    result = run(replace(SMALL, method="fast"), space=space, limit=config.Limit(latency_ms=(100.0,)))
    fast = [candidate.arch for candidate in result.candidates if candidate.origin == "fast"]
    assert set(fast) == obeying
    assert [c.origin for c in result.candidates] == ["fast"] * len(fast) + ["random"] * (60 - len(fast))
    assert f"{len(obeying)} architectures within the limit follow the rule of method fast" in capsys.readouterr().err
    run(replace(SMALL, method="fast", evaluations=10))
    assert "follow the rule" not in capsys.readouterr().err


def test_the_rule_of_fast_knows_the_published_ones():
    names = ("s1", "s2", "s3", "s4", "kd-s1", "kd-s2", "kd-s3", "kd-s4")
    against = [name for name in names if not proportioned(Arch.parse(f"autotinybert-{name}"))]
    assert against == ["s2", "s3"]


def test_children_come_from_the_best():
    result = run(replace(SMALL, population=16, evaluations=100))
    for candidate in result.candidates:
        before = [c for c in result.candidates if c.generation < candidate.generation]
        elites = {str(c.arch) for c in sorted(before, key=lambda c: c.score)[:4]}
        assert set(candidate.parents) <= elites
        parents = [Arch.parse(parent) for parent in candidate.parents]
        if candidate.origin == "mutation":
            assert len(parents) == 1
            assert abs(len(candidate.arch.layers) - len(parents[0].layers)) <= 1
        elif candidate.origin == "crossover":
            assert len(candidate.arch.layers) in {len(parent.layers) for parent in parents}
            assert candidate.arch.hidden in {parent.hidden for parent in parents}
        else:
            assert candidate.origin == "random"
    origins = summary(result)["origins"]
    assert origins["mutation"] > 20
    assert origins["crossover"] > 10


@pytest.mark.parametrize(("crossover", "origin"), [(0.0, "crossover"), (1.0, "mutation")])
def test_share_of_crossover(crossover, origin):
    assert origin not in summary(run(replace(SMALL, crossover=crossover)))["origins"]


def test_evolution_beats_random_on_a_smooth_score():
    settings = Settings(evaluations=100, population=16)
    gains = [
        run(replace(settings, method="random"), seed).best.score - run(settings, seed).best.score for seed in range(10)
    ]
    assert sum(gain > 0 for gain in gains) >= 9


def test_pareto_spreads_along_the_front():
    settings = Settings(method="pareto", evaluations=150, population=24)
    most = 0.9 * cost(SPACE.largest())["latency_ms"]
    limit = config.Limit(latency_ms=(most,))
    result = run(settings, limit=limit)
    designed = [candidate.arch for candidate in result.candidates if candidate.origin == "design"]
    assert designed == [SPACE.smallest(), Arch.parse("bert 4x80 heads=4 head_dim=24 ffn=196")]  # the largest costs more

    def covered(found) -> float:
        """Area beaten by the front, up to the corner (score 5, the limit)."""
        area, right = 0.0, most
        for c in reversed(front(found.candidates)):
            area += (right - c.costs["latency_ms"]) * (5.0 - c.score)
            right = c.costs["latency_ms"]
        return area

    areas = [
        covered(run(settings, seed, limit)) - covered(run(replace(settings, method="random"), seed, limit))
        for seed in range(5)
    ]
    assert min(areas) > 0


def test_failed_candidates_are_kept_apart(tmp_path):
    def fragile(archs):
        return [math.nan if len(arch.layers) > 2 else loss(arch) for arch in archs]

    settings = replace(SMALL, journal=tmp_path / "journal.jsonl")
    result = run(settings, of=fragile)
    assert len(result.best.arch.layers) <= 2
    assert run(settings, of=fragile) == result
    written = write_result(tmp_path, result)
    assert written["failed"] == sum(len(c.arch.layers) > 2 for c in result.candidates) > 0
    with pytest.raises(ValueError, match="none of 60 architectures has a finite score"):
        write_result(tmp_path, run(SMALL, of=lambda archs: [math.inf] * len(archs)))


# ---- what is written -------------------------------------------------------------------------------------------------


def test_result_files(tmp_path):
    result = run(SMALL)
    figures = write_result(tmp_path, result)
    lines = [json.loads(line) for line in (tmp_path / "candidates.jsonl").read_text().splitlines()]
    assert [Arch.parse(line["arch"]) for line in lines] == [c.arch for c in result.candidates]
    assert [line["score"] for line in lines] == [c.score for c in result.candidates]
    assert {"latency_ms", "parameters", "flops", "speedup", "generation", "origin", "parents"} <= set(lines[0])
    assert Arch.load("arch.json", tmp_path) == result.best.arch
    assert read_json(tmp_path / "pareto.json") == [c.to_json() for c in front(result.candidates)]
    assert figures == json.loads(json.dumps(figures, allow_nan=False))
    assert figures["best"]["score"] == figures["progress"][-1] == min(line["score"] for line in lines)
    assert figures["progress"] == sorted(figures["progress"], reverse=True)
    assert figures["evaluations"] == len(figures["progress"]) == 60
    assert figures["pareto"] == len(read_json(tmp_path / "pareto.json"))
    rng = np.random.default_rng(9)
    share = np.mean([cost(SPACE.sample(rng))["latency_ms"] <= 3.0 for _ in range(3000)])
    assert figures["feasible_share"] == pytest.approx(share, abs=0.2)


def test_settings_of_a_section():
    section = config.Search.model_validate({"limit": {"latency_ms": 8}, "budget": "1h", "population": 8})
    assert Settings.of(section) == Settings("evolution", 200, 8, 0.4, 3600.0, None)
