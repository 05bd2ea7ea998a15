"""What a student learns from a teacher's last layer: attention logits, hidden states, or relations between tokens.

Comes in: what both models computed for the same token ids. Goes out: one number. Attention and hidden states are
AutoTinyBERT's (arXiv 2107.13686) as in the corrected formulas: means over real tokens, teacher without gradient.
Relations are MiniLMv2's (arXiv 2012.15828), which need no equal numbers of heads. Soft labels: Hinton et al., arXiv
1503.02531.

Shapes: B batch, T tokens, H heads, K head size, D channels, P masked positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from frugalbert.data.masking import IGNORED


@dataclass
class LastLayer:
    """Of one forward pass: query, key, value (B, H, T, K) of the last layer, hidden states (B, T, D) after it."""

    states: tuple[Tensor, Tensor, Tensor] | None = None
    hidden: Tensor | None = None


@contextmanager
def watch(encoder: Any) -> Iterator[LastLayer]:
    """Fill a LastLayer with what the next forward pass of a FrugalModel computes."""
    found = LastLayer()

    def keep_states(module: nn.Module, inputs: Any, output: Any) -> None:
        found.states = output

    def keep_hidden(module: nn.Module, inputs: Any, output: Any) -> None:
        found.hidden = output.last_hidden_state

    handles = [
        encoder.layers[-1].attention.states.register_forward_hook(keep_states),
        encoder.register_forward_hook(keep_hidden),
    ]
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


def attention_loss(student: LastLayer, teacher: LastLayer, pairs: Tensor) -> Tensor:
    """Mean squared difference of the scaled attention logits over all heads and allowed pairs (B, 1, T, T).

    Raises ValueError if the numbers of heads differ.
    """
    assert student.states is not None
    assert teacher.states is not None
    heads, wanted = student.states[0].shape[1], teacher.states[0].shape[1]
    if heads != wanted:
        raise ValueError(
            f"attention logits of {heads} heads cannot be compared with the teacher's {wanted}; use distill: [relation]"
        )
    difference = _logits(*student.states[:2]) - _logits(*teacher.states[:2]).detach()
    return (difference.square() * pairs).sum() / (heads * pairs.sum()).clamp(min=1)


def hidden_loss(projected: Tensor, target: Tensor, document_ids: Tensor) -> Tensor:
    """Mean squared difference (B, T, D) of the student's projected hidden states and the teacher's at real tokens."""
    real = (document_ids > 0)[..., None]
    difference = (projected.float() - target.detach().float()).square() * real
    return difference.sum() / (target.shape[-1] * real.sum()).clamp(min=1)


def relation_loss(student: LastLayer, teacher: LastLayer, pairs: Tensor, heads: int) -> Tensor:
    """Mean over queries, keys and values of KL(teacher's relations || student's), per head and real token.

    A relation is softmax(x x^T / sqrt(d)) of x re-split into `heads` heads of size d. Raises ValueError if either
    width is no multiple of `heads`.
    """
    assert student.states is not None
    assert teacher.states is not None
    used = pairs.any(-1)
    total = pairs.new_zeros((), dtype=torch.float32)
    for mine, other in zip(student.states, teacher.states, strict=True):
        ours, theirs = (_relations(item, pairs, heads) for item in (mine, other))
        divergence = functional.kl_div(ours, theirs.detach(), reduction="none", log_target=True)
        total = total + (divergence.masked_fill(~pairs, 0.0).sum(-1) * used).sum()
    return total / (3 * heads * used.sum()).clamp(min=1)


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
