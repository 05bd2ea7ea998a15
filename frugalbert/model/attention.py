"""Self-attention: who may look at whom, rotary positions, and the product itself.

Comes in: hidden states, a mask and rotary tables, both made once per forward pass for all layers that share them.
Goes out: mixed hidden states. Rotary positions: RoFormer, arXiv 2104.09864, in the half-rotation layout of ModernBERT.

Shapes: B batch, T tokens, H heads, K head_dim, D channels of the layer.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .arch import LayerArch

PLAIN_LENGTH = 512
"""Up to this length a CPU trains faster in bf16 with plain products: its fused backward pass takes four times as long
at 128 tokens. In fp32, and for longer inputs, the fused one wins."""


def additive_mask(
    shape_BT: torch.Size,
    attention_mask_BT: Tensor | None,
    document_ids_BT: Tensor | None,
    window: int | None,
    like: Tensor,
) -> Tensor | None:
    """What is added to attention scores: 0 where token i may see token j, very negative elsewhere; None = all see all.

    attention_mask hides tokens that are 0 in it; document_ids hide tokens of another document (padding is document 0
    and sees itself); `window` hides tokens more than so many apart. The result, (B or 1, 1, T or 1, T), has the dtype
    and device of `like`. It is finite, so a row in which everything is hidden gives an average, never NaN.
    """
    allowed = None
    if document_ids_BT is not None:
        allowed = document_ids_BT[:, None, :, None] == document_ids_BT[:, None, None, :]
    if attention_mask_BT is not None:
        real = attention_mask_BT[:, None, None, :].bool()
        allowed = real if allowed is None else allowed & real
    if window is not None:
        place = torch.arange(shape_BT[1], device=like.device)
        near = ((place[:, None] - place[None, :]).abs() <= window)[None, None]
        allowed = near if allowed is None else allowed & near
    if allowed is None:
        return None
    return torch.zeros(allowed.shape, dtype=like.dtype, device=like.device).masked_fill(
        ~allowed, torch.finfo(like.dtype).min / 2
    )


def rotary_tables(position_ids: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines, (B or 1, 1, T, K) each, for positions (B or 1, T)."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    angle = position_ids[:, None, :, None].float() * (1.0 / theta**exponent)
    cosine, sine = angle.cos(), angle.sin()
    return torch.cat((cosine, cosine), -1).to(dtype), torch.cat((-sine, sine), -1).to(dtype)


def rotate(x_BHTK: Tensor, cosine: Tensor, signed_sine: Tensor) -> Tensor:
    """Turn channel pairs (k, k + K/2) by the token's angle."""
    if x_BHTK.requires_grad and not torch.compiler.is_compiling():
        return _Rotation.apply(x_BHTK, cosine, signed_sine)
    return _turn(x_BHTK, cosine, signed_sine)


def _turn(x_BHTK: Tensor, cosine: Tensor, signed_sine: Tensor) -> Tensor:
    return torch.addcmul(x_BHTK * cosine, x_BHTK.roll(x_BHTK.shape[-1] // 2, -1), signed_sine)


class _Rotation(torch.autograd.Function):
    """The gradient of a rotation is the opposite rotation: half the work of what autograd makes of its pieces."""

    @staticmethod
    def forward(ctx: Any, x_BHTK: Tensor, cosine: Tensor, signed_sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, signed_sine)
        return _turn(x_BHTK, cosine, signed_sine)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cosine, signed_sine = ctx.saved_tensors
        return _turn(gradients[0], cosine, -signed_sine), None, None


def attend(query_BHTK: Tensor, key_BHTK: Tensor, value_BHTK: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Softmax(q k / sqrt(K) + mask) v, (B, H, T, K)."""
    cpu_training = query_BHTK.requires_grad and query_BHTK.device.type == "cpu"
    if not cpu_training or query_BHTK.dtype == torch.float32 or query_BHTK.shape[2] > PLAIN_LENGTH:
        return functional.scaled_dot_product_attention(
            query_BHTK, key_BHTK, value_BHTK, attn_mask=mask, dropout_p=dropout
        )
    scores_BHTT = torch.matmul(query_BHTK * query_BHTK.shape[-1] ** -0.5, key_BHTK.transpose(-1, -2))
    if mask is not None:
        scores_BHTT = scores_BHTT + mask
    weights_BHTT = functional.dropout(torch.softmax(scores_BHTT, -1), dropout, training=dropout > 0.0)
    return torch.matmul(weights_BHTT, value_BHTK)


class Output(nn.Linear):
    """The last matrix of a sublayer, which writes to the residual stream and may start at zero."""


def _normalise(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """The norm in the dtype of x; its fused form needs all of one kind."""
    return functional.rms_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.eps)


class Attention(nn.Module):
    """Multi-head self-attention of one layer; the heads together may be wider or narrower than the layer."""

    def __init__(self, layer: LayerArch, bias: bool, qk_norm: bool, epsilon: float, dropout: float) -> None:
        super().__init__()
        self.head_dim = layer.head_dim
        self.query = nn.Linear(layer.hidden, layer.qkv, bias=bias)
        self.key = nn.Linear(layer.hidden, layer.qkv, bias=bias)
        self.value = nn.Linear(layer.hidden, layer.qkv, bias=bias)
        self.output = Output(layer.qkv, layer.hidden, bias=bias)
        self.query_norm = nn.RMSNorm(layer.head_dim, eps=epsilon) if qk_norm else None
        self.key_norm = nn.RMSNorm(layer.head_dim, eps=epsilon) if qk_norm else None
        self.dropout = dropout
        self.states = nn.Identity()
        """Passes (query, key, value) on, (B, H, T, K) each after norms and rotation: hooks read them here."""

    def forward(self, x_BTD: Tensor, mask: Tensor | None, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        heads_BTHK = (*x_BTD.shape[:2], -1, self.head_dim)
        query_BHTK = self.query(x_BTD).view(heads_BTHK).transpose(1, 2)
        key_BHTK = self.key(x_BTD).view(heads_BTHK).transpose(1, 2)
        value_BHTK = self.value(x_BTD).view(heads_BTHK).transpose(1, 2)
        if self.query_norm is not None and self.key_norm is not None:
            query_BHTK, key_BHTK = _normalise(self.query_norm, query_BHTK), _normalise(self.key_norm, key_BHTK)
        if rotary is not None:
            query_BHTK, key_BHTK = rotate(query_BHTK, *rotary), rotate(key_BHTK, *rotary)
        query_BHTK, key_BHTK, value_BHTK = self.states((query_BHTK, key_BHTK, value_BHTK))
        mixed_BHTK = attend(query_BHTK, key_BHTK, value_BHTK, mask, self.dropout if self.training else 0.0)
        return self.output(mixed_BHTK.transpose(1, 2).flatten(2))
