"""Why Bort's released distillation loss taught nothing: its gradient beside that of the loss as it was meant.

One masked position, V = 50,265, T = 2. Teacher: logits N(0, s^2); student: the teacher's + d N(0, 1), so that d is
their disagreement. With the published weights (0.1 words + 0.5 teacher), the norm of the gradient in the student's
logits, in double precision, of
  words      0.1 CE(label, student), the label drawn from the teacher
  meant      0.5 T^2 KL(teacher || student) at temperature T: `frugalbert.train.distill.distilled_loss`
  released   0.5 times the released code's: probabilities in place of logits, so soft-maxed again, averaged over the
             vocabulary, no T^2
Writes benchmarks/results/distillation_gradient.json and .png. Seconds on one thread; random numbers, no training.
    python benchmarks/distillation_gradient.py [--positions 8]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from frugalbert import run  # noqa: E402
from frugalbert.train.distill import Prediction, distilled_loss  # noqa: E402

VOCABULARY, TEMPERATURE, WORDS, TEACHER = 50_265, 2.0, 0.1, 0.5
SPREADS = (1.0, 5.0, 15.0)  # flat; 1.3 nats, as of a good masked LM; sure of one word or two
DISAGREEMENTS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
COLOURS = {"words": "#8c8c8c", "meant": "#1f77b4", "released": "#d62728"}
SHOWN = {"words": "masked words, weight 0.1", "meant": "teacher as meant, weight 0.5",
         "released": "teacher as released, weight 0.5"}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=8)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "distillation_gradient.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [at(spread, d, options.positions) for spread in SPREADS for d in DISAGREEMENTS]
    settings = {"vocabulary": VOCABULARY, "temperature": TEMPERATURE, "weights": [WORDS, TEACHER]}
    run.write_json(options.out, {**settings, "positions": options.positions, "rows": rows})
    draw(rows, options.out.with_suffix(".png"))
    report(rows)


def at(spread: float, disagreement: float, positions: int) -> dict[str, Any]:
    """Medians over the positions, of losses and of norms of gradients; all spreads and disagreements share draws."""
    generator = torch.Generator().manual_seed(0)
    found: dict[str, list[float]] = {}
    for _ in range(positions):
        first, second = torch.randn(2, VOCABULARY, generator=generator, dtype=torch.float64)
        teacher = spread * first
        student = teacher + disagreement * second
        label = torch.multinomial(teacher.softmax(-1), 1, generator=generator)
        for name, (loss, gradient) in {
            "words": ours(student, teacher, label, (WORDS, 0.0)),
            "meant": ours(student, teacher, label, (0.0, TEACHER)),
            "released": released(student, teacher),
        }.items():
            found.setdefault(f"{name}_loss", []).append(loss)
            found.setdefault(f"{name}_gradient", []).append(float(gradient.norm()))
    medians = {name: statistics.median(values) for name, values in found.items()}
    return {"spread": spread, "disagreement": disagreement, **medians}


def ours(student: Tensor, teacher: Tensor, label: Tensor, weights: tuple[float, float]) -> tuple[float, Tensor]:
    """The loss that is trained with, and its gradient in the student's logits: those of a decoder's bias."""
    decoder = nn.Linear(1, VOCABULARY, dtype=torch.float64)
    nn.init.zeros_(decoder.weight)
    decoder.bias.data.copy_(student)
    nothing = torch.zeros(1, 1, dtype=torch.float64)
    loss = distilled_loss(nothing, decoder, label, Prediction(teacher[None]), weights, TEMPERATURE)[0]
    loss.backward()
    assert decoder.bias.grad is not None
    return loss.item(), decoder.bias.grad


def released(student: Tensor, teacher: Tensor) -> tuple[float, Tensor]:
    """0.5 KLDivLoss(softmax(student / T), softmax(teacher / T)) of a framework that soft-maxes its first argument."""
    logits = student.clone().requires_grad_(True)
    p, q = (x.div(TEMPERATURE).softmax(-1) for x in (teacher, logits))
    loss = TEACHER * (p * (p.log() - q.log_softmax(-1))).mean()
    loss.backward()
    assert logits.grad is not None
    return loss.item(), logits.grad


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(SPREADS), figsize=(9, 3.2), sharey=True, layout="constrained")
    for axis, spread in zip(axes, SPREADS, strict=True):
        mine = [row for row in rows if row["spread"] == spread and row["disagreement"] > 0]
        for name, colour in COLOURS.items():
            values = [row[f"{name}_gradient"] for row in mine]
            axis.loglog([row["disagreement"] for row in mine], values, color=colour, label=SHOWN[name], marker=".")
        axis.set_title(f"teacher's logits: deviation {spread:g}", fontsize=9)
        axis.set_xlabel("student minus teacher: deviation", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("norm of the gradient, per position", fontsize=8)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, dpi=90, metadata={"Software": ""})
    pyplot.close(figure)


def report(rows: list[dict[str, Any]]) -> None:
    names = [f"{name} {kind}" for kind in ("loss", "gradient") for name in COLOURS]
    print("  ".join(f"{word:>17}" for word in ("spread", "disagreement", *names, "words / released")))
    for row in rows:
        values = [row[name.replace(" ", "_")] for name in names]
        ratio = row["words_gradient"] / row["released_gradient"]
        print("  ".join(f"{x:17.3g}" for x in (row["spread"], row["disagreement"], *values, ratio)))


if __name__ == "__main__":
    main()
