"""The stage that trains a super-network: a space and token shards in; one encoder all of whose slices work out.

It is the one loop with another objective (`slices.py`): the model is an ordinary encoder of the space's largest
architecture, its slices are views of its weights (`model/slicing.py`). AutoTinyBERT, arXiv 2107.13686, sections 3.1
and 3.4.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch

from frugalbert.config import Machine, Supernet
from frugalbert.data.masking import Vocabulary
from frugalbert.model.modeling import FrugalForMaskedLM
from frugalbert.progress import number
from frugalbert.run import read_json, say, write_atomic
from frugalbert.space import Space
from frugalbert.train import pretrain
from frugalbert.train.assemble import Draw, Method, row_lengths
from frugalbert.train.importance import sort_by_importance
from frugalbert.train.slices import OnlySampled, Sampling, SliceLosses, SuperNetwork, validated_archs, with_archs
from frugalbert.train.state import Run
from frugalbert.train.weights import load_model

FIT = "fit.safetensors"


def build(section: Supernet, inputs: dict[str, Path], out: Path, machine: Machine) -> dict[str, Any]:
    """Train the super-network within the budget; returns the headline figures.

    Raises ValueError and OSError for what the user can mend, Stopped after a signal.
    """
    space = Space.from_json(read_json(inputs["space"] / "space.json"))
    sampling = Sampling.of(section, space)
    if machine.strategy == "fsdp":
        raise ValueError("machine.strategy fsdp spreads weights that slices must see whole; write ddp")

    if machine.compile is True:
        say("supernet: every step trains other sizes, so nothing is compiled; machine.compile is for pretrain")
    machine = machine.model_copy(update={"compile": False})
    models: list[SuperNetwork] = []

    def make(longest: int, vocabulary: Vocabulary) -> Method:
        teacher = load_teacher(section, space, inputs["yaml"], vocabulary)
        network = make_network(section, space, inputs, vocabulary)
        model = SuperNetwork(network, section.layers, teacher)
        models.append(model)
        objective = SliceLosses(
            isolate=section.isolate_documents,
            inplace_weight=section.inplace_weight,
            combine=section.combine,
            validated=validated_archs(space),
            distilled=section.distill if teacher is not None else (),
            relation_heads=section.relation_heads,
            sampling=sampling,
        )
        say(f"supernet: {number(space.size())} architectures from {space.smallest()} to {space.largest()}")

        def prepare(run: Run) -> None:
            if section.update == "sampled":
                run.draw = OnlySampled(model, run.optimizer).watch(run.draw)

        passes = len(sampling.draw(0, 0.5))
        return Method(model, network, objective, "network.", passes, change(sampling), prepare)

    metrics = pretrain.run_training(section, inputs, out, machine, make)
    if models[0].fit is not None and metrics:
        write_atomic(out / FIT, safetensors.torch.save(models[0].fit.state_dict()))
    return metrics


def change(sampling: Sampling) -> Callable[[Draw], Draw]:
    return lambda draw: with_archs(draw, sampling)


def make_network(section: Supernet, space: Space, inputs: dict[str, Path], vocabulary: Vocabulary) -> Any:
    """The encoder of the largest architecture, from the seed or from `start`, important units first."""
    largest = space.largest()
    lengths = row_lengths(section, inputs["shards"])
    if max(lengths) > largest.max_length:
        raise ValueError(f"the space's encoders read {largest.max_length} tokens; write shards.length of at most that")
    network = pretrain.first_weights(section, largest, inputs["yaml"], vocabulary)
    if network.config.to_arch() != largest:
        raise ValueError(
            f"supernet.start {section.start} is {network.config.to_arch()}, not the space's largest, {largest}"
        )
    if section.start is not None and section.reorder:
        sort_by_importance(network, inputs["shards"], lengths[0], vocabulary, isolate=section.isolate_documents)
    return network


# ---- the teacher -----------------------------------------------------------------------------------------------------


def load_teacher(section: Supernet, space: Space | None, folder: Path, vocabulary: Vocabulary) -> Any:
    """The encoder of `supernet.teacher`, frozen, on the device; None without one.

    Raises ValueError for another vocabulary, or if the heads of the `space` do not go with what is to be learnt.
    """
    if section.teacher is None:
        return None
    teacher = load_model(section.teacher, "supernet.teacher", folder, FrugalForMaskedLM, vocabulary).model
    teacher = teacher.requires_grad_(False).eval().to(vocabulary.special.device)
    if space is None:
        return teacher
    heads = teacher.config.to_arch().layers[-1].heads
    if "attention" in section.distill and space.heads != (heads,):
        raise ValueError(
            f"supernet.distill attention compares head by head and the teacher has {heads}; write "
            f"space.heads: {heads}, or distill: [relation, hidden]"
        )
    if "relation" in section.distill:
        _check_relations(section.relation_heads, teacher.config.to_arch().layers[-1].qkv, space)
    return teacher


def _check_relations(relation_heads: int, teacher: int, space: Space) -> None:
    widths = {teacher, *(heads * size for heads in space.heads for size in space.head_dim)}
    wrong = sorted(width for width in widths if width % relation_heads)
    if wrong:
        raise ValueError(
            f"supernet.relation_heads {relation_heads} does not divide heads * head_dim = {wrong[0]}; choose a divisor "
            "of every width of the space and of the teacher's"
        )
