"""A saved model carries its own code: it loads in a process that has no frugalbert, every head of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from frugalbert.model.arch import Arch
from frugalbert.model.configuration import AUTO_CLASSES, FrugalConfig
from tests.model.archs import CLASSES, VOCABULARY, build, tokens

ELSEWHERE = """
import sys
sys.modules["frugalbert"] = None  # an import of it fails
import torch, transformers
folder = sys.argv[1]
ids = torch.load(f"{folder}/ids")
results = {}
def load(auto, place):
    model = getattr(transformers, auto).from_pretrained(f"{folder}/{place}", trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    with torch.no_grad():
        results[auto, place] = model(ids)[0]
    return model
load("AutoModelForMaskedLM", "first").save_pretrained(f"{folder}/second")
load("AutoModelForMaskedLM", "second")
load("AutoModel", "first")
load("AutoModelForSequenceClassification", "first")
torch.save(results, f"{folder}/results")
"""
AUTO = {
    "encoder": "AutoModel",
    "mlm": "AutoModelForMaskedLM",
    "rtd": "AutoModelForPreTraining",
    "pairs": "AutoModelForPreTraining",
    "sequence": "AutoModelForSequenceClassification",
    "choice": "AutoModelForMultipleChoice",
    "token": "AutoModelForTokenClassification",
    "span": "AutoModelForQuestionAnswering",
}


def test_it_loads_without_us(tmp_path):
    """A pre-trained masked LM is found by every Auto class that starts from its encoder, and saved again in full."""
    line = "modern 2x16 hidden=16,8 heads=2 head_dim=4 ffn=24 pattern=dense,window:2 token_types=2"
    model, ids = build(line, "mlm"), tokens(2, 7)
    model.save_pretrained(tmp_path / "first")
    torch.save(ids, tmp_path / "ids")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    results = torch.load(tmp_path / "results")
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(results["AutoModelForMaskedLM", "first"], expected)
        assert torch.equal(results["AutoModelForMaskedLM", "second"], expected)
        assert torch.equal(results["AutoModel", "first"], model.model(ids).last_hidden_state)
    assert results["AutoModelForSequenceClassification", "first"].shape == (2, 2)


@pytest.mark.parametrize("head", CLASSES)
def test_every_head_survives_saving(head: str, tmp_path):
    model = build("bert-preln 2x16 heads=2 ffn=24", head, num_labels=3)
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    module, name = settings["auto_map"][AUTO[head]].split(".")
    assert name == type(model).__name__
    assert set(settings["auto_map"]) == set(AUTO_CLASSES) == {"AutoConfig", *AUTO.values()}
    assert (tmp_path / f"{module}.py").is_file()
    again = CLASSES[head].from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    ids = tokens(1, 2, 5) if head == "choice" else tokens(2, 5)
    with torch.no_grad():
        # Close, not equal: products of one column depend on where in memory the weights lie, on some processors.
        torch.testing.assert_close(model(ids)[0], again.eval()(ids)[0])


def test_the_configuration_says_it_in_hugging_faces_words(tmp_path):
    arch = Arch.parse("modern 3x16 hidden=16,8,8 heads=2,4,4 head_dim=4 ffn=24,30,9 max_length=64")
    config = FrugalConfig.from_arch(arch, VOCABULARY, pad_token_id=3, dropout=0.1, num_labels=4)
    config.save_pretrained(tmp_path)
    again = FrugalConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert again.to_arch() == arch
    assert (again.hidden_size, again.num_hidden_layers, again.num_attention_heads) == (16, 3, 4)
    assert (again.intermediate_size, again.max_position_embeddings, again.type_vocab_size) == (30, 64, 0)
    assert (again.hidden_dropout_prob, again.attention_probs_dropout_prob, again.num_labels) == (0.1, 0.1, 4)
    assert again.pad_token_id == 3


def test_the_text_of_the_architecture_rules(tmp_path):
    """A config.json edited by hand cannot contradict itself: the other names follow from `arch`."""
    FrugalConfig.from_arch(Arch.parse("bert-tiny"), VOCABULARY).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "hidden_size": 77}))
    assert FrugalConfig.from_pretrained(tmp_path).hidden_size == 128
    path.write_text(json.dumps({**json.loads(path.read_text()), "arch": "bert 2x128 heads=2"}))
    with pytest.raises(ValueError, match="needs ffn"):
        FrugalConfig.from_pretrained(tmp_path)
