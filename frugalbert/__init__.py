"""frugalbert: a corpus, a training budget and a latency limit in; the best compact encoder that fits them out.

Nothing heavy is imported here: `import frugalbert` costs milliseconds. The names below load their module on first use.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

try:
    __version__ = version("frugalbert")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0.0.0"

_PUBLIC = {
    "Arch": "frugalbert.model.arch",
    "LayerArch": "frugalbert.model.arch",
    "Budget": "frugalbert.budget",
    "Clock": "frugalbert.budget",
    "Config": "frugalbert.config",
    "FrugalConfig": "frugalbert.model.configuration",
    "FrugalModel": "frugalbert.model.modeling",
    "FrugalForMaskedLM": "frugalbert.model.modeling",
    "FrugalForSequenceClassification": "frugalbert.model.modeling",
    "Encoder": "frugalbert.measure.encoder",
    "run_file": "frugalbert.stages",
}
__all__ = ["__version__", *_PUBLIC]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'frugalbert' has no attribute {name!r}")
