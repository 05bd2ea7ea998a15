"""Where it runs: device, precision, threads, ranks. Only here are torch.distributed and accelerate's ranks touched.

One process is the normal case and costs nothing here; `torchrun --nproc-per-node N` (or `accelerate launch`) makes
several by setting RANK, WORLD_SIZE and LOCAL_RANK, and a stage that trains on all of them calls `start` and `finish`.
Decisions that ranks must share (time, signals) go through `agree`: every rank then holds the same numbers, and
everything else is a pure function of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import itertools
import os
import platform
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import nn

GRAPHS = 64  # of torch.compile


class Machine(Protocol):
    """The keys of the YAML's `machine:` section that matter here."""

    @property
    def device(self) -> str: ...
    @property
    def threads(self) -> int | str: ...
    @property
    def strategy(self) -> str: ...
    @property
    def trackers(self) -> tuple[str, ...]: ...


# ---- device, precision, threads --------------------------------------------------------------------------------------


def pick_device(machine: Machine, slot: int | None = None) -> torch.device:
    """The device of this process: `cuda:LOCAL_RANK` (or the one of `slot`) or the CPU.

    Raises ValueError if a GPU is asked for and absent.
    """
    import torch

    if machine.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("machine.device is cuda, but torch finds no GPU here; write device: auto or cpu")
    if machine.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    number = int(os.environ.get("LOCAL_RANK", "0")) if slot is None else slot
    device = torch.device("cuda", number % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the hardware has bf16 matrix products (GPU: Ampere and later; CPU: AVX512-BF16 or AMX)."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, probe, bool)() for probe in probes)


def pick_precision(name: str, device: torch.device) -> str:
    """`auto` -> `bf16` where the hardware multiplies it, else `fp32`; anything else is what was asked for."""
    if name != "auto":
        return name
    return "bf16" if multiplies_bf16(device) else "fp32"


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """Context in which matrix products run in `precision` (weights stay fp32)."""
    import torch

    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}[precision])


def usable_cores() -> int:
    """Cores this process may use: affinity mask, then the container's CPU quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, int(quota) // int(period)))
    return max(1, cores)


def free_memory() -> int:
    """Bytes that programs may still take, as the system and the container's limit say; 0 if neither does."""
    with contextlib.suppress(OSError, ValueError, KeyError, IndexError):
        free = {line.split(":")[0]: line.split()[1] for line in Path("/proc/meminfo").read_text().splitlines()}
        available = 1024 * int(free["MemAvailable"])
        with contextlib.suppress(OSError, ValueError):
            group = Path("/sys/fs/cgroup")
            limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
            kept = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            return min(available, limit - used + int(kept.get("inactive_file", 0)))  # files in memory give way
        return available
    return 0


def processor_name() -> str:
    """The CPU's name as the system gives it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def pick_threads(machine: Machine) -> int:
    """CPU threads: `machine.threads`, or the usable cores shared among this host's ranks.

    A lone process with `auto` obeys OMP_NUM_THREADS (torchrun sets that to 1 on its own, so there it says nothing).
    """
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if machine.threads != "auto":
        return int(machine.threads)
    if local_world == 1 and os.environ.get("OMP_NUM_THREADS", "").isdigit():
        return int(os.environ["OMP_NUM_THREADS"])
    return max(1, usable_cores() // local_world)


def set_threads(machine: Machine) -> int:
    """Set and return torch's CPU threads (`pick_threads`)."""
    import torch

    threads = pick_threads(machine)
    torch.set_num_threads(threads)
    return threads


def keep_heap() -> None:
    """Let glibc keep the memory it has got for the next step: page faults are a tenth of a small model's CPU step."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for option, value in ((-1, 1 << 30), (-2, 1 << 26), (-4, 0)):  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX
            libc.mallopt(option, value)


# ---- ranks -----------------------------------------------------------------------------------------------------------


_GROUPS = itertools.count()


def rank() -> int:
    """This process among all of the launch, 0 if there is only one."""
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    """Number of processes that train together: those of the launch between `start` and `finish`, otherwise 1."""
    group = sys.modules.get("torch.distributed")
    return group.get_world_size() if group is not None and group.is_available() and group.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def start(machine: Machine) -> torch.device:
    """Threads, device and, in a launch of several ranks, their group (NCCL for GPU tensors, gloo for CPU ones).

    All ranks must call it; a stage that rank 0 works on alone calls `set_threads` and `pick_device` instead.
    """
    set_threads(machine)
    device = pick_device(machine)
    if device.type == "cpu":
        keep_heap()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        import torch.distributed as group

        if not group.is_initialized():
            store, number, size = _meeting()
            store = group.PrefixStore(f"group-{next(_GROUPS)}", store)  # it keeps the addresses of earlier groups
            kind = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            group.init_process_group(kind, store=store, rank=number, world_size=size)
    return device


@functools.cache
def _meeting() -> tuple[Any, int, int]:
    """The launch's store, rank and size, for all groups of this process: a second store on its port could still be
    rank 0's first one, about to close."""
    import torch.distributed as group

    return next(group.rendezvous("env://"))


def agree(values: Sequence[float]) -> list[float]:
    """The largest of each value over the ranks, the same list everywhere. What one rank knows, others give as -inf."""
    if world() == 1:
        return list(values)
    import torch

    tensor = torch.tensor(values, dtype=torch.float64)
    torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
    return tensor.tolist()


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over the ranks, in place."""
    if world() > 1:
        import torch.distributed as group

        group.all_reduce(tensor)
    return tensor


def wrap(model: nn.Module, device: torch.device, strategy: str) -> nn.Module:
    """The model whose gradients are averaged over the ranks; with one rank the model itself.

    `ddp`: replicas. `fsdp`: the model's own parameters become shards in place (FSDP2), block by block.
    """
    if world() == 1:
        return model
    if strategy == "ddp":
        from torch.nn.parallel import DistributedDataParallel

        return DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world(),))
    for block in blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of a model: the members of its `ModuleList`s."""
    from torch import nn

    return [block for module in model.modules() if isinstance(module, nn.ModuleList) for block in module]


def compile_blocks(layers: Iterable[nn.Module], *, dynamic: bool) -> None:
    """torch.compile of an encoder's layers one by one: one compilation serves all of a kind (and shape)."""
    import torch

    # all layers of all models are one function to torch; beyond its limit of graphs (8) it silently does not compile
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    for layer in layers:
        layer.compile(dynamic=dynamic)


def of_any_size(x: torch.Tensor, dimension: int) -> torch.Tensor:
    """The same tensor, of which one graph of torch.compile serves all sizes along `dimension`."""
    if "torch._dynamo" in sys.modules:  # else nothing is compiled
        sys.modules["torch._dynamo"].maybe_mark_dynamic(x, dimension)
    return x


def eager_blocks(layers: Iterable[nn.Module]) -> None:
    """Take `compile_blocks` back."""
    for layer in layers:
        layer._compiled_call_impl = None  # as nn.Module has it before `compile`


def free(device: torch.device) -> None:
    """Give back the memory of models that nothing refers to any more, but themselves in circles."""
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that FSDP spreads over the ranks (all ranks must call it); others as they are."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[operator]


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor that FSDP spreads; others as they are."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[operator]


def split_like(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`whole`, the same on all ranks, spread as `like` is."""
    if not hasattr(like, "full_tensor"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements)  # type: ignore[attr-defined]


@contextlib.contextmanager
def no_sync(model: nn.Module, *, last: bool) -> Iterator[None]:
    """Gradients of all but the last micro-batch stay local."""
    with contextlib.ExitStack() as stack:
        if hasattr(model, "set_requires_gradient_sync"):
            model.set_requires_gradient_sync(last)  # type: ignore[operator]
        elif hasattr(model, "no_sync") and not last:
            stack.enter_context(model.no_sync())  # type: ignore[operator]
        yield


def finish() -> None:
    """Leave the process group, if there is one.

    Whatever still refers to it (FSDP's modules, in circles) keeps gloo's threads alive; one of them that drops a tensor
    while Python shuts down aborts the process. So models must be out of reach by now, and are collected first.
    """
    if world() > 1:
        import torch.distributed as group

        gc.collect()
        group.destroy_process_group()


@contextlib.contextmanager
def ranks(machine: Machine) -> Iterator[torch.device]:
    """`start` and `finish` around a call that holds all models, also if it fails."""
    device = start(machine)
    try:
        yield device
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # they hold the models
        raise
    finally:
        finish()
