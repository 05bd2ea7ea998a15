"""AutoTinyBERT's dictionaries and configurations: read without running anything, written back the same."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frugalbert.model.arch import PRESETS, Arch, LayerArch
from frugalbert.model.dictionaries import EXAMPLE
from frugalbert.search.candidates import read_archs

S1 = (
    "{'sample_layer_num': 5, 'sample_num_attention_heads': [8, 8, 8, 8, 8], 'sample_qkv_sizes': [512, 512, 512, 512, "
    "512], 'sample_hidden_size': 564, 'sample_intermediate_sizes': [1054, 1054, 1054, 1054, 1054]}"
)
layers = st.builds(LayerArch, st.just(24), st.integers(1, 9), st.integers(1, 9), st.integers(1, 99))
plain = st.lists(layers, min_size=1, max_size=5).map(lambda found: Arch.build("bert", 24, tuple(found), {}))


@settings(derandomize=True, max_examples=100)
@given(plain)
def test_dictionary_and_arch_are_inverses(arch: Arch):
    assert Arch.parse(arch.to_dictionary()) == arch
    assert Arch.parse(json.dumps(eval_free(arch.to_dictionary()))) == arch


def eval_free(text: str):
    return json.loads(text.replace("'", '"'))


@settings(derandomize=True, max_examples=300)
@given(st.text(alphabet="{}[]'\":, 0123456789sample_yrnuhid", max_size=60), st.integers(0, len(S1)), st.integers(0, 9))
def test_anything_else_is_a_value_error(noise: str, place: int, cut: int):
    for text in ("{" + noise, S1[:place] + noise + S1[place + cut :]):
        try:
            assert isinstance(Arch.parse(text), Arch)
        except ValueError as error:
            assert str(error)


def test_published_ones():
    assert Arch.parse(S1) == Arch.parse("autotinybert-s1")
    assert Arch.parse("autotinybert-s1").to_dictionary() == S1
    assert isinstance(Arch.parse(EXAMPLE), Arch)
    for name in PRESETS:
        if name.startswith("autotinybert"):
            assert Arch.parse(Arch.parse(name).to_dictionary()) == Arch.parse(name)


def test_released_configuration(tmp_path):
    sizes = {"num_hidden_layers": 3, "hidden_size": 320, "intermediate_size": 608, "num_attention_heads": 4}
    about = {"qkv_size": 256, "hidden_act": "gelu", "max_position_embeddings": 512, "vocab_size": 30522}
    (tmp_path / "config.json").write_text(json.dumps(sizes | about | {"type_vocab_size": 2}))
    assert Arch.load("config.json", tmp_path) == Arch.parse("autotinybert-s4")
    for change, sentence in [
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"qkv_size": 250}, "cannot be shared by 4 heads"),
        ({"num_hidden_layers": 10**9}, "9999 or less"),
        ({"intermediate_size": "x"}, "intermediate_size must be a whole number"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps(sizes | about | change))
        with pytest.raises(ValueError, match=sentence):
            Arch.load("config.json", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"qkv_size": 256}))
    with pytest.raises(ValueError, match="also needs num_hidden_layers"):
        Arch.load("config.json", tmp_path)


def test_files_of_lines(tmp_path):
    (tmp_path / "one.json").write_text(S1 + "\n")
    assert Arch.load("one.json", tmp_path) == Arch.parse("autotinybert-s1")
    (tmp_path / "lat.tmp").write_text(f"{S1}\t38.2\n\nbert-mini\n{EXAMPLE}\n")
    assert read_archs(tmp_path / "lat.tmp") == [Arch.parse(text) for text in ("autotinybert-s1", "bert-mini", EXAMPLE)]
    (tmp_path / "lat.tmp").write_text(f"{S1}\n{S1[:-1]}\n")
    with pytest.raises(ValueError, match="lat.tmp, line 2: .* is no dictionary"):
        read_archs(tmp_path / "lat.tmp")


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("'sample_layer_num': 5, ", "'sample_layer_num': 5, 'sample_layer_num': 5, ", "a key stands twice"),
        ("'sample_layer_num': 5", "'sample_layer_num': 4", "must list 4 numbers"),
        ("'sample_layer_num': 5", "'sample_layer_num': True", "is no dictionary"),
        ("'sample_layer_num': 5", "'sample_layer_num': 10000000000", "must list 10000000000 numbers"),
        ("564", "__import__('os')", "is no dictionary"),
        ("564", "0", "sample_hidden_size must be a whole number from 1 on, not 0"),
        ("[8, 8, 8, 8, 8]", "[8, 8, 8, 8, 7]", "512 query channels cannot be shared by 7 heads"),
        ("sample_qkv_sizes", "sample_qkv", "has the keys sample_layer_num"),
    ],
)
def test_mistakes(old, new, sentence):
    with pytest.raises(ValueError, match=sentence):
        Arch.parse(S1.replace(old, new))


def test_what_a_dictionary_cannot_say():
    for line in ("modern 2x8 heads=2 ffn=8", "bert 2x8 heads=2 ffn=8 token_types=0"):
        with pytest.raises(ValueError, match="no plain BERT"):
            Arch.parse(line).to_dictionary()
    for line in ("bert 2x8 hidden=8,4 heads=2 ffn=8", "bert 2x8 heads=2 ffn=8 pattern=window:4"):
        with pytest.raises(ValueError, match="dense layers over all channels only"):
            Arch.parse(line).to_dictionary()
    for text in ('{"a":' * 100_000, '{"sample_layer_num":' * 100_000):
        with pytest.raises(ValueError, match="nested too deeply"):
            Arch.parse(text)
