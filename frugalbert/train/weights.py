"""Weights to begin with or to learn from: a directory or hub name in, a model of ours out (what `model.interop` takes
over exactly: stock BERT, RoBERTa, ModernBERT and ELECTRA's discriminator, which has no masked-LM head)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from frugalbert.data.masking import Vocabulary
from frugalbert.loading import load_weights

TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model")


def load_model(
    name: str,
    key: str,
    folder: Path,
    kind: type[Any],
    vocabulary: Vocabulary,
    dropout: float = 0.0,
    *,
    whole: bool = False,
) -> Any:
    """The model `name` (a directory relative to `folder`, or a hub name) as one of `kind`.

    Raises ValueError, naming the config `key`, if it is no model, of another family or vocabulary, or, with `whole`, if
    it lacks weights of `kind`.
    """
    from transformers import AutoModelForMaskedLM, AutoModelForPreTraining, PreTrainedConfig

    from frugalbert.model.interop import from_stock

    place = str(folder / name) if (folder / name).exists() else name
    try:
        config, _ = PreTrainedConfig.get_config_dict(place)
        if not isinstance(config.get("vocab_size"), int):
            raise ValueError("an empty directory, or the configuration of something else")
    except Exception as error:  # whatever a file that is no configuration leads to
        raise ValueError(
            f"{key} {name} is neither a model directory in {folder} nor a hub name within reach"
        ) from error
    if config["vocab_size"] < vocabulary.size or not reads_alike(name, folder, vocabulary, config["vocab_size"]):
        raise ValueError(
            f"{key} {name} has {config['vocab_size']} tokens, the tokenizer {vocabulary.size}, and they differ; "
            "load the tokenizer of the same model (tokenizer.path)"
        )
    settings = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    ours = config.get("model_type") == "frugalbert"
    whose = (config.get("model_type"), kind.__name__)
    pretrained = whose[0] == "electra" or whose == ("bert", "FrugalForPairs")  # BERT's own has a head for pairs, too
    stock_kind = AutoModelForPreTraining if pretrained else AutoModelForMaskedLM
    found, report = load_weights(
        kind if ours else stock_kind,
        place,
        f"{key} {name} cannot be loaded",
        "copy it again from its origin",
        **(settings if ours else {}),
    )
    absent = sorted(report["missing_keys"])
    if whole and (absent or stock_kind is AutoModelForPreTraining):
        raise ValueError(
            f"{key} {name} is no masked LM: it has no {absent[0] if absent else 'head that predicts words'}"
        )
    if not ours:
        stock = from_stock(found)
        stock.config.update(settings)
        found = kind.from_pretrained(None, config=stock.config, state_dict=stock.state_dict())
    if found.config.vocab_size > vocabulary.size:  # rows that only pad its table
        found.resize_token_embeddings(vocabulary.size)
    return found


def reads_alike(name: str, folder: Path, vocabulary: Vocabulary, size: int | None = None) -> bool:
    """Whether a model's tokenizer gives every token our id; where there is none, the `size` must be equal."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    place = str(folder / name) if (folder / name).exists() else name
    file = Path(place) / "tokenizer.json"
    if Path(place).is_dir() and not any((Path(place) / name).is_file() for name in TOKENIZER_FILES):
        return size in (None, vocabulary.size)
    try:
        if file.is_file():  # AutoTokenizer warns of model types that it does not know, as ours is
            theirs = Tokenizer.from_file(str(file)).get_vocab()
        else:
            theirs = AutoTokenizer.from_pretrained(place, trust_remote_code=False).get_vocab()
    except Exception:
        return size in (None, vocabulary.size)
    return all(theirs.get(token) == number for token, number in vocabulary.tokens.items())


def is_readable(name: str, folder: Path) -> bool:
    """Whether the model is ours or of a class that is taken over exactly; also if there is no such model."""
    from transformers import PreTrainedConfig

    from frugalbert.model.interop import STOCK

    try:
        config, _ = PreTrainedConfig.get_config_dict(str(folder / name) if (folder / name).exists() else name)
        return config.get("model_type") in (None, "frugalbert", *STOCK)
    except Exception:  # whoever loads it says what it is
        return True
