"""Files made to do harm: pickles that run code, code beside a model, headers that lie, names that are paths."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from safetensors import SafetensorError

from frugalbert import run, yamlfile
from frugalbert.data import parts, readers, tokenizer
from frugalbert.data.cleaning import Counts
from frugalbert.data.rows import ShardSet
from frugalbert.fanout import Journal
from frugalbert.finetune import models as sources
from frugalbert.finetune import trials
from frugalbert.loading import load_weights
from frugalbert.measure import models, predictor
from frugalbert.measure.encoder import Encoder
from frugalbert.measure.session import open_session
from frugalbert.train import checkpoint
from tests.data.small_shards import random_documents, write_shards
from tests.faults import rows
from tests.finetune.conftest import make_tiny, sentences
from tests.test_yamlfile import MINIMAL


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, call: Callable[..., Any], argument: str) -> None:
        self.call, self.argument = call, argument

    def __reduce__(self) -> Any:
        return self.call, (self.argument,)


def payloads(marker: Path) -> dict[str, bytes]:
    import torch

    buffer = io.BytesIO()
    torch.save({"weight": torch.zeros(2), "more": Evil(os.system, f"touch {marker}")}, buffer)
    return {
        "os.system": pickle.dumps(Evil(os.system, f"touch {marker}")),
        "eval": pickle.dumps(Evil(eval, f"open({str(marker)!r}, 'w')")),
        "torch": buffer.getvalue(),
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("stock") / "model", sentences(200, 0))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, random_documents(np.random.default_rng(0), 60, 100))
    return folder


def read_all(path: Path) -> list[Any]:
    return list(readers.read(path, "auto", "text", Counts()))


READERS: dict[str, Callable[[Path], Any]] = {
    "model/model.safetensors": lambda path: models.load_model(path.parent),
    "model/pytorch_model.bin": lambda path: (
        (path.parent / "model.safetensors").unlink(), models.load_model(path.parent)),
    "model/config.json": lambda path: models.load_model(path.parent),
    "model/tokenizer.json": lambda path: sources.open_source(str(path.parent), None),
    "model/tokenizer_config.json": lambda path: Encoder(path.parent).encode(["a cat"]),
    "run/model.safetensors": lambda path: checkpoint.fault(path.parent),
    "run/training.safetensors": lambda path: checkpoint.load(path.parent.parent, 6),
    "run/state.json": lambda path: checkpoint.load(path.parent.parent, 6),
    "run/manifest.json": lambda path: checkpoint.find(path.parent.parent),
    "shards/index.json": lambda path: ShardSet.open(path.parent, 32),
    "shards/length-32/train-00000.bin": lambda path: ShardSet.open(path.parent.parent, 32),
    "tokenizer.json": lambda path: tokenizer.load(path.parent),
    "journal.jsonl": lambda path: Journal(path).entries,
    "predictor.json": predictor.load,
    "stage.json": lambda path: run.read_record(path.parent),
    "part.npz": lambda path: parts.load(path, "records"),
    "bootstrap-task.npy": lambda path: trials.read_resamples(path.parent, "task"),
    "text.txt": read_all,
    "text.jsonl": read_all,
    "text.csv": read_all,
    "text.parquet": read_all,
    "run.yaml": yamlfile.load,
    "model.onnx": open_session,
}  # fmt: skip
"""By the file that is replaced: what reads it."""


@pytest.mark.fault("S1")
@pytest.mark.parametrize("kind", ["os.system", "eval", "torch"])
@pytest.mark.parametrize("name", READERS)
def test_hostile_pickles_do_nothing(name: str, kind: str, model: Path, shards: Path, place: Path, tmp_path: Path):
    shutil.copytree(model, tmp_path / "model")
    shutil.copytree(shards, tmp_path / "shards")
    newest = "step-00000006"
    shutil.copytree(place / "short" / "checkpoints" / newest, tmp_path / newest)
    path = tmp_path / name.replace("run/", f"{newest}/")
    path.write_bytes(payloads(tmp_path / "ran")[kind])
    with suppress(ValueError, OSError, KeyError, SafetensorError, zipfile.BadZipFile):
        READERS[name](path)
    assert not (tmp_path / "ran").exists()


def test_these_pickles_are_hostile(tmp_path: Path):
    for data in payloads(tmp_path / "ran").values():
        with suppress(Exception):
            pickle.loads(data)
        with suppress(Exception):
            import torch

            torch.load(io.BytesIO(data), weights_only=False)
        assert (tmp_path / "ran").exists()
        (tmp_path / "ran").unlink()


@pytest.mark.fault("S3")
@pytest.mark.parametrize("way", ["load_model", "open_source", "Encoder", "teacher", "words", "start"])
def test_code_beside_a_model_is_not_run(way: str, model: Path, tmp_path: Path):
    """Wherever a model or its tokenizer may come from outside; no setting of the YAML turns it on."""
    from frugalbert.data.masking import Vocabulary
    from frugalbert.model.modeling import FrugalForMaskedLM
    from frugalbert.train import stock_teacher, weights, words

    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    mine = tokenizer.load(folder)
    known = Vocabulary.from_tokenizer(mine)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\nclass M: pass\n")
    for file, extra in (
        ("config.json", {"AutoConfig": "evil.C", "AutoModel": "evil.M", "AutoModelForMaskedLM": "evil.M"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["evil.C", "evil.C"]}),
    ):
        text = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(text | {"auto_map": extra, "model_type": "evil"}))
    ways: dict[str, Callable[[], Any]] = {
        "load_model": lambda: models.load_model(folder),
        "open_source": lambda: sources.open_source(str(folder), None),
        "Encoder": lambda: Encoder(folder),
        "teacher": lambda: stock_teacher.load_stock("model", "key", tmp_path, known),
        "words": lambda: words.load_word_teacher("model", "key", tmp_path, mine, known),
        "start": lambda: weights.load_model("model", "key", tmp_path, FrugalForMaskedLM, known, whole=True),
    }
    with pytest.raises(ValueError, match="model") as error:
        ways[way]()
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


# ---- sizes that are not there ----------------------------------------------------------------------------------------


MODEST = rows.Cost(60.0, 512 << 20)  # 5 s on an idle core; other work must not fail a test


def safetensors_file(header: dict[str, Any] | bytes, data: bytes = b"", told: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if told is None else told) + text + data


def tensor(shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


LYING_WEIGHTS = {
    "a header of 2^63 bytes": safetensors_file(b"{}", told=1 << 63),
    "a header of 1 GB": safetensors_file(b"{}", told=1 << 30),
    "a header beyond the file": safetensors_file(b"{}", told=1000),
    "overlapping tensors": safetensors_file({"a": tensor([2], 0, 8), "b": tensor([2], 4, 12)}, bytes(12)),
    "a shape of 10^9": safetensors_file({"a": tensor([10**9], 0, 8)}, bytes(8)),
    "a shape of 10^18": safetensors_file({"a": tensor([10**9, 10**9], 0, 8)}, bytes(8)),
    "an end before the beginning": safetensors_file({"a": tensor([2], 8, 0)}, bytes(8)),
    "a header that nests": safetensors_file(b'{"a":' * 100_000),
    "a million names": safetensors_file({f"t{number}": tensor([0], 0, 0) for number in range(200_000)}),
}


@pytest.mark.fault("S11")
@pytest.mark.parametrize("name", LYING_WEIGHTS)
def test_weights_that_lie(name: str, model: Path, tmp_path: Path):
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(LYING_WEIGHTS[name])
    with rows.within(MODEST), pytest.raises(ValueError, match="model") as error:
        models.load_model(tmp_path / "model")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.fault("S11")
@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": 10**9},
        {"hidden_size": 10**6},
        {"hidden_size": 9000},
        {"num_hidden_layers": 10**6},
        {"max_position_embeddings": 6 * 10**6},
        {"type_vocab_size": 10**7},
        {"vocab_size": None},
        {"vocab_size": "x"},
    ],
    ids=str,
)
def test_a_configuration_that_lies(change: dict[str, int], model: Path, tmp_path: Path):
    shutil.copytree(model, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | change))
    with rows.within(MODEST), pytest.raises(ValueError, match="model") as error:
        models.load_model(tmp_path / "model")
    assert "\n" not in str(error.value)


@pytest.mark.fault("S11")
def test_a_model_of_the_hub_that_lies(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As it lies in the hub's cache, without a network."""
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    place = tmp_path / "models--some--model"
    shutil.copytree(model, place / "snapshots" / "abc")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("abc")
    owner = transformers.AutoModelForMaskedLM
    load_weights(owner, "some/model", "some/model cannot be loaded", "mend it")
    config = place / "snapshots" / "abc" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 10**9}))
    with rows.within(MODEST), pytest.raises(ValueError, match="some/model cannot be loaded .its config.json speaks of"):
        load_weights(owner, "some/model", "some/model cannot be loaded", "mend it")


@pytest.mark.fault("S11")
@pytest.mark.parametrize("place", ["../secret", "/etc/passwd"])
def test_a_graph_whose_data_lie_elsewhere(place: str, tmp_path: Path):
    onnx = pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
    (tmp_path / "secret").write_bytes(bytes(range(16)))
    (tmp_path / "model").mkdir()
    weight = onnx.TensorProto(name="weight", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", place), ("offset", "0"), ("length", "16")):
        weight.external_data.add(key=key, value=value)
    out = onnx.helper.make_tensor_value_info("out", 1, [4])
    node = onnx.helper.make_node("Identity", ["weight"], ["out"])
    graph = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], [out], [weight]))
    (tmp_path / "model" / "model.onnx").write_bytes(graph.SerializeToString())
    with rows.within(MODEST), pytest.raises(ValueError, match="no ONNX file that can run") as error:
        open_session(tmp_path / "model" / "model.onnx")
    assert "\n" not in str(error.value)


# ---- names that are paths --------------------------------------------------------------------------------------------

NAMES = ["../x", "a/b", "/etc/x", "a\\b", "a\0b", "a\nb", "x" * 300, "", ".", "..", "a b", "-rf"]


@pytest.mark.fault("S8")
@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_the_name_of_a_run_is_no_path(name: str, tmp_path: Path):
    (tmp_path / "run.yaml").write_text(MINIMAL.replace("name: a", f"name: {json.dumps(name)}"))
    with pytest.raises(ValueError, match="run.yaml"):
        yamlfile.load(tmp_path / "run.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


@pytest.mark.fault("S8")
@pytest.mark.parametrize("name", [*NAMES[:8], "a:b", "CON", "pretrained-seed0/../.."], ids=range(11))
def test_the_name_of_a_task_is_no_path(name: str, tmp_path: Path):
    task = f"finetune: {{tasks: [{{name: {json.dumps(name)}, train: a.csv}}]}}\n"
    (tmp_path / "run.yaml").write_text(MINIMAL + task)
    try:
        config = yamlfile.load(tmp_path / "run.yaml")
    except ValueError as error:
        assert "run.yaml" in str(error)
    else:
        assert config.finetune is not None
        place = tmp_path / config.finetune.tasks[0].name  # type: ignore[union-attr]
        assert place.parent == tmp_path
