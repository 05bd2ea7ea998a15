"""ExtremeBERT's settings files: their curves by their formulas in steps, their optimizers, and what is refused."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from frugalbert.train import ini, optim
from frugalbert.train.curves import curve
from frugalbert.train.optim import OptimizerSettings, check_optimizer
from tests.test_docs import EXTREME

STEPS, PEAK = 940, 2e-3
# Their files, and the rate over the peak rate at t steps after warm-up, as their documentation gives it.
THEIRS: dict[str, tuple[str, Any]] = {
    "linear_decay": (f"num_iter = {STEPS}", lambda t: (STEPS - t) / STEPS),
    "cosine_decay": (
        "activation_point = 0\nrestarting_points = 0\nt_0 = 470\nt_mul = 1.0\nmin_lr = 1e-4",
        lambda t: (1e-4 + (PEAK - 1e-4) * 0.5 * (1 + math.cos(math.pi * (t % 470) / 470))) / PEAK,
    ),
    "exponential_decay": ("decay_step = 100\ndecay_rate = 0.5", lambda t: 0.5 ** (t / 100)),
    "step_decay": (f"num_iter = {STEPS}\nnum_interval = 3\ndecay_rate = 10.0", lambda t: 10.0 ** -(t * 3 // STEPS)),
    "elastic_step_decay": (
        f"num_iter = {STEPS}\ninterval_shrink_rate = 1.4142\ncr_k = 3",
        lambda t: min(1.0, 0.7071 ** (math.floor(-math.log(1 - t / STEPS) / math.log(1.4142)) - 2)),
    ),
    "inverse_time_decay": ("lambda = 3.33", lambda t: 1 / (1 + PEAK * 3.33 * t)),
    "piecewise_constant": (
        "starting_points = 300, 600\nfactors = 0.5, 0.1", lambda t: 1.0 if t < 300 else 0.5 if t < 600 else 0.1
    ),
    "piecewise_inverse_time": (
        "starting_points = 0, 500\na = 0.01 0.02\nb = 1 2",
        lambda t: 1 / (0.01 * t + 1) if t < 500 else 1 / (0.02 * (t - 500) + 2),
    ),
    "poly_remain_time_decay": (f"num_iter = {STEPS}\ndecay_rate = 2", lambda t: (1 - t / STEPS) ** 2),
}  # fmt: skip


def write(folder: Path, kind: str, settings_text: str = "", name: str = "mine.conf") -> Path:
    (folder / name).write_text(f"[general]\ntype = {kind}\n\n[hyperparams]\n{settings_text}\n")
    return folder


@pytest.mark.parametrize("kind", THEIRS)
def test_their_curves_in_their_units(kind: str, tmp_path: Path):
    text, expected = THEIRS[kind]
    shape = curve("mine.conf", {}, write(tmp_path, kind, text), (float(STEPS), PEAK))
    for t in (1, 150, 299, 301, 471, 601, 800, 931):
        assert shape(t / STEPS) == pytest.approx(expected(t), rel=1e-3), t


def test_every_type_of_theirs_has_a_reading(tmp_path: Path):
    there = {name for name in EXTREME if name.endswith(("_decay", "_time", "_constant", "_eigencurve"))}
    assert set(ini.CURVES) == there
    text = f"num_iter = {STEPS}\nalpha = 2\nkappa = 100\nmin_lr = 2e-4"
    shape = curve("mine.conf", {}, write(tmp_path, "continuous_eigencurve", text), (None, PEAK))
    assert (shape(0.0), shape(1.0)) == pytest.approx((1.0, 0.1))


def test_shift_and_restarts_count_steps_too(tmp_path: Path):
    text = "num_iter = 1000\nactivation_point = 100\nrestarting_points = 500, 700"
    shape = curve("mine.conf", {}, write(tmp_path, "linear_decay", text))
    same = curve("linear", {"activation_point": 0.1, "restarting_points": (0.5, 0.7)})
    assert [shape(x / 10) for x in range(11)] == [same(x / 10) for x in range(11)]


def test_our_own_types_and_settings(tmp_path: Path):
    shape = curve("mine.ini", {"cooldown": 0.5}, write(tmp_path, "wsd", "cooldown = 0.25", "mine.ini"))
    assert shape(0.6) == curve("wsd", {"cooldown": 0.5})(0.6)  # the YAML's options go over the file's
    shape = curve("mine.ini", {}, write(tmp_path, "step_decay", "intervals = 4", "mine.ini"))
    assert shape(0.3) == 0.5


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        ("cosine_decay", "t0 = 3", "mine.conf: cosine_decay has no setting t0; did you mean t_0?"),
        ("cosine_decy", "t_0 = 3", "mine.conf: there is no curve 'cosine_decy'; did you mean cosine_decay?"),
        ("cosine_decay", "t_0 = 3", "mine.conf: t_0 counts steps; add num_iter"),
        ("cosine_decay", "num_iter = 10\nt_0 = many", "mine.conf: t_0 is 'many'; write a number"),
        ("cosine_decay", "num_iter = 10\nt_0 = inf", "mine.conf: t_0 is 'inf'; write a number"),
        ("wsd", "cool = 0.5", "mine.conf: there is no setting cool; did you mean cooldown?"),
        ("elastic_step_decay", "num_iter = 10\ncr_k = yes", "mine.conf: cr_k is True; write a number"),
        ("", "", "mine.conf names no type"),
    ],
)
def test_wrong_curves_get_a_sentence(kind: str, text: str, words: str, tmp_path: Path):
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        curve("mine.conf", {}, write(tmp_path, kind, text))
    assert "\n" not in str(caught.value)


def test_optimizers(tmp_path: Path):
    given_settings = OptimizerSettings(name="mine.conf", betas=(0.8, 0.98))
    found = check_optimizer(given_settings, write(tmp_path, "sgd", "momentum = 0.9\nnesterov = no"))
    assert (found.name, found.betas, found.options) == ("sgd", (0.9, 0.98), {"nesterov": False})
    text = '[general]\ntype = adamw\n\ncomment_str = "set in other arguments, like the old fashion."\n'
    (tmp_path / "mine.conf").write_text(text)
    assert check_optimizer(given_settings, tmp_path) == OptimizerSettings(name="adamw", betas=(0.8, 0.98))


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        ("sgd", "nestorov = no", "mine.conf: there is no setting nestorov; did you mean nesterov?"),
        ("sgd", "momentum = 2", "mine.conf: momentum is 2; write a number from 0 to 1"),
        ("sgd", "nesterov = 3", "mine.conf.nesterov is 3; write true or false"),
        ("adamwe", "", "mine.conf: there is no optimizer 'adamwe'; did you mean adamw?"),
    ],
)
def test_wrong_optimizers_get_a_sentence(kind: str, text: str, words: str, tmp_path: Path):
    with pytest.raises(ValueError, match=re.escape(words)):
        check_optimizer(OptimizerSettings(name="mine.conf"), write(tmp_path, kind, text))


def test_absent_and_foreign_files(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        curve("absent.conf", {}, tmp_path)
    (tmp_path / "mine.conf").write_bytes(b"\xff\xfe[gen")
    with pytest.raises(ValueError, match="is no settings file"):
        ini.read_ini("mine.conf", tmp_path)
    (tmp_path / "mine.conf").write_text("[general]\ntype = sgd\n[hyperparms]\nmomentum = 1\n")
    with pytest.raises(ValueError, match="has a section 'hyperparms'"):
        ini.read_ini("mine.conf", tmp_path)


LINES = st.sampled_from(["[general]", "[hyperparams]", "type = sgd", "type = linear_decay", "num_iter = 3", "a", "= 1"])


@settings(derandomize=True, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(LINES | st.text(max_size=20), max_size=8).map("\n".join))
@example("[DEFAULT]\ntype = sgd\n[general]")
def test_any_file_is_read_or_refused(tmp_path: Path, text: str):
    (tmp_path / "any.conf").write_text(text, encoding="utf-8", errors="replace")
    for use in (lambda: curve("any.conf", {}, tmp_path)(0.5),
                lambda: optim.check_optimizer(OptimizerSettings(name="any.conf"), tmp_path)):  # fmt: skip
        try:
            use()
        except ValueError as error:
            assert "\n" not in str(error)  # noqa: PT017
