"""The tokenizer stage: trained ones repeat to the byte, loaded ones are the loaded ones, mistakes are one sentence."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frugalbert.config import Corpus, Machine, Tokenizer
from frugalbert.data import corpus, tokenizer
from frugalbert.data.tokenizer import SPECIAL

KINDS = ["wordpiece", "bpe", "unigram"]
SYLLABLES = [a + b for a in "bcdfglmnprstv" for b in ("a", "e", "i", "o", "u", "an", "er", "is", "é")]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A corpus of 400 documents of invented words with Zipf's frequencies, some Chinese, and special tokens as text."""
    folder = tmp_path_factory.mktemp("text")
    generator = random.Random(0)
    words = ["".join(generator.choices(SYLLABLES, k=generator.randrange(1, 5))) for _ in range(6000)]
    weights = [1 / (rank + 1) for rank in range(len(words))]

    def line() -> str:
        sentence = " ".join(generator.choices(words, weights, k=80))
        return f"{sentence.capitalize()}, [CLS] 北京 “{generator.randrange(1000)}”!"

    (folder / "a.txt").write_text("\n".join(line() for _ in range(400)), encoding="utf-8")
    out = folder / "corpus"
    out.mkdir()
    section = Corpus(sources=[{"path": "a.txt", "format": "lines"}], held_out=0.1)
    corpus.build(section, {"yaml": folder}, out, Machine(workers=1))
    return out


def train(text: Path, out: Path, workers: int = 1, **settings):
    out.mkdir(parents=True, exist_ok=True)
    section = Tokenizer(**{"vocab_size": 1000, **settings})
    return tokenizer.build(section, {"corpus": text, "yaml": out}, out, Machine(workers=workers))


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("trained")
    for kind in KINDS:
        train(text, folder / kind, kind=kind, workers=1)
    return {kind: folder / kind for kind in KINDS}


@pytest.fixture(scope="module")
def loaded(trained) -> dict:
    return {kind: tokenizer.load(folder) for kind, folder in trained.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_text_gives_the_same_bytes(text, trained, tmp_path, kind):
    train(text, tmp_path / "again", kind=kind, workers=2)
    assert tree(tmp_path / "again") == tree(trained[kind])


def tree(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("kind", KINDS)
def test_what_it_is(trained, kind):
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(trained[kind])
    assert len(found) == 1024  # 1000 rounded up to a multiple of 64
    assert sorted(found.get_vocab().values()) == list(range(1024))
    assert [found.convert_tokens_to_ids(token) for token in SPECIAL.values()] == [0, 1, 2, 3, 4]
    for position, role in enumerate(SPECIAL):
        assert getattr(found, f"{role}_token_id") == position
    assert found.model_max_length == 512
    pair = found("Bana leri", "tosi")
    ids = pair["input_ids"]
    assert ids[0] == 2
    assert ids[-1] == 3
    assert ids.count(3) == 2
    assert pair["token_type_ids"] == [0] * (ids.index(3) + 1) + [1] * (len(ids) - ids.index(3) - 1)
    assert found("x [MASK] y")["input_ids"].count(4) == 1
    assert found.decode(found("bana leri tosi")["input_ids"], skip_special_tokens=True).strip() == "bana leri tosi"
    config = json.loads((trained[kind] / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"  # what transformers 4 knows, too


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_in_a_text_are_text(trained, kind):
    found = tokenizer.load(trained[kind])
    ids = found(" ".join(["[CLS] [MASK] [SEP] [PAD]"] * 3), add_special_tokens=False)["input_ids"]
    assert not {0, 2, 3, 4} & set(ids)
    raw = found.backend_tokenizer.encode_batch_fast(["[CLS] a [SEP]"], add_special_tokens=False)[0].ids
    assert not {0, 2, 3, 4} & set(raw)


@pytest.mark.parametrize("kind", KINDS)
def test_the_vocabulary_is_used(text, trained, kind):
    """Held-out text falls into far fewer pieces than characters, with hardly a piece unknown."""
    found = tokenizer.load(trained[kind])
    documents = [document.text for document in corpus.read_documents(text, "held_out")]
    ids = [number for each in found(documents, add_special_tokens=False)["input_ids"] for number in each]
    assert len(ids) < sum(map(len, documents)) / 2
    assert ids.count(1) < 0.01 * len(ids)
    assert len(set(ids)) > 500


def test_wordpiece_pieces_are_those_of_the_text(trained):
    found = tokenizer.load(trained["wordpiece"])
    vocabulary = set(found.get_vocab())
    alphabet = {piece for piece in vocabulary if len(piece) == 1}
    assert {f"##{letter}" for letter in alphabet} <= vocabulary
    assert "é" not in alphabet  # accents are stripped
    assert not any("\x02" in piece for piece in vocabulary)
    assert found.tokenize("北京") == ["北", "京"]
    assert sum(not piece.startswith("##") for piece in vocabulary) > 200


@pytest.mark.parametrize("kind", KINDS)
def test_case_is_kept_on_demand(text, tmp_path, kind):
    train(text, tmp_path / "cased", kind=kind, lowercase=False)
    found = tokenizer.load(tmp_path / "cased")
    assert found.tokenize("Bana") != found.tokenize("bana")
    assert any("é" in piece or "Ã©" in piece for piece in found.get_vocab())


def test_a_part_of_the_corpus_on_demand(text, tmp_path, monkeypatch):
    task = {"corpus": str(text), "max_characters": 20_000}
    some = list(tokenizer._texts(task))
    everything = [document.text for document in corpus.read_documents(text, "train")]
    assert set(some) < set(everything)
    assert 20_000 <= sum(map(len, some)) < 22_000
    assert list(tokenizer._texts({**task, "max_characters": 10**9})) == everything


@pytest.mark.parametrize("kind, low, high", [("wordpiece", 2000, 8000), ("bpe", 2000, 8000), ("unigram", 500, 8000)])
def test_a_vocabulary_the_text_does_not_support_names_the_size_it_does(text, tmp_path, kind, low, high):
    with pytest.raises(
        ValueError, match=r"tokenizer.vocab_size: the text supports \d+ entries, not 30000; write"
    ) as caught:
        train(text, tmp_path / "a", kind=kind, vocab_size=30_000)
    size = int(str(caught.value).split("write ")[1].split()[0])
    assert low < size < high
    assert size % 64 == 0
    assert not list((tmp_path / "a").glob("tokenizer*"))
    assert train(text, tmp_path / "b", kind=kind, vocab_size=size)["vocab_size"] == size


def test_a_text_too_small_for_any_vocabulary_asks_for_more_text(tmp_path):
    """No size is advised that the configuration would refuse."""
    (tmp_path / "a.txt").write_text(
        "\n".join(f"the red stone {number} holds the old river and the small house" for number in range(99))
    )
    (tmp_path / "corpus").mkdir()
    section = Corpus(sources=[{"path": "a.txt", "format": "lines"}], held_out=0.1, dedup="none")
    corpus.build(section, {"yaml": tmp_path}, tmp_path / "corpus", Machine(workers=1))
    with pytest.raises(ValueError, match=r"supports \d+ entries, not 128; give more text in corpus\.sources"):
        train(tmp_path / "corpus", tmp_path / "a", vocab_size=128)


def test_only_what_rounding_adds_is_filled_up(text, tmp_path):
    with pytest.raises(ValueError, match="the text supports") as caught:
        train(text, tmp_path / "a", vocab_size=30_000)
    most = int(str(caught.value).split("supports ")[1].split()[0])
    metrics = train(text, tmp_path / "b", vocab_size=most)
    assert metrics["vocab_size"] == -(-most // 64) * 64
    vocabulary = tokenizer.load(tmp_path / "b").get_vocab()
    assert sum(piece.startswith("[unused") for piece in vocabulary) == metrics["vocab_size"] - most
    with pytest.raises(ValueError, match=f"supports {most} entries, not {most + 1}"):
        train(text, tmp_path / "c", vocab_size=most + 1)


def test_bytes_need_room(text, tmp_path):
    with pytest.raises(ValueError, match="128 entries cannot hold the text's alphabet; write 320"):
        train(text, tmp_path / "a", kind="bpe", vocab_size=128)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_becomes_ordinary_ids(loaded, text):
    for kind, found in loaded.items():
        ids = found.backend_tokenizer.encode(text, add_special_tokens=False).ids
        assert all(number == 1 or 5 <= number < 1024 for number in ids)
        if kind == "bpe":
            assert 1 not in ids


# ---- loading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["directory", "file"])
def test_load_instead_of_train(trained, tmp_path, form):
    shutil.copytree(trained["bpe"], tmp_path / "mine")
    name = "mine" if form == "directory" else "mine/tokenizer.json"
    out = tmp_path / "out"
    out.mkdir()
    metrics = tokenizer.build(Tokenizer(path=name), {"yaml": tmp_path}, out, Machine(workers=1))
    assert metrics["sha256"] == tokenizer.digest(out) == tokenizer.digest(trained["bpe"])
    found = tokenizer.load(out)
    assert [getattr(found, f"{role}_token_id") for role in SPECIAL] == [0, 1, 2, 3, 4]


def test_berts_vocabularies(shared_data, tmp_path):
    from transformers import BertTokenizerFast

    for name in ("uncased", "cased"):
        path = shared_data / "vocab" / f"bert-base-{name}-vocab.txt"
        out = tmp_path / name
        out.mkdir()
        tokenizer.build(Tokenizer(path=str(path)), {"yaml": tmp_path}, out, Machine(workers=1))
        found = tokenizer.load(out)
        assert len(found) == (30_522 if name == "uncased" else 28_996)
        sample = "Größe naïve Unaffable! 北京 it's\nnew"
        expected = BertTokenizerFast.from_pretrained(write_bert(tmp_path / f"hf-{name}", path, name == "uncased"))
        assert found(sample, "pair")["input_ids"] == expected(sample, "pair")["input_ids"]
        assert found.mask_token_id == expected.mask_token_id == 103


def write_bert(folder: Path, vocabulary: Path, lowercase: bool) -> Path:
    folder.mkdir()
    shutil.copy(vocabulary, folder / "vocab.txt")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"do_lower_case": lowercase, "tokenizer_class": "BertTokenizer"})
    )
    return folder


def test_roberta_names_its_special_tokens_otherwise(trained, tmp_path):
    backend = json.loads((trained["bpe"] / "tokenizer.json").read_text())
    names = {"[PAD]": "<pad>", "[UNK]": "<unk>", "[CLS]": "<s>", "[SEP]": "</s>", "[MASK]": "<mask>"}
    text = json.dumps(backend)
    for ours, theirs in names.items():
        text = text.replace(ours, theirs)
    (tmp_path / "tokenizer.json").write_text(text)
    out = tmp_path / "out"
    out.mkdir()
    tokenizer.build(Tokenizer(path="tokenizer.json"), {"yaml": tmp_path}, out, Machine(workers=1))
    assert tokenizer.load(out)("bana")["input_ids"][0] == tokenizer.load(out).cls_token_id == 2


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "cannot load vocab.txt"),
        ("[PAD]\nhello\n", r"cannot load vocab.txt \(this is no BERT vocabulary: it lacks \[UNK\], \[CLS\]"),
        ("\n".join([*SPECIAL.values(), "a", "a"]), "a piece occurs twice"),
    ],
)
def test_what_is_no_vocabulary(tmp_path, content, message):
    if content is not None:
        (tmp_path / "vocab.txt").write_text(content)
    with pytest.raises(ValueError, match=message):
        tokenizer.build(Tokenizer(path="vocab.txt"), {"yaml": tmp_path}, tmp_path, Machine(workers=1))


@pytest.mark.parametrize(
    "name", ["nowhere/at/all", "./nowhere", "nobody-here/nothing-there", "empty", "broken/tokenizer.json"]
)
def test_what_cannot_be_loaded_is_one_sentence(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(ValueError, match=f"tokenizer.path: cannot load {name} .*hub name") as caught:
        tokenizer.build(Tokenizer(path=name), {"yaml": tmp_path}, tmp_path / "empty", Machine(workers=1))
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_mask_is_refused(trained, tmp_path):
    text = (trained["wordpiece"] / "tokenizer.json").read_text().replace("[MASK]", "masque")
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match="lacks mask_token; masked language models need all of them"):
        tokenizer.build(Tokenizer(path="tokenizer.json"), {"yaml": tmp_path}, tmp_path, Machine(workers=1))


def test_damage_is_noticed(trained, tmp_path):
    shutil.copytree(trained["bpe"], tmp_path / "a")
    data = (tmp_path / "a" / "tokenizer.json").read_bytes()
    (tmp_path / "a" / "tokenizer.json").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"tokenizer\.json is damaged"):
        tokenizer.load(tmp_path / "a")
    (tmp_path / "a" / "tokenizer.json").write_text('{"version": "1.0", "model": {}}')
    with pytest.raises(ValueError, match="is no tokenizer"):
        tokenizer.load(tmp_path / "a")
    with pytest.raises(ValueError, match=r"holds no tokenizer\.json; run the tokenizer stage first"):
        tokenizer.load(tmp_path / "b")
