"""Latency predictors on laws made for the purpose: what is recovered, what is chosen, what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from frugalbert.measure import predictor
from frugalbert.model.arch import Arch
from frugalbert.space import Space

SPACE = Space(depth=(1, 2, 4, 6), hidden=(128, 256, 384), heads=(2, 4, 8), head_dim=(32, 64), ffn=(128, 512, 1024))
LAW = np.array([0.3, 0.05, 2e-5, 1e-5, 3e-4, 2e-4, 1e-4, 0.02, 1e-3, 0.0])
"""Milliseconds per unit of every term."""


@pytest.fixture(scope="module")
def archs() -> list[Arch]:
    rng = np.random.default_rng(0)
    return list({arch.to_text(): arch for arch in (SPACE.sample_stratified(rng) for _ in range(90))}.values())


@pytest.fixture(scope="module")
def trained(archs: list[Arch], setting: dict[str, Any]) -> predictor.Predictor:
    return predictor.train(archs, times(archs).tolist(), setting)


@pytest.fixture(scope="module")
def setting() -> dict[str, Any]:
    return {"device": "cpu", "processor": predictor.device_name("cpu"), "threads": 1, "length": 128}


def times(archs: list[Arch], law: np.ndarray = LAW) -> np.ndarray:
    return predictor.features(archs, 128) @ law


def test_terms_are_sums_over_layers():
    mixed = Arch.parse("bert 2x64 heads=2,4 head_dim=16,8 ffn=100,200")
    row = dict(zip(predictor.TERMS, predictor.features([mixed], 16)[0].tolist(), strict=True))
    assert row.pop("flops") == 16 * (2 * (64 * (4 * 64 + 2 * 300)) + 4 * 64 * 16) + 2 * 64 * 64
    assert row == {
        "1": 1, "layers": 2, "hidden*qkv": 64 * 64, "hidden*ffn": 64 * 300, "qkv": 64, "layer hidden": 128,
        "ffn": 300, "heads": 6, "width": 64,
    }  # fmt: skip


@pytest.mark.parametrize("method", ["linear", "positive"])
def test_a_linear_law_is_recovered(archs: list[Arch], method: str):
    fit, predict = predictor.METHODS[method]
    x, ms = predictor.features(archs, 128), times(archs)
    params = fit(x[:60], ms[:60], 0)
    assert predict(params, x[60:]) == pytest.approx(ms[60:], rel=1e-6)


def test_flops_are_worse_where_memory_counts(trained: predictor.Predictor):
    found = trained.report
    assert found["methods"]["linear"]["held_out_mape"] < 1e-6
    assert found["methods"]["linear"]["unseen_depth_mape"] < 1e-6
    assert found["methods"]["linear"]["held_out_spearman"] == pytest.approx(1.0)
    assert found["methods"]["flops"]["held_out_mape"] > 0.03
    assert found["chosen"] == "positive"  # of two equal ones the simpler


def test_flops_are_as_good_where_nothing_else_counts(archs: list[Arch]):
    law = np.zeros(len(LAW))
    law[[0, -1]] = 0.5, 1e-8
    found = predictor.judge(archs, times(archs, law).tolist(), 128)
    assert found["methods"]["flops"]["held_out_mape"] < 1e-9
    assert found["chosen"] == "flops"


def test_a_step_is_left_to_the_trees(archs: list[Arch]):
    """A cliff that no smooth function has: sizes from a threshold on take twice as long."""
    ms = times(archs) * np.where(predictor.features(archs, 128)[:, 6] > 1000, 2.0, 1.0)
    found = predictor.judge(archs, ms.tolist(), 128)
    errors = {name: values["cross_validated_mape"] for name, values in found["methods"].items()}
    assert found["chosen"] == min(errors, key=errors.__getitem__) == "trees"
    assert errors["trees"] < 0.7 * errors["linear"]


@pytest.mark.parametrize("method", ["trees", "mlp"])
def test_our_evaluation_is_scikit_learns(archs: list[Arch], method: str, monkeypatch: pytest.MonkeyPatch):
    import sklearn.ensemble
    import sklearn.neural_network

    owner, name = {
        "trees": (sklearn.ensemble, "GradientBoostingRegressor"),
        "mlp": (sklearn.neural_network, "MLPRegressor"),
    }[method]
    made: list[Any] = []
    original = getattr(owner, name)

    class Kept(original):
        def fit(self, inputs: np.ndarray, target: np.ndarray) -> Any:
            made.append((self, inputs))
            return super().fit(inputs, target)

    monkeypatch.setattr(owner, name, Kept)
    x, noise = predictor.features(archs, 128), np.random.default_rng(1).normal(0, 0.3, len(archs))
    fit, predict = predictor.METHODS[method]
    params = json.loads(json.dumps(fit(x, times(archs) * np.exp(noise), 0)))
    model, inputs = made[0]
    base = x[:, predictor.PHYSICAL] @ np.array(params["weights"])
    assert predict(params, x) == pytest.approx(base * np.exp(model.predict(inputs)), rel=1e-9)


@pytest.mark.parametrize("method", list(predictor.METHODS))
def test_stored_and_loaded(archs: list[Arch], setting: dict[str, Any], method: str, tmp_path: Path):
    x, ms = predictor.features(archs, 128), times(archs)
    low, high = tuple(x.min(axis=0).tolist()), tuple(x.max(axis=0).tolist())
    found = predictor.Predictor(method, predictor.METHODS[method][0](x, ms, 0), low, high, setting, {"chosen": method})
    (tmp_path / "predictor.json").write_text(json.dumps(found.to_json()))
    again = predictor.load(tmp_path / "predictor.json")
    assert again == found
    assert again.predict_many(archs).tolist() == found.predict_many(archs).tolist()
    assert again.predict(archs[3]) == pytest.approx(found.predict_many(archs)[3], rel=1e-12)


def test_trained_on_everything(archs: list[Arch], trained: predictor.Predictor, setting: dict[str, Any]):
    found = trained
    assert found.predict_many(archs) == pytest.approx(times(archs), rel=1e-4)
    assert found.report["held_out"] == round(0.2 * len(archs))
    for measured, predicted in found.report["points"]:
        assert predicted == pytest.approx(measured, rel=1e-4)
    with pytest.raises(ValueError, match="7 architectures are too few"):
        predictor.train(archs[:7], times(archs[:7]).tolist(), setting)


def test_extrapolation_is_said(archs: list[Arch], trained: predictor.Predictor, capsys: pytest.CaptureFixture[str]):
    trained.predict_many(archs)
    assert capsys.readouterr().err == ""
    assert trained.predict(Arch.uniform("bert", 7, 128, 2, 128, 32)) > 0
    assert "measured ones (layers); theirs is extrapolated" in capsys.readouterr().err


def test_another_device_is_refused(trained: predictor.Predictor, setting: dict[str, Any], tmp_path: Path):
    other = {**setting, "processor": "Abacus 3"}
    path = tmp_path / "predictor.json"
    path.write_text(json.dumps({**trained.to_json(), "setting": other}))
    with pytest.raises(ValueError, match=r"was measured on Abacus 3, this is .*--redo") as caught:
        predictor.load(path)
    assert "\n" not in str(caught.value)
    assert predictor.load(path, other_device=True).setting == other


@pytest.mark.parametrize(
    "change",
    [{"method": "oracle"}, {"format": 0}, {"terms": ["1"]}, {"params": {}}, {"params": {"weights": [1.0]}}, {"low": 3}],
)
def test_damaged_files(trained: predictor.Predictor, tmp_path: Path, change: dict[str, Any]):
    path = tmp_path / "predictor.json"
    path.write_text(json.dumps({**trained.to_json(), **change}))
    with pytest.raises(ValueError, match=re.escape(f"{path} is no latency predictor")):
        predictor.load(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="is no latency predictor"):
        predictor.load(path)
