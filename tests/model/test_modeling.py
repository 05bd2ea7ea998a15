"""The encoder: equal to the plain maths; blind to padding, to other documents and to how it is run."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frugalbert.model.arch import Arch
from frugalbert.model.attention import additive, never_empty, pattern_pairs, visible_pairs
from tests.model.archs import VOCABULARY, archs, build, tokens
from tests.model.plain import Plain

FEW = settings(derandomize=True, deadline=None, max_examples=25)
BERT = "bert 2x16 heads=2 ffn=24 max_length=40"
PRENORM = "bert-preln 2x16 heads=2 ffn=24 max_length=40"
MODERN = "modern 3x16 hidden=16,12,16 heads=2 head_dim=4 ffn=24 pattern=dense,window:2,dense qk_norm=yes"
EACH = pytest.mark.parametrize("line", [BERT, PRENORM, MODERN])


@FEW
@given(archs(), st.integers(1, 7), st.integers(0, 99))
def test_it_is_the_plain_maths(arch: Arch, length: int, seed: int):
    model = build(arch).double()
    ids = tokens(2, length, seed=seed)
    types = ids % max(1, arch.token_types)
    given_types = types if arch.token_types else None
    with torch.no_grad():
        states = model(ids, token_type_ids=given_types).last_hidden_state
    plain = Plain(arch, model.state_dict())
    for row in range(2):
        assert torch.allclose(states[row], plain(ids[row], types[row]), rtol=1e-5, atol=1e-6)


@FEW
@given(archs(), st.integers(1, 6), st.integers(0, 6), st.integers(0, 99))
def test_padding_changes_nothing(arch: Arch, length: int, padding: int, seed: int):
    model = build(arch).double()
    ids = tokens(2, length + padding, seed=seed)
    mask = torch.ones_like(ids)
    mask[:, length:] = 0
    with torch.no_grad():
        alone = model(ids[:, :length]).last_hidden_state
        padded = model(ids, attention_mask=mask).last_hidden_state[:, :length]
    assert torch.allclose(alone, padded, atol=1e-12)


@EACH
def test_the_mask_matters(line: str):
    """Negative control of the test above: unmasked padding does change the output."""
    model, ids = build(line).double(), tokens(1, 9)
    with torch.no_grad():
        assert not torch.allclose(model(ids[:, :5]).last_hidden_state, model(ids).last_hidden_state[:, :5], atol=1e-3)


def packed(rows: list[int], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Document and position ids of one row that holds documents of these lengths, then padding."""
    documents = [number for number, size in enumerate(rows, 1) for _ in range(size)]
    positions = [place for size in rows for place in range(size)]
    rest = length - len(documents)
    return torch.tensor([documents + [0] * rest]), torch.tensor([positions + [0] * rest])


@FEW
@given(archs(), st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 3))
def test_documents_in_one_row_are_as_alone(arch: Arch, sizes: list[int], padding: int):
    model = build(arch).double()
    length = sum(sizes) + padding
    documents, positions = packed(sizes, length)
    ids = tokens(1, length)
    with torch.no_grad():
        together = model(ids, document_ids=documents, position_ids=positions).last_hidden_state
        start = 0
        for size in sizes:
            alone = model(ids[:, start : start + size]).last_hidden_state
            assert torch.allclose(together[:, start : start + size], alone, atol=1e-12)
            start += size


@EACH
def test_isolation_matters(line: str):
    model, ids = build(line).double(), tokens(1, 8)
    documents, positions = packed([4, 4], 8)
    with torch.no_grad():
        apart = model(ids, document_ids=documents, position_ids=positions).last_hidden_state
        mixed = model(ids, position_ids=positions).last_hidden_state
    assert not torch.allclose(apart, mixed, atol=1e-3)


@EACH
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_rows_of_padding_give_numbers(line: str, kind: torch.dtype):
    model = build(line, "mlm").train()
    ids, mask = tokens(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[1] = 0
    documents = torch.tensor([[1, 1, 2, 2, 0, 0], [0] * 6])
    for inputs in ({"attention_mask": mask}, {"document_ids": documents}, {"attention_mask": mask * 0}):
        with torch.autocast("cpu", kind, enabled=kind is not torch.float32):
            output = model(ids, labels=ids, **inputs)
        output.loss.backward()
        assert output.logits.isfinite().all()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_fully_hidden_row_is_an_average(kind: torch.dtype):
    hidden = visible_pairs(torch.zeros(1, 3), None)
    assert hidden is not None
    mask = additive(hidden, torch.zeros(1, dtype=kind))
    scores = (torch.tensor([-300.0, 20.0, 300.0]).to(kind) + mask).softmax(-1)
    assert scores.isfinite().all()
    assert mask.dtype == kind


def test_a_query_that_sees_nothing_in_its_pattern_sees_itself():
    visible = visible_pairs(torch.tensor([[1, 0, 1]]), None)
    near = pattern_pairs("window:1", 3, torch.device("cpu"), None, None)
    assert (near & visible)[0, 0].tolist() == [[True, False, False], [True, False, True], [False, False, True]]
    apart = pattern_pairs("nodiag", 3, torch.device("cpu"), None, None)
    seen = never_empty(apart & visible_pairs(None, torch.tensor([[1, 2, 2]])))[0, 0]
    assert seen.tolist() == [[True, False, False], [False, False, True], [False, True, False]]


@EACH
def test_every_parameter_is_used(line: str):
    model = build(line, "mlm").double().train()
    model(
        tokens(3, 9), token_type_ids=tokens(3, 9) % 2 if "bert" in line else None, labels=tokens(3, 9)
    ).loss.backward()
    unused = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or (parameter.grad == 0).all() and not name.endswith("key.bias")
    ]
    assert unused == []


def test_too_many_tokens():
    with pytest.raises(ValueError, match=r"41 tokens but this encoder knows 40 positions; cut it"):
        build(BERT)(tokens(1, 41))
    assert build(MODERN)(tokens(1, 600)).last_hidden_state.isfinite().all()


def test_what_comes_out():
    model, ids = build(BERT), tokens(2, 5)
    with torch.no_grad():
        output = model(ids, output_hidden_states=True)
        state, pooled = model(ids, return_dict=False)
    assert [tuple(x.shape) for x in output.hidden_states] == [(2, 5, 16)] * 3
    assert output.hidden_states[-1] is output.last_hidden_state
    first, second = (layer(x, None, None) for layer, x in zip(model.layers, output.hidden_states, strict=False))
    assert torch.equal(first, output.hidden_states[1])
    assert torch.equal(second, output.hidden_states[2])
    assert torch.equal(state, output.last_hidden_state)
    assert torch.equal(pooled, output.pooler_output)
    assert model(ids).hidden_states is None
    assert build(MODERN)(ids).pooler_output is None
    prenorm = build(PRENORM)(ids, output_hidden_states=True)
    assert prenorm.hidden_states[-1] is prenorm.last_hidden_state


def test_a_new_model_starts_as_documented():
    from frugalbert.model.configuration import FrugalConfig
    from frugalbert.model.modeling import FrugalForMaskedLM

    torch.manual_seed(0)
    for line, zero in ((BERT, False), ("modern 2x64 heads=2 ffn=64", True)):
        model = FrugalForMaskedLM(FrugalConfig.from_arch(Arch.parse(line), VOCABULARY))
        for layer in model.model.layers:
            for output in (layer.attention.output, layer.ffn.output):
                assert bool((output.weight == 0).all()) is zero
            assert 0.015 < layer.attention.query.weight.std() < 0.025
            assert (layer.ffn_norm.weight == 1).all()
        assert (model.decoder.bias == 0).all()
        assert model.decoder.weight is model.model.embeddings.word.weight
    plain = FrugalForMaskedLM(FrugalConfig.from_arch(Arch.parse(line), VOCABULARY, zero_init_outputs=False))
    assert (plain.model.layers[0].ffn.output.weight != 0).any()


def test_dropout_acts_in_training_only():
    model, ids = build(BERT, dropout=0.5), tokens(2, 8)
    with torch.no_grad():
        assert torch.equal(model(ids).last_hidden_state, model(ids).last_hidden_state)
        model.train()
        assert not torch.equal(model(ids).last_hidden_state, model(ids).last_hidden_state)


@EACH
def test_one_dtype_along_the_stream(line: str):
    model, ids = build(line, "mlm"), tokens(2, 8)
    kinds = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, given, made: kinds.append((given[0].dtype, made.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids, document_ids=torch.ones_like(ids)).loss
    assert set(kinds) == {(torch.bfloat16, torch.bfloat16)}
    assert loss.dtype == torch.float32


@EACH
def test_bf16_training_is_fp32_training_up_to_rounding(line: str):
    """Covers the CPU's own attention path: the gradients agree in direction and size."""
    gradients = []
    for enabled in (False, True):
        model, ids = build(line, "mlm").train(), tokens(4, 16)
        documents, positions = packed([9, 5], 16)
        documents, positions = documents.expand(4, -1), positions.expand(4, -1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model(ids, labels=ids.flip(1), document_ids=documents, position_ids=positions).loss
        loss.backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    exact, rounded = gradients
    assert (exact - rounded).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("line", [BERT, MODERN])
def test_export_with_free_sizes(line: str):
    """What ONNX export needs: one graph for any batch and length."""
    model = build(line, "mlm")
    inputs = {"input_ids": tokens(2, 16), "attention_mask": torch.ones(2, 16, dtype=torch.long)}
    if "bert" in line:
        inputs["token_type_ids"] = tokens(2, 16) % 2
    free = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in inputs}
    program = torch.export.export(model, (), inputs, dynamic_shapes=free).module()
    for batch, length in ((2, 3), (5, 37)):
        ids = tokens(batch, length)
        mask = (torch.arange(length) < length - 1).long().expand(batch, -1)
        given = dict(zip(inputs, (ids, mask, ids % 2), strict=False))
        with torch.no_grad():
            assert torch.allclose(program(**given).logits, model(**given).logits, atol=1e-5)


@EACH
def test_a_block_compiles_whole(line: str):
    ids = tokens(2, 8)
    results = []
    for compiled in (False, True):
        model = build(line, "mlm").train()
        if compiled:
            for layer in model.model.layers:
                layer.compile(backend="eager", fullgraph=True)
        documents, positions = packed([5, 2], 8)
        loss = model(ids, labels=ids, document_ids=documents.expand(2, -1), position_ids=positions.expand(2, -1)).loss
        loss.backward()
        results.append([loss, *(parameter.grad for parameter in model.parameters())])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*results, strict=True))
