"""A model directory, an ONNX file or a module in; functions from token ids to outputs out, as one deploys them.

PyTorch runs in bf16 where the hardware multiplies it and the model's outputs stay what they were (`BF16_COSINE`),
compiled layer by layer if wanted; ONNX Runtime in the number format of the file. Several batches are spread over the
cores, one each: threads that share one matrix product wait for each other, in small models most of the time.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from frugalbert import dist, run
from frugalbert.measure.models import is_int8

BF16_COSINE = 0.999
"""Least mean cosine of a model's hidden states in bf16 with those in fp32 for which `auto` chooses bf16."""
PROBE = (4, 32)
COMPILED = ((2, 9, False), (1, 9, False), (3, 17, True))
"""Batch, length and padding of the calls that compile: one row, several, and several that need a mask are graphs."""
Inputs = dict[str, np.ndarray[Any, Any]]
Forward = Callable[[Inputs, int], Any]
"""(inputs, CPU threads) -> float32 values on the model's device."""


class CannotCompile(ValueError):
    """torch.compile does not work here: no compiler, or a model it does not understand."""


@dataclass(frozen=True)
class Served:
    """`outputs` has `last_hidden_state` (batch, tokens, `width`), `logits` (batch, labels), or both; `token_logits`
    (batch, tokens, labels) if an ONNX file labels tokens.

    Inputs are `input_ids`, `attention_mask` and perhaps `token_type_ids`, int64 (batch, tokens). `config`: config.json;
    `threads`: CPU threads it may use; `compile_seconds`: what compiling took, None = not compiled.
    """

    outputs: dict[str, Forward]
    width: int
    config: dict[str, Any]
    device: str
    precision: str
    threads: int
    compile_seconds: float | None = None


def spread(work: Callable[[Inputs, int], Any], batches: Sequence[Inputs], threads: int) -> list[Any]:
    """`work` of every batch, in order: each on one core, as many at a time as there are threads; a lone one on all."""

    def one(batch: Inputs) -> Any:
        run.check_stop()
        return work(batch, 1 if shared else threads)

    shared = threads > 1 and len(batches) > 1
    if not shared:
        return [one(batch) for batch in batches]
    try:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(one, batches))
    finally:
        if torch := sys.modules.get("torch"):  # it remembers the last setting of any thread for new ones
            torch.set_num_threads(torch.get_num_threads())


def serve_onnx(path: Path, threads: int) -> Served:
    """An ONNX file on the CPU; its config.json beside it is read if it is there. Raises ValueError."""
    from frugalbert.measure.session import feed, open_session

    opened, lock = functools.cache(open_session), threading.Lock()

    def session(number: int) -> Any:
        with lock:  # a thread pool each: most need only one of them
            return opened(path, number)

    config = {}
    with contextlib.suppress(OSError, ValueError):
        config = run.read_json(path.with_name("config.json"))
    node = session(threads).get_outputs()[0]
    width = node.shape[-1] if isinstance(node.shape[-1], int) else config.get("hidden_size", 0)

    def forward(inputs: Inputs, number: int) -> Any:
        return session(number).run([node.name], feed(session(number), inputs))[0]

    name = "token_logits" if node.name == "logits" and len(node.shape) == 3 else node.name
    return Served({name: forward}, width, config, "cpu", "int8" if is_int8(path) else "fp32", threads)


def serve_torch(model: Any, device: Any, precision: str, threads: int, *, compiled: bool = False) -> Served:
    """A module in evaluation mode, moved to `device`. `precision`: `auto`, `fp32` or `bf16` (see `cast_weights`)."""
    model = model.to(device)
    encoder = model.base_model
    chosen = cast_weights(model, pick_precision(precision, encoder, device))

    def forward(module: Any, name: str) -> Forward:
        def call(inputs: Inputs, number: int) -> Any:
            import torch

            tensors = {key: torch.from_numpy(value).to(device) for key, value in inputs.items()}
            with torch.inference_mode(), dist.autocast(device, chosen), cpu_threads(number):
                return module(**tensors)[name].float()

        return call

    outputs = {"last_hidden_state": forward(encoder, "last_hidden_state")}
    if type(model).__name__.endswith("ForSequenceClassification"):
        outputs["logits"] = forward(model, "logits")
    threads = threads if device.type == "cpu" else 1
    seconds = None
    if compiled:
        try:
            seconds = compile_blocks(encoder, outputs["last_hidden_state"], {1, threads})
        except CannotCompile as error:
            run.say(f"{error}; the model runs uncompiled")
    return Served(outputs, encoder.config.hidden_size, model.config.to_dict(), device.type, chosen, threads, seconds)


def cast_weights(model: Any, precision: str) -> str:
    """Cast the weights of matrix products once instead of in every call, in place; returns `precision`.

    What autocast makes of the model stays the same bit for bit; calls of few tokens spend most of their time casting.
    """
    import torch

    if precision == "bf16":
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.to(torch.bfloat16)
    return precision


def pick_precision(asked: str, encoder: Any, device: Any) -> str:
    """`auto` -> `bf16` where the hardware multiplies it and this encoder's hidden states hardly change, else `fp32`."""
    import torch

    from frugalbert.measure.onnx import make_batch

    if asked != "auto" or not dist.multiplies_bf16(device):
        return "fp32" if asked == "auto" else asked
    inputs = {name: value.to(device) for name, value in make_batch(encoder, PROBE).items()}
    valid_BT = inputs["attention_mask"].bool()
    with torch.inference_mode():
        exact = encoder(**inputs).last_hidden_state[valid_BT]
        with dist.autocast(device, "bf16"):
            rough = encoder(**inputs).last_hidden_state[valid_BT].float()
    cosine = torch.nn.functional.cosine_similarity(exact, rough, dim=-1).mean().item()
    return "bf16" if cosine >= BF16_COSINE else "fp32"


@contextlib.contextmanager
def cpu_threads(number: int) -> Iterator[None]:
    """torch's CPU threads during a call; the caller's setting comes back after it."""
    import torch

    before = torch.get_num_threads()
    if number != before:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        if number != before:
            torch.set_num_threads(before)


def compile_blocks(encoder: Any, forward: Forward, threads: set[int]) -> float:
    """Compile the encoder's layers for all shapes, by calls of `forward`; the seconds that it took.

    Layers of one kind share their graphs, so a deep encoder costs no more than a shallow one. Raises CannotCompile
    with the layers as they were.
    """
    blocks = dist.blocks(encoder)
    dist.compile_blocks(blocks, dynamic=True)
    start = time.perf_counter()
    try:
        for batch, length, padded in COMPILED:
            inputs = {name: np.ones((batch, length), dtype=np.int64) for name in ("input_ids", "attention_mask")}
            inputs["attention_mask"][1:, -1] -= padded
            for number in threads:
                forward(inputs, number)
    except Exception as error:  # the compilers of torch and of the system have no error in common
        dist.eager_blocks(blocks)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise CannotCompile(f"torch.compile does not work here ({reason})") from None
    return time.perf_counter() - start
