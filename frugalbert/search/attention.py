"""Learned attention masks become patterns: trained logits in; which pairs stay, an arch.json, weights and pictures out.

`topk` keeps the likeliest logits up to a density, never a sample; a query that would see nothing is given its likeliest
key. What the masks then are worth depends on blocks: density and occupancy are written side by side.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from frugalbert.config import Attention, Machine
from frugalbert.data.masking import Vocabulary
from frugalbert.model import patterns
from frugalbert.model.arch import Arch
from frugalbert.model.cost import amdahl, attention_share
from frugalbert.run import publish, say, write_atomic, write_json
from frugalbert.train import pretrain
from frugalbert.train.assemble import Method, row_lengths
from frugalbert.train.learned_masks import LearnedMasks, Masked, Structure, with_masks
from frugalbert.train.objectives import MaskedLM

BLOCKS, PICTURE = (32, 64, 128), 128
PASSES = 3.0  # of activations, beside those of an encoder whose masks are fixed


def build(section: Attention, inputs: dict[str, Path], out: Path, machine: Machine) -> dict[str, Any]:
    """The stage `attention`: train weights and masks within the budget, and leave arch.json and model/.

    Raises ValueError and OSError for what the user can mend, Stopped after a signal.
    """
    model, metrics = train_masked(section, inputs, out, machine)
    return write_result(model, section, out, metrics) if metrics else metrics


def train_masked(
    section: Attention, inputs: dict[str, Path], out: Path, machine: Machine
) -> tuple[Masked, dict[str, Any]]:
    """The trained encoder with its masks, and the headline figures: empty on all ranks but one."""
    section = pretrain.resolved(section, inputs)
    if machine.strategy == "fsdp":
        raise ValueError("machine.strategy fsdp spreads the weights, and masks are learnt by all at once; write ddp")
    length = max(row_lengths(section, inputs["shards"]))
    section.check_density(length)
    structure = Structure(section.structure, length, section.block, section.symmetric)
    if "arch" in section.model_fields_set:
        section = section.model_copy(update={"arch": str(plain(Arch.load(section.arch, inputs["yaml"])))})
    machine = machine.model_copy(update={"compile": False})
    pairs = section.pair_weight > 0.0 and pretrain.has_pairs(inputs["shards"])
    made: list[Masked] = []

    def make(longest: int, vocabulary: Vocabulary) -> Method:
        network = pretrain.make_model(section, inputs["yaml"], longest, vocabulary, pairs=pairs)
        made.append(Masked(network, section, structure))
        objective = LearnedMasks(MaskedLM(section.isolate_documents, section.pair_weight if pairs else 0.0))
        return Method(
            made[0], network, objective, "network.", PASSES, lambda draw: with_masks(draw, section),
            lambda run: made[0].join(run.optimizer),
        )  # fmt: skip

    metrics = pretrain.run_training(section, inputs, out, machine, make)
    return made[0], metrics


def plain(arch: Arch) -> Arch:
    """The same sizes with dense attention."""
    return replace(arch, layers=tuple(replace(layer, pattern="dense") for layer in arch.layers))


# ---- from logits to masks --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    """What stays: (G, P) bool, and (G, 2, C) bool for the global positions (sees all, is seen by all)."""

    logits: np.ndarray
    globals: np.ndarray
    repaired: int = 0


def finalise(alpha: np.ndarray, extra: np.ndarray, structure: Structure, section: Attention) -> Kept:
    """Choose by the logits alpha (G, P) and extra (G, 2, C). Raises ValueError if rows stay empty and may not.

    `topk` compares all logits of all masks, after the global positions that are likelier than not; ties go to the
    smaller distance, then to the earlier logit.
    """
    kept = Kept(alpha > 0.0, extra > 0.0)
    if section.density is not None and section.finalise != "threshold":
        kept = _top(alpha, extra, structure, section)
    return _repair(kept, alpha, structure, section)


def _top(alpha: np.ndarray, extra: np.ndarray, structure: Structure, section: Attention) -> Kept:
    density = section.density or 1.0
    if structure.name == "toeplitz-priced":
        return _top_priced(alpha, structure, density)
    kept = Kept(np.zeros(alpha.shape, bool), extra > 0.0)
    outside = 1.0 - np.stack([_global_pairs(one, structure, section) for one in kept.globals])
    index = structure.index()
    weights = np.stack([np.bincount(index.ravel(), one.ravel(), alpha.shape[1]) for one in outside])
    pairs = structure.length**2
    spent = pairs - outside.sum((1, 2))
    distance = np.bincount(index.ravel(), _distances(structure.length).ravel()) / structure.weights()
    order = np.lexsort((np.tile(distance, len(alpha)), -alpha.ravel()))
    for least in (section.least_per_head, 0.0):
        for place in order.tolist():
            mask, number = divmod(place, alpha.shape[1])
            cost = weights[mask, number]
            room = least * pairs - spent[mask] if least else density * pairs * len(alpha) - spent.sum()
            if not kept.logits[mask, number] and cost <= 2.0 * room:  # the nearer of one less and one more
                kept.logits[mask, number] = True
                spent[mask] += cost
            elif not least and cost > 2.0 * room:
                break
    return kept


def _top_priced(alpha: np.ndarray, structure: Structure, occupancy: float) -> Kept:
    """The likeliest distances while the blocks they touch stay within `occupancy`."""
    kept = np.zeros(alpha.shape, bool)
    place = np.arange(structure.length) // structure.block
    tile = place[:, None] * (place[-1] + 1) + place[None, :]
    tiles_of = [np.unique(np.concatenate([tile.diagonal(d), tile.diagonal(-d)])) for d in range(structure.length)]
    touched = np.zeros((len(alpha), tile.max() + 1), bool)
    for spot in np.argsort(-alpha.ravel(), kind="stable").tolist():
        mask, number = divmod(spot, alpha.shape[1])
        new = touched[mask].copy()
        new[tiles_of[number]] = True
        if touched.sum() - touched[mask].sum() + new.sum() <= occupancy * touched.size:
            kept[mask, number], touched[mask] = True, new
    return Kept(kept & (alpha > alpha.min()), np.zeros((len(alpha), 2, 0), bool))


def _distances(length: int) -> np.ndarray:
    return abs(np.subtract.outer(np.arange(length), np.arange(length)))


def _global_pairs(one: np.ndarray, structure: Structure, section: Attention) -> np.ndarray:
    """(length, length) bool: the pairs of global positions that see all or are seen by all, (2, C) bool."""
    found = np.zeros((structure.length,) * 2, bool)
    for number, position in enumerate(section.global_positions):
        if position < structure.length:
            found[position] |= one[0, number]
            found[:, position] |= one[1, number]
    return found


def _repair(kept: Kept, alpha: np.ndarray, structure: Structure, section: Attention) -> Kept:
    """Give every empty row a key."""
    index, logits, repaired = structure.index(), kept.logits.copy(), 0
    for mask, one in enumerate(kept.globals):
        extra = _global_pairs(one, structure, section)
        while True:
            empty = np.flatnonzero(~(logits[mask][index] | extra).any(1))
            if not len(empty):
                break
            if section.empty_rows == "error":
                raise ValueError(
                    f"attention: {len(empty)} queries of mask {mask} keep no key; raise attention.density, or write "
                    "empty_rows: nearest"
                )
            row = int(empty[0])
            best = row if section.empty_rows == "diagonal" else int(alpha[mask][index[row]].argmax())
            logits[mask, index[row, best]] = True
            repaired += 1
    return replace(kept, logits=logits, repaired=repaired)


# ---- from masks to patterns ------------------------------------------------------------------------------------------


def pattern_of(row: np.ndarray, extra: np.ndarray, structure: Structure, section: Attention) -> patterns.Pattern:
    """The pattern of one mask: logits (P,) bool and global positions (2, C) bool."""
    count = -(-structure.length // structure.block)
    seen = [tuple(p for p, on in zip(section.global_positions, side, strict=True) if on) for side in extra]
    if structure.name == "unstructured":
        found = patterns.Pattern("explicit", (structure.length, patterns.pack(row[structure.index()])))
    elif structure.name == "block":
        blocks = row[structure.index()[:: structure.block, :: structure.block]]
        found = patterns.Pattern("block", (structure.block, count, patterns.pack(blocks)))
    else:
        longest = (count if structure.name == "block-toeplitz" else structure.length) - 1
        numbers = np.flatnonzero(row) - (0 if structure.symmetric else longest)
        beyond = [(longest + 1, patterns.FOREVER)] if section.beyond else []
        runs = patterns.joined([(number, number) for number in numbers.tolist()] + beyond)
        kind = (
            "block-toeplitz" if structure.name == "block-toeplitz" else "toeplitz" if structure.symmetric else "signed"
        )
        found = patterns.Pattern(kind, (structure.block, runs) if kind == "block-toeplitz" else (runs,))
    return replace(found, rows=tuple(sorted(seen[0])), columns=tuple(sorted(seen[1])))


def with_patterns(arch: Arch, rows: tuple[tuple[int, ...], ...], masks: list[patterns.Pattern]) -> Arch:
    """`arch` whose heads attend by these masks; `rows` says which mask each head of each layer has."""
    texts = [patterns.join([masks[number] for number in row]) for row in rows]
    layers = tuple(replace(layer, pattern=text) for layer, text in zip(arch.layers, texts, strict=True))
    return replace(arch, layers=layers)


# ---- files -----------------------------------------------------------------------------------------------------------


def write_result(model: Masked, section: Attention, out: Path, metrics: dict[str, Any]) -> dict[str, Any]:
    """arch.json, the searched weights as model/, masks.json, masks.npz; returns the stage's headline figures."""
    alpha, extra = (logits.detach().cpu().double().numpy() for logits in (model.logits, model.global_logits))
    structure = model.structure
    kept = finalise(alpha, extra, structure, section)
    masks = [pattern_of(row, one, structure, section) for row, one in zip(kept.logits, kept.globals, strict=True)]
    found = with_patterns(plain(model.network.config.to_arch()), model.rows, masks)
    facts = describe(masks, model.rows, found, structure.length)
    share = 1.0 / (1.0 + np.exp(-alpha))
    facts |= {
        "structure": section.structure, "length": structure.length, "block": section.block, "share": section.share,
        "rows": model.rows, "target": section.density, "repaired": kept.repaired, "soft": section.soft,
        "expected_density": float(model.figures()["density_expected"]),
        "threshold_density": float(model.figures()["density_kept"]),
        "undecided": float(((share > 0.05) & (share < 0.95)).mean()), "global_positions": section.global_positions,
    }  # fmt: skip
    pictures = {
        "probability": np.stack([picture(row[structure.index()]) for row in share]),
        "kept": np.stack([picture(patterns.dense(mask, structure.length)) for mask in masks]),
    }
    write_arrays(out / "masks.npz", {"logits": alpha, "global_logits": extra, "logits_kept": kept.logits, **pictures})
    write_json(out / "masks.json", facts)
    with publish(out / "model") as work:
        _rewrite(out / "model", work, found)
    write_json(out / "arch.json", found.to_json())  # last: it says that the stage has an answer
    say(
        f"attention: density {facts['density']:.1%} of pairs, {facts['occupancy']['64']:.0%} of 64 x 64 blocks; "
        + amdahl(facts["attention_share"], structure.length)
    )
    if facts["undecided"] > 0.5:
        say(
            f"attention: {facts['undecided']:.0%} of the logits are undecided, so chance had a say; raise "
            "attention.mask_learning_rate or the budget (their product with the steps should be 20 or more)"
        )
    headline = {name: facts[name] for name in ("density", "undecided", "repaired")}
    return headline | {"occupancy_64": facts["occupancy"]["64"]} | metrics


def describe(
    masks: list[patterns.Pattern], rows: tuple[tuple[int, ...], ...], arch: Arch, length: int
) -> dict[str, Any]:
    """Density, occupancy by block size, most key blocks of a query block, and Amdahl's bound."""
    texts = [patterns.join([masks[number] for number in row]) for row in rows]
    touched = {block: [patterns.blocks(mask, length, block) for mask in masks] for block in BLOCKS}
    share = attention_share(arch, length)
    used = np.concatenate(rows)
    return {
        "patterns": texts,
        "density": float(np.mean([patterns.density(text, length) for text in texts])),
        "densities": [patterns.pairs(mask, length) / length**2 for mask in masks],
        "occupancy": {
            str(b): float(np.mean([found[number].mean() for number in used])) for b, found in touched.items()
        },
        "most_blocks": {str(b): int(max(one.sum(1).max() for one in found)) for b, found in touched.items()},
        "attention_share": share,
        "bound": 1.0 / (1.0 - share),
    }


def picture(square: np.ndarray) -> np.ndarray:
    """At most PICTURE x PICTURE means of a square, float16."""
    size = len(square)
    edges = np.linspace(0, size, min(size, PICTURE) + 1).astype(int)[:-1]
    summed = np.add.reduceat(np.add.reduceat(square.astype(np.float64), edges, 0), edges, 1)
    counts = np.diff(np.append(edges, size))
    return (summed / np.outer(counts, counts)).astype(np.float16)


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    write_atomic(path, buffer.getvalue())


def _rewrite(before: Path, after: Path, arch: Arch) -> None:
    """The model directory once more, with another architecture in its configuration."""
    import json
    import shutil

    for path in before.iterdir():
        if path.is_file():
            shutil.copy2(path, after / path.name)
    config = json.loads((before / "config.json").read_text())
    write_json(after / "config.json", {**config, "arch": arch.to_text()})
