"""The YAML reader: what is plain gets through with the right type; everything else is refused with its place."""

import copy

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from frugalbert import config as config_module
from frugalbert.config import Bench, Config
from frugalbert.yamlfile import Document, load, override, parse, read_text, section_from, validate
from tests.faults.rows import often

MINIMAL = "name: a\ncorpus: {sources: [x.txt]}\ntokenizer: {}\nshards: {}\npretrain: {budget: 30m}\n"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E5", 100000.0),
        (".5", 0.5),
        ("3.", 3.0),
        ("-2", -2),
        ("no", "no"),
        ("off", "off"),
        ("yes", "yes"),
        ("True", "True"),
        ("true", True),
        ("12:30", "12:30"),
        ("0755", "0755"),
        ("1_000", "1_000"),
        ("0x1F", "0x1F"),
        ("2026-01-01", "2026-01-01"),
        ("", None),
        ("null", None),
        ("'3'", "3"),
        ('"true"', "true"),
    ],
)
def test_scalars_follow_yaml_1_2(text, value):
    found = parse(f"key: {text}\n", "f").value["key"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.fault("S4")
@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a: &x 1\nb: *x", "f:1:4: anchors"),
        ("a: 1\nb: *x", "f:2:4: anchors"),
        ("a: !!python/object/apply:os.system [ls]", "f:1:4: the tag"),
        ("a: !x 1", "f:1:4: the tag"),
        ("a: 1\na: 2", "f:2:1: a is written twice (first at f:1:1)"),
        ("a: 1\n---\nb: 2", "f:2:1: a second document"),
        ("a: .nan", "f:1:4: .nan is not a finite number"),
        ("a: 1e999", "f:1:4: 1e999 is not a finite number"),
        ("[" * 500, "nested deeper than 50"),
        ("a: 1\n\tb: 2", "f:2:1: this is not YAML"),
        ("? [a]\n: b", "a key must be a plain word"),
        ("<<: {a: 1}", "a key must be a plain word"),
        ("{", "this is not YAML"),
        ("", "the file is empty"),
        ("# only a comment", "the file is empty"),
        ("a: \0", "NUL"),
    ],
)
def test_refuses_what_is_not_plain(text, complaint):
    with pytest.raises(ValueError, match="f") as error:
        parse(text, "f")
    assert complaint in str(error.value)


@pytest.mark.fault("S4")
def test_alias_bomb_is_refused_at_once():
    bomb = "a: &a [x]\n" + "\n".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)},*{chr(97 + i)}]" for i in range(20)
    )
    with pytest.raises(ValueError, match="anchors"):
        parse(bomb, "f")


@pytest.mark.fault("S4")
@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"\xff\xfea\0", "UTF-16"),
        (b"a: \xe9", "not UTF-8 (byte 3)"),
        (b"#" * (1 << 20) + b"##", "larger than 1 MiB"),
    ],
)
def test_refuses_files_by_name(tmp_path, data, complaint):
    path = tmp_path / "run.yaml"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="run.yaml") as error:
        read_text(path)
    assert complaint in str(error.value)


def test_a_byte_order_mark_is_accepted(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + MINIMAL.encode())
    assert load(path).name == "a"


def test_all_mistakes_are_told_at_once_with_their_places():
    text = (
        "name: a b\ncorpus: {sources: [{pth: x}], held_out: no}\ntokenizer: {vocab_size: 0755}\nshards: {lenght: 1}\n"
        "pretrain: {arch: smal-modern, learning_rate: 0}\nmachine: {threads: two}\nlearning_rate: 3\n"
    )
    with pytest.raises(ValueError, match="name") as error:
        validate(parse(text, "f"), [], "f")
    lines = str(error.value).split("\n")
    assert any(line.startswith("f:4:10: shards.lenght: ") and "did you mean length?" in line for line in lines)
    assert any(line.startswith("f:2:21: corpus.sources.0.pth: ") and "did you mean path?" in line for line in lines)
    assert "f:3:13: tokenizer.vocab_size: '0755' is not accepted; write a whole number" in lines
    assert "f:6:11: machine.threads: 'two' is not accepted; write 'auto' or a whole number" in lines
    assert any("pretrain.budget: is missing; write budget: 30m" in line for line in lines)
    assert any("did you mean small-modern?" in line for line in lines)
    assert any(
        line.endswith("it belongs into supernet or attention or importance or pretrain or finetune") for line in lines
    )
    assert len(lines) == 11


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("pretrain.budget=5", "no budget; write a number and a unit"),
        ("pretrain.budget=5parsecs", "'parsecs' is no unit"),
        ("pretrain.phases=[{length: 512, share: 0.1}]", "add it there"),
        ("pretrain.replaced.weight=3", "belongs to objective: rtd"),
        ("pretrain.early_stop={after: 3epochs, loss: 6.0}", "the same unit"),
        ("pretrain.mask.rate=[0.3,1.0]", "write less than 1.0"),
        ("shards=null", "pretrain needs the section shards"),
        ("tokenizer={path: x, kind: bpe}", "remove one of the two"),
        ("bench={}", "add the section export"),
        ("pretrain.keep=3", "there is no such key"),
        ("corpus.sources=[]", "at least 1 values"),
    ],
)
def test_contradictions_are_refused_with_the_repair(setting, complaint):
    with pytest.raises(ValueError, match="pretrain|shards|tokenizer|bench|corpus") as error:
        validate(parse(MINIMAL, "f"), [setting], "f")
    assert complaint in str(error.value)


def test_overrides_reach_nested_keys_lists_and_whole_sections():
    document = parse(MINIMAL, "f")
    override(document, "pretrain.mask.rate=[0.3, 0.15]")
    override(document, "corpus.sources.0=y.txt")
    override(document, "report={}")
    override(document, "pretrain.learning_rate=1e-4")
    config = validate(document, [], "f")
    assert config.pretrain.mask.rate == (0.3, 0.15)
    assert config.corpus.sources == ("y.txt",)
    assert config.report is not None
    assert config.pretrain.learning_rate == 1e-4
    for bad in ("pretrain", "=3", "name.x=3", "corpus.sources.7=a"):
        with pytest.raises(ValueError, match="override"):
            override(parse(MINIMAL, "f"), bad)


def test_an_empty_section_means_its_defaults_and_null_removes_one():
    assert validate(parse(MINIMAL + "report:\n", "f"), [], "f").report is not None
    assert validate(parse(MINIMAL + "report:\n", "f"), ["report=null"], "f").report is None


def test_a_single_section_from_settings():
    assert section_from(Bench, ["lengths=[8]", "repeats=3"]).lengths == (8,)
    with pytest.raises(ValueError, match="did you mean lengths"):
        section_from(Bench, ["length=8"])


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**15), 10**15)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(min_size=1), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.fault("S5")
@settings(max_examples=often(150, 4000))
@given(PLAIN)
def test_whatever_is_dumped_is_read_back_or_refused_in_our_words(value):
    text = yaml.safe_dump({"key": value}, allow_unicode=True, sort_keys=False)
    try:
        found = parse(text, "f").value["key"]
    except ValueError as error:
        assert str(error).startswith("f")
        return
    assert yaml.safe_load(yaml.safe_dump(found)) == value or isinstance(value, float) or "_" in text or ":" in text


@pytest.mark.fault("S5")
@settings(max_examples=often(150, 4000))
@given(st.binary(max_size=300))
def test_any_bytes_give_a_config_or_our_error(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("yaml") / "run.yaml"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="run.yaml"):
        load(path)


SECTIONS = {name: getattr(config_module, name.capitalize()) for name in Config.model_fields if name != "name"}
FULL = parse(
    MINIMAL + "finetune: {tasks: [cola, {name: t, train: a.csv}]}\nexport: {}\nbench: {}\nreport: {}\n", "f"
).value
VALUES = st.sampled_from([None, True, -1, 0, 3, 1e9, 0.5, "x", "", "auto", [], ["a"], {}, {"a": 1}, "10steps", "mlm"])


@pytest.mark.fault("S5")
@settings(max_examples=often(250, 15_000))
@given(
    st.sampled_from(sorted(Config.model_fields)),
    st.text("abcdefghijklmnop_", min_size=1, max_size=12),
    VALUES,
    st.data(),
)
def test_mutated_files_are_valid_or_refused_with_a_place(section, key, value, data):
    mutated = copy.deepcopy(FULL)
    target = mutated.setdefault(section, {})
    if isinstance(target, dict):
        names = SECTIONS[section].model_fields if section in SECTIONS else ()
        target[data.draw(st.sampled_from([*names, key]))] = value
    else:
        mutated[section] = value
    try:
        config = validate(Document(mutated), [], "f")
    except ValueError as error:
        assert "Error" not in str(error)
        assert str(error).strip()
        return
    assert Config.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.fault("S5")
def test_a_list_that_lacks_what_is_missing():
    with pytest.raises(ValueError, match=r"f:\d+.*pretrain\.betas"):
        validate(parse("name: a\npretrain: {betas: []}\n", "f"), [], "f")
