"""Arch: its two written forms are inverses, and every mistake is met with a sentence."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from frugalbert.model.arch import FAMILIES, PRESETS, Arch, LayerArch
from tests.model.archs import archs

EVEN = settings(derandomize=True, deadline=None, max_examples=60)


@EVEN
@given(archs())
def test_text_and_json_are_inverses(arch: Arch):
    assert Arch.parse(arch.to_text()) == arch
    assert Arch.from_json(json.loads(json.dumps(arch.to_json()))) == arch
    assert Arch.parse(arch.to_text()).to_text() == arch.to_text()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_canonical_lines(name: str):
    assert Arch.parse(name).to_text() == PRESETS[name]
    assert Arch.parse(name.upper()) == Arch.parse(name)


def test_the_line_means_what_it_says():
    arch = Arch.parse("modern 3x256 hidden=256*2,128 heads=4 head_dim=32 ffn=640*2,320 pattern=dense,window:64*2")
    assert arch.layers == (
        LayerArch(256, 4, 32, 640),
        LayerArch(256, 4, 32, 640, "window:64"),
        LayerArch(128, 4, 32, 320, "window:64"),
    )
    assert (arch.layers[0].qkv, arch.layers[0].window, arch.layers[1].window) == (128, None, 64)
    assert (arch.family, arch.hidden, arch.max_length, arch.token_types) == ("modern", 256, 512, 0)
    assert arch.embedding_norm
    assert arch.norm_epsilon == 1e-5


def test_the_head_size_follows_from_each_layers_own_sizes():
    arch = Arch.parse("bert 2x12 hidden=12,6 heads=4,2 ffn=8")
    assert [layer.head_dim for layer in arch.layers] == [3, 3]
    assert "head_dim" not in arch.to_text()


def test_uniform_is_the_same_as_the_line():
    assert Arch.uniform("bert", 4, 256, heads=4, ffn=1024) == Arch.parse("bert-mini")
    assert Arch.uniform("bert", 5, 564, 8, 1054, head_dim=64) == Arch.parse("autotinybert-s1")


def test_json_takes_the_familys_defaults():
    layer = {"hidden": 8, "heads": 2, "head_dim": 4, "ffn": 16}
    for family in FAMILIES:
        given = Arch.from_json({"family": family, "hidden": 8, "layers": [layer]})
        assert given == Arch.parse(f"{family} 1x8 heads=2 ffn=16")


def test_paths_are_left_to_the_stage(tmp_path):
    assert Arch.parse_or_path("found/arch.json") is None
    assert Arch.parse_or_path("bert-mini") == Arch.parse("bert-mini")
    (tmp_path / "arch.json").write_text(json.dumps(Arch.parse("bort").to_json()))
    assert Arch.load("arch.json", tmp_path) == Arch.parse("bort")
    assert Arch.load("bert-mini", tmp_path) == Arch.parse("bert-mini")
    with pytest.raises(FileNotFoundError):
        Arch.load("none.json", tmp_path)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "write a preset's name or a line such as `modern 4x256 heads=4 ffn=640`"),
        ("bert-minni", "did you mean bert-mini"),
        ("zzz", "write one of tiny-modern"),
        ("modrn 4x256 heads=4 ffn=640", "did you mean modern"),
        ("modern 4*256 heads=4 ffn=640", "write for example 4x256"),
        ("modern 0x256 heads=4 ffn=640", "write for example 4x256"),
        ("modern 4x256 ffn=640", "needs heads"),
        ("modern 4x256 heads=4", "needs ffn"),
        ("modern 4x256 heads=4 fnn=640", "did you mean ffn"),
        ("modern 4x256 heads=4 ffn", "write key=value"),
        ("modern 4x256 heads=4 ffn=", "write key=value"),
        ("modern 4x256 heads=4 ffn=640 ffn=64", "ffn is written twice"),
        ("modern 4x256 heads=3 ffn=640", "write head_dim as well"),
        ("modern 4x256 heads=0 ffn=640", "write head_dim as well"),
        ("modern 4x256 heads=4 ffn=0", "ffn must be a whole number between 1 and"),
        ("modern 4x256 heads=four ffn=640", "'four' is no whole number"),
        ("modern 4x256 heads=4*2,8 ffn=640", "names 3 layers, the encoder has 4"),
        ("modern 4x256 heads=4 ffn=640*9999999,640*9999999", "the encoder has 4"),
        ("modern 4x256 heads=4 ffn=640 hidden=512", "layer 0 uses 512 channels of a stream of 256"),
        ("modern 4x256 heads=4 head_dim=3 ffn=640", "write an even head_dim"),
        ("modern 4x256 heads=4 ffn=640 pattern=sparse", "write dense, window:64"),
        ("modern 4x256 heads=4 ffn=640 pattern=window:x", "write window:W"),
        ("modern 4x256 heads=4 ffn=640 qk_norm=1", "neither yes nor no"),
        ("modern 4x256 heads=4 ffn=640 activation=glu", "did you mean gelu"),
        ("modern 4x256 heads=4 ffn=640 rope_theta=big", "'big' is no number"),
        ("modern 4x256 heads=4 ffn=640 rope_theta=nan", "rope_theta must be a positive number"),
        ("modern 4x256 heads=4 ffn=640 max_length=-1", "'-1' is no whole number"),
        ("bert 4x256 heads=4 ffn=640 qk_norm=yes", "qk_norm belongs to family modern"),
    ],
)
def test_mistakes_in_a_line(text: str, sentence: str):
    with pytest.raises(ValueError, match=r".") as error:
        Arch.parse(text)
    assert sentence in str(error.value)


LAYER = {"hidden": 8, "heads": 2, "head_dim": 4, "ffn": 16}
GOOD = {"family": "bert", "hidden": 8, "layers": [LAYER]}


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ([], "is a mapping of settings"),
        ({**GOOD, "layers": 3}, "layers must be a list"),
        ({**GOOD, "layers": [3]}, "a layer is a mapping"),
        ({**GOOD, "layers": []}, "1 to 9999 layers"),
        ({**GOOD, "layers": [{**LAYER, "ffn": "16"}]}, "ffn must be a whole number"),
        ({**GOOD, "layers": [{**LAYER, "ffn": True}]}, "ffn must be a whole number"),
        ({**GOOD, "layers": [{**LAYER, "fnn": 1}]}, "did you mean ffn"),
        ({**GOOD, "layers": [{"hidden": 8, "heads": 2, "head_dim": 4}]}, "a layer needs ffn"),
        ({**GOOD, "hidden": 8.0}, "hidden must be a whole number"),
        ({**GOOD, "family": "brt"}, "did you mean bert"),
        ({**GOOD, "qk_norm": 1}, "qk_norm must be true or false"),
        ({**GOOD, "norm_epsilon": "1"}, "norm_epsilon must be a number"),
        ({**GOOD, "activation": None}, "activation must be a text"),
        ({"family": "bert", "hidden": 8}, "needs layers"),
    ],
)
def test_mistakes_in_json(value: object, sentence: str, tmp_path):
    with pytest.raises(ValueError, match=r".") as error:
        Arch.from_json(value)
    assert sentence in str(error.value)
    (tmp_path / "a.json").write_text(json.dumps(value))
    with pytest.raises(ValueError, match=r"a\.json is no architecture file"):
        Arch.load("a.json", tmp_path)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[" * 100_000])
def test_damaged_files(content: bytes, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json is no architecture file"):
        Arch.load("a.json", tmp_path)


WORDS = st.sampled_from(
    [
        "bert",
        "modern",
        "4x8",
        "x",
        "4x",
        "heads=4",
        "heads=",
        "ffn=8",
        "ffn=8,8",
        "ffn=*",
        "=",
        "hidden=9",
        "head_dim=2",
    ]
    + [
        "pattern=window:3",
        "qk_norm=yes",
        "norm_epsilon=1e999",
        "rope_theta=inf",
        "4x9999999",
        "ffn=8*0",
        "token_types=0",
    ]
)


@EVEN
@given(st.one_of(st.text(), st.lists(WORDS).map(" ".join)))
@example("bert 2x8 heads=4 ffn=8*0")
def test_any_text_is_an_architecture_or_a_sentence(text: str):
    try:
        arch = Arch.parse(text)
    except ValueError as error:
        assert str(error)  # noqa: PT017
    else:
        assert Arch.parse(arch.to_text()) == arch


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*GOOD, *LAYER, "x"]), inner, max_size=5)
    ),
)


@EVEN
@given(JSON, st.dictionaries(st.sampled_from([*Arch.parse("bort").to_json()]), JSON))
def test_any_json_is_an_architecture_or_a_sentence(value: object, changes: dict[str, object]):
    for case in (value, {**GOOD, **changes}):
        try:
            Arch.from_json(case)
        except ValueError as error:
            assert str(error)  # noqa: PT017
