"""What a student learns from a teacher: its predictions, attention logits, hidden states, or relations between tokens.

Comes in: what both models computed for the same token ids. Goes out: one number each. Predictions: Hinton et al.,
arXiv 1503.02531, with T^2 and summed over the vocabulary, as Bort (arXiv 2010.10499) meant it. Attention and hidden
states are AutoTinyBERT's (arXiv 2107.13686) as in the corrected formulas: means over real tokens, teacher without
gradient. Relations are MiniLMv2's (arXiv 2012.15828), which need no equal numbers of heads.

Shapes: B batch, T tokens, H heads, K head size, D channels, P masked positions, V vocabulary, N likeliest predictions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from frugalbert.data.masking import IGNORED
from frugalbert.model.losses import CHUNK

States = tuple[Tensor, Tensor, Tensor]
"""Query, key, value of one layer, (B, H, T, K) each, as its attention uses them."""


@contextmanager
def watch(encoder: Any, layers: Sequence[int]) -> Iterator[dict[int, States]]:
    """Fill in what the next forward pass of a FrugalModel has in these layers (from 0; negative: from the end)."""
    found: dict[int, States] = {}

    def keep(layer: int) -> Any:
        return lambda module, inputs, output: found.update({layer: output})

    handles = [encoder.layers[layer].attention.states.register_forward_hook(keep(layer)) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def pairs_of(document_ids: Tensor, *, isolate: bool) -> Tensor:
    """(B, 1, T, T) bool: both tokens real and, with `isolate`, of one document. document_ids (B, T), 0 = padding."""
    real = document_ids > 0
    both = real[:, :, None] & real[:, None, :]
    if isolate:
        both = both & (document_ids[:, :, None] == document_ids[:, None, :])
    return both[:, None]


def _logits(query: Tensor, key: Tensor) -> Tensor:
    return query.float() @ key.float().transpose(-1, -2) * query.shape[-1] ** -0.5


def attention_loss(student: States, teacher: States, pairs: Tensor) -> Tensor:
    """Mean squared difference of the scaled attention logits over all heads and allowed pairs (B, 1, T, T).

    Raises ValueError if the numbers of heads differ.
    """
    heads, wanted = student[0].shape[1], teacher[0].shape[1]
    if heads != wanted:
        raise ValueError(
            f"attention logits of {heads} heads cannot be compared with the teacher's {wanted}; use relation instead"
        )
    difference = _logits(*student[:2]) - _logits(*teacher[:2]).detach()
    return (difference.square() * pairs).sum() / (heads * pairs.sum()).clamp(min=1)


def hidden_loss(projected: Tensor, target: Tensor, document_ids: Tensor) -> Tensor:
    """Mean squared difference (B, T, D) of the student's projected hidden states and the teacher's at real tokens."""
    real = (document_ids > 0)[..., None]
    difference = (projected.float() - target.detach().float()).square() * real
    return difference.sum() / (target.shape[-1] * real.sum()).clamp(min=1)


def relation_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], pairs: Tensor, heads: int) -> Tensor:
    """Mean over queries, keys and values of KL(teacher's relations || student's), per head and real token.

    A relation is softmax(x x^T / sqrt(d)) of x re-split into `heads` heads of size d. Raises ValueError if either
    width is no multiple of `heads`.
    """
    used = pairs.any(-1)
    total = pairs.new_zeros((), dtype=torch.float32)
    for mine, other in zip(student, teacher, strict=True):
        ours, theirs = (_relations(item, pairs, heads) for item in (mine, other))
        divergence = functional.kl_div(ours, theirs.detach(), reduction="none", log_target=True)
        total = total + (divergence.masked_fill(~pairs, 0.0).sum(-1) * used).sum()
    return total / (len(student) * heads * used.sum()).clamp(min=1)


def _relations(states_BHTK: Tensor, pairs: Tensor, heads: int) -> Tensor:
    width = states_BHTK.shape[1] * states_BHTK.shape[3]
    if width % heads:
        raise ValueError(f"relation_heads {heads} does not divide the {width} channels of the attention heads")
    split = states_BHTK.transpose(1, 2).flatten(2).unflatten(2, (heads, -1)).transpose(1, 2)
    return _logits(split, split).masked_fill(~pairs, -1e9).log_softmax(-1)


def soft_label_loss(
    logits_PV: Tensor, labels_P: Tensor, teacher_PV: Tensor | None, weight: float
) -> tuple[Tensor, Tensor]:
    """Means over the labels that are not -100 of the cross-entropy, and of it + `weight` * KL(teacher || student)."""
    log_probability = logits_PV.float().log_softmax(-1)
    used = labels_P != IGNORED
    count = used.sum().clamp(min=1)
    hard = -(log_probability.gather(1, labels_P.clamp(min=0)[:, None])[:, 0] * used).sum() / count
    if teacher_PV is None or weight == 0.0:
        return hard, hard
    with torch.no_grad():
        target = teacher_PV.float().log_softmax(-1)
    divergence = functional.kl_div(log_probability, target, reduction="none", log_target=True).sum(-1)
    return hard, hard + weight * (divergence * used).sum() / count


# ---- predictions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Prediction:
    """What the teacher expects at the masked positions.

    scores (P, V): its logits. With `ids` (P, N), the N likeliest tokens: scores (P, N) of these, and rest (P,): the
    logarithm of the summed exp(logit / T) of all others, which count as one class.
    """

    scores: Tensor
    ids: Tensor | None = None
    rest: Tensor | None = None

    def piece(self, part: slice) -> Prediction:
        return Prediction(*(None if x is None else x[part] for x in (self.scores, self.ids, self.rest)))  # type: ignore[arg-type]


def likeliest(logits_PV: Tensor, count: int, temperature: float) -> Prediction:
    """The `count` likeliest of each row and the rest as one, in the precision that a cache stores: the highest score is
    0, scores in fp16."""
    logits = logits_PV.float()
    scores, ids = logits.topk(min(count, logits.shape[1]), -1)
    top = scores[:, :1].clone()
    others = (logits - top).div_(temperature).scatter_(1, ids, -torch.inf)
    return Prediction((scores - top).half(), ids, others.logsumexp(-1))


def distilled_loss(
    x_PD: Tensor,
    decoder: nn.Linear,
    labels_P: Tensor,
    wanted: Prediction,
    weights: tuple[float, float],
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """w0 CE(label, student) + w1 T^2 KL(teacher || student), means over the labels that are not -100; 0 if none.

    Returns (loss, CE, T^2 KL, logits (P, V)); the loss alone carries gradients, w0 (q1 - y) + w1 T (q - p) per logit
    and label. One pass over pieces of the scores makes all of them, as in `model.losses.masked_loss`: at its peak two
    (P, V) tensors exist instead of about eight.
    """
    return _Distillation.apply(x_PD, decoder.weight, decoder.bias, labels_P, wanted, (*weights, temperature))  # type: ignore[return-value]


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_PD: Tensor, weight_VD: Tensor, bias_V: Tensor, labels_P: Tensor, wanted: Prediction,
        settings: tuple[float, float, float],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        *weights, temperature = settings
        device = x_PD.device.type
        if torch.is_autocast_enabled(device):
            x_PD = x_PD.to(torch.get_autocast_dtype(device))
        weight_VD = weight_VD.to(x_PD.dtype)
        logits_PV = x_PD @ weight_VD.t()
        gradient_PV, bias_gradient_V = torch.empty_like(logits_PV), torch.zeros_like(bias_V)
        count = (labels_P != IGNORED).sum().clamp(min=1)
        hard, soft = (logits_PV.new_zeros((), dtype=torch.promote_types(x_PD.dtype, torch.float32)) for _ in range(2))
        rows = max(1, CHUNK // logits_PV.shape[1]) if device == "cpu" else len(logits_PV)
        for start in range(0, len(logits_PV), max(rows, 1)):
            piece = slice(start, start + rows)
            scores = logits_PV[piece].to(hard.dtype).add_(bias_V)
            logits_PV[piece] = scores
            used = (labels_P[piece, None] != IGNORED).to(scores.dtype) / count
            divergence, gradient = _soft_gradient(scores, wanted.piece(piece), temperature)
            soft += (divergence * used[:, 0]).sum() * temperature**2
            gradient.mul_(weights[1] * temperature)
            label = labels_P[piece, None].clamp(min=0)
            log_probability = functional.log_softmax(scores, -1)
            hard -= (log_probability.gather(1, label) * used).sum()
            gradient.add_(log_probability.exp_(), alpha=weights[0])
            gradient.scatter_add_(1, label, gradient.new_full((), -weights[0]).expand(label.shape)).mul_(used)
            bias_gradient_V += gradient.sum(0)
            gradient_PV[piece] = gradient
        ctx.save_for_backward(x_PD, weight_VD, gradient_PV, bias_gradient_V)
        ctx.mark_non_differentiable(hard, soft, logits_PV)
        ctx.set_materialize_grads(False)
        return weights[0] * hard + weights[1] * soft, hard, soft, logits_PV

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_PD, weight_VD, gradient_PV, bias_gradient_V = ctx.saved_tensors
        factor = gradients[0]
        x_gradient = (gradient_PV @ weight_VD).mul_(factor)
        weight_gradient = (gradient_PV.t() @ x_PD).to(bias_gradient_V.dtype).mul_(factor)
        return x_gradient, weight_gradient, bias_gradient_V * factor, None, None, None


def _soft_gradient(scores: Tensor, wanted: Prediction, temperature: float) -> tuple[Tensor, Tensor]:
    """KL(p || q) of each row at the temperature, and q - p: its gradient times T."""
    log_q = functional.log_softmax(scores / temperature, -1)
    if wanted.ids is None:
        log_p = functional.log_softmax(wanted.scores.to(scores.dtype) / temperature, -1)
        p = log_p.exp()
        divergence = (p * (log_p - log_q)).sum(-1)
        return divergence, log_q.exp_().sub_(p)
    assert wanted.rest is not None
    top = wanted.scores.to(scores.dtype) / temperature
    log_p = functional.log_softmax(torch.cat((top, wanted.rest.to(scores.dtype)[:, None]), -1), -1)
    log_p, log_rest = log_p[:, :-1], log_p[:, -1:]
    mine = log_q.gather(1, wanted.ids)
    others = log_q.scatter(1, wanted.ids, -torch.inf).logsumexp(-1, keepdim=True)
    divergence = (log_p.exp() * (log_p - mine)).sum(-1)
    # the student's own shares divide the rest; without a rest (N = V) there is nothing to divide
    there = (log_rest > -torch.inf) & (others > -torch.inf)
    log_ratio = torch.where(there, log_rest - others, -torch.inf)
    divergence += torch.where(there, log_rest.exp() * (log_rest - others), 0.0)[:, 0]
    q = log_q.exp()
    return divergence, (q - q * log_ratio.exp()).scatter_(1, wanted.ids, mine.exp() - log_p.exp())
