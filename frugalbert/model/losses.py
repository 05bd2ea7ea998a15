"""Losses of the heads: scores and labels in, one fp32 number out. Always computed in fp32, whatever the scores are."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

IGNORED = -100
CHUNK = 1 << 19
"""Scores handled at once on a CPU: 2 MiB in fp32, about a core's cache."""


def masked_loss(x_PD: Tensor, decoder: nn.Linear, labels_P: Tensor) -> tuple[Tensor, Tensor]:
    """Vocabulary scores and their loss: the mean cross-entropy over the labels that are not -100, 0 if there are none.

    Returns (loss, scores (P, V)). In eager mode on a CPU the scores carry no gradient of their own: the loss and all
    gradients are made in one pass over cache-sized pieces of them, which nearly halves the cost of the vocabulary.
    """
    count = (labels_P != IGNORED).sum().clamp(min=1)
    if x_PD.device.type == "cpu" and not torch.compiler.is_compiling():
        return _FusedCrossEntropy.apply(x_PD, decoder.weight, decoder.bias, labels_P, count)
    logits_PV = decoder(x_PD)
    loss = functional.cross_entropy(logits_PV.float(), labels_P, reduction="sum", ignore_index=IGNORED)
    return loss / count, logits_PV


class _FusedCrossEntropy(torch.autograd.Function):
    """Linear layer and mean cross-entropy with its gradient, in the dtype of x; everything after the product in fp32.

    Apart from the three products, the (P, V) scores would otherwise pass through memory about ten times (bias, cast,
    log-softmax, its gradient, cast, scaling, bias gradient): more time than all products of a small encoder.
    """

    @staticmethod
    def forward(
        ctx: Any, x_PD: Tensor, weight_VD: Tensor, bias_V: Tensor, labels_P: Tensor, count: Tensor
    ) -> tuple[Tensor, Tensor]:
        weight_VD = weight_VD.to(x_PD.dtype)
        logits_PV = x_PD @ weight_VD.t()
        needed = any(ctx.needs_input_grad)
        gradient_PV = torch.empty_like(logits_PV) if needed else None
        bias_gradient_V = torch.zeros_like(bias_V) if needed else None
        total = logits_PV.new_zeros((), dtype=torch.promote_types(x_PD.dtype, torch.float32))
        rows = max(1, CHUNK // logits_PV.shape[1])
        for start in range(0, logits_PV.shape[0], rows):
            piece = slice(start, start + rows)
            label = labels_P[piece, None]
            counts = label != IGNORED
            label = label.clamp(min=0)
            scores = logits_PV[piece].to(total.dtype).add_(bias_V)
            logits_PV[piece] = scores
            log_probability = functional.log_softmax(scores, -1)
            total -= (log_probability.gather(1, label) * counts).sum()
            if gradient_PV is not None and bias_gradient_V is not None:
                gradient = log_probability.exp_()
                gradient.scatter_add_(1, label, gradient.new_full((), -1.0).expand(label.shape))
                gradient.mul_(counts.to(gradient.dtype) / count)
                bias_gradient_V += gradient.sum(0)
                gradient_PV[piece] = gradient
        ctx.save_for_backward(x_PD, weight_VD, gradient_PV, bias_gradient_V)
        ctx.mark_non_differentiable(logits_PV)
        ctx.set_materialize_grads(False)
        return total / count, logits_PV

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x_PD, weight_VD, gradient_PV, bias_gradient_V = ctx.saved_tensors
        factor = gradients[0]
        x_gradient_PD = (gradient_PV @ weight_VD).mul_(factor)
        weight_gradient_VD = (gradient_PV.t() @ (x_PD * factor)).to(bias_gradient_V.dtype)
        return x_gradient_PD, weight_gradient_VD, bias_gradient_V * factor, None, None


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
