"""Serving: latency and throughput of compact encoders against stock BERT-base and a MiniLM-shaped model.

Weights are random: time does not depend on their values. Arms: every model in PyTorch (fp32, and `auto`: bf16 where the
processor multiplies it), compiled (torch.compile), and as ONNX files in fp32 and int8; one and two threads; batches of
1 and 8 texts of 16 to 512 tokens, and real paragraphs of mixed lengths through `Encoder`, batched by length and as they
come. Each arm is a process of its own with fixed threads (`frugalbert/measure/timing.py`); rounds alternate the arms; a
ratio is taken within each round, and reported as min / median / max.

The staircase asks which sizes the device runs well: latency over widths and feed-forward sizes in steps of 8, with some
between, all else fixed; its excess over the line through the multiples of 64 stands beside. A size's latency is the
least of all its calls, on one thread and in processor time: what else the machine does only ever adds to it.

What is finished is in a journal beside the results (deleted when all is), so that a call that is stopped may go on.

  python benchmarks/serving.py                     serving.json, staircase.json and .png: 3 hours on 2 idle cores
  python benchmarks/serving.py --only staircase    one of both; with --kinds torch without ONNX, which takes longest
  python benchmarks/serving.py --quick             a short look, no result files
  python benchmarks/serving.py --device cuda       PyTorch on a GPU: serving_gpu.json, staircase_gpu.json
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from evidence import Finished, told
from throughput import ROOT, environment, save, spread

VOCABULARY = 30522
MODELS = {
    "bert-base": "bert-base",
    "minilm-l6-h384": "bert 6x384 heads=12 ffn=1536",  # the shape of MiniLM-L6-H384 (arXiv 2002.10957)
    "autotinybert-kd-s1": "autotinybert-kd-s1",  # found by AutoTinyBERT's search
    "autotinybert-kd-s4": "autotinybert-kd-s4",
    "modern-32m": "modern-32m",
    "small-modern": "small-modern",
}
STOCK = ("bert-base", "minilm-l6-h384")
HIDDEN = (*range(256, 385, 8), 257, 258, 260, 300, 330, 345)
FFN = (*range(1024, 1153, 8), 1025, 1026, 1028, 1054, 1100, 1111)
SHAPES = {
    "hidden": ("bert 4x{} heads=4 head_dim=64 ffn=1024", HIDDEN),
    "ffn": ("bert 4x256 heads=4 ffn={}", FFN),
}
KINDS = ("torch", "compiled", "onnx", "onnx-int8")
REFERENCE = "bert 2x256 heads=4 ffn=512"
Row = dict[str, Any]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="of the table above, or architectures' lines")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--precisions", default="fp32,auto", help="of PyTorch on the CPU")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--lengths", default="16,32,64,128,256,512")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--texts", type=int, default=64, help="paragraphs of mixed lengths")
    parser.add_argument("--rounds", type=int, default=3, help="of the table; of the staircase twice as many")
    parser.add_argument("--repeats", type=int, default=2, help="timed calls per cell and round")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--only", default="table,staircase", choices=["table", "staircase"])
    parser.add_argument("--quick", action="store_true", help="small models, few cells, one round, no result file")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="directory")
    options = parser.parse_args()
    if not set(options.kinds.split(",")) <= set(KINDS):
        parser.error(f"--kinds is {options.kinds}; write some of {','.join(KINDS)}")
    if options.device == "cuda":
        options.threads, options.kinds, options.precisions = "1", "torch,compiled", "fp32"
    if options.quick:
        options.models, options.lengths, options.texts, options.rounds = "minilm-l6-h384,small-modern", "16,128", 16, 1
        options.repeats = 2
    return options


def result_file(options: argparse.Namespace, name: str) -> Path:
    return options.out / f"{name}{'_gpu' if options.device == 'cuda' else ''}.json"


@contextmanager
def journal(options: argparse.Namespace, name: str) -> Iterator[Finished]:
    """What is finished, until all is; a short look has one of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = (Path(folder) if options.quick else options.out) / f"{result_file(options, name).stem}.jsonl"
        with Finished(path) as finished:
            yield finished
        path.unlink()


def known_by(options: argparse.Namespace) -> Row:
    """The machine and versions of a reading."""
    from frugalbert import dist, run

    return {"device": options.device, "processor": dist.processor_name(), "versions": run.versions()}


# ---- models on disk --------------------------------------------------------------------------------------------------


def write_tokenizer(folder: Path) -> None:
    """A small WordPiece tokenizer trained on the texts of mixed lengths, so that they are cut as BERT's would."""
    from pydoc_data.topics import topics

    from tokenizers import BertWordPieceTokenizer
    from transformers import PreTrainedTokenizerFast

    made = BertWordPieceTokenizer(lowercase=True)
    made.train_from_iterator(list(topics.values()), vocab_size=8192, show_progress=False)
    names: dict[str, Any] = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    PreTrainedTokenizerFast(tokenizer_object=made._tokenizer, **names).save_pretrained(folder)


def write_model(name: str, folder: Path, kinds: list[str]) -> None:
    """`hf/` of stock models and of ours, `onnx/` and `onnx-int8/` if they are asked for, each with the tokenizer."""
    from transformers import BertConfig, BertModel

    from frugalbert.measure import onnx
    from frugalbert.model.arch import Arch
    from frugalbert.model.configuration import FrugalConfig
    from frugalbert.model.modeling import FrugalModel
    from frugalbert.progress import quiet

    arch = Arch.parse(MODELS.get(name, name))
    if name in STOCK:
        layer = arch.layers[0]
        model = BertModel(BertConfig(
            vocab_size=VOCABULARY, hidden_size=arch.hidden, num_hidden_layers=len(arch.layers),
            num_attention_heads=layer.heads, intermediate_size=layer.ffn,
        ))  # fmt: skip
    else:
        model = FrugalModel(FrugalConfig.from_arch(arch, VOCABULARY))
    with quiet():
        model.eval().save_pretrained(folder / "hf")
    if "onnx" in kinds or "onnx-int8" in kinds:
        (folder / "onnx").mkdir()
        onnx.export_onnx(model, folder / "onnx" / "model.onnx")
    if "onnx-int8" in kinds:
        (folder / "onnx-int8").mkdir()
        onnx.quantize(folder / "onnx" / "model.onnx", folder / "onnx-int8" / "model.onnx")
    for place in folder.iterdir():
        write_tokenizer(place)
        (place / "config.json").write_text((folder / "hf" / "config.json").read_text())


# ---- the table -------------------------------------------------------------------------------------------------------


def arms(options: argparse.Namespace, folder: Path) -> list[tuple[str, Any, int, str]]:
    """(name, model, threads, precision), models of one kind beside each other: a machine's speed drifts."""
    from frugalbert.measure.latency import find_models

    kinds = options.kinds.split(",")
    found: list[tuple[str, Any]] = []
    for number, name in enumerate(options.models.split(",")):
        place = folder / str(number)
        place.mkdir()
        write_model(name, place, kinds)
        models = find_models(place)
        found += [(name, model) for model in [*models, *(replace(m, kind="compiled") for m in models[:1])]]
    return [
        (name, model, threads, precision)
        for threads in map(int, options.threads.split(","))
        for kind in kinds
        for precision in (options.precisions.split(",") if not kind.startswith("onnx") else ["fp32"])
        for name, model in found
        if model.kind == kind
    ]


def one_round(
    options: argparse.Namespace, where: list[tuple[str, Any, int, str]], number: int, finished: Finished
) -> list[Row]:
    from frugalbert.config import Bench
    from frugalbert.measure import latency
    from frugalbert.measure.mixed import BATCHINGS

    lengths, batches = ([int(text) for text in getattr(options, key).split(",")] for key in ("lengths", "batches"))
    cells: list[Row] = [{"batch_size": batch, "length": length} for batch in batches for length in lengths]
    cells += [{"batching": how, "texts": options.texts} for how in BATCHINGS]
    rows: list[Row] = []
    for name, model, threads, precision in where:
        section = Bench(repeats=options.repeats, precision=precision, batch_sizes=tuple(batches))  # type: ignore[arg-type]
        task = {**latency.task_for(model, options.device, threads, section), "cells": cells, "max_length": 512}
        about = {"model": name, "kind": model.kind, "threads": threads, "asked_precision": precision, "round": number}
        asked = {
            **about,
            "arch": MODELS.get(name, name),
            "cells": cells,
            "repeats": options.repeats,
            **known_by(options),
        }
        found = finished.result(asked, partial(lambda task: list(latency.time_apart(task)), task))
        rows += [{**about, **row} for row in found]
        last = found[-1] if found else {}
        print(f"round {number}: {name}, {model.kind}, {precision}, {threads} threads: "
              f"{last.get('texts_per_second', 0):,.0f} texts/s", file=sys.stderr, flush=True)  # fmt: skip
    return rows


ARM = ("kind", "asked_precision", "threads")
CELL = ("batch_size", "length", "batching")


def summarise(rows: list[Row]) -> list[Row]:
    """A row for each arm and cell: milliseconds, and how many times as fast as the stock models in the same round.

    `over_NAME`: than that model of the same kind, precision and threads; `over_NAME_in_fp32`: than its PyTorch fp32.
    """
    times: dict[tuple[Any, ...], dict[int, Row]] = {}
    for row in rows:
        key = (row["model"], *(row.get(name) for name in (*ARM, *CELL)))
        times.setdefault(key, {})[row["round"]] = row
    found = []
    for key, mine in times.items():
        result: Row = dict(zip(("model", *ARM, *CELL), key, strict=True))
        first = next(iter(mine.values()))
        result |= {name: first[name] for name in ("precision", "padding", "tokens", "texts") if name in first}
        result["ms"] = spread([row["median_ms"] for row in mine.values()])
        for name in ("texts_per_second", "compile_seconds"):
            if first.get(name):
                result[name] = spread([row[name] for row in mine.values()])
        result["noisy"] = any(row["noisy"] for row in mine.values())
        plain = ("torch", "fp32", key[3])
        for stock in STOCK:
            for name, arm in ((f"over_{stock}", key[1:4]), (f"over_{stock}_in_fp32", plain)):
                theirs = times.get((stock, *arm, *key[4:]), {})
                ratios = [theirs[n]["median_ms"] / row["median_ms"] for n, row in mine.items() if n in theirs]
                if ratios and (stock, arm) != (key[0], key[1:4]):
                    result[name] = spread(ratios)
        if key[-1] == "by length":
            other = times.get((*key[:-1], "in order"), {})
            ratios = [other[n]["median_ms"] / row["median_ms"] for n, row in mine.items() if n in other]
            result["over_batches_in_order"] = spread(ratios)
        found.append(result)
    return found


def show(summary: list[Row]) -> None:
    for row in summary:
        shape = row["batching"] or f"{row['batch_size']}x{row['length']}"
        speed = f"{row['texts_per_second']['median']:10,.0f} texts/s" if "texts_per_second" in row else " " * 18
        ratio = row.get("over_bert-base_in_fp32") or row.get("over_minilm-l6-h384_in_fp32")
        versus = f" {ratio['min']:.1f} - {ratio['median']:.1f} - {ratio['max']:.1f}" if ratio else ""
        print(f"{row['model']:20s} {row['kind']:9s} {row['precision']:8s} {row['threads']} {shape:>9s} "
              f"{row['ms']['median']:9.2f} ms {speed}{versus}")  # fmt: skip


def table(options: argparse.Namespace) -> None:
    found = environment()
    with tempfile.TemporaryDirectory(prefix="frugalbert-serving-") as name, journal(options, "serving") as finished:
        where = arms(options, Path(name))
        rows = [row for number in range(options.rounds) for row in one_round(options, where, number, finished)]
        summary = summarise(rows)
        show(summary)
        if not options.quick:
            save(result_file(options, "serving"), {
                "benchmark": "serving, random weights", "options": settings_of(options), "environment": found,
                "models": {name: MODELS.get(name, name) for name in options.models.split(",")}, "rows": summary,
            })  # fmt: skip


def settings_of(options: argparse.Namespace) -> Row:
    return {key: value for key, value in vars(options).items() if key != "out"}


# ---- the staircase ---------------------------------------------------------------------------------------------------


def staircase(options: argparse.Namespace) -> None:
    found = environment()
    backends = [("torch", "fp32"), ("torch", "bf16"), ("onnx", "fp32"), ("onnx-int8", "fp32")]
    backends = [backend for backend in backends if backend[0] in options.kinds.split(",")]
    if not backends:
        raise ValueError("--kinds names none of torch, onnx, onnx-int8, of which the staircase is made")
    if options.device == "cuda":
        backends = [("torch", "fp32")]
    if options.quick:
        backends = backends[:1]
    result: dict[str, Any] = {}
    with journal(options, "staircase") as finished:
        for kind, precision in backends:
            name = f"{'int8' if kind == 'onnx-int8' else precision}, {'PyTorch' if kind == 'torch' else 'ONNX'}"
            if options.device == "cuda":
                name = "bf16, PyTorch, GPU"
            for axis in SHAPES:
                line = climb(options, finished, axis, {"kind": kind, "precision": precision})
                result.setdefault(name, {})[axis] = {"least_ms": line, "excess": excess(line)}
                print(json.dumps({name: {axis: excess(line)}}), flush=True)
        if not options.quick:
            shapes = {axis: text for axis, (text, _) in SHAPES.items()}
            path = result_file(options, "staircase")
            picture = path.with_suffix(".png")
            save(path, {"benchmark": "least latency of 8 x 128 tokens over sizes", "shapes": shapes,
                        "options": settings_of(options), "environment": found, "backends": result,
                        "picture": picture.name})  # fmt: skip
            draw(result, picture)


def climb(options: argparse.Namespace, finished: Finished, axis: str, backend: Row) -> dict[int, float]:
    """Milliseconds over the sizes of one axis: the least of all calls in all rounds."""
    from frugalbert.measure.latency import time_apart

    text, sizes = SHAPES[axis]
    archs = {text.format(size): size for size in sizes[:: 4 if options.quick else 1]}
    fixed = {"device": options.device, "threads": 1, "repeats": 9, "batch_size": 8, "length": 128}
    fixed |= {"vocab_size": 1024, "warmup_seconds": 0.1, "baseline": None, "reference": REFERENCE}
    line: dict[int, float] = {}
    for number in range(2 * options.rounds):
        task = {**fixed, **backend, "archs": random.Random(number).sample(list(archs), len(archs))}
        asked = {**task, "round": number, **known_by(options)}
        for row in finished.result(asked, partial(lambda task: list(time_apart(task)), task)):
            size = archs[row["arch"]]
            line[size] = min(line.get(size, math.inf), row["min_ms"])
    return dict(sorted(line.items()))


def excess(line: dict[int, float]) -> dict[str, dict[str, float]]:
    """By the largest power of two that divides a size: time over the line through multiples of 64, less 1."""
    import numpy as np

    even = [size for size in line if size % 64 == 0]
    groups: dict[int, list[float]] = {}
    for size, value in line.items():
        expected = float(np.interp(size, even, [line[item] for item in even]))
        groups.setdefault(min(64, size & -size), []).append(value / expected - 1)
    return {str(power): spread(values) for power, values in sorted(groups.items()) if power != 64}


def draw(result: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(SHAPES), figsize=(10, 4))
    for axis, place in zip(SHAPES, axes, strict=True):
        for name, found in result.items():
            line = {int(size): value for size, value in found[axis]["least_ms"].items()}
            first = line[min(line)]
            place.plot(list(line), [value / first for value in line.values()], marker=".", label=name)
        place.set_xlabel(axis)
        place.set_ylabel("least latency, first = 1")
        place.grid(axis="x", alpha=0.3)
        place.set_xticks(range(min(SHAPES[axis][1]), max(SHAPES[axis][1]) + 1, 32))
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


@told()
def main() -> None:
    options = parse()
    if "staircase" in options.only:
        staircase(options)
    if "table" in options.only:
        table(options)


if __name__ == "__main__":
    main()
