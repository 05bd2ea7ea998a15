"""ONNX files: PyTorch's numbers at every shape, for every family; anything else is refused in one sentence."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx as library
import pytest
import torch
from onnx import helper

from frugalbert.measure import onnx, session
from frugalbert.measure.models import load_model
from frugalbert.model import modeling, patterns
from frugalbert.model.arch import Arch
from frugalbert.model.configuration import FrugalConfig
from frugalbert.model.modeling import FrugalModel
from tests.measure.conftest import spread_out

ARCHS = {
    "bert": "bert 2x32 heads=2 ffn=64 max_length=300",
    "bert-preln": "bert-preln 2x32 heads=2 ffn=64*1,32 head_dim=12 max_length=64",
    "modern": "modern 3x32 hidden=16,32,24 heads=2 ffn=40 pattern=dense,window:8,dense",
    "sparse": "modern 3x32 heads=4 ffn=40 pattern="
    f"explicit:320/{patterns.pack(np.random.default_rng(0).random((320, 320)) < 0.1)}|logsparse|signed:-3..0+20|dense,"
    "toeplitz:0+3+100..|star|window:2|random:0.05/3,block-toeplitz:16/0+2",
    "short": f"bert 1x32 heads=2 ffn=64 max_length=300 pattern=block:8/4/{patterns.pack(np.eye(4))}|nodiag",
}


def our_model(text: str) -> Any:
    return spread_out(FrugalModel(FrugalConfig.from_arch(Arch.parse(text), 256)))


@pytest.mark.parametrize("family", ARCHS)
def test_every_family_at_every_shape(family: str, tmp_path: Path):
    model = our_model(ARCHS[family])
    file = tmp_path / "model.onnx"
    onnx.export_onnx(model, file)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert onnx.check_parity(model, file) < 2e-5
    shapes = {tuple(batch["input_ids"].shape) for batch in onnx.parity_batches(model)}
    longest = model.config.max_position_embeddings
    assert {(1, 1), (3, 17), (2, min(300, longest))} <= shapes
    if family == "bert":  # the check sees a changed weight, and so a file of another model
        with torch.no_grad():
            model.layers[1].ffn.output.bias[0].add_(0.01)
        with pytest.raises(ValueError, match="differs from PyTorch by"):
            onnx.check_parity(model, file)


def test_classifier_and_its_int8_form(run_export: tuple[Path, dict], run_inputs: dict[str, Path]):
    model = load_model(run_inputs["finetune"] / "updown" / "model")
    folder = run_export[0] / "tasks" / "updown"
    assert onnx.check_parity(model, folder / "onnx" / "model.onnx") < 2e-5
    small = session.open_session(folder / "onnx-int8" / "model.onnx")
    assert [output.name for output in small.get_outputs()] == ["logits"]
    found = onnx.difference(model, small, onnx.parity_batches(model))
    assert found["max_abs_difference"] > 1e-6
    assert found["mean_cosine"] > 0.99


def test_nothing_of_this_machine_is_in_the_file(stock_export: Path, root: Path):
    graph = library.load(stock_export / "onnx" / "model.onnx")
    assert not any(node.metadata_props or node.doc_string for node in graph.graph.node)
    data = (stock_export / "onnx" / "model.onnx").read_bytes()
    assert str(root).encode() not in data
    assert b"site-packages" not in data


def test_padding_and_token_types_are_part_of_the_comparison():
    batches = onnx.parity_batches(our_model(ARCHS["bert"]))
    assert any((batch["attention_mask"] == 0).any() for batch in batches)
    assert any(batch["token_type_ids"].any() for batch in batches)
    assert "token_type_ids" not in onnx.parity_batches(our_model(ARCHS["modern"]))[0]


class FakeSession:
    """Gives PyTorch's outputs, changed by `change`."""

    def __init__(self, model: Any, change: float) -> None:
        self.model, self.change = model, change

    def get_inputs(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name=name, type="tensor(int64)") for name in ("input_ids", "attention_mask")]

    def run(self, names: list[str], arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
        with torch.inference_mode():
            hidden = self.model(**{name: torch.from_numpy(value) for name, value in arrays.items()}).last_hidden_state
        hidden = hidden * arrays["attention_mask"][..., None] + 100.0 * (1 - arrays["attention_mask"][..., None])
        return [(hidden + self.change).numpy()]


def test_difference_counts_real_tokens_only_and_never_hides_nan():
    model = our_model("modern 1x32 heads=2 ffn=64")
    batches = onnx.parity_batches(model)
    assert onnx.difference(model, FakeSession(model, 0.0), batches)["max_abs_difference"] < 1e-5
    assert onnx.difference(model, FakeSession(model, 0.5), batches)["max_abs_difference"] == pytest.approx(
        0.5, abs=1e-5
    )
    assert onnx.difference(model, FakeSession(model, float("nan")), batches)["max_abs_difference"] == float("inf")


# ---- files that are none --------------------------------------------------------------------------------------------


def external(location: str) -> bytes:
    """A model whose weights are said to stand in another file."""
    weight = library.TensorProto(name="w", data_type=1, dims=[4], data_location=library.TensorProto.EXTERNAL)
    for key, value in (("location", location), ("length", "16")):
        entry = weight.external_data.add()
        entry.key, entry.value = key, value
    values = [helper.make_tensor_value_info(name, 1, [4]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", values[:1], values[1:], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9).SerializeToString()


@pytest.mark.fault("S11")
@pytest.mark.parametrize(
    "content",
    [b"", b"not a graph", external("../../etc/passwd"), external("/etc/passwd"), external("absent.data"), None],
    ids=["empty", "text", "parent directory", "absolute", "absent data", "absent file"],
)
def test_what_is_no_onnx_file(content: bytes | None, tmp_path: Path):
    file = tmp_path / "model.onnx"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=r"does not exist|is no ONNX file that can run") as caught:
        session.open_session(file)
    assert "\n" not in str(caught.value)


@pytest.mark.fault("S11")
def test_truncated_file(stock_export: Path, tmp_path: Path):
    data = (stock_export / "onnx" / "model.onnx").read_bytes()
    for share in (0.1, 0.5, 0.99):
        (tmp_path / "model.onnx").write_bytes(data[: int(len(data) * share)])
        with pytest.raises(ValueError, match="is no ONNX file that can run"):
            session.open_session(tmp_path / "model.onnx")


def test_inputs_are_made_or_refused():
    nodes = [SimpleNamespace(name=name, type="tensor(int32)") for name in session.INPUTS]
    arrays = session.feed(SimpleNamespace(get_inputs=lambda: nodes), {"input_ids": np.array([[7, 8]])})
    assert arrays["position_ids"].tolist() == [[0, 1]]
    assert arrays["token_type_ids"].tolist() == [[0, 0]]
    assert arrays["input_ids"].dtype == np.int32
    nodes.append(SimpleNamespace(name="pixels", type="tensor(float)"))
    with pytest.raises(ValueError, match="asks for an input named 'pixels'"):
        session.feed(SimpleNamespace(get_inputs=lambda: nodes), {"input_ids": np.array([[7]])})


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(session, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(ValueError, match=r"package onnxscript.*frugalbert\[onnx\]"):
        onnx.export_onnx(our_model("modern 1x32 heads=2 ffn=64"), tmp_path / "model.onnx")
    monkeypatch.setattr(session, "find_spec", lambda name: None if name == "onnxruntime" else object())
    with pytest.raises(ValueError, match=r"package onnxruntime.*frugalbert\[onnx\]"):
        session.open_session(tmp_path / "model.onnx")


@pytest.mark.parametrize("head", ["ForTokenClassification", "ForQuestionAnswering"])
def test_heads_with_an_output_for_every_token(head: str, tmp_path: Path):
    model = spread_out(getattr(modeling, f"Frugal{head}")(FrugalConfig.from_arch(Arch.parse(ARCHS["modern"]), 256)))
    onnx.export_onnx(model, tmp_path / "model.onnx")
    assert onnx.check_parity(model, tmp_path / "model.onnx") < 2e-5
    batch = onnx.make_batch(model, (2, 9))
    expected, got = onnx.outputs_of(model, session.open_session(tmp_path / "model.onnx"), batch)
    assert expected.shape == got.shape == (int(batch["attention_mask"].sum()), 2)
    assert len(expected.round(decimals=4).unique(dim=0)) > 2
