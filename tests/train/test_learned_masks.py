"""Learned attention masks: gates, gradients, sampling, densities, and that they find what a task needs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from frugalbert.config import Attention, Machine, Pretrain
from frugalbert.model import patterns
from frugalbert.model.arch import Arch
from frugalbert.model.configuration import FrugalConfig
from frugalbert.model.modeling import FrugalForMaskedLM
from frugalbert.run import write_json
from frugalbert.search import attention
from frugalbert.train import pretrain
from frugalbert.train.gating import probabilities
from frugalbert.train.learned_masks import Masked, Structure, block_price, groups, logistic, relax
from tests.structure import benchmark
from tests.train import small_run
from tests.train.small_run import SECTION, prepare
from tests.train.test_ranks import launch

STRUCTURES = [
    Structure("unstructured", 16, 4, True), Structure("unstructured", 16, 4, False), Structure("toeplitz", 16, 4, True),
    Structure("toeplitz", 16, 4, False), Structure("block", 16, 4, True), Structure("block", 16, 4, False),
    Structure("block-toeplitz", 16, 4, True), Structure("toeplitz-priced", 16, 4, True),
]  # fmt: skip


def section(**values: Any) -> Attention:
    return Attention.model_validate({"budget": "10steps", "density": 0.3, **values})


# ---- gating ----------------------------------------------------------------------------------------------------------


def test_the_gradients_of_the_gate_are_the_formulas():
    """A = M e / sum(M e) against autograd, masks strictly between 0 and 1 and visible pairs of some rows only."""
    torch.manual_seed(0)
    scores = torch.randn(2, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(3, 5, 5, dtype=torch.float64).clamp(0.1).requires_grad_()
    visible = torch.rand(2, 1, 5, 5) > 0.3
    visible |= torch.eye(5, dtype=torch.bool)
    plain = mask * scores.exp() * visible
    wanted = plain / plain.sum(-1, keepdim=True)
    upstream = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    expected = torch.autograd.grad((wanted * upstream).sum(), [scores, mask])
    found = probabilities(scores, mask, visible, "renormalised")
    assert torch.allclose(found.double(), wanted, atol=1e-6)
    for mine, theirs in zip(torch.autograd.grad((found * upstream).sum(), [scores, mask]), expected, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)


def hard(gating: str) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities of one head under a mask whose row 1 is empty, and the gradients of scores and mask."""
    scores = torch.tensor([[[[1.0, 2.0, 0.5]] * 3]], requires_grad=True)
    mask = torch.tensor([[[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 1.0]]], requires_grad=True)
    visible = torch.tensor([[[[True, True, False]]]])
    found = probabilities(scores, mask, visible, gating)
    (found * torch.tensor([3.0, -1.0, 2.0])).sum().backward()
    assert scores.grad is not None
    assert mask.grad is not None
    return found[0, 0].detach(), scores.grad[0, 0], mask.grad[0]


def test_dropped_pairs_learn_and_empty_rows_are_zero():
    found, of_scores, of_mask = hard("renormalised")
    assert found.tolist() == [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    assert of_scores.tolist() == [[0.0] * 3] * 3  # rows of one key
    assert of_mask[0, 1] == pytest.approx(np.e * (-1.0 - 3.0))  # what row 0 would gain by its dropped, likelier key
    assert of_mask[1].tolist() == [0.0] * 3
    assert not of_mask[:, 2].any()  # padding


def test_in_the_references_gating_dropped_pairs_learn_nothing():
    found, _, of_mask = hard("additive")
    assert found[0].tolist() == [1.0, 0.0, 0.0]
    assert of_mask[0].tolist() == [0.0, 0.0, 0.0]
    assert found[1].tolist()[:2] == pytest.approx([0.2689, 0.7311], abs=1e-3)  # silently dense: why it is no default


def test_nothing_becomes_nan_under_hard_masks():
    torch.manual_seed(1)
    for gating in ("renormalised", "additive", "post-softmax"):
        scores = (100.0 * torch.randn(2, 2, 8, 8)).requires_grad_()
        mask = (torch.rand(2, 8, 8) > 0.7).float().requires_grad_()
        probabilities(scores, mask, torch.rand(2, 1, 1, 8) > 0.5, gating).square().sum().backward()
        assert scores.grad is not None
        assert mask.grad is not None
        assert scores.grad.isfinite().all()
        assert mask.grad.isfinite().all()


# ---- sampling --------------------------------------------------------------------------------------------------------


def test_a_pair_is_kept_as_often_as_its_probability_says():
    alpha = torch.tensor([-3.0, -0.5, 0.0, 1.0, 2.5])
    kept = torch.stack([relax(alpha, logistic(alpha.shape, key), 0.7) for key in range(20_000)])
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    assert torch.allclose(kept.mean(0), alpha.sigmoid(), atol=0.01)


def test_the_gradient_of_a_sample_is_that_of_the_soft_one():
    alpha = torch.tensor([-1.0, 0.3], dtype=torch.float64, requires_grad=True)
    noise = torch.tensor([0.4, -2.0], dtype=torch.float64)
    relax(alpha, noise, 0.5).sum().backward()
    step = 1e-6
    for place in range(2):
        ends = [torch.sigmoid((alpha[place] + sign * step + noise[place]) / 0.5) for sign in (1, -1)]
        assert alpha.grad is not None
        assert float(alpha.grad[place]) == pytest.approx(float((ends[0] - ends[1]) / (2 * step)), rel=1e-5)


# ---- structures, sharing, densities ----------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda s: f"{s.name}-{s.symmetric}")
def test_one_logit_is_one_part_of_the_mask(structure: Structure):
    index, weights = structure.index(), structure.weights()
    assert weights.sum() == 256
    assert weights.min() > 0
    assert sorted(set(index.ravel().tolist())) == list(range(structure.size))
    if structure.symmetric:
        assert (index == index.T).all()
    if structure.name.startswith("toeplitz"):
        assert all((np.diff(index.diagonal(d)) == 0).all() for d in range(-15, 16))
    if structure.name == "block":
        assert (index[::4, ::4].repeat(4, 0).repeat(4, 1) == index).all()


def test_who_shares_a_mask():
    assert groups("layers", (2, 2, 2), None) == ((0, 1),) * 3
    assert groups("layers", (2, 2, 2), 2) == ((0, 1), (0, 1), (2, 3))
    assert groups("none", (2, 1, 3), None) == ((0, 1), (2,), (3, 4, 5))
    assert groups("heads", (2, 1), None) == ((0, 0), (1,))
    assert groups("all", (2, 1), None) == ((0, 0), (0,))
    with pytest.raises(ValueError, match="equal numbers of heads, these layers have .1, 2.; write heads or none"):
        groups("layers", (2, 1), None)


def test_the_price_of_distances_is_the_blocks_they_touch():
    for seed in range(5):
        keep = torch.rand(2, 16, generator=torch.Generator().manual_seed(seed)) > 0.8
        pattern = [patterns.joined([(d, d) for d in np.flatnonzero(row)]) for row in keep.numpy()]
        touched = [patterns.blocks(patterns.Pattern("toeplitz", (runs,)), 16, 4).mean() for runs in pattern if runs]
        wanted = sum(touched) / 2
        assert float(block_price(keep.float(), 16, 4)) == pytest.approx(wanted)


def masked(**values: Any) -> Masked:
    torch.manual_seed(0)
    network = FrugalForMaskedLM(FrugalConfig.from_arch(Arch.parse("bert 2x16 heads=2 ffn=16 max_length=16"), 64))
    chosen = section(**values)
    return Masked(network, chosen, Structure(chosen.structure, 16, chosen.block, chosen.symmetric))


@settings(derandomize=True, max_examples=40, deadline=None)
@given(st.sampled_from(STRUCTURES), st.floats(0.3, 0.9), st.integers(0, 99))
def test_topk_hits_the_density_within_one_logit(structure: Structure, density: float, seed: int):
    alpha = np.random.default_rng(seed).normal(size=(2, structure.size))
    chosen = section(density=density, structure=structure.name, symmetric=structure.symmetric, block=16)
    kept = attention.finalise(alpha, np.zeros((2, 2, 0)), structure, chosen)
    weights = structure.weights()
    assert (kept.logits[:, structure.index()].any(2)).all()  # no empty rows
    if structure.name != "toeplitz-priced" and not kept.repaired:
        got = (kept.logits * weights).sum() / 2
        dropped, taken = alpha[~kept.logits], alpha[kept.logits]
        assert abs(got - density * 256) <= weights.max()
        assert taken.min() > dropped.max()


def test_empty_rows_get_their_likeliest_key_or_themselves_or_an_error():
    structure = Structure("toeplitz", 16, 4, True)
    alpha = np.full((1, 16), -5.0)
    alpha[0, [12, 4, 0]] = [9.0, 3.0, 2.0]
    for rule, wanted in (("nearest", {12, 4}), ("diagonal", {12, 0})):
        kept = attention.finalise(alpha, np.zeros((1, 2, 0)), structure, section(density=0.07, empty_rows=rule))
        assert set(np.flatnonzero(kept.logits[0])) == wanted
        assert kept.repaired == 1
    with pytest.raises(ValueError, match="keep no key; raise attention.density, or write empty_rows: nearest"):
        attention.finalise(alpha, np.zeros((1, 2, 0)), structure, section(density=0.07, empty_rows="error"))


def test_least_per_head_and_global_positions():
    structure = Structure("unstructured", 16, 4, False)
    alpha = np.random.default_rng(0).normal(size=(2, 256)) + np.array([[3.0], [-3.0]])
    plain, least = (
        attention.finalise(alpha, np.zeros((2, 2, 0)), structure, section(least_per_head=value)) for value in (0.0, 0.2)
    )
    assert plain.logits[1].sum() <= 16 < least.logits[1].sum() == round(0.2 * 256)
    chosen = section(global_positions=[0, 5], structure="unstructured", symmetric=False)
    extra = np.array([[[1.0, -1.0], [1.0, 2.0]], [[-1.0, -1.0], [-1.0, -1.0]]])
    kept = attention.finalise(alpha, extra, structure, chosen)
    heads = [attention.pattern_of(*one, structure, chosen) for one in zip(kept.logits, kept.globals, strict=True)]
    assert (heads[0].rows, heads[0].columns, heads[1].rows) == ((0,), (0, 5), ())
    union = [patterns.pairs(head, 16) for head in heads]
    assert abs(sum(union) - kept.repaired - 0.3 * 512) <= 1


def test_the_expected_density_counts_what_it_says():
    model = masked(structure="toeplitz", global_positions=[0])
    with torch.no_grad():
        model.logits.copy_(torch.where(torch.rand_like(model.logits) > 0.5, 20.0, -20.0))
        model.global_logits.copy_(torch.tensor([[[20.0], [-20.0]], [[-20.0], [20.0]]]))
    kept = attention.finalise(
        model.logits.detach().numpy(), model.global_logits.detach().numpy(), model.structure,
        section(finalise="threshold"),
    )  # fmt: skip
    chosen = section(global_positions=[0])
    heads = [attention.pattern_of(*one, model.structure, chosen) for one in zip(kept.logits, kept.globals, strict=True)]
    wanted = np.mean([patterns.pairs(head, 16) for head in heads]) / 256
    assert float(model.figures()["density_expected"]) == pytest.approx(wanted, abs=1e-5)
    assert float(model.figures()["density_kept"]) == pytest.approx(wanted, abs=1e-6)


# ---- a task with a known answer --------------------------------------------------------------------------------------


def test_it_finds_the_distances_that_a_task_needs_and_nothing_else():
    """The planted task of benchmarks/planted_offsets.py, shorter: tokens at i - 3 and i + 5 have to be named."""
    script = benchmark("planted_offsets")
    found = script.search({"penalty": 0.5, "mask_learning_rate": 0.05}, 0, 600)
    assert found["distances"] == [3, 5]
    assert found["accuracy"] > 0.9
    assert script.control("toeplitz:9+14", 0, 150)["accuracy"] < 0.2


# ---- the stage -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return prepare(tmp_path_factory.mktemp("attention"))


def learn(inputs: dict[str, Path], out: Path, **values: Any) -> dict[str, Any]:
    out.mkdir(parents=True)
    chosen = Attention.model_validate({**SECTION, "density": 0.3, **values})
    return attention.build(chosen, inputs, out, Machine())


@pytest.mark.parametrize(
    "values",
    [{"structure": "unstructured"}, {"levels": 2}, {"share": "none", "symmetric": False}, {"global_positions": [0]},
     {"gating": "additive", "density": None, "penalty": 0.1, "sum": True}, {"penalty_on": "sampled"}],
    ids=str,
)  # fmt: skip
def test_a_search_ends_in_an_architecture_that_trains_on(inputs: dict[str, Path], tmp_path: Path, values: Any):
    out = tmp_path / "attention"
    values = {name: value for name, value in {"density": 0.3, **values}.items() if value is not None}
    out.mkdir()
    attention.build(Attention.model_validate({**SECTION, **values}), inputs, out, Machine())
    arch = Arch.load(str(out / "arch.json"))
    facts = json.loads((out / "masks.json").read_text())
    found = np.mean([patterns.density(layer.pattern, 32) for layer in arch.layers])
    assert facts["density"] == pytest.approx(found)
    if "density" in values:
        assert facts["density"] == pytest.approx(0.3, abs=0.03)
    write_json(out / "stage.json", {})
    for start in ("from attention", None):
        again = Pretrain.model_validate({**SECTION, "arch": "from attention", "start": start, "budget": "2steps"})
        path = tmp_path / f"pretrain-{start}"
        path.mkdir()
        pretrain.build(again, {**inputs, "attention": out}, path, Machine())
        assert FrugalForMaskedLM.from_pretrained(path / "model").config.to_arch() == arch


def test_only_mask_steps_move_logits_and_only_weight_steps_move_weights():
    model = masked(levels=2)
    optimizer = torch.optim.SGD(model.network.parameters(), lr=1.0)
    model.join(optimizer)
    weight = next(model.network.parameters())
    for trains in ("weights", "masks", "both"):
        before = model.logits.detach().clone(), weight.detach().clone()
        model.trains = trains
        model.logits.grad, weight.grad = torch.ones_like(model.logits), torch.ones_like(weight)
        optimizer.step()
        moved = [not torch.equal(old, new) for old, new in zip(before, (model.logits, weight), strict=True)]
        assert moved == [trains != "weights", trains != "masks"]


def test_two_ranks_learn_the_masks_of_one(inputs: dict[str, Path], tmp_path: Path):
    """The same masks on both in every step, though each sees other rows."""
    values = {"structure": "toeplitz", "density": 0.3, "batch_size": 6, "global_positions": [0]}
    small_run.run(inputs, tmp_path / "one", **values)
    script = [sys.executable, "-m", "tests.train.small_run", str(inputs["yaml"]), str(tmp_path / "two"),
              json.dumps(values)]  # fmt: skip
    launch(tmp_path / "two", 2, command=script)
    one, two = (np.load(tmp_path / name / "masks.npz") for name in ("one", "two"))
    np.testing.assert_allclose(two["logits"], one["logits"], rtol=0, atol=2e-3)
    assert abs(one["logits"]).max() > 0.1
    assert (tmp_path / "one" / "arch.json").read_bytes() == (tmp_path / "two" / "arch.json").read_bytes()


def test_validation_never_samples(inputs: dict[str, Path]):
    from frugalbert.data.masking import Batch

    model = masked(structure="toeplitz")
    ids, place = torch.zeros(1, 8, dtype=torch.long), torch.arange(8)[None]
    batch = Batch(ids, place, torch.ones_like(ids), ids, ids, ids)
    gates = [model.gates(None, 0.3, batch)(0, None) for _ in range(2)]
    assert all(torch.equal(gate.mask[:, 0], (model.logits > 0).float()[:, :8]) for gate in gates)  # type: ignore[attr-defined]
    one, same, other = (model.gates(key, 0.3, batch)(0, None).mask for key in (1, 1, 2))  # type: ignore[attr-defined]
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"density": None}, "write either density"),
        ({"penalty": 0.5}, "write either density"),
        ({"structure": "block-toeplitz", "symmetric": False}, "block-toeplitz is symmetric"),
        ({"structure": "toeplitz-priced", "global_positions": [0]}, "toeplitz-priced has symmetric distances alone"),
        ({"share": "none", "layers_per_group": 2}, "layers_per_group belongs to share: layers"),
        ({"sum": True}, "sum belongs to penalty"),
        ({"arch": "from attention"}, "from attention is what this section makes"),
        ({"start": "from search"}, "start: from search needs arch: from search as well"),
        ({"density": None, "penalty": 1.0, "finalise": "topk"}, "finalise: topk needs density"),
    ],
)
def test_settings_that_contradict_each_other(values: dict[str, Any], sentence: str):
    with pytest.raises(ValidationError, match=sentence):
        section(**values)


def test_a_density_that_leaves_rows_empty_is_refused_at_once(inputs: dict[str, Path], tmp_path: Path):
    with pytest.raises(
        ValueError, match="attention.density 0.02 leaves queries without any key at 32 tokens; write at "
    ):
        learn(inputs, tmp_path / "attention", density=0.02)
    with pytest.raises(ValueError, match="write at least 0.5 for structure: block"):
        learn(inputs, tmp_path / "again", density=0.3, structure="block", block=16)
