"""Distillation end to end, on files: teachers that are taken or refused, slices of them, the cache, kills."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from frugalbert.config import Pretrain
from frugalbert.model.arch import Arch
from frugalbert.model.modeling import FrugalForMaskedLM
from frugalbert.train import loop, pretrain
from frugalbert.train.teacher import Teacher
from frugalbert.train.teacher_cache import Cache, record_type
from tests.data.small_shards import small_tokenizer
from tests.train import small_run
from tests.train.test_ranks import launch

BIG = "modern 3x48 heads=3 head_dim=16 ffn=64 max_length=64"
SMALL = "modern 2x32 heads=2 head_dim=16 ffn=48 max_length=64"
QUIET = {"every": 0.0, "begin_every": 0.0, "end_every": 0.0, "rows": 4}  # validation only at the end
MASK = {"rate": 0.15, "copies": 2}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return small_run.prepare(tmp_path_factory.mktemp("distil"))


@pytest.fixture(scope="module")
def teacher(inputs: dict[str, Path]) -> Path:
    """A trained one, in the folder of the YAML."""
    small_run.run(inputs, inputs["yaml"] / "teacher", arch=BIG, budget="60steps")
    return inputs["yaml"] / "teacher" / "model"


def distilled(inputs: dict[str, Path], out: Path, settings: dict[str, Any] | None = None, **values: Any) -> Any:
    distil = {"teacher": "teacher/model", **(settings or {})}
    return small_run.run(inputs, out, **{"arch": SMALL, "objective": "distill", "distill": distil, **values})


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    mine, theirs = weights(one), weights(other)
    return all(torch.equal(mine[name], theirs[name]) for name in mine.keys() | theirs.keys())


@pytest.mark.usefixtures("teacher")
def test_every_term_at_once(inputs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    terms = {"attention": 0.0, "hidden": 0.1, "relation": 0.2, "relation_heads": 4, "layers": "even"}
    summary = distilled(inputs, tmp_path, terms)
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-2])
    weighted = 0.1 * line["text_loss"] + 0.5 * line["logits_loss"] + 0.1 * line["hidden_loss"]
    assert line["loss"] == pytest.approx(weighted + 0.2 * line["relation_loss"], rel=1e-4)
    assert set(weights(tmp_path)) == set(FrugalForMaskedLM.from_pretrained(tmp_path / "model").state_dict()) - {
        "decoder.weight"
    }
    assert summary["arch"] == str(Arch.parse(SMALL))
    said = capsys.readouterr().err
    assert f"teacher teacher/model: {Arch.parse(BIG)}; 0.1 mlm + 0.5 logits + 0.1 hidden + 0.2 relation" in said
    assert np.isfinite(summary["final_validation_loss"])


@pytest.mark.usefixtures("teacher")
def test_nothing_from_the_teacher_is_masked_words_alone(inputs: dict[str, Path], tmp_path: Path):
    """Weight 1 of the words and almost none of the rest: the same weights, since data and seeds are the same."""
    small_run.run(inputs, tmp_path / "plain", arch=SMALL)
    distilled(inputs, tmp_path / "taught", {"mlm": 1.0, "logits": 0.0, "hidden": 1e-30})
    plain, taught = weights(tmp_path / "plain"), weights(tmp_path / "taught")
    for name, tensor in plain.items():
        torch.testing.assert_close(taught[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.fault("R9")
@pytest.mark.usefixtures("teacher")
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 5, 9])
def test_a_teacher_that_says_nonsense_is_not_believed(
    at: int, value: float, inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its predictions for one batch are NaN or infinite: that batch is left out, and the log says so."""
    kept, take_step, now = Teacher._kept, loop.take_step, [-1]

    def poisoned(self: Teacher, logits: torch.Tensor) -> Any:
        return kept(self, torch.full_like(logits, value) if now[0] == at else logits)

    def watched(training: Any) -> None:
        now[0] = training.state.attempt
        take_step(training)
        now[0] = -1

    monkeypatch.setattr(Teacher, "_kept", poisoned)
    monkeypatch.setattr(loop, "take_step", watched)
    distilled(inputs, tmp_path, budget="10steps", checkpoints={"every": "2steps"}, validation=QUIET)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert any("nan" in line["event"] or "inf" in line["event"] for line in lines if "event" in line)
    assert all(weight.isfinite().all() for weight in weights(tmp_path).values())


@pytest.mark.usefixtures("teacher")
@pytest.mark.parametrize("cached", [False, True], ids=["asked", "cached"])
def test_two_ranks_train_as_one(cached: bool, inputs: dict[str, Path], tmp_path: Path):
    """Every term, or predictions from one cache that both fill: the same weights as of one process."""
    terms = {"attention": 1.0, "hidden": 0.5, "relation": 0.5, "relation_heads": 2, "layers": [[1, 2]]}
    kept = {"top_k": 8, "cache": str(tmp_path / "cache")}
    settings = {"budget": "4steps", "mask": MASK, "arch": "modern 2x32 heads=3 head_dim=16 ffn=48 max_length=64"}
    distil = {"teacher": "teacher/model", **(kept if cached else terms)}
    distilled(inputs, tmp_path / "one", terms if not cached else {"top_k": 8}, **settings)
    options = json.dumps({**settings, "objective": "distill", "distill": distil})
    place = inputs["yaml"]
    command = [sys.executable, "-m", "tests.train.small_run", str(place), str(tmp_path / "two"), options]
    launch(place, 2, command=command)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=2e-5)


@pytest.mark.usefixtures("teacher")
def test_compiled_layers_learn_the_same(inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Layers of both models as whole graphs (run by PyTorch itself: what is tested is the tracing), but those that are
    looked into."""
    done, settings = [], {"hidden": 0.1, "relation": 0.2, "relation_heads": 2}
    torch._dynamo.reset()

    def compiled(block: torch.nn.Module, **options: Any) -> None:
        done.append(block)
        block._compiled_call_impl = torch.compile(block._call_impl, backend="eager", fullgraph=True, **options)

    distilled(inputs, tmp_path / "plain", settings, budget="4steps")
    monkeypatch.setattr(torch.nn.Module, "compile", compiled)
    with torch._dynamo.config.patch(recompile_limit=2):  # the stage must raise it
        distilled(inputs, tmp_path / "compiled", settings, budget="4steps", machine={"compile": True})
    assert len(done) == 1 + 2, "the last layer of each is watched"
    for name, tensor in weights(tmp_path / "plain").items():
        torch.testing.assert_close(weights(tmp_path / "compiled")[name], tensor, rtol=0, atol=1e-5)


# ---- the cache -------------------------------------------------------------------------------------------------------


CACHED = {"top_k": 8, "cache": "cache"}


@pytest.mark.usefixtures("teacher")
def test_a_cache_changes_nothing(inputs: dict[str, Path], tmp_path: Path):
    """Live, while it fills, full, and after damage: the same weights, bit for bit."""
    place = {"mask": MASK, "budget": "90steps"}
    distilled(inputs, tmp_path / "live", {"top_k": 8}, **place)
    for name in ("filling", "full"):
        distilled(inputs, tmp_path / name, CACHED, **place)
        assert same(tmp_path / "live", tmp_path / name)
    lines = [json.loads(line) for line in (tmp_path / "full" / "metrics.jsonl").read_text().splitlines()]
    assert [line["cached_share"] for line in lines if "cached_share" in line] == pytest.approx([1.0] * 90)
    file = inputs["yaml"] / "cache" / "length-32.bin"
    content = bytearray(file.read_bytes())
    for start in range(100, len(content), 1000):
        content[start] ^= 1
    file.write_bytes(content)
    distilled(inputs, tmp_path / "damaged", CACHED, **place)
    assert same(tmp_path / "live", tmp_path / "damaged")
    assert file.read_bytes() != bytes(content)


@pytest.mark.parametrize(
    ("change", "what"),
    [({"seed": 5}, "seed"), ({"mask": {"rate": 0.2, "copies": 2}}, "mask"), ({"distill": {"top_k": 4}}, "top_k"),
     ({"distill": {"temperature": 3.0}}, "temperature"), ({"distill": {"teacher": "other"}}, "teacher")],
)  # fmt: skip
def test_a_cache_of_something_else_is_refused(
    inputs: dict[str, Path], teacher: Path, tmp_path: Path, change: dict[str, Any], what: str
):
    folder = {**inputs, "yaml": tmp_path}
    shutil.copytree(teacher, tmp_path / "teacher" / "model")
    small_run.run(folder, tmp_path / "out", arch=SMALL, objective="distill", budget="2steps", mask=MASK,
                  distill={"teacher": "teacher/model", **CACHED})  # fmt: skip
    other = FrugalForMaskedLM.from_pretrained(teacher)
    with torch.no_grad():
        other.decoder.bias.add_(1.0)
    other.save_pretrained(tmp_path / "other")
    before = (tmp_path / "cache" / "index.json").read_bytes()
    distil = {"teacher": "teacher/model", **CACHED, **change.get("distill", {})}
    values = {"mask": MASK, **change, "distill": distil}
    with pytest.raises(ValueError, match=rf"cache .* was made with another {what}; name another directory"):
        small_run.run(folder, tmp_path / "two", arch=SMALL, objective="distill", budget="2steps", **values)
    assert (tmp_path / "cache" / "index.json").read_bytes() == before


def test_a_cache_of_other_shards_is_refused(inputs: dict[str, Path], teacher: Path, tmp_path: Path):
    first = {"teacher": str(teacher), "top_k": 8, "cache": str(tmp_path / "cache")}
    distilled(inputs, tmp_path / "one", first, mask=MASK, budget="2steps")
    other = small_run.prepare(tmp_path / "other", documents=290)
    shutil.copytree(inputs["tokenizer"], other["tokenizer"], dirs_exist_ok=True)
    index = json.loads((other["shards"] / "index.json").read_text())
    index["tokenizer_sha256"] = json.loads((inputs["shards"] / "index.json").read_text())["tokenizer_sha256"]
    (other["shards"] / "index.json").write_text(json.dumps(index))
    small_run.seal(other)
    with pytest.raises(ValueError, match="was made with another shards"):
        distilled(other, tmp_path / "two", first, mask=MASK, budget="2steps")


def test_a_record_that_was_never_written_is_absent(tmp_path: Path):
    cache = Cache(tmp_path / "new", {"a": 1}, {32: (10, 5)}, 4, 96)
    assert (tmp_path / "new" / "length-32.bin").stat().st_size == 10 * record_type(5, 4, 96).itemsize
    assert not cache.read(32, np.arange(10))[1].any()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="holds other files"):
        Cache(tmp_path / "old", {}, {}, 4, 96)
    with pytest.raises(ValueError, match=r"letter\.txt is a file; name a directory"):
        Cache(tmp_path / "old" / "letter.txt", {}, {}, 4, 96)


# ---- beginning with a slice of the teacher ---------------------------------------------------------------------------


def test_a_slice_of_the_teacher_begins_ahead(inputs: dict[str, Path], teacher: Path, tmp_path: Path):
    """Half of its layers and most of its channels: better than nothing before the first steps have done anything."""
    tiny = {"budget": "1steps", "warmup": 0.5, "learning_rate": 1e-9}
    losses = [distilled(inputs, tmp_path / str(start), start=start, **tiny)["final_validation_loss"]
              for start in (None, "from teacher")]  # fmt: skip
    assert losses[1] < losses[0]
    same_size = distilled(inputs, tmp_path / "all", start="from teacher", arch=BIG, **tiny)
    summary = json.loads((teacher.parent / "summary.json").read_text())
    assert same_size["final_validation_loss"] == pytest.approx(summary["final_validation_loss"], abs=2e-3)
    with pytest.raises(ValueError, match=r"is no slice of the teacher.*\(?.*96 channels are no slice of 48"):
        distilled(inputs, tmp_path / "big", start="from teacher", arch="modern 2x96 heads=2 head_dim=16 ffn=48", **tiny)


# ---- teachers that are refused ---------------------------------------------------------------------------------------


def refused(inputs: dict[str, Path], folder: Path, settings: dict[str, Any]) -> str:
    with pytest.raises(ValueError, match=r"pretrain\.distill") as caught:
        distilled(inputs, folder / "refused", settings)
    assert not (folder / "refused" / "checkpoints").exists()
    return str(caught.value)


def test_teachers_that_cannot_teach(inputs: dict[str, Path], teacher: Path, tmp_path: Path):
    shutil.copytree(teacher, tmp_path / "nan")
    content = load_file(tmp_path / "nan" / "model.safetensors")
    content["head.norm.weight"][3] = torch.nan
    save_file(content, tmp_path / "nan" / "model.safetensors", {"format": "pt"})
    assert "weights that are not finite" in refused(inputs, tmp_path, {"teacher": str(tmp_path / "nan")})

    shutil.copytree(teacher, tmp_path / "headless")
    del content["head.norm.weight"]
    save_file(content, tmp_path / "headless" / "model.safetensors", {"format": "pt"})
    found = refused(inputs, tmp_path, {"teacher": str(tmp_path / "headless")})
    assert "is no masked LM: it has no head.norm.weight" in found

    shutil.copytree(teacher, tmp_path / "words")
    texts = ["other words for other people in other places"] * 9
    small_tokenizer("wordpiece", texts, vocab_size=96).save_pretrained(tmp_path / "words")
    found = refused(inputs, tmp_path, {"teacher": str(tmp_path / "words")})
    assert "has another tokenizer than the shards, so logits cannot be compared; take its tokenizer" in found

    found = refused(inputs, tmp_path, {"teacher": "no/such"})
    assert "neither a model directory" in found
    assert "pretrain.distill.attention compares head by head" in refused(inputs, tmp_path, {"attention": 1.0})
    assert "relation_heads 5 does not divide" in refused(inputs, tmp_path, {"relation": 1.0, "relation_heads": 5})
    assert "relation_layer is 9; the teacher has 3" in refused(
        inputs, tmp_path, {"relation": 1.0, "relation_heads": 2, "relation_layer": 9}
    )


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"objective": "distill"}, "belong together"),
        ({"distill": {"teacher": "x"}}, "belong together"),
        ({"start": "from teacher"}, "needs objective: distill"),
        ({"objective": "distill", "distill": {"teacher": "x", "logits": 0.0}}, "nothing is learnt from the teacher"),
        ({"objective": "distill", "distill": {"teacher": "x", "cache": "c"}}, "write how many, for example top_k: 32"),
        ({"objective": "distill", "distill": {"teacher": "x", "cache": "c", "top_k": 3}}, "masks that come again"),
        ({"objective": "distill", "distill": {"teacher": "x", "layers": "even"}}, "layers belongs to attention"),
    ],
)
def test_settings_that_contradict_each_other(values: dict[str, Any], sentence: str):
    with pytest.raises(ValueError, match=sentence):
        Pretrain.model_validate({"budget": "10steps", **values})


def test_from_supernet_names_the_super_networks_model(tmp_path: Path):
    section = small_run.section(objective="distill", distill={"teacher": "from supernet"})
    found = pretrain.resolved(section, {"supernet": tmp_path})
    assert found.distill is not None
    assert found.distill.teacher == str(tmp_path / "model")
