"""The shards stage: every token of every document stands in a row, in order, whoever packed it."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frugalbert.config import Machine, Shards
from frugalbert.data import shards
from frugalbert.data.packing import RowWriter, layout, piece_limits
from frugalbert.data.rows import ShardSet
from frugalbert.data.shards import build, encode, open_tokenizer, split_text
from frugalbert.run import sha256
from tests.data.small_shards import SPECIAL, small_tokenizer, write_corpus

WORDS = ["the", "of", "encoder", "trains", "masked", "tokens", "budget", "seconds", "learning", "rate", "packs"]
KINDS = ["wordpiece", "bpe", "unigram"]


def prose(generator: random.Random, words: int) -> str:
    parts = [generator.choice(WORDS) + generator.choice(["", "", "", ",", ".\n", "ing", "'s"]) for _ in range(words)]
    return " ".join(parts)


@pytest.fixture(scope="module")
def files() -> list[list[tuple[str, bool]]]:
    """Three corpus files: short, empty-looking, long documents, and text that looks like special tokens."""
    generator = random.Random(0)
    odd = ["[CLS] [MASK] [SEP][PAD] [UNK]", "\u200b \u200b", "x", "[MASK]" * 50, "日本語のテキスト", "ａ\u0301 ﬁ 😀"]
    texts = [prose(generator, generator.choice([1, 5, 20, 80, 600])) for _ in range(150)] + odd * 3
    generator.shuffle(texts)
    documents = [(text, place % 7 == 3) for place, text in enumerate(texts)]
    return [documents[:60], documents[60:61], documents[61:]]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory, files) -> dict[str, Path]:
    found = {}
    texts = [text for group in files for text, _ in group if "[" not in text]
    for kind in KINDS:
        found[kind] = tmp_path_factory.mktemp(kind)
        small_tokenizer(kind, texts, 400 if kind == "bpe" else 150).save_pretrained(found[kind])
    return found


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, files) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"), files)


def hashes(out: Path) -> dict[str, str]:
    found = {path.relative_to(out).as_posix(): sha256(path) for path in out.rglob("*") if path.is_file()}
    return {name: digest for name, digest in found.items() if name != "journal.jsonl"}


def make(corpus: Path, tokenizer: Path, out: Path, section: Shards, workers: int = 1) -> dict:
    out.mkdir(exist_ok=True)
    return build(section, {"corpus": corpus, "tokenizer": tokenizer}, out, Machine(workers=workers))


def pieces(rows: np.ndarray) -> list[list[int]]:
    """The pieces of all rows, in order, each row checked to be `([CLS] piece [SEP])* [PAD]*`."""
    found: list[list[int]] = []
    for row in rows.tolist():
        while row and row[-1] == SPECIAL["pad"]:
            row.pop()
        while row:
            end = row.index(SPECIAL["sep"])
            first, *piece = row[:end]
            row = row[end + 1 :]
            assert first == SPECIAL["cls"]
            assert piece
            assert not set(piece) & {SPECIAL[name] for name in ("cls", "sep", "pad", "mask")}
            found.append(piece)
    return found


# ---- conservation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pack", [True, False])
def test_every_token_of_every_document_is_there_in_order(tmp_path, files, corpus, tokenizers, kind, pack):
    from transformers import AutoTokenizer

    section = Shards(length=(16, 64), pack=pack)
    metrics = make(corpus, tokenizers[kind], tmp_path / "out", section)
    assert metrics["truncated_tokens"] == 0
    backend = AutoTokenizer.from_pretrained(tokenizers[kind]).backend_tokenizer
    backend.encode_special_tokens = True
    special, forged = set(SPECIAL["all"]) - {SPECIAL["unk"]}, 0
    for split in ("train", "held_out"):
        texts = [text for group in files for text, held_out in group if held_out == (split == "held_out")]
        encoded = [backend.encode(text, add_special_tokens=False).ids for text in texts]
        forged += sum(token in special for ids in encoded for token in ids)
        expected = [[SPECIAL["unk"] if token in special else token for token in ids] for ids in encoded]
        for length in section.length:
            found = ShardSet.open(tmp_path / "out", length, split, tokenizer_sha256=sha256_of(tokenizers[kind]))
            parts = pieces(found.ids)
            assert sum(parts, []) == sum(expected, [])
            entry = json.loads((tmp_path / "out/index.json").read_text())["sets"][str(length)][split]
            assert entry["document_tokens"] == sum(map(len, expected))
            assert entry["tokens"] == entry["document_tokens"] + 2 * len(parts) == (found.ids != 0).sum()
            assert entry["documents"] == sum(map(bool, expected))
            assert entry["fill"] == pytest.approx(entry["tokens"] / found.ids.size, abs=1e-6)
            if not pack:
                starts = [row[1 : row.index(SPECIAL["sep"])] for row in found.ids.tolist()]
                assert starts == parts  # one piece a row
    assert metrics["specials_in_text"] == forged
    assert (forged > 0) == (kind == "unigram")  # its vocabulary matches the text "[CLS]" itself


def sha256_of(tokenizer: Path) -> str:
    return hashlib.sha256((tokenizer / "tokenizer.json").read_bytes()).hexdigest()


@given(
    counts=st.lists(st.integers(0, 60), max_size=30),
    length=st.integers(8, 24),
    least=st.integers(1, 30),
    pack=st.booleans(),
    cuts=st.lists(st.integers(0, 30), max_size=4),
)
@settings(derandomize=True, deadline=None, max_examples=150)
def test_packing_in_parts_is_packing_at_once(counts, length, least, pack, cuts):
    """Batches do not show in the rows; only the rest of a row that is too short for a piece stays empty."""
    section = Shards(length=(length,), pack=pack, min_piece=least)
    whole_starts, whole_sizes, _ = layout(counts, length, 0, section)
    assert whole_sizes.sum() == sum(counts)
    taken = np.zeros((whole_starts.max(initial=0) // length + 1) * length, bool)
    for start, size in zip(whole_starts.tolist(), whole_sizes.tolist(), strict=True):
        assert size > 0
        assert start // length == (start + size + 1) // length
        assert not taken[start : start + size + 2].any()
        taken[start : start + size + 2] = True
    ends = set(np.cumsum(counts).tolist())
    for end, size in zip(np.cumsum(whole_sizes).tolist(), whole_sizes.tolist(), strict=True):
        assert size >= min(least, length - 2) or end in ends  # only a document's last piece may be that short
    free = [int((~row).sum()) for row in taken.reshape(-1, length)][:-1]
    assert not pack or all(rest < min(least, length - 2) + 2 for rest in free)
    bounds = sorted({0, len(counts), *(cut for cut in cuts if cut < len(counts))})
    starts: list[int] = []
    filled = base = 0
    for low, high in zip(bounds, bounds[1:], strict=False):
        part, _, end = layout(counts[low:high], length, filled, section)
        starts += [base + start for start in part.tolist()]
        base += end // length * length
        filled = end % length
    assert starts == whole_starts.tolist()


def test_a_full_corpus_is_filled(corpus, tokenizers, tmp_path, capsys):
    metrics = make(corpus, tokenizers["wordpiece"], tmp_path, Shards(length=(32,)))
    assert metrics["fill"] > 0.85
    line = next(line for line in capsys.readouterr().err.splitlines() if "length 32 train" in line)
    assert "% filled, 0 tokens discarded" in line


# ---- short pieces ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [True, False])
def test_short_pieces_lose_nothing(tmp_path, corpus, tokenizers, pack):
    """A share of the documents is cut at a length of its own; every token is still there, in order, for any worker."""
    plain, short = Shards(length=(16, 64), pack=pack), Shards(length=(16, 64), pack=pack, short_share=0.5)
    before = make(corpus, tokenizers["wordpiece"], tmp_path / "plain", plain)
    after = make(corpus, tokenizers["wordpiece"], tmp_path / "short", short)
    for split in ("train", "held_out"):
        for length in (16, 64):
            rows = [ShardSet.open(tmp_path / name, length, split).ids for name in ("plain", "short")]
            found = [pieces(each) for each in rows]
            assert sum(found[0], []) == sum(found[1], [])
            assert len(found[1]) > 1.2 * len(found[0])
            if not pack:
                assert len(rows[1]) == len(found[1])  # a short piece has a row of its own
    assert after["documents"] == before["documents"]
    assert pack == (after["fill"] > 0.8)
    make(corpus, tokenizers["wordpiece"], tmp_path / "two", short, workers=2)
    assert hashes(tmp_path / "two") == hashes(tmp_path / "short") != hashes(tmp_path / "plain")


@given(
    counts=st.lists(st.integers(0, 60), min_size=1, max_size=20),
    length=st.integers(8, 24),
    pack=st.booleans(),
    data=st.data(),
)
@settings(derandomize=True, deadline=None, max_examples=100)
def test_a_documents_pieces_have_its_length(counts, length, pack, data):
    """All pieces of a document are as long as its limit, but for its last and, packed, those at the end of a row."""
    section = Shards(length=(length,), pack=pack, min_piece=1)
    limits = data.draw(st.lists(st.integers(2, length - 2), min_size=len(counts), max_size=len(counts)))
    starts, sizes, _ = layout(counts, length, 0, section, limits)
    owner = np.repeat(np.arange(len(counts)), counts)[np.cumsum(sizes) - sizes]
    assert np.bincount(owner, sizes, len(counts)).tolist() == counts
    assert (sizes <= np.array(limits)[owner]).all()
    last = np.append(owner[1:] != owner[:-1], True) if len(owner) else np.empty(0, bool)
    at_end = (starts + sizes + 2) % length == 0
    assert (last | (pack & at_end) | (sizes == np.array(limits)[owner])).all()
    assert pack or not (starts % length).any()


def test_the_share_and_the_lengths_of_short_pieces_are_those_asked_for():
    hashes = np.random.default_rng(0).integers(0, 2**64, 100_000, dtype=np.uint64)
    assert (piece_limits(hashes, 128, 0.0) == 126).all()
    counts = np.bincount(piece_limits(hashes, 128, 0.1), minlength=127)
    assert counts[:2].sum() == 0
    assert abs(counts[2:126].sum() / 100_000 - 0.1 * 124 / 125) < 0.004
    each = np.bincount(piece_limits(hashes, 128, 1.0), minlength=127)[2:]
    assert ((each - 800) ** 2 / 800).sum() < 125 + 5 * 16  # chi-square: 2 … 126 equally likely


# ---- the same bytes whoever packs ------------------------------------------------------------------------------------


@pytest.mark.fault("R11")
def test_any_number_of_workers_gives_the_same_bytes(tmp_path, corpus, tokenizers, monkeypatch):
    section = Shards(length=(16, 32))
    make(corpus, tokenizers["bpe"], tmp_path / "one", section)
    monkeypatch.setattr(shards, "BATCH_CHARACTERS", 300)
    make(corpus, tokenizers["bpe"], tmp_path / "batches", section)
    monkeypatch.undo()
    make(corpus, tokenizers["bpe"], tmp_path / "two", section, workers=2)
    expected = hashes(tmp_path / "one")
    assert len(expected) == 11  # a file without held-out documents has no held-out shard
    assert hashes(tmp_path / "two") == expected
    assert hashes(tmp_path / "batches") == expected


@pytest.mark.fault("R11")
def test_two_dask_workers_give_the_same_bytes(tmp_path, corpus, tokenizers):
    distributed = pytest.importorskip("distributed")
    section = Shards(length=(16,))
    make(corpus, tokenizers["wordpiece"], tmp_path / "one", section)
    (tmp_path / "dask").mkdir()
    inputs = {"corpus": corpus, "tokenizer": tokenizers["wordpiece"]}
    with distributed.LocalCluster(2, threads_per_worker=1, dashboard_address=None, protocol="tcp") as cluster:
        build(section, inputs, tmp_path / "dask", Machine(scheduler=cluster.scheduler_address))
    assert hashes(tmp_path / "dask") == hashes(tmp_path / "one")


def killed_at(point: int, monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> bool:
    """Do `work` in a forked child that kills itself at its `point`-th file call. Whether it came that far."""
    left = point

    def counted(function):
        def wrapper(*arguments, **options):
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return wrapper

    child = os.fork()
    if child == 0:
        for owner, name in ((os, "replace"), (os, "fsync"), (os, "write"), (RowWriter, "_write")):
            monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
        try:
            work()
        finally:
            os._exit(0 if left >= 0 else 1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or status == 0
    return os.WIFSIGNALED(status)


def test_killed_anywhere_and_run_again_gives_the_same_bytes(tmp_path, corpus, tokenizers, monkeypatch):
    """SIGKILL at every file call: no index, and what the next attempt makes is what an uninterrupted one makes."""
    section, out, point = Shards(length=(16,)), tmp_path / "out", 0
    make(corpus, tokenizers["wordpiece"], tmp_path / "whole", section)
    expected = hashes(tmp_path / "whole")
    while killed_at(point, monkeypatch, lambda: make(corpus, tokenizers["wordpiece"], out, section)):
        if (out / "index.json").exists():  # only the sync of the directory was left
            assert hashes(out) == expected
        else:
            with pytest.raises(FileNotFoundError, match="no finished token shards"):
                ShardSet.open(out, 16)
        if point % 4 == 0:
            chain = tmp_path / f"chain-{point}"
            shutil.copytree(out, chain)
            killed_at(7, monkeypatch, lambda chain=chain: make(corpus, tokenizers["wordpiece"], chain, section))
            make(corpus, tokenizers["wordpiece"], chain, section)
            assert hashes(chain) == expected
        shutil.rmtree(out)
        point += 1
    assert hashes(out) == expected
    assert point >= 20


@pytest.mark.fault("R7")
def test_a_failure_leaves_no_file_behind(tmp_path):
    task = {"special": SPECIAL, "dtype": "uint16"}
    with (
        pytest.raises(OSError, match="full"),
        RowWriter(tmp_path, "train-00000", 16, Shards(length=(16,)), task) as one,
    ):
        one.add(np.arange(5, 100, dtype=np.uint32), np.array([95]))
        raise OSError("the disk is full")
    assert list((tmp_path / "length-16").iterdir()) == []


# ---- long documents --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_long_documents_have_the_ids_of_the_whole(tokenizers, kind, monkeypatch):
    tokenizer = open_tokenizer(str(tokenizers[kind] / "tokenizer.json"))
    generator = random.Random(1)
    texts = [prose(generator, words) for words in (3000, 10, 2000, 0)] + [" a  b \n c, d " * 300]
    expected = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    monkeypatch.setattr(shards, "PIECE_CHARACTERS", 1000)
    ids, counts = encode(tokenizer, texts)
    assert counts.tolist() == [len(found) for found in expected]
    assert ids.tolist() == sum(expected, [])


@given(text=st.text(alphabet="ab é.,\n日", max_size=400), limit=st.integers(20, 100), kind=st.sampled_from(KINDS))
@settings(derandomize=True, deadline=None, max_examples=80)
def test_parts_are_bounded_and_join_to_the_text(tokenizers, text, limit, kind):
    tokenizer = open_tokenizer(str(tokenizers[kind] / "tokenizer.json"))

    def ids_of(texts):
        return [np.array(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts]

    parts = list(split_text(text, ids_of, limit))
    assert "".join(parts) == text
    assert all(len(part) <= limit for part in parts)
    assert not text or all(parts)


def test_text_without_spaces_is_cut(tokenizers):
    for kind in KINDS:
        tokenizer = open_tokenizer(str(tokenizers[kind] / "tokenizer.json"))
        ids, counts = encode(tokenizer, ["x" * 300_000, "日本" * 100_000])
        assert len(ids) == counts.sum()
        assert (counts > 0).all()


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_a_split_without_text_is_refused_in_one_sentence(tmp_path, tokenizers):
    (tmp_path / "corpus").mkdir()
    corpus = write_corpus(tmp_path / "corpus", [[("some words to train on", False)] * 5])
    with pytest.raises(ValueError, match=r"no held-out text .* corpus\.held_out"):
        make(corpus, tokenizers["wordpiece"], tmp_path / "out", Shards(length=(16,)))
    assert not (tmp_path / "out/index.json").exists()


def test_the_tokenizers_threads_are_put_back(monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    monkeypatch.delenv("RAYON_NUM_THREADS", raising=False)
    with shards._threads(1):
        assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"
    assert "RAYON_NUM_THREADS" not in os.environ
