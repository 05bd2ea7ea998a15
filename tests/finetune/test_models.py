"""Models of our own type and others: what is loaded, what is drawn anew, what is saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from frugalbert import config, run
from frugalbert.finetune import models, runner
from frugalbert.finetune.tasks import Data, resolve
from tests.finetune.test_runner import check_saved_model, section, write_task

ARCHS = [
    "modern 1x32 heads=2 ffn=48 max_length=64",
    "bert 1x32 heads=2 ffn=48 max_length=64",
    "bert-preln 1x32 heads=2 ffn=48 max_length=64",
]
DATA = Data(resolve(["sst2"])[0], ("negative", "positive"), {"train": [], "dev": []})


@pytest.fixture(params=ARCHS, ids=lambda text: text.split()[0])
def ours(request, tiny, tmp_path) -> Path:
    """A masked-LM checkpoint of each family, as pre-training leaves it."""
    from frugalbert.model.arch import Arch
    from frugalbert.model.configuration import FrugalConfig
    from frugalbert.model.modeling import FrugalForMaskedLM

    tokenizer = models.open_source(str(tiny), None).tokenizer
    torch.manual_seed(5)
    path = tmp_path / "pretrain" / "model"
    FrugalForMaskedLM(FrugalConfig.from_arch(Arch.parse(request.param), len(tokenizer))).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_the_encoder_is_loaded_and_the_head_is_new(ours):
    from safetensors.torch import load_file

    source = models.open_source(str(ours), None)
    saved = load_file(ours / "model.safetensors")
    loaded, other, random = (models.build(source, DATA, init, 0.1, seed).state_dict()
                             for init, seed in (("pretrained", 0), ("pretrained", 1), ("random", 0)))  # fmt: skip
    encoder = [name for name in loaded if name.startswith("model.") and "pooler" not in name]
    assert len(encoder) >= 8
    for name in encoder:
        assert torch.equal(loaded[name], saved[name])
    words = "model.embeddings.word.weight"
    assert not torch.equal(random[words], saved[words])
    assert random.keys() == loaded.keys()
    assert not torch.equal(loaded["classifier.weight"], other["classifier.weight"])
    assert {value.dtype for value in loaded.values()} == {torch.float32}


def test_dropout_and_classes_reach_the_configuration(ours, tiny):
    for path in (ours, tiny):
        source = models.open_source(str(path), None)
        settings = models.headed(source.config, DATA, 0.25)
        assert (settings.hidden_dropout_prob, settings.attention_probs_dropout_prob) == (0.25, 0.25)
        assert settings.id2label == {0: "negative", 1: "positive"}
        assert settings.label2id == {"negative": 0, "positive": 1}
        assert source.config.hidden_dropout_prob != 0.25


def test_a_run_of_our_own_model(ours, tmp_path):
    """From the pretrain stage's directory, without `finetune.model`; the result loads through Auto classes."""
    out = tmp_path / "out"
    out.mkdir()
    given = section(ours, [write_task(tmp_path)], seeds=[0]).model_copy(update={"model": None})
    inputs = {"yaml": tmp_path, "pretrain": tmp_path / "pretrain"}
    headlines = runner.build(given, inputs, out, config.Machine(device="cpu", threads=1))
    assert set(headlines["classification"]) == {"metric", "pretrained", "random"}
    assert run.read_json(out / "classification" / "model" / "config.json")["model_type"] == "frugalbert"
    check_saved_model(out / "classification", tmp_path / "classification.jsonl", "classification")


def test_the_tokenizer_stage_helps_where_the_model_brings_none(tiny, tmp_path):
    import shutil

    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    for path in model.glob("token*"):
        path.unlink()
    assert len(models.open_source(str(model), tiny).tokenizer) == len(models.open_source(str(tiny), None).tokenizer)


def test_a_damaged_tokenizer_is_one_sentence(tiny, tmp_path):
    import shutil

    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    (model / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(ValueError, match=r"has no tokenizer that can be used \(.+\); save its own") as error:
        models.open_source(str(model), None)
    assert "\n" not in str(error.value)


def test_a_tokenizer_of_another_model_is_refused(tiny, tmp_path):
    import shutil

    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    settings = run.read_json(model / "config.json")
    run.write_json(model / "config.json", {**settings, "vocab_size": 100})
    with pytest.raises(
        ValueError, match=r"has no tokenizer that can be used \(it has \d+ tokens, the model 100 embeddings\)"
    ):
        models.open_source(str(model), None)


def test_roberta_counts_positions_after_its_padding_id(tiny):
    from transformers import RobertaConfig

    source = models.open_source(str(tiny), None)
    assert source.max_positions == 64
    roberta = models.Source("x", RobertaConfig(max_position_embeddings=514, type_vocab_size=1), source.tokenizer, "")
    assert (roberta.max_positions, roberta.has_types) == (512, False)
