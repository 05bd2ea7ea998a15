"""Attention that skips gives the numbers of masking all pairs, at every length, padding and size of tiles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch._dynamo

from frugalbert.model import flex, patterns, sparse, tiles
from frugalbert.model.backends import choose
from frugalbert.model.configuration import FrugalConfig
from tests.model.archs import build, tokens

PATTERNS = (
    "window:20", "star", "longformer:5/0+64", "signed:-9..3", "toeplitz:3+17..30", "strided:4/40", 
    f"block:32/5/{patterns.pack(np.eye(5))}", "block-toeplitz:64/0+2",
    f"explicit:160/{patterns.pack(np.arange(25600).reshape(160, 160) % 97 == 0)}",
    "nodiag&row.3", "window:1|dense|star|toeplitz:64..", "signed:90..|random:0.01/3|window:9&column.77|bigbird",
)  # fmt: skip
CPU = torch.device("cpu")


def padding(batch: int, length: int) -> torch.Tensor:
    """Rows with padding on both sides, the last one without."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, : length // 20], mask[0, length // 3 :] = 0, 0
    return mask


def documents(batch: int, length: int) -> torch.Tensor:
    return (torch.arange(length) // 37 + 1).repeat(batch, 1).masked_fill(padding(batch, length) == 0, 0)


GIVEN = {
    "all": lambda *shape: (None, None),
    "padding": lambda *shape: (padding(*shape), None),
    "documents": lambda *shape: (None, documents(*shape)),
    "both": lambda *shape: (padding(*shape), documents(*shape)),
}


def reference(text: str, inputs: list[torch.Tensor], mask: torch.Tensor | None, ids: torch.Tensor | None):
    """Softmax over what the pattern and the batch allow, all pairs of every head, from the definitions."""
    query, key, value = inputs
    batch, heads, length, channels = query.shape
    found = patterns.parse(text)
    rules = [torch.from_numpy(patterns.dense(head, length).copy()) for head in found]
    allowed = torch.stack(rules * (heads // len(found)))[None].repeat(batch, 1, 1, 1)
    if mask is not None:
        allowed &= mask.bool()[:, None, None]
    if ids is not None:
        allowed &= (ids[:, :, None] == ids[:, None])[:, None]
    for place in range(length):
        allowed[:, :, place, place] |= ~allowed[:, :, place].any(-1)
    scores = (query @ key.transpose(2, 3) / channels**0.5).masked_fill(~allowed, float("-inf"))
    return torch.softmax(scores, -1) @ value


def inputs(*shape: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).requires_grad_() for _ in range(3)]


def check(attend: sparse.Gather, text: str, given: list[torch.Tensor], hidden: tuple) -> None:
    got, expected = attend(*given, 0.0), reference(text, given, *hidden)
    assert (got - expected).abs().max() <= 1e-5
    weight = torch.linspace(-1, 1, got.numel()).view_as(got)
    mine, theirs = (torch.autograd.grad((x * weight).sum(), given) for x in (got, expected))
    assert all((one - other).abs().max() <= 1e-4 for one, other in zip(mine, theirs, strict=True))
    with torch.inference_mode():  # works in pieces
        assert (attend(*given, 0.0) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("hidden", GIVEN)
@pytest.mark.parametrize("text", PATTERNS)
def test_gathering_is_masking(text: str, hidden: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sparse, "PIECE", 3 * 2 * 4 * 64 * 64)
    given = GIVEN[hidden](2, 150)
    check(sparse.gather(text, torch.zeros(2, 150, 1), *given), text, inputs(2, 4, 150, 8), given)


@pytest.mark.parametrize("shape", [(16, 16), (32, 8), (32, 32), (64, 16), (128, 64), (128, 128), (256, 16)])
def test_every_shape_of_tiles_at_every_length(shape: tuple[int, int]):
    for length in (1, shape[1], 129, 300):
        for text in ("window:9&0", "toeplitz:2+40..50|star|dense|signed:7.."):
            given = GIVEN["both"](2, length)
            made = sparse.gather(text, torch.zeros(2, length, 1), *given, shape=shape)
            check(made, text, inputs(2, 4, length, 4), given)


def test_the_reference_sees_a_wrong_mask():
    given = inputs(1, 4, 150, 8)
    with pytest.raises(AssertionError):
        check(sparse.gather("window:21", torch.zeros(1, 150, 1), None, None), "window:20", given, (None, None))


def test_dropout_keeps_the_mean_and_drops():
    made, given = sparse.gather("window:20", torch.zeros(1, 300, 1), None, None), inputs(1, 2, 300, 8)
    torch.manual_seed(0)
    mean = torch.stack([made(*given, 0.3) for _ in range(100)]).mean(0)
    assert (made(*given, 0.3) - made(*given, 0.0)).abs().mean() > 0.01
    assert (mean - made(*given, 0.0)).abs().mean() < 0.04


def test_tiles_hold_every_needed_block_once_and_little_else():
    for text in ("window:30", "star", "window:3^9|dense|longformer:2/500|block-toeplitz:64/0+4"):
        heads = patterns.parse(text)
        seen = np.zeros((len(heads), 16, 64), int)
        for group in tiles.groups(text, 1024, 64, 16):
            for tile, keys in zip(group.tiles, group.keys, strict=True):
                np.add.at(seen[tile // 16, tile % 16], keys[keys >= 0], 1)
        for head, found in zip(heads, seen, strict=True):
            needed = patterns.blocks(head, 1024, 16).reshape(16, 4, 64).any(1)
            assert (found >= needed).all()
            assert found.max() == 1
        assert tiles.work(text, 1024, 64, 16) < 1.15 * seen.sum() / seen.size + 0.02
    assert len(tiles.groups("star", 1024, 64, 16)) == 2  # the first token's tile stands alone
    assert tiles.work("window:30", 1024, 64, 16) == (64 + 2 * 32) / 1024


# ---- whole models ----------------------------------------------------------------------------------------------------

LINES = (
    "modern 3x32 heads=4 ffn=40 pattern=dense,window:8,window:3|star|toeplitz:0+3|dense",
    "bert 2x32 heads=4 ffn=64 pattern=window:5&0+64|signed:1..3|nodiag|random:0.02/1,block-toeplitz:32/0..1",
)


def both(line: str, call, *, head: str = "encoder") -> list:
    results = []
    for backend in ("sdpa", "gather"):
        results.append(call(build(line, head, attention_backend=backend)))
    return results


@pytest.mark.parametrize("line", LINES)
def test_a_model_that_skips_is_the_model_that_masks(line: str):
    ids = tokens(2, 400)
    place = (torch.arange(400) % 90).expand(2, -1)
    packed = {"position_ids": place, "document_ids": (torch.arange(400) // 90 + 1).expand(2, -1)}
    for inputs in ({}, {"attention_mask": padding(2, 400)}, {"attention_mask": torch.ones_like(ids)}, packed):
        masked, skipped = both(line, lambda model, inputs=inputs: model(ids, **inputs).last_hidden_state)
        assert (masked - skipped).abs().max() < 2e-5
    masked, skipped = both(line, lambda model: model(ids[:, :300]).last_hidden_state)
    assert (masked - skipped).abs().max() < 2e-5


def test_it_trains_alike_and_its_compiled_layers_too():
    ids = tokens(2, 200)

    def gradients(model: torch.nn.Module, compiled: bool = False) -> list[torch.Tensor]:
        model.train()
        if compiled:
            for layer in model.model.layers:
                layer.compile(backend="eager", fullgraph=True, dynamic=False)
        with torch._dynamo.config.patch(recompile_limit=64):  # as the training stage has it
            model(ids, attention_mask=padding(2, 200), labels=ids).loss.backward()
        return [parameter.grad for parameter in model.parameters()]

    masked, skipped = both(LINES[0], gradients, head="mlm")
    (_, compiled) = both(LINES[0], lambda model: gradients(model, compiled=True), head="mlm")
    for one, other, third in zip(masked, skipped, compiled, strict=True):
        assert (one - other).abs().max() < 1e-4
        assert (third - other).abs().max() < 1e-5


def test_what_inference_has_cached_may_be_trained_with():
    model, ids = build("modern 2x32 heads=4 ffn=40 pattern=star", "mlm", attention_backend="gather"), tokens(1, 333)
    with torch.inference_mode():
        model(ids)
    model(ids, labels=ids).loss.backward()


def test_bf16_training_is_near_fp32():
    ids = tokens(1, 400)

    def loss(model: torch.nn.Module, enabled: bool) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found = model(ids, labels=ids).loss
        found.backward()
        return found

    model = build(LINES[0], "mlm", attention_backend="gather")
    assert abs(loss(model, False) - loss(model, True)) < 0.1
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_too_long_and_wrong_settings_are_one_sentence():
    text = f"block:32/4/{patterns.pack(np.eye(4))}"
    for backend in ("auto", "gather", "sdpa"):
        model = build(f"bert 1x8 heads=2 ffn=8 pattern={text}", attention_backend=backend)
        with pytest.raises(ValueError, match="is defined for up to 128 tokens, the input has 129; cut it"):
            model(tokens(1, 129))
    with pytest.raises(ValueError, match="attention_backend must be one of auto, sdpa, gather, flex, not 'fast'"):
        FrugalConfig(attention_backend="fast")
    with pytest.raises(ValueError, match="names sep, but the model's configuration has no sep_token_id"):
        build("bert 1x8 heads=2 ffn=8 pattern=window:1&sep")(tokens(1, 9))


# ---- the choice ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "length", "given", "backend", "reason"),
    [
        ("window:32", 2048, {}, "gather", "6% of the pairs are left"),
        ("window:32", 128, {}, "sdpa", "skipping pays from 512 tokens on"),
        ("dense", 2048, {}, "sdpa", "every pair is needed"),
        ("random:0.1/1", 2048, {}, "sdpa", "of the pairs would be left, which saves nothing"),
        ("window:32&sep", 2048, {}, "sdpa", "[SEP] stands elsewhere in every text"),
        ("star", 2048, {"packed": True}, "sdpa", "its positions begin anew with every document of a row"),
        ("window:32|block-toeplitz:64/0", 2048, {"packed": True}, "gather", "of the pairs are left"),
        ("window:32", 2048, {"wanted": "sdpa"}, "sdpa", "attention_backend says so"),
        ("window:32", 128, {"wanted": "flex"}, "flex", "attention_backend says so"),
        ("fixed:64/8", 2048, {"training": True}, "gather", "30% of the pairs are left"),
        ("fixed:64/8", 2048, {}, "sdpa", "30% of the pairs would be left"),
        ("toeplitz:3", 512, {"wanted": "flex"}, "gather", "flex"),
        ("window:32", 512, {"wanted": "flex", "training": True}, "gather", "flex"),
        ("window:32", 2048, {"device_type": "cuda", "training": True}, "flex", "of the pairs are left"),
        ("window:32", 2048, {"device_type": "cuda", "dropout": True}, "gather", "of the pairs are left"),
        ("toeplitz:3", 2048, {"device_type": "cuda"}, "gather", "of the pairs are left"),
    ],
)  # fmt: skip
def test_what_is_chosen_and_why(text: str, length: int, given: dict, backend: str, reason: str):
    settings = {"device_type": "cpu", "training": False, "packed": False, **given}
    found = choose(text, length, **settings)
    assert found[0] == backend
    assert reason in found[1]


def test_which_patterns_see_the_diagonal():
    for text in PATTERNS:
        for head in patterns.parse(text):
            if head.kind != "random":
                everywhere = patterns.dense(head, head.reach or 160).diagonal().all()
                assert head.sees_itself == everywhere, head


# ---- FlexAttention ---------------------------------------------------------------------------------------------------


def flex_differs(text: str, length: int, hidden: str) -> float:
    with torch.inference_mode():
        given = GIVEN[hidden](2, length)
        attend = flex.flex(text, torch.zeros(2, length, 1), *given)
        values = [x.detach() for x in inputs(2, 4, length, 16)]
        return (attend(*values, 0.0) - reference(text, values, *given)).abs().max().item()


def test_flex_is_masking_and_a_new_batch_is_no_new_kernel():
    from torch._dynamo.utils import counters

    assert flex_differs("signed:-9..3", 150, "both") <= 1e-5
    kernels = counters["stats"]["unique_graphs"]
    assert flex_differs("window:20", 160, "both") <= 1e-5
    assert counters["stats"]["unique_graphs"] == kernels


@pytest.mark.slow
@pytest.mark.parametrize("hidden", GIVEN)
def test_flex_is_masking_for_every_pattern(hidden: str):
    for text in PATTERNS:
        if all(head.sees_itself for head in patterns.parse(text)):
            for length in (130, 150):
                assert flex_differs(text, length, hidden) <= 1e-5


@pytest.mark.slow
def test_a_model_with_flex_is_the_model_that_masks():
    line = "modern 2x64 heads=4 ffn=40 pattern=window:8,window:3|star|toeplitz:0+3|dense"
    with torch.inference_mode():
        masked, found = (
            build(line, attention_backend=backend)(tokens(2, 200), padding(2, 200)).last_hidden_state
            for backend in ("sdpa", "flex")
        )
    assert (masked - found).abs().max() < 2e-5


def test_without_a_compiler_blocks_are_gathered_and_it_says_so_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    flex.can_compile.cache_clear()
    model = build("modern 2x64 heads=4 ffn=40 pattern=window:8,star", attention_backend="flex")
    with pytest.warns(UserWarning, match="needs the compiler no-such-compiler") as caught, torch.inference_mode():
        found = model(tokens(1, 200)).last_hidden_state
    assert len(caught) == 1
    model.config.attention_backend = "sdpa"
    with torch.inference_mode():
        assert (found - model(tokens(1, 200)).last_hidden_state).abs().max() < 2e-5
    flex.can_compile.cache_clear()
