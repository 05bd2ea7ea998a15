"""The stage runner: skip, continue, stop on drift, redo, keep; with fake stages, so nothing is trained."""

import dataclasses
import json

import pytest

from frugalbert import run as files
from frugalbert import stages
from frugalbert.rehearsal import rehearsal
from frugalbert.yamlfile import load, parse, validate
from tests import fake_stages
from tests.structure import ROOT

TEXT = (
    "name: t\ncorpus: {sources: [texts/*.txt]}\ntokenizer: {}\nshards: {}\npretrain: {budget: 10steps}\n"
    "finetune: {tasks: [cola]}\nexport: {}\nreport: {}\n"
)


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setattr(
        stages,
        "STAGES",
        tuple(dataclasses.replace(stage, function="tests.fake_stages:build") for stage in stages.STAGES),
    )
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("some text")

    def go(*settings, **options):
        config = validate(parse(TEXT, "t.yaml"), settings, "t.yaml")
        return stages.run(config, tmp_path / "run", tmp_path, **options)

    go.directory = tmp_path / "run"
    go.folder = tmp_path
    go.count = lambda stage: fake_stages.calls(tmp_path / "run", stage)
    return go


def test_everything_runs_once_and_is_skipped_afterwards(world):
    assert {status.state for status in world()} == {"done"}
    assert (
        (world.directory / "export" / "result").read_text().startswith("export(corpus(), finetune(corpus(), pretrain(")
    )
    world()
    assert all(world.count(name) == 1 for name in ("corpus", "tokenizer", "pretrain", "report"))
    record = files.read_record(world.directory / "pretrain")
    assert record["metrics"] == {"inputs": 2}
    assert record["section"]["budget"] == "10steps"
    assert "torch" in record["versions"]


def test_where_it_runs_is_not_identity(world):
    world()
    world("machine.threads=1", "machine.micro_batch=4")
    assert world.count("pretrain") == 1


def test_a_changed_setting_stops_and_says_what_changed(world):
    world()
    with pytest.raises(ValueError, match="shards was built with other settings") as error:
        world("shards.length=64")
    assert "shards.length: [128] -> [64]" in str(error.value)
    assert "--redo shards" in str(error.value)
    assert world.count("shards") == 1


def test_a_changed_source_file_stops(world):
    world()
    (world.folder / "texts" / "a.txt").write_text("another text")
    with pytest.raises(ValueError, match="corpus was built with other settings or inputs"):
        world()


def test_redo_builds_again_with_all_that_follows_and_moves_the_old_aside(world):
    world()
    world("shards.length=64", redo=["shards"])
    assert [world.count(name) for name in ("corpus", "tokenizer", "shards", "pretrain", "export")] == [1, 1, 2, 2, 2]
    assert (world.directory / "shards.old-1" / "result").exists()
    world("shards.length=64")
    assert world.count("shards") == 2


def test_keep_accepts_the_drift_and_the_record_says_so(world):
    world()
    world("shards.length=64", keep=["shards"])
    assert world.count("shards") == world.count("pretrain") == 1
    assert files.read_record(world.directory / "shards")["accepted"]["drift"] == ["shards.length: [128] -> [64]"]
    statuses = world("shards.length=64")
    assert next(status.state for status in statuses if status.stage.name == "shards") == "kept"
    with pytest.raises(ValueError, match="shards was built"):
        world("shards.length=32")


def test_the_report_is_derived_and_rebuilt_without_asking(world):
    world()
    world("report.title=other")
    assert world.count("report") == 2


def test_only_runs_one_stage(world):
    world(only="corpus")
    assert world.count("corpus") == 1
    assert world.count("tokenizer") == 0
    with pytest.raises(ValueError, match="no stage 'bench' in this run"):
        world(only="bench")


def _failing(name):
    bad = "tests.fake_stages:fail"
    return tuple(dataclasses.replace(row, function=bad) if row.name == name else row for row in stages.STAGES)


def test_a_failed_stage_leaves_no_record_and_starts_anew_with_mended_settings(world, monkeypatch):
    good = stages.STAGES
    monkeypatch.setattr(stages, "STAGES", _failing("shards"))
    with pytest.raises(ValueError, match="there is no text here"):
        world()
    assert files.read_record(world.directory / "shards") is None
    assert world.count("pretrain") == 0
    monkeypatch.setattr(stages, "STAGES", good)
    assert {status.state for status in world("shards.length=64")} == {"done"}
    assert world.count("corpus") == 1
    assert not (world.directory / "shards" / "half").exists()


def test_half_a_training_is_not_thrown_away_for_other_settings(world, monkeypatch):
    good = stages.STAGES
    monkeypatch.setattr(stages, "STAGES", _failing("pretrain"))
    with pytest.raises(ValueError, match="there is no text here"):
        world()
    monkeypatch.setattr(stages, "STAGES", good)
    with pytest.raises(ValueError, match="pretrain was begun with other settings"):
        world("pretrain.batch_size=8")
    world("pretrain.batch_size=8", redo=["pretrain"])
    assert (world.directory / "pretrain.old-1" / "half").exists()


def test_a_damaged_record_is_named(world):
    world()
    (world.directory / "shards" / "stage.json").write_text("{")
    with pytest.raises(ValueError, match=r"shards/stage\.json is damaged"):
        world()


def test_a_run_directory_is_continued_from_its_snapshot(world):
    world("pretrain.budget=20steps")
    text = (world.directory / stages.SNAPSHOT).read_text()
    config = validate(parse(text, "run.yaml"), [], "run.yaml")
    assert str(config.pretrain.budget) == "20steps"
    assert stages.folder_of(world.directory) == world.folder
    stages.run(config, world.directory, stages.folder_of(world.directory))
    assert world.count("pretrain") == 1


@pytest.mark.usefixtures("world")
def test_a_project_may_move_with_its_runs(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    (old / "texts").mkdir(parents=True)
    (old / "texts" / "a.txt").write_text("some text")
    stages.run(validate(parse(TEXT, "t.yaml"), [], "t.yaml"), old / "runs" / "t", old)
    old.rename(new)
    run = new / "runs" / "t"
    assert stages.folder_of(run).resolve() == new.resolve()
    statuses = stages.run(validate(parse((run / stages.SNAPSHOT).read_text(), "run.yaml"), [], "run.yaml"), run,
                          stages.folder_of(run))  # fmt: skip
    assert {status.state for status in statuses} == {"done"}
    assert fake_stages.calls(run, "corpus") == fake_stages.calls(run, "pretrain") == 1


def test_an_unwritable_place_is_one_sentence(world):
    (world.folder / "file").write_text("")
    config = validate(parse(TEXT, "t.yaml"), [], "t.yaml")
    with pytest.raises(ValueError, match="cannot write the run directory .*choose another with --dir"):
        stages.run(config, world.folder / "file" / "run", world.folder)


def test_the_rehearsal_is_the_same_pipeline_at_toy_size():
    config = rehearsal(validate(parse(TEXT, "t.yaml"), ["pretrain.budget=24h"], "t.yaml"))
    assert str(config.pretrain.budget) == "20steps"
    assert config.pretrain.validation.rows == 32
    assert config.corpus.sources[0].max_documents == 2000
    assert config.finetune.seeds == (0,)
    assert config.report is not None


def test_a_rehearsal_has_small_batches_in_every_phase():
    config = rehearsal(load(ROOT / "configs" / "sparsebert.yaml"))
    assert config.pretrain is not None
    assert [(phase.length, phase.batch_size) for phase in config.pretrain.phases] == [(512, None)]
    assert config.pretrain.batch_size == 8


def test_a_rehearsal_does_not_fine_tune_candidates_for_hours():
    config = rehearsal(load(ROOT / "configs" / "autotinybert-mlm.yaml"))
    assert config.search is not None
    assert config.search.finetune is not None
    assert (config.search.evaluations, config.search.finetune.max_train_examples) == (8, 64)
    assert config.search.finetune.tasks[0] == "mnli"


def test_records_are_plain_json(world):
    world()
    for stage in ("corpus", "pretrain"):
        record = json.loads((world.directory / stage / "stage.json").read_text())
        assert set(record) >= {
            "stage",
            "section",
            "inputs",
            "fingerprint",
            "seconds",
            "versions",
            "metrics",
            "finished",
        }


def test_other_ranks_wait_for_what_rank_0_writes_after_a_stage_of_all(world, monkeypatch):
    """The next stage reads it: attention's patterns are written long after the other ranks have trained."""
    waited = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(stages, "_wait", lambda out: waited.append((out.name, world.count("pretrain"))))
    (world.directory / "pretrain").mkdir(parents=True)
    world()
    names = [name for name, _ in waited]
    assert names == ["corpus", "tokenizer", "shards", "pretrain", "finetune", "export", "report"]
    assert dict(waited)["pretrain"] == 1, "it has worked before it waits"
