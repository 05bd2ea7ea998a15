"""Attention patterns: published counts, the text form, every length, blocks, and numpy = torch."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frugalbert.model import patterns
from frugalbert.model.arch import Arch

KINDS = (
    "dense", "nodiag", "logsparse", "window:3", "strided:2/5", "fixed:4/1/6", "bigbird:1/2/7/20&0", "random:0.2/5",
    "toeplitz:0+3..5+20..", "signed:-4..-2+0+9", "block-toeplitz:8/0+2", "star", "longformer:2/0+9",
    "window:1&row.3+column.5", f"block:8/5/{patterns.pack(np.eye(5))}",
    f"explicit:40/{patterns.pack(np.arange(1600).reshape(40, 40) % 7 == 0)}",
)  # fmt: skip


def one(text: str) -> patterns.Pattern:
    (pattern,) = patterns.parse(text)
    return pattern


@pytest.mark.parametrize(
    ("text", "kept"),
    [("strided:4", 4852), ("fixed:4/1", 4480), ("logsparse", 1666), ("star", 634), ("longformer:5/0+64", 1854),
     ("nodiag", 128 * 127), ("dense", 128 * 128), ("window:0", 128)],
)  # fmt: skip
def test_the_published_patterns_have_the_published_density(text: str, kept: int):
    """SparseBERT's table 1 (arXiv 2102.12871): 70.4, 72.7, 89.8, 96.1, 88.7 % at 128 tokens."""
    assert patterns.pairs(one(text), 128) == kept


def test_bigbird_and_bands_and_random_pairs():
    drawn = [1 - patterns.density(f"bigbird:1/2/{seed}/128&0", 128) for seed in range(20)]
    assert np.mean(drawn) == pytest.approx(0.9315, abs=5e-4)
    assert len(set(drawn)) > 5
    bands = [round(100 * patterns.density(f"window:{w}", 128), 2) for w in range(1, 6)]
    assert bands == [2.33, 3.87, 5.4, 6.91, 8.41]
    assert patterns.density("random:0.21/3", 512) == pytest.approx(0.21, abs=0.005)
    assert patterns.density("random:0.21/3|random:0.21/4", 64) != patterns.density("random:0.21/3", 64)


@pytest.mark.parametrize("text", KINDS)
def test_numpy_torch_counts_blocks_and_corners_agree(text: str):
    pattern = one(text)
    mask = patterns.dense(pattern, 40)
    place = torch.arange(40)
    found = torch.broadcast_to(pattern.allowed(place[:, None], place[None]), (40, 40))
    assert (found.numpy() == mask).all()
    assert patterns.pairs(pattern, 40) == mask.sum()
    assert (patterns.dense(pattern, 23) == mask[:23, :23]).all()
    for block in (8, 16):
        touched = patterns.blocks(pattern, 37, block)
        padded = np.zeros((48, 48), bool)
        padded[:37, :37] = mask[:37, :37]
        size = len(touched) * block
        tiles = padded[:size, :size].reshape(len(touched), block, len(touched), block)
        assert (touched == tiles.any((1, 3))).all()
    if not text.startswith(("fixed", "block:", "signed", "window:1&", "explicit")):
        assert (mask == mask.T).all()


@pytest.mark.parametrize("text", KINDS)
def test_text_and_pattern_are_inverses(text: str):
    heads = patterns.parse(f"{text}|dense^2|{text}")
    assert len(heads) == 4 or text == "dense"
    assert patterns.parse(patterns.join(heads)) == heads
    arch = Arch.parse(f"bert 2x32 heads=4 ffn=8 pattern=dense,{text}|dense^2|{text}")
    assert Arch.parse(arch.to_text()) == arch
    assert Arch.from_json(arch.to_json()) == arch


def test_one_text_for_equal_patterns():
    assert patterns.join(patterns.parse("toeplitz:1+0+2+5..9+7..12")) == "toeplitz:0..2+5..12"
    assert patterns.join(patterns.parse("star|star")) == "window:1&0"
    assert Arch.parse("bert 1x8 heads=2 ffn=8 pattern=window:2|window:2").layers[0].window == 2
    assert Arch.parse("bert 1x8 heads=2 ffn=8 pattern=star").layers[0].window is None
    assert one("signed:-1..1&sep").by_content
    assert str(one("signed:-1..1&sep")) == "signed:-1..1&sep"


@settings(derandomize=True, max_examples=200)
@given(st.text("towinesgblrxca:|^&/.+-0123456789", max_size=30))
def test_any_text_is_a_pattern_or_a_sentence(text: str):
    try:
        heads = patterns.parse(text)
    except ValueError as error:
        assert re.search("write|bits", str(error))
    else:
        assert patterns.parse(patterns.join(heads)) == heads


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("windo:3", "write dense, window:64"),
        ("strided:1/2/3", "strided has 2 parts, not 3; write strided:W/S"),
        ("toeplitz:5..3", "'5..3' is no run of distances; write 0..3 or 17"),
        ("toeplitz:-3", "is no run of distances"),
        ("explicit:128/abc", "are not the bits of a 128 x 128 mask"),
        (f"block:64/3/{patterns.pack(np.eye(2))}", "are not the bits of a 3 x 3 mask"),
        ("dense^x", "does not say how many heads"),
        ("window:3&first", "write a position, sep, row.0 or column.0"),
        ("random:2/1", "write random:P/SEED"),
    ],
)
def test_a_wrong_text_is_answered_with_the_cure(text: str, sentence: str):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        patterns.parse(text)


def test_a_pattern_of_another_number_of_heads_is_refused():
    with pytest.raises(ValueError, match="3 attention patterns for 2 heads; write one for each head, or one"):
        Arch.parse("bert 1x8 heads=2 ffn=8 pattern=dense|window:1^2")


def test_a_pattern_that_ends_before_the_input_is_refused():
    with pytest.raises(ValueError, match="is defined for up to 40 tokens, the input has 41"):
        patterns.density(KINDS[-1], 41)
