"""The model card: what the run knows stands in it, the hub reads it back, and data cannot write Markdown."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

from frugalbert.config import Config, Export, Search
from frugalbert.measure import card

YAML = {
    "name": "docs-small",
    "corpus": {"sources": ["python-docs", "hub:allenai/c4"], "licence": "various, see <each> | package"},
    "tokenizer": {"vocab_size": 8192},
    "shards": {"length": [64]},
    "pretrain": {"budget": "5m", "arch": "modern 2x32 heads=2 ffn=64", "mask": {"rate": [0.3, 0.15]}},
    "finetune": {"tasks": ["python-docs", {"name": "cola", "train": "a.csv"}], "seeds": [0, 1, 2]},
    "export": {"licence": "Apache-2.0"},
}
RESULT = {
    "class": "FrugalForMaskedLM",
    "arch": "modern 2x32 heads=2 ffn=64",
    "parameters": 12_345,
    "flops_per_token": 67_890,
    "length": 128,
    "longest": 512,
    "tokenizer": "WordPiece, 8,192 tokens",
    "formats": {
        "hf": {"bytes": 1000, "stock": False, "why_not_stock": "query/key norms have no place",
               "max_abs_difference": 0.0},
        "onnx": {"bytes": 2000, "max_abs_difference": 2e-7},
        "onnx-int8": {
            "bytes": 700, "max_abs_difference": 0.02, "mean_cosine": 0.9991, "measured_on": "held-out text",
            "masked_tokens": 500, "masked_agreement": 0.97, "masked_accuracy": 0.3, "masked_accuracy_drop": 0.001,
            "dev_metric_drop": {"cola": {"metric": "accuracy", "fp32": 0.71, "int8": 0.7, "drop": 0.01}},
        },
    },
    "latency": [{"format": "onnx", "threads": 1, "batch_size": 1, "length": 128, "noisy": False,
                 "median_ms": 3.21, "p90_ms": 3.5}],
}  # fmt: skip


def row(task: str, init: str, mean: float | None, title: str | None = None) -> dict[str, Any]:
    std = None if mean is None else 0.01
    return {
        "task": task, "title": title or task, "type": "classification", "metric": "mcc", "init": init,
        "seeds": [0, 1, 2], "values": [mean] * 3, "mean": mean, "std": std, "interval": [mean, mean],
        "train_examples": 8000, "dev_examples": 1000, "majority_baseline": 0.1, "labels": ["a", "b"],
    }  # fmt: skip


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    """The directories that the stages before leave, in the parts that the card reads."""
    config = Config.model_validate(YAML)
    folders = {name: tmp_path / "docs-small" / name for name in card.STAGES if getattr(config, name) is not None}
    for name, folder in folders.items():
        folder.mkdir(parents=True)
        section = getattr(config, name).model_dump(mode="json")
        record = {"stage": name, "section": section, "fingerprint": f"{name}-hash", "versions": {"torch": "2.99"}}
        (folder / "stage.json").write_text(json.dumps(record))
    summary = {"steps": 900, "tokens": 7_372_800, "seconds": 301.0, "device": "cpu | 2 threads", "precision": "bf16",
               "final_validation_loss": 4.321, "unigram_nll": 6.5, "bigram_nll": 5.5}  # fmt: skip
    (folders["pretrain"] / "summary.json").write_text(json.dumps(summary))
    corpus = {"documents": 60_000, "characters": 30_000_000, "licence": YAML["corpus"]["licence"]}
    (folders["corpus"] / "index.json").write_text(json.dumps(corpus))
    results = [row("cola", "pretrained", 0.5), row("cola", "random", 0.1), row("python-docs", "pretrained", None)]
    (folders["finetune"] / "results.json").write_text(json.dumps(results))
    return folders


def test_the_hub_reads_it_back(inputs: dict[str, Path]):
    text = card.render(Export(licence="Apache-2.0"), inputs, RESULT)
    data = ModelCard(text).data
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "transformers", "fill-mask")
    assert data.datasets == ["allenai/c4"]
    assert data.base_model is None
    assert "custom_code" in data.tags
    (score,) = data.eval_results  # the undefined one and the baseline are no results
    assert (score.task_type, score.dataset_type, score.dataset_config) == (
        "text-classification",
        "nyu-mll/glue",
        "cola",
    )
    assert (score.metric_type, score.metric_value) == ("matthews_correlation", 0.5)
    assert score.metric_args == {"seeds": [0, 1, 2], "standard_deviation": 0.01}


def test_everything_known_is_said(inputs: dict[str, Path]):
    text = card.render(Export(licence="Apache-2.0"), inputs, RESULT)
    for fact in (
        "`modern 2x32 heads=2 ffn=64`", "12,345", "67.9k per token", "WordPiece, 8,192 tokens", "60,000 documents",
        "5m: 900 steps, 7,372,800 tokens in 5 min 01 s", "cpu \\| 2 threads", "0.5000 ± 0.0100", "0, 1, 2", "random",
        "undefined", "| 1 | 1 x 128 | 3.21 | 3.5 |", "torch 2.99", "pretrain `pretrain-hash`", "trust_remote_code=True",
        "query/key norms have no place", "97.0% of 500", "cola accuracy 0.7100 -> 0.7000", "frugalbert run card.yaml",
        "trained from random weights", "4.3210 nats", "various, see &lt;each&gt; \\| package", "at most 512 tokens",
    ):  # fmt: skip
        assert fact in text, fact


def test_the_host_is_nobodys_business(inputs: dict[str, Path]):
    assert platform.platform() not in card.render(Export(), inputs, RESULT).replace("\\", "")


def test_the_recipe_is_the_configuration(inputs: dict[str, Path]):
    text = card.render(Export(licence="Apache-2.0"), inputs, RESULT)
    recipe = yaml.safe_load(text.split("````yaml\n")[1].split("\n````")[0])
    assert Config.model_validate(recipe) == Config.model_validate(YAML)
    assert recipe["pretrain"].keys() == {"budget", "arch", "mask"}  # defaults are not repeated


def test_stock_files_need_no_code(inputs: dict[str, Path]):
    formats = {"hf": {"bytes": 1, "stock": True, "why_not_stock": None, "max_abs_difference": 0.0}}
    text = card.render(Export(), {"model": inputs["pretrain"]}, {**RESULT, "formats": formats, "class": "BertModel"})
    assert "trust_remote_code" not in text
    assert "custom_code" not in text
    assert "How it was trained is not known" in text
    assert ModelCard(text).data.pipeline_tag == "feature-extraction"


def test_a_fine_tuned_model_shows_its_own_task(inputs: dict[str, Path]):
    result = {**RESULT, "class": "BertForSequenceClassification", "task": "cola"}
    text = card.render(Export(), inputs, result)
    assert "fine-tuned on cola" in text
    assert "| python-docs |" not in text
    assert ModelCard(text).data.pipeline_tag == "text-classification"
    assert "AutoModelForSequenceClassification" in text


def test_other_licences_keep_their_name(inputs: dict[str, Path]):
    data = ModelCard(card.render(Export(licence="House Rules 1.0"), inputs, RESULT)).data
    assert (data.license, data.license_name) == ("other", "House Rules 1.0")


def test_a_local_parent_is_not_named_as_on_the_hub(inputs: dict[str, Path]):
    record = json.loads((inputs["pretrain"] / "stage.json").read_text())
    for start, base, shown in (
        ("/home/me/models/old", None, "| base model | old |"),
        ("org/name", "org/name", "org/name"),
    ):
        record["section"]["start"] = start
        (inputs["pretrain"] / "stage.json").write_text(json.dumps(record))
        text = card.render(Export(), inputs, RESULT)
        assert ModelCard(text).data.base_model == base
        assert shown in text


SEARCH = {
    "space": {"depth": [1, 2], "hidden": [32], "heads": [1, 2], "head_dim": [16], "ffn": [32, 64]},
    "supernet": {"budget": "10h"},
    "latency": {"length": 64},
    "search": {"limit": {"latency_ms": 8, "parameters": [1e5, 1e6]}},
}


def searched(
    inputs: dict[str, Path], measured: dict[str, Any], attention: dict[str, Any] | None = None, **pretrain: Any
) -> dict[str, Path]:
    """`inputs` with the stages of a search, and a pretraining of what it found."""
    more = {"attention": attention, "pretrain": {"budget": "5m", "arch": "from search", **pretrain}}
    config = Config.model_validate({**YAML, **SEARCH, **more})
    folders = {name: inputs["corpus"].parent / name for name in card.STAGES if getattr(config, name) is not None}
    for name, folder in folders.items():
        folder.mkdir(exist_ok=True)
        record = {"stage": name, "section": getattr(config, name).model_dump(mode="json"), "fingerprint": f"{name}-h"}
        (folder / "stage.json").write_text(json.dumps(record | {"metrics": {"architectures": 480}}))
    chosen = {"arch": "bert 2x32 heads=2 ffn=64", "latency_ms": 7.812, "violates": False, **measured}
    (folders["search"] / "search.json").write_text(json.dumps({"evaluations": 200, "chosen": chosen}))
    (folders["supernet"] / "summary.json").write_text(json.dumps({"steps": 9000, "tokens": 73_000_000}))
    return folders


def test_an_architecture_from_a_search_says_so(inputs: dict[str, Path]):
    assert "found by" not in card.render(Export(), inputs, RESULT)
    folders = searched(inputs, {"measured_ms": 7.954}, start="from search")
    text = card.render(Export(), folders, RESULT)
    assert (
        "| found by | search by evolution over 200 of 480 architectures, scored as slices of a super-network (budget "
        "10h: 9,000 steps, 73,000,000 tokens), within latency ms at most 8, parameters 100k to 1M. 7.81 ms predicted, "
        "7.95 ms measured. Training began with the slice's weights. |"
    ) in text
    assert "none: trained from random weights" in text
    assert ModelCard(text).data.base_model is None
    recipe = yaml.safe_load(text.split("````yaml\n")[1].split("\n````")[0])
    assert recipe["search"] == {"limit": {"latency_ms": [8.0], "parameters": [1e5, 1e6]}}
    assert Config.model_validate(recipe).search == Config.model_validate({**YAML, **SEARCH}).search


def test_learnt_masks_stand_in_the_card(inputs: dict[str, Path]):
    """They are no base model; a search before them is told as well; a pattern breaks no table and fills no page."""
    sparse = {"attention": {"arch": "from search", "start": "from search", "budget": "1h", "density": 0.1}}
    folders = searched(inputs, {}, arch="from attention", start="from attention", **sparse)
    masks = {"structure": "toeplitz", "density": 0.0983, "occupancy": {"64": 0.41}, "length": 1024}
    (folders["attention"] / "masks.json").write_text(json.dumps(masks))
    pattern = "toeplitz:0..3+17|toeplitz:" + "+".join(map(str, range(0, 90, 2)))
    text = card.render(Export(), folders, {**RESULT, "arch": f"bert 2x32 heads=2 ffn=64 pattern={pattern}"})
    assert "| architecture | `bert 2x32 heads=2 ffn=64 pattern=toeplitz:0..3+17\\|toeplitz:0+2+4+" in text
    assert "…` |" in text
    assert (
        "| attention | learnt masks (toeplitz): 9.8% of pairs and 41% of 64 x 64 blocks at 1,024 tokens. Training went "
        "on from the weights that learnt them. |"
    ) in text
    assert "| found by | search by evolution over 200 of 480 architectures" in text
    assert "none: trained from random weights" in text
    assert ModelCard(text).data.base_model is None
    recipe = yaml.safe_load(text.split("````yaml\n")[1].split("\n````")[0])
    assert Config.model_validate(recipe).attention is not None
    again = searched(inputs, {}, arch="from attention", attention=sparse["attention"] | {"start": "some/bert"})
    assert "Training began anew with them." in card.render(Export(), again, RESULT)


def test_short_trainings_and_a_teacher_stand_in_the_card(inputs: dict[str, Path]):
    """Extraction without a super-network or limits; a student of a hub model that began with a slice of it."""
    folders = searched(inputs, {"w": 0.1}, start="from teacher", objective="distill", distill={"teacher": "some/bert"})
    search = {
        "method": "extraction",
        "quality": "training",
        "training": {"steps": 50, "recipes": [{"learning_rate": 0.5}]},
        "limit": {},
    }
    section = Search.model_validate(search).model_dump(mode="json")
    (folders["search"] / "stage.json").write_text(
        json.dumps({"stage": "search", "section": section, "fingerprint": "s"})
    )
    (folders["supernet"] / "stage.json").unlink()
    text = card.render(Export(), folders, RESULT)
    assert (
        "| found by | search by extraction over 200 of 480 architectures, each trained from scratch for 50 steps. |"
    ) in text
    assert "| taught by | some/bert (weights: mlm 0.1, logits 0.5; temperature 2) |" in text
    assert ModelCard(text).data.base_model == "some/bert"


def test_a_missed_limit_stands_in_the_card(inputs: dict[str, Path]):
    text = card.render(Export(), searched(inputs, {"measured_ms": 8.4, "violates": True}), RESULT)
    assert "8.4 ms measured; the limit is missed." in text
    assert "Training began" not in text


@settings(derandomize=True, max_examples=100)
@given(st.text())
def test_text_of_data_stays_one_cell(text: str):
    cell = card.plain(text)
    assert len(cell.splitlines()) <= 1
    assert "<" not in cell
    assert "|" not in cell.replace("\\\\", "").replace("\\|", "")


def test_written_beside_every_form(inputs: dict[str, Path], tmp_path: Path):
    for name in RESULT["formats"]:
        (tmp_path / "out" / name).mkdir(parents=True)
    card.write(tmp_path / "out", Export(), inputs, RESULT)
    texts = {(tmp_path / "out" / name / "README.md").read_text() for name in RESULT["formats"]}
    assert len(texts) == 1
    assert ModelCard.load(tmp_path / "out" / "hf" / "README.md").data.model_name == "docs-small"
