"""How good the slices of a trained super-network are as they are: architectures in, held-out losses out.

The rows come from the other end of the held-out order than those of validation, so that a search does not choose on
what is reported later (as far as there are enough of them). Masks are the fixed ones of validation.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from frugalbert import dist
from frugalbert.config import Machine, Supernet
from frugalbert.data import tokenizer as tokenizers
from frugalbert.data.masking import IGNORED, Batch, Vocabulary
from frugalbert.loading import load_weights
from frugalbert.model import slicing
from frugalbert.model.arch import Arch
from frugalbert.model.modeling import FrugalForMaskedLM
from frugalbert.run import RECORD, read_json
from frugalbert.train.assemble import row_lengths
from frugalbert.train.batches import HeldOut
from frugalbert.train.slices import SliceLosses, SuperNetwork

ROWS_AT_ONCE = 32
PLACES = ("supernet", "shards", "tokenizer", "yaml")


def score(task: dict[str, Any]) -> float | None:
    """Loss of the slice `task["arch"]` on `task["rows"]` held-out rows, None if not finite; for `fanout.run_tasks`.

    Further keys: `supernet`, `shards`, `tokenizer`, `yaml`: directories; `quality`: `loss` (masked-LM, inherited
    weights) or `distillation`; `device`; `threads`: of a worker process, 0 = as they are.
    """
    if task["threads"]:
        torch.set_num_threads(task["threads"])
    places = tuple(task[name] for name in PLACES)
    trained = read_json(Path(task["supernet"]) / RECORD)["fingerprint"]
    model, objective, rows, precision = _load(places, task["quality"], task["rows"], task["device"], trained)
    arch = Arch.parse(task["arch"])

    def measure(batch: Batch) -> dict[str, Any]:
        with torch.no_grad(), dist.autocast(rows.device, precision):
            loss = objective.measure(model, batch, (arch,))[0]["loss"]
        used = (batch.labels != IGNORED).sum() if task["quality"] == "loss" else (batch.document_ids > 0).sum()
        return {"loss": (loss * used, used)}

    found = rows.measure(measure, ROWS_AT_ONCE, lambda: None)["loss"]
    return found if math.isfinite(found) else None


@functools.lru_cache(maxsize=1)
def _load(
    places: tuple[str, ...], quality: str, count: int, device: str, trained: str
) -> tuple[SuperNetwork, SliceLosses, HeldOut, str]:
    """What scores need, kept for the next one. `trained`: a worker of a cluster outlives a super-network built anew."""
    from frugalbert.train.supernet import FIT, load_teacher

    supernet, shards, tokenizer, yaml = map(Path, places)
    section = section_of(supernet)
    where = dist.pick_device(Machine(device=device))  # type: ignore[arg-type]
    vocabulary = Vocabulary.from_tokenizer(tokenizers.load(tokenizer)).to(where)
    network, layers = load(supernet)
    teacher = load_teacher(section, None, yaml, vocabulary) if quality == "distillation" else None
    model = SuperNetwork(network, layers, teacher)
    if model.fit is not None:
        model.fit.load_state_dict(load_file(supernet / FIT))
    objective = SliceLosses(
        isolate=section.isolate_documents,
        inplace_weight=0.0,
        combine="mean",
        validated={},
        distilled=section.distill if teacher is not None else (),
        relation_heads=section.relation_heads,
    )
    rows = HeldOut(shards, row_lengths(section, shards)[0], vocabulary, count, at_end=True)
    return model.to(where).eval(), objective, rows, dist.pick_precision(section.precision, where)


def section_of(supernet: Path) -> Supernet:
    """The section that the super-network was trained with."""
    return Supernet.model_validate(read_json(supernet / RECORD)["section"])


def load(supernet: Path) -> tuple[Any, str]:
    """The super-network and its rule for layers. Raises ValueError for a damaged directory."""
    told, remedy = f"{supernet / 'model'} is damaged", "`--redo supernet` trains it again (the old one is moved aside)"
    network, report = load_weights(FrugalForMaskedLM, supernet / "model", told, remedy)
    if report["missing_keys"]:
        raise ValueError(f"{told} (it has no weights {min(report['missing_keys'])}); {remedy}")
    return network, section_of(supernet).layers


def extract(supernet: Path, arch: Arch) -> Any:
    """The slice as a masked-LM model of its own. Raises ValueError if `arch` is no slice of the super-network."""
    network, rule = load(supernet)
    return slicing.extract(network, arch, slicing.kept_layers(network.config.to_arch(), len(arch.layers), rule))  # type: ignore[arg-type]
