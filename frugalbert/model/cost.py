"""What an architecture costs: parameters and floating-point operations in closed form. An Arch in, numbers out.

No torch: plans and searches call this thousands of times. The tests hold it equal to the parameters of the real models
and to PyTorch's own operation counter. A multiply-add counts as two operations; only matrix products count, as usual.
"""

from __future__ import annotations

from collections import Counter

from .arch import Arch, LayerArch
from .backends import choose
from .patterns import density, occupancy

HEADS = ("encoder", "mlm", "pairs", "rtd", "sequence", "choice", "token", "span")
"""`encoder` is `FrugalModel` (with BERT's pooler); the others are the models of `modeling.py`, in its order."""
BLOCK = 64  # of occupancies that people are told


def _check_head(head: str) -> None:
    if head not in HEADS:
        raise ValueError(f"{head!r} is no head; write one of {', '.join(HEADS)}")


def _linear(arch: Arch, inputs: int, outputs: int) -> int:
    return inputs * outputs + (0 if arch.family == "modern" else outputs)


def _norm(arch: Arch, size: int) -> int:
    return size if arch.family == "modern" else 2 * size


# ---- parameters ----------------------------------------------------------------------------------------------------


def embedding_parameters(arch: Arch, vocab_size: int) -> int:
    """Tables of tokens, positions and token types, and their norm."""
    positions = 0 if arch.family == "modern" else arch.max_length
    tables = (vocab_size + positions + arch.token_types) * arch.hidden
    return tables + (_norm(arch, arch.hidden) if arch.embedding_norm else 0)


def layer_parameters(arch: Arch, layer: LayerArch) -> int:
    """One layer with both norms."""
    attention = 3 * _linear(arch, layer.hidden, layer.qkv) + _linear(arch, layer.qkv, layer.hidden)
    inputs = 2 if arch.family == "modern" else 1
    ffn = inputs * _linear(arch, layer.hidden, layer.ffn) + _linear(arch, layer.ffn, layer.hidden)
    return attention + ffn + 2 * _norm(arch, layer.hidden) + (2 * layer.head_dim if arch.qk_norm else 0)


def encoder_parameters(arch: Arch) -> int:
    """All layers and the final norm, without embeddings and heads."""
    total = sum(layer_parameters(arch, layer) for layer in arch.layers)
    if arch.family == "modern" and arch.embedding_norm:
        total -= _norm(arch, arch.layers[0].hidden)  # the first layer reads what the embedding norm wrote
    return total + (0 if arch.family == "bert" else _norm(arch, arch.hidden))


def head_parameters(arch: Arch, vocab_size: int, head: str, num_labels: int = 2) -> int:
    """What a head adds; the masked-LM head shares its matrix with the embeddings."""
    _check_head(head)
    square = _linear(arch, arch.hidden, arch.hidden)
    modern = arch.family == "modern"
    prediction = square + _norm(arch, arch.hidden)
    if head == "encoder":
        return 0 if modern else square
    if head in ("mlm", "pairs"):
        return prediction + vocab_size + (0 if head == "mlm" else (0 if modern else square) + 2 * (arch.hidden + 1))
    if head == "rtd":
        return square + arch.hidden + 1
    outputs = {"choice": 1, "span": 2}.get(head, num_labels)
    before = prediction if modern else square if head in ("sequence", "choice") else 0
    return before + (arch.hidden + 1) * outputs


def parameter_count(arch: Arch, vocab_size: int, head: str = "encoder", num_labels: int = 2) -> int:
    """All trainable numbers of a model, tied ones once."""
    rest = head_parameters(arch, vocab_size, head, num_labels)
    return embedding_parameters(arch, vocab_size) + encoder_parameters(arch) + rest


# ---- operations ----------------------------------------------------------------------------------------------------


def matmul_parameters(arch: Arch) -> int:
    """N_mm: entries of the layers' matrices, each used once per token."""
    inputs = 2 if arch.family == "modern" else 1
    return sum(layer.hidden * (4 * layer.qkv + (inputs + 1) * layer.ffn) for layer in arch.layers)


def forward_flops(
    arch: Arch, length: float, *, vocab_size: int = 0, masked: float = 0.0, head: str = "encoder", num_labels: int = 2
) -> float:
    """Operations per token of a forward pass.

    `length` is what a token attends to on average: the length of rows with one document, or sum(len^2) / sum(len) over
    packed documents; layers with an attention pattern count the pairs that it allows. `masked` is the share of tokens
    whose vocabulary scores are computed (`mlm`). Heads on the whole text are spread over its `length` tokens.
    """
    _check_head(head)
    attention = sum(4 * layer.qkv * _keys(layer, length) for layer in arch.layers)
    return 2.0 * matmul_parameters(arch) + attention + _head_flops(arch, length, vocab_size, masked, head, num_labels)


def _keys(layer: LayerArch, length: float) -> float:
    """How many keys a query of the layer sees on average."""
    if layer.pattern == "dense":
        return length
    return length * density(layer.pattern, max(1, round(length)))


def attention_share(arch: Arch, length: float) -> float:
    """Which share of a dense encoder's operations the attention products are: a in Amdahl's bound 1 / (1 - a)."""
    products = sum(4 * layer.qkv * length for layer in arch.layers)
    return products / (products + 2.0 * matmul_parameters(arch))


def attention_summary(arch: Arch, length: int, device: str, *, packed: bool, dropout: bool) -> str:
    """Density, block occupancy, Amdahl's bounds and back-end of a training on rows of `length` tokens, for people.

    Raises ValueError for rows that a pattern does not know.
    """
    texts = [layer.pattern for layer in arch.layers]
    kept = sum(density(text, length) for text in texts) / len(texts)
    blocks = sum(occupancy(text, length, BLOCK) for text in texts) / len(texts)
    share = attention_share(arch, length)
    ways = Counter(choose(text, length, device, training=True, packed=packed, dropout=dropout) for text in texts)
    runs = ", ".join(
        f"{backend} ({why})" + (f" in {count} layers" if len(ways) > 1 else "")
        for (backend, why), count in ways.items()
    )
    return (
        f"attention {kept:.1%} of pairs, {blocks:.0%} of {BLOCK} x {BLOCK} blocks; {amdahl(share, length)}, with these "
        f"blocks {1.0 / (1.0 - share + share * blocks):.2f}; on {device} it runs as {runs}"
    )


def amdahl(share: float, length: int) -> str:
    """The most that sparse attention can give, in a sentence."""
    return (
        f"attention is {share:.0%} of a dense encoder's work at {length} tokens, so leaving out all of it makes it at "
        f"most {1.0 / (1.0 - share):.2f} times as fast"
    )


def _head_flops(arch: Arch, length: float, vocab_size: int, masked: float, head: str, num_labels: int) -> float:
    hidden, modern = arch.hidden, arch.family == "modern"
    if head == "encoder":
        return 0.0 if modern else 2.0 * hidden * hidden / length
    if head in ("mlm", "pairs"):
        pair = 2.0 * hidden * (hidden + 2) / length if head == "pairs" else 0.0
        return 2.0 * masked * hidden * (vocab_size + hidden) + pair
    if head == "rtd":
        return 2.0 * hidden * (hidden + 1)
    outputs = {"choice": 1, "span": 2}.get(head, num_labels)
    whole = head in ("sequence", "choice")
    return 2.0 * hidden * ((hidden if modern or whole else 0) + outputs) / (length if whole else 1.0)


def training_flops(
    arch: Arch, vocab_size: int, length: float, masked: float, head: str = "mlm", *, whole: bool = False
) -> float:
    """Operations per token of a training step, forward and backward: 6 N_mm + 12 sum(qkv) length + 6 p (V d + d^2).

    Less those that `mlm` saves in the last layer, which makes states of masked tokens alone (keys and values of all),
    unless somebody needs the `whole` text's.
    """
    forward = forward_flops(arch, length, vocab_size=vocab_size, masked=masked, head=head)
    if head == "mlm" and not whole:
        layer, inputs = arch.layers[-1], 2 if arch.family == "modern" else 1
        matrices = layer.hidden * (2 * layer.qkv + (inputs + 1) * layer.ffn)
        forward -= (1.0 - masked) * (2.0 * matrices + 4 * layer.qkv * _keys(layer, length))
    return 3.0 * forward
