"""Teachers with another tokenizer: which tokens are one word, what the teacher sees, the loss written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from frugalbert.config import Distill, Mask
from frugalbert.data.masking import Batch, Vocabulary, mlm_batch
from frugalbert.train.batches import Micro
from frugalbert.train.student import Distilled, Student
from frugalbert.train.words import WordTeacher, load_word_teacher, words_of
from tests.data.small_shards import small_tokenizer
from tests.train import small_run

TEXTS = small_run.sentences(60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock model with byte-level tokens of its own, larger ones than the shards'."""
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    place = tmp_path_factory.mktemp("teachers")
    tokenizer = small_tokenizer("bpe", TEXTS, vocab_size=384)
    tokenizer.save_pretrained(place / "bpe")
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    config = ModernBertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **sizes)
    ModernBertForMaskedLM(config).save_pretrained(place / "bpe")
    return place


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return small_tokenizer("wordpiece", TEXTS, vocab_size=80)


@pytest.fixture(scope="module")
def teacher(folder: Path, tokenizer: Any) -> WordTeacher:
    return load_word_teacher("bpe", "pretrain.distill.teacher", folder, tokenizer, Vocabulary.from_tokenizer(tokenizer))


def batch_of(tokenizer: Any, rows: list[list[str]], length: int = 48, rate: float = 0.2) -> Batch:
    ids = torch.full((len(rows), length), tokenizer.pad_token_id)
    for row, documents in enumerate(rows):
        found = []
        for text in documents:
            ids_of_text = tokenizer(text, add_special_tokens=False)["input_ids"]
            found += [tokenizer.cls_token_id, *ids_of_text, tokenizer.sep_token_id]
        ids[row, : len(found)] = torch.tensor(found)
    numbers = torch.arange(len(rows))
    words = Vocabulary.from_tokenizer(tokenizer)
    return mlm_batch(ids, numbers, torch.zeros_like(numbers), Mask(style="mask"), rate, 0, words)


ROWS = [["the red stone", "the silent horse hears the old river"], ["the quick clock"]]


def test_words_of_a_batch(teacher: WordTeacher, tokenizer: Any):
    batch = batch_of(tokenizer, ROWS)
    words, ids, owners, masked = words_of(batch, Vocabulary.from_tokenizer(tokenizer))
    assert [teacher._text(piece) for piece in ids] == [word for row in ROWS for text in row for word in text.split()]
    assert [int((owners == owner).sum()) for owner in dict.fromkeys(owners)] == [3, 7, 3]
    assert max(map(len, ids)) > 1  # words of several pieces
    places = batch.masked_positions[batch.labels != -100].tolist()
    expected = {int(words.words[words.places == place]) for place in places}
    assert set(masked.nonzero()[0].tolist()) == expected
    assert len(expected) > 1


def test_means_over_pieces_written_out(teacher: WordTeacher, tokenizer: Any):
    """Each document alone, as a person would ask the teacher."""
    batch = batch_of(tokenizer, ROWS)
    _, ids, owners, masked = words_of(batch, Vocabulary.from_tokenizer(tokenizer))
    found, words, both = teacher.read(batch, [0, 4])
    assert both.all()
    assert {layer: tuple(value.shape) for layer, value in found.items()} == {0: (13, 24), 4: (13, 24)}
    texts = [word for row in ROWS for text in row for word in text.split()]
    for owner in dict.fromkeys(owners.tolist()):
        mine = [word for word in range(13) if owners[word] == owner]
        said = [teacher.tokenizer.mask_token if masked[word] else texts[word] for word in mine]
        encoded = teacher.tokenizer(said, is_split_into_words=True, return_tensors="pt")
        states = teacher.model(**encoded, output_hidden_states=True).hidden_states[4][0]
        for place, word in enumerate(mine):
            pieces = [index for index, number in enumerate(encoded.word_ids(0)) if number == place]
            torch.testing.assert_close(found[4][word], states[pieces].mean(0), atol=1e-5, rtol=1e-4)
    x = torch.randn(2, 48, 6)
    pooled = words.pool(x)
    for word in range(13):
        torch.testing.assert_close(pooled[word], x.flatten(0, 1)[words.places[words.words == word]].mean(0))
    assert sum(map(len, ids)) == len(words.places)


def test_the_teacher_does_not_see_the_answers(teacher: WordTeacher, tokenizer: Any):
    """Other words behind the masks change nothing."""
    batch = batch_of(tokenizer, ROWS)
    before = teacher.read(batch, [4])[0][4]
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    whole = [index for index, piece in enumerate(words_of(batch, vocabulary)[1]) if len(piece) == 1]
    words, _, _, masked = words_of(batch, vocabulary)
    single = [word for word in whole if masked[word]]
    assert single
    place = words.places[words.words == single[0]]
    slot = (batch.masked_positions == place).nonzero()[0]
    batch.labels[slot] = int(tokenizer.convert_tokens_to_ids("old"))
    torch.testing.assert_close(teacher.read(batch, [4])[0][4], before)


def test_a_student_learns_from_it(teacher: WordTeacher, tokenizer: Any):
    from frugalbert.model.arch import Arch
    from frugalbert.model.configuration import FrugalConfig
    from frugalbert.model.modeling import FrugalForMaskedLM

    torch.manual_seed(1)
    arch = Arch.parse("modern 2x16 heads=2 head_dim=8 ffn=16 max_length=64")
    network = FrugalForMaskedLM(FrugalConfig.from_arch(arch, Vocabulary.from_tokenizer(tokenizer).size))
    section = Distill.model_validate({"teacher": "t", "mlm": 0.0, "logits": 0.0, "hidden": 1.0, "layers": "even"})
    module = Student(network, teacher, section).train()
    assert module.pairs == ((0, 0), (1, 2), (2, 4))
    micro = Micro(batch_of(tokenizer, ROWS), torch.tensor(1.0), torch.tensor(1.0))
    optimizer, losses = torch.optim.Adam([w for w in module.parameters() if w.requires_grad], 0.01), []
    for _ in range(10):
        optimizer.zero_grad()
        losses.append(Distilled(True, section)(module, micro, 0.0)["loss"])
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    assert all(weight.grad is None for weight in teacher.model.parameters())


def test_the_stage_takes_it(folder: Path, tmp_path: Path):
    inputs = small_run.prepare(tmp_path / "inputs", documents=60)
    distil = {"teacher": str(folder / "bpe"), "mlm": 1.0, "logits": 0.0, "hidden": 0.5}
    values = {"arch": "modern 2x32 heads=2 ffn=48 max_length=64", "objective": "distill", "budget": "4steps"}
    summary = small_run.run(inputs, tmp_path / "out", distill=distil, **values)
    assert summary["steps"] == 4
    assert '"hidden_loss"' in (tmp_path / "out" / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match="another tokenizer than the shards, so relation cannot be compared"):
        small_run.run(inputs, tmp_path / "no", distill={**distil, "relation": 1.0}, **values)
    with pytest.raises(ValueError, match="remove start"):
        small_run.run(inputs, tmp_path / "no", distill=distil, start="from teacher", **values)


def test_a_tokenizer_that_marks_no_words_is_refused(folder: Path, tokenizer: Any):
    unmarked = Vocabulary(**(vars(Vocabulary.from_tokenizer(tokenizer)) | {"continuation": None}))
    with pytest.raises(ValueError, match="does not mark where words begin"):
        load_word_teacher("bpe", "pretrain.distill.teacher", folder, tokenizer, unmarked)
    (folder / "bare").mkdir(exist_ok=True)
    with pytest.raises(ValueError, match="name a masked LM with its tokenizer"):
        load_word_teacher("bare", "pretrain.distill.teacher", folder, tokenizer, Vocabulary.from_tokenizer(tokenizer))
