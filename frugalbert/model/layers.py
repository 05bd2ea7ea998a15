"""The parts of the encoder: embeddings, feed-forward, one layer, and the head before a classifier.

Comes in: token ids, or hidden states with their mask and rotary tables. Goes out: hidden states. The three families of
`Arch` differ in a few lines here: norm before or after, learned or rotary positions, biases, the gate.

Shapes: B batch, T tokens, S of them that are chosen in each row, D channels of the residual stream.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from .arch import Arch, LayerArch
from .attention import Attention, Mask, Output, chosen
from .configuration import FrugalConfig

ACTIVATIONS = {
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
    "silu": functional.silu,
}


def norm_of(arch: Arch, size: int) -> nn.LayerNorm:
    return nn.LayerNorm(size, eps=arch.norm_epsilon, bias=arch.family != "modern")


def normed(norm: nn.Module, x: Tensor) -> Tensor:
    """In the dtype of x: CUDA's autocast makes norms, and the whole stream after them, fp32; a CPU's does not."""
    return norm(x).to(x.dtype)


def linear_of(arch: Arch, inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=arch.family != "modern")


class Embeddings(nn.Module):
    """Token, position and segment vectors, added."""

    def __init__(self, config: FrugalConfig, arch: Arch) -> None:
        super().__init__()
        learned = arch.family != "modern"
        self.word = nn.Embedding(config.vocab_size, arch.hidden)
        self.position = nn.Embedding(arch.max_length, arch.hidden) if learned else None
        self.token_type = nn.Embedding(arch.token_types, arch.hidden) if arch.token_types else None
        self.norm = norm_of(arch, arch.hidden) if arch.embedding_norm else None
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids_BT: Tensor, token_type_ids_BT: Tensor | None, position_ids_BT: Tensor | None) -> Tensor:
        x_BTD = self.word(input_ids_BT)
        if self.token_type is not None:
            x_BTD = x_BTD + (
                self.token_type.weight[0] if token_type_ids_BT is None else self.token_type(token_type_ids_BT)
            )
        if self.position is not None:
            length = input_ids_BT.shape[1]
            if length > self.position.num_embeddings:
                raise ValueError(
                    f"the input has {length} tokens but this encoder knows {self.position.num_embeddings} positions; "
                    "cut it (truncation=True), or train with a larger max_length"
                )
            x_BTD = x_BTD + (
                self.position.weight[:length] if position_ids_BT is None else self.position(position_ids_BT)
            )
        if self.norm is not None:
            x_BTD = self.norm(x_BTD)
        return self.dropout(x_BTD)


class FeedForward(nn.Module):
    """act(x W1) W2, or with a gate (act(x W1) * x Wg) W2 (Shazeer, arXiv 2002.05202)."""

    def __init__(self, arch: Arch, layer: LayerArch) -> None:
        super().__init__()
        self.input = linear_of(arch, layer.hidden, layer.ffn)
        self.gate = linear_of(arch, layer.hidden, layer.ffn) if arch.family == "modern" else None
        self.output = Output(layer.ffn, layer.hidden, bias=arch.family != "modern")
        self.activation = ACTIVATIONS[arch.activation]

    def forward(self, x_BTD: Tensor) -> Tensor:
        inner = self.activation(self.input(x_BTD))
        return self.output(inner if self.gate is None else inner * self.gate(x_BTD))


class FrugalLayer(nn.Module):
    """Attention and feed-forward around the leading `hidden` channels of the residual stream; the rest pass by."""

    def __init__(self, config: FrugalConfig, arch: Arch, index: int) -> None:
        super().__init__()
        layer = arch.layers[index]
        self.hidden = layer.hidden
        self.passing = arch.hidden - layer.hidden
        self.post_norm = arch.family == "bert"
        self.pattern = layer.pattern
        theta = arch.rope_theta if layer.window is None else arch.local_rope_theta
        self.rotary = (layer.head_dim, theta) if arch.family == "modern" else None
        # A norm straight after the embedding norm would be the same norm twice (ModernBERT leaves it out too).
        bare = arch.family == "modern" and arch.embedding_norm and index == 0
        self.attention = Attention(
            layer, arch.family != "modern", arch.qk_norm, arch.norm_epsilon, config.attention_probs_dropout_prob
        )
        self.attention_norm = nn.Identity() if bare else norm_of(arch, layer.hidden)
        self.ffn = FeedForward(arch, layer)
        self.ffn_norm = norm_of(arch, layer.hidden)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self, x_BTD: Tensor, mask: Mask, rotary: tuple[Tensor, Tensor] | None, places_BS: Tensor | None = None
    ) -> Tensor:
        """(B, T, D); with `places`, indices into (B*T), the states of these tokens alone, (B, S, D)."""
        if places_BS is not None and callable(mask):  # which skips pairs of all tokens
            return chosen(self.forward(x_BTD, mask, rotary), places_BS)
        if self.passing:
            used, rest = x_BTD.split((self.hidden, self.passing), -1)
            rest = rest if places_BS is None else chosen(rest, places_BS)
            return torch.cat((self._transform(used, mask, rotary, places_BS), rest), -1)
        return self._transform(x_BTD, mask, rotary, places_BS)

    def _transform(
        self, x_BTD: Tensor, mask: Mask, rotary: tuple[Tensor, Tensor] | None, places_BS: Tensor | None
    ) -> Tensor:
        kept_BSD = x_BTD if places_BS is None else chosen(x_BTD, places_BS)
        if self.post_norm:
            x_BSD = kept_BSD + self.dropout(self.attention(x_BTD, mask, rotary, places_BS))
            x_BSD = normed(self.attention_norm, x_BSD)
            return normed(self.ffn_norm, x_BSD + self.dropout(self.ffn(x_BSD)))
        x_BSD = kept_BSD + self.dropout(self.attention(normed(self.attention_norm, x_BTD), mask, rotary, places_BS))
        return x_BSD + self.dropout(self.ffn(normed(self.ffn_norm, x_BSD)))


class PredictionHead(nn.Module):
    """Dense, activation, norm: before the vocabulary in all families, before every classifier in `modern`."""

    def __init__(self, arch: Arch) -> None:
        super().__init__()
        self.dense = linear_of(arch, arch.hidden, arch.hidden)
        self.norm = norm_of(arch, arch.hidden)
        self.activation = ACTIVATIONS[arch.activation]

    def forward(self, x: Tensor) -> Tensor:
        return normed(self.norm, self.activation(self.dense(x)))
