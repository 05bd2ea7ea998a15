"""Closed-form costs equal what the real models have and do."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from frugalbert.model import cost
from frugalbert.model.arch import Arch
from frugalbert.model.configuration import FrugalConfig
from frugalbert.model.modeling import FrugalForMaskedLM, FrugalModel
from tests.conftest import ROOT
from tests.model.archs import CLASSES, VOCABULARY, archs

META = torch.device("meta")


def on_meta(arch: Arch, head: str, **settings: object) -> torch.nn.Module:
    with META:
        return CLASSES[head](FrugalConfig.from_arch(arch, VOCABULARY, **settings))


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@settings(derandomize=True, deadline=None, max_examples=40)
@given(archs(), st.sampled_from(cost.HEADS), st.integers(2, 5))
def test_parameters_are_the_models(arch: Arch, head: str, labels: int):
    model = on_meta(arch, head, num_labels=labels)
    assert cost.parameter_count(arch, VOCABULARY, head, labels) == count(model)
    encoder = model if head == "encoder" else model.model
    assert cost.embedding_parameters(arch, VOCABULARY) == count(encoder.embeddings)
    final = 0 if encoder.final_norm is None else count(encoder.final_norm)
    assert cost.encoder_parameters(arch) == count(encoder.layers) + final


def labels_for(head: str, batch: int, length: int, masked: int) -> dict[str, torch.Tensor]:
    """Labels of the right shapes, `masked` tokens a row; their values do not matter on the meta device."""
    if head in ("mlm", "pairs"):
        places = torch.zeros(batch, masked).long()
        pairs = {"pair_labels": torch.zeros(batch).long()} if head == "pairs" else {}
        return {"masked_positions": places, "labels": places.flatten(), **pairs}
    if head == "span":
        return {name: torch.zeros(batch).long() for name in ("start_positions", "end_positions")}
    shape = {"rtd": (batch, length), "token": (batch, length), "sequence": (batch,), "choice": (1,)}
    return {"labels": torch.zeros(shape[head]).long()} if head in shape else {}


@settings(derandomize=True, deadline=None, max_examples=15)
@given(
    archs(windows=False), st.sampled_from(cost.HEADS), st.integers(1, 3), st.integers(1, 9), st.integers(1, 4),
    st.booleans(),
)  # fmt: skip
def test_operations_are_the_models(arch: Arch, head: str, batch: int, length: int, masked: int, whole: bool):
    model = on_meta(arch, head, num_labels=3).train()
    with META:
        ids = torch.zeros((1, batch, length) if head == "choice" else (batch, length), dtype=torch.long)
        inputs, words = labels_for(head, batch, length, masked), head in ("mlm", "pairs")
        if words and (whole or head == "pairs"):
            inputs["masked_positions"] = inputs["masked_positions"].flatten()
        with FlopCounterMode(display=False) as forward:
            output = model(ids, **inputs)
        with FlopCounterMode(display=False) as backward:
            (output.last_hidden_state.sum() if head == "encoder" else output.loss).backward()
    tokens, share = batch * length, masked / length
    expected = cost.forward_flops(arch, length, vocab_size=VOCABULARY, masked=share, head=head, num_labels=3)
    assert head == "mlm" or forward.get_total_flops() == pytest.approx(expected * tokens)
    if words:
        training = cost.training_flops(arch, VOCABULARY, length, share, head, whole=whole)
        assert forward.get_total_flops() == pytest.approx(training / 3.0 * tokens)
        assert forward.get_total_flops() + backward.get_total_flops() == pytest.approx(training * tokens)


def test_the_formula_of_the_books():
    """F = 6 N + 12 L d s + 6 p (V d + d^2), and the worked examples beside it: 0.57 and 1.88 GFLOP per token."""
    arch = Arch.parse("modern 12x768 heads=12 ffn=2048")
    matrices = 12 * (4 * 768**2 + 3 * 768 * 2048)
    assert cost.matmul_parameters(arch) == matrices
    expected = 6 * matrices + 12 * 12 * 768 * 128 + 6 * 0.3 * (32768 * 768 + 768**2)
    assert cost.training_flops(arch, 32768, 128, 0.3, whole=True) == pytest.approx(expected)
    assert cost.training_flops(arch, 32768, 128, 0.3, whole=True) == pytest.approx(0.57e9, rel=0.01)
    assert cost.training_flops(Arch.parse("24hbert"), 30528, 128, 0.15, whole=True) == pytest.approx(1.88e9, rel=0.01)
    spared = 6 * 0.7 * (2 * 768**2 + 3 * 768 * 2048 + 2 * 768 * 128)
    assert cost.training_flops(arch, 32768, 128, 0.3) == pytest.approx(expected - spared)


def test_a_window_costs_what_it_sees():
    dense = cost.forward_flops(Arch.parse("modern 2x64 heads=2 ffn=64"), 128)
    narrow = Arch.parse("modern 2x64 heads=2 ffn=64 pattern=window:8")
    assert dense - cost.forward_flops(narrow, 128) == 2 * 4 * 64 * (128 - (17 * 128 - 8 * 9) / 128)
    assert cost.forward_flops(narrow, 9) == cost.forward_flops(Arch.parse("modern 2x64 heads=2 ffn=64"), 9)


def test_an_unknown_head_is_named():
    with pytest.raises(ValueError, match="'masked' is no head; write one of encoder, mlm"):
        cost.parameter_count(Arch.parse("bert-tiny"), 100, "masked")


# ---- published counts ----------------------------------------------------------------------------------------------


def test_24hbert():
    """336,230,208 with final norm, masked-LM head and pooler; counted without memory on the meta device."""
    arch = Arch.parse("24hbert")
    with META:
        config = FrugalConfig.from_arch(arch, 30528)
        model, pooler = FrugalForMaskedLM(config), FrugalModel(config).pooler
    assert count(model) + count(pooler) == 336_230_208
    assert cost.parameter_count(arch, 30528, "mlm") + cost.head_parameters(arch, 30528, "encoder") == 336_230_208
    assert cost.layer_parameters(arch, arch.layers[0]) == 12_596_224
    assert cost.encoder_parameters(arch) == 302_309_376 + 2 * 1024
    assert cost.embedding_parameters(arch, 30528) == 31_787_008


def test_bort():
    arch = Arch.parse("bort")
    assert cost.encoder_parameters(arch) == 23_108_608
    assert cost.embedding_parameters(arch, 50265) == 51_997_696
    assert cost.head_parameters(arch, 50265, "mlm") == 1_101_913
    assert cost.parameter_count(arch, 50265, "mlm") == 76_208_217


@pytest.mark.parametrize(
    ("name", "parameters", "gflop"),
    [
        ("bert-base", 109_482_240, 22.35),
        ("autotinybert-s1", 29_573_882, 3.17),
        ("autotinybert-s2", 16_874_724, 1.23),
        ("autotinybert-s3", 16_707_024, 0.86),
        ("autotinybert-s4", 12_195_168, 0.60),
        ("autotinybert-kd-s1", 29_585_252, 3.18),
        ("autotinybert-kd-s2", 14_222_712, 1.14),
        ("autotinybert-kd-s3", 11_763_620, 0.85),
        ("autotinybert-kd-s4", 9_791_360, 0.50),
    ],
)
def test_autotinybert(name: str, parameters: int, gflop: float):
    """Table of the published models: parameters with pooler, operations of one text of 128 tokens."""
    arch = Arch.parse(name)
    assert cost.parameter_count(arch, 30522) == parameters
    assert cost.forward_flops(arch, 128) * 128 / 1e9 == pytest.approx(gflop, abs=0.0051)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("bert-tiny", 4.4), ("bert-mini", 11.2), ("bert-small", 28.8), ("bert-medium", 41.4), ("bert-large", 335.1)],
)
def test_googles_sizes(name: str, millions: float):
    assert cost.parameter_count(Arch.parse(name), 30522) / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize(
    ("name", "millions", "without"),
    [("modern-17m", 17, 3.9), ("modern-32m", 32, 12.5), ("modern-68m", 68, 42), ("modern-150m", 149, 110)],
)
def test_modern_sizes(name: str, millions: float, without: float):
    """All parameters at ModernBERT's vocabulary, and those of the layers."""
    arch = Arch.parse(name)
    assert cost.parameter_count(arch, 50368) / 1e6 == pytest.approx(millions, rel=0.03)
    assert cost.encoder_parameters(arch) / 1e6 == pytest.approx(without, rel=0.03)


def test_borts_sizes_are_counted():
    """Both tables of `docs/methods.md` on Bort, cell by cell, and the words above and between them."""
    page = (ROOT / "docs" / "methods.md").read_text().split("## What Bort's published sizes count")[1].split("\n## ")[0]
    rows = [re.split(r"\s*\|\s*", line.strip("| ")) for line in page.splitlines() if line.startswith("| `")]
    large, base = Arch.parse("bert-large"), Arch.parse("bert-base")
    whole, vocabulary, seen = cost.encoder_parameters(large), 50265, []
    for shape, *cells in rows:
        arch = Arch.parse(shape.split("`")[1])
        seen.append(len(cells))
        if len(cells) == 4:
            ratios = [
                _layers(other, length) / _layers(arch, length) for other in (large, base) for length in (128, 512)
            ]
            assert cells == [f"{ratio:.1f}" for ratio in ratios], shape
            continue
        layers, table = cost.encoder_parameters(arch), cost.embedding_parameters(arch, vocabulary)
        head, pooler = (cost.head_parameters(arch, vocabulary, kind) for kind in ("mlm", "encoder"))
        counts = (layers, table, head, layers + table, layers + table + head, layers + table + head + pooler)
        assert cells == [*(f"{number:,}" for number in counts), f"{100 * layers / whole:.1f} %"], shape
        assert f"of which {counts[5] - table:,} (30.3 %)" in " ".join(page.split()) or "swapped" not in shape
    assert seen == [7, 7, 7, 4, 4]
    assert f"{whole:,}" in page
    assert pytest.approx(0.303, abs=5e-4) == 16_993_369 / 55_991_641
    assert cost.encoder_parameters(Arch.parse("bort")) == 23_108_608


def _layers(arch: Arch, length: int) -> float:
    """Operations of the layers alone."""
    return length * cost.forward_flops(arch, length) - 2 * arch.hidden**2
