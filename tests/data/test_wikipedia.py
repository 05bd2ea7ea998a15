"""Real text through the whole data path: WikiExtractor's output to documents, shards, masked batches and baselines."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from frugalbert.config import Corpus, Machine, Mask, Shards, Tokenizer
from frugalbert.data import corpus, masking, ngram, shards, tokenizer
from frugalbert.data.rows import RowOrder, ShardSet, gather_rows, to_device

ARTICLES = 2000


@pytest.fixture(scope="module")
def built(tmp_path_factory, shared_data) -> Path:
    """Corpus, BERT's tokenizer and shards of the first articles."""
    root = tmp_path_factory.mktemp("wikipedia")
    machine = Machine(workers=2)
    source = {"path": str(shared_data / "enwiki2015-AA.txt.xz"), "max_documents": ARTICLES}
    sections = {
        "corpus": Corpus.model_validate({"sources": [source], "held_out": 0.02}),
        "tokenizer": Tokenizer(path=str(shared_data / "vocab" / _uncased(shared_data))),
        "shards": Shards(length=(128, 512)),
    }
    for name, module in (("corpus", corpus), ("tokenizer", tokenizer), ("shards", shards)):
        (root / name).mkdir()
        inputs = {"yaml": root, **{earlier: root / earlier for earlier in sections if (root / earlier).exists()}}
        module.build(sections[name], {key: path for key, path in inputs.items() if key != name}, root / name, machine)
    return root


def _uncased(shared_data: Path) -> str:
    return next(path.name for path in sorted((shared_data / "vocab").iterdir()) if "uncased" in path.name)


def test_articles_are_whole_and_clean(built):
    documents = list(corpus.read_documents(built / "corpus", None))
    index = json.loads((built / "corpus" / "index.json").read_text())
    dropped = sum(count for source in index["sources"] for count in source["dropped"].values())
    assert len(documents) + dropped == ARTICLES
    assert len(documents) > 0.9 * ARTICLES
    text = "\n".join(document.text for document in documents)
    assert "<doc" not in text
    assert "</doc>" not in text
    assert "\r" not in text
    anarchism = documents[0].text
    assert anarchism.startswith("Anarchism is a political philosophy")  # the title line is gone
    assert 5 < sum(document.held_out for document in documents) < 100


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_no_token_is_lost_and_rows_read_back_as_the_articles(built, split):
    """The rows of a shard, without [CLS], [SEP] and [PAD], are the documents' own tokens one after the other."""
    fast = tokenizer.load(built / "tokenizer")
    backend = fast.backend_tokenizer
    backend.encode_special_tokens = True
    texts = [document.text for document in corpus.read_documents(built / "corpus", split)]
    encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
    wanted = np.concatenate([np.asarray(encoding.ids) for encoding in encodings])
    for length in (128, 512):
        rows = ShardSet.open(built / "shards", length, split)
        packed = np.asarray(rows.ids).reshape(-1)
        special = [fast.cls_token_id, fast.sep_token_id, fast.pad_token_id]
        assert np.array_equal(packed[~np.isin(packed, special)], wanted)
        assert rows.fill > 0.97


def test_masked_batches_restore_to_the_rows_and_documents_stay_apart(built):
    fast = tokenizer.load(built / "tokenizer")
    vocabulary = masking.Vocabulary.from_tokenizer(fast)
    rows = ShardSet.open(built / "shards", 128, "train")
    ids = RowOrder(rows.rows, seed=0).take(0, 256)
    tokens = gather_rows(to_device(rows, torch.device("cpu")), ids)
    numbers, epochs = torch.from_numpy(ids), torch.zeros(len(ids), dtype=torch.int64)
    batch = masking.mlm_batch(tokens, numbers, epochs, Mask(), 0.15, 0, vocabulary)
    assert torch.equal(masking.restore(batch), tokens)
    starts = (tokens == fast.cls_token_id).cumsum(1)
    real = tokens != fast.pad_token_id
    assert torch.equal(batch.document_ids[real], starts[real])
    assert (batch.position_ids[tokens == fast.cls_token_id] == 0).all()


def test_each_piece_of_a_masked_row_is_a_passage_of_one_article(built):
    """Labels put back, every [CLS] … [SEP] is found word for word within a single article."""
    fast = tokenizer.load(built / "tokenizer")
    rows = ShardSet.open(built / "shards", 128, "held_out")
    tokens = gather_rows(rows, np.arange(0, rows.rows, max(1, rows.rows // 100)))
    numbers = torch.arange(len(tokens))
    vocabulary = masking.Vocabulary.from_tokenizer(fast)
    batch = masking.mlm_batch(tokens, numbers, torch.zeros_like(numbers), Mask(), 0.15, 0, vocabulary)
    backend = fast.backend_tokenizer
    backend.encode_special_tokens = True
    articles = [document.text for document in corpus.read_documents(built / "corpus", "held_out")]
    encodings = backend.encode_batch_fast(articles, add_special_tokens=False)
    ids = "|".join(f" {' '.join(map(str, encoding.ids))} " for encoding in encodings)

    def pieces(rows: torch.Tensor) -> list[str]:
        found: list[list[str]] = []
        for token in rows.flatten().tolist():
            if token == fast.cls_token_id:
                found.append([])
            elif token not in (fast.sep_token_id, fast.pad_token_id):
                found[-1].append(str(token))
        return [f" {' '.join(piece)} " for piece in found]

    found = pieces(masking.restore(batch))
    assert len(found) > 100
    assert all(piece in ids for piece in found)
    assert sum(piece in ids for piece in pieces(batch.input_ids)) < 0.2 * len(found)  # the masked rows themselves


def test_english_is_predictable_from_its_neighbour(built):
    """Bigrams of real text beat unigrams by far; with the neighbours shuffled away they do not (the control)."""
    fast = tokenizer.load(built / "tokenizer")
    vocabulary = masking.Vocabulary.from_tokenizer(fast)
    train = ShardSet.open(built / "shards", 128, "train")
    held_out = ShardSet.open(built / "shards", 128, "held_out")
    tokens = gather_rows(held_out, np.arange(min(held_out.rows, 300)))
    numbers = torch.arange(len(tokens))
    batch = masking.mlm_batch(tokens, numbers, torch.zeros_like(numbers), Mask(), 0.15, 0, vocabulary)
    found = ngram.baselines(train, tokens, batch.masked_positions, batch.labels)
    assert found["bigram_nll"] < found["unigram_nll"] - 0.8
    order = torch.randperm(tokens.numel(), generator=torch.Generator().manual_seed(0))
    shuffled = tokens.flatten()[order].view_as(tokens)
    kept = tokens.flatten()[batch.masked_positions]
    shuffled.view(-1)[batch.masked_positions] = kept
    control = ngram.baselines(train, shuffled, batch.masked_positions, batch.labels)
    assert control["bigram_nll"] > found["bigram_nll"] + 0.8
