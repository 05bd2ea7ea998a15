"""`pretrain.arch: auto`: the best rung of the ladder is found with few measurements, within limits, once."""

from __future__ import annotations

import json
import math
import random
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from frugalbert import plan, sizing
from frugalbert.config import Config, Machine, Pretrain
from frugalbert.measure import table
from frugalbert.model.arch import Arch
from frugalbert.run import Stopped, read_json
from frugalbert.train import optim, probe
from frugalbert.train.assemble import Rows
from tests.structure import ROOT
from tests.train import small_run
from tests.train.test_ranks import launch

MACHINE = Machine.model_validate({"device": "cpu", "threads": 1})
VALUES: dict[str, Any] = {**small_run.SECTION, "arch": "auto", "budget": "6s", "checkpoints": {"every": "2s"}}


def section(**values: Any) -> Pretrain:
    return Pretrain.model_validate({**VALUES, **values})


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return small_run.prepare(tmp_path_factory.mktemp("inputs"))


def true_speed(rung: sizing.Rung, pace: float) -> float:
    """Small matrices run slower than large ones."""
    return pace / rung.flops * rung.arch.hidden / (rung.arch.hidden + 256)


def climbed(seconds: float, pace: float, unique: float = math.inf, *, in_time: bool = True) -> tuple[Any, list[Any]]:
    rungs, asked = sizing.ladder(section(), 8192, 128), []
    for rung in rungs:
        rung.speed = 1e11 / rung.flops

    def measure(rung: sizing.Rung) -> float:
        asked.append(rung)
        return true_speed(rung, pace)

    return sizing.climb(rungs, seconds, unique, measure, lambda: in_time), asked


def test_few_measurements_find_the_best():
    rng = random.Random(0)
    for _ in range(50):
        seconds, pace = math.exp(rng.uniform(4.0, 12.0)), math.exp(rng.uniform(23.0, 33.0))
        chosen, asked = climbed(seconds, pace)
        losses = [
            sizing.foretold_loss(row["encoder_parameters"], seconds * true_speed(rung, pace))
            for rung in sizing.ladder(section(), 8192, 128)
            for row in [rung.row()]
        ]
        assert chosen.loss < min(losses) + 0.01
        assert len(asked) == len({rung.arch for rung in asked}) <= 8


def test_more_time_buys_a_larger_encoder_and_little_text_a_smaller_one():
    sizes = [climbed(seconds, 3e11)[0].parameters for seconds in (60, 600, 6000, 60000)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]
    many, few = (sizing.foretold_loss(1e6, 1e8, unique) for unique in (1e8, 1e6))
    assert many < few
    assert sizing.foretold_loss(1e6, 1e30, 1e6) == pytest.approx(sizing.foretold_loss(1e6, 1.6e7))
    assert sizing.foretold_loss(1e6, 0.0) == math.inf


def test_when_time_is_up_only_what_would_be_chosen_is_still_timed():
    chosen, asked = climbed(600, 3e11, in_time=False)
    assert chosen is asked[-1]
    assert len(asked) <= 3


def test_what_does_not_fit_into_memory_is_not_chosen():
    rungs = sizing.ladder(section(), 8192, 128)
    for rung in rungs:
        rung.speed = 1e15 / rung.flops
    chosen = sizing.climb(
        rungs, 1e4, math.inf, lambda rung: true_speed(rung, 1e15) if rung.arch.hidden <= 384 else 0.0, lambda: True
    )
    assert chosen.arch.hidden <= 384


def test_the_law_is_that_of_the_committed_trainings():
    found = read_json(ROOT / "benchmarks" / "results" / "scaling.json")["sizes"]
    assert {name: pytest.approx(found["law"][name], rel=1e-3) for name in sizing.LAW} == sizing.LAW
    assert max(row["flops"] for row in found["rows"]) == pytest.approx(sizing.LARGEST_FIT, rel=0.01)
    for row in found["rows"]:
        assert abs(sizing.foretold_loss(row["parameters"], row["tokens"]) - row["loss"]) < 0.35, row


def test_rows_longer_than_the_usual_positions_are_read():
    rungs = sizing.ladder(section(phases=[{"length": 2048, "share": 0.1}]), 8192, 128)
    assert {rung.arch.max_length for rung in rungs} == {2048}


def test_the_stage_chooses_trains_and_goes_on_with_the_same(
    tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "pretrain"
    out.mkdir()
    wanted = section(limit={"parameters": 3e6})
    sizing.pretrain(wanted, inputs, out, MACHINE)
    told = read_json(out / "sizing.json")
    assert told["chosen"] == read_json(out / "summary.json")["arch"]
    assert "pretrain: arch auto is modern " in capsys.readouterr().err
    assert all(row["parameters"] <= 3e6 for row in told["rows"])
    timed = [row for row in told["rows"] if row["timed"]]
    assert timed
    assert all(row["tokens_per_second"] > 0 for row in timed)
    assert sizing.decided(wanted, out).budget.amount == pytest.approx(6.0 - told["seconds"])
    assert not (out / "metrics.jsonl").read_text().count('"step": 0,')

    (out / "summary.json").unlink()
    monkeypatch.setattr(sizing, "_decide", lambda *_: pytest.fail("was decided before"))
    sizing.pretrain(wanted, inputs, out, MACHINE)
    assert read_json(out / "summary.json")["arch"] == told["chosen"]


def test_a_damaged_choice_is_named(tmp_path: Path):
    (tmp_path / "sizing.json").write_text('{"chosen": "modern 2x128", "seconds": 1')
    with pytest.raises(ValueError, match=r"sizing.json is damaged; restore it, or write --redo pretrain"):
        sizing.decided(section(), tmp_path)


def speed(inputs: dict[str, Path], size: str) -> float:
    rows = Rows.open(section(), inputs["shards"], inputs["tokenizer"], torch.device("cpu"))
    arch = Arch.parse(f"modern {size} heads=1 ffn=64")
    return sizing._speed(sizing.Rung(arch, 1.0, 1), section(), inputs, MACHINE, rows)


def test_a_rung_whose_optimizer_does_not_fit_has_no_speed(inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    def step(self: Any, closure: Any = None) -> None:
        raise torch.OutOfMemoryError("full")

    assert speed(inputs, "1x32") > 0.0
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    monkeypatch.setattr(optim.Muon, "step", step)
    assert speed(inputs, "1x32") == 0.0


def test_a_timed_rung_leaves_nothing_in_memory(inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    seen: list[Any] = []
    timed = probe.tokens_per_second
    monkeypatch.setattr(
        probe, "tokens_per_second", lambda run, parts: seen.append(weakref.ref(run)) or timed(run, parts)
    )
    speed(inputs, "1x32")
    assert [one() for one in seen] == [None]


def test_a_signal_while_sizes_are_timed_stops(inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("frugalbert.train.state.stop_requested", lambda: 15)
    with pytest.raises(Stopped) as caught:
        speed(inputs, "1x32")
    assert caught.value.number == 15


def test_latency_bounds_the_choice(tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    asked: list[Any] = []

    def measure(archs: list[Arch], served: Any, vocabulary: int, file: Path) -> list[dict[str, Any]]:
        asked.append((served.backend, served.threads, served.length))
        return [{"arch": arch.to_text(), "median_ms": float(arch.hidden)} for arch in archs]

    monkeypatch.setattr(table, "measure", measure)
    monkeypatch.setattr(sizing, "_speed", lambda rung, *_: true_speed(rung, 1e16))
    limit = {"latency_ms": 200, "backend": "onnx", "threads": 2, "length": 32}
    sizing._decide(section(limit=limit), inputs, tmp_path, MACHINE)
    told = read_json(tmp_path / "sizing.json")
    assert Arch.parse(told["chosen"]).hidden == 192
    assert asked == [("onnx", 2, 32)]
    assert {row["latency_ms"] for row in told["rows"] if "latency_ms" in row} >= {128.0, 192.0, 256.0}
    with pytest.raises(ValueError, match=r"latency_ms 5 is too little for the smallest .* 128 ms; raise it"):
        sizing._decide(section(limit={"latency_ms": 5}), inputs, tmp_path, MACHINE)


def test_two_ranks_choose_the_same(tmp_path: Path, inputs: dict[str, Path]):
    out = tmp_path / "pretrain"
    out.mkdir()
    values = {**VALUES, "limit": {"parameters": 2e6}}
    code = (
        "import json, sys; from pathlib import Path; from frugalbert import sizing;"
        "from frugalbert.config import Machine, Pretrain; place = Path(sys.argv[1]);"
        "inputs = {name: place / name for name in ('shards', 'tokenizer')} | {'yaml': place};"
        "found = sizing.pretrain(Pretrain.model_validate(json.loads(sys.argv[3])), inputs, Path(sys.argv[2]), "
        "Machine(device='cpu', threads=1)); print(json.dumps(found))"
    )
    command = [sys.executable, "-c", code, str(inputs["yaml"]), str(out), json.dumps(values)]
    launch(tmp_path, 2, command=command)
    assert read_json(out / "summary.json")["arch"] == read_json(out / "sizing.json")["chosen"]
    assert read_json(out / "summary.json")["ranks"] == 2


def test_the_real_latency_is_measured(tmp_path: Path, inputs: dict[str, Path]):
    rungs = sizing.ladder(section(limit={"latency_ms": 1e4, "length": 16}), 96, 32)[:1]
    kept = sizing._quick(rungs, section(limit={"latency_ms": 1e4, "length": 16}), 96, here=True)
    assert kept == rungs
    assert 0.0 < (rungs[0].latency_ms or 0.0) < 1e4


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"budget": "1e6tok"}, "arch: auto weighs size against time, and budget 1e+06tok is none; write one such as"),
        ({"budget": "1e6tok", "arch": "bort", "limit": {"latency_ms": 3}}, "limit belongs to arch: auto; remove it"),
        ({"start": "some/model"}, "arch: auto begins with random weights"),
        ({"objective": "distill", "distill": {"teacher": "x"}}, "arch: auto begins with random weights"),
        ({"limit": {"latency_ms": 0}}, "greater than 0"),
        ({"limit": {"device": "cuda", "backend": "onnx"}}, "backend onnx runs on the CPU"),
    ],
)  # fmt: skip
def test_what_cannot_be(values: dict[str, Any], said: str):
    with pytest.raises(ValidationError) as caught:
        section(**values)
    assert said in str(caught.value)


def test_a_limit_that_nothing_keeps():
    with pytest.raises(ValueError, match=r"parameters 1,000 is below the smallest of the ladder, modern 2x128 .*;"):
        sizing.ladder(section(limit={"parameters": 1000}), 8192, 128)


def test_plan_says_what_it_would_be(tmp_path: Path):
    config = Config.model_validate({
        "name": "sized", "corpus": {"sources": ["python-docs"]}, "tokenizer": {}, "shards": {"length": 128},
        "machine": {"device": "cpu"}, "pretrain": {"arch": "auto", "budget": "30m", "limit": {"latency_ms": 8}},
    })  # fmt: skip
    text = {name: told for name, _, told in plan.rows(config, tmp_path / "run", tmp_path)}["pretrain"]
    assert text.startswith("auto (2x128 to 24x1024), at such a pace, or as much less as 8 ms a call allow: modern ")
    assert "budget 30m" in text
