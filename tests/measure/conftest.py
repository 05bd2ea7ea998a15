"""Tiny models and a tiny tokenizer on disk, made once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{number}" for number in range(251))]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def spread_out(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights large enough that a wrong mask, position or layer shows in the outputs."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.2)
    return model.eval()


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(VOCABULARY)}
    backend = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names: dict = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    names["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    path = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=64, **names).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def stock_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """A stock BertForMaskedLM with its tokenizer."""
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

    path = tmp_path_factory.mktemp("models") / "stock"
    config = BertConfig(vocab_size=256, max_position_embeddings=64, **SIZES)
    spread_out(BertForMaskedLM(config)).save_pretrained(path)
    AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def stock_export(tmp_path_factory: pytest.TempPathFactory, stock_dir: Path) -> Path:
    """The stock model in all formats, as `frugalbert export` writes it."""
    from frugalbert.config import Export
    from frugalbert.measure.export import export_model

    out = tmp_path_factory.mktemp("exports") / "stock"
    export_model(stock_dir, Export(licence="mit"), out)
    return out


@pytest.fixture
def broken_model(stock_dir: Path, tmp_path: Path) -> Path:
    """A copy of the stock model to damage."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((stock_dir / name).read_bytes())
    return folder


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
