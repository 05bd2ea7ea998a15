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
from frugalbert.loading import load_weights
from frugalbert.progress import quiet, reason

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
AS_IT_IS = "as it is"


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
        if (path / "pretrain" / "model").is_dir():  # a run
            path = path / "pretrain" / "model"
    if not path.exists():
        raise FileNotFoundError(f"finetune.model: {path} does not exist; name a model directory or a hub name")
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} is not a model: it has no config.json; name a model directory or a finished run")
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
        why = "it needs code of its own, which is never run here" if "custom code" in str(error) else reason(error)
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
    import transformers

    from frugalbert.model import modeling
    from frugalbert.model.configuration import FrugalConfig

    transformers.AutoConfig.register(FrugalConfig.model_type, FrugalConfig, exist_ok=True)
    for head in ("ForMaskedLM", "ForSequenceClassification", "ForQuestionAnswering", "ForTokenClassification"):
        getattr(transformers, f"AutoModel{head}").register(
            FrugalConfig, getattr(modeling, f"Frugal{head}"), exist_ok=True
        )
    transformers.AutoModel.register(FrugalConfig, modeling.FrugalModel, exist_ok=True)


def _tokenizer(name: str, other: Path | None, num_embeddings: int) -> Any:
    """The model's own tokenizer, or `other` where it brings none."""
    from transformers import AutoTokenizer

    why = "it brings none"
    for place in filter(None, (name, other)):
        if Path(place).is_dir() and not any((Path(place) / file).is_file() for file in VOCABULARIES):
            continue  # transformers would make one up from special tokens alone
        try:
            with quiet():
                tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        except Exception as error:  # as above
            why = reason(error)
            continue
        if not tokenizer.is_fast:
            why = "it is not a fast one"
        elif len(tokenizer) > num_embeddings:
            why = f"it has {len(tokenizer)} tokens, the model {num_embeddings} embeddings"
        else:
            return tokenizer
    raise ValueError(f"{name} has no tokenizer that can be used ({why}); save its own fast tokenizer beside it")


def build(source: Source, data: Data, init: str, dropout: float, seed: int) -> Any:
    """A model in fp32 for the task; `init` is `pretrained`, `random`, or `as it is` (with the head it has).

    Seeds torch's generator. A model that was fine-tuned before keeps its encoder alone. Raises ValueError if the
    weights are damaged, are not those of the configuration's encoder, or have no head for the task `as it is`.
    """
    import torch

    settings = source.config if init == AS_IT_IS else headed(source.config, data, dropout)
    num_spans = len(data.dev[0].spans) if data.dev else 0
    owner = _owner("" if num_spans else data.task.type)
    torch.manual_seed(seed)
    with quiet():
        if init == "random":
            model = owner.from_config(settings, dtype=torch.float32, trust_remote_code=False)
        else:
            model = _load(source, owner, settings)
            if init == "pretrained" and not num_spans and _fine_tuned(source.config):
                torch.manual_seed(seed)
                _new_head(model, owner.from_config(settings, dtype=torch.float32, trust_remote_code=False))
        if not num_spans:
            return model
        from frugalbert.finetune.heads import SPAN_HEAD, SpanClassifier

        model = SpanClassifier(model, num_spans, max(1, len(data.labels)), dropout)
    if init == AS_IT_IS:
        from safetensors.torch import load_file

        if not (Path(source.name) / SPAN_HEAD).is_file():
            raise ValueError(f"{source.name} has no head for {data.task.title} ({SPAN_HEAD}); fine-tune it first")
        model.classifier.load_state_dict(load_file(Path(source.name) / SPAN_HEAD))
    return model


def _owner(kind: str) -> Any:
    """The Auto class of a head; no kind = the encoder alone. Options are scored one by one, so by a classifier."""
    import transformers

    heads = {"": "", "question-answering": "ForQuestionAnswering", "token-classification": "ForTokenClassification"}
    return getattr(transformers, f"AutoModel{heads.get(kind, 'ForSequenceClassification')}")


def _load(source: Source, owner: Any, settings: Any) -> Any:
    import torch

    model, report = load_weights(
        owner,
        source.name,
        f"{source.name} cannot be loaded",
        "copy it again from its origin",
        config=settings,
        dtype=torch.float32,
        ignore_mismatched_sizes=settings is not source.config,  # the head of another task
    )
    absent = [*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]
    prefix = "" if owner.__name__ == "AutoModel" else f"{model.base_model_prefix}."
    encoder = [key for key in absent if key.startswith(prefix) and "pooler" not in key]
    if encoder:
        raise ValueError(
            f"{source.name}: {len(encoder)} weights of the encoder are missing or of another shape, the first is "
            f"{min(encoder)}; the directory's config.json and weights do not belong together"
        )
    if absent and settings is source.config and prefix:
        raise ValueError(
            f"{source.name} has no head for this task ({min(absent)} is missing); fine-tune it first (train: true)"
        )
    return model


def _fine_tuned(base: Any) -> bool:
    """Whether the weights carry the head of a task, which must not leak into another."""
    heads = ("ForSequenceClassification", "ForMultipleChoice", "ForQuestionAnswering", "ForTokenClassification")
    return any(name.endswith(heads) for name in base.architectures or ())


def _new_head(model: Any, fresh: Any) -> None:
    """Give `model` the head of `fresh`: all weights outside the encoder."""
    import torch

    values = fresh.state_dict()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if not name.startswith(f"{model.base_model_prefix}."):
                value.copy_(values[name])


def label_order(source: Source, data: Data) -> list[int] | None:
    """For a model used as it is: the position, among its outputs, of each of the task's classes; by name.

    None = the task's own order. Raises ValueError if the model's classes are others, or as many as the task has not.
    """
    if data.task.type == "question-answering":
        return None
    found = {str(name): int(number) for number, name in (source.config.id2label or {}).items()}
    wanted = data.labels if data.task.type not in ("regression", "multiple-choice") else ()
    refusal = (
        f"{source.name} knows the classes {', '.join(found)}, and {data.task.title} has "
        f"{', '.join(wanted) or 'one number'}; it cannot be evaluated as it is (train: true)"
    )
    if len(found) != (len(wanted) or 1):
        raise ValueError(refusal)
    if not wanted:
        return None
    names = found if set(found) == set(wanted) else {_plain(name): number for name, number in found.items()}
    keys = list(wanted) if names is found else [_plain(name) for name in wanted]
    if all(name.startswith("label") for name in names) and set(names) != set(keys):
        run.say(f"{source.name} does not name its classes; they are taken in the order {', '.join(wanted)}")
        return None
    if set(names) != set(keys):
        raise ValueError(refusal)
    order = [names[key] for key in keys]
    return None if order == list(range(len(order))) else order


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def headed(base: Any, data: Data, dropout: float) -> Any:
    """The configuration with the task's classes, problem type and dropout."""
    settings = copy.deepcopy(base)
    names = ("score",) if data.task.type == "multiple-choice" else data.labels or ("score",)
    if data.task.type != "question-answering":
        settings.id2label = dict(enumerate(names))
        settings.label2id = {name: number for number, name in enumerate(names)}
    settings.problem_type = PROBLEMS.get(data.task.type)
    for name in DROPOUTS:
        if hasattr(settings, name):
            setattr(settings, name, dropout)
    return settings


def title(name: str) -> str:
    """What a model is called on a board: `RUN/pretrain` for the model of a run, else the directory's or hub's name."""
    path = Path(name)
    if not path.is_dir():
        return name
    return "/".join(path.resolve().parts[-3:-1]) if path.name == "model" else path.resolve().name
