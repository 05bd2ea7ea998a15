"""`frugalbert export`: every form gives the model's numbers and loads elsewhere; bad input leaves nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard

from frugalbert.config import Export, Machine
from frugalbert.measure import export
from frugalbert.measure.export import export_model
from frugalbert.measure.models import copy_tokenizer, load_model
from tests.measure.conftest import edit_config, spread_out

FRESH = """
import json, sys
sys.modules["frugalbert"] = None
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer
for folder, trust in json.loads(sys.argv[1]):
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    batch = tokenizer(["word7 word9 [MASK]", "word3"], padding=True, return_tensors="pt")
    model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=trust).eval()
    with torch.inference_mode():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    found = logits[batch["attention_mask"].bool()].tolist()
    print("\\n" + json.dumps({"class": type(model).__name__, "logits": found}))
print("\\n" + json.dumps(AutoTokenizer.from_pretrained(sys.argv[2])("word7 word9")["input_ids"]))
"""


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
        "parameters": result["parameters"],
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
        modes = {path.stat().st_mode & 0o777 for path in (stock_export / name).iterdir()}
        assert len(modes) == 1  # weights are as readable as their card
    assert ModelCard.load(stock_export / "hf" / "README.md").data.license == "mit"
    assert not list(stock_export.parent.glob(".tmp-*"))


def test_the_stage(run_export: tuple[Path, dict], run_inputs: dict[str, Path]):
    out, headline = run_export
    result = json.loads((out / "export.json").read_text())
    formats = result["formats"]
    assert formats["hf"]["stock"]
    assert formats["hf"]["class"] == "BertForMaskedLM"
    assert formats["hf"]["max_abs_difference"] < 1e-5
    assert formats["hf"]["parameters"] > result["parameters"]  # 48 of 64 feed-forward channels: padded with zeros
    assert f"`hf/` has {formats['hf']['parameters']:,} parameters" in (out / "hf" / "README.md").read_text()
    int8 = formats["onnx-int8"]
    assert int8["measured_on"] == "held-out text"
    assert int8["masked_tokens"] > 20
    assert 0.5 < int8["masked_agreement"] <= 1.0
    drop = int8["dev_metric_drop"]["updown"]
    assert (drop["metric"], drop["examples"]) == ("accuracy", 30)
    assert drop["agreement"] > 0.8
    assert drop["drop"] == pytest.approx(drop["fp32"] - drop["int8"])
    assert set(result["tasks"]["updown"]) == {"hf", "onnx", "onnx-int8"}
    assert {row["format"] for row in result["latency"]} == {"hf", "onnx", "onnx-int8"}
    assert headline["parameters"] == result["parameters"]
    assert headline["int8_mean_cosine"] == int8["mean_cosine"]
    assert sorted(path.name for path in out.iterdir()) == ["export.json", "hf", "onnx", "onnx-int8", "tasks"]


def test_in_a_process_without_us(run_export: tuple[Path, dict], run_inputs: dict[str, Path], tmp_path: Path):
    """Stock files load as they are; what no stock class can be goes with its own code, and the card says so."""
    from frugalbert.model.arch import Arch
    from frugalbert.model.configuration import FrugalConfig
    from frugalbert.model.modeling import FrugalForMaskedLM

    source, out = tmp_path / "source", tmp_path / "out"
    arch = Arch.parse("modern 2x32 hidden=32,16 heads=2 ffn=40 max_length=64")
    spread_out(FrugalForMaskedLM(FrugalConfig.from_arch(arch, 256))).save_pretrained(source)
    copy_tokenizer([run_inputs["tokenizer"]], source)
    export_model(source, Export(formats=("hf",)), out)
    hf = json.loads((out / "export.json").read_text())["formats"]["hf"]
    assert not hf["stock"]
    assert "one hidden size" in hf["why_not_stock"]
    assert "trust_remote_code=True" in (out / "hf" / "README.md").read_text()

    folders = [(str(run_export[0] / "hf"), False), (str(out / "hf"), True)]
    command = [sys.executable, "-c", FRESH, json.dumps(folders), str(run_export[0] / "onnx")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    stock, ours, ids = (json.loads(line) for line in done.stdout.splitlines() if line[:1] in ("{", "["))
    assert (stock["class"], ours["class"]) == ("BertForMaskedLM", "FrugalForMaskedLM")
    for found, folder in ((stock, run_inputs["pretrain"] / "model"), (ours, source)):
        expected = logits_here(folder, run_inputs["tokenizer"])
        np.testing.assert_allclose(found["logits"], expected, rtol=0, atol=1e-5)
    assert ids == [2, 12, 14, 3]


def test_a_task_that_was_not_fine_tuned(run_inputs: dict[str, Path], tmp_path: Path):
    with pytest.raises(ValueError, match=r"no fine-tuned model of 'cola' in this run; there are updown"):
        export.build(Export(task="cola"), run_inputs, tmp_path, Machine())
    assert not list(tmp_path.iterdir())


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


@pytest.mark.fault("S11")
@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": 3}', "{}"])
def test_configs_that_are_none(broken_model: Path, tmp_path: Path, text: str):
    (broken_model / "config.json").write_text(text)
    refused(broken_model, tmp_path, r"config.json does not describe a model")


@pytest.mark.fault("S1")
def test_weights_that_are_not_there(broken_model: Path, tmp_path: Path):
    (broken_model / "model.safetensors").rename(broken_model / "pytorch_model.bin")
    refused(broken_model, tmp_path, r"has no model.safetensors \(pickled weights are not read\)")


@pytest.mark.fault("S11")
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


@pytest.mark.fault("S3")
def test_code_of_others_is_not_run(broken_model: Path, tmp_path: Path):
    (broken_model / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\nclass M: pass\n")
    edit_config(broken_model, model_type="evil", auto_map={"AutoConfig": "evil.C", "AutoModel": "evil.M"})
    refused(broken_model, tmp_path, "brings its own code, which is never run here")
    edit_config(broken_model, model_type="bert")
    assert type(load_model(broken_model)).__name__ == "BertForMaskedLM"
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
