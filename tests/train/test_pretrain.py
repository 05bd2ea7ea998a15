"""The stage itself on a small text: it learns, continues, changes row length, trains ELECTRA, refuses what it must."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from frugalbert import dist
from frugalbert.config import Mask
from frugalbert.data.masking import IGNORED, Vocabulary
from frugalbert.data.tokenizer import digest, load
from frugalbert.model.arch import Arch
from frugalbert.train import assemble, batches, pretrain
from frugalbert.train.batches import HeldOut, Sampler, mask_rate, my_pieces, shares
from frugalbert.train.objectives import MaskedLM, generator_arch
from tests.train import small_run, toy

QUIET = {"every": 0.0, "begin_every": 0.0, "end_every": 0.0}  # validation only at the end


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return small_run.prepare(tmp_path_factory.mktemp("inputs"), lengths=(32, 64))


@pytest.fixture(scope="module")
def trained(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("trained")
    return out, small_run.run(inputs, out)


def sampler_of(inputs: dict[str, Path], **values: Any) -> Sampler:
    section = small_run.section(**values)
    words = Vocabulary.from_tokenizer(load(inputs["tokenizer"]))
    lengths = assemble.row_lengths(section, inputs["shards"])
    return Sampler(section, inputs["shards"], lengths, words, digest(inputs["tokenizer"]))


# ---- what comes out --------------------------------------------------------------------------------------------------


def test_what_a_finished_stage_leaves(trained: tuple[Path, dict[str, Any]]):
    out, summary = trained
    names = {path.name for path in out.iterdir()}
    assert names == {"checkpoints", "markers", "metrics.jsonl", "model", "parameters.txt", "summary.json"}
    lines = toy.lines(out)
    train = [line for line in lines if "loss" in line]
    assert [line["step"] for line in train] == list(range(1, 21))
    keys = {
        "step",
        "progress",
        "seconds",
        "tokens",
        "loss",
        "learning_rate",
        "grad_norm",
        "tokens_per_second",
        "mask_rate",
    }
    assert keys <= train[0].keys()
    last = [line for line in lines if "validation_loss" in line][-1]
    assert (last["step"], last["progress"]) == (20, 1.0)
    assert summary["final_validation_loss"] == last["validation_loss"]
    assert summary["tokens"] == train[-1]["tokens"] == last["tokens"]
    assert summary["parameters"] > summary["embedding_parameters"] + summary["encoder_parameters"]
    assert set(summary["cost_seconds"]) == {"train", "wait", "validation", "checkpoint", "compile", "probe", "setup"}
    assert sum(summary["cost_seconds"].values()) <= summary["seconds"] + 1
    assert 0 < summary["flop_utilisation_of_measured_ceiling"] < 1
    assert (summary["precision"], summary["micro_batch"], summary["threads"]) == ("fp32", 4, 1)
    assert summary["device"] == summary["cpu"] == dist.processor_name()
    assert train[-1]["loss"] < train[0]["loss"]


def test_every_model_folder_is_for_hugging_face(trained: tuple[Path, dict[str, Any]], inputs: dict[str, Path]):
    """Checkpoints, markers and the result load, and the result is what was validated."""
    from transformers import AutoTokenizer

    from frugalbert.model.modeling import FrugalForMaskedLM

    out, summary = trained
    folders = [out / "model", out / "markers" / "progress-0.50", out / "checkpoints" / "step-00000020"]
    models = [FrugalForMaskedLM.from_pretrained(folder) for folder in folders]
    assert all(len(AutoTokenizer.from_pretrained(folder)) == models[0].config.vocab_size for folder in folders)
    for name, tensor in models[0].state_dict().items():
        assert torch.equal(tensor, models[2].state_dict()[name])
    assert not torch.equal(models[0].head.dense.weight, models[1].head.dense.weight)
    words = Vocabulary.from_tokenizer(load(inputs["tokenizer"]))
    held_out = HeldOut(inputs["shards"], 32, words, small_run.section().validation.rows)
    objective = MaskedLM(small_run.section().isolate_documents)
    model = models[0].eval()
    with torch.no_grad():
        figures = held_out.measure(lambda batch: objective.score(model, batch), 5, lambda: None)
    assert figures["validation_loss"] == pytest.approx(summary["final_validation_loss"], rel=1e-5)


def test_the_encoder_beats_unigram_and_bigram_and_shuffled_text_does_not(tmp_path: Path):
    """It learns what the text has: pairs that do not stand side by side, which a bigram cannot know."""
    inputs = small_run.prepare(tmp_path / "in", documents=600)
    settings = {"budget": "350steps", "optimizer": "muon", "batch_size": 16, "mask": {"rate": [0.3, 0.15]},
                "checkpoints": {"every": "1000steps"}, "validation": {**QUIET, "rows": 64}}  # fmt: skip
    summary = small_run.run(inputs, tmp_path / "out", machine={"micro_batch": 16}, **settings)
    assert summary["final_validation_loss"] < summary["bigram_nll"] - 0.05
    assert summary["bigram_nll"] < summary["unigram_nll"]
    path = inputs["shards"] / "length-32" / "train-00000.bin"
    rows = np.fromfile(path, "<u2").reshape(-1, 32)
    held_out = inputs["shards"] / "length-32" / "held_out-00000.bin"
    generator = np.random.default_rng(0)
    ordinary = rows[rows > 4]
    for file in (path, held_out):
        ids = np.fromfile(file, "<u2")
        ids[ids > 4] = generator.choice(ordinary, (ids > 4).sum())
        file.write_bytes(ids.tobytes())
    small_run.seal(inputs)
    settings["budget"] = "150steps"
    control = small_run.run(inputs, tmp_path / "control", machine={"micro_batch": 16}, **settings)
    assert control["final_validation_loss"] > control["unigram_nll"] - 0.02


def test_overfits_one_batch(inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    original = Sampler.draw
    monkeypatch.setattr(Sampler, "draw", lambda self, progress, samples, micro: original(self, 0.5, {}, micro))
    settings = {"validation": {**QUIET, "rows": 4}, "checkpoints": {"every": "1000steps"}, "batch_size": 4}
    summary = small_run.run(inputs, tmp_path, budget="150steps", learning_rate=0.01, **settings)
    assert summary["steps"] == 150
    assert [line["loss"] for line in toy.lines(tmp_path) if "loss" in line][-1] < 0.05


def test_electra(inputs: dict[str, Path], tmp_path: Path):
    """Generator and discriminator learn; the discriminator is kept; embeddings are shared; a kill changes nothing."""
    from frugalbert.model.modeling import FrugalForReplacedTokenDetection

    settings = {"objective": "rtd", "replaced": {"generator_width": 0.5}}
    summary = small_run.run(inputs, tmp_path / "whole", **settings)
    train = [line for line in toy.lines(tmp_path / "whole") if "loss" in line]
    for line in train:
        assert line["loss"] == pytest.approx(line["generator_loss"] + 50 * line["discriminator_loss"], rel=1e-5)
    assert train[-1]["generator_loss"] < train[0]["generator_loss"]
    assert summary["final_validation"].keys() == {
        "validation_loss", "validation_accuracy", "validation_replaced_loss", "validation_replaced_accuracy",
        "validation_replaced_recall",
    }  # fmt: skip
    kept = FrugalForReplacedTokenDetection.from_pretrained(tmp_path / "whole" / "model")
    assert kept.config.to_arch() == Arch.parse(small_run.SECTION["arch"])
    checkpoints = tmp_path / "half" / "checkpoints"
    small_run.run(inputs, tmp_path / "half", **settings, stop_at=0.5)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000005", "step-00000010"]
    small_run.run(inputs, tmp_path / "half", **settings)
    for name in ("model", "checkpoints/step-00000020"):
        path = f"{name}/model.safetensors"
        assert (tmp_path / "half" / path).read_bytes() == (tmp_path / "whole" / path).read_bytes()
    from safetensors.torch import load_file

    names = load_file(checkpoints / "step-00000020" / "training.safetensors").keys()
    assert "model/generator.head.dense.weight" in names  # what the Hugging Face files leave out
    assert "model/generator.model.embeddings.word.weight" not in names  # shared with the discriminator


def test_the_generator_is_narrow_and_fits():
    for text in ("bert 4x64 heads=4 ffn=256", "modern 3x48 heads=3 ffn=64", "bert 2x64 heads=8,4 ffn=128"):
        arch = Arch.parse(text)
        small = generator_arch(arch, 0.25)
        assert (len(small.layers), small.hidden, small.family) == (len(arch.layers), arch.hidden, arch.family)
        for ours, theirs in zip(small.layers, arch.layers, strict=True):
            assert (ours.hidden, ours.ffn) == (theirs.hidden // 4, theirs.ffn // 4)
            assert ours.heads == max(1, theirs.heads // 4)


def test_starting_from_weights(trained: tuple[Path, dict[str, Any]], inputs: dict[str, Path], tmp_path: Path):
    """A finished model goes on where it was; another architecture or vocabulary is refused in one sentence."""
    start = str(trained[0] / "model")
    section = small_run.section(start=start)
    words = Vocabulary.from_tokenizer(load(inputs["tokenizer"]))
    model = pretrain.make_model(section, tmp_path, 32, words)
    assert model.config.sep_token_id == words.sep  # patterns may name it
    again = pretrain.make_model(section, tmp_path, 32, words)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    fresh = pretrain.make_model(small_run.section(), tmp_path, 32, words)
    assert not torch.equal(next(fresh.parameters()), next(model.parameters()))
    with pytest.raises(ValueError, match=r"remove pretrain\.arch"):
        pretrain.make_model(small_run.section(start=start, arch="modern 3x32 heads=2 ffn=48"), tmp_path, 32, words)


@pytest.mark.parametrize(("kind", "positions", "types"), [("Bert", 64, 2), ("Roberta", 65, 1)])
def test_starting_from_a_stock_model(kind: str, positions: int, types: int, inputs: dict[str, Path], tmp_path: Path):
    import transformers
    from transformers import BertConfig, BertForMaskedLM

    words = Vocabulary.from_tokenizer(load(inputs["tokenizer"]))
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=words.size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=positions, type_vocab_size=types, pad_token_id=words.pad,
    )  # fmt: skip
    stock = getattr(transformers, f"{kind}ForMaskedLM")(config).eval()
    stock.save_pretrained(tmp_path / "stock")
    section = small_run.section(start="stock", arch=f"bert 2x32 heads=2 ffn=48 max_length=64 token_types={types}")
    model = pretrain.make_model(section, tmp_path, 32, words).eval()
    ids = torch.randint(5, words.size, (2, 16))
    torch.testing.assert_close(model(input_ids=ids).logits, stock(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
    other = BertConfig(vocab_size=words.size + 8, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    BertForMaskedLM(other).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"tokenizer\.path"):
        pretrain.make_model(small_run.section(start="other"), tmp_path, 32, words)


# ---- batches ---------------------------------------------------------------------------------------------------------


def test_phases_keep_the_tokens_per_batch(inputs: dict[str, Path], tmp_path: Path):
    phases = [{"length": 64, "share": 0.3}]
    summary = small_run.run(inputs, tmp_path, phases=phases)
    train = [line for line in toy.lines(tmp_path) if "loss" in line]
    assert [line["length"] for line in train] == [32.0] * 14 + [64.0] * 6
    state = json.loads((tmp_path / "checkpoints" / "step-00000020" / "state.json").read_text())
    assert state["samples"] == {"32": 14 * 8, "64": 6 * 4}
    sampler = sampler_of(inputs, phases=phases)
    assert summary["epochs"] == pytest.approx(14 * 8 / sampler.sets[32].rows + 6 * 4 / sampler.sets[64].rows)


def test_a_batch_is_a_function_of_its_position(inputs: dict[str, Path]):
    sampler, other = sampler_of(inputs), sampler_of(inputs)
    one = sampler.draw(0.3, {"32": 40}, 3)
    for _ in range(2):
        other.draw(0.1, {"32": 8}, 8)
    two = other.draw(0.3, {"32": 40}, 3)
    assert one.samples == two.samples == {"32": 48}
    assert [len(micro.batch.input_ids) for micro in one.micros] == [2, 3, 3]
    for ours, theirs in zip(one.micros, two.micros, strict=True):
        assert torch.equal(ours.batch.input_ids, theirs.batch.input_ids)
        assert torch.equal(ours.batch.labels, theirs.batch.labels)
    assert sum(micro.masked_share for micro in one.micros) == pytest.approx(1.0)
    assert sum(micro.token_share for micro in one.micros) == pytest.approx(1.0)
    whole = sampler.draw(0.3, {"32": 40}, 8).micros[0].batch
    parts = torch.cat([micro.batch.input_ids for micro in one.micros])
    assert torch.equal(whole.input_ids, parts)
    assert not torch.equal(
        whole.input_ids, sampler_of(inputs, seed=1).draw(0.3, {"32": 40}, 8).micros[0].batch.input_ids
    )


def test_shares_count_masked_and_real_tokens(inputs: dict[str, Path]):
    sampler = sampler_of(inputs)
    made = [sampler._masked(sampler.spans[0], 0, 2, 0.15), sampler._masked(sampler.spans[0], 2, 5, 0.4)]
    micros, tokens = shares(made)
    masked = [int((batch.labels != IGNORED).sum()) for batch in made]
    assert [float(micro.masked_share) for micro in micros] == pytest.approx([count / sum(masked) for count in masked])
    assert int(tokens) == sum(int((batch.document_ids > 0).sum()) for batch in made)


def test_mask_rate():
    assert [mask_rate(Mask(rate=(0.3, 0.15)), p) for p in (0.0, 0.5, 1.0)] == pytest.approx([0.3, 0.225, 0.15])
    assert mask_rate(Mask(rate=(0.2,)), 0.7) == 0.2


@pytest.mark.parametrize("size, at_once, world", [(8, 3, 1), (1, 5, 1), (13, 4, 1), (8, 3, 2), (5, 1, 2), (7, 2, 3)])
def test_all_ranks_have_as_many_pieces(size: int, at_once: int, world: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(batches.dist, "world", lambda: world)
    parts = []
    for rank in range(world):
        monkeypatch.setattr(batches.dist, "rank", lambda rank=rank: rank)
        parts.append(my_pieces(100, size, at_once))
    assert len({len(part) for part in parts}) == 1
    covered = [start + at for part in parts for start, count in part for at in range(count)]
    assert covered == list(range(100, 100 + size))
    sizes = [count for part in parts for _, count in part]
    assert 1 <= min(sizes) <= max(sizes) <= at_once + (world > 1)


def test_validation_is_the_same_whatever_training_does(inputs: dict[str, Path]):
    words = Vocabulary.from_tokenizer(load(inputs["tokenizer"]))
    seen = []
    for values in ({}, {"seed": 5}, {"mask": {"rate": [0.4, 0.2], "style": "mask"}}, {"batch_size": 2}):
        held_out = HeldOut(inputs["shards"], 32, words, small_run.section(**values).validation.rows)
        seen.append(torch.cat([batch.input_ids for batch in held_out.batches([(0, 7), (7, 9)])]))
    assert all(torch.equal(seen[0], other) for other in seen[1:])


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values, machine, sentence",
    [
        ({"curve": "linaer"}, {}, "did you mean linear"),
        ({"optimizer": "mine.py:f"}, {}, "there is no file"),
        ({"optimizer_options": {"amsgra": True}}, {}, "did you mean amsgrad"),
        ({"arch": "modern 2x32 heads=2 ffn=48 max_length=16"}, {}, "add max_length=32"),
        ({"phases": [{"length": 48, "share": 0.5}]}, {}, "shards.length"),
        ({"precision": "fp16"}, {"strategy": "fsdp"}, "write bf16 or fp32"),
        ({"start": "absent-model"}, {}, "absent-model is neither"),
    ],
)
def test_mistakes_are_found_before_training(
    values: dict[str, Any], machine: dict[str, Any], sentence: str, inputs: dict[str, Path], tmp_path: Path
):
    with pytest.raises((ValueError, OSError), match=sentence):
        small_run.run(inputs, tmp_path, machine, **values)
    assert not (tmp_path / "checkpoints").exists()


def test_another_tokenizer_is_refused(inputs: dict[str, Path], tmp_path: Path):
    from tests.data.small_shards import small_tokenizer

    small_tokenizer("wordpiece", small_run.sentences(300, seed=5), vocab_size=80).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="made with another tokenizer"):
        small_run.run({**inputs, "tokenizer": tmp_path / "other"}, tmp_path / "out")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_trains(precision: str, inputs: dict[str, Path], tmp_path: Path):
    summary = small_run.run(inputs, tmp_path, precision=precision)
    assert summary["precision"] == precision
    losses = [line["loss"] for line in toy.lines(tmp_path) if "loss" in line]
    assert losses[-1] < losses[0] - 0.5


def test_a_users_own_optimizer_and_curve(inputs: dict[str, Path], tmp_path: Path):
    """From a file beside the YAML, end to end."""
    file = inputs["yaml"] / "mine.py"
    file.write_text(
        "import torch\n"
        "def half(x, floor: float): return max(floor, 1.0 - x)\n"
        "def plain(groups, learning_rate, momentum=0.0):\n"
        "    return torch.optim.SGD(groups, lr=learning_rate, momentum=momentum)\n"
    )
    settings = {"optimizer": "mine.py:plain", "optimizer_options": {"momentum": 0.5}, "learning_rate": 0.1}
    small_run.run(inputs, tmp_path, **settings, curve="mine.py:half", curve_options={"floor": 0.4}, warmup=0.0)
    rates = [line["learning_rate"] for line in toy.lines(tmp_path) if "loss" in line]
    assert rates == pytest.approx([0.1 * max(0.4, 1 - step / 20) for step in range(20)])


@pytest.mark.fault("R17")
def test_trackers_cannot_hurt(inputs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """One that does not exist: a warning, the training unchanged."""
    small_run.run(inputs, tmp_path / "with", {"trackers": ["nonsense"]}, budget="3steps")
    small_run.run(inputs, tmp_path / "without", budget="3steps")
    assert capsys.readouterr().err.count("trackers are given up") == 1
    paths = [tmp_path / name / "model" / "model.safetensors" for name in ("with", "without")]
    assert paths[0].read_bytes() == paths[1].read_bytes()
