"""Do learned masks find what a task needs? Tokens are random; every position has to name those at i - 3 and i + 5.

    python benchmarks/planted_offsets.py [--seeds 3] [--steps 2500] [--only toeplitz]

One layer, two heads, 32 tokens: nothing but distances 3 and 5 helps, so a search either finds exactly these or does not
work (spec: SparseBERT's method, arXiv 2102.12871, on a task with a known answer). Controls: the same training under
fixed masks that have the distances (found, dense, without diagonal), and that lack them (random distances of the same
number, a band, a star, random pairs): these must stay near chance, 1/16. Writes results/planted_offsets.json.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from typing import Any

import torch
from evidence import ROOT, run
from torch import Tensor, nn

from frugalbert.config import Attention
from frugalbert.data.masking import Batch
from frugalbert.model.arch import Arch
from frugalbert.model.configuration import FrugalConfig
from frugalbert.model.modeling import FrugalModel
from frugalbert.model.patterns import dense, density, parse
from frugalbert.search.attention import finalise, pattern_of
from frugalbert.train.batches import Micro
from frugalbert.train.learned_masks import LearnedMasks, Masked, MaskMicro, Structure

LENGTH, TOKENS, OFFSETS, WEIGHTS_RATE = 32, 16, (-3, 5), 2e-3
ARCH = "bert 1x64 heads=2 ffn=128 max_length=32 token_types=0"
SEARCHES: dict[str, dict[str, Any]] = {
    "toeplitz, 0.05": {"penalty": 0.05},
    "toeplitz, 0.5": {"penalty": 0.5},
    "toeplitz, 2": {"penalty": 2.0},
    "toeplitz, 20": {"penalty": 20.0},
    "toeplitz, nothing": {"penalty": 0.0},
    "toeplitz, slow logits": {"penalty": 0.5, "mask_learning_rate": 5e-4},
    "toeplitz, additive": {"penalty": 0.5, "gating": "additive"},
    "toeplitz, post-softmax": {"penalty": 0.5, "gating": "post-softmax"},
    "toeplitz, two levels": {"penalty": 0.5, "levels": 2},
    "toeplitz, density 0.109": {"density": 0.109},
    "signed, 0.5": {"penalty": 0.5, "symmetric": False},
    "unstructured, 2": {"penalty": 2.0, "structure": "unstructured"},
    "unstructured, additive, 2": {"penalty": 2.0, "structure": "unstructured", "gating": "additive"},
}
CONTROLS = {
    "found: 3 and 5": "toeplitz:3+5", "dense": "dense", "no diagonal": "nodiag", "random distances": "toeplitz:9+14",
    "band": "window:1", "star": "star", "random pairs": "random:0.11/1",
}  # fmt: skip


class Planted(nn.Module):
    """An encoder with a classifier for each offset; `loss` counts the positions that have both neighbours."""

    def __init__(self, arch: str) -> None:
        super().__init__()
        self.config = FrugalConfig.from_arch(Arch.parse(arch), TOKENS)
        self.model = FrugalModel(self.config, add_pooling_layer=False)
        self.classifier = nn.Linear(64, len(OFFSETS) * TOKENS)

    def forward(self, ids: Tensor, **inputs: Any) -> tuple[Tensor, Tensor]:
        """Mean loss, and share of right answers."""
        x = self.classifier(self.model(ids, return_dict=True, **inputs).last_hidden_state).unflatten(-1, (2, TOKENS))
        x = x[:, 3:-5]
        wanted = torch.stack([ids[:, 3 + offset : LENGTH - 5 + offset] for offset in OFFSETS], -1)
        loss = nn.functional.cross_entropy(x.flatten(0, 2), wanted.flatten())
        return loss, (x.argmax(-1) == wanted).float().mean()


@dataclass(frozen=True)
class Task:
    """The objective that the masks' objective is built on."""

    def __call__(self, call: Any, micro: Micro, progress: float) -> dict[str, Tensor]:
        return {"loss": call(micro.batch.input_ids)[0]}

    def score(self, call: Any, batch: Batch) -> dict[str, Tensor]:
        return {"right": call(batch.input_ids)[1]}


def draw(rng: torch.Generator, rows: int = 32) -> Batch:
    """Random rows."""
    ids = torch.randint(0, TOKENS, (rows, LENGTH), generator=rng)
    place, one, none = torch.arange(LENGTH).expand(rows, -1), torch.ones_like(ids), torch.zeros(0)
    return Batch(ids, place, one, none, none, none)


def search(settings: dict[str, Any], seed: int, steps: int) -> dict[str, Any]:
    """Learn masks; what is kept by threshold, its precision and recall, and the accuracy under it."""
    torch.manual_seed(seed)
    section = Attention.model_validate({"budget": f"{steps}steps", "arch": ARCH, "finalise": "threshold", **settings})
    structure = Structure(section.structure, LENGTH, 16, section.symmetric)
    model = Masked(Planted(ARCH), section, structure)
    optimizer = torch.optim.Adam(model.network.parameters(), lr=WEIGHTS_RATE)
    model.join(optimizer)
    objective, rng, one = LearnedMasks(Task()), torch.Generator().manual_seed(seed), torch.ones(())
    for step in range(steps):
        trains = "both" if section.levels == 1 else ("weights", "masks")[step % 2]
        micro = MaskMicro(Micro(draw(rng), one, one), seed * 1_000_003 + step, trains)
        optimizer.zero_grad()
        objective(model, micro, step / steps)["loss"].backward()
        optimizer.step()
    with torch.no_grad():
        right = float(objective.score(model.eval(), draw(rng, 256))["right"])
    alpha = model.logits.detach().double().numpy()
    kept = finalise(alpha, model.global_logits.detach().numpy(), structure, section)
    masks = [
        dense(pattern_of(row, one, structure, section), LENGTH)
        for row, one in zip(kept.logits, kept.globals, strict=True)
    ]
    needed = dense(parse("signed:-5+3")[0] if not section.symmetric else parse("toeplitz:3+5")[0], LENGTH)
    union = masks[0] | masks[1]
    figures = {name: float(value) for name, value in model.figures().items()}
    distances = sorted({abs(int(i) - int(j)) for i, j in zip(*union.nonzero(), strict=True)})
    return {
        "accuracy": right, "recall": float((union & needed).sum() / needed.sum()), "density": masks[0].mean() / 2
        + masks[1].mean() / 2, "precision": float((union & needed).sum() / max(1, union.sum())),
        "exact": bool((union == needed).all()), "distances": distances if len(distances) < 12 else len(distances),
        **figures,
    }  # fmt: skip


def control(pattern: str, seed: int, steps: int) -> dict[str, Any]:
    """Accuracy of the same training under a fixed mask."""
    torch.manual_seed(seed)
    model = Planted(f"{ARCH} pattern={pattern}")
    optimizer, rng = torch.optim.Adam(model.parameters(), lr=WEIGHTS_RATE), torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(draw(rng).input_ids)[0].backward()
        optimizer.step()
    with torch.no_grad():
        return {"accuracy": float(model.eval()(draw(rng, 256).input_ids)[1]), "density": density(pattern, LENGTH)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--only", default="", help="searches and controls whose name contains this")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    jobs = [(name, search, settings) for name, settings in SEARCHES.items()]
    jobs += [(name, control, pattern) for name, pattern in CONTROLS.items()]
    for name, function, what in jobs:
        if options.only not in name:
            continue
        started = time.process_time()
        found = [function(what, seed, options.steps) for seed in range(options.seeds)]
        rows.append({"name": name, "settings": what, "kind": function.__name__, "seeds": found})
        accuracy = [one["accuracy"] for one in found]
        exact = f", exact {sum(one['exact'] for one in found)}/{len(found)}" if function is search else ""
        more = [(one["distances"], round(one["precision"], 2)) for one in found] if function is search else ""
        print(f"{name:28} accuracy {min(accuracy):.2f}-{max(accuracy):.2f}{exact} {more} "
              f"density {sum(one['density'] for one in found) / len(found):.3f}, {time.process_time() - started:.0f} s",
              flush=True)  # fmt: skip
    if not options.only:
        facts = {"steps": options.steps, "chance": 1 / TOKENS, "rows": rows, "machine": run.versions()}
        run.write_json(ROOT / "benchmarks" / "results" / "planted_offsets.json", facts)


if __name__ == "__main__":
    main()
