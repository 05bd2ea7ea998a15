"""Tiny models and a tiny tokenizer on disk, made once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
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


@pytest.fixture(scope="session")
def run_inputs(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> dict[str, Path]:
    """What the stages before `export` leave: one of our masked-LM models, a fine-tuned one, shards and dev texts."""
    from transformers import AutoTokenizer

    from frugalbert.model.arch import Arch
    from frugalbert.model.configuration import FrugalConfig
    from frugalbert.model.modeling import FrugalForMaskedLM, FrugalForSequenceClassification
    from tests.data.small_shards import random_documents, write_shards

    base = tmp_path_factory.mktemp("tiny-run")
    inputs = {name: base / name for name in ("pretrain", "shards", "finetune")}
    arch = Arch.parse("bert 2x32 heads=2 ffn=64*1,48 max_length=64")
    config = FrugalConfig.from_arch(arch, 256)
    spread_out(FrugalForMaskedLM(config)).save_pretrained(inputs["pretrain"] / "model")
    config = FrugalConfig.from_arch(arch, 256, id2label={0: "up", 1: "down"}, label2id={"up": 0, "down": 1})
    config.problem_type = "single_label_classification"
    folder = inputs["finetune"] / "updown"
    spread_out(FrugalForSequenceClassification(config)).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(folder / "model")
    tokens = [{"input_ids": [2, 5 + number, 9, 3], "token_type_ids": [0, 0, 1, 1]} for number in range(30)]
    (folder / "dev-tokens.jsonl").write_text("".join(json.dumps(line) + "\n" for line in tokens))
    (folder / "pretrained-seed0").mkdir()
    golds = [json.dumps({"gold": ("up", "down")[number % 2]}) + "\n" for number in range(30)]
    (folder / "pretrained-seed0" / "predictions.jsonl").write_text("".join(golds))
    inputs["shards"].mkdir()
    write_shards(inputs["shards"], random_documents(np.random.default_rng(0), 200, 256), (32,), vocab_size=256)
    return {**inputs, "tokenizer": tokenizer_dir}


@pytest.fixture(scope="session")
def run_export(tmp_path_factory: pytest.TempPathFactory, run_inputs: dict[str, Path]) -> tuple[Path, dict]:
    """The stage `export` of that run, with one task."""
    from frugalbert.config import Export, Machine
    from frugalbert.measure.export import build

    out = tmp_path_factory.mktemp("export")
    return out, build(Export(task="updown"), run_inputs, out, Machine(device="cpu"))


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
