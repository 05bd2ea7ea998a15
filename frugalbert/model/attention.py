"""Self-attention: who may look at whom, rotary positions, and the product itself.

Comes in: hidden states, a mask and rotary tables, both made once per forward pass for all layers that share them.
Goes out: mixed hidden states. Rotary positions: RoFormer, arXiv 2104.09864, in the half-rotation layout of ModernBERT.

Shapes: B batch, T tokens, S of them that are chosen in each row, H heads, K head_dim, D channels of the layer.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from .arch import LayerArch
from .patterns import check_length, dense, parse

PLAIN_LENGTH = 512
"""Up to this length a CPU trains faster in bf16 with plain products: its fused backward pass takes four times as long
at 128 tokens. In fp32, and for longer inputs, the fused one wins."""


Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""(query, key, value, dropout) -> mixed values, (B, H, T, K) each: another way to compute attention."""
Mask = Tensor | Attend | None
"""What a layer is given: a tensor that is added to its scores, or all of its attention; None = all see all."""


class Options(NamedTuple):
    """What trainings ask of a pass beside Hugging Face's inputs."""

    gates: Callable[[int, Tensor | None], Attend] | None = None
    """A layer's number and the pairs that are visible, (B, 1, T or 1, T) bool -> its attention, instead of its pattern
    (learned masks)."""
    places: Tensor | None = None
    """(B, S), indices into the flattened (B*T), those of a row in it: the last layer makes no other states."""


PLAIN = Options()


def visible_pairs(attention_mask_BT: Tensor | None, document_ids_BT: Tensor | None) -> Tensor | None:
    """(B, 1, T or 1, T) bool, whatever the pattern: attention_mask hides tokens that are 0 in it, document_ids those of
    another document (padding is document 0 and sees itself). None = all see all."""
    allowed = None
    if document_ids_BT is not None:
        allowed = document_ids_BT[:, None, :, None] == document_ids_BT[:, None, None, :]
    if attention_mask_BT is not None:
        real = attention_mask_BT[:, None, None, :].bool()
        allowed = real if allowed is None else allowed & real
    return allowed


def pattern_pairs(
    pattern: str, length: int, device: torch.device, position_ids_BT: Tensor | None, sep_BT: Tensor | None
) -> Tensor:
    """(B or 1, H or 1, T, T) bool: the pairs that the heads' patterns allow. `sep` says which tokens are [SEP].

    position_ids, if documents share a row, say where in its document a token stands. Raises ValueError for inputs that
    are longer than the pattern is defined for.
    """
    static = not torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    heads = parse(pattern)
    if static:
        check_length(pattern, length)
        if (position_ids_BT is None or all(head.by_distance or head.by_row for head in heads)) and sep_BT is None:
            return _table(pattern, length, device)
    row = torch.arange(length, device=device)[None]
    found: list[Tensor] = []
    for head in heads:
        place = row if position_ids_BT is None or head.by_distance or head.by_row else position_ids_BT
        sep = (None, None) if sep_BT is None else (sep_BT[:, :, None], sep_BT[:, None, :])
        found.append(torch.atleast_3d(head.allowed(place[:, :, None], place[:, None, :], *sep)))
    return torch.stack(torch.broadcast_tensors(*found), 1)


@functools.lru_cache(maxsize=16)
def _table(pattern: str, length: int, device: torch.device) -> Tensor:
    heads = [torch.from_numpy(dense(head, length).copy()) for head in parse(pattern)]
    return torch.stack(heads)[None].to(device)


def never_empty(allowed_BHTT: Tensor) -> Tensor:
    """The same, but a query that may see no key sees itself."""
    here = torch.eye(allowed_BHTT.shape[-1], dtype=torch.bool, device=allowed_BHTT.device)
    return allowed_BHTT | (here & ~allowed_BHTT.any(-1, keepdim=True))


def additive(allowed: Tensor, like: Tensor) -> Tensor:
    """0 where allowed, very negative elsewhere, in the dtype of `like`: finite, so that no row becomes NaN."""
    return torch.zeros(allowed.shape, dtype=like.dtype, device=like.device).masked_fill(
        ~allowed, torch.finfo(like.dtype).min / 2
    )


@dataclass(frozen=True)
class Rows:
    """A batch's tokens and who belongs together, (B, T) each, as `FrugalModel.forward` takes them."""

    input_ids: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor | None
    document_ids: Tensor | None

    def visible(self) -> Tensor | None:
        return visible_pairs(self.attention_mask, self.document_ids)


def additive_mask(pattern: str, rows: Rows, x_BTD: Tensor, sep_token_id: int | None) -> Tensor | None:
    """Of all pairs, (B or 1, H or 1, T, T) or (B, 1, 1, T), for scores in the dtype of x; None = all see all."""
    visible = rows.visible()
    if pattern == "dense":
        return None if visible is None else additive(visible, x_BTD)
    sep = None
    if any(head.by_content for head in parse(pattern)):
        if sep_token_id is None:
            raise ValueError(
                "an attention pattern names sep, but the model's configuration has no sep_token_id; add it"
            )
        sep = rows.input_ids == sep_token_id
    allowed = pattern_pairs(pattern, x_BTD.shape[1], x_BTD.device, rows.position_ids, sep)
    return additive(never_empty(allowed if visible is None else allowed & visible), x_BTD)


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


def chosen(x_BTD: Tensor, places_BS: Tensor) -> Tensor:
    """(B, S, D): some tokens of each row, by their indices into the flattened (B*T)."""
    return x_BTD.flatten(0, 1).index_select(0, places_BS.flatten()).view(*places_BS.shape, -1)


def of_chosen(
    mask: Mask, rotary: tuple[Tensor, Tensor] | None, places_BS: Tensor, length: int
) -> tuple[Mask, tuple[Tensor, Tensor] | None]:
    """Mask and rotary tables for the queries of chosen tokens of rows of `length`."""
    if isinstance(mask, Tensor) and mask.shape[2] > 1:
        mask = torch.take_along_dim(mask, (places_BS % length)[:, None, :, None], 2)
    if rotary is not None:
        cosine, sine = (chosen(table[:, 0].expand(len(places_BS), -1, -1), places_BS)[:, None] for table in rotary)
        rotary = cosine, sine
    return mask, rotary


def attend(query_BHSK: Tensor, key_BHTK: Tensor, value_BHTK: Tensor, mask: Mask, dropout: float) -> Tensor:
    """Softmax(q k / sqrt(K) + mask) v, (B, H, S, K), or what `mask` makes of them; S = T unless some are chosen."""
    if mask is not None and not isinstance(mask, Tensor):
        return mask(query_BHSK, key_BHTK, value_BHTK, dropout)
    cpu_training = query_BHSK.requires_grad and query_BHSK.device.type == "cpu"
    if not cpu_training or query_BHSK.dtype == torch.float32 or key_BHTK.shape[2] > PLAIN_LENGTH:
        return functional.scaled_dot_product_attention(
            query_BHSK, key_BHTK, value_BHTK, attn_mask=mask, dropout_p=dropout
        )
    scores_BHST = torch.matmul(query_BHSK * query_BHSK.shape[-1] ** -0.5, key_BHTK.transpose(-1, -2))
    if mask is not None:
        scores_BHST = scores_BHST + mask
    weights_BHST = functional.dropout(torch.softmax(scores_BHST, -1), dropout, training=dropout > 0.0)
    return torch.matmul(weights_BHST, value_BHTK)


class Output(nn.Linear):
    """The last matrix of a sublayer, which writes to the residual stream and may start at zero."""


def _normalise(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """The norm in the dtype of x; its fused form needs all of one kind."""
    return functional.rms_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.eps).to(x.dtype)


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
        """Passes (query, key, value) on, (B, H, S or T, K) after norms and rotation: hooks read them here."""

    def forward(
        self, x_BTD: Tensor, mask: Mask, rotary: tuple[Tensor, Tensor] | None, places_BS: Tensor | None = None
    ) -> Tensor:
        """(B, T, D), or that of chosen tokens alone, (B, S, D); then the mask must be a tensor or None."""
        asking_BSD, turns = x_BTD, rotary
        if places_BS is not None:
            asking_BSD = chosen(x_BTD, places_BS)
            mask, turns = of_chosen(mask, rotary, places_BS, x_BTD.shape[1])
        query_BHSK = self._heads(self.query(asking_BSD))
        key_BHTK, value_BHTK = self._heads(self.key(x_BTD)), self._heads(self.value(x_BTD))
        if self.query_norm is not None and self.key_norm is not None:
            query_BHSK, key_BHTK = _normalise(self.query_norm, query_BHSK), _normalise(self.key_norm, key_BHTK)
        if rotary is not None and turns is not None:
            query_BHSK, key_BHTK = rotate(query_BHSK, *turns), rotate(key_BHTK, *rotary)
        query_BHSK, key_BHTK, value_BHTK = self.states((query_BHSK, key_BHTK, value_BHTK))
        mixed_BHSK = attend(query_BHSK, key_BHTK, value_BHTK, mask, self.dropout if self.training else 0.0)
        return self.output(mixed_BHSK.transpose(1, 2).flatten(2))

    def _heads(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
