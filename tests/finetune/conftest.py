"""A tiny stock BERT with a tokenizer of its own, made once: the runner must take any Hugging Face directory."""

from __future__ import annotations

import random
import re
import string
from collections import Counter
from pathlib import Path

import pytest

WORDS = "red green blue yellow cat dog bird fish runs sleeps eats sings the a very not big small old new".split()


def sentences(count: int, seed: int) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(3, 12))) for _ in range(count)]


def make_tiny(path: Path, texts: list[str], positions: int = 64) -> Path:
    """Save a BERT of one layer (random weights) and a WordPiece tokenizer of the texts' words; returns `path`."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    counts = Counter(re.findall(r"[a-z]+", " ".join(texts).lower()))
    letters = [f"{start}{letter}" for letter in string.printable.strip() for start in ("", "##")]
    words = [word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:600]]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys([*special, *letters, *words]))}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ["pad_token", "unk_token", "cls_token", "sep_token", "mask_token"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **dict(zip(names, special, strict=True)),
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=positions,
    )
    BertForMaskedLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"), sentences(200, 0))
