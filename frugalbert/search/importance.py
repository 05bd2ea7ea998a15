"""Which attention positions matter: an encoder trained under a soft mask in; the importance of pairs out, by kind, and
with a study what it costs to leave the diagonal out.

SparseBERT (arXiv 2102.12871, "which attention positions are important?"): P = sigmoid(alpha) for each pair of
positions, symmetric, multiplies the attention after the softmax and learns with the weights. The study trains full
attention, attention without the diagonal, and the same number of other pairs dropped at random, under equal budgets.

Shapes: G maps (one for each head, or for each head of each layer), n tokens of a row.
"""

from __future__ import annotations

import math
import re
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from frugalbert.config import Attention, Importance, Machine
from frugalbert.data import tokenizer as tokenizers
from frugalbert.data.masking import Batch, Vocabulary
from frugalbert.data.rows import read_index
from frugalbert.model import patterns
from frugalbert.model.arch import Arch
from frugalbert.run import check_stop, is_main_rank, say, write_json
from frugalbert.search import attention
from frugalbert.search.run import fan_out
from frugalbert.train import short
from frugalbert.train.batches import HeldOut
from frugalbert.train.learned_masks import Masked

KINDS = ("rest", "neighbours", "sep", "cls", "diagonal")
"""Of pairs (i, j) within a document; where several fit, the last one: [CLS] is at 0, [SEP] where it stands."""
FULL, NO_DIAGONAL, RANDOM = "full attention", "no diagonal", "random drop"
ROWS_AT_ONCE = 64


def build(section: Importance, inputs: dict[str, Path], out: Path, machine: Machine) -> dict[str, Any]:
    """The stage `importance`: importance.json, importance.npz and, with a study, results.json.

    Raises ValueError and OSError for what the user can mend, Stopped after a signal.
    """
    try:
        model, metrics = attention.train_masked(soft(section), inputs, out, machine)
    except ValueError as error:
        keys = rf"\battention\.({'|'.join(Importance.model_fields)})\b"
        raise ValueError(re.sub(keys, r"importance.\1", str(error))) from error
    if not is_main_rank():
        return metrics
    found = write_map(model, section, inputs, out)
    shutil.rmtree(out / "model")  # without its soft mask it is no model
    headline = {name: found["groups"][name] for name in reversed(KINDS) if found["groups"][name] is not None}
    if section.study is not None:
        arch = attention.plain(model.network.config.to_arch())
        differences = study(section, arch, inputs, out, machine)["differences"]
        headline |= {f"{name}_difference": entry["mean"] for name, entry in differences.items() if entry}
    return headline | metrics


def soft(section: Importance) -> Attention:
    """The same training as `attention` knows it: nothing is sampled, and nothing is finalised."""
    values = section.model_dump(mode="json", exclude_unset=True, exclude={"study", "controls"})
    kind = {"structure": "unstructured", "symmetric": True, "soft": True, "gating": "post-softmax"}
    return Attention.model_validate(values | kind | {"share": section.share})


# ---- the map ---------------------------------------------------------------------------------------------------------


def write_map(model: Masked, section: Importance, inputs: dict[str, Path], out: Path) -> dict[str, Any]:
    """importance.json, which is returned, and importance.npz: (G, s, s) pictures, NaN where no documents have such a
    pair, and (G, n) means by distance of what is neither [CLS] nor [SEP]."""
    structure = model.structure
    met, documents = pairs_met(inputs, structure.length, section.validation.rows)
    seen = np.any([count > 0 for count in met.values()], 0)
    shown, others = attention.picture(seen), met["rest"] + met["neighbours"] + met["diagonal"]
    groups: list[dict[str, float | None]] = []
    curves, pictures = list[np.ndarray](), list[np.ndarray]()
    for logits in model.logits.detach().cpu().numpy():
        share = 1.0 / (1.0 + np.exp(-logits[structure.index()]))
        groups.append({name: _mean(share, count) for name, count in met.items()})
        curves.append(by_distance(share, others))
        with np.errstate(invalid="ignore"):
            pictures.append(attention.picture(share * seen) / shown)
    total = sum(int(count.sum()) for count in met.values())
    with np.errstate(invalid="ignore"):
        mean = np.mean(curves, 0)
    found = {
        "length": structure.length, "share": section.share, "rows": model.rows, "documents": documents,
        "pairs": {name: int(count.sum()) / total for name, count in met.items()},
        "groups": {name: _over(row[name] for row in groups) for name in KINDS}, "maps": groups,
        "by_distance": [None if math.isnan(value) else value for value in mean.tolist()],
    }  # fmt: skip
    arrays = {"probability": np.stack(pictures), "by_distance": np.stack(curves).astype(np.float32)}
    attention.write_arrays(out / "importance.npz", arrays)
    write_json(out / "importance.json", found)
    ranked = sorted((value, name) for name, value in found["groups"].items() if value is not None)
    say("importance: " + ", ".join(f"{name} {value:.3f}" for value, name in reversed(ranked)))
    return found


def pairs_met(inputs: dict[str, Path], length: int, rows: int) -> tuple[dict[str, np.ndarray], int]:
    """How often held-out documents have a pair at (i, j), (n, n) for each kind, and the number of documents."""
    vocabulary = Vocabulary.from_tokenizer(tokenizers.load(inputs["tokenizer"]))
    held_out = HeldOut(inputs["shards"], length, vocabulary, rows)
    count = len(held_out.row_ids)
    pieces = [(start, min(ROWS_AT_ONCE, count - start)) for start in range(0, count, ROWS_AT_ONCE)]
    forms = document_forms(held_out.batches(pieces), vocabulary.sep)
    return count_pairs(forms, length), sum(forms.values())


def document_forms(batches: Iterable[Batch], sep: int) -> Counter[tuple[int, tuple[int, ...]]]:
    """How many documents there are of each (tokens, positions of [SEP])."""
    forms: Counter[tuple[int, tuple[int, ...]]] = Counter()
    for batch in batches:
        check_stop()
        for ids, documents in zip(batch.input_ids.cpu().numpy(), batch.document_ids.cpu().numpy(), strict=True):
            for number in range(1, int(documents.max()) + 1):
                mine = ids[documents == number]
                forms[len(mine), tuple(np.flatnonzero(mine == sep).tolist())] += 1
    return forms


def count_pairs(forms: Counter[tuple[int, tuple[int, ...]]], length: int) -> dict[str, np.ndarray]:
    """`pairs_met` of these documents."""
    found = {name: np.zeros((length, length), np.int64) for name in KINDS}
    for (size, ends), count in forms.items():
        place = np.arange(size)
        distance = abs(place[:, None] - place[None, :])
        kind = np.where(distance == 1, 1, 0)
        for value, line in ((2, list(ends)), (3, [0])):
            kind[line] = kind[:, line] = value
        kind[distance == 0] = 4
        for value, name in enumerate(KINDS):
            found[name][:size, :size] += count * (kind == value)
    return found


def by_distance(share: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(n,) means of (n, n) by |i - j|, weighted by counts (n, n); NaN where there are none."""
    place = np.arange(len(share))
    distance = abs(place[:, None] - place[None, :]).ravel()
    with np.errstate(invalid="ignore"):
        return np.bincount(distance, (share * counts).ravel()) / np.bincount(distance, counts.ravel())


def _mean(share: np.ndarray, counts: np.ndarray) -> float | None:
    return float((share * counts).sum() / counts.sum()) if counts.any() else None


def _over(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


# ---- the study -------------------------------------------------------------------------------------------------------


def study(section: Importance, arch: Arch, inputs: dict[str, Path], out: Path, machine: Machine) -> dict[str, Any]:
    """Short trainings of all variants with every seed; writes and returns results.json."""
    settings = section.study
    assert settings is not None
    length = int(next(iter(read_index(inputs["shards"])["sets"])))
    one = [[patterns.Pattern(kind)] * layer.heads for kind in ("dense", "nodiag") for layer in arch.layers]
    variants = {FULL: one[: len(arch.layers)], NO_DIAGONAL: one[len(arch.layers) :]}
    variants |= {f"{RANDOM} {n + 1}": control(arch, length, (section.seed, n)) for n in range(section.controls)}
    texts = [str(with_masks(arch, masks)) for masks in variants.values()]
    fixed: dict[str, Any] = {name: str(inputs[name].resolve()) for name in short.PLACES}
    fixed |= {"work": str(out.resolve() / "trials"), "steps": settings.steps, "looks": settings.looks}
    fixed |= {"rows": section.validation.rows, "device": machine.device}
    fixed |= {"recipe": settings.recipes[0].model_dump(mode="json")}
    tasks = [{**fixed, "seed": seed, "arch": text} for seed in settings.seeds for text in texts]
    found = fan_out(short.score, tasks, out, machine, "importance")
    losses = [[row and row["error"] for row in found[place :: len(texts)]] for place in range(len(texts))]
    met, _ = pairs_met(inputs, length, section.validation.rows)
    counts, (full, without, *rest) = np.sum(list(met.values()), 0), losses
    rows = [
        {"name": name, "losses": mine, "mean": _over(mine), "difference": difference(mine, full),
         "dropped": _dropped(masks, counts)} for (name, masks), mine in zip(variants.items(), losses, strict=True)
    ]  # fmt: skip
    random = [_over(column) for column in zip(*rest, strict=True)]
    pairs = {"no_diagonal": (without, full), "random": (random, full), "no_diagonal_to_random": (without, random)}
    results = {
        "seeds": settings.seeds, "steps": settings.steps, "recipe": fixed["recipe"], "length": length,
        "dropped_pairs": length, "dropped_share": 1.0 / length, "variants": rows,
        "differences": {name: difference(*pair) for name, pair in pairs.items()},
    }  # fmt: skip
    write_json(out / "results.json", results)
    return results


def with_masks(arch: Arch, masks: list[list[patterns.Pattern]]) -> Arch:
    """`arch` with a pattern for each head of each layer."""
    pairs = zip(arch.layers, masks, strict=True)
    return replace(arch, layers=tuple(replace(layer, pattern=patterns.join(heads)) for layer, heads in pairs))


def control(arch: Arch, length: int, key: tuple[int, int]) -> list[list[patterns.Pattern]]:
    """For every head of every layer a mask without `length` random pairs off the diagonal: another one for each key,
    layer and head."""
    return [
        [drop(length, np.random.default_rng([*key, number, head])) for head in range(layer.heads)]
        for number, layer in enumerate(arch.layers)
    ]


def drop(length: int, rng: np.random.Generator) -> patterns.Pattern:
    """All pairs but `length` of those off the diagonal, all of them equally likely."""
    place = rng.choice(length * (length - 1), length, replace=False)
    query, key = place // (length - 1), place % (length - 1)
    mask = np.ones((length, length), bool)
    mask[query, key + (key >= query)] = False
    return patterns.Pattern("explicit", (length, patterns.pack(mask)))


def _dropped(masks: list[list[patterns.Pattern]], counts: np.ndarray) -> float:
    """The mean share of the pairs that documents have, (n, n) counts, that these heads drop."""
    heads = Counter(head for layer in masks for head in layer)
    lost = sum(number * int(counts[~patterns.dense(head, len(counts))].sum()) for head, number in heads.items())
    return lost / (sum(heads.values()) * int(counts.sum()))


def difference(mine: list[float | None], other: list[float | None]) -> dict[str, Any] | None:
    """Mean of differences paired by seed, with its 95 % interval (Student's t; null with one pair); None without any
    pair of trainings that both ended well."""
    import scipy.stats

    gaps = [one - two for one, two in zip(mine, other, strict=True) if one is not None and two is not None]
    if not gaps:
        return None
    mean, ends = float(np.mean(gaps)), None
    if len(gaps) > 1:
        half = scipy.stats.t.ppf(0.975, len(gaps) - 1) * np.std(gaps, ddof=1) / math.sqrt(len(gaps))
        ends = [mean - float(half), mean + float(half)]
    return {"mean": mean, "interval": ends, "pairs": len(gaps)}
