"""Real texts of mixed lengths in; how fast an `Encoder` reads them out, batched by length and as they come.

What a table of fixed shapes does not show: padding, tokenisation and the cost of a call are in these figures. The texts
are paragraphs of Python's own manual, which is part of every installation, evenly from all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from frugalbert.measure import batching, serving
from frugalbert.measure.encoder import Encoder

LEAST_WORDS = 4
BATCHINGS = ("by length", "in order")


def paragraphs(count: int) -> list[str]:
    """`count` paragraphs in the order of the manual: 4 to some hundred words, half of them below 20."""
    from pydoc_data.topics import topics

    found = [" ".join(part.split()) for name in sorted(topics) for part in topics[name].split("\n\n")]
    found = [text for text in found if text.count(" ") >= LEAST_WORDS - 1]
    return [found[number * len(found) // count] for number in range(count)]


def open_encoder(task: dict[str, Any], load: Callable[[dict[str, Any]], Any]) -> Encoder:
    """The encoder of a timing task; `load` gives the module of one that is no directory (the baseline)."""
    compiled = task["kind"] == "compiled"
    precision = "auto" if task["device"] == "cuda" else task["precision"]
    settings = {"precision": precision, "threads": task["threads"], "max_length": task["max_length"]}
    if task["baseline"]:
        model = load(task).to(task["device"])
        encoder = Encoder.around(model, task["tokenizer"], **settings, compile=compiled)
    else:
        encoder = Encoder(Path(task["path"]), device=task["device"], **settings, compile=compiled)
    if compiled and encoder.compile_seconds is None:
        raise serving.CannotCompile("torch.compile does not work here")
    return encoder


def time_texts(
    encoder: Encoder, cell: dict[str, Any], rows: int, timer: Callable[[Callable[[], Any]], dict[str, Any]]
) -> dict[str, Any]:
    """Passes over the texts by `timer`: milliseconds, texts and real tokens per second, share of padding."""
    texts = paragraphs(cell["texts"])
    if cell["batching"] == "in order":
        encoder.batches = partial(batching.in_order, rows=rows)
    lengths = encoder.count_tokens(texts)
    work = encoder.predict if encoder.classifies else encoder.encode
    found = timer(lambda: work(texts))
    seconds = found["median_ms"] / 1e3
    return {
        "precision": encoder.precision,
        "compile_seconds": encoder.compile_seconds,
        "tokens": sum(lengths),
        "median_tokens": float(np.median(lengths)),
        "longest": max(lengths),
        "padding": batching.padding(lengths, encoder.batches(lengths)),
        "texts_per_second": len(texts) / seconds,
        "tokens_per_second": sum(lengths) / seconds,
        **found,
    }
