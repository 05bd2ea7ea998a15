"""Attention under a learned mask: scores and a mask with gradients in, probabilities out, and what the mask learns.

`renormalised` keeps A = M e / sum(M e): a dropped pair still learns what its row would gain by admitting it. `additive`
is SparseBERT's (arXiv 2102.12871; -10000 on the scores), where dropped pairs learn nothing and kept ones 10000 times as
much; `post-softmax` multiplies probabilities without renormalising, as its importance maps do.

Shapes: B batch, H heads, T tokens, K head_dim; a mask is (H, T, T), or (B, H, T, T) where documents share rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

CLAMP = 20.0  # the exponent of a dropped key may exceed that of the best kept one
DROPPED = -10_000.0  # the reference's


class _Renormalised(torch.autograd.Function):
    """A_ij = M_ij e_ij / Z_i, with e_ij = exp(s_ij - the largest kept s_ik) and Z_i = sum_k M_ik e_ik; 0 in a row that
    keeps nothing. Gradients: ds = A (g - <g>_i), dM = e / Z (g - <g>_i), with g = dL/dA and <g>_i = sum_k A_ik g_ik."""

    @staticmethod
    def forward(ctx: Any, scores_BHTT: Tensor, mask: Tensor, visible: Tensor | None) -> Tensor:
        if visible is not None:
            scores_BHTT = scores_BHTT.masked_fill(~visible, -torch.inf)
        top = scores_BHTT.masked_fill(mask <= 0.0, -torch.inf).amax(-1, keepdim=True)
        top.masked_fill_(top == -torch.inf, 0.0)
        open_BHTT = (scores_BHTT - top).clamp_(max=CLAMP).exp_()
        kept_BHTT = mask * open_BHTT
        total = kept_BHTT.sum(-1, keepdim=True)
        scale = torch.where(total > 0.0, 1.0 / total, 0.0)
        kept_BHTT *= scale
        ctx.save_for_backward(open_BHTT, scale, kept_BHTT, mask)
        return kept_BHTT

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        open_BHTT, scale, kept_BHTT, mask = ctx.saved_tensors
        gain_BHTT = gradients[0] - (kept_BHTT * gradients[0]).sum(-1, keepdim=True)
        of_mask = None
        if ctx.needs_input_grad[1]:
            of_mask = (open_BHTT * scale).mul_(gain_BHTT)
            of_mask = of_mask.sum(0) if mask.ndim < 4 else of_mask
        return gain_BHTT.mul_(kept_BHTT), of_mask, None


def probabilities(scores_BHTT: Tensor, mask: Tensor, visible: Tensor | None, gating: str) -> Tensor:
    """Attention probabilities (B, H, T, T) in fp32. `visible`, (B, 1, T or 1, T) bool, hides padding and other
    documents: no gradient reaches them."""
    scores_BHTT, mask = scores_BHTT.float(), mask.float()
    if gating == "renormalised":
        return _Renormalised.apply(scores_BHTT, mask, visible)  # type: ignore[return-value]
    if gating == "additive":
        scores_BHTT = scores_BHTT + (1.0 - mask) * DROPPED
    if visible is not None:
        scores_BHTT = scores_BHTT.masked_fill(~visible, torch.finfo(torch.float32).min / 2)
    found = scores_BHTT.softmax(-1)
    return found * mask if gating == "post-softmax" else found


@dataclass(frozen=True, eq=False)
class Gate:
    """The attention of one layer under a mask; takes the place of its pattern."""

    mask: Tensor
    visible: Tensor | None
    gating: str

    def __call__(self, query_BHTK: Tensor, key_BHTK: Tensor, value_BHTK: Tensor, dropout: float) -> Tensor:
        scores_BHTT = torch.matmul(query_BHTK * query_BHTK.shape[-1] ** -0.5, key_BHTK.transpose(-1, -2))
        weights_BHTT = probabilities(scores_BHTT, self.mask, self.visible, self.gating)
        weights_BHTT = functional.dropout(weights_BHTT, dropout, training=dropout > 0.0)
        return torch.matmul(weights_BHTT.to(value_BHTK.dtype), value_BHTK)
