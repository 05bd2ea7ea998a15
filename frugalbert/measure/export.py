"""A trained model in; a Hugging Face directory, an ONNX file, an int8 ONNX file and a model card out.

`hf/` holds stock `BertModel` / `ModernBertModel` files where the architecture is exactly representable, otherwise ours
with the model's code beside the weights. `onnx/` and `onnx-int8/` hold the encoder (of a fine-tuned classifier: all of
it, so that they give logits). `tasks/TASK/` holds the same of one fine-tuned model. Everything written is read again
and compared with the model before it counts; what int8 costs is measured (`quality.py`); `export.json` has the figures.
"""

from __future__ import annotations

import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from frugalbert import run
from frugalbert.config import Export, Machine
from frugalbert.measure import card, onnx, quality
from frugalbert.measure.models import OURS, copy_tokenizer, load_for_serving, load_model, max_length, read_model_config
from frugalbert.measure.serving import cpu_threads
from frugalbert.measure.session import feed, open_session, require_onnx
from frugalbert.measure.timing import pick_clock, time_callable
from frugalbert.progress import quiet

HF_LIMIT = 1e-4
LATENCY_LENGTH = 128
LATENCY_REPEATS = 30


def build(section: Export, inputs: dict[str, Path], out: Path, machine: Machine) -> dict[str, Any]:
    """The stage `export`: `inputs["pretrain"]`/model in every format of `section`, and one task's model if wanted."""
    tuned = _tuned(section, inputs)
    for leftover in [*out.glob(".tmp-*"), *out.glob("tasks/*/.tmp-*")]:  # of an attempt that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    source = inputs["pretrain"] / "model"
    result = _write(source, section, out, inputs)
    if section.task is not None:
        folder = out / "tasks" / section.task
        folder.mkdir(parents=True, exist_ok=True)
        task = _write(tuned[section.task], section, folder, {**inputs, "task": tuned[section.task]})
        card.write(folder, section, inputs, {**task, "task": section.task})
        result["tasks"] = {section.task: task["formats"]}
    if "onnx-int8" in section.formats:
        drops = {task: _task_cost(task, folder, inputs, out) for task, folder in tuned.items()}
        found = {task: drop for task, drop in drops.items() if drop}
        result["formats"]["onnx-int8"] |= {"dev_metric_drop": found} if found else {}
    card.write(out, section, inputs, result)
    run.write_json(out / "export.json", result)
    return _headline(result)


def export_model(model_dir: Path, section: Export, out: Path) -> dict[str, Any]:
    """`frugalbert export MODEL_DIR --out DIR`: any Hugging Face encoder directory in the formats of `section`.

    `out` is written whole or not at all. Raises ValueError if `model_dir` is no model or `out` holds other files.
    """
    read_model_config(model_dir)
    if section.task is not None:
        raise ValueError("export.task names a task of a run; to export a fine-tuned model name its directory instead")
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or (out / "export.json").is_file())):
        raise ValueError(f"{out} exists and is no earlier export; name a new directory with --out")
    if model_dir.resolve().is_relative_to(out.resolve()):
        raise ValueError(f"{out} contains the model itself; name another directory with --out")
    with run.publish(out) as folder:
        result = _write(model_dir, section, folder, {"model": model_dir})
        card.write(folder, section, {"model": model_dir}, result)
        run.write_json(folder / "export.json", result)
    return _headline(result)


def _headline(result: dict[str, Any]) -> dict[str, Any]:
    formats = result["formats"]
    figures: dict[str, Any] = {"parameters": result["parameters"]}
    for name, values in formats.items():
        figures[f"{name.replace('-', '_')}_bytes"] = values["bytes"]
    if "onnx" in formats:
        figures["onnx_max_abs_difference"] = formats["onnx"]["max_abs_difference"]
    if "onnx-int8" in formats:
        figures["int8_mean_cosine"] = formats["onnx-int8"]["mean_cosine"]
    return figures


def _tuned(section: Export, inputs: dict[str, Path]) -> dict[str, Path]:
    """Directories of the fine-tuned models by task. Raises ValueError if `export.task` names none of them."""
    folders = sorted(inputs["finetune"].glob("*/model")) if "finetune" in inputs else []
    found = {folder.parent.name: folder for folder in folders}
    if section.task is not None and section.task not in found:
        has = f"there are {', '.join(found)}" if found else "nothing was fine-tuned"
        raise ValueError(f"export.task: there is no fine-tuned model of {section.task!r} in this run; {has}")
    return found


# ---- every format of one model --------------------------------------------------------------------------------------


def _write(source: Path, section: Export, out: Path, inputs: dict[str, Path]) -> dict[str, Any]:
    """Every format of the model at `source` below `out`; returns what goes into export.json."""
    if set(section.formats) - {"hf"}:
        require_onnx()
    model = load_model(source)
    tokenizers = [source, *([inputs["tokenizer"]] if "tokenizer" in inputs else [])]
    formats: dict[str, Any] = {}
    for stale in {"hf", "onnx", "onnx-int8"} - set(section.formats):
        shutil.rmtree(out / stale, ignore_errors=True)
    if "hf" in section.formats:
        with run.publish(out / "hf") as folder:
            formats["hf"] = _write_hf(model, folder, section, tokenizers)
    run.check_stop()
    _write_onnx(model, section, out, tokenizers, formats)
    if "onnx-int8" in section.formats:
        texts, mask = quality.held_out(inputs["shards"], model) if "shards" in inputs else ([], None)
        formats["onnx-int8"] |= quality.int8_cost(model, out / "onnx-int8" / "model.onnx", texts, mask)
    about = card.describe(model, tokenizers)
    return {"formats": formats, **about, "latency": _latency(model, section, out)}


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("model*") if not file.name.endswith(".py"))


def _write_hf(model: Any, folder: Path, section: Export, tokenizers: list[Path]) -> dict[str, Any]:
    """Save as stock files if that is wanted and possible; the saved model must give the same outputs."""
    exported, why_not = model, None
    if model.config.model_type == OURS:
        from frugalbert.model.interop import to_stock, why_not_stock

        why_not = why_not_stock(model.config.to_arch()) if section.stock else "export.stock is false"
        exported = model if why_not else to_stock(model).eval()
    with quiet():
        exported.save_pretrained(folder)
    copy_tokenizer(tokenizers, folder)
    again = load_model(folder)
    difference = max(_gap(model, again, batch) for batch in onnx.parity_batches(model))
    assert difference <= HF_LIMIT, f"the saved {type(again).__name__} differs from the model by {difference:.2g}"
    return {
        "bytes": _size(folder),
        "stock": again.config.model_type != OURS,
        "why_not_stock": why_not,
        "class": type(again).__name__,
        "parameters": sum(parameter.numel() for parameter in again.parameters()),
        "max_abs_difference": difference,
    }


def _gap(first: Any, second: Any, batch: dict[str, torch.Tensor]) -> float:
    """Largest difference of the first output of two models at real tokens."""
    shape = batch["attention_mask"].shape
    if type(first).__name__.endswith("ForMultipleChoice"):
        batch = {name: value[:, None] for name, value in batch.items()}
    with torch.inference_mode():
        a, b = first(**batch, return_dict=True)[0], second(**batch, return_dict=True)[0]
    if a.shape[:2] == shape:
        a, b = (x[batch["attention_mask"].bool()] for x in (a, b))
    return (a - b).abs().max().item()


def _write_onnx(model: Any, section: Export, out: Path, tokenizers: list[Path], formats: dict[str, Any]) -> None:
    """`onnx/` and `onnx-int8/` (whichever are wanted; int8 is made from the other) with tokenizer and config."""
    serving = onnx.serving_part(model)
    with ExitStack() as stack:
        if "onnx" in section.formats:
            plain = stack.enter_context(run.publish(out / "onnx"))
        elif "onnx-int8" in section.formats:
            plain = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".tmp-", dir=out)))
        else:
            return
        onnx.export_onnx(serving, plain / "model.onnx")
        difference = onnx.check_parity(serving, plain / "model.onnx")
        run.check_stop()
        if "onnx" in section.formats:
            formats["onnx"] = {"bytes": _finish(model, plain, tokenizers), "max_abs_difference": difference}
        if "onnx-int8" in section.formats:
            with run.publish(out / "onnx-int8") as folder:
                onnx.quantize(plain / "model.onnx", folder / "model.onnx")
                formats["onnx-int8"] = {"bytes": _finish(model, folder, tokenizers)}


def _finish(model: Any, folder: Path, tokenizers: list[Path]) -> int:
    """Tokenizer and config beside the ONNX file; the config names no code, since none is there."""
    copy_tokenizer(tokenizers, folder)
    config = model.config.to_diff_dict()
    config.pop("auto_map", None)
    run.write_json(folder / "config.json", config)
    return _size(folder)


# ---- what it costs --------------------------------------------------------------------------------------------------


def _task_cost(task: str, source: Path, inputs: dict[str, Path], out: Path) -> dict[str, Any] | None:
    """What int8 costs the fine-tuned model of one task on its development examples; None if their texts are gone."""
    model = load_model(source)
    examples = quality.task_examples(inputs["finetune"], task) if quality.has_metric(model) else []
    if not examples:
        return None
    ready = out / "tasks" / task / "onnx-int8" / "model.onnx"
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=out) as folder:
        if not ready.is_file():
            onnx.export_onnx(model, Path(folder) / "model.onnx")
            ready = Path(folder) / "int8.onnx"
            onnx.quantize(Path(folder) / "model.onnx", ready)
        return quality.task_cost(model, ready, examples)


def _latency(model: Any, section: Export, out: Path) -> list[dict[str, Any]]:
    """One sequence on one CPU thread in every format: the figure for the card (the stage `bench` has the table)."""
    length = min(LATENCY_LENGTH, max_length(model.config) or LATENCY_LENGTH)
    batch = onnx.make_batch(onnx.serving_part(model), (1, length))
    rows, clock = [], pick_clock(1, "cpu")
    for name in section.formats:
        if name == "hf":
            serving = load_for_serving(out / "hf")  # for the stock class its heads may have been padded
            with cpu_threads(1), torch.inference_mode():
                timing = time_callable(lambda s=serving: s(**batch), LATENCY_REPEATS, clock)
        else:
            session = open_session(out / name / "model.onnx")
            arrays = feed(session, batch)
            timing = time_callable(lambda s=session, a=arrays: s.run(None, a), LATENCY_REPEATS, clock)
        rows.append({"format": name, "threads": 1, "batch_size": 1, "length": length, "noisy": timing.noisy,
                     "median_ms": round(timing.median_ms, 4), "p90_ms": round(timing.p90_ms, 4)})  # fmt: skip
    return rows
