"""Which way a layer's attention is computed: its pattern, the length and the device in, a name and the reason out.

    sdpa     all pairs, by PyTorch's fused function, forbidden ones masked
    gather   only the key blocks that a tile of queries needs (`sparse.py`): any device, training and inference
    flex     FlexAttention (arXiv 2412.05496): compiled for the pattern; on a CPU inference alone

No torch: `plan` prints the choice before anything is loaded.
"""

from __future__ import annotations

from .patterns import check_length, occupancy, parse
from .tiles import best, work

BACKENDS = ("auto", "sdpa", "gather", "flex")
"""What `attention_backend` of a model's configuration may say."""
LEAST_LENGTH = {"cpu": 512, "cuda": 1024}
MOST_WORK = {"cpu": 0.4, "cpu inference": 0.25, "cuda": 0.5}
"""Share of the pairs that may be left. Two AVX-512 cores, 12 heads of 64, 1,024 tokens: with 0.3 of the pairs gathering
is 1.5 times as fast as SDPA in fp32 and 0.8 times in bf16, training 1.9 and 2 times; a GPU was not at hand."""
FLEX_BLOCK = 128


def choose(
    pattern: str, length: int, device_type: str, *, training: bool, packed: bool, dropout: bool = False,
    wanted: str = "auto",
) -> tuple[str, str]:  # fmt: skip
    """(backend, one short sentence that says why) for rows of `length` tokens on "cpu" or "cuda".

    `packed`: documents share rows and count their own positions. `dropout`: attention weights are dropped. `wanted` is
    the configuration's attention_backend; what it names is taken wherever it can work. Raises ValueError for lengths
    that the pattern does not know.
    """
    check_length(pattern, length)
    heads = parse(pattern)
    if pattern == "dense":
        return "sdpa", "every pair is needed"
    if wanted == "sdpa":
        return "sdpa", "attention_backend says so"
    if any(head.by_content for head in heads):
        return "sdpa", "[SEP] stands elsewhere in every text"
    if packed and not all(head.by_distance or head.by_row for head in heads):
        return "sdpa", "its positions begin anew with every document of a row"
    flexible = not dropout and all(head.sees_itself for head in heads)
    if wanted != "auto":
        able = wanted == "gather" or (flexible and not (training and device_type == "cpu"))
        return (wanted, "attention_backend says so") if able else ("gather", "flex cannot do this")
    kind = device_type if device_type in LEAST_LENGTH else "cuda"
    if length < LEAST_LENGTH[kind]:
        return "sdpa", f"skipping pays from {LEAST_LENGTH[kind]} tokens on"
    if flexible and kind == "cuda":
        share, backend = occupancy(pattern, length, FLEX_BLOCK), "flex"
    else:
        share, backend = work(pattern, length, *best(pattern, length)), "gather"
    if share > MOST_WORK[kind if training or kind == "cuda" else "cpu inference"]:
        return "sdpa", f"{share:.0%} of the pairs would be left, which saves nothing"
    return backend, f"{share:.0%} of the pairs are left"
