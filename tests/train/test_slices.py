"""What slices learn and what a step may move: sampling, losses against their formulas, unsampled weights left alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from frugalbert.config import Supernet
from frugalbert.data.masking import Batch
from frugalbert.model.arch import Arch
from frugalbert.model.configuration import FrugalConfig
from frugalbert.model.cost import encoder_parameters
from frugalbert.model.modeling import FrugalForMaskedLM
from frugalbert.space import Space
from frugalbert.train import distill
from frugalbert.train.batches import Micro
from frugalbert.train.optim import OptimizerSettings, make_optimizer
from frugalbert.train.slices import (
    OnlySampled,
    Sampling,
    SliceLosses,
    SliceMicro,
    SuperNetwork,
    validated_archs,
    with_archs,
)
from frugalbert.train.state import Drawn

SPACE = Space(depth=(1, 2, 3), hidden=(8, 12, 16), heads=(1, 2), head_dim=(4,), ffn=(8, 16, 24))
VOCABULARY = 29


def network(arch: Arch | None = None, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = FrugalForMaskedLM(FrugalConfig.from_arch(arch or SPACE.largest(), VOCABULARY))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def make_batch(seed: int = 0, rows: int = 3, length: int = 10) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, VOCABULARY, (rows, length), generator=generator)
    documents = torch.ones(rows, length, dtype=torch.int64)
    documents[1, 5:], documents[2, 7:] = 2, 0
    places = torch.arange(length).repeat(rows, 1)
    places[1, 5:] -= 5
    masked = torch.tensor([1, 4, 11, 17, 22, 23])
    labels = ids.flatten()[masked].clone()
    labels[-1] = -100
    ids = ids.masked_fill(documents == 0, 0)
    return Batch(ids, places * (documents > 0), documents, masked, labels, torch.rand(6, generator=generator))


def losses(**values: Any) -> SliceLosses:
    settings = {"isolate": True, "inplace_weight": 1.0, "combine": "mean", "validated": validated_archs(SPACE)}
    return SliceLosses(**{**settings, **values})


# ---- which architectures ---------------------------------------------------------------------------------------------


def sampling(strategy: str = "sandwich", **values: Any) -> Sampling:
    section = Supernet.model_validate({"budget": "10steps", "sampling": strategy, **values})
    return Sampling.of(section, SPACE)


def test_a_sandwich_is_the_largest_some_others_and_the_smallest():
    for position in range(20):
        archs = sampling(random_archs=3).draw(position, 0.3)
        assert len(archs) == 5
        assert (archs[0], archs[-1]) == (SPACE.largest(), SPACE.smallest())
        assert all(SPACE.contains(arch) for arch in archs)


def test_a_batch_has_its_architectures_from_seed_and_position_alone():
    one, other = sampling(seed=1), sampling(seed=2)
    assert [one.draw(p, 0.5) for p in range(8)] == [sampling(seed=1).draw(p, 0.5) for p in range(8)]
    assert [one.draw(p, 0.5) for p in range(8)] != [other.draw(p, 0.5) for p in range(8)]
    assert len({one.draw(p, 0.5)[1] for p in range(30)}) > 10


def test_every_strategy_draws_what_it_says():
    assert all(len(sampling("random", random_archs=3).draw(p, 0.0)) == 3 for p in range(5))
    alternate = [sampling("alternate").draw(p, 0.0) for p in range(200)]
    assert all(len(archs) == 1 for archs in alternate)
    assert 60 < sum(archs == (SPACE.largest(),) for archs in alternate) < 140
    rising = [sum(sampling("random-linear").draw(p, share) == (SPACE.largest(),) for p in range(100))
              for share in (0.0, 0.5, 1.0)]  # fmt: skip
    assert rising[0] == 100
    assert 30 < rising[1] < 70
    assert rising[2] < 10
    everything = sampling("all").draw(0, 0.0)
    assert len(everything) == len(set(everything)) == SPACE.size()
    assert everything[0] == SPACE.largest()


def test_stratified_draws_give_the_smallest_their_turn():
    """Uniform draws on the product grid hardly ever give the lower third of the parameter range."""
    wide = Space(
        depth=(1, 2, 4, 8), hidden=tuple(range(16, 257, 16)), heads=(1, 2, 4), head_dim=(16,), ffn=(32, 512, 1024)
    )
    ends = [np.log(encoder_parameters(arch)) for arch in (wide.smallest(), wide.largest())]
    share = {}
    for stratified in (False, True):
        draw = Sampling(wide, "random", 1, stratified, 0)
        sizes = np.log([encoder_parameters(draw.draw(p, 0.0)[0]) for p in range(400)])
        share[stratified] = (sizes < ends[0] + (ends[1] - ends[0]) / 3).mean()
    assert share[True] > 2 * share[False]


def test_all_micro_batches_of_a_step_have_the_same_architectures():
    def draw(progress: float, samples: dict[str, int], micro_batch: int) -> Drawn:
        micro = Micro(make_batch(), torch.tensor(1.0), torch.tensor(1.0))
        return Drawn([micro, micro], torch.tensor(10.0), {"32": samples.get("32", 0) + 8}, 0.1)

    wrapped = with_archs(draw, sampling())
    one, two = wrapped(0.0, {}, 4).micros, wrapped(0.0, {"32": 8}, 4).micros
    assert one[0].archs == one[1].archs != two[0].archs


# ---- what they learn -------------------------------------------------------------------------------------------------


def test_the_first_teaches_the_others_and_is_not_moved_by_it():
    model, batch = SuperNetwork(network(), "first").train(), make_batch()
    archs = (SPACE.largest(), SPACE.smallest())
    found = losses(inplace_weight=0.7).measure(model, batch, archs)
    target = found[0]["logits"].log_softmax(-1)[:5]
    student = found[1]["logits"].log_softmax(-1)[:5]
    divergence = (target.exp() * (target - student)).sum(-1).mean()
    text = torch.nn.functional.cross_entropy(found[1]["logits"], batch.labels, ignore_index=-100)
    torch.testing.assert_close(found[1]["loss"], text)
    torch.testing.assert_close(found[1]["total"], text + 0.7 * divergence)
    assert found[0]["total"] is found[0]["loss"]
    weights = list(model.parameters())
    distance = found[1]["total"] - found[1]["loss"]
    gradients = torch.autograd.grad(distance, weights, allow_unused=True)
    corner = model.network.model.layers[2].ffn.input.weight
    reached = dict(zip([name for name, _ in model.named_parameters()], gradients, strict=True))
    assert reached["network.model.layers.2.ffn.input.weight"] is None, corner.shape  # only the largest has layer 2


def test_a_student_that_equals_its_teacher_has_nothing_to_learn():
    logits = torch.randn(6, VOCABULARY, requires_grad=True)
    hard, total = distill.soft_label_loss(logits, make_batch().labels, logits.detach(), 3.0)
    assert total.item() == pytest.approx(hard.item(), abs=1e-6)
    torch.testing.assert_close(
        torch.autograd.grad(total - hard, logits)[0], torch.zeros_like(logits), atol=1e-7, rtol=0
    )


def test_micro_batches_add_up_and_sums_are_means_times_the_number():
    model, batch = SuperNetwork(network(), "first"), make_batch()
    archs = (SPACE.largest(), SPACE.smallest())
    item = SliceMicro(Micro(batch, torch.tensor(0.25), torch.tensor(0.5)), archs)
    mean, added = losses()(model, item, 0.0), losses(combine="sum")(model, item, 0.0)
    torch.testing.assert_close(added["loss"], 2 * mean["loss"])
    whole = losses()(model, SliceMicro(Micro(batch, torch.tensor(1.0), torch.tensor(1.0)), archs), 0.0)
    torch.testing.assert_close(whole["loss"], 4 * mean["loss"])


def teacher_and_student() -> tuple[SuperNetwork, Batch]:
    """The teacher is the encoder itself, so every distance of the largest slice is zero."""
    itself = network()
    model = SuperNetwork(itself, "first", itself.model).eval()
    assert model.fit is not None
    with torch.no_grad():
        model.fit.weight.copy_(torch.eye(16))
    return model, make_batch()


@pytest.mark.parametrize("kind", ["attention", "hidden", "relation"])
def test_the_distance_to_oneself_is_zero_and_so_is_its_gradient(kind: str):
    model, batch = teacher_and_student()
    objective = losses(distilled=(kind,), relation_heads=4)
    space_heads = SPACE.largest()
    smaller = Arch.parse("bert 2x12 heads=2 head_dim=4 ffn=16")
    own, other = (found["total"] for found in objective.measure(model, batch, (space_heads, smaller)))
    assert own.item() == pytest.approx(0.0, abs=1e-10)
    assert other.item() > 1e-4
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    for gradient in torch.autograd.grad(own, weights, allow_unused=True):
        assert gradient is None or gradient.abs().max() < 1e-6


def test_padding_changes_no_distance():
    model, batch = teacher_and_student()
    objective = losses(distilled=("attention", "hidden", "relation"), relation_heads=2)
    arch = Arch.parse("bert 2x12 heads=2 head_dim=4 ffn=16")
    before = objective.measure(model, batch, (arch,))[0]["total"]
    batch.input_ids[2, 7:] = 9
    torch.testing.assert_close(objective.measure(model, batch, (arch,))[0]["total"], before)
    batch.input_ids[2, 3] = 9
    assert (objective.measure(model, batch, (arch,))[0]["total"] - before).abs() > 1e-6


def last_states(seed: int, heads: int, size: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, heads, 4, size, generator=generator) for _ in range(3))


DOCUMENTS = torch.tensor([[1, 1, 2, 2], [1, 1, 1, 0]])


@pytest.mark.parametrize("isolate", [True, False])
def test_losses_equal_their_formulas_written_out(isolate: bool):
    student, teacher = last_states(1, 2, 3), last_states(2, 2, 5)
    pairs = distill.pairs_of(DOCUMENTS, isolate=isolate)
    allowed = [
        (b, i, j)
        for b in range(2)
        for i in range(4)
        for j in range(4)
        if DOCUMENTS[b, i] > 0 and DOCUMENTS[b, j] > 0 and (not isolate or DOCUMENTS[b, i] == DOCUMENTS[b, j])
    ]

    def logit(states: Any, b: int, h: int, i: int, j: int) -> Tensor:
        return states[0][b, h, i] @ states[1][b, h, j] / states[0].shape[-1] ** 0.5

    squares = [(logit(student, b, h, i, j) - logit(teacher, b, h, i, j)) ** 2
               for b, i, j in allowed for h in range(2)]  # fmt: skip
    torch.testing.assert_close(distill.attention_loss(student, teacher, pairs), torch.stack(squares).mean())
    real = DOCUMENTS > 0
    projected, hidden = torch.randn(2, 2, 4, 8)
    torch.testing.assert_close(
        distill.hidden_loss(projected, hidden, DOCUMENTS), (projected - hidden)[real].square().mean()
    )


def test_relations_equal_their_formula_written_out():
    student, teacher = last_states(1, 2, 3), last_states(2, 4, 6)
    pairs = distill.pairs_of(DOCUMENTS, isolate=True)
    heads, terms = 3, []
    for mine, other in zip(student, teacher, strict=True):
        split = [x.transpose(1, 2).reshape(2, 4, heads, -1) for x in (mine, other)]
        for b in range(2):
            for h in range(heads):
                for i in range(4):
                    near = [j for j in range(4) if pairs[b, 0, i, j]]
                    if not near:
                        continue
                    p, q = (
                        torch.stack([x[b, i, h] @ x[b, j, h] for j in near]).div(x.shape[-1] ** 0.5).softmax(0)
                        for x in reversed(split)
                    )
                    terms.append((p * (p / q).log()).sum())
    torch.testing.assert_close(distill.relation_loss(student, teacher, pairs, heads), torch.stack(terms).mean())


def test_unequal_heads_are_refused():
    pairs = distill.pairs_of(DOCUMENTS, isolate=True)
    with pytest.raises(ValueError, match="2 heads cannot be compared with the teacher's 4"):
        distill.attention_loss(last_states(1, 2, 3), last_states(2, 4, 6), pairs)
    with pytest.raises(ValueError, match="relation_heads 4 does not divide the 6"):
        distill.relation_loss(last_states(1, 2, 3), last_states(2, 4, 6), pairs, 4)


# ---- what a step may move --------------------------------------------------------------------------------------------


def steps(update: str, name: str) -> tuple[SuperNetwork, torch.optim.Optimizer, list[dict[str, Any]]]:
    """A step with the largest, so that momentum exists, then one with small ones only; weights and states of each."""
    model = SuperNetwork(network(), "first").train()
    settings = OptimizerSettings(name, learning_rate=0.05, weight_decay=0.1, muon_learning_rate=0.05)
    optimizer = make_optimizer(model, settings)
    archs = [(SPACE.largest(),), (SPACE.smallest(), Arch.parse("bert 2x12 heads=1 head_dim=4 ffn=16"))]
    turn = iter(archs)

    def draw(progress: float, samples: dict[str, int], micro_batch: int) -> Drawn:
        micro = Micro(make_batch(), torch.tensor(1.0), torch.tensor(1.0))
        return Drawn([SliceMicro(micro, next(turn))], torch.tensor(1.0), {}, 0.0)

    watched = OnlySampled(model, optimizer).watch(draw) if update == "sampled" else draw
    seen: list[dict[str, Any]] = []
    for _ in archs:
        optimizer.zero_grad()
        losses()(model, watched(0.0, {}, 1).micros[0], 0.0)["loss"].backward()
        optimizer.step()
        states = {
            f"{key}/{label}": value.clone()
            for key, weight in model.named_parameters()
            for label, value in [("weight", weight.detach()), *optimizer.state[weight].items()]
            if torch.is_tensor(value) and value.shape == weight.shape
        }
        seen.append(states)
    return model, optimizer, seen


@pytest.mark.parametrize("name", ["adamw", "muon", "lamb", "sgd"])
def test_what_no_slice_used_stays_as_it_was(name: str):
    _, _, (first, second) = steps("sampled", name)
    key = "network.model.layers.0.ffn.input.weight/"
    for label in {full.split("/")[1] for full in first}:
        if key + label not in first:
            continue
        before, after = first[key + label], second[key + label]
        assert torch.equal(before[16:], after[16:]), label
        assert torch.equal(before[:, 12:], after[:, 12:]), label
        assert not torch.equal(before[:8, :8], after[:8, :8]), label
    whole_layer = "network.model.layers.2.ffn.input.weight/weight"
    assert torch.equal(first[whole_layer], second[whole_layer])


def test_without_it_momentum_and_decay_move_everything():
    _, _, (first, second) = steps("all", "adamw")
    key = "network.model.layers.0.ffn.input.weight/weight"
    assert not torch.equal(first[key][16:], second[key][16:])
