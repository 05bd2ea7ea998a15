"""BLiMP: scores against a loop over single tokens, killed runs, ties, models that cannot score, the real files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from frugalbert import run
from frugalbert.finetune import blimp, models
from tests.finetune.conftest import make_tiny, sentences

CPU = torch.device("cpu")
TEXTS = [*sentences(25, 1), "the cat", "a unfamiliarword sleeps", "the cat sings the cat", "x"]


@pytest.fixture(scope="session")
def ours(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """A model of our own type with the tiny one's tokenizer."""
    from frugalbert.model.arch import Arch
    from frugalbert.model.configuration import FrugalConfig
    from frugalbert.model.modeling import FrugalForMaskedLM

    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("ours")
    settings = models.open_source(str(tiny), None)
    arch = Arch.parse("modern 2x32 heads=2 ffn=48 max_length=64")
    special = {"pad_token_id": settings.tokenizer.pad_token_id}
    FrugalForMaskedLM(FrugalConfig.from_arch(arch, settings.config.vocab_size, **special)).save_pretrained(path)
    settings.tokenizer.save_pretrained(path)
    return path


def opened(path: Path, method: str = "exact", init: str = "pretrained", seed: int = 0) -> blimp.Scorer:
    return blimp.open_scorer(models.open_source(str(path), None), init, seed, method, CPU)


def one_at_a_time(scorer: blimp.Scorer, text: str) -> float:
    """The definition: one masked copy after another (or one unmasked one), all logits, float64."""
    tokenizer = scorer.source.tokenizer
    ids = tokenizer(text)["input_ids"]
    inner = range(1, len(ids) - 1)  # without [CLS] and [SEP]
    total = 0.0
    for place in inner:
        read = list(ids)
        if scorer.method == "exact":
            read[place] = tokenizer.mask_token_id
        with torch.inference_mode():
            logits = scorer.model(torch.tensor([read])).logits[0, place].double()
        total += float(logits.log_softmax(-1)[ids[place]])
    return total


def dump(folder: Path, paradigms: dict[str, list[tuple[str, str]]], term: str = "agreement") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for uid, pairs in paradigms.items():
        rows = [
            {"sentence_good": good, "sentence_bad": bad, "UID": uid, "linguistics_term": term, "field": "syntax",
             "pairID": str(number)}
            for number, (good, bad) in enumerate(pairs)
        ]  # fmt: skip
        (folder / f"{uid}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def small(folder: Path) -> Path:
    texts = sentences(60, 5)
    return dump(folder, {f"p{part}": list(zip(texts[part::6], texts[part + 3 :: 6], strict=True)) for part in range(3)})


# ---- scores ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["tiny", "ours"])
@pytest.mark.parametrize("method", ["exact", "one-pass"])
def test_batches_score_as_one_at_a_time(model, method, request, monkeypatch):
    scorer = opened(request.getfixturevalue(model), method)
    expected = [one_at_a_time(scorer, text) for text in TEXTS]
    for tokens in (7, 64, 8192):  # batches of one copy, of a few, of everything of a length
        monkeypatch.setitem(blimp.TOKENS, "cpu", tokens)
        scores, _ = blimp.score(scorer, TEXTS)
        assert scores == pytest.approx(expected, abs=1e-4)
    other = opened(request.getfixturevalue(model), "one-pass" if method == "exact" else "exact")
    assert np.abs(np.array(blimp.score(other, TEXTS)[0]) - expected).max() > 1e-3


def test_every_word_is_masked_once_and_special_tokens_never(tiny):
    scorer = opened(tiny)
    tokenizer, seen = scorer.source.tokenizer, []

    def look(module, arguments):
        seen.extend(arguments[0].tolist())

    scorer.model.register_forward_pre_hook(look)
    _, num_tokens = blimp.score(scorer, ["the cat ☃ sings"])
    original = tokenizer("the cat ☃ sings")["input_ids"]
    assert tokenizer.unk_token_id in original  # an unknown word is a word of the sentence
    mask = tokenizer.mask_token_id
    assert sorted(row.index(mask) for row in seen) == [1, 2, 3, 4]
    for row in seen:
        assert [a for a, b in zip(row, original, strict=True) if a != b] == [mask]
    assert num_tokens == len(original) * 4


def test_text_like_a_special_token_is_text(tiny):
    scorer = opened(tiny)
    (score,), _ = blimp.score(scorer, ["the [SEP] cat"])
    ids = scorer.source.tokenizer("the [SEP] cat", split_special_tokens=True)["input_ids"]
    assert ids.count(scorer.source.tokenizer.sep_token_id) == 1
    assert score < 0


def test_the_likelier_sentence_wins(tiny, tmp_path):
    scorer = opened(tiny)
    cat = scorer.source.tokenizer("cat")["input_ids"][1]
    with torch.no_grad():
        scorer.model.cls.predictions.bias[cat] += 20.0
    pairs = [(f"the cat {word}", f"the dog {word}") for word in ("runs", "sleeps", "sings")]
    assert blimp.evaluate(scorer, dump(tmp_path / "a", {"p": pairs}), tmp_path / "x")["accuracy"] == 1.0
    turned = [(bad, good) for good, bad in pairs]
    assert blimp.evaluate(scorer, dump(tmp_path / "b", {"p": turned}), tmp_path / "y")["accuracy"] == 0.0


def test_a_tie_is_wrong(tiny, tmp_path):
    """The tokenizer lowercases: these are the same tokens, whichever batch they stand in."""
    pairs = [("The cat runs", "the CAT runs"), ("a b c d e f", "A B C D E F"), ("the cat", "the cat runs runs runs")]
    found = blimp.evaluate(opened(tiny), dump(tmp_path / "data", {"p": pairs}), tmp_path / "out")
    assert (found["num_ties"], found["paradigms"]["p"]["num_ties"]) == (2, 2)
    assert found["accuracy"] == pytest.approx(1 / 3, abs=1e-6)


def test_random_weights_are_those_of_the_seed(tiny):
    first, again, other = (blimp.score(opened(tiny, "exact", "random", seed), TEXTS)[0] for seed in (3, 3, 4))
    assert first == again
    assert np.abs(np.array(first) - other).min() > 0
    assert len({opened(tiny, "exact", init, seed).identity for init, seed in (
        ("random", 3), ("random", 4), ("pretrained", 3))}) == 3  # fmt: skip
    assert opened(tiny, "exact", "pretrained", 3).identity == opened(tiny, "exact", "pretrained", 4).identity


# ---- resuming -------------------------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many sentences each call of `score` was given."""
    calls: list[int] = []
    score = blimp.score

    def count(scorer, texts):
        calls.append(len(texts))
        return score(scorer, texts)

    monkeypatch.setattr(blimp, "score", count)
    return calls


def comparable(result):
    return {name: value for name, value in result.items() if "second" not in name}


def test_a_killed_evaluation_continues_with_the_next_paradigm(tiny, tmp_path, monkeypatch, counted):
    data, scorer = small(tmp_path / "data"), opened(tiny)
    whole = blimp.evaluate(scorer, data, tmp_path / "whole")
    assert counted == [20, 20, 20]
    checks = [0]

    def stop():
        checks[0] += 1
        if checks[0] == 20:  # in the third paradigm
            raise run.Stopped(15)

    with monkeypatch.context() as patch:
        patch.setattr(run, "check_stop", stop)
        with pytest.raises(run.Stopped):
            blimp.evaluate(scorer, data, tmp_path / "cut")
    finished = len(list((tmp_path / "cut").glob("p*.json")))
    assert finished == 2
    counted.clear()
    assert comparable(blimp.evaluate(scorer, data, tmp_path / "cut")) == comparable(whole)
    assert counted == [20]
    assert json.loads((tmp_path / "cut" / "blimp.json").read_text())["accuracy"] == whole["accuracy"]


def test_scores_of_other_models_methods_and_damaged_files_are_not_taken(tiny, tmp_path, counted):
    data, out = small(tmp_path / "data"), tmp_path / "out"
    blimp.evaluate(opened(tiny), data, out)
    (out / "p1.json").write_text((out / "p1.json").read_text()[:200])
    blimp.evaluate(opened(tiny), data, out)
    assert counted == [20, 20, 20, 20]
    counted.clear()
    for scorer in (opened(tiny, "one-pass"), opened(tiny, init="random")):
        assert blimp.evaluate(scorer, data, out)["method"] == scorer.method
    blimp.evaluate(scorer, data, out, limit=4)
    assert counted == [20] * 6 + [8] * 3
    rows = (data / "p0.jsonl").read_text().splitlines()
    (data / "p0.jsonl").write_text("\n".join(reversed(rows)))
    counted.clear()
    blimp.evaluate(scorer, data, out, limit=4)
    assert counted == [8]


# ---- figures --------------------------------------------------------------------------------------------------------


def test_the_mean_is_over_paradigms_and_intervals_are_the_bootstraps():
    generator = np.random.default_rng(0)
    paradigms = [blimp.Paradigm(f"u{n}", f"t{n % 2}", "f", [("0", "a", "b")] * size, "") for n, size in
                 enumerate((40, 400, 100))]  # fmt: skip
    right = [generator.random(len(p.pairs)) < share for p, share in zip(paradigms, (0.9, 0.5, 0.7), strict=True)]
    found = blimp.summary(paradigms, [[(float(hit), 0.5) for hit in hits] for hits in right])
    assert found["accuracy"] == pytest.approx(np.mean([hits.mean() for hits in right]), abs=1e-6)
    assert found["terms"]["t0"]["accuracy"] == pytest.approx((right[0].mean() + right[2].mean()) / 2, abs=1e-6)
    assert found["terms"]["t0"]["num_paradigms"] == 2
    means = [
        np.mean([hits[generator.integers(len(hits), size=len(hits))].mean() for hits in right]) for _ in range(4000)
    ]
    assert found["interval"] == pytest.approx(np.quantile(means, (0.025, 0.975)), abs=0.006)


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_models_without_a_masked_lm_head_are_refused(tiny, tmp_path):
    from transformers import (
        AutoTokenizer,
        BertConfig,
        BertForSequenceClassification,
        ElectraConfig,
        ElectraForPreTraining,
    )

    settings = models.open_source(str(tiny), None).config
    sizes = {"vocab_size": settings.vocab_size, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 48}  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    for name, model in (
        ("ElectraForPreTraining", ElectraForPreTraining(ElectraConfig(**sizes, embedding_size=32))),
        ("BertForSequenceClassification", BertForSequenceClassification(BertConfig(**sizes))),
    ):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=rf"has no masked-LM head \(it is {name}\); BLiMP scores words"):
            opened(tmp_path / name)


def test_damaged_weights_are_told_as_such(tiny, tmp_path):
    import shutil

    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    (model / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"model cannot be loaded \(.+\); copy it again from its origin"):
        opened(model)


def test_our_discriminators_are_refused_and_pair_models_taken(ours, tmp_path):
    from frugalbert.model import modeling

    source = models.open_source(str(ours), None)
    for name in ("FrugalForReplacedTokenDetection", "FrugalForPairs"):
        getattr(modeling, name)(source.config).save_pretrained(tmp_path / name)
        source.tokenizer.save_pretrained(tmp_path / name)
    opened(tmp_path / "FrugalForPairs")
    with pytest.raises(ValueError, match="has no masked-LM head"):
        opened(tmp_path / "FrugalForReplacedTokenDetection")


def test_long_sentences_and_missing_masks_are_refused(tmp_path):
    short = make_tiny(tmp_path / "short", sentences(20, 0), positions=8)
    with pytest.raises(ValueError, match="has 8 positions, a sentence of BLiMP 12 tokens"):
        blimp.score(opened(short), ["the cat " * 5])
    source = models.open_source(str(short), None)
    source.tokenizer.mask_token = None
    with pytest.raises(ValueError, match="has no mask token"):
        blimp.open_scorer(source, "pretrained", 0, "exact", CPU)


@pytest.mark.parametrize("line, sentence", [
    ('{"sentence_good": "a", ', "line 2, is no JSON"),
    ('{"sentence": "a", "label": 1}', "line 2, is no BLiMP pair; it needs sentence_good"),
    ('{"sentence_good": "a", "sentence_bad": "b", "UID": "q", "linguistics_term": "t", "field": "f", "pairID": "1"}',
     "has pairs of 'q'"),
    ("[1]", "line 2, is no BLiMP pair"),
])  # fmt: skip
def test_bad_files(line, sentence, tmp_path):
    data = dump(tmp_path / "data", {"p": [("a", "b")]})
    with open(data / "p.jsonl", "a") as file:
        file.write(line)
    with pytest.raises(ValueError, match=sentence):
        blimp.read(data)


def test_absent_and_empty_files(tmp_path):
    with pytest.raises(ValueError, match="has no BLiMP files"):
        blimp.read(tmp_path)
    (tmp_path / "p.jsonl").touch()
    with pytest.raises(ValueError, match="is empty"):
        blimp.read(tmp_path)


# ---- the real files -------------------------------------------------------------------------------------------------


def test_the_real_files(shared_data):
    paradigms = blimp.read(shared_data, limit=1000)
    assert len(paradigms) == blimp.NUM_PARADIGMS
    assert {len(paradigm.pairs) for paradigm in paradigms} == {1000}
    assert len({paradigm.term for paradigm in paradigms}) == 13
    assert {paradigm.field for paradigm in paradigms} == {"syntax", "morphology", "semantics", "syntax_semantics"}


def test_the_hubs_form_is_the_files(tmp_path, monkeypatch):
    """A local copy of the hub's dataset: a configuration of Parquet rows per paradigm."""
    import datasets

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pairs = {"one": [("the cat runs", "the cat run"), ("a dog eats", "a dog eat")], "two": [("it sings", "it sing")]}
    dump(tmp_path / "files", pairs)
    copy = tmp_path / "copy"
    for uid in pairs:
        rows = [json.loads(line) for line in (tmp_path / "files" / f"{uid}.jsonl").read_text().splitlines()]
        plain = [{**{key: value for key, value in row.items() if key != "pairID"}, "pair_id": int(row["pairID"])}
                 for row in rows]  # fmt: skip
        (copy / uid).mkdir(parents=True)
        datasets.Dataset.from_list(plain).to_parquet(copy / uid / "train-00000-of-00001.parquet")
    configs = "".join(f"- config_name: {uid}\n  data_files: {uid}/*.parquet\n" for uid in pairs)
    (copy / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    found, expected = blimp._from_hub(None, str(copy)), blimp.read(tmp_path / "files")
    assert [(p.uid, p.term, p.pairs) for p in found] == [(p.uid, p.term, p.pairs) for p in expected]
    with pytest.raises(ValueError, match="cannot get BLiMP from .*absent.* write it as finetune.data"):
        blimp._from_hub(None, str(tmp_path / "absent"))
