"""Stock Hugging Face models and ours are the same function under other names, both ways, heads included."""

from __future__ import annotations

import pytest
import torch
import transformers
from hypothesis import given, settings

from frugalbert.model.arch import Arch
from frugalbert.model.interop import HEADS, from_stock, to_stock, why_not_stock
from tests.model.archs import VOCABULARY, archs, build, randomise, tokens

OURS = {
    "Model": "encoder",
    "ForMaskedLM": "mlm",
    "ForSequenceClassification": "sequence",
    "ForQuestionAnswering": "span",
    "ForMultipleChoice": "choice",
    "ForTokenClassification": "token",
    "ForPreTraining": "rtd",
}
BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
STOCK = {
    "Bert": transformers.BertConfig(**BERT, hidden_act="relu", layer_norm_eps=1e-5, type_vocab_size=3),
    "Electra": transformers.ElectraConfig(**BERT, embedding_size=24),
    "Roberta": transformers.RobertaConfig(**BERT | {"pad_token_id": 1}, layer_norm_eps=1e-5, type_vocab_size=1),
    "XLMRoberta": transformers.XLMRobertaConfig(**BERT | {"pad_token_id": 3}, layer_norm_eps=1e-5, type_vocab_size=1),
    "ModernBert": transformers.ModernBertConfig(
        **BERT,
        local_attention=6,
        classifier_pooling="mean",
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
    ),
}
MASK = torch.tensor([[1] * 13, [1] * 8 + [0] * 5, [1] * 3 + [0] * 10])


def batch(head: str, types: int, pad: int = 0) -> dict[str, torch.Tensor]:
    """Ragged texts; multiple choice gets each of them twice. Only padding is `pad`: RoBERTa counts the rest."""
    ids = tokens(3, 13)
    inputs = {"input_ids": ids.masked_fill(ids == pad, 60).masked_fill(MASK == 0, pad), "attention_mask": MASK}
    if types:
        inputs["token_type_ids"] = tokens(3, 13, seed=1) % types
    if head == "ForMultipleChoice":
        inputs = {name: torch.stack((tensor, tensor.flip(0)), 1) for name, tensor in inputs.items()}
    return inputs


def assert_equal_outputs(ours: torch.nn.Module, stock: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    """All outputs, at real tokens where there is one per token."""
    with torch.no_grad():
        mine, theirs = ours(**inputs), stock(**inputs)
    compared = 0
    for name in ("last_hidden_state", "pooler_output", "logits", "start_logits", "end_logits"):
        a, b = mine.get(name), theirs.get(name)
        assert (a is None) == (b is None), name
        if a is not None and b is not None:
            real = MASK.bool() if a.shape[:2] == MASK.shape else slice(None)
            assert b.std() > 0.02, "outputs that hardly vary prove nothing"
            assert torch.allclose(a[real], b[real], rtol=0, atol=1e-5 if a.dtype == torch.float32 else 1e-10), name
            compared += 1
    assert compared


@pytest.mark.parametrize(
    ("start", "head"), [(a, b) for a in STOCK for b in HEADS if (a == "Electra") == (b == "ForPreTraining")]
)
def test_stock_models_are_read_exactly(start: str, head: str):
    config = type(STOCK[start])(**STOCK[start].to_dict())
    config.num_labels = 2 if head == "ForQuestionAnswering" else 5
    stock = randomise(getattr(transformers, start + head)(config))
    ours = from_stock(stock)
    assert type(ours).__name__ == HEADS[head]
    assert not ours.training
    inputs = batch(head, 3 if start == "Bert" else 0, config.pad_token_id)
    assert_equal_outputs(ours, stock, inputs)
    assert_equal_outputs(ours, to_stock(ours), inputs)
    if start != "ModernBert":  # its rotary tables are fp32 in fp64 models, ours too, but not to the last digit
        assert_equal_outputs(from_stock(stock.double()), stock.double(), inputs)


@pytest.mark.parametrize("start", ["Roberta", "XLMRoberta"])
def test_packed_documents_are_robertas_rows(start: str):
    """Documents in one row that do not see each other, each with positions from 0, as RoBERTa has them alone."""
    stock = randomise(getattr(transformers, start + "ForMaskedLM")(STOCK[start]))
    inputs = batch("ForMaskedLM", 0, STOCK[start].pad_token_id)
    rows, real = inputs["input_ids"], MASK.bool()
    lengths = MASK.sum(1).tolist()
    with torch.no_grad():
        packed = from_stock(stock)(
            rows[real][None],
            position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
            document_ids=torch.arange(1, 4).repeat_interleave(MASK.sum(1))[None],
        ).logits[0]
        alone = [stock(row[None, :length]).logits[0] for row, length in zip(rows, lengths, strict=True)]
    assert torch.allclose(packed, torch.cat(alone), rtol=0, atol=1e-5)
    assert from_stock(stock).config.max_position_embeddings == 32 - STOCK[start].pad_token_id - 1


LINES = [
    "bert 2x24 heads=3 ffn=40",
    "bert 2x24 heads=2 ffn=40 token_types=0 activation=gelu_tanh norm_epsilon=0.001",
    "bert 3x24 heads=2*2,3 head_dim=5,8,7 ffn=40,20,10 token_types=1",
    "modern 3x24 heads=3 ffn=40 activation=silu rope_theta=500.0",
    "modern 3x24 heads=2 head_dim=6 ffn=40,20,1 pattern=window:2,dense,window:2 local_rope_theta=80.0",
]


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("head", HEADS)
def test_our_models_are_written_exactly(line: str, head: str, tmp_path):
    arch = Arch.parse(line)
    model = build(arch, OURS[head], num_labels=5)
    if arch.family == "modern" and head == "ForPreTraining":
        with pytest.raises(ValueError, match="no stock ModernBERT for replaced-token detection"):
            to_stock(model)
        return
    inputs = batch(head, arch.token_types)
    to_stock(model).save_pretrained(tmp_path)
    auto = "AutoModel" + head.removeprefix("Model")
    stock = getattr(transformers, auto).from_pretrained(tmp_path, trust_remote_code=False)
    assert type(stock).__module__.startswith("transformers.models.")
    assert_equal_outputs(model, stock, inputs)
    assert_equal_outputs(from_stock(stock), stock, inputs)


@pytest.mark.parametrize("head", sorted(set(HEADS) - {"Model"}))
def test_losses_are_hugging_faces(head: str):
    line = "bert 2x24 heads=3 ffn=40"
    model = build(line, OURS[head], num_labels=5)
    stock, inputs = to_stock(model), batch(head, 2)
    classes = torch.tensor([1, 0, 1])
    labels = {
        "ForQuestionAnswering": {
            "start_positions": torch.tensor([0, 7, 13]),
            "end_positions": torch.tensor([3, 40, 2]),
        },
        "ForMaskedLM": {"labels": tokens(3, 13, seed=2).masked_fill(tokens(3, 13, seed=3) < 20, -100)},
        "ForTokenClassification": {"labels": (tokens(3, 13, seed=2) % 5).masked_fill(MASK == 0, -100)},
        "ForPreTraining": {"labels": tokens(3, 13, seed=2) % 2},
    }.get(head, {"labels": classes})
    with torch.no_grad():
        assert torch.allclose(model(**inputs, **labels).loss, stock(**inputs, **labels).loss, atol=1e-6)


def test_pairs_are_berts_own_pre_training(tmp_path):
    """BertForPreTraining with its next-sentence head: read, written, and its losses."""
    stock = randomise(transformers.BertForPreTraining(STOCK["Bert"]))
    ours, inputs = from_stock(stock), batch("ForMaskedLM", 3, STOCK["Bert"].pad_token_id)
    assert type(ours).__name__ == "FrugalForPairs"
    to_stock(ours).save_pretrained(tmp_path)
    again = transformers.BertForPreTraining.from_pretrained(tmp_path)
    words, pairs = tokens(3, 13, seed=2).masked_fill(tokens(3, 13, seed=3) < 20, -100), torch.tensor([1, 0, 1])
    with torch.no_grad():
        mine = ours(**inputs, labels=words, pair_labels=pairs)
        for theirs in (stock, again):
            expected = theirs(**inputs, labels=words, next_sentence_label=pairs)
            assert torch.allclose(mine.logits, expected.prediction_logits, atol=1e-5)
            assert torch.allclose(mine.pair_logits, expected.seq_relationship_logits, atol=1e-5)
            assert torch.allclose(mine.loss, expected.loss, atol=1e-5)
    with pytest.raises(ValueError, match="no stock ModernBERT for sentence pairs"):
        to_stock(build(LINES[3], "pairs"))


def test_the_pooler_goes_along_or_stays_away():
    model = build(LINES[0])
    bare = type(model)(model.config, add_pooling_layer=False).eval()
    stock = to_stock(bare)
    assert stock.pooler is None
    assert from_stock(stock).pooler is None
    assert to_stock(model).pooler is not None


@settings(derandomize=True, deadline=None, max_examples=40)
@given(archs())
def test_representable_or_a_reason(arch: Arch):
    """Whatever `why_not_stock` lets through is copied exactly; whatever it refuses has its reason in the error."""
    model, reason = build(arch), why_not_stock(arch)
    if reason:
        with pytest.raises(ValueError, match="has no stock equivalent") as error:
            to_stock(model)
        assert reason in str(error.value)
        return
    ids = tokens(2, 6)
    with torch.no_grad():
        a, b = model(ids).last_hidden_state, to_stock(model)(ids).last_hidden_state
    assert torch.allclose(a, b, atol=2e-5)


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("24hbert", "normalises after each sublayer"),
        ("bert 2x24 heads=3 ffn=40 embedding_norm=no", "always normalises the embeddings"),
        ("bert 2x24 heads=3 ffn=40 hidden=24,12", "one hidden size"),
        ("bert 2x24 heads=3 ffn=40 pattern=window:3", "dense attention only"),
        ("modern 2x24 heads=3 ffn=40 token_types=2", "no token types"),
        ("modern 2x24 heads=3 ffn=40 qk_norm=yes", "does not normalise queries and keys"),
        ("modern 2x24 heads=3 ffn=40 pattern=window:3,window:4", "one window size"),
        ("modern 2x24 heads=3 head_dim=10 ffn=40", "equal to"),
        ("autotinybert-s1", "no number of heads divides 564 channels"),
        ("autotinybert-kd-s3", "no number of heads divides 280 channels"),
    ],
)
def test_reasons(line: str, part: str):
    assert part in str(why_not_stock(Arch.parse(line)))


@pytest.mark.parametrize(
    ("name", "heads"), [("s2", 6), ("s3", 4), ("s4", 4), ("kd-s1", 12), ("kd-s2", 12), ("kd-s4", 16)]
)
def test_autotinybert_is_padded_exactly(name: str, heads: int):
    """Queries, keys and values narrower or wider than the stock class has them, in a stock BertModel, in fp64."""
    model = build(f"autotinybert-{name}").double()
    for parameter in model.parameters():
        parameter.data.mul_(0.3 if parameter.dim() == 2 else 1.0)
    stock = to_stock(model)
    assert type(stock) is transformers.BertModel
    assert stock.config.num_attention_heads == heads
    inputs = batch("Model", 2)
    with torch.no_grad():
        a, b = model(**inputs).last_hidden_state, stock(**inputs).last_hidden_state
    assert torch.allclose(a[MASK.bool()], b[MASK.bool()], atol=1e-10)


def test_foreign_models_are_refused():
    small = {name: BERT[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
    for config, model, sentence in (
        (transformers.MPNetConfig(**small), transformers.MPNetModel, "MPNetModel cannot be read"),
        (transformers.BertConfig(**small, tie_word_embeddings=False), transformers.BertForMaskedLM, "only tied ones"),
        (transformers.BertConfig(**small, is_decoder=True), transformers.BertModel, "is a decoder"),
        (transformers.BertConfig(**small, hidden_act="tanh"), transformers.BertModel, "activation 'tanh'"),
        (transformers.BertConfig(**small), transformers.BertForNextSentencePrediction, "cannot be read"),
        (transformers.RobertaConfig(**small, hidden_act="relu"), transformers.RobertaModel, "only gelu"),
        (transformers.ElectraConfig(**small), transformers.ElectraForPreTraining, "projects its embeddings"),
        (transformers.ModernBertConfig(**BERT, mlp_bias=True), transformers.ModernBertModel, "has biases"),
        (transformers.ModernBertConfig(**BERT, decoder_bias=False), transformers.ModernBertModel, "no output bias"),
        (
            transformers.ModernBertConfig(**BERT, classifier_activation="relu"),
            transformers.ModernBertModel,
            "another activation",
        ),
    ):
        with pytest.raises(ValueError, match=sentence):
            from_stock(model(config))
