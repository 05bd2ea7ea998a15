"""Optimizers against twenty steps in numpy; the audit of parameter groups; a user's own optimizer."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from frugalbert.train.optim import (
    NEWTON_SCHULZ,
    Muon,
    OptimizerSettings,
    load_optimizer_state,
    make_optimizer,
    optimizer_state,
    orthogonalise,
    parameter_groups,
    parameter_table,
    restart_steps,
    set_rates,
)
from frugalbert.train.state import State
from frugalbert.train.step import _apply

Arrays = list[list[np.ndarray]]
RATES = [0.1 * (1 - step / 20) for step in range(20)]


class Tied(nn.Module):
    """Embedding, two layers, norms of two kinds, a tied decoder: every case of grouping."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 4)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4, bias=False)) for _ in range(2)])
        self.norm = nn.LayerNorm(4)
        self.scale = nn.RMSNorm(4)
        self.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)
        self.decoder = nn.Linear(4, 11)
        self.decoder.weight = self.words.weight


def trajectory(
    settings: OptimizerSettings,
) -> tuple[Arrays, Arrays, torch.optim.Optimizer]:
    """Weights before and after 20 steps, the gradients, and the optimizer; group 0 decays, group 1 does not."""
    rng = np.random.default_rng(0)
    layer = nn.Linear(3, 5).double() if settings.name != "muon" else nn.Linear(3, 5)
    model = nn.Module()
    model.layers = nn.ModuleList([layer])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.from_numpy(rng.normal(size=parameter.shape)))
    optimizer = make_optimizer(model, settings)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    start = [parameter.detach().numpy().copy() for parameter in parameters]
    gradients = [[rng.normal(size=parameter.shape) for parameter in parameters] for _ in RATES]
    for factor, step in zip(RATES, gradients, strict=True):
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = torch.from_numpy(gradient).to(parameter.dtype)
        set_rates(optimizer, factor)
        optimizer.step()
    return [start, [parameter.detach().numpy() for parameter in parameters]], gradients, optimizer


def adam_directions(gradients: list[np.ndarray], betas: tuple[float, float], epsilon: float) -> list[np.ndarray]:
    m = v = np.zeros_like(gradients[0])
    found = []
    for step, gradient in enumerate(gradients, start=1):
        m = betas[0] * m + (1 - betas[0]) * gradient
        v = betas[1] * v + (1 - betas[1]) * gradient**2
        found.append((m / (1 - betas[0] ** step)) / (np.sqrt(v / (1 - betas[1] ** step)) + epsilon))
    return found


def test_adamw_against_numpy():
    settings = OptimizerSettings(learning_rate=0.3, weight_decay=0.1, betas=(0.9, 0.97), epsilon=1e-6)
    (start, end), gradients, _ = trajectory(settings)
    for index, decay in enumerate((0.1, 0.0)):
        weight = start[index]
        directions = adam_directions([step[index] for step in gradients], (0.9, 0.97), 1e-6)
        for factor, direction in zip(RATES, directions, strict=True):
            weight = weight * (1 - 0.3 * factor * decay) - 0.3 * factor * direction
        np.testing.assert_allclose(end[index], weight, rtol=1e-6)


@pytest.mark.parametrize("corrected", [True, False])
def test_lamb_against_numpy(corrected: bool):
    options = {"bias_correction": corrected, "maximum_ratio": 2.0}
    settings = OptimizerSettings("lamb", 0.3, 0.1, (0.9, 0.97), 1e-6, options=options)
    (start, end), gradients, _ = trajectory(settings)
    ratios = []
    for index, decay in enumerate((0.1, 0.0)):
        weight = start[index]
        m = v = np.zeros_like(weight)
        for step, factor in enumerate(RATES, start=1):
            gradient = gradients[step - 1][index]
            m = 0.9 * m + 0.1 * gradient
            v = 0.97 * v + 0.03 * gradient**2
            scale = (1 - 0.9**step, 1 - 0.97**step) if corrected else (1.0, 1.0)
            update = m / scale[0] / (np.sqrt(v / scale[1]) + 1e-6) + decay * weight
            ratios.append(np.linalg.norm(weight) / np.linalg.norm(update))
            weight = weight - 0.3 * factor * np.clip(ratios[-1], 0.01, 2.0) * update
        np.testing.assert_allclose(end[index], weight, rtol=1e-9)
    assert min(ratios) < 2.0 < max(ratios)  # the clamp is part of what was compared


PUBLISHED = {"minimum_ratio": 0.0, "maximum_ratio": 0.0, "trust_undecayed": False}


def test_lamb_as_published():
    """NVIDIA's order against scalars: two micro-batches averaged, the norm of all gradients clipped to 1, moments, bias
    correction, decay, and a ratio without bounds; none for biases, and 1 where a norm is 0."""
    rng = np.random.default_rng(1)
    weights = {"0.weight": rng.normal(size=(4, 3)) * 30, "0.bias": rng.normal(size=4), "1.weight": np.zeros((2, 4))}
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False)).double()
    for name, parameter in model.named_parameters():
        parameter.data.copy_(torch.from_numpy(weights[name]))
    optimizer = make_optimizer(model, OptimizerSettings("lamb", 0.2, 0.1, (0.9, 0.999), 1e-6, options=PUBLISHED))
    moments = {name: (np.zeros_like(weight), np.zeros_like(weight)) for name, weight in weights.items()}
    for step in range(1, 7):
        optimizer.zero_grad()
        scale = 10.0 if step % 2 else 1e-3  # clipped and not
        parts = [{name: scale * rng.normal(size=weight.shape) for name, weight in weights.items()} for _ in range(2)]
        if step == 4:
            parts = [
                {name: part * 0 if name == "0.weight" else part for name, part in found.items()} for found in parts
            ]
        for part in parts:
            for name, parameter in model.named_parameters():
                half = torch.from_numpy(part[name]) / 2
                parameter.grad = half if parameter.grad is None else parameter.grad + half
        recipe = SimpleNamespace(clip_norm=1.0, rate=lambda progress: 0.5, schedule=lambda progress: 0)
        run = SimpleNamespace(optimizer=optimizer, model=model, scaler=None, recipe=recipe, state=State())
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()]).item()
        _apply(run, SimpleNamespace(samples={}, epochs=0.0), norm, 0)
        gradients = {name: (parts[0][name] + parts[1][name]) / 2 for name in weights}
        size = math.sqrt(sum(float((gradient**2).sum()) for gradient in gradients.values()))
        assert (size > 1.0) == bool(step % 2)
        for name, weight in weights.items():
            g = gradients[name] * min(1.0, 1.0 / size)
            m, v = (moments[name][0] * 0.9 + 0.1 * g, moments[name][1] * 0.999 + 0.001 * g**2)
            moments[name] = (m, v)
            decay = 0.0 if name.endswith("bias") else 0.1
            u = m / (1 - 0.9**step) / (np.sqrt(v / (1 - 0.999**step)) + 1e-6) + decay * weight
            norms = np.linalg.norm(weight), np.linalg.norm(u)
            ratio = norms[0] / norms[1] if decay and min(norms) > 0 else 1.0
            weights[name] = weight - 0.2 * 0.5 * ratio * u
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(parameter.detach().numpy(), weights[name], rtol=1e-9)
    assert np.abs(weights["0.weight"]).max() > 10, "a ratio far above 1 was among them"


@pytest.mark.parametrize("name", ["adamw", "lamb", "muon", "adam"])
def test_steps_are_counted_anew_and_moments_stay(name: str):
    """After a restart the first step is corrected as a first one, with the moments of all before."""
    _, _, optimizer = trajectory(OptimizerSettings(name, 0.1))
    before = {key: tensor.clone() for key, tensor in optimizer_state(optimizer)[0].items()}
    restart_steps(optimizer)
    after = optimizer_state(optimizer)[0]
    assert {key for key in before if not torch.equal(before[key], after[key])} == {
        key for key in before if key.endswith("/step")
    }
    assert all(tensor == 0.0 for key, tensor in after.items() if key.endswith("/step"))


def test_bertadam_by_hand():
    """Three steps of one weight: m and v uncorrected, decay on the weight itself; a bias does not decay."""
    model = nn.Linear(1, 1, dtype=torch.float64)
    nn.init.constant_(model.weight, 2.0)
    nn.init.zeros_(model.bias)
    optimizer = make_optimizer(model, OptimizerSettings("bertadam", 0.1, 0.5, (0.9, 0.99), 1e-6))
    for _ in range(3):
        model.weight.grad, model.bias.grad = torch.full_like(model.weight, 4.0), torch.full_like(model.bias, 4.0)
        optimizer.step()
    weight, bias = 2.0, 0.0
    for m, v in ((0.4, 0.16), (0.76, 0.3184), (1.084, 0.475216)):
        weight -= 0.1 * (m / (math.sqrt(v) + 1e-6) + 0.5 * weight)
        bias -= 0.1 * m / (math.sqrt(v) + 1e-6)
    assert model.weight.item() == pytest.approx(weight, rel=1e-12)
    assert model.bias.item() == pytest.approx(bias, rel=1e-12)


def test_lamb_moves_a_bias_that_is_zero():
    model = nn.Linear(2, 2)
    nn.init.zeros_(model.bias)
    optimizer = make_optimizer(model, OptimizerSettings("lamb", learning_rate=0.1))
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert model.bias.abs().min() > 0.05


def newton_schulz(matrix: np.ndarray) -> np.ndarray:
    a, b, c = NEWTON_SCHULZ
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / np.linalg.norm(x)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def test_muon_against_numpy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("frugalbert.dist.multiplies_bf16", lambda device: False)
    settings = OptimizerSettings("muon", 0.3, 0.1, (0.9, 0.97), 1e-6, muon_learning_rate=0.05)
    (start, end), gradients, optimizer = trajectory(settings)
    assert isinstance(optimizer, Muon)
    weight, momentum = start[0], np.zeros_like(start[0])
    for factor, step in zip(RATES, gradients, strict=True):
        momentum = 0.95 * momentum + 0.05 * step[0]
        update = newton_schulz(0.05 * step[0] + 0.95 * momentum)
        weight = weight * (1 - 0.05 * factor * 0.1) - 0.05 * factor * np.sqrt(5 / 3) * update
    np.testing.assert_allclose(end[0], weight, rtol=2e-4, atol=1e-5)
    bias = start[1]  # the bias is AdamW's, without decay
    for factor, direction in zip(RATES, adam_directions([s[1] for s in gradients], (0.9, 0.97), 1e-6), strict=True):
        bias = bias - 0.3 * factor * direction
    np.testing.assert_allclose(end[1], bias, rtol=1e-4)


def test_muon_agrees_with_torch(monkeypatch: pytest.MonkeyPatch):
    """torch.optim.Muon, matrix by matrix in bf16, and ours, batched: the same up to bf16's rounding."""
    monkeypatch.setattr("frugalbert.dist.multiplies_bf16", lambda device: True)
    torch.manual_seed(0)
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(8, 24, bias=False), nn.Linear(8, 24, bias=False), nn.Linear(24, 8)])
    theirs = [layer.weight.detach().clone().requires_grad_() for layer in model.layers]
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1)
    ours = make_optimizer(model, OptimizerSettings("muon", weight_decay=0.1))
    for _ in range(3):
        for layer, weight in zip(model.layers, theirs, strict=True):
            layer.weight.grad = torch.randn_like(layer.weight)
            weight.grad = layer.weight.grad.clone()
        ours.step()
        reference.step()
    for layer, weight in zip(model.layers, theirs, strict=True):
        torch.testing.assert_close(layer.weight, weight, atol=1e-3, rtol=0.01)


def test_orthogonalise_makes_singular_values_one():
    torch.manual_seed(0)
    for shape in ((2, 12, 5), (2, 5, 12)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape, dtype=torch.float64)))
        assert 0.6 < values.min() < values.max() < 1.3


@pytest.mark.parametrize("name", ["adamw", "bertadam", "adam", "sgd", "lamb", "muon"])
def test_every_parameter_is_in_exactly_one_group(name: str):
    model = Tied()
    optimizer = make_optimizer(model, OptimizerSettings(name))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    grouped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, trained))
    for group in optimizer.param_groups:
        assert all((parameter.ndim == 1) == (group["weight_decay"] == 0.0) for parameter in group["params"])
    table = parameter_table(optimizer)
    assert table.count("\n") == len(trained) + 1
    assert "words.weight\t11x4" in table
    assert "decoder.weight" not in table
    if name == "muon":
        matrices = next(group for group in optimizer.param_groups if group.get("matrices"))
        assert matrices["names"] == [f"layers.{i}.{j}.weight" for i in range(2) for j in range(2)]
        assert {group["peak"] for group in optimizer.param_groups} == {0.02, 1e-3}


def test_groups_without_vectors_or_decay():
    model = nn.Linear(2, 2, bias=False)
    assert [group["names"] for group in parameter_groups(model, 0.0)] == [["weight"]]
    with pytest.raises(ValueError, match="optimizer: adamw"):
        make_optimizer(model, OptimizerSettings("muon"))


@pytest.mark.parametrize("name", ["adamw", "bertadam", "adam", "sgd", "lamb", "muon"])
def test_state_survives_a_round_trip(name: str):
    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
        for number in numbers:
            torch.manual_seed(number)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.randn_like(parameter)
            optimizer.step()

    torch.manual_seed(0)
    whole, resumed = Tied(), Tied()
    optimizer = make_optimizer(whole, OptimizerSettings(name))
    steps(whole, optimizer, range(3))
    resumed.load_state_dict(whole.state_dict())
    tensors, values = optimizer_state(optimizer)
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    fresh = make_optimizer(resumed, OptimizerSettings(name))
    load_optimizer_state(fresh, tensors, values)
    steps(whole, optimizer, range(3, 6))
    steps(resumed, fresh, range(3, 6))
    for ours, theirs in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_users_own_optimizer(tmp_path: Path):
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "def plain(groups, learning_rate, weight_decay, damping: float = 0.0):\n"
        "    return torch.optim.SGD(groups, lr=learning_rate, dampening=damping)\n"
        "def wrong(groups): return 3\n"
        "def forgets(groups):\n    return torch.optim.SGD(groups[:1], lr=1.0)\n"
    )
    settings = OptimizerSettings("mine.py:plain", learning_rate=0.5, options={"damping": 0.1})
    optimizer = make_optimizer(Tied(), settings, tmp_path)
    assert [group["dampening"] for group in optimizer.param_groups] == [0.1, 0.1]
    assert {group["peak"] for group in optimizer.param_groups} == {0.5}
    for spec, options, sentence in (
        ("mine.py:plain", {"damp": 0.1}, "did you mean damping"),
        ("mine.py:plain", {"damping": "much"}, "write a number"),
        ("mine.py:wrong", {}, "return a torch.optim.Optimizer"),
        ("mine.py:forgets", {}, "every parameter"),
        ("mine.py:absent", {}, "it has plain, wrong, forgets"),
    ):
        with pytest.raises(ValueError, match=sentence):
            make_optimizer(Tied(), OptimizerSettings(spec, options=options), tmp_path)


@pytest.mark.parametrize(
    "name, options, sentence",
    [
        ("adamv", {}, "did you mean adam"),
        ("zzz", {}, "write one of adamw, muon"),
        ("adamw", {"nesterov": True}, "no setting nesterov"),
        ("muon", {"momentum": 1.5}, "momentum < 1"),
        ("muon", {"iterations": 2.5}, "a whole number"),
        ("sgd", {"nesterov": "yes"}, "true or false"),
    ],
)
def test_wrong_settings_get_a_sentence(name: str, options: dict[str, object], sentence: str):
    with pytest.raises(ValueError, match=sentence):
        make_optimizer(Tied(), OptimizerSettings(name, options=options))
