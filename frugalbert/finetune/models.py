"""A model directory or hub name in; tokenizer, identity and freshly headed models out.

Anything `AutoModelForSequenceClassification` can build will do. Our own type is read with our own classes; code that a
model directory brings along is never run. A pre-trained model keeps its encoder and gets a new head; the random
baseline is the same configuration with all weights drawn anew.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frugalbert import config, run
from frugalbert.finetune.tasks import Data
from frugalbert.progress import quiet

DROPOUTS = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "classifier_dropout",
    "attention_dropout",
    "embedding_dropout",
    "mlp_dropout",
    "dropout",
    "seq_classif_dropout",
    "pooler_dropout",
)
"""What configurations of transformers call dropout; those that a configuration has are set."""
VOCABULARIES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)
PROBLEMS = {
    "classification": "single_label_classification",
    "regression": "regression",
    "multilabel": "multi_label_classification",
}


@dataclass(frozen=True)
class Source:
    """Where the weights come from. `identity` changes with any of the files that decide a result."""

    name: str
    config: Any
    tokenizer: Any
    identity: str

    @property
    def has_types(self) -> bool:
        return getattr(self.config, "type_vocab_size", 0) > 1

    @property
    def max_positions(self) -> int | None:
        """Longest input, if the configuration says so (RoBERTa's positions start after the padding id)."""
        value = getattr(self.config, "max_position_embeddings", None)
        if not isinstance(value, int) or value <= 0:
            return None
        return value - (self.config.pad_token_id + 1 if "roberta" in self.config.model_type else 0)


def locate(section: config.Finetune, inputs: dict[str, Path]) -> str:
    """The directory or hub name to fine-tune. Raises ValueError or FileNotFoundError if it cannot be a model."""
    if section.model is None:
        if "pretrain" not in inputs:
            raise ValueError("finetune needs a pre-trained model; add the section pretrain, or write finetune.model")
        path = inputs["pretrain"] / "model"
    else:
        path = inputs["yaml"] / section.model
        is_name = section.model.count("/") <= 1 and not section.model.startswith((".", "/", "~"))
        if not path.exists() and is_name:
            return section.model
    if not path.exists():
        raise FileNotFoundError(f"finetune.model: {path} does not exist; name a model directory or a hub name")
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} is not a model: it has no config.json; name a Hugging Face model directory")
    if not any((path / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        raise ValueError(f"{path} is not a model: it has no model.safetensors; save it again with save_pretrained")
    return str(path)


def open_source(name: str, tokenizer_path: Path | None) -> Source:
    """Configuration and tokenizer; `tokenizer_path` is used where the model brings none. Raises ValueError."""
    from transformers import AutoConfig

    path = Path(name)
    _register()
    try:
        with quiet():
            settings = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # transformers, huggingface_hub and the network share no base class
        why = "it needs code of its own, which is never run here" if "custom code" in str(error) else _why(error)
        what = f"{name} cannot be read" if path.is_dir() else f"{name} is no directory here and not found on the hub"
        raise ValueError(f"finetune.model: {what} ({why}); name another model directory or hub name") from None
    tokenizer = _tokenizer(name, tokenizer_path, settings.vocab_size)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in (".json", ".safetensors", ".txt", ".model"))
        identity = run.fingerprint({file.name: run.sha256(file) for file in files})
    else:
        identity = str(getattr(settings, "_commit_hash", None) or name)
    return Source(name, settings, tokenizer, identity)


def _register() -> None:
    """Tell transformers' Auto classes of our own type, so that its directories load without any code of theirs."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from frugalbert.model.configuration import FrugalConfig
    from frugalbert.model.modeling import FrugalForSequenceClassification

    AutoConfig.register(FrugalConfig.model_type, FrugalConfig, exist_ok=True)
    AutoModelForSequenceClassification.register(FrugalConfig, FrugalForSequenceClassification, exist_ok=True)


def _tokenizer(name: str, other: Path | None, num_embeddings: int) -> Any:
    """The model's own tokenizer, or `other` where it brings none."""
    from transformers import AutoTokenizer

    reason = "it brings none"
    for place in filter(None, (name, other)):
        if Path(place).is_dir() and not any((Path(place) / file).is_file() for file in VOCABULARIES):
            continue  # transformers would make one up from special tokens alone
        try:
            with quiet():
                tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        except Exception as error:  # as above
            reason = _why(error)
            continue
        if not tokenizer.is_fast:
            reason = "it is not a fast one"
        elif len(tokenizer) > num_embeddings:
            reason = f"it has {len(tokenizer)} tokens, the model {num_embeddings} embeddings"
        else:
            return tokenizer
    raise ValueError(f"{name} has no tokenizer that can be used ({reason}); save its own fast tokenizer beside it")


def build(source: Source, data: Data, init: str, dropout: float, seed: int) -> Any:
    """A model in fp32 for the task; `init` is `pretrained` or `random`. Seeds torch's generator.

    Raises ValueError if the weights are damaged or are not those of the configuration's encoder.
    """
    import torch
    from transformers import AutoModelForSequenceClassification as Owner

    settings = headed(source.config, data, dropout)
    torch.manual_seed(seed)
    with quiet():
        if init == "random":
            return Owner.from_config(settings, dtype=torch.float32, trust_remote_code=False)
        try:
            model, report = Owner.from_pretrained(
                source.name,
                config=settings,
                dtype=torch.float32,
                output_loading_info=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # the head of another task
                trust_remote_code=False,
            )
        except Exception as error:  # safetensors, JSON and shape errors have no base in common
            raise ValueError(f"{source.name} cannot be loaded ({_why(error)}); copy it again from its origin") from None
    absent = [*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]
    encoder = [key for key in absent if key.startswith(f"{model.base_model_prefix}.") and "pooler" not in key]
    if encoder:
        raise ValueError(
            f"{source.name}: {len(encoder)} weights of the encoder are missing or of another shape, the first is "
            f"{min(encoder)}; the directory's config.json and weights do not belong together"
        )
    return model


def headed(base: Any, data: Data, dropout: float) -> Any:
    """The configuration with the task's classes, problem type and dropout."""
    settings = copy.deepcopy(base)
    names = data.labels or ("score",)
    settings.id2label = dict(enumerate(names))
    settings.label2id = {name: number for number, name in enumerate(names)}
    settings.problem_type = PROBLEMS[data.task.type]
    for name in DROPOUTS:
        if hasattr(settings, name):
            setattr(settings, name, dropout)
    return settings


def _why(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:160]
