"""An ONNX file in, a session of ONNX Runtime on the CPU with a fixed number of threads out. No torch."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


def require_onnx(*names: str) -> None:
    """Raises ValueError naming the extra if one of these packages (default: all for ONNX files) is not installed."""
    missing = [name for name in names or ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"ONNX files need the package {missing[0]}, which is not installed; `pip install 'frugalbert[onnx]'`, or "
            "leave onnx and onnx-int8 out of export.formats"
        )


def open_session(path: Path, threads: int = 1) -> Any:
    """An ONNX Runtime CPU session with a fixed number of threads. Raises ValueError for what is no usable ONNX file."""
    require_onnx("onnxruntime")
    import onnxruntime

    if not path.is_file():
        raise ValueError(f"{path} does not exist; name an .onnx file")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4  # fatal only: errors arrive as exceptions
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own exceptions have no base in common
        reason = str(error).split(" : ")[-1].replace(str(path), "the file").strip()[:200]
        raise ValueError(f"{path} is no ONNX file that can run ({reason}); export it again") from None


def feed(session: Any, inputs: dict[str, Any]) -> dict[str, np.ndarray]:
    """The arrays a session asks for, of its own integer type; token types and positions are made if not given."""
    given = {name: np.asarray(value) for name, value in inputs.items()}
    shape = given["input_ids"].shape
    arrays = {}
    for node in session.get_inputs():
        if node.name not in INPUTS:
            known = ", ".join(INPUTS)
            raise ValueError(f"the ONNX file asks for an input named {node.name!r}; an encoder's inputs are {known}")
        if node.name == "position_ids":
            value = np.broadcast_to(np.arange(shape[1]), shape)
        else:
            value = given.get(node.name, np.zeros(shape))
        arrays[node.name] = np.ascontiguousarray(value, dtype=np.int32 if "int32" in node.type else np.int64)
    return arrays
