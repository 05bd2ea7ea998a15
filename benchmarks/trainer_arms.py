"""Masked-LM training as `run_mlm.py` does it: transformers' Trainer around its own model, timed step by step.

`documented`: the script's defaults (fp32, batches of 8, logits for every token, dropout of the architecture's paper).
`best`: what an attentive user reaches with the Trainer's own settings: bf16, no dropout, and of batch sizes and
`torch_compile` what a trial shows to be the fastest. Attention is SDPA in both, transformers' default.
"""

from __future__ import annotations

import statistics
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

BATCHES = {"cpu": (8, 16, 32, 64), "cuda": (64, 256, 1024)}
SPECIAL = {"pad": 0, "unk": 100, "cls": 101, "sep": 102, "mask": 103, "all": [0, 100, 101, 102, 103]}


def stock(arch: str, vocab_size: int, dropout: float) -> Any:
    """BertForMaskedLM or ModernBertForMaskedLM of an architecture of family bert or modern, with the weights of Hugging
    Face's own initialisation. Dropout is BERT's."""
    from transformers import BertConfig, BertForMaskedLM

    from frugalbert.model.arch import Arch
    from frugalbert.model.configuration import FrugalConfig
    from frugalbert.model.interop import to_stock
    from frugalbert.model.modeling import FrugalForMaskedLM

    sizes = Arch.parse(arch)
    if sizes.family == "modern":
        same = to_stock(FrugalForMaskedLM(FrugalConfig.from_arch(sizes, vocab_size, SPECIAL["pad"], 0.0)))
        return type(same)(same.config)
    config = BertConfig(
        vocab_size=vocab_size, hidden_size=sizes.hidden, num_hidden_layers=len(sizes.layers),
        num_attention_heads=sizes.layers[0].heads, intermediate_size=sizes.layers[0].ffn,
        max_position_embeddings=sizes.max_length, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
        attn_implementation="sdpa",
    )  # fmt: skip
    return BertForMaskedLM(config)


def data(options: Namespace, folder: Path) -> tuple[Any, Any]:
    """The rows of the shards in memory, and `run_mlm`'s collator with a tokenizer of the same vocabulary."""
    import numpy as np
    from tokenizers import Tokenizer, models
    from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

    path = folder / f"length-{options.length}" / "train-00000.bin"
    rows = np.fromfile(path, "<u2").reshape(-1, options.length).astype(np.int64)
    names = {SPECIAL[role]: f"[{role.upper()}]" for role in ("pad", "unk", "cls", "sep", "mask")}
    words = {names.get(number, f"w{number}"): number for number in range(options.vocab_size)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="[UNK]")),
        pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
    )  # fmt: skip
    masked = [{"input_ids": row.tolist(), "attention_mask": [1] * options.length} for row in rows]
    return masked, DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)


def train(options: Namespace, folder: Path, arm: str, settings: dict[str, Any], after_step: Callable[[], bool]) -> None:
    """Train until `after_step` says that it is enough."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = after_step()

    rows, collator = data(options, folder)
    best = arm == "best"
    workers = 8 if best and options.device == "cuda" else 0  # a GPU would wait for the collator
    arguments = TrainingArguments(
        str(folder / arm), max_steps=1_000_000, per_device_train_batch_size=settings["batch_size"], bf16=best,
        learning_rate=1e-4 if best else 5e-5, use_cpu=options.device == "cpu", torch_compile=settings["compile"],
        report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, dataloader_drop_last=True,
        dataloader_num_workers=workers, dataloader_persistent_workers=workers > 0,
    )  # fmt: skip
    Trainer(
        model=stock(options.arch, options.vocab_size, 0.0 if best else 0.1).train(), args=arguments,
        train_dataset=rows, data_collator=collator, callbacks=[Watch()],
    ).train()  # fmt: skip


def choose(options: Namespace, folder: Path, seconds: float) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The fastest batch size, compiled if that is faster still; and all that was tried."""
    tried: list[dict[str, Any]] = []
    for size in BATCHES[options.device]:
        tried.append({"batch_size": size, "compile": False})
        tried[-1]["tokens_per_second"] = _speed(options, folder, tried[-1], seconds)
    fastest = max(tried, key=lambda row: row["tokens_per_second"])
    if options.try_compile:
        tried.append({**fastest, "compile": True})
        tried[-1]["tokens_per_second"] = _speed(options, folder, tried[-1], seconds)
        fastest = max(fastest, tried[-1], key=lambda row: row["tokens_per_second"])
    return {name: fastest[name] for name in ("batch_size", "compile")}, tried


def _speed(options: Namespace, folder: Path, settings: dict[str, Any], seconds: float) -> float:
    """Tokens per second of the median step, of at least 4 after 2 to warm up; 0 if it does not fit or does not work."""
    ends: list[float] = []

    def after_step() -> bool:
        if options.device == "cuda":
            import torch

            torch.cuda.synchronize()
        ends.append(time.perf_counter())
        return len(ends) > 6 and ends[-1] - ends[2] > seconds

    try:
        train(options, folder, "best", settings, after_step)
    except Exception as error:  # whatever a compiler or a full memory raises: this setting is out
        print(f"{settings}: {str(error).strip().splitlines()[0]}")
        return 0.0
    steps = [after - before for before, after in zip(ends[2:], ends[3:], strict=False)]
    return round(settings["batch_size"] * options.length / statistics.median(steps), 1)
