"""Measured latencies of sampled architectures in, a function from any Arch to milliseconds out.

The standard is a least-squares fit of the *relative* error on physical terms: sums over the layers of matrix sizes,
widths and counts (AutoTinyBERT, arXiv 2107.13686, and HAT, arXiv 2005.14187, train networks on averages instead).
Trees and a small network on the same terms learn what the fit leaves over. K-fold cross-validation chooses; held-out
error, error at depths never seen, and the FLOPs regression stand beside it. Everything is stored as JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from frugalbert import run
from frugalbert.dist import processor_name
from frugalbert.model.arch import Arch
from frugalbert.model.cost import forward_flops

FORMAT = 1
FOLDS = 5
HELD_OUT = 0.2
MARGIN = 0.02
TREE_RATE = 0.05
TERMS = (
    "1", "layers", "hidden*qkv", "hidden*ffn", "qkv", "layer hidden", "ffn", "heads", "width", "flops",
)  # fmt: skip
"""Columns of `features`: `1`, sums over the layers, the embedding width, and FLOPs per sequence."""
PHYSICAL = slice(0, len(TERMS) - 1)
Params = dict[str, Any]
Matrix = np.ndarray


# ---- features -------------------------------------------------------------------------------------------------------


def features(archs: Sequence[Arch], length: int) -> Matrix:
    """(architectures, terms) float64, the columns as in `TERMS`; sums over layers, so that layers may differ."""
    rows = []
    for arch in archs:
        terms = [(1, x.hidden * x.qkv, x.hidden * x.ffn, x.qkv, x.hidden, x.ffn, x.heads) for x in arch.layers]
        rows.append([1.0, *map(sum, zip(*terms, strict=True)), arch.hidden, length * forward_flops(arch, length)])
    return np.array(rows, dtype=np.float64).reshape(-1, len(TERMS))


# ---- the methods: (features, milliseconds) -> parameters as JSON, and back ------------------------------------------


def _relative(x: Matrix, ms: Matrix, *, positive: bool) -> list[float]:
    """Weights w that minimise the sum of ((x w - ms) / ms)^2, columns scaled for the solver; all >= 0 if `positive`."""
    from scipy.optimize import nnls

    scale = np.abs(x).max(axis=0)
    scale[scale == 0.0] = 1.0
    rows = x / scale / ms[:, None]
    ones = np.ones(len(ms))
    weights = nnls(rows, ones)[0] if positive else np.linalg.lstsq(rows, ones, rcond=1e-10)[0]
    return (weights / scale).tolist()


def _fit_flops(x: Matrix, ms: Matrix, seed: int) -> Params:
    return {"weights": _relative(x[:, [0, -1]], ms, positive=False)}


def _fit_linear(x: Matrix, ms: Matrix, seed: int) -> Params:
    return {"weights": _relative(x[:, PHYSICAL], ms, positive=False)}


def _fit_positive(x: Matrix, ms: Matrix, seed: int) -> Params:
    return {"weights": _relative(x[:, PHYSICAL], ms, positive=True)}


def _on_flops(params: Params, x: Matrix) -> Matrix:
    return x[:, [0, -1]] @ np.array(params["weights"])


def _on_physical(params: Params, x: Matrix) -> Matrix:
    return x[:, PHYSICAL] @ np.array(params["weights"])


def _fit_residual(x: Matrix, ms: Matrix, seed: int) -> tuple[Params, Matrix, Matrix]:
    """The non-negative fit (always above zero), standardised log terms, and log of what it leaves over."""
    base = _fit_positive(x, ms, seed)
    logs = np.log(x[:, 1:])
    centre, spread = logs.mean(axis=0), np.maximum(logs.std(axis=0), 1e-9)
    params = {**base, "centre": centre.tolist(), "spread": spread.tolist()}
    return params, (logs - centre) / spread, np.log(ms / _on_physical(base, x))


def _standard(params: Params, x: Matrix) -> Matrix:
    return (np.log(x[:, 1:]) - np.array(params["centre"])) / np.array(params["spread"])


def _fit_trees(x: Matrix, ms: Matrix, seed: int) -> Params:
    """Gradient-boosted trees (Friedman 2001) on the log of the fit's error; stored as one array of nodes."""
    from sklearn.ensemble import GradientBoostingRegressor

    params, inputs, target = _fit_residual(x, ms, seed)
    model = GradientBoostingRegressor(
        n_estimators=150, max_depth=3, learning_rate=TREE_RATE, subsample=0.7, min_samples_leaf=4, random_state=seed
    ).fit(inputs, target)
    trees = [tree[0].tree_ for tree in np.asarray(model.estimators_)]
    roots = np.cumsum([0, *(tree.node_count for tree in trees)])[:-1]
    nodes = {
        "roots": roots,
        "feature": np.concatenate([tree.feature for tree in trees]),
        "threshold": np.concatenate([tree.threshold for tree in trees]),
        "left": np.concatenate([tree.children_left + root for tree, root in zip(trees, roots, strict=True)]),
        "right": np.concatenate([tree.children_right + root for tree, root in zip(trees, roots, strict=True)]),
        "value": np.concatenate([TREE_RATE * tree.value[:, 0, 0] for tree in trees]),
    }
    return {**params, "offset": float(target.mean()), **{name: array.tolist() for name, array in nodes.items()}}


def _on_trees(params: Params, x: Matrix) -> Matrix:
    names = ("feature", "threshold", "left", "right", "value")
    feature, threshold, left, right, value = (np.array(params[name]) for name in names)
    inputs = _standard(params, x).astype(np.float32)  # as scikit-learn compares them
    node = np.tile(np.array(params["roots"]), (len(x), 1))
    while (inner := feature[node] >= 0).any():
        chosen = np.take_along_axis(inputs, np.maximum(feature[node], 0), axis=1)
        node = np.where(inner, np.where(chosen <= threshold[node], left[node], right[node]), node)
    return _on_physical(params, x) * np.exp(params["offset"] + value[node].sum(axis=1))


def _fit_mlp(x: Matrix, ms: Matrix, seed: int) -> Params:
    """A network of one hidden layer on the log of the fit's error."""
    from sklearn.neural_network import MLPRegressor

    params, inputs, target = _fit_residual(x, ms, seed)
    model = MLPRegressor(
        hidden_layer_sizes=(16,), activation="tanh", solver="lbfgs", alpha=1.0, max_iter=2000, random_state=seed
    ).fit(inputs, target)
    layers = [
        {"weight": weight.tolist(), "bias": bias.tolist()}
        for weight, bias in zip(model.coefs_, model.intercepts_, strict=True)
    ]
    return {**params, "layers": layers}


def _on_mlp(params: Params, x: Matrix) -> Matrix:
    first, last = params["layers"]
    hidden = np.tanh(_standard(params, x) @ np.array(first["weight"]) + np.array(first["bias"]))
    return _on_physical(params, x) * np.exp((hidden @ np.array(last["weight"]) + np.array(last["bias"]))[:, 0])


METHODS: dict[str, tuple[Callable[[Matrix, Matrix, int], Params], Callable[[Params, Matrix], Matrix]]] = {
    "flops": (_fit_flops, _on_flops),
    "positive": (_fit_positive, _on_physical),
    "linear": (_fit_linear, _on_physical),
    "mlp": (_fit_mlp, _on_mlp),
    "trees": (_fit_trees, _on_trees),
}
"""Name -> (fit, predict), the simplest first; `flops` is the baseline."""


# ---- choosing and judging -------------------------------------------------------------------------------------------


def mape(predicted: Matrix, ms: Matrix) -> float:
    """Mean absolute relative error."""
    return float(np.mean(np.abs(predicted / ms - 1.0)))


def spearman(predicted: Matrix, ms: Matrix) -> float | None:
    """Rank correlation; None where all ranks are equal."""
    from scipy.stats import spearmanr

    if len(set(predicted)) < 2 or len(set(ms)) < 2:
        return None
    return float(spearmanr(predicted, ms)[0])  # pyright: ignore[reportArgumentType]


def _left_out(name: str, x: Matrix, ms: Matrix, groups: Matrix, seed: int) -> Matrix:
    """Predictions for every architecture by a fit without its group."""
    fit, predict = METHODS[name]
    predicted = np.empty(len(ms))
    for group in np.unique(groups):
        out = groups == group
        predicted[out] = predict(fit(x[~out], ms[~out], seed), x[out])
    return predicted


def judge(
    archs: Sequence[Arch], ms: Sequence[float], length: int, seed: int = 0, held_out: float = HELD_OUT
) -> dict[str, Any]:
    """Every method's errors; the share `held_out` is kept out of everything but the error that names it.

    `chosen` is the simplest method whose cross-validated error on the others is at most `MARGIN` above the least.
    `points` are (measured, predicted) of the held-out ones.
    Raises ValueError below 8 architectures.
    """
    if len(archs) < 8:
        raise ValueError(
            f"{len(archs)} architectures are too few to learn latencies from; give the space at least 8 architectures"
        )
    x, y = features(archs, length), np.asarray(ms, dtype=np.float64)
    order = np.random.default_rng(seed).permutation(len(y))
    out, train = np.split(order, [max(2, round(held_out * len(y)))])
    folds = np.arange(len(train)) % FOLDS
    depths = np.array([len(arch.layers) for arch in archs])
    methods, points = {}, {}
    for name, (fit, predict) in METHODS.items():
        run.check_stop()
        points[name] = predict(fit(x[train], y[train], seed), x[out])
        by_depth = _left_out(name, x, y, depths, seed) if len(set(depths)) > 1 else None
        methods[name] = {
            "cross_validated_mape": mape(_left_out(name, x[train], y[train], folds, seed), y[train]),
            "held_out_mape": mape(points[name], y[out]),
            "held_out_spearman": spearman(points[name], y[out]),
            "unseen_depth_mape": None if by_depth is None else mape(by_depth, y),
        }
    least = min(values["cross_validated_mape"] for values in methods.values())
    chosen = next(name for name in METHODS if methods[name]["cross_validated_mape"] <= least * (1 + MARGIN) + 1e-6)
    pairs = sorted(zip(y[out].tolist(), points[chosen].tolist(), strict=True))
    return {"chosen": chosen, "held_out": len(out), "methods": methods, "points": pairs}


# ---- the predictor --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Predictor:
    """A fitted method with the setting it holds for. Build it with `train` or `load`."""

    method: str
    params: Params
    low: tuple[float, ...]
    """Least value of every term among the measured architectures."""
    high: tuple[float, ...]
    setting: dict[str, Any]
    """Device, threads, backend, shape and versions (`table.setting_of`)."""
    report: dict[str, Any]
    """What `judge` and the table found out."""

    def predict(self, arch: Arch) -> float:
        """Milliseconds of one call."""
        return float(self.predict_many([arch])[0])

    def predict_many(self, archs: Sequence[Arch]) -> Matrix:
        """Milliseconds (architectures,); says so if some lie outside of what was measured."""
        x = features(archs, self.setting["length"])
        outside = ((x < np.array(self.low) * (1 - 1e-9)) | (x > np.array(self.high) * (1 + 1e-9))).any(axis=0)
        if outside.any():
            names = ", ".join(name for name, is_out in zip(TERMS, outside, strict=True) if is_out)
            run.say(f"latency: some architectures lie outside of the measured ones ({names}); theirs is extrapolated")
        return np.maximum(METHODS[self.method][1](self.params, x), 1e-6)

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "method": self.method,
            "terms": list(TERMS),
            "params": self.params,
            "low": list(self.low),
            "high": list(self.high),
            "setting": self.setting,
            "report": self.report,
        }


def train(archs: Sequence[Arch], ms: Sequence[float], setting: dict[str, Any], seed: int = 0) -> Predictor:
    """Judge all methods, then fit the chosen one to all architectures. `ms` = milliseconds; see `judge` for errors."""
    report = judge(archs, ms, setting["length"], seed)
    x, y = features(archs, setting["length"]), np.asarray(ms, dtype=np.float64)
    params = METHODS[report["chosen"]][0](x, y, seed)
    low, high = tuple(x.min(axis=0).tolist()), tuple(x.max(axis=0).tolist())
    return Predictor(report["chosen"], params, low, high, setting, report)


def load(path: Path, *, other_device: bool = False) -> Predictor:
    """The inverse of `to_json`. Raises ValueError for a damaged file and, unless `other_device`, for another device."""
    value = run.read_json(path)
    try:
        if value["format"] != FORMAT or value["terms"] != list(TERMS) or value["method"] not in METHODS:
            raise ValueError("another version wrote it")
        names = ("method", "params", "low", "high", "setting", "report")
        method, params, low, high, setting, report = (value[name] for name in names)
        found = Predictor(method, params, tuple(low), tuple(high), setting, report)
        smallest = METHODS[method][1](params, np.array([low]))
        if not np.isfinite(smallest).all():
            raise ValueError("its weights are no numbers")
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"{path} is no latency predictor ({error}); run the stage latency again") from None
    if not other_device:
        check_device(found.setting, path)
    return found


def check_device(setting: dict[str, Any], path: Path) -> None:
    """Raises ValueError if `path` was measured on another processor than this machine's."""
    here = device_name(setting["device"])
    if setting["processor"] != here:
        raise ValueError(
            f"{path} was measured on {setting['processor']}, this is {here}; measure here (frugalbert run --redo "
            "latency), or search on that machine"
        )


def device_name(device: str) -> str:
    """The processor's name: the CPU's, or the GPU's for `cuda`. Raises ValueError if there is no GPU."""
    if device == "cpu":
        return processor_name()
    import torch

    if not torch.cuda.is_available():
        raise ValueError("latency.device is cuda, but torch finds no GPU here; write device: cpu")
    return torch.cuda.get_device_name()


def summary(report: dict[str, Any]) -> dict[str, Any]:
    """The chosen method and its errors as headline figures."""
    chosen = report["methods"][report["chosen"]]
    return {"predictor": report["chosen"], **chosen, "flops_held_out_mape": report["methods"]["flops"]["held_out_mape"]}
