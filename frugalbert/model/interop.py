"""Our models as stock Hugging Face models and back: the same numbers under other names.

`to_stock` copies a model into `Bert…`, `ModernBert…` or ELECTRA's discriminator, `from_stock` copies one back, and
RoBERTa (arXiv 1907.11692), which is BERT with a table of positions that begins behind the padding id. Where the stock
class cannot express an architecture, `why_not_stock` says so in a sentence. Heads smaller than the stock class wants
and feed-forwards of different widths are padded with zeros, which changes no output: with head size d padded to D,
queries are multiplied by sqrt(D/d), so that the stock scale 1/sqrt(D) acts as 1/sqrt(d). A padded copy
(AutoTinyBERT's shapes, arXiv 2107.13686) is for inference: it has more parameters and would train differently.
"""

import re
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from . import modeling
from .arch import Arch, LayerArch
from .configuration import FrugalConfig

HEADS = {
    "Model": "FrugalModel",
    "ForMaskedLM": "FrugalForMaskedLM",
    "ForSequenceClassification": "FrugalForSequenceClassification",
    "ForQuestionAnswering": "FrugalForQuestionAnswering",
    "ForMultipleChoice": "FrugalForMultipleChoice",
    "ForTokenClassification": "FrugalForTokenClassification",
    "ForPreTraining": "FrugalForReplacedTokenDetection",
}
"""End of a stock class's name -> our class. `ForPreTraining` is ELECTRA's discriminator, of BERT the one for PAIRS."""
PAIRS = "FrugalForPairs"
ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "silu": "silu"}
ACTIVATIONS_READ = {"gelu_new": "gelu_tanh", "swish": "silu"} | {stock: ours for ours, stock in ACTIVATIONS.items()}
CARRIED = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
CARRIED += ("id2label", "label2id", "problem_type", "initializer_range", "classifier_dropout")

# Module of ours -> module of the stock model. Several of ours with one target lie one after the other in it.
BERT_NAMES = {
    "embeddings.word": "embeddings.word_embeddings",
    "embeddings.position": "embeddings.position_embeddings",
    "embeddings.token_type": "embeddings.token_type_embeddings",
    "embeddings.norm": "embeddings.LayerNorm",
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "attention.output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "ffn.input": "intermediate.dense",
    "ffn.output": "output.dense",
    "ffn_norm": "output.LayerNorm",
    "pooler": "pooler.dense",
    "head.dense": "cls.predictions.transform.dense",
    "head.norm": "cls.predictions.transform.LayerNorm",
    "decoder": "cls.predictions.decoder",
    "classifier": "classifier",
    "pair": "cls.seq_relationship",
}
ELECTRA_NAMES = BERT_NAMES | {
    "dense": "discriminator_predictions.dense",
    "classifier": "discriminator_predictions.dense_prediction",
}
ROBERTA_NAMES = BERT_NAMES | {
    "head.dense": "lm_head.dense",
    "head.norm": "lm_head.layer_norm",
    "decoder": "lm_head.decoder",
}
MODERN_NAMES = {
    "embeddings.word": "embeddings.tok_embeddings",
    "embeddings.norm": "embeddings.norm",
    "attention.query": "attn.Wqkv",
    "attention.key": "attn.Wqkv",
    "attention.value": "attn.Wqkv",
    "attention.output": "attn.Wo",
    "attention_norm": "attn_norm",
    "ffn.input": "mlp.Wi",
    "ffn.gate": "mlp.Wi",
    "ffn.output": "mlp.Wo",
    "ffn_norm": "mlp_norm",
    "final_norm": "final_norm",
    "head.dense": "head.dense",
    "head.norm": "head.norm",
    "decoder": "decoder",
    "classifier": "classifier",
}
# Stock model type -> start of its classes' names, its encoder inside a model with a head, its list of layers, names.
STOCK: dict[str, tuple[str, str, str, dict[str, str]]] = {
    "bert": ("Bert", "bert.", "encoder.layer", BERT_NAMES),
    "electra": ("Electra", "electra.", "encoder.layer", ELECTRA_NAMES),
    "roberta": ("Roberta", "roberta.", "encoder.layer", ROBERTA_NAMES),
    "xlm-roberta": ("XLMRoberta", "roberta.", "encoder.layer", ROBERTA_NAMES),
    "modernbert": ("ModernBert", "model.", "layers", MODERN_NAMES),
}
PARAMETER = re.compile(r"(model\.)?(?:layers(\.[0-9]+\.))?(.+)(\.weight|\.bias)")


# ---- what is representable -----------------------------------------------------------------------------------------


def why_not_stock(arch: Arch) -> str | None:
    """None if `to_stock` gives an exact copy for inference, otherwise the reason in one sentence."""
    if arch.family == "bert-preln":
        return "BertModel normalises after each sublayer, family bert-preln before it"
    if not arch.embedding_norm:
        return "the stock model always normalises the embeddings (embedding_norm=yes)"
    if any(layer.hidden != arch.hidden for layer in arch.layers):
        return "the stock model has one hidden size for all layers"
    if arch.family == "bert" and any(layer.pattern != "dense" for layer in arch.layers):
        return "BertModel has dense attention only"
    if any(layer.pattern != "dense" and not layer.window for layer in arch.layers):
        return "the stock model knows dense attention and windows only"
    if arch.family == "modern":
        if arch.token_types:
            return "ModernBertModel has no token types"
        if arch.qk_norm:
            return "ModernBertModel does not normalise queries and keys"
        if len({layer.window for layer in arch.layers} - {None}) > 1:
            return "ModernBertModel has one window size for all its local layers"
    if _stock_heads(arch) is None:
        sizes = sorted({(layer.heads, layer.head_dim) for layer in arch.layers})
        wanted = "equal to" if arch.family == "modern" else "at least"
        return (
            f"no number of heads divides {arch.hidden} channels into heads of a size {wanted} that of the "
            f"architecture ({', '.join(f'{heads} heads of {size}' for heads, size in sizes)})"
        )
    return None


def _stock_heads(arch: Arch) -> int | None:
    """The smallest number of heads h >= ours that divides the hidden size into large enough (RoPE: equal) heads."""
    most = max(layer.heads for layer in arch.layers)
    sizes = {layer.head_dim for layer in arch.layers}
    for heads in range(most, arch.hidden + 1):
        size, rest = divmod(arch.hidden, heads)
        if rest == 0 and (sizes == {size} if arch.family == "modern" else max(sizes) <= size):
            return heads
    return None


# ---- to stock ------------------------------------------------------------------------------------------------------


def to_stock(model: PreTrainedModel) -> PreTrainedModel:
    """A stock copy of one of our models, head included; equal outputs. Raises ValueError with the reason why not."""
    arch = model.config.to_arch()
    reason = why_not_stock(arch)
    pairs = type(model).__name__ == PAIRS
    head = "ForPreTraining" if pairs else {ours: stock for stock, ours in HEADS.items()}[type(model).__name__]
    if reason is None and head == "ForPreTraining" and arch.family == "modern":
        reason = f"there is no stock ModernBERT for {'sentence pairs' if pairs else 'replaced-token detection'}"
    if reason is not None:
        raise ValueError(f"{arch.brief()!r} has no stock equivalent: {reason}; keep it as a frugalbert model")
    kind = "modernbert" if arch.family == "modern" else "electra" if head == "ForPreTraining" and not pairs else "bert"
    config = _stock_config(model.config, arch, kind)
    if head == "ForQuestionAnswering":
        config.num_labels = 2  # start and end
    stock_class = getattr(transformers, STOCK[kind][0] + head)
    without_pooler = kind == "bert" and head == "Model" and model.pooler is None
    stock = stock_class(config, add_pooling_layer=False) if without_pooler else stock_class(config)
    stock.to(model.dtype)
    state: dict[str, Tensor] = {}
    for name, tensor in _padded(model.state_dict(), arch).items():
        target = _stock_name(name, kind, head)
        state[target] = torch.cat((state[target], tensor)) if target in state else tensor
    if kind == "bert" and head in ("ForMaskedLM", "ForPreTraining"):
        state["cls.predictions.bias"] = state["cls.predictions.decoder.bias"]
    if kind != "modernbert" and not arch.token_types:
        table = "embeddings.token_type_embeddings.weight"
        state[table if head == "Model" else STOCK[kind][1] + table] = torch.zeros(1, arch.hidden)
    stock.load_state_dict(state)
    return stock.train(model.training)


def _stock_name(name: str, kind: str, head: str) -> str:
    """`model.layers.3.attention.query.bias` -> `bert.encoder.layer.3.attention.self.query.bias`."""
    match = PARAMETER.fullmatch(name)
    assert match, name
    _, encoder, layers, names = STOCK[kind]
    module = names[match[3]]
    if kind != "modernbert" and head == "ForQuestionAnswering" and match[3] == "classifier":
        module = "qa_outputs"
    if "roberta" in kind and head == "ForSequenceClassification" and match[3] in ("pooler", "classifier"):
        return {"pooler": "classifier.dense", "classifier": "classifier.out_proj"}[match[3]] + match[4]
    return (encoder if match[1] else "") + (layers + match[2] if match[2] else "") + module + match[4]


def _padded(state: dict[str, Tensor], arch: Arch) -> dict[str, Tensor]:
    """The parameters with every layer's heads, head size and feed-forward widened by zeros to the stock model's."""
    heads, ffn = _stock_heads(arch), max(layer.ffn for layer in arch.layers)
    assert heads is not None
    size = arch.hidden // heads
    result = dict(state)
    for name, tensor in state.items():
        match = PARAMETER.fullmatch(name)
        if not match or not match[2]:
            continue
        layer = arch.layers[int(match[2].strip("."))]
        if match[3] in ("attention.query", "attention.key", "attention.value"):
            factor = (size / layer.head_dim) ** 0.5 if match[3] == "attention.query" else 1.0
            wide = tensor.new_zeros(heads, size, *tensor.shape[1:])
            wide[: layer.heads, : layer.head_dim] = tensor.unflatten(0, (layer.heads, layer.head_dim)) * factor
            result[name] = wide.flatten(0, 1)
        elif match[3] == "attention.output" and match[4] == ".weight":
            wide = tensor.new_zeros(tensor.shape[0], heads, size)
            wide[:, : layer.heads, : layer.head_dim] = tensor.unflatten(1, (layer.heads, layer.head_dim))
            result[name] = wide.flatten(1)
        elif match[3] in ("ffn.input", "ffn.gate"):
            result[name] = torch.cat((tensor, tensor.new_zeros(ffn - layer.ffn, *tensor.shape[1:])))
        elif match[3] == "ffn.output" and match[4] == ".weight":
            result[name] = torch.cat((tensor, tensor.new_zeros(tensor.shape[0], ffn - layer.ffn)), 1)
    return result


def _stock_config(config: FrugalConfig, arch: Arch, kind: str) -> PreTrainedConfig:
    given = config.to_dict()
    common: dict[str, Any] = {key: given.get(key) for key in CARRIED if given.get(key) is not None}
    common |= {
        "pad_token_id": config.pad_token_id,
        "hidden_size": arch.hidden,
        "num_hidden_layers": len(arch.layers),
        "num_attention_heads": _stock_heads(arch),
        "intermediate_size": max(layer.ffn for layer in arch.layers),
        "max_position_embeddings": arch.max_length,
    }
    if kind == "modernbert":
        windows = [layer.window for layer in arch.layers if layer.window is not None]
        unset = {key: None for key in ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")}
        return transformers.ModernBertConfig(
            **{**unset, **common},
            hidden_activation=ACTIVATIONS[arch.activation],
            classifier_activation=ACTIVATIONS[arch.activation],
            norm_eps=arch.norm_epsilon,
            layer_types=["full_attention" if layer.window is None else "sliding_attention" for layer in arch.layers],
            local_attention=2 * max(windows, default=64),
            rope_parameters={
                "full_attention": {"rope_type": "default", "rope_theta": arch.rope_theta},
                "sliding_attention": {"rope_type": "default", "rope_theta": arch.local_rope_theta},
            },
            classifier_pooling=config.classifier_pooling,
            embedding_dropout=config.hidden_dropout_prob,
            mlp_dropout=config.hidden_dropout_prob,
            attention_dropout=config.attention_probs_dropout_prob,
        )
    common |= {
        "hidden_act": ACTIVATIONS[arch.activation],
        "layer_norm_eps": arch.norm_epsilon,
        "type_vocab_size": max(1, arch.token_types),
        "hidden_dropout_prob": config.hidden_dropout_prob,
        "attention_probs_dropout_prob": config.attention_probs_dropout_prob,
    }
    if kind == "electra":
        return transformers.ElectraConfig(**common, embedding_size=arch.hidden)
    return transformers.BertConfig(**common)


# ---- from stock ----------------------------------------------------------------------------------------------------


def from_stock(stock: PreTrainedModel) -> PreTrainedModel:
    """Our copy of a stock BERT, RoBERTa, ModernBERT or ELECTRA discriminator, with equal outputs (RoBERTa's where the
    padding is on the right). Raises ValueError for any other model."""
    kind, name = stock.config.model_type, type(stock).__name__
    head = name.removeprefix(STOCK[kind][0]) if kind in STOCK else ""
    pairs = (kind, head) == ("bert", "ForPreTraining")
    if head not in HEADS or ((kind == "electra") != (head == "ForPreTraining") and not pairs):
        raise ValueError(
            f"{name} cannot be read; load the checkpoint as Bert…, Roberta… or ModernBert… with one of "
            f"{', '.join(sorted(set(HEADS) - {'ForPreTraining'}))}, or as BertForPreTraining or ElectraForPreTraining"
        )
    if (head == "ForMaskedLM" or pairs) and not stock.config.tie_word_embeddings:
        raise ValueError("this model's output matrix is not its word embeddings; only tied ones can be read")
    arch, settings = (_read_modern if kind == "modernbert" else _read_bert)(stock.config)
    given = stock.config.to_dict()
    config = FrugalConfig(arch=arch.to_text(), **{key: given[key] for key in CARRIED if key in given} | settings)
    our_class = getattr(modeling, PAIRS if pairs else HEADS[head])
    without_pooler = kind != "modernbert" and head == "Model" and stock.pooler is None
    ours = our_class(config, add_pooling_layer=False) if without_pooler else our_class(config)
    ours.to(stock.dtype)
    sources = {name: _stock_name(name, kind, head) for name in ours.state_dict()}
    pieces = {source: [name for name in sources if sources[name] == source] for source in sources.values()}
    state = stock.state_dict()
    if "roberta" in kind:
        table = _stock_name(("" if head == "Model" else "model.") + "embeddings.position.weight", kind, head)
        state[table] = state[table][_first_position(stock.config) :]
    ours.load_state_dict(
        {name: state[source].chunk(len(pieces[source]))[pieces[source].index(name)] for name, source in sources.items()}
    )
    return ours.train(stock.training)


def _first_position(config: Any) -> int:
    """The row of the position table that the first token takes."""
    return config.pad_token_id + 1 if "roberta" in config.model_type else 0


def _activation(name: str) -> str:
    if name not in ACTIVATIONS_READ:
        raise ValueError(f"activation {name!r} is not supported; {', '.join(sorted(ACTIVATIONS_READ))} are")
    return ACTIVATIONS_READ[name]


def _read_bert(config: Any) -> tuple[Arch, dict[str, Any]]:
    if config.is_decoder or config.add_cross_attention:
        raise ValueError("this BERT is a decoder; only encoders can be read")
    if "roberta" in config.model_type and config.hidden_act != "gelu":
        raise ValueError("this RoBERTa has another activation than its output head's gelu; only gelu can be read")
    if config.model_type == "electra" and config.embedding_size != config.hidden_size:
        raise ValueError("this ELECTRA projects its embeddings; only embedding_size = hidden_size can be read")
    heads = config.num_attention_heads
    layer = LayerArch(config.hidden_size, heads, config.hidden_size // heads, config.intermediate_size)
    options = {
        "max_length": config.max_position_embeddings - _first_position(config),
        "token_types": config.type_vocab_size,
        "norm_epsilon": config.layer_norm_eps,
        "activation": _activation(config.hidden_act),
    }
    arch = Arch.build("bert", config.hidden_size, (layer,) * config.num_hidden_layers, options)
    return arch, {
        "hidden_dropout_prob": config.hidden_dropout_prob,
        "attention_probs_dropout_prob": config.attention_probs_dropout_prob,
    }


def _read_modern(config: Any) -> tuple[Arch, dict[str, Any]]:
    if config.attention_bias or config.mlp_bias or config.norm_bias or config.classifier_bias:
        raise ValueError("this ModernBERT has biases; only those without can be read")
    if not config.decoder_bias:
        raise ValueError("this ModernBERT has no output bias (decoder_bias); only those with one can be read")
    if config.classifier_activation != config.hidden_activation:
        raise ValueError(
            "this ModernBERT has another activation in its head; only those with one activation can be read"
        )
    rope = config.rope_parameters
    if any(rope[kind]["rope_type"] != "default" for kind in set(config.layer_types)):
        raise ValueError("this ModernBERT scales its rotary positions; only the default rope_type can be read")
    heads = config.num_attention_heads
    layers = tuple(
        LayerArch(
            config.hidden_size,
            heads,
            config.hidden_size // heads,
            config.intermediate_size,
            "dense" if kind == "full_attention" else f"window:{config.sliding_window}",
        )
        for kind in config.layer_types
    )
    options = {
        "max_length": config.max_position_embeddings,
        "norm_epsilon": config.norm_eps,
        "activation": _activation(config.hidden_activation),
        "rope_theta": float(rope["full_attention"]["rope_theta"]),
        "local_rope_theta": float(rope["sliding_attention"]["rope_theta"]),
    }
    return Arch.build("modern", config.hidden_size, layers, options), {
        "hidden_dropout_prob": config.mlp_dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "classifier_pooling": config.classifier_pooling,
    }
