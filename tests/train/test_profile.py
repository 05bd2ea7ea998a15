"""Where a step's time goes: all of it is somewhere, and the sentence names what exceeds its due."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from typer.testing import CliRunner

from frugalbert.cli import app
from frugalbert.config import Machine
from frugalbert.train import profile
from frugalbert.train.summary import datasheet_share
from tests.train import small_run


def test_a_step_is_taken_apart(tmp_path: Path):
    inputs = small_run.prepare(tmp_path)
    section = small_run.section(optimizer="muon")
    machine = Machine(device="cpu", threads=1, compile=False, micro_batch=4)
    found = profile.build(section, inputs, tmp_path / "profile", machine)
    assert sum(found["shares"].values()) == pytest.approx(1.0, abs=1e-3)
    expected = {profile.DATA, profile.OPTIMIZER, profile.HEAD, profile.PRODUCTS, profile.ATTENTION, profile.REST}
    assert set(found["shares"]) == expected
    assert min(found["shares"].values()) > 0.0
    assert (found["micro_batch"], found["precision"] in ("fp32", "bf16")) == (4, True)
    assert json.loads((tmp_path / "profile" / "profile.json").read_text()) == found
    trace = json.loads(gzip.decompress((tmp_path / "profile" / "trace.json.gz").read_bytes()))
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {profile.DATA, profile.OPTIMIZER} <= names


@pytest.mark.parametrize(
    ("shares", "start"),
    [
        (
            {profile.PRODUCTS: 0.7, profile.OPTIMIZER: 0.1, profile.REST: 0.2},
            "matrix products take 70% of a step, which",
        ),
        ({profile.PRODUCTS: 0.5, profile.OPTIMIZER: 0.3, profile.REST: 0.2}, "30% of a step is optimizer; the optim"),
        ({profile.IDLE: 0.5, profile.OPTIMIZER: 0.25}, "50% of a step is waiting for the CPU; the GPU waits"),
        ({profile.PRODUCTS: 0.4, profile.DATA: 0.3, profile.REST: 0.3}, "30% of a step is data and masks; drawing"),
    ],
)
def test_the_bottleneck_is_named(shares: dict[str, float], start: str):
    assert profile.bottleneck(shares, 0.5).startswith(start)


def test_a_kernel_counts_once():
    """On a GPU an operator's event has the time of its kernels, which are events, too; the rest is waiting."""
    host, kernel = (SimpleNamespace(name=name, cpu_parent=None, device_type=kind, self_device_time_total=4e5)
                    for name, kind in (("aten::mm", DeviceType.CPU), ("nvjet_gemm", DeviceType.CUDA)))  # fmt: skip
    shares = profile._shares([host, kernel], 1.0, torch.device("cuda"))
    assert shares == {profile.IDLE: pytest.approx(0.6), profile.PRODUCTS: pytest.approx(0.4)}


def test_the_datasheets_share(monkeypatch: pytest.MonkeyPatch):
    """Of dense products, by the name that torch gives; none for CPUs, fp32 and unknown processors."""
    gpu = torch.device("cuda")
    for name, expected in (
        ("NVIDIA H200", 0.5),
        ("NVIDIA A100-SXM4-80GB", 494.5 / 312),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA L40", 494.5 / 181),
        ("NVIDIA L4", 494.5 / 121),
        ("NVIDIA H200 NVL", 494.5 / 835),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert datasheet_share(494.5e12, gpu, "bf16") == (expected and pytest.approx(expected, abs=1e-4))
    assert datasheet_share(494.5e12, gpu, "fp32") is None
    assert datasheet_share(494.5e12, torch.device("cpu"), "bf16") is None


def test_a_run_without_shards_is_one_sentence(tmp_path: Path):
    yaml = tmp_path / "run.yaml"
    yaml.write_text("name: t\ncorpus: {sources: [texts]}\n")
    result = CliRunner().invoke(app, ["bench", str(yaml), "--profile"])
    assert result.exit_code == 2
    assert "has no finished shards to train on; call `frugalbert run` first" in result.output
