"""The slice, run inside the super-network, is the extracted encoder: weights, outputs, gradients, sizes, order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from frugalbert.model import modeling, slicing
from frugalbert.model.arch import Arch
from frugalbert.model.configuration import FrugalConfig
from frugalbert.model.cost import parameter_count

VOCABULARY = 37
BIG = {
    "bert": "bert 3x24 heads=4 head_dim=8 ffn=40 max_length=16",
    "bert-preln": "bert-preln 3x24 heads=4 head_dim=8 ffn=40 max_length=16 pattern=dense,window:3,dense",
    "modern": "modern 3x24 heads=4 head_dim=8 ffn=40 max_length=16 qk_norm=yes",
    "modern-norm": "modern 3x24 heads=4 head_dim=8 ffn=40 max_length=16 embedding_norm=yes",
}
HEADS = {
    "mlm": modeling.FrugalForMaskedLM,
    "pairs": modeling.FrugalForPairs,
    "rtd": modeling.FrugalForReplacedTokenDetection,
    "sequence": modeling.FrugalForSequenceClassification,
    "token": modeling.FrugalForTokenClassification,
    "encoder": modeling.FrugalModel,
}


CLOSE = {torch.float64: 1e-12, torch.float32: 1e-5}
"""Some processors sum a product in another order if the lines of its matrices lie further apart, as in a slice."""


def big_model(family: str, head: str = "mlm", dtype: torch.dtype = torch.float64) -> Any:
    """Every number random: norms of 1 and biases of 0 would hide a wrong slice."""
    torch.manual_seed(3)
    model = HEADS[head](FrugalConfig.from_arch(Arch.parse(BIG[family]), VOCABULARY)).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm.weight" in name else 0.0, 0.3)
    return model


def ragged(head: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (3, 9), generator=generator)
    mask = torch.arange(9)[None] < torch.tensor([9, 4, 1])[:, None]
    inputs = {"input_ids": ids * mask, "attention_mask": mask.long()}
    if head == "mlm":
        inputs["labels"] = torch.where(mask, torch.randint(0, VOCABULARY, (3, 9), generator=generator), -100)
    if head in ("rtd", "token"):
        inputs["labels"] = torch.randint(0, 2, (3, 9), generator=generator)
    if head == "sequence":
        inputs["labels"] = torch.tensor([0, 1, 1])
    return inputs


def random_slice(big: Arch, rng: np.random.Generator, *, setting: str) -> tuple[Arch, tuple[int, ...]]:
    """AutoTinyBERT's two settings (whole heads; parts of every head), and everything free layer by layer."""
    value = big.to_json()
    depth = int(rng.integers(1, len(big.layers) + 1))
    layers = tuple(sorted(rng.choice(len(big.layers), depth, replace=False).tolist()))
    if setting != "free" or (big.family == "modern" and big.embedding_norm):
        layers = tuple(range(depth))
    hidden = int(rng.integers(2, big.hidden + 1))
    new = []
    for index in layers:
        layer = big.layers[index]
        free = setting == "free"
        new.append(
            {
                "hidden": int(rng.integers(1, hidden + 1)) if free else hidden,
                "heads": layer.heads if setting == "kd" else int(rng.integers(1, layer.heads + 1)),
                "head_dim": layer.head_dim if setting == "mlm" else 2 * int(rng.integers(1, layer.head_dim // 2 + 1)),
                "ffn": int(rng.integers(1, layer.ffn + 1)),
                "pattern": layer.pattern,
            }
        )
    return Arch.from_json({**value, "hidden": hidden, "layers": new}), layers


def numbers(output: Any) -> Tensor:
    return output.logits if "logits" in output else output.last_hidden_state


@pytest.mark.parametrize("family", BIG)
@pytest.mark.parametrize("head", HEADS)
def test_a_slice_inside_the_super_network_is_the_extracted_encoder(family: str, head: str) -> None:
    inputs, rng = ragged(head), np.random.default_rng(5)
    for dtype in (torch.float64, torch.float32):
        model = big_model(family, head, dtype)
        arch = model.config.to_arch()
        for _ in range(3):
            for setting in ("mlm", "kd", "free"):
                small, layers = random_slice(arch, rng, setting=setting)
                alone = slicing.extract(model, small, layers)
                inside = slicing.forward(model, small, layers, **inputs, output_hidden_states=True)
                outside = alone(**inputs, output_hidden_states=True)
                weights = slicing.view(dict(model.named_parameters()), arch, small, layers)
                assert all(torch.equal(weights[name], parameter) for name, parameter in alone.named_parameters())
                pairs = [
                    (numbers(inside), numbers(outside)),
                    *zip(inside.hidden_states, outside.hidden_states, strict=True),
                ]
                for here, there in pairs:
                    torch.testing.assert_close(here, there, rtol=CLOSE[dtype], atol=CLOSE[dtype])
                assert sum(p.numel() for p in alone.parameters()) == parameter_count(small, VOCABULARY, head)
                assert alone.config.to_arch() == small


@pytest.mark.parametrize("family", BIG)
@pytest.mark.parametrize("setting", ["mlm", "kd", "free"])
def test_gradients_reach_the_slice_and_nothing_else(family: str, setting: str) -> None:
    inputs, model = ragged("mlm"), big_model(family)
    arch = model.config.to_arch()
    for seed in range(4):
        small, layers = random_slice(arch, np.random.default_rng(seed), setting=setting)
        alone = slicing.extract(model, small, layers)
        alone(**inputs).loss.backward()
        model.zero_grad()
        slicing.forward(model, small, layers, **inputs).loss.backward()
        gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
        inside = slicing.view(gradients, arch, small, layers)
        for name, parameter in alone.named_parameters():
            torch.testing.assert_close(inside[name], parameter.grad, rtol=1e-10, atol=1e-12)
        used = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in model.named_parameters()}
        unused = slicing.sliced(used, arch, [(small, layers)])
        for name, gradient in gradients.items():
            assert not gradient[~used[name]].any(), name
            assert (name in unused) == (not used[name].any())


@pytest.mark.parametrize("family", BIG)
def test_a_wrong_slice_is_noticed(family: str) -> None:
    """The control: one head further on is another encoder."""
    inputs, model = ragged("mlm"), big_model(family)
    arch = model.config.to_arch()
    small, layers = random_slice(arch, np.random.default_rng(2), setting="mlm")
    assert small.layers[0].heads < arch.layers[0].heads
    weights = slicing.view(dict(model.named_parameters()), arch, small, layers)
    size = small.layers[0].qkv
    for name in ("query", "key", "value"):
        key = f"model.layers.0.attention.{name}.weight"
        rows = dict(model.named_parameters())[key][8 : 8 + size, : small.hidden]
        assert rows.shape == weights[key].shape
        weights[key] = rows
    wrong = torch.func.functional_call(slicing.skeleton(model, small), weights, kwargs=inputs)
    assert (wrong.logits - slicing.extract(model, small, layers)(**inputs).logits).abs().max() > 1e-3


@pytest.mark.parametrize("family", BIG)
def test_the_largest_slice_is_the_whole(family: str) -> None:
    model, inputs = big_model(family), ragged("mlm")
    assert torch.equal(slicing.forward(model, model.config.to_arch(), **inputs).logits, model(**inputs).logits)


def test_slices_train_in_training_mode_and_keep_the_settings() -> None:
    model = big_model("bert")
    model.config.hidden_dropout_prob = 0.5
    small = Arch.parse("bert 2x16 heads=2 head_dim=8 ffn=20 max_length=16")
    assert not slicing.skeleton(model, small).training
    shell = slicing.skeleton(model.train(), small)
    assert shell.training
    assert shell.model.embeddings.dropout.p == 0.5
    assert slicing.extract(model, small).training


def test_a_saved_slice_comes_back(tmp_path: Any) -> None:
    model, inputs = big_model("modern", dtype=torch.float32), ragged("mlm")
    small, layers = random_slice(model.config.to_arch(), np.random.default_rng(0), setting="free")
    alone = slicing.extract(model, small, layers)
    alone.save_pretrained(tmp_path)
    again = modeling.FrugalForMaskedLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(**inputs).logits, alone(**inputs).logits)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("bert 4x24 heads=4 head_dim=8 ffn=40 max_length=16", "no slice of one of 3"),
        ("bert 3x32 heads=4 head_dim=8 ffn=40 max_length=16", "32 channels"),
        ("bert 3x24 heads=5 head_dim=8 ffn=40 max_length=16", "heads 4; 5"),
        ("bert 3x24 heads=4 head_dim=9 ffn=40 max_length=16", "head_dim 8; 9"),
        ("bert 3x24 heads=4 head_dim=8 ffn=41 max_length=16", "ffn 40; 41"),
        ("bert 3x24 heads=4 head_dim=8 ffn=40", "max_length is 512 here and 16"),
        ("modern 3x24 heads=4 head_dim=8 ffn=40 max_length=16", "family"),
        ("bert 3x24 heads=4 head_dim=8 ffn=40 max_length=16 pattern=window:2", "attends dense"),
    ],
)
def test_what_does_not_fit_is_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        slicing.check(Arch.parse(BIG["bert"]), Arch.parse(text))


def test_layers_are_chosen_in_order_and_modern_keeps_its_first() -> None:
    big = Arch.parse(BIG["bert"])
    two = Arch.parse("bert 2x24 heads=4 head_dim=8 ffn=40 max_length=16")
    assert slicing.check(big, two, (0, 2)) == (0, 2)
    for wrong in ((2, 0), (1, 1), (0,), (0, 3)):
        with pytest.raises(ValueError, match="layers"):
            slicing.check(big, two, wrong)
    modern = Arch.parse(BIG["modern-norm"])
    with pytest.raises(ValueError, match="first layer"):
        slicing.check(modern, Arch.from_json({**modern.to_json(), "layers": modern.to_json()["layers"][1:]}), (1, 2))
    twelve = Arch.parse("bert 12x24 heads=4 head_dim=8 ffn=40")
    assert slicing.kept_layers(twelve, 4) == (0, 1, 2, 3)
    assert slicing.kept_layers(twelve, 4, "even") == (0, 4, 7, 11)
    assert slicing.kept_layers(twelve, 12, "even") == tuple(range(12))


@pytest.mark.parametrize("family", BIG)
@pytest.mark.parametrize("head", ["mlm", "sequence"])
def test_reordering_changes_no_output_but_what_slices_keep(family: str, head: str) -> None:
    inputs, model = ragged(head), big_model(family, head)
    arch = model.config.to_arch()
    before = model(**inputs).logits.detach()
    small = random_slice(arch, np.random.default_rng(2), setting="mlm")[0]
    inside = slicing.forward(model, small, **inputs).logits.detach()
    model(**inputs).loss.backward()
    scores = slicing.importance(model)
    slicing.reorder(model, slicing.ranking(scores))
    torch.testing.assert_close(model(**inputs).logits, before, rtol=1e-9, atol=1e-9)
    assert (slicing.forward(model, small, **inputs).logits - inside).abs().max() > 1e-3
    model.zero_grad()
    model(**inputs).loss.backward()
    after = slicing.importance(model)
    for name in scores:
        for old, new in zip(scores[name], after[name], strict=True):
            torch.testing.assert_close(new, old.sort(descending=True).values, rtol=1e-4, atol=1e-6)


def test_importance_is_the_slope_of_a_factor_on_the_unit() -> None:
    """|dL/dm| of one feed-forward unit and one head, by finite differences on the weights that carry it on."""
    inputs, model = ragged("mlm"), big_model("bert")
    model(**inputs).loss.backward()
    scores = slicing.importance(model)
    for name, columns, score in (
        ("model.layers.1.ffn.output.weight", slice(5, 6), scores["ffn"][1][5]),
        ("model.layers.2.attention.output.weight", slice(8, 16), scores["heads"][2][1]),
    ):
        weight = dict(model.named_parameters())[name]
        losses = []
        for factor in (1 + 1e-5, 1 - 1e-5):
            with torch.no_grad():
                kept = weight.clone()
                weight[:, columns] *= factor
                losses.append(model(**inputs).loss.item())
                weight.copy_(kept)
        assert abs(losses[0] - losses[1]) / 2e-5 == pytest.approx(score.item(), rel=1e-3)


def test_an_unknown_parameter_is_refused() -> None:
    with pytest.raises(ValueError, match="AXES"):
        slicing.axes_of("model.layers.0.something.weight")
