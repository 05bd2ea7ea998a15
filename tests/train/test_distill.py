"""Predictions as targets: the fused loss against autograd and by hand, the likeliest ones; equal models."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from frugalbert.config import Distill
from frugalbert.model.configuration import FrugalConfig
from frugalbert.model.modeling import FrugalForMaskedLM
from frugalbert.train import distill
from frugalbert.train.batches import Micro
from frugalbert.train.student import Distilled, Student, layer_pairs
from frugalbert.train.teacher import Teacher
from tests.train.test_slices import VOCABULARY, make_batch, network

LABELS = torch.tensor([3, 0, -100, 6, 2])


def written_out(logits: Tensor, target: Tensor, weights: tuple[float, float], t: float) -> Tensor:
    used = LABELS != -100
    hard = nn.functional.cross_entropy(logits, LABELS)
    p = (target / t).softmax(-1)
    soft = (p * (p.log() - (logits / t).log_softmax(-1))).sum(-1)[used].mean() * t * t
    return weights[0] * hard + weights[1] * soft


def setting(dtype: torch.dtype = torch.float64) -> tuple[Tensor, nn.Linear, Tensor]:
    torch.manual_seed(1)
    return (
        torch.randn(5, 4, dtype=dtype, requires_grad=True),
        nn.Linear(4, 7, dtype=dtype),
        torch.randn(5, 7, dtype=dtype),
    )


@pytest.mark.parametrize("weights", [(0.1, 0.5), (0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_loss_and_gradients_equal_autograds(weights: tuple[float, float], temperature: float):
    x, decoder, target = setting()
    loss, hard, soft, logits = distill.distilled_loss(
        x, decoder, LABELS, distill.Prediction(target), weights, temperature
    )
    expected = written_out(decoder(x), target, weights, temperature)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(weights[0] * hard + weights[1] * soft, expected)
    torch.testing.assert_close(logits, decoder(x))
    leaves = (x, decoder.weight, decoder.bias)
    for mine, other in zip(
        torch.autograd.grad(loss * 3, leaves), torch.autograd.grad(expected * 3, leaves), strict=True
    ):
        torch.testing.assert_close(mine, other)


def test_gradient_by_hand():
    """Two words, an undecided student, the teacher's odds 3 : 1 at T = 2: w T (q - p) = 0.5 * 2 * (1/2 - 3/4)."""
    decoder = nn.Linear(2, 2, dtype=torch.float64)
    nn.init.eye_(decoder.weight)
    nn.init.zeros_(decoder.bias)
    x = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    target = distill.Prediction(torch.tensor([[2 * math.log(3.0), 0.0]], dtype=torch.float64))
    loss, _, soft, _ = distill.distilled_loss(x, decoder, torch.tensor([1]), target, (0.0, 0.5), 2.0)
    loss.backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.tensor([[-0.25, 0.25]], dtype=torch.float64))
    divergence = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert soft.item() == pytest.approx(4 * divergence)


def test_pieces_of_the_scores_add_up(monkeypatch: pytest.MonkeyPatch):
    x, decoder, target = setting()
    whole = distill.distilled_loss(x, decoder, LABELS, distill.Prediction(target), (0.1, 0.5), 2.0)[0]
    monkeypatch.setattr(distill, "CHUNK", 14)  # two rows of seven words at once
    parts = distill.distilled_loss(x, decoder, LABELS, distill.Prediction(target), (0.1, 0.5), 2.0)[0]
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(*(torch.autograd.grad(loss, x)[0] for loss in (parts, whole)))


# ---- the likeliest predictions ---------------------------------------------------------------------------------------


def test_all_of_the_likeliest_are_the_whole_prediction():
    x, decoder, target = setting()
    target = target.half().double()
    every = distill.likeliest(target, 99, 2.0)
    assert every.ids is not None
    assert every.ids.shape == (5, 7)
    losses = [
        distill.distilled_loss(x, decoder, LABELS, wanted, (0.1, 0.5), 2.0)[0]
        for wanted in (distill.Prediction(target), every)
    ]
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-3)  # scores are stored in fp16
    torch.testing.assert_close(*(torch.autograd.grad(loss, x)[0] for loss in losses), rtol=1e-2, atol=1e-3)


def test_the_rest_counts_as_one_class():
    x, decoder, target = setting()
    wanted, t = distill.likeliest(target, 3, 2.0), 2.0
    loss, _, _, _ = distill.distilled_loss(x, decoder, LABELS, wanted, (0.1, 0.5), t)
    assert wanted.ids is not None
    assert wanted.rest is not None
    classes = torch.cat((wanted.scores.double() / t, wanted.rest.double()[:, None]), -1).log_softmax(-1)
    log_q = (decoder(x) / t).log_softmax(-1)
    top = log_q.gather(1, wanted.ids)
    rest = (1.0 - top.exp().sum(-1, keepdim=True)).log()
    soft = (classes.exp() * (classes - torch.cat((top, rest), -1))).sum(-1)[LABELS != -100].mean() * t * t
    expected = 0.1 * nn.functional.cross_entropy(decoder(x), LABELS) + 0.5 * soft
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], torch.autograd.grad(expected, x)[0])
    assert wanted.scores[:, 0].eq(0).all()
    assert (classes.exp().sum(-1) - 1).abs().max() < 1e-9


# ---- student and teacher ---------------------------------------------------------------------------------------------


def student_of(section: Distill, student: Any, teacher: Any) -> Student:
    return Student(student, Teacher(teacher, section, isolate=True), section).train()


ALL = {"teacher": "t", "mlm": 0.0, "logits": 1.0, "attention": 1.0, "hidden": 1.0, "relation": 1.0, "relation_heads": 2}


@pytest.mark.parametrize("layers", ["last", "even", ((0, 0), (2, 2))])
def test_equal_models_feel_nothing(layers: Any):
    section = Distill.model_validate({**ALL, "layers": layers})
    module = student_of(section, network(), network())
    figures = Distilled(True, section)(module, Micro(make_batch(), torch.tensor(1.0), torch.tensor(1.0)), 0.5)
    assert {"loss", "text_loss", "logits_loss", "attention_loss", "hidden_loss", "relation_loss"} == set(figures)
    for name in set(figures) - {"text_loss"}:
        assert abs(figures[name].item()) < 1e-6, name
    figures["loss"].backward()
    norms = [float(weight.grad.norm()) for weight in module.parameters() if weight.grad is not None]
    assert len(norms) > 10
    assert max(norms) < 1e-6


@pytest.mark.parametrize("term", ["logits", "attention", "hidden", "relation"])
def test_each_term_moves_the_student_and_never_the_teacher(term: str):
    weights = dict.fromkeys(("mlm", "logits", "attention", "hidden", "relation"), 0.0) | {term: 1.0}
    section = Distill.model_validate({"teacher": "t", "relation_heads": 2, **weights})
    teacher = network(seed=1)
    before = {name: weight.clone() for name, weight in teacher.state_dict().items()}
    module = student_of(section, network(), teacher)
    optimizer = torch.optim.SGD([weight for weight in module.parameters() if weight.requires_grad], 0.05)
    micro, losses = Micro(make_batch(), torch.tensor(1.0), torch.tensor(1.0)), []
    for _ in range(8):
        optimizer.zero_grad()
        loss = Distilled(True, section)(module, micro, 0.5)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    assert not teacher.training
    assert all(torch.equal(weight, before[name]) for name, weight in teacher.state_dict().items())
    assert all(weight.grad is None for weight in teacher.parameters())
    assert not any(name.startswith("teacher") for name, _ in module.named_parameters())


def test_other_documents_and_padding_change_nothing():
    section = Distill.model_validate(ALL)
    torch.manual_seed(0)
    module = student_of(section, network(), network(seed=1)).eval()
    objective, batch = Distilled(True, section), make_batch()
    before = objective.measure(module, batch)
    batch.input_ids[2, 7:] = 9
    for name, value in objective.measure(module, batch).items():
        torch.testing.assert_close(value, before[name])
    batch.input_ids[2, 3] = 9
    assert all((value - before[name]).abs() > 1e-7 for name, value in objective.measure(module, batch).items())


def test_a_wider_teacher_is_met_by_projections():
    from frugalbert.model.arch import Arch

    big = FrugalForMaskedLM(FrugalConfig.from_arch(Arch.parse("bert 4x24 heads=2 head_dim=6 ffn=24"), VOCABULARY))
    section = Distill.model_validate({**ALL, "layers": "even"})
    module = student_of(section, network(), big)
    assert module.pairs == ((0, 0), (1, 1), (2, 3), (3, 4))
    assert {name: tuple(fit.weight.shape) for name, fit in module.fits.items()} == dict.fromkeys("0123", (24, 16))  # type: ignore[union-attr]
    assert len(module.blocks()) == 0 + 1  # attention looks into all but one layer
    loss = Distilled(True, section)(module, Micro(make_batch(), torch.tensor(1.0), torch.tensor(1.0)), 0.5)["loss"]
    loss.backward()
    assert all(fit.weight.grad.abs().sum() > 0 for fit in module.fits.values())  # type: ignore[union-attr]


def test_layers_to_compare():
    assert layer_pairs("last", 3, 12) == ((3, 12),)
    assert layer_pairs("even", 4, 12) == ((0, 0), (1, 3), (2, 6), (3, 9), (4, 12))
    assert layer_pairs([(0, 0), (1, 7)], 4, 12) == ((0, 0), (1, 7))
    with pytest.raises(ValueError, match=r"pretrain.distill.layers names layer 5 of the student, which has 4"):
        layer_pairs([(5, 1)], 4, 12)
    with pytest.raises(ValueError, match="layer 13 of the teacher, which has 12"):
        layer_pairs([(1, 13)], 4, 12)
