"""Heads and losses: sparse equals dense, the fused loss equals the plain one, ignored labels do not count."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional

from frugalbert import dist
from frugalbert.data.masking import Batch
from frugalbert.model import losses
from frugalbert.model.arch import Arch
from frugalbert.model.attention import _Rotation, attend, rotary_tables
from frugalbert.model.configuration import FrugalConfig
from frugalbert.model.losses import IGNORED, _FusedCrossEntropy, masked_loss
from frugalbert.model.modeling import FrugalForMaskedLM, FrugalForSequenceClassification, FrugalModel
from frugalbert.train.objectives import by_row
from tests.model.archs import VOCABULARY, build, tokens

LINES = ["bert 2x16 heads=2 ffn=24", "bert-preln 2x16 heads=2 ffn=24", "modern 2x16 heads=2 ffn=24"]
EACH = pytest.mark.parametrize("line", LINES)


def gradients(loss: torch.Tensor, model: nn.Module) -> list[torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@EACH
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_sparse_is_dense(line: str, kind: torch.dtype, monkeypatch):
    """Loss and all gradients, output bias included: at masked positions, at all positions, and by plain autograd."""
    monkeypatch.setattr(losses, "CHUNK", 3 * VOCABULARY)
    model = build(line, "mlm").to(kind).train()
    ids, labels = tokens(3, 12), torch.full((3, 12), IGNORED)
    positions = torch.tensor([1, 4, 11, 12, 20, 30, 35])
    labels.view(-1)[positions] = tokens(7, seed=1)
    slots = torch.cat((positions, torch.tensor([0, 24])))  # rows with fewer candidates are filled up
    values = torch.cat((labels.view(-1)[positions], torch.tensor([IGNORED] * 2)))

    sparse = model(ids, masked_positions=slots, labels=values)
    dense = model(ids, labels=labels)
    logits = model(ids).logits
    plain = functional.cross_entropy(logits.view(-1, VOCABULARY), labels.view(-1))
    close = {"rtol": 0, "atol": 1e-10 if kind == torch.float64 else 1e-6}
    assert torch.allclose(sparse.loss, plain, **close)
    assert torch.allclose(dense.loss, plain, **close)
    assert torch.allclose(sparse.logits, logits.view(-1, VOCABULARY)[slots], **close)
    assert torch.allclose(dense.logits, logits, **close)
    assert (dense.logits.shape, sparse.logits.shape) == ((3, 12, VOCABULARY), (9, VOCABULARY))
    expected = gradients(plain, model)
    for loss in (sparse.loss, dense.loss):
        assert all(torch.allclose(a, b, **close) for a, b in zip(gradients(loss, model), expected, strict=True))
    assert all((gradient != 0).any() for gradient in expected)


@EACH
@pytest.mark.parametrize("shape", ["", "pattern=window:2|star", "hidden=16,8 head_dim=8"])
@pytest.mark.parametrize("inputs", ["nothing", "padding", "documents"])
@pytest.mark.parametrize("backend", ["auto", "gather"])
def test_the_last_layer_makes_no_more_than_it_must(line: str, shape: str, inputs: str, backend: str):
    """Places as (B, S): loss, scores and all gradients are those of the whole last layer."""
    model = build(f"{line} {shape}".strip(), "mlm", attention_backend=backend).double().train()
    documents = torch.tensor([[1] * 5 + [2] * 7, [1] * 9 + [0] * 3, [1] * 12])
    begins = torch.tensor([[0] * 5 + [5] * 7, [0] * 12, [0] * 12])
    given = {
        "nothing": {},
        "padding": {"attention_mask": (documents > 0).long()},
        "documents": {"document_ids": documents, "position_ids": torch.arange(12) - begins},
    }[inputs]
    ids, labels = tokens(3, 12), tokens(9, seed=1).masked_fill(torch.arange(9) == 3, IGNORED)
    places = torch.tensor([[1, 4, 11], [0, 2, 7], [0, 0, 10]]) + torch.arange(3)[:, None] * 12
    seen: list[int] = []
    model.model.layers[-1].ffn.register_forward_pre_hook(lambda _, x: seen.append(x[0].shape[1]))
    some = model(ids, masked_positions=places, labels=labels, **given)
    whole = model(ids, masked_positions=places.flatten(), labels=labels, **given)
    skips = backend == "gather" and "pattern" in shape and inputs != "documents"  # pairs, of all tokens
    assert seen == [12 if skips else 3, 12]
    exact = {"rtol": 0, "atol": 1e-12}
    assert torch.allclose(some.loss, whole.loss, **exact)
    assert torch.allclose(some.logits, whole.logits, **exact)
    expected = gradients(whole.loss, model)
    assert all(torch.allclose(a, b, **exact) for a, b in zip(gradients(some.loss, model), expected, strict=True))


@pytest.mark.parametrize("line, kinds", [("bert 6x16 heads=2 ffn=24", 1),
                                         ("modern 6x16 heads=2 ffn=24 embedding_norm=yes", 2)])  # fmt: skip
def test_one_compiled_graph_serves_all_layers_of_a_kind(line: str, kinds: int):
    """The last layer, which makes fewer states, is a kind of its own; so is a first one without a norm."""
    model, ids = build(line, "mlm").train(), tokens(3, 12)
    places = torch.arange(3)[:, None] * 12 + torch.arange(4)
    for chosen, graphs in ((places.flatten(), kinds), (places, kinds + 1)):
        torch._dynamo.reset()
        compiled = CompileCounter()
        for layer in model.model.layers:
            layer.compile(backend=compiled, dynamic=False)
        model(ids, masked_positions=chosen, labels=ids.flatten()[places.flatten()]).loss.backward()
        assert compiled.frame_count == graphs


def test_one_compiled_graph_serves_every_number_of_masks():
    """The masking rate falls during a training; a graph for each number of masks would be compiled for minutes."""
    model = build("modern 2x16 heads=2 ffn=24", "mlm").train()
    dist.compile_blocks(model.model.layers, dynamic=False)
    ids, document_ids = tokens(3, 12), torch.ones(3, 12).long()
    for number in (5, 4, 3):
        places = torch.arange(3)[:, None] * 12 + torch.arange(number)
        labels = ids.flatten()[places.flatten()]
        batch = Batch(ids, torch.zeros_like(ids), document_ids, places.flatten(), labels, torch.rand(len(labels)))
        with torch.compiler.set_stance("default" if number == 5 else "fail_on_recompile"):
            model(ids, masked_positions=by_row(batch), labels=labels, loss_only=True).loss.backward()


@pytest.mark.parametrize("device, loss_only", [("cpu", False), ("cpu", True), ("a GPU's pieces", True)])
def test_the_fused_loss_has_the_gradient_it_claims(monkeypatch, device: str, loss_only: bool):
    monkeypatch.setattr(losses, "CHUNK", 14)
    decoder = nn.Linear(3, 7).double()
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    if device != "cpu":
        monkeypatch.setattr(losses, "on_cpu", lambda x: False)
        monkeypatch.setattr(losses, "PRODUCT", 14)
    labels, count = torch.tensor([0, 6, IGNORED, 3, 3]), torch.tensor(4)

    def loss(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return _FusedCrossEntropy.apply(x, weight, bias, labels, count, loss_only)[0]

    assert torch.autograd.gradcheck(loss, (x, decoder.weight, decoder.bias), check_undefined_grad=False)
    value, scores = masked_loss(x, decoder, labels, loss_only)
    assert torch.allclose(value, nn.functional.cross_entropy(decoder(x), labels, ignore_index=IGNORED), atol=1e-14)
    (3 * value).backward(retain_graph=True)
    three = x.grad.clone()
    x.grad = None
    value.backward()
    assert torch.allclose(three, 3 * x.grad, atol=1e-14)
    assert (scores is None) == loss_only
    assert loss_only or torch.allclose(scores, decoder(x), atol=1e-14)
    frozen, scores = masked_loss(x.detach(), nn.Linear(3, 7).double().requires_grad_(False), labels, loss_only)
    assert not frozen.requires_grad
    assert scores is None or not scores.requires_grad


def test_no_labels_no_loss():
    model = build(LINES[0], "mlm").train()
    ids = tokens(2, 4)
    for given in ({"labels": torch.full((2, 4), IGNORED)}, {"labels": torch.tensor([IGNORED])}):
        slots = {"masked_positions": torch.tensor([3])} if given["labels"].dim() == 1 else {}
        loss = model(ids, **given, **slots).loss
        assert loss == 0
        assert all((gradient == 0).all() for gradient in gradients(loss, model))
    assert build(LINES[0], "rtd")(ids, labels=torch.full((2, 4), IGNORED)).loss == 0


def test_bf16_scores_still_give_an_fp32_loss():
    model, ids = build("bert 1x16 heads=2 ffn=24", "mlm"), tokens(8, 16)
    exact = model(ids, labels=ids).loss
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(ids, labels=ids)
    assert rounded.logits.dtype == torch.bfloat16
    assert rounded.loss.dtype == torch.float32
    assert abs(rounded.loss - exact) < 0.01  # a bf16 loss of 4 would be off by up to 0.016 from rounding alone


@pytest.mark.parametrize("mask", [None, "documents"])
def test_the_cpu_training_attention_is_the_usual_one(mask: str | None):
    """In fp64 `attend` takes the plain products when it trains and PyTorch's fused kernel when it does not."""
    given = [torch.randn(2, 3, 6, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    documents = torch.tensor([[1, 1, 2, 2, 2, 0], [1] * 6])
    hidden = documents[:, None, :, None] != documents[:, None, None, :]
    additive = torch.zeros(hidden.shape).double().masked_fill(hidden, -1e30) if mask else None
    assert torch.autograd.gradcheck(lambda *qkv: attend(*qkv, additive, 0.0), given)
    with torch.no_grad():
        fused = attend(*given, additive, 0.0)
    assert torch.allclose(attend(*given, additive, 0.0), fused, atol=1e-12)
    torch.manual_seed(0)
    assert not torch.equal(attend(*given, additive, 0.5), fused)


def test_rotation_has_the_gradient_it_claims():
    cosine, sine = rotary_tables(torch.tensor([[0, 1, 2, 7]]), 6, 100.0, torch.float64)
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: _Rotation.apply(x, cosine, sine), (x,))
    turned = _Rotation.apply(x, cosine, sine)
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[:, :, 0], x[:, :, 0])


@EACH
def test_replaced_tokens_count_real_tokens_only(line: str):
    model, ids = build(line, "rtd"), tokens(2, 6)
    labels = torch.tensor([[0, 1, 0, 0, 1, 1], [1, 0, IGNORED, IGNORED, 1, 0]])
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    output = model(ids, attention_mask=mask, labels=labels)
    used = (labels != IGNORED) & mask.bool()
    expected = functional.binary_cross_entropy_with_logits(output.logits[used], labels[used].float())
    assert torch.allclose(output.loss, expected)


def test_the_problem_type_decides_the_loss_as_in_hugging_face():
    ids = tokens(3, 5)
    classes, numbers, many = torch.tensor([0, 2, 1]), torch.tensor([0.5, -1.0, 2.0]), torch.eye(3)
    for labels, count, kind, expected in (
        (classes, 3, None, lambda x: functional.cross_entropy(x, classes)),
        (numbers, 1, None, lambda x: functional.mse_loss(x.squeeze(1), numbers)),
        (many, 3, None, lambda x: functional.binary_cross_entropy_with_logits(x, many)),
        (many, 3, "regression", lambda x: functional.mse_loss(x, many)),
        (many.long(), 3, "multi_label_classification", lambda x: functional.binary_cross_entropy_with_logits(x, many)),
    ):
        model = build(LINES[2], "sequence", num_labels=count, problem_type=kind)
        output = model(ids, labels=labels)
        assert torch.allclose(output.loss, expected(output.logits))
        assert model.config.problem_type == kind  # the labels of one batch do not rewrite the configuration


def test_a_mean_of_the_real_tokens():
    model, ids = build(LINES[2], "sequence", classifier_pooling="mean"), tokens(2, 6)
    mask = torch.tensor([[1] * 4 + [0] * 2] * 2)
    with torch.no_grad():
        assert torch.allclose(model(ids, attention_mask=mask).logits, model(ids[:, :4]).logits, atol=1e-6)
        assert model(ids, attention_mask=mask * 0).logits.isfinite().all()
    with pytest.raises(ValueError, match="classifier_pooling must be cls or mean"):
        FrugalConfig.from_arch(Arch.parse(LINES[2]), 10, classifier_pooling="max")


def test_the_embeddings_are_one_tensor(tmp_path):
    model = build(LINES[1], "mlm")
    names = [name for name, _ in model.named_parameters()]
    assert "model.embeddings.word.weight" in names
    assert "decoder.weight" not in names
    model.save_pretrained(tmp_path)
    again = FrugalForMaskedLM.from_pretrained(tmp_path)
    assert again.decoder.weight is again.model.embeddings.word.weight
    encoder = FrugalModel.from_pretrained(tmp_path)
    assert torch.equal(encoder.embeddings.word.weight, model.decoder.weight)
    assert torch.equal(encoder.layers[1].ffn.output.weight, model.model.layers[1].ffn.output.weight)


def test_the_vocabulary_can_grow():
    model = build(LINES[0], "mlm")
    model.resize_token_embeddings(VOCABULARY + 3)
    assert model.config.vocab_size == VOCABULARY + 3
    assert model.decoder.weight is model.model.embeddings.word.weight
    assert model(tokens(1, 4)).logits.shape == (1, 4, VOCABULARY + 3)


@EACH
def test_pairs_are_judged_by_the_pooler_or_the_first_token(line: str, tmp_path):
    """Words as by the masked-LM head; losses add up; a classifier, a masked LM and the encoder find their weights."""
    model, ids = build(line + " token_types=2", "pairs"), tokens(4, 6)
    types, labels, pairs = (ids > 30).long(), tokens(4, 6, seed=1), torch.tensor([0, 1, 1, 0])
    with torch.no_grad():
        found = model(ids, token_type_ids=types, labels=labels, pair_labels=pairs)
        hidden = model.model(ids, token_type_ids=types)
    first = model.head(hidden.last_hidden_state[:, 0]) if hidden.pooler_output is None else hidden.pooler_output
    assert torch.allclose(found.pair_logits, model.pair(first))
    assert torch.allclose(found.pair_loss, functional.cross_entropy(found.pair_logits, pairs))
    assert torch.allclose(found.loss, found.masked_loss + found.pair_loss)
    model.save_pretrained(tmp_path)
    masked, report = FrugalForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert torch.allclose(masked(ids, token_type_ids=types, labels=labels).loss, found.masked_loss)
    tuned = FrugalForSequenceClassification.from_pretrained(tmp_path).model
    for name, weight in model.model.state_dict().items():
        assert torch.equal(tuned.state_dict()[name], weight), name
