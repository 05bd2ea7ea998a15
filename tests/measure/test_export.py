"""`frugalbert export`: every form gives the model's numbers and loads elsewhere; bad input leaves nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard

from frugalbert.config import Export
from frugalbert.measure import export
from frugalbert.measure.export import export_model
from frugalbert.measure.models import load_model
from tests.measure.conftest import edit_config

FRESH = """
import json, sys
sys.modules["frugalbert"] = None
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer
folder, trust = sys.argv[1], sys.argv[2] == "trust"
tokenizer = AutoTokenizer.from_pretrained(folder)
batch = tokenizer(["word7 word9 [MASK]", "word3"], padding=True, return_tensors="pt")
model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=trust).eval()
with torch.inference_mode():
    logits = model(**batch).logits
real = batch["attention_mask"].bool()
print(json.dumps({"class": type(model).__name__, "logits": logits[real].tolist()}))
"""


def logits_elsewhere(folder: Path, cwd: Path, trust: str = "") -> dict[str, object]:
    """What a process without frugalbert computes from an exported directory."""
    command = [sys.executable, "-c", FRESH, str(folder), trust]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def logits_here(folder: Path, tokenizer: Path) -> np.ndarray:
    import torch
    from transformers import AutoTokenizer

    batch = AutoTokenizer.from_pretrained(tokenizer)(["word7 word9 [MASK]", "word3"], padding=True, return_tensors="pt")
    model = load_model(folder)
    with torch.inference_mode():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits[batch["attention_mask"].bool()].numpy()


def test_all_forms(stock_export: Path, stock_dir: Path):
    result = json.loads((stock_export / "export.json").read_text())
    formats = result["formats"]
    assert formats["hf"] | {"bytes": 0} == {
        "bytes": 0, "stock": True, "why_not_stock": None, "class": "BertForMaskedLM", "max_abs_difference": 0.0,
    }  # fmt: skip
    assert formats["onnx"]["max_abs_difference"] < 2e-5
    assert 0.99 < formats["onnx-int8"]["mean_cosine"] < 1.0
    assert formats["onnx-int8"]["bytes"] < 0.6 * formats["onnx"]["bytes"]
    assert formats["onnx"]["bytes"] == (stock_export / "onnx" / "model.onnx").stat().st_size
    assert result["parameters"] == sum(parameter.numel() for parameter in load_model(stock_dir).parameters())
    for name in formats:
        there = {path.name for path in (stock_export / name).iterdir()}
        assert {"README.md", "config.json", "tokenizer.json", "tokenizer_config.json"} <= there
        assert (stock_export / name / "tokenizer.json").read_bytes() == (stock_dir / "tokenizer.json").read_bytes()
    assert ModelCard.load(stock_export / "hf" / "README.md").data.license == "mit"
    assert not list(stock_export.parent.glob(".tmp-*"))


def test_tokenizer_loads_beside_the_onnx_file(stock_export: Path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(stock_export / "onnx-int8")
    assert tokenizer("word7 word9")["input_ids"] == [2, 12, 14, 3]


def test_again_with_fewer_formats(stock_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An earlier export is replaced, and without ONNX nothing of its packages is needed."""
    monkeypatch.setattr(export.onnx, "export_onnx", None)
    out = tmp_path / "out"
    (out / "onnx").mkdir(parents=True)
    (out / "export.json").write_text("{}")
    found = export_model(stock_dir, Export(formats=("hf",)), out)
    assert sorted(path.name for path in out.iterdir()) == ["export.json", "hf"]
    assert found["hf_bytes"] > 0


# ---- bad input ------------------------------------------------------------------------------------------------------


def refused(folder: Path, tmp_path: Path, words: str, section: Export | None = None, out: Path | None = None) -> None:
    out = out or tmp_path / "out"
    before = sorted(out.rglob("*")) if out.exists() else None
    with pytest.raises(ValueError, match=words) as caught:
        export_model(folder, section or Export(formats=("hf",)), out)
    assert len(str(caught.value).splitlines()) == 1
    assert (sorted(out.rglob("*")) if out.exists() else None) == before
    assert not list(tmp_path.glob(".tmp-*"))


def test_paths_that_are_no_models(tmp_path: Path):
    refused(tmp_path / "absent", tmp_path, "does not exist; name a model directory")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", tmp_path, "is a file; name a model directory")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path, "is not a model: it has no config.json")


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": 3}', "{}"])
def test_configs_that_are_none(broken_model: Path, tmp_path: Path, text: str):
    (broken_model / "config.json").write_text(text)
    refused(broken_model, tmp_path, r"config.json does not describe a model")


def test_weights_that_are_not_there(broken_model: Path, tmp_path: Path):
    (broken_model / "model.safetensors").rename(broken_model / "pytorch_model.bin")
    refused(broken_model, tmp_path, r"has no model.safetensors \(pickled weights are not read\)")


@pytest.mark.parametrize("damage", ["cut", "empty", "huge header", "text"])
def test_damaged_weights(broken_model: Path, tmp_path: Path, damage: str):
    path = broken_model / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "text": b"no weights here at all",
                      "huge header": b"\xff" * 8 + data[8:]}[damage])  # fmt: skip
    refused(broken_model, tmp_path, "is damaged")


def test_weights_of_another_architecture(broken_model: Path, tmp_path: Path):
    edit_config(broken_model, num_hidden_layers=3)
    refused(broken_model, tmp_path, "weights of its config.json are missing, the first is bert.encoder.layer.2")
    edit_config(broken_model, num_hidden_layers=2, intermediate_size=48)
    refused(broken_model, tmp_path, "is damaged")


def test_code_of_others_is_not_run(broken_model: Path, tmp_path: Path):
    (broken_model / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\nclass M: pass\n")
    edit_config(broken_model, model_type="evil", auto_map={"AutoConfig": "evil.C", "AutoModel": "evil.M"})
    refused(broken_model, tmp_path, "brings its own code, which is never run here")
    edit_config(broken_model, model_type="evil", auto_map=None)
    refused(broken_model, tmp_path, "'evil', which is not known")
    edit_config(broken_model, model_type="t5", is_encoder_decoder=True)
    refused(broken_model, tmp_path, "is an encoder-decoder")
    assert not (tmp_path / "ran").exists()


def test_places_that_are_taken(broken_model: Path, tmp_path: Path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    refused(broken_model, tmp_path, "is no earlier export", out=tmp_path / "mine")
    refused(broken_model, tmp_path, "is no earlier export", out=broken_model)
    (broken_model.parent / "export.json").write_text("{}")
    refused(broken_model, tmp_path, "contains the model itself", out=broken_model.parent)


def test_a_task_belongs_to_a_run(broken_model: Path, tmp_path: Path):
    refused(broken_model, tmp_path, "export.task names a task of a run", Export(task="cola"))


def test_missing_extra_is_named(broken_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from frugalbert.measure import session

    monkeypatch.setattr(session, "find_spec", lambda name: None)
    refused(broken_model, tmp_path, r"pip install 'frugalbert\[onnx\]'", Export())
