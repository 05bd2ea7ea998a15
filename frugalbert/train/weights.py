"""Weights to begin with or to learn from: a directory or hub name in, a model of ours out (stock BERT, ModernBERT and
ELECTRA's discriminator are taken over exactly; the last has no masked-LM head, so that starts from random weights)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from frugalbert.data.masking import Vocabulary


def load_model(name: str, key: str, folder: Path, kind: type[Any], vocabulary: Vocabulary, dropout: float = 0.0) -> Any:
    """The model `name` (a directory relative to `folder`, or a hub name) as one of `kind`.

    Raises ValueError, naming the config `key`, if it is no model, of another family, or of another vocabulary size.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForMaskedLM, AutoModelForPreTraining, PreTrainedConfig

    from frugalbert.model.interop import from_stock

    place = str(folder / name) if (folder / name).exists() else name
    try:
        config, _ = PreTrainedConfig.get_config_dict(place)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{key} {name} is neither a model directory in {folder} nor a hub name within reach"
        ) from error
    if config.get("vocab_size") != vocabulary.size:
        raise ValueError(
            f"{key} {name} has {config.get('vocab_size')} tokens, the tokenizer {vocabulary.size}; "
            "load the tokenizer of the same model (tokenizer.path)"
        )
    settings = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    stock_kind = AutoModelForPreTraining if config.get("model_type") == "electra" else AutoModelForMaskedLM
    try:
        if config.get("model_type") == "frugalbert":
            return kind.from_pretrained(place, **settings)
        found = stock_kind.from_pretrained(place, trust_remote_code=False)
    except (OSError, RuntimeError, SafetensorError) as error:
        why = next(iter(str(error).splitlines()), type(error).__name__)[:160]
        raise ValueError(f"{key} {name} cannot be loaded ({why}); copy it again from its origin") from None
    stock = from_stock(found)
    stock.config.update(settings)
    return kind.from_pretrained(None, config=stock.config, state_dict=stock.state_dict())
