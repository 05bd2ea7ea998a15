"""Losses of the heads: scores and labels in, one fp32 number out. Always computed in fp32, whatever the scores are."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

IGNORED = -100
CHUNK = 1 << 19
"""Scores handled at once on a CPU: 2 MiB in fp32, about a core's cache."""
PRODUCT = 1 << 27
"""Scores that exist at once on a GPU: half a GiB in fp32."""


def masked_loss(
    x_PD: Tensor, decoder: nn.Linear, labels_P: Tensor, loss_only: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Vocabulary scores and their loss: the mean cross-entropy over the labels that are not -100, 0 if there are none.

    Returns (loss, scores (P, V), or None with `loss_only`). In eager mode, on a CPU or with `loss_only`, the scores
    carry no gradient of their own: the loss and all gradients are made in one pass over pieces of them, which nearly
    halves the cost of the vocabulary on a CPU and keeps a GPU from holding them all.
    """
    count = (labels_P != IGNORED).sum().clamp(min=1)
    if (loss_only or on_cpu(x_PD)) and not torch.compiler.is_compiling():
        return _FusedCrossEntropy.apply(x_PD, decoder.weight, decoder.bias, labels_P, count, loss_only)
    logits_PV = decoder(x_PD)
    loss = functional.cross_entropy(logits_PV.float(), labels_P, reduction="sum", ignore_index=IGNORED)
    return loss / count, None if loss_only else logits_PV


def on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu"


class _FusedCrossEntropy(torch.autograd.Function):
    """Linear layer and mean cross-entropy with its gradient, in the dtype of x; everything after the product in fp32.

    Apart from the three products, the (P, V) scores would otherwise pass through memory about ten times (bias, cast,
    log-softmax, its gradient, cast, scaling, bias gradient): more time than all products of a small encoder. A GPU
    makes the scores themselves piece by piece (as Liger-Kernel, arXiv 2410.10989, section 3.2), a CPU in one product.
    """

    @staticmethod
    def forward(
        ctx: Any, x_PD: Tensor, weight_VD: Tensor, bias_V: Tensor, labels_P: Tensor, count: Tensor, loss_only: bool
    ) -> tuple[Tensor, Tensor | None]:
        needed, cached = any(ctx.needs_input_grad), on_cpu(x_PD)
        ctx.weight_dtype, weight_VD = weight_VD.dtype, weight_VD.to(x_PD.dtype)
        wide = torch.promote_types(x_PD.dtype, torch.float32)
        total, bias_gradient_V = x_PD.new_zeros((), dtype=wide), torch.zeros_like(bias_V, dtype=wide)
        weight_gradient_VD: Tensor | None = None
        x_gradients, kept = list[Tensor](), list[Tensor]()
        rows = len(x_PD) if cached else PRODUCT // len(weight_VD)
        for x_RD, labels_R in zip(x_PD.split(max(1, rows)), labels_P.split(max(1, rows)), strict=True):
            logits_RV = x_RD @ weight_VD.t()
            gradient_RV = logits_RV if loss_only else torch.empty_like(logits_RV)
            step = CHUNK // len(weight_VD) if cached else rows
            for start in range(0, len(x_RD), max(1, step)):
                piece = slice(start, start + max(1, step))
                scores = logits_RV[piece].to(wide).add_(bias_V)
                if not loss_only:
                    logits_RV[piece] = scores
                found, gradient = _differentiated(scores, labels_R[piece])
                total += found
                if needed:
                    bias_gradient_V += gradient.sum(0)
                    gradient_RV[piece] = gradient
            if needed:
                x_gradients.append((gradient_RV @ weight_VD).to(x_PD.dtype))
                gradient = gradient_RV.t() @ x_RD
                weight_gradient_VD = gradient if weight_gradient_VD is None else weight_gradient_VD.to(wide) + gradient
            kept += [] if loss_only else [logits_RV]
        if needed:
            ctx.save_for_backward(_joined(x_gradients), weight_gradient_VD, bias_gradient_V, count)
        logits_PV = _joined(kept) if kept else None
        if logits_PV is not None:
            ctx.mark_non_differentiable(logits_PV)
        ctx.set_materialize_grads(False)
        return total / count, logits_PV

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        x_gradient_PD, weight_gradient_VD, bias_gradient_V, count = ctx.saved_tensors
        factor = gradients[0] / count
        weight_gradient_VD = weight_gradient_VD.to(ctx.weight_dtype, copy=True).mul_(factor)
        return x_gradient_PD * factor, weight_gradient_VD, bias_gradient_V * factor, None, None, None


def _differentiated(scores_RV: Tensor, labels_R: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of the labels' negative log-probabilities, its gradient by the scores)."""
    labels_R1, counts_R1 = labels_R[:, None].clamp(min=0), labels_R[:, None] != IGNORED
    gradient_RV = functional.log_softmax(scores_RV, -1)
    found = -(gradient_RV.gather(1, labels_R1) * counts_R1).sum()
    gradient_RV.exp_().scatter_add_(1, labels_R1, gradient_RV.new_full((), -1.0).expand(labels_R1.shape))
    return found, gradient_RV.mul_(counts_R1)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def label_loss(logits_NL: Tensor, labels_N: Tensor) -> Tensor:
    """Mean cross-entropy; labels -100 do not count."""
    return functional.cross_entropy(logits_NL.float(), labels_N, ignore_index=IGNORED)


def binary_loss(logits_BT: Tensor, labels_BT: Tensor, attention_mask_BT: Tensor | None) -> Tensor:
    """Mean binary cross-entropy over real tokens whose label is not -100; 0 if there are none."""
    counts = labels_BT != IGNORED
    if attention_mask_BT is not None:
        counts = counts & attention_mask_BT.bool()
    loss_BT = functional.binary_cross_entropy_with_logits(
        logits_BT.float(), labels_BT.clamp(min=0).float(), reduction="none"
    )
    return (loss_BT * counts).sum() / counts.sum().clamp(min=1)


def span_loss(logits_BT: Tensor, positions_B: Tensor) -> Tensor:
    """Mean cross-entropy of positions; those outside the input do not count."""
    outside = logits_BT.shape[1]
    return functional.cross_entropy(logits_BT.float(), positions_B.clamp(0, outside), ignore_index=outside)


def sequence_loss(logits_BL: Tensor, labels: Tensor, problem_type: str | None) -> Tensor:
    """Squared error, cross-entropy or binary cross-entropy; without a type the labels decide, as in Hugging Face."""
    if problem_type is None:
        whole = not labels.is_floating_point()
        single = "single_label_classification" if whole else "multi_label_classification"
        problem_type = "regression" if logits_BL.shape[1] == 1 else single
    if problem_type == "regression":
        return functional.mse_loss(logits_BL.float().view(labels.shape), labels.float())
    if problem_type == "multi_label_classification":
        return functional.binary_cross_entropy_with_logits(logits_BL.float(), labels.float())
    return label_loss(logits_BL, labels)
