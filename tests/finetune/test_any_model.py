"""Any Hugging Face encoder with its own tokenizer: every head trains, saves, and answers again as it is."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from frugalbert import config, run
from frugalbert.finetune import models
from tests.finetune.golden import files
from tests.finetune.test_runner import build, section, write_task
from tests.finetune.test_suite import write_kind

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
CONFIGS = {
    "roberta": ("RobertaConfig", {**SIZES, "max_position_embeddings": 70, "type_vocab_size": 1}),
    "electra": ("ElectraConfig", {**SIZES, "embedding_size": 16, "max_position_embeddings": 64}),
    "deberta-v2": (
        "DebertaV2Config",
        {**SIZES, "max_position_embeddings": 64, "relative_attention": True, "pos_att_type": ["c2p", "p2c"],
         "position_biased_input": False, "type_vocab_size": 0},
    ),
    "modernbert": ("ModernBertConfig", {**SIZES, "max_position_embeddings": 64, "global_attn_every_n_layers": 1}),
    "distilbert": ("DistilBertConfig", {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 48,
                                        "max_position_embeddings": 64}),
}  # fmt: skip


@pytest.fixture(scope="module", params=CONFIGS)
def foreign(request, tiny, tmp_path_factory) -> Path:
    """A masked LM (ELECTRA: a discriminator) with random weights and the tiny model's tokenizer."""
    import transformers

    name, sizes = CONFIGS[request.param]
    tokenizer = models.open_source(str(tiny), None).tokenizer
    settings = getattr(transformers, name)(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **sizes)
    torch.manual_seed(1)
    owner = transformers.AutoModelForPreTraining if request.param == "electra" else transformers.AutoModelForMaskedLM
    path = tmp_path_factory.mktemp(request.param)
    owner.from_config(settings).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_every_head(foreign, tmp_path):
    """Classes, numbers, options, answers, tags and words in context, each for a step or two."""
    kinds = ("multiple-choice", "question-answering", "token-classification")
    tasks = [write_task(tmp_path), write_task(tmp_path, kind="regression"), *(write_kind(tmp_path, k) for k in kinds)]
    files.write(tmp_path / "data")
    given = section(foreign, [*tasks, "wic"], seeds=[0], data="data", random_baseline=False)
    headlines = build(tmp_path / "out", given, tmp_path)
    assert set(headlines) == {*(task.name for task in tasks), "wic", "device"}
    for task in [*tasks, "wic"]:
        name = task if isinstance(task, str) else task.name
        model = tmp_path / "out" / name / "model"
        again = section(model, [task], data="data", train=False)
        build(tmp_path / f"again-{name}", again, tmp_path)
        first = run.read_json(tmp_path / "out" / name / "pretrained-seed0" / "result.json")
        second = run.read_json(tmp_path / f"again-{name}" / name / "as-it-is-seed0" / "result.json")
        assert second["metrics"] == pytest.approx(first["metrics"], nan_ok=True), name


def test_blimp_needs_a_masked_lm(foreign, tmp_path):
    (tmp_path / "blimp").mkdir()
    line = ('{"sentence_good": "the cat runs", "sentence_bad": "the cat run", "field": "syntax", "UID": "agreement", '
            '"linguistics_term": "agreement", "pairID": "0"}\n')  # fmt: skip
    (tmp_path / "blimp" / "agreement.jsonl").write_text(line)
    given = section(foreign, ["blimp"], data=str(tmp_path), random_baseline=False)
    if "electra" in foreign.name:
        with pytest.raises(ValueError, match="has no masked-LM head"):
            build(tmp_path / "out", given)
        return
    assert build(tmp_path / "out", given)["blimp"]["pretrained"] in (0.0, 1.0)


def test_a_directory_without_a_tokenizer(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "model")
    for path in (tmp_path / "model").glob("token*"):
        path.unlink()
    with pytest.raises(ValueError, match="has no tokenizer that can be used"):
        build(tmp_path / "out", config.Finetune(tasks=[write_task(tmp_path)], model=str(tmp_path / "model")))
