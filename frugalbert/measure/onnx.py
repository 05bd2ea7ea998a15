"""A PyTorch encoder or classifier in, an ONNX file out, in fp32 or dynamically quantised to int8, with what it changed.

The graph takes `input_ids`, `attention_mask` and, where the model has token types, `token_type_ids`, all int64
(batch, sequence) with both axes free. It gives `last_hidden_state` (batch, sequence, hidden), or `logits` for a
sequence classifier. Dynamic quantisation is ONNX Runtime's: int8 weights per output channel, activations quantised per
call (Jacob et al. 2018, arXiv 1712.05877, section 2).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from frugalbert.measure.models import SERVED, max_length
from frugalbert.measure.session import feed, open_session, require_onnx
from frugalbert.progress import quiet, reason

PARITY_SHAPES = ((1, 1), (2, 9), (3, 17), (8, 5), (1, 64), (2, 300))
"""Batch and sequence sizes at which an exported file is compared with PyTorch; the second has a size-1 axis."""
PARITY_LIMIT = 1e-4
SINGLE_FILE_BYTES = 1_800_000_000
"""A protobuf file cannot pass 2 GB; larger weights go to `model.onnx.data` beside it."""


# ---- export ---------------------------------------------------------------------------------------------------------


class _OneOutput(torch.nn.Module):
    """Positional tensors in, one tensor out: the form that the exporter turns into a graph."""

    def __init__(self, model: torch.nn.Module, output: str) -> None:
        super().__init__()
        self.model, self.output = model, output

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        found = self.model(input_ids=input_ids, attention_mask=attention_mask, **types)
        if "start_logits" in found:
            return torch.stack((found.start_logits, found.end_logits), -1)
        return found[self.output]


def output_of(model: Any) -> str:
    """Name of what the graph of this model gives; of a question answerer `logits` (batch, sequence, start and end)."""
    return "logits" if type(model).__name__.endswith(SERVED) else "last_hidden_state"


def serving_part(model: Any) -> Any:
    """What one deploys: a model for a task whole, any other without its head."""
    return model if output_of(model) == "logits" else model.base_model


def takes_token_types(model: Any) -> bool:
    """Whether token types are an input of the model (they are not where its table has no or one row)."""
    return (
        "token_type_ids" in inspect.signature(model.forward).parameters
        and (getattr(model.config, "type_vocab_size", None) or 0) > 1
    )


def make_batch(model: Any, shape: tuple[int, int], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random token ids (batch, sequence) with ragged padding: the first row is full, later ones are shorter."""
    batch, length = shape
    generator = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(0, model.config.vocab_size, shape, generator=generator)
    lengths_B = torch.tensor([max(1, length - row * length // (batch + 1)) for row in range(batch)])
    mask_BT = (torch.arange(length) < lengths_B[:, None]).long()
    inputs = {"input_ids": ids_BT, "attention_mask": mask_BT}
    if takes_token_types(model):
        inputs["token_type_ids"] = torch.randint(0, 2, shape, generator=generator)
    return inputs


def parity_batches(model: Any) -> list[dict[str, torch.Tensor]]:
    """Random batches of every shape of `PARITY_SHAPES`, cut to the model's longest input."""
    longest = max_length(model.config) or 512
    shapes = sorted({(batch, min(length, longest)) for batch, length in PARITY_SHAPES})
    return [make_batch(model, shape, seed) for seed, shape in enumerate(shapes)]


def export_onnx(model: Any, path: Path) -> None:
    """Write `model` (an encoder, or one with a task's head) to `path`; large weights go to `path`.data beside it."""
    require_onnx()
    example = make_batch(model, (2, min(9, max_length(model.config) or 9)))
    axes = {0: "batch", 1: "sequence"}
    with quiet(), torch.inference_mode():
        try:
            program = torch.onnx.export(
                _OneOutput(model, output_of(model)).eval(),
                tuple(example.values()),
                dynamo=True,
                input_names=list(example),
                output_names=[output_of(model)],
                dynamic_shapes=tuple(axes for _ in example),
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise ValueError(
                f"PyTorch cannot write {type(model).__name__} as ONNX ({reason(error)}); leave onnx "
                "and onnx-int8 out of export.formats"
            ) from None
        assert program is not None
        _strip(program.model)
        weights = sum(parameter.nbytes for parameter in model.parameters())
        program.save(str(path), external_data=weights > SINGLE_FILE_BYTES)


def _strip(graph: Any) -> None:
    """Remove the exporter's debugging notes: they double a small file and name directories of this machine."""
    for node in graph.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*graph.graph.inputs, *graph.graph.outputs, *graph.graph.initializers.values()):
        value.metadata_props.clear()
    graph.graph.metadata_props.clear()
    graph.metadata_props.clear()


def quantize(source: Path, path: Path) -> None:
    """Write the int8 form of an ONNX file: matrix products and embeddings, weights per output channel."""
    require_onnx()
    with quiet():
        import onnx
        from onnxruntime.quantization import QuantType, quantize_dynamic

        graph = onnx.load(source)
        del graph.graph.value_info[:]  # the quantiser turns Gemm weights round, but not their recorded shapes
        large = source.with_name(f"{source.name}.data").exists()
        quantize_dynamic(graph, path, per_channel=True, weight_type=QuantType.QInt8, use_external_data_format=large)


# ---- running and comparing ------------------------------------------------------------------------------------------


def outputs_of(model: Any, session: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """What PyTorch and ONNX Runtime give for one batch: (tokens, …) without padding, or (batch, labels)."""
    with torch.inference_mode():
        expected = _OneOutput(model, output_of(model))(*inputs.values())
    got = torch.from_numpy(session.run([output_of(model)], feed(session, inputs))[0])
    if expected.ndim == 2:
        return expected, got
    valid_BT = inputs["attention_mask"].bool()
    return expected[valid_BT], got[valid_BT]


def difference(model: Any, session: Any, batches: Iterable[dict[str, torch.Tensor]]) -> dict[str, float]:
    """Largest absolute difference and mean cosine of the outputs of an ONNX file and its PyTorch model."""
    largest, cosines = 0.0, []
    for inputs in batches:
        expected, got = outputs_of(model, session, inputs)
        gap = (expected - got).abs().max().item()
        largest = max(largest, gap) if gap == gap else float("inf")
        cosines.append(torch.nn.functional.cosine_similarity(expected.double(), got.double(), dim=-1))
    return {"max_abs_difference": largest, "mean_cosine": torch.cat(cosines).mean().item()}


def check_parity(model: Any, path: Path, batches: Sequence[dict[str, torch.Tensor]] | None = None) -> float:
    """Largest absolute difference between file and model over many shapes. Raises ValueError above `PARITY_LIMIT`."""
    found = difference(model, open_session(path), parity_batches(model) if batches is None else batches)
    if not found["max_abs_difference"] <= PARITY_LIMIT:
        raise ValueError(
            f"the ONNX file of {type(model).__name__} differs from PyTorch by {found['max_abs_difference']:.2g} ("
            f"at most {PARITY_LIMIT:g} is accepted); leave onnx and onnx-int8 out of export.formats"
        )
    return found["max_abs_difference"]
