"""Every YAML that is shipped loads and plans, and says what it says in its comments."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from frugalbert.cli import app
from frugalbert.config import Config
from frugalbert.model.arch import Arch, LayerArch
from frugalbert.plan import rows
from frugalbert.rehearsal import rehearsal
from frugalbert.space import Space
from frugalbert.train.assemble import make_recipe
from frugalbert.train.phases import at, spans
from frugalbert.yamlfile import load, parse, validate
from tests.structure import ROOT

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def test_the_promised_ones_are_there():
    assert {path.stem for path in CONFIGS} >= {
        "quickstart",
        "academic-24h",
        "extremebert",
        "compact-30m",
        "compact-30m-cpu",
        "autotinybert-mlm",
        "autotinybert-kd",
        "bort",
        "distill-local-teacher",
        "distill-local",
        "sparsebert",
        "long-2048",
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_plans(path: Path, tmp_path: Path):
    result = CliRunner().invoke(app, ["plan", str(path), "--dir", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    config = load(path)
    for section in Config.model_fields:
        if section not in ("name", "machine") and getattr(config, section) is not None:
            assert section in result.stdout
    assert not (tmp_path / "run").exists(), "planning changes nothing"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_its_name_is_its_file(path: Path):
    assert load(path).name == path.stem


def test_academic_24h_is_the_published_recipe():
    """24hBERT, arXiv 2104.07705 and the authors' repository; the table of the paper's hyper-parameters."""
    recipe = load(ROOT / "configs" / "academic-24h.yaml").pretrain
    assert recipe is not None
    published = {
        "arch": "24hbert", "batch_size": 4096, "optimizer": "adamw", "learning_rate": 1e-3, "betas": (0.9, 0.98),
        "epsilon": 1e-6, "weight_decay": 0.01, "clip_norm": 0.0, "warmup": 0.06, "curve": "linear", "dropout": 0.1,
        "precision": "fp16", "seed": 42,
    }  # fmt: skip
    assert {name: getattr(recipe, name) for name in published} == published
    assert (str(recipe.budget), recipe.mask.rate, recipe.mask.style) == ("1d", (0.15,), "bert")


@pytest.mark.parametrize(("name", "size"), [("mlm", 366_048), ("kd", 1_525_200)])
def test_autotinybert_is_the_published_recipe(name: str, size: int):
    """Search grid, options and recipe of the authors' code (arXiv 2107.13686)."""
    config = load(ROOT / "configs" / f"autotinybert-{name}.yaml")
    assert config.space is not None
    assert config.supernet is not None
    assert config.search is not None
    assert Space.of(config.space).size() == size
    published = {
        "sampling": "random", "random_archs": 1, "stratified": False, "combine": "sum", "update": "all",
        "batch_size": 16, "learning_rate": 1e-4, "betas": (0.9, 0.999), "epsilon": 1e-8, "weight_decay": 0.01,
        "clip_norm": 1.0, "dropout": 0.1, "seed": 42, "distill": ("attention", "hidden"),
    }  # fmt: skip
    assert {key: getattr(config.supernet, key) for key in published} == published
    assert config.supernet.mask.rate == ((0.15,) if name == "mlm" else (0.0,))
    assert (config.supernet.teacher is None) == (name == "mlm")
    least, most = config.search.limit.speedup or (0.0, 0.0)
    assert (least, most) == pytest.approx((7 / 1.10 * 8 / 12, 7 / 0.85 * 8 / 12), rel=1e-3)
    recipe = config.search.finetune
    assert recipe is not None
    assert (recipe.epochs, recipe.learning_rate, recipe.batch_size, recipe.max_length) == (4, 3e-5, 32, 128)


def test_bort_is_the_published_space_point_and_recipe():
    """300 architectures, (D, A, H, I) = (4, 8, 1024, 768), T = RoBERTa-large, and the script's distillation weights."""
    config = load(ROOT / "configs" / "bort.yaml")
    assert config.space is not None
    assert config.search is not None
    assert config.pretrain is not None
    assert config.pretrain.distill is not None
    space, arch = Space.of(config.space), Arch.load(config.pretrain.arch)
    assert space.size() == 300
    assert space.contains(Arch.uniform("bert", 4, 1024, heads=8, ffn=768))
    assert (len(arch.layers), arch.hidden, *set(arch.layers)) == (4, 1024, LayerArch(1024, 8, 128, 768))
    assert (config.search.method, config.search.quality) == ("extraction", "training")
    assert config.search.extraction.inference == "latency"
    top = Arch.load(config.search.extraction.maximum or "")
    assert not space.contains(top)
    assert (len(top.layers), top.hidden, *set(top.layers)) == (24, 1024, LayerArch(1024, 16, 64, 4096))
    learnt = config.pretrain.distill
    assert (learnt.mlm, learnt.logits, learnt.temperature, learnt.teacher) == (0.1, 0.5, 2.0, "roberta-large")
    assert (config.pretrain.learning_rate, config.pretrain.warmup) == (1e-4, 0.01)
    plan = dict((row[0], row[2]) for row in rows(config, ROOT / "runs" / "none", ROOT / "configs"))
    assert "extraction: 30 of 300 architectures" in plan["search"]
    assert "60 trainings of 2000 steps" in plan["search"]
    small = rehearsal(config).search
    assert small is not None
    assert small.training is not None
    assert (small.extraction.interval, small.training.steps) == (75, 2), "four architectures of 300"


def test_sparsebert_is_nvidias_pre_training():
    """Two phases of 7,038 and 1,563 steps, each with a batch, a cap of masks and a schedule of its own."""
    config = load(ROOT / "configs" / "sparsebert.yaml")
    assert config.shards is not None
    section = config.pretrain
    assert section is not None
    assert (config.shards.pairs, config.shards.short_share, section.mask.copies) == ("nsp", 0.1, 5)
    parts = spans(section, config.shards.length[0])
    phases = [at(parts, step / 8601) for step in (0, 7037, 7038, 8600)]
    assert [(part.length, part.rows, part.mask.max_predictions) for part in phases] == (
        [(128, 65536, 20)] * 2 + [(512, 32768, 80)] * 2
    )
    recipe = make_recipe(section, ROOT)
    rates = {step: 6e-3 * recipe.rate(step / 8601) for step in (1000, 2000, 2001, 7000, 7138, 7238, 7239, 8600)}
    first, second = 7038, 1563
    assert rates == pytest.approx({
        1000: 6e-3 * 1000 / first / 0.2843, 2000: 6e-3 * 2000 / first / 0.2843,
        2001: 6e-3 * math.sqrt(1 - 2001 / first), 7000: 6e-3 * math.sqrt(1 - 7000 / first),
        7138: 4e-3 * 100 / second / 0.128, 7238: 4e-3 * 200 / second / 0.128,
        7239: 4e-3 * math.sqrt(1 - 201 / second), 8600: 4e-3 * math.sqrt(1 - 1562 / second),
    }, rel=1e-3)  # fmt: skip
    assert [recipe.schedule(step / 8601) for step in (7037, 7038)] == [0, 1]
    plan = dict((row[0], row[2]) for row in rows(config, ROOT / "runs" / "none", ROOT / "configs"))
    assert "for 85.3G tokens" in plan["pretrain"]  # 7038 x 65536 x 128 + 1563 x 32768 x 512


def test_the_local_student_names_the_local_teacher():
    """What of the text or its packing differed would let the student be taught what the teacher is measured on."""
    teacher, student = (load(ROOT / "configs" / f"{name}.yaml") for name in ("distill-local-teacher", "distill-local"))
    assert (student.corpus, student.shards) == (teacher.corpus, teacher.shards)
    assert student.tokenizer is not None
    assert student.pretrain is not None
    assert student.pretrain.distill is not None
    assert student.tokenizer.path == f"../runs/{teacher.name}/tokenizer"
    assert student.pretrain.distill.teacher == f"../runs/{teacher.name}/pretrain/model"
    assert student.finetune == teacher.finetune
    text = (ROOT / "configs" / "distill-local.yaml").read_text()
    cached = parse(text.replace("# top_k", "top_k").replace("# cache", "cache").replace("# start", "start"), "x")
    section = validate(cached, ["pretrain.mask.copies=4"], "x").pretrain
    assert section is not None
    assert section.distill is not None
    assert (section.start, section.distill.top_k) == ("from teacher", 64), "what is commented out is valid, too"


def test_a_misspelt_key_is_met_with_the_right_one(tmp_path: Path):
    path = tmp_path / "bad.yaml"
    path.write_text((ROOT / "configs" / "quickstart.yaml").read_text().replace("batch_size:", "batchsize:"))
    result = CliRunner().invoke(app, ["plan", str(path)])
    assert result.exit_code == 2
    assert "did you mean batch_size?" in result.output
