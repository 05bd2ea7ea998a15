"""Timing in a process of its own: a small description on standard input, one JSON line per shape or architecture out.

Protocol (Howard 2020's HAT and AutoTinyBERT time wall clocks on busy machines, which orders models at random): the
thread count is fixed before torch or ONNX Runtime start, calls are warmed up, and on one thread the clock is the
process's CPU time, which other processes do not lengthen; several threads and GPUs are timed by the wall and by CUDA
events. A result whose repeats spread, or whose wall time is far above its CPU time, is marked noisy.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from frugalbert.measure import serving

LEAST_REPEATS = 9
TEXT_REPEATS = 3
MAX_SECONDS = 10.0
WARMUP_SECONDS = 0.3
WARMUP_CALLS = (2, 50)
NOISY_SPREAD = 0.25
NOISY_WALL = 1.1


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call. `spread` = (p90 - p10) / median; `wall_ratio` = wall time over the clock's time."""

    median_ms: float
    p90_ms: float
    min_ms: float
    repeats: int
    clock: str
    spread: float
    wall_ratio: float
    noisy: bool


def percentile(values: list[float], share: float) -> float:
    """Linear interpolation between the two nearest of the sorted values."""
    import numpy as np

    return float(np.quantile(values, share))


def pick_clock(threads: int, device: str) -> str:
    """`cuda` (events), `cpu` (process time: one thread, where it is fine enough to read), otherwise `wall`."""
    if device == "cuda":
        return "cuda"
    return "cpu" if threads == 1 and time.get_clock_info("process_time").resolution < 1e-4 else "wall"


def time_callable(
    call: Callable[[], Any],
    repeats: int,
    clock: str = "cpu",
    *,
    warmup_seconds: float = WARMUP_SECONDS,
    now: Callable[[], float] | None = None,
    wall: Callable[[], float] = time.perf_counter,
) -> Timing:
    """Time `call` `repeats` times after warm-up; slow calls fewer times (but 9), so that a shape takes about 10 s.

    `clock` is one of `pick_clock`'s; `now` and `wall` replace the real clocks (seconds).
    """
    start, calls = wall(), 0
    while calls < WARMUP_CALLS[0] or (calls < WARMUP_CALLS[1] and wall() - start < warmup_seconds):
        call()
        calls += 1
    once = _cuda_seconds if clock == "cuda" else _clock_seconds(now or (time.process_time if clock == "cpu" else wall))
    seconds: list[float] = []
    start = wall()
    while len(seconds) < repeats and (len(seconds) < LEAST_REPEATS or wall() - start < MAX_SECONDS):
        seconds.append(once(call))
    passed = wall() - start
    median = max(statistics.median(seconds), 1e-9)
    spread = (percentile(seconds, 0.9) - percentile(seconds, 0.1)) / median
    ratio = passed / max(sum(seconds), 1e-9) if clock == "cpu" else 1.0
    return Timing(
        median_ms=1e3 * median,
        p90_ms=1e3 * percentile(seconds, 0.9),
        min_ms=1e3 * min(seconds),
        repeats=len(seconds),
        clock=clock,
        spread=spread,
        wall_ratio=ratio,
        noisy=spread > NOISY_SPREAD or ratio > NOISY_WALL,
    )


def _clock_seconds(now: Callable[[], float]) -> Callable[[Callable[[], Any]], float]:
    def once(call: Callable[[], Any]) -> float:
        start = now()
        call()
        return now() - start

    return once


def _cuda_seconds(call: Callable[[], Any]) -> float:
    import torch

    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


# ---- the process that times ----------------------------------------------------------------------------------------

Prepare = Callable[[int, int], Callable[[], Any]]
"""(batch, length) -> the call to time."""


def _load(task: dict[str, Any]) -> Any:
    """A model directory, or stock BERT of the sizes in `task["baseline"]` with random weights."""
    from frugalbert.measure.models import load_for_serving
    from frugalbert.progress import quiet

    if task["baseline"]:
        from transformers import BertConfig, BertModel

        with quiet():
            return BertModel(BertConfig(**task["baseline"])).eval()
    return load_for_serving(Path(task["path"]))


def _torch_call(task: dict[str, Any], model: Any) -> tuple[Prepare, dict[str, Any]]:
    import torch

    from frugalbert import dist
    from frugalbert.measure.onnx import takes_token_types

    precision, dtype = "fp32", torch.float32
    device = torch.device(task["device"])
    if task["device"] == "cuda":
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    model = model.to(device=device, dtype=dtype)
    if task["device"] == "cpu" and task.get("precision", "fp32") != "fp32":
        precision = serving.pick_precision(task["precision"], model.base_model, device)
        serving.cast_weights(model, precision)
        dtype = torch.bfloat16 if precision == "bf16" else dtype

    def run(inputs: dict[str, Any], threads: int = 1) -> Any:
        with torch.inference_mode(), dist.autocast(device, precision):
            return model(**{name: torch.as_tensor(value, device=device) for name, value in inputs.items()})

    about: dict[str, Any] = {"precision": str(dtype).removeprefix("torch.")}
    if task["kind"] == "compiled":
        about["compile_seconds"] = serving.compile_blocks(model.base_model, run, {1})

    def prepare(batch: int, length: int) -> Callable[[], Any]:
        ids = torch.randint(0, model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if takes_token_types(model):
            inputs["token_type_ids"] = torch.zeros_like(ids)
        inputs = {name: value.to(device) for name, value in inputs.items()}
        return lambda: run(inputs)

    return prepare, about


def _onnx_call(task: dict[str, Any], path: Path) -> tuple[Prepare, dict[str, Any]]:
    import numpy as np

    from frugalbert.measure.session import feed, open_session

    session = open_session(path, task["threads"])

    def prepare(batch: int, length: int) -> Callable[[], Any]:
        ids = np.random.default_rng(0).integers(0, task["vocab_size"] or 1, (batch, length))
        inputs = feed(session, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
        return lambda: session.run(None, inputs)

    return prepare, {"precision": "int8" if task["kind"] == "onnx-int8" else "float32"}


def _time(task: dict[str, Any], name: str, prepare: Prepare, batch: int, length: int) -> dict[str, Any]:
    try:
        clock = pick_clock(task["threads"], task["device"])
        warmup = task.get("warmup_seconds", WARMUP_SECONDS)
        return asdict(time_callable(prepare(batch, length), task["repeats"], clock, warmup_seconds=warmup))
    except ValueError:
        raise
    except Exception as error:  # out of memory, or a graph that refuses the shape
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"{name} cannot run {batch} sequences of {length} tokens ({reason})") from None


def _pin_torch(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    torch.set_num_interop_threads(1)


def time_task(task: dict[str, Any], emit: Callable[[dict[str, Any]], None]) -> None:
    """Time every cell of `task["cells"]`, giving each result to `emit` as it comes.

    A cell has `batch_size` and `length`, or `batching` and `texts` (`mixed.py`). Where a model cannot be compiled there
    is no result but a `note`.
    """
    fixed = [cell for cell in task["cells"] if "batching" not in cell]
    if not task["kind"].startswith("onnx"):
        _pin_torch(task["threads"])
    try:
        if fixed:
            _time_fixed(task, fixed, emit)
        if len(fixed) < len(task["cells"]):
            _time_mixed(task, [cell for cell in task["cells"] if "batching" in cell], emit)
    except serving.CannotCompile as error:
        emit({"note": f"bench: {task['path']}: {error}"})


def _time_fixed(task: dict[str, Any], cells: list[dict[str, Any]], emit: Callable[[dict[str, Any]], None]) -> None:
    if task["kind"].startswith("onnx"):
        prepare, about = _onnx_call(task, Path(task["path"]))
    else:
        prepare, about = _torch_call(task, _load(task))
    for cell in cells:
        timing = _time(task, task["path"], prepare, cell["batch_size"], cell["length"])
        speed = cell["batch_size"] * cell["length"] / (timing["median_ms"] / 1e3)
        emit({**cell, **about, **timing, "tokens_per_second": speed})


def _time_mixed(task: dict[str, Any], cells: list[dict[str, Any]], emit: Callable[[dict[str, Any]], None]) -> None:
    from frugalbert.measure import mixed

    encoder = mixed.open_encoder(task, _load)
    if not encoder.encodes and not encoder.classifies:
        emit({"note": f"bench: {task['path']} labels tokens: its time for whole texts is that of its hf/ directory"})
        return
    repeats, clock = min(TEXT_REPEATS, task["repeats"]), pick_clock(task["threads"], task["device"])

    def timer(call: Callable[[], Any]) -> dict[str, Any]:
        return asdict(time_callable(call, repeats, clock, warmup_seconds=0.0))

    for cell in cells:
        emit({**cell, **mixed.time_texts(encoder, cell, task["rows"], timer)})


def _serve(task: dict[str, Any], text: str) -> tuple[Prepare, dict[str, Any]]:
    """An encoder of its own with random weights, as `task["kind"]` serves it."""
    from frugalbert.measure import onnx
    from frugalbert.model.arch import Arch
    from frugalbert.model.configuration import FrugalConfig
    from frugalbert.model.modeling import FrugalModel
    from frugalbert.progress import quiet

    with quiet(), tempfile.TemporaryDirectory(prefix="frugalbert-latency-") as folder:
        model = FrugalModel(FrugalConfig.from_arch(Arch.parse(text), task["vocab_size"])).eval()
        if task["kind"] == "torch":
            return _torch_call(task, model)
        path = Path(folder) / "model.onnx"
        onnx.export_onnx(model, path)
        if task["kind"] == "onnx-int8":
            path = path.with_name("int8.onnx")
            onnx.quantize(path.with_name("model.onnx"), path)
        return _onnx_call(task, path)


def time_archs(task: dict[str, Any], emit: Callable[[dict[str, Any]], None]) -> None:
    """Time every architecture (one-line text) of `task["archs"]` at one shape, extracted: models of their own.

    Through a super-network's slices they would take up to a third more. `reference_ms` is what the same small encoder
    took before and after each: a shared machine's speed drifts by several percent within seconds.
    """
    short = {**task, "warmup_seconds": 0.0}
    _pin_torch(task["threads"])
    shape = (task["batch_size"], task["length"])
    reference = _serve(task, task["reference"])[0]
    for text in task["archs"]:
        prepare, about = _serve(task, text)
        before = _time(short, task["reference"], reference, *shape)
        timing = _time(task, text, prepare, *shape)
        after = _time(short, task["reference"], reference, *shape)
        middle = (before["median_ms"] + after["median_ms"]) / 2
        emit({"arch": text, **about, "reference_ms": middle, **timing})


def main() -> None:
    """Read the task from standard input and print a JSON line per result; a user's mistake is a line with `error`."""

    def emit(line: dict[str, Any]) -> None:
        print(json.dumps(line), flush=True)

    try:
        task = json.load(sys.stdin)
        (time_archs if "archs" in task else time_task)(task, emit)
    except (ValueError, OSError) as error:
        emit({"error": str(error)})


if __name__ == "__main__":
    main()
