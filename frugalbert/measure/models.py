"""Model directories in, modules out: the one way in which export and bench read weights.

Any Hugging Face directory will do. Code that a directory ships is never run: models of our own type are read with our
own classes, models of a type that transformers knows with its classes, anything else is refused.
"""

from __future__ import annotations

import contextlib
import mmap
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frugalbert import run
from frugalbert.loading import load_weights
from frugalbert.progress import quiet, reason

OURS = "frugalbert"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
HEADS = {
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForMultipleChoice": "AutoModelForMultipleChoice",
    "ForPreTraining": "AutoModelForPreTraining",
    "ForReplacedTokenDetection": "AutoModel",
    "ForPairs": "AutoModelForPreTraining",
}
"""Ending of a class name in `architectures` -> the Auto class of transformers that loads it."""


FORMS = ("hf", "onnx", "onnx-int8")
"""Directories of an export."""
INT8_OPERATORS = (b"MatMulInteger", b"QLinearMatMul", b"DynamicQuantizeLinear")
BEHIND_PADDING = ("camembert", "data2vec-text", "ibert", "lilt", "longformer", "luke", "markuplm", "mpnet", "xmod")
"""Types beside RoBERTa's own whose positions begin behind the padding id (transformers' `padding_idx + 1`)."""
SERVED = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
"""Heads that are deployed with their encoder."""


def read_model_config(path: Path) -> dict[str, Any]:
    """The `config.json` of a model directory. Raises ValueError with one sentence if the directory is none."""
    if not path.is_dir():
        kind = "is a file" if path.exists() else "does not exist"
        raise ValueError(f"{path} {kind}; name a model directory with config.json and model.safetensors in it")
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} is not a model: it has no config.json; name a Hugging Face model directory")
    try:
        config = run.read_json(path / "config.json")
    except ValueError:
        config = None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ValueError(f"{path / 'config.json'} does not describe a model: it is no JSON mapping with a model_type")
    _check_weights(path)
    return config


def _check_weights(path: Path) -> None:
    """The cheap part of reading weights: are they there, and do header and length of each file fit together?"""
    from safetensors import SafetensorError, safe_open

    weights = sorted(path.glob("model*.safetensors"))
    if not weights:
        raise ValueError(
            f"{path} has no model.safetensors (pickled weights are not read); save the model again with it"
        )
    for file in weights:
        try:
            with safe_open(file, framework="numpy"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({reason(error)}); copy it again from where it was saved") from None


def head_of(config: dict[str, Any]) -> str:
    """The head a directory was saved with: an ending such as `ForMaskedLM`, or `Model` for a bare encoder."""
    names = config.get("architectures") or ["Model"]
    return next((head for head in HEADS if str(names[0]).endswith(head)), "Model")


def load_model(path: Path, *, encoder_only: bool = False) -> Any:
    """The model in a directory, in fp32 and evaluation mode, with the head it was saved with (or without any).

    Raises ValueError for a directory that is no model, is damaged, or would need code of its own to run.
    """
    config = read_model_config(path)
    head = "Model" if encoder_only else head_of(config)
    owner = _class_for(path, config, head)
    with quiet():
        import torch

        remedy = "copy it again from where it was saved"
        options = {"dtype": torch.float32, "local_files_only": True}
        model, report = load_weights(owner, path, f"{path} is damaged", remedy, **options)
    missing = sorted(name for name in report["missing_keys"] if "pooler" not in name)
    if missing:
        raise ValueError(
            f"{path} is damaged or incomplete: {len(missing)} weights of its config.json are missing, the first is "
            f"{missing[0]}; copy it again from where it was saved"
        )
    return model.eval()


def _class_for(path: Path, config: dict[str, Any], head: str) -> Any:
    kind = config["model_type"]
    if kind == OURS:
        from frugalbert.model import modeling

        return getattr(modeling, f"Frugal{head}")
    if config.get("is_encoder_decoder"):
        raise ValueError(f"{path} is an encoder-decoder ({kind}); only encoders can be exported and timed")
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if kind not in CONFIG_MAPPING_NAMES:
        why = "brings its own code, which is never run here" if config.get("auto_map") else "is not known"
        raise ValueError(f"{path} is of the type {kind!r}, which {why}; use a type that transformers itself contains")
    return getattr(transformers, HEADS.get(head, "AutoModel"))


def copy_tokenizer(sources: list[Path], out: Path) -> bool:
    """Copy the tokenizer's files of the first directory that has any, unchanged. False if none has."""
    for source in sources:
        names = [name for name in TOKENIZER_FILES if (source / name).is_file()]
        if names:
            for name in names:
                shutil.copyfile(source / name, out / name)
            return True
    return False


def max_length(config: Any) -> int | None:
    """Most tokens the model reads at once, if its configuration (object or mapping) says so.

    The positions of RoBERTa and its kin begin behind the padding id.
    """
    values = config if isinstance(config, dict) else config.to_dict()
    value = values.get("max_position_embeddings")
    if not isinstance(value, int) or value <= 0:
        return None
    kind = str(values.get("model_type"))
    return value - (values.get("pad_token_id", 1) + 1 if "roberta" in kind or kind in BEHIND_PADDING else 0)


def load_for_serving(path: Path) -> Any:
    """What one deploys: a model for a task whole, any other as its encoder."""
    return load_model(path, encoder_only=head_of(read_model_config(path)) not in SERVED)


# ---- what there is to time or to serve ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """Something to time. `kind`: `torch`, `compiled`, `onnx`, `onnx-int8` or `baseline`; `tokenizer`: a directory."""

    name: str
    kind: str
    path: Path | None
    vocab_size: int | None
    longest: int | None
    identity: str
    tokenizer: Path | None = None


def _inside(path: Path) -> Path:
    """Of a run its export, or what it pre-trained; anything else as it is."""
    inner = (path / "export", path / "pretrain" / "model")
    return next((place for place in inner if place.is_dir()), path)


def find_served(path: Path) -> Path:
    """The directory or ONNX file that is opened for `path`: of several forms PyTorch's, exact and as fast."""
    path = _inside(path)
    path = next((path / name for name in FORMS if (path / name).is_dir()), path)
    if (path / "model.onnx").is_file() and not list(path.glob("model*.safetensors")):
        return path / "model.onnx"
    return path


def find_models(path: Path) -> list[Model]:
    """The models at `path`: an ONNX file, a model directory, an export (`hf/`, `onnx/`, `onnx-int8/`), or a run.

    Raises ValueError with one sentence if there is none.
    """
    path = _inside(path)
    parts = [path / name for name in FORMS if (path / name).is_dir()]
    if parts:
        return [model for part in parts for model in find_models(part)]
    if path.suffix == ".onnx":
        return [_onnx_model(path)]
    beside = [_onnx_model(path / "model.onnx")] if (path / "model.onnx").is_file() else []
    if beside and not list(path.glob("model.safetensors*")):
        return beside
    config = read_model_config(path)
    weights = [run.sha256(file) for file in sorted(path.glob("model*.safetensors"))]
    name = path.resolve().name
    model = Model(
        name, "torch", path, config.get("vocab_size"), max_length(config), run.fingerprint(weights), _tokenizer(path)
    )
    return [model, *beside]


def _onnx_model(path: Path) -> Model:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; name an .onnx file or a model directory")
    config = {}
    with contextlib.suppress(OSError, ValueError):
        config = run.read_json(path.with_name("config.json"))
    kind = "onnx-int8" if is_int8(path) else "onnx"
    name = path.resolve().parent.name if path.name == "model.onnx" else path.name
    return Model(
        name, kind, path, config.get("vocab_size"), max_length(config), run.sha256(path)[:16], _tokenizer(path.parent)
    )


def _tokenizer(folder: Path) -> Path | None:
    return folder if any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt")) else None


def is_int8(path: Path) -> bool:
    """Whether an ONNX file computes with 8-bit numbers."""
    if path.stat().st_size == 0:
        return False
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return any(data.find(word) >= 0 for word in INT8_OPERATORS)
