"""What skipping forbidden pairs gains: attention alone, and whole encoders beside the most they could gain.

Attention alone: one row of 12 heads of 64 channels, forward in inference mode and a training step (forward and
backward), of four patterns that leave at most 15 % of the blocks of 16 x 16 pairs. Arms: `dense` (SDPA without a mask:
what a model without a pattern pays), `masked` (SDPA with the pattern as a mask), `eager` (product, mask, softmax,
product; for the band, up to 2,048 tokens), `gather`, and with --flex `flex` (FlexAttention compiled: on a CPU forward
alone).
Whole encoders: all layers with the band, against the same weights without a pattern, beside Amdahl's bound: 1 / (1 - a)
for a share a of the operations (`model/cost.py`), and of the time (measured with attention left out).
Arms take turns; a ratio is taken within each round and reported as min / median / max. On a CPU that is processor time
of one thread: while others work on the machine, whoever waits for a second thread is slowed down most. `--clock wall`
takes both cores of an idle one.

  python benchmarks/sparse_attention.py                          1 pinned core, lengths 512 to 4,096, some minutes
  python benchmarks/sparse_attention.py --clock wall --out FILE  2 pinned cores
  python benchmarks/sparse_attention.py --quick                  a short look, no result file
  python benchmarks/sparse_attention.py --device cuda --flex --out benchmarks/results/sparse_attention_gpu.json
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from throughput import ROOT, environment, pin, save, spread

HEADS, CHANNELS, BLOCKS = 12, 64, (16, 32, 64)
ENCODERS = {"modern 4x256": "modern 4x256 heads=4 ffn=640", "bert 2x768": "bert 2x768 heads=12 ffn=3072"}
Call = Callable[[], Any]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="512,1024,2048,4096")
    parser.add_argument("--precisions", default="fp32,bf16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=["wall", "processor"], help="default: of the processor, on a GPU the wall's")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--flex", action="store_true", help="FlexAttention as well: seconds of compiling for each shape"
    )
    parser.add_argument("--patterns", default=",".join(patterns_of(1024)), help="of attention alone")
    parser.add_argument("--no-encoders", action="store_true")
    parser.add_argument("--add", action="store_true", help="keep the rows of the result file")
    parser.add_argument("--quick", action="store_true", help="3 rounds at 1,024 tokens, no result file")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "sparse_attention.json")
    options = parser.parse_args()
    options.clock = options.clock or ("processor" if options.device == "cpu" else "wall")
    if options.clock == "processor":
        options.threads = 1
    if options.quick:
        options.rounds, options.lengths = 3, "1024"
    return options


def patterns_of(length: int) -> dict[str, str]:
    """Name -> pattern; all scale with the length."""
    wide, narrow, block = length // 16 - 16, length // 64, length // 32
    mixture = f"window:{wide}^3|block-toeplitz:{block}/0..1+8^3|longformer:{narrow}/0^3|signed:-{wide}..0^3"
    return {
        "band": f"window:{wide}",
        "narrow band": f"window:{narrow}",
        "block-toeplitz": f"block-toeplitz:{block}/0..1+8",
        "mixture of heads": mixture,
    }


# ---- timing ----------------------------------------------------------------------------------------------------------


def seconds(call: Call, options: argparse.Namespace, repeats: int) -> float:
    import torch

    clock = time.process_time if options.clock == "processor" else time.perf_counter
    if options.device == "cuda":
        torch.cuda.synchronize()
    start = clock()
    for _ in range(repeats):
        call()
    if options.device == "cuda":
        torch.cuda.synchronize()
    return (clock() - start) / repeats


def in_turn(arms: dict[str, Call], options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of every arm in every round; two calls of each before."""
    once = {name: [seconds(arm, options, 1) for _ in range(2)][1] for name, arm in arms.items()}
    repeats = max(1, min(10, round(0.02 / max(1e-6, min(once.values())))))
    rounds = [{name: seconds(arm, options, repeats) for name, arm in arms.items()} for _ in range(options.rounds)]
    return {name: [row[name] for row in rounds] for name in arms}


def summary(times: dict[str, list[float]], base: str) -> dict[str, Any]:
    """Median milliseconds of every arm, and how often the others go into `base`."""
    ratios = {
        name: spread([one / other for one, other in zip(times[base], values, strict=True)])
        for name, values in times.items()
        if name != base
    }
    return {"ms": {name: round(1e3 * statistics.median(values), 3) for name, values in times.items()}, "gain": ratios}


# ---- attention alone -------------------------------------------------------------------------------------------------


def attention_arms(pattern: str, length: int, dtype: Any, train: bool, options: argparse.Namespace) -> dict[str, Call]:
    import torch
    from torch.nn import functional

    from frugalbert.model.attention import additive, never_empty, pattern_pairs
    from frugalbert.model.flex import flex
    from frugalbert.model.sparse import gather

    device = torch.device(options.device)
    made = [torch.randn(1, length, HEADS, CHANNELS, dtype=dtype, device=device) for _ in range(3)]
    weight, like = torch.ones_like(made[0].transpose(1, 2)), torch.zeros(1, length, 1, dtype=dtype, device=device)
    mask = additive(never_empty(pattern_pairs(pattern, length, device, None, None)), like)
    sdpa = functional.scaled_dot_product_attention
    skip = gather(pattern, like, None, None)

    def eager(query: Any, key: Any, value: Any) -> Any:
        return torch.softmax(query @ key.transpose(2, 3) * CHANNELS**-0.5 + mask, -1) @ value

    ways: dict[str, Callable[..., Any]] = {
        "dense": sdpa, "masked": functools.partial(sdpa, attn_mask=mask), "eager": eager,
        "gather": lambda *inputs: skip(*inputs, 0.0),
    }  # fmt: skip
    if options.flex and not (train and options.device == "cpu"):
        compiled = flex(pattern, like, None, None)
        ways["flex"] = lambda *inputs: compiled(*inputs, 0.0)
    leaves = [x.requires_grad_(train) for x in made]

    def arm(way: Callable[..., Any]) -> Call:
        def step() -> None:
            way(*(x.transpose(1, 2) for x in leaves)).backward(weight)

        def forward() -> None:
            with torch.inference_mode():
                way(*(x.transpose(1, 2) for x in leaves))

        return step if train else forward

    return {name: arm(way) for name, way in ways.items()}


def attention_rows(length: int, precision: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    import torch

    from frugalbert.model import patterns, tiles

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    rows = []
    for name in options.patterns.split(","):
        text = patterns_of(length)[name]
        about = {
            "pattern": name, "text": text, "length": length, "precision": precision,
            "density": round(patterns.density(text, length), 4),
            "occupancy": {str(block): round(patterns.occupancy(text, length, block), 4) for block in BLOCKS},
            "computed": round(tiles.work(text, length, *tiles.best(text, length)), 4),
        }  # fmt: skip
        for train in (False, True):
            torch.manual_seed(0)
            arms = attention_arms(text, length, dtype, train, options)
            if name != "band" or length > 2048:  # its gigabytes of scores would slow down its neighbours
                del arms["eager"]
            times = in_turn(arms, options)
            rows.append({**about, "pass": "training step" if train else "forward", **summary(times, "dense")})
            show(rows[-1])
    return rows


def show(row: dict[str, Any]) -> None:
    gains = " ".join(f"{name} x{value['median']:.2f}" for name, value in row["gain"].items())
    what = row.get("pattern") or row["encoder"]
    print(f"{what:17} {row['length']:5} {row['precision']} {row['pass']:13} occupancy {row['occupancy']['16']:.1%} "
          f"{gains}", *([f"bound {row['bound_by_operations']} {row['bound_by_time']}"] if "encoder" in row else []),
          flush=True)  # fmt: skip


# ---- whole encoders --------------------------------------------------------------------------------------------------


def encoder_arms(line: str, pattern: str, length: int, precision: str, train: bool, device: str) -> dict[str, Call]:
    import torch

    from frugalbert import dist
    from frugalbert.model.arch import Arch
    from frugalbert.model.attention import Options
    from frugalbert.model.configuration import FrugalConfig
    from frugalbert.model.modeling import FrugalModel

    ids = torch.randint(0, 1000, (1, length), device=device)

    def encoder(text: str, backend: str) -> FrugalModel:
        torch.manual_seed(0)
        arch = Arch.parse(f"{line} max_length={length} pattern={text}")
        config = FrugalConfig.from_arch(arch, 1000, attention_backend=backend, zero_init_outputs=False)
        return FrugalModel(config, add_pooling_layer=False).train(train).to(device)

    def arm(model: FrugalModel, gates: Any = None) -> Call:
        def step() -> None:
            model.zero_grad()
            with dist.autocast(torch.device(device), precision):
                states = model(ids, options=Options(gates)).last_hidden_state
            states.float().square().mean().backward()

        def forward() -> None:
            with torch.inference_mode(), dist.autocast(torch.device(device), precision):
                model(ids, options=Options(gates))

        return step if train else forward

    dense = encoder("dense", "auto")
    nothing = lambda query, key, value, dropout: torch.addcmul(value, query, key, value=1e-9)  # noqa: E731
    return {
        "dense": arm(dense), "masked": arm(encoder(pattern, "sdpa")), "skipping": arm(encoder(pattern, "auto")),
        "without attention": arm(dense, lambda index, visible: nothing),
    }  # fmt: skip


def encoder_rows(length: int, precision: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    from frugalbert.model import patterns
    from frugalbert.model.arch import Arch
    from frugalbert.model.backends import choose
    from frugalbert.model.cost import attention_share

    rows, text = [], patterns_of(length)["band"]
    for name, line in ENCODERS.items():
        for train in (False, True):
            times = in_turn(encoder_arms(line, text, length, precision, train, options.device), options)
            pairs = zip(times["without attention"], times["dense"], strict=True)
            row = {
                "encoder": name, "text": text, "length": length, "precision": precision,
                "pass": "training step" if train else "forward",
                "occupancy": {str(block): round(patterns.occupancy(text, length, block), 4) for block in BLOCKS},
                "choice": choose(text, length, options.device, training=train, packed=False),
                "bound_by_operations": round(1 / (1 - attention_share(Arch.parse(line), length)), 2),
                "bound_by_time": round(1 / statistics.median(rest / whole for rest, whole in pairs), 2),
                **summary(times, "dense"),
            }  # fmt: skip
            rows.append(row)
            show(row)
    return rows


def main() -> None:
    options = parse()
    cores = pin(options.threads)
    import torch

    from frugalbert import dist

    if options.device == "cpu":
        torch.set_num_threads(len(cores) or options.threads)
        dist.keep_heap()
    before = json.loads(options.out.read_text()) if options.add else {}
    attention: list[dict[str, Any]] = before.get("attention", [])
    encoders: list[dict[str, Any]] = before.get("encoders", [])
    for length in map(int, options.lengths.split(",")):
        for precision in options.precisions.split(","):
            attention += attention_rows(length, precision, options)
            encoders += [] if options.no_encoders else encoder_rows(length, precision, options)
            if not options.quick:  # after every part, so that an interruption costs little
                about = {"heads": HEADS, "head_dim": CHANNELS, "rounds": options.rounds, "device": options.device,
                         "clock": options.clock, "threads": options.threads}  # fmt: skip
                save(options.out, {"benchmark": "attention that skips", **about, "environment": environment(cores),
                                   "attention": attention, "encoders": encoders})  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
