"""The stage that trains a super-network: it learns at every size, continues, agrees among ranks, refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from frugalbert.config import Machine, Supernet
from frugalbert.data.masking import Vocabulary
from frugalbert.data.tokenizer import load as load_tokenizer
from frugalbert.model import slicing
from frugalbert.model.arch import Arch
from frugalbert.model.modeling import FrugalForMaskedLM
from frugalbert.space import Space
from frugalbert.train import inherited, supernet
from frugalbert.train.batches import HeldOut
from tests.train import small_run, super_run, toy
from tests.train.test_ranks import launch

ROOT = Path(__file__).resolve().parents[2]
LONG = {"budget": "300steps", "checkpoints": {"every": "1000steps"}, "optimizer": "muon", "batch_size": 16,
        "mask": {"rate": [0.3, 0.15]},
        "validation": {"every": 0.0, "begin_every": 0.0, "end_every": 0.0, "rows": 64}}  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return super_run.prepare(tmp_path_factory.mktemp("inputs"), documents=600)


@pytest.fixture(scope="module")
def trained(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("trained")
    return out, super_run.run(inputs, out, **LONG)


@pytest.fixture(scope="module")
def teacher(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("teacher")
    small_run.run(inputs, out, **LONG, arch="modern 2x32 heads=2 head_dim=8 ffn=48")
    return out / "model"


def test_largest_median_and_smallest_beat_the_unigram(trained: tuple[Path, dict[str, Any]]):
    """Spec D; without distillation from the largest the smallest would learn from the text alone."""
    figures = trained[1]["final_validation"]
    for suffix in ("", "_median", "_smallest"):
        assert figures[f"validation_loss{suffix}"] < trained[1]["unigram_nll"]
    assert figures["validation_loss"] < figures["validation_loss_smallest"]
    assert set(trained[1]["final_validation"]) >= {"validation_accuracy", "validation_accuracy_smallest"}


def test_it_leaves_an_ordinary_model_and_logs_both_losses(trained: tuple[Path, dict[str, Any]]):
    model = FrugalForMaskedLM.from_pretrained(trained[0] / "model")
    assert model.config.to_arch() == Space.from_json(super_run.SPACE).largest()
    lines = [line for line in toy.lines(trained[0]) if "text_loss" in line]
    assert lines[-1]["text_loss"] < lines[0]["text_loss"]
    assert lines[-1]["text_loss"] < lines[-1]["loss"]  # the loss has the distance to the largest on top


def test_a_slice_is_scored_as_the_extracted_model_would_be(
    trained: tuple[Path, dict[str, Any]], inputs: dict[str, Path], tmp_path: Path
):
    arch = Arch.parse("modern 1x24 heads=2 head_dim=8 ffn=32")
    task = {
        "supernet": str(trained[0]),
        "arch": str(arch),
        "rows": 16,
        "quality": "loss",
        "device": "cpu",
        "threads": 0,
    }
    score = inherited.score(task | {name: str(inputs[name]) for name in ("shards", "tokenizer", "yaml")})
    alone = inherited.extract(trained[0], arch).eval()
    words = Vocabulary.from_tokenizer(load_tokenizer(inputs["tokenizer"]))
    held_out = HeldOut(inputs["shards"], 32, words, 16, at_end=True)
    with torch.no_grad():
        losses = [
            alone(
                batch.input_ids, position_ids=batch.position_ids, document_ids=batch.document_ids,
                masked_positions=batch.masked_positions, labels=batch.labels,
            ).loss.item()
            for batch in held_out.batches([(0, 16)])
        ]  # fmt: skip
    assert score == pytest.approx(losses[0], abs=1e-5)
    fresh = FrugalForMaskedLM(alone.config).eval()
    with torch.no_grad():
        batch = next(held_out.batches([(0, 16)]))
        start = fresh(batch.input_ids, document_ids=batch.document_ids, position_ids=batch.position_ids,
                      masked_positions=batch.masked_positions, labels=batch.labels).loss.item()  # fmt: skip
    assert score < start - 0.5  # what it inherits beats what it would begin with


def test_rows_of_the_search_are_not_those_of_validation(inputs: dict[str, Path]):
    words = Vocabulary.from_tokenizer(load_tokenizer(inputs["tokenizer"]))
    total = HeldOut(inputs["shards"], 32, words, 10**6)
    half = len(total.row_ids) // 2
    one = HeldOut(inputs["shards"], 32, words, half)
    other = HeldOut(inputs["shards"], 32, words, half, at_end=True)
    assert not set(one.row_ids) & set(other.row_ids)


@pytest.mark.parametrize("sampling", ["sandwich", "random"])
def test_two_ranks_train_as_one(sampling: str, inputs: dict[str, Path], tmp_path: Path):
    settings = {"sampling": sampling, "budget": "4steps"}
    super_run.run(inputs, tmp_path / "one", **settings)
    options = json.dumps(settings)
    launch_stage(inputs["yaml"], tmp_path / "two", options)
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two"))
    for name, weights in one.items():
        torch.testing.assert_close(two[name], weights, rtol=0, atol=2e-5)


def launch_stage(folder: Path, out: Path, options: str) -> None:
    launch(folder, 2, command=[sys.executable, "-m", "tests.train.super_run", str(folder), str(out), options])


# ---- starting from a trained encoder ---------------------------------------------------------------------------------


def test_important_units_come_first(inputs: dict[str, Path], teacher: Path):
    """Of a trained encoder, a slice with its most important feed-forward units loses less than one with the others;
    the whole is the same function as before."""
    words = Vocabulary.from_tokenizer(load_tokenizer(inputs["tokenizer"]))
    batch = next(HeldOut(inputs["shards"], 32, words, 64).batches([(0, 64)]))
    plain = {"input_ids": batch.input_ids, "document_ids": batch.document_ids, "labels": batch.labels,
             "position_ids": batch.position_ids, "masked_positions": batch.masked_positions}  # fmt: skip
    space, small = Space.from_json(super_run.SPACE), Arch.parse("modern 2x32 heads=2 head_dim=8 ffn=16")

    def network(reorder: bool) -> Any:
        section = Supernet.model_validate({**super_run.SECTION, "start": str(teacher), "reorder": reorder})
        return supernet.make_network(section, space, inputs, words).eval()

    model, before = network(True), network(False)
    with torch.no_grad():
        whole = before(**plain).loss.item()
        assert model(**plain).loss.item() == pytest.approx(whole, abs=1e-4)
        first = slicing.forward(model, small, **plain).loss.item()
        slicing.reorder(model, {"ffn": [torch.arange(48).flip(0)] * 2})
        last = slicing.forward(model, small, **plain).loss.item()
    assert whole < first < last - 0.05


# ---- learning from a teacher -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("distill", [["attention", "hidden"], ["relation"]])
def test_every_size_learns_from_a_teacher(distill: list[str], inputs: dict[str, Path], teacher: Path, tmp_path: Path):
    before = (teacher / "model.safetensors").read_bytes()
    places = {**inputs, "space": super_run.write_space(tmp_path / "space", heads=[2], head_dim=[8, 12])}
    values = {**LONG, "budget": "100steps", "teacher": str(teacher), "distill": distill, "relation_heads": 4}
    summary = super_run.run(places, tmp_path / "out", **{**values, "mask": {"rate": [0.0]}})
    lines = [line["loss"] for line in toy.lines(tmp_path / "out") if "loss" in line]
    assert sum(lines[-10:]) < 0.9 * sum(lines[:10])  # single batches differ by the sizes they train
    assert summary["final_validation_accuracy"] is None
    assert (teacher / "model.safetensors").read_bytes() == before
    assert (tmp_path / "out" / "fit.safetensors").exists()
    task = {"supernet": str(tmp_path / "out"), "rows": 16, "quality": "distillation", "device": "cpu", "threads": 0}
    task |= {name: str(places[name]) for name in ("shards", "tokenizer", "yaml")}
    largest, smallest = (inherited.score(task | {"arch": text}) for text in (
        "modern 2x32 heads=2 head_dim=12 ffn=48", "modern 1x16 heads=2 head_dim=8 ffn=16"))  # fmt: skip
    final = summary["final_validation"]
    assert (final["validation_loss"], final["validation_loss_smallest"]) == pytest.approx((largest, smallest), rel=0.2)


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "space", "words"),
    [
        ({"sampling": "all"}, {"hidden": list(range(16, 33))}, "but the space has 204"),
        ({"teacher": "nowhere"}, {}, "supernet.teacher nowhere is neither"),
        ({"teacher": "TEACHER"}, {}, "the teacher has 2; write space.heads: 2"),
        ({"teacher": "TEACHER", "distill": ["relation"], "relation_heads": 5}, {"heads": [2]}, "does not divide"),
        ({"teacher": "OTHER"}, {"heads": [2]}, "supernet.teacher .* has 50 tokens, the tokenizer 96"),
        ({"start": "OTHER"}, {}, "50 tokens, the tokenizer 96"),
    ],
)
def test_what_cannot_work_is_one_sentence(
    values: dict[str, Any], space: dict[str, Any], words: str, inputs: dict[str, Path], teacher: Path, tmp_path: Path
):
    from frugalbert.model.configuration import FrugalConfig

    FrugalForMaskedLM(FrugalConfig.from_arch(Arch.parse("bert 1x8 heads=2 ffn=8"), 50)).save_pretrained(tmp_path / "o")
    places = {**inputs, "space": super_run.write_space(tmp_path / "space", **space)}
    names = {"TEACHER": str(teacher), "OTHER": str(tmp_path / "o")}
    values = {key: names.get(value, value) if isinstance(value, str) else value for key, value in values.items()}
    with pytest.raises(ValueError, match=words):
        super_run.run(places, tmp_path / "out", **values)


def test_spread_parameters_are_refused(inputs: dict[str, Path], tmp_path: Path):
    section = Supernet.model_validate(super_run.SECTION)
    with pytest.raises(ValueError, match="write ddp"):
        supernet.build(section, inputs, tmp_path, Machine(strategy="fsdp", device="cpu"))


def test_electra_teaches_as_it_is(inputs: dict[str, Path], tmp_path: Path):
    """AutoTinyBERT's own teacher: a discriminator, whose encoder is taken over exactly; a damaged one is refused."""
    from transformers import ElectraConfig, ElectraForPreTraining

    words = Vocabulary.from_tokenizer(load_tokenizer(inputs["tokenizer"]))
    sizes = {"hidden_size": 32, "embedding_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
    electra = ElectraForPreTraining(ElectraConfig(vocab_size=words.size, num_hidden_layers=2, **sizes)).eval()
    electra.save_pretrained(tmp_path / "electra")
    section = Supernet.model_validate({**super_run.SECTION, "teacher": "electra", "distill": ["attention"]})
    space = Space.from_json({**super_run.SPACE, "heads": [2]})
    found = supernet.load_teacher(section, space, tmp_path, words)
    ids = torch.randint(5, words.size, (2, 9))
    with torch.no_grad():
        assert torch.equal(found(ids).last_hidden_state, electra.electra(ids).last_hidden_state)
    weights = tmp_path / "electra" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"supernet.teacher electra cannot be loaded \(.*\); copy it again"):
        supernet.load_teacher(section, space, tmp_path, words)


def test_no_masks_without_a_teacher_are_refused():
    with pytest.raises(ValueError, match="teacher"):
        Supernet.model_validate({**super_run.SECTION, "mask": {"rate": [0.0]}})
