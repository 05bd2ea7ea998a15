"""The documentation says what is there: generated pages are current, named keys and files exist."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from frugalbert import explain
from frugalbert.config import Config
from frugalbert.train.curves import CURVES
from tests.faults import rows
from tests.structure import ROOT, benchmark

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
SECTIONS = "|".join(Config.model_fields)
# `pretrain.mask.rate`, `pretrain.budget: 24h`, `machine.trackers`: a section's name, dots and keys, perhaps a value.
KEY = re.compile(rf"`((?:{SECTIONS})(?:\.[a-z_0-9]+)*)(?::\s[^`]*)?`")
# What the reference systems have (options of their command lines, keys of their files): each must be answered.
ACADEMIC = """
    deepspeed deepspeed_transformer_kernel stochastic_mode attention_dropout_checkpoint normalize_invertible
    gelu_checkpoint gradient_clipping steps_per_print wall_clock_breakdown prescale_gradients
    gradient_predivide_factor fp16 fp16_backend fp16_opt model_type tokenizer_name model_name_or_path
    config_name cache_dir pretrain_run_args vocab_size hidden_size num_hidden_layers num_attention_heads
    intermediate_size hidden_act hidden_dropout_prob attention_probs_dropout_prob max_position_embeddings
    type_vocab_size initializer_range layernorm_embedding fused_linear_layer sparse_mask_prediction
    encoder_ln_mode layer_norm_type dataset_path num_workers async_worker data_loader_type optimizer_type
    weight_decay bias_correction max_coeff min_coeff adam_beta1 adam_beta2 adam_eps lr lr_schedule curve
    warmup_proportion decay_rate decay_step num_warmup_steps seed output_dir max_predictions_per_seq
    load_training_checkpoint load_checkpoint_id num_epochs_between_checkpoints job_name project_name
    current_run_id max_steps max_steps_per_epoch print_steps do_validation validation_epochs
    validation_epochs_begin validation_epochs_end validation_begin_proportion validation_end_proportion
    validation_micro_batch add_nsp early_exit_time_marker total_training_time finetune_time_markers
    finetune_checkpoint_at_end gradient_accumulation_steps train_batch_size train_micro_batch_size_per_gpu
    num_epochs use_early_stopping early_stop_time early_stop_eval_loss scale_cnt_limit log_throughput_every
    --n_processes --num_train_shards --num_test_shards --frac_test --max_seq_length --masked_lm_prob
    --short_seq_prob --dup_factor --whole_word_mask --do_lower_case --pairs
""".split()
EXTREME = """
    SYSTEM.NUM_GPUS SYSTEM.MAX_MEMORY_IN_GB DATASET.ENABLED DATASET.HUGGINGFACE_DATASETS
    DATASET.CUSTOMIZED_DATASETS DATASET.ID DATASET.TMP_DIR DATASET.OUTPUT_DIR DATASET.LOG_DIR PRETRAIN.ENABLED
    PRETRAIN.OPTIMIZER PRETRAIN.NUM_STEPS PRETRAIN.LEARNING_RATE PRETRAIN.ID FINETUNE.ENABLED
    FINETUNE.MULTIPROCESS_GPU_LIST RESULT_COLLECTION.ENABLED TOKENIZER.NAME_OR_PATH WANDB.* --config_file
    --clear_cache optimizer_conf_file curve_conf_file inverse_time_decay piecewise_constant
    piecewise_inverse_time cosine_decay exponential_decay step_decay elastic_step_decay poly_remain_time_decay
    continuous_eigencurve linear_decay activation_point restarting_points
""".split()
AUTOTINY = """
    generate_data.py pre_training.py inference_time_evaluation.py latency_predictor.py searcher.py
    superbert_run_en_classifier.py submodel_extractor.py --train_corpus --output_dir --bert_model --do_lower_case
    --max_seq_len --reduce_memory --num_workers --layer_num_space --hidden_size_space --intermediate_size_space
    --head_num_space --qkv_size_space --pregenerated_data --student_model --teacher_model --cache_dir --epochs
    --gradient_accumulation_steps --train_batch_size --learning_rate --max_seq_length --fp16 --scratch
    --warmup_proportion --warmup_steps --masked_lm_prob --max_predictions_per_seq --adam_epsilon --max_grad_norm
    --logging_steps --seed --continue_index --sample_times_per_batch --further_train --mlm_loss --debug --ckpt_path
    --latency_constraint --model --candidate_file --output_file --arch_perfs_file --gen_size candidate random fast
    evolved --data_dir --task_name --arches_file --eval_step --infer_cnt --batch_size qkv_size
    latency_dataset/lat.tmp sample_layer_num sample_hidden_size sample_intermediate_sizes
    sample_num_attention_heads sample_qkv_sizes
""".split()

BORT = """
    --input_file --output_dir --dataset_name --max_seq_length --short_seq_prob --masked_lm_prob
    --max_predictions_per_seq --whole_word_mask --dupe_factor --random_seed --num_outputs --num_workers --verbose
    --model --teacher_model --teacher_ckpt_dir --teacher_ce_weight --mlm_weight --distillation_temperature
    --num_steps --lr --warmup_ratio --batch_size --use_avg_len --num_buckets --accumulate --batch_size_eval
    --num_eval_steps --dtype --data --data_eval --pretrained --ckpt_dir --start_step --ckpt_interval --log_interval
    --profile --cpu_only --task_name --dataset --pretrained_parameters --model_parameters --only_inference --epochs
    --ramp_up_epochs --training_steps --dev_batch_size --init --prob --epsilon --momentum --weight_decay --dropout
    --max_len --seed --gpu --use_scheduler --no_distributed --early_stop --multirc_test_location
    --record_test_location --record_dev_location --race_dataset_location
""".split()

NVIDIA = """
    --input_file --output_file --vocab_file --bert_model --do_lower_case --max_seq_length --dupe_factor
    --max_predictions_per_seq --masked_lm_prob --short_seq_prob --random_seed --input_dir --output_dir --config_file
    --init_checkpoint --train_batch_size --gradient_accumulation_steps --learning_rate --warmup_proportion --max_steps
    --num_train_epochs --phase2 --phase1_end_step --fp16 --loss_scale --init_loss_scale --seed --do_train
    --disable_progress_bar --json-summary --log_freq --local_rank --use_env --allreduce_post_accumulation
    --allreduce_post_accumulation_fp16 --checkpoint_activations --resume_from_checkpoint --resume_step
    --num_steps_per_checkpoint --skip_checkpoint FusedLAMB PolyWarmUpScheduler
""".split()


def known_keys() -> set[str]:
    """Every key, without the marks of lists: `corpus.sources.path`."""
    return {key.path.replace("[]", "") for key in explain.all_keys()}


def named_keys(text: str) -> Iterator[str]:
    yield from (match[1] for match in KEY.finditer(text) if not match[1].endswith((".json", ".yaml", ".py")))


def test_config_page_is_current():
    page = ROOT / "docs" / "config.md"
    assert page.read_text(encoding="utf-8") == benchmark("config_page").markdown(), "run `make docs`"


def test_every_key_is_explained():
    silent = [key.path for key in explain.all_keys() if not key.text]
    assert silent == []
    page = explain.explain()
    assert [key.path for key in explain.all_keys() if f"{key.name}:" not in page] == []
    assert "rate: [0.15]  (list: number, 0 or more and below 1)" in explain.explain("pretrain.mask")
    assert explain.explain("pretrain.mask.rate").strip().startswith("pretrain.mask.rate:")


@pytest.mark.parametrize("wrong", ["pretain", "mask", "pretrain.batchsize"])
def test_a_wrong_name_is_met_with_the_right_one(wrong):
    right = {"pretain": "pretrain", "mask": "pretrain.mask", "pretrain.batchsize": "pretrain.batch_size"}[wrong]
    with pytest.raises(ValueError, match=rf"did you mean .*\b{right}\b"):
        explain.explain(wrong)


def test_the_schema_accepts_what_is_shipped():
    """A small validator for the part of JSON Schema that the schema uses; every shipped file must pass it."""
    schema = json.loads(explain.schema())
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        assert list(_violations(yaml.safe_load(path.read_text()), schema, schema["$defs"])) == [], path
    bad = {"name": "x", "shards": {"lenght": 128}, "pretrain": {"budget": 3}}
    found = list(_violations(bad, schema, schema["$defs"]))
    assert found == ["shards: no branch fits", "pretrain: no branch fits"]


def _violations(value, schema, definitions, where="") -> Iterator[str]:
    types = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "null": type(None)}
    types["boolean"] = bool
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rsplit("/", 1)[-1]]
    if "anyOf" in schema:
        if all(any(True for _ in _violations(value, branch, definitions, where)) for branch in schema["anyOf"]):
            yield f"{where}: no branch fits"
        return
    if schema.get("type") == "number" and isinstance(value, str) and re.fullmatch(r"[0-9.]+e-?[0-9]+", value):
        value = float(value)  # PyYAML's reading of 1e-3
    if not isinstance(value, types[schema.get("type", "object")]) or value not in schema.get("enum", [value]):
        yield f"{where}: {value!r}"
        return
    if isinstance(value, dict) and "properties" in schema:
        for key, item in value.items():
            if key not in schema["properties"]:
                yield f"{where}.{key}: unknown"
            else:
                yield from _violations(item, schema["properties"][key], definitions, f"{where}.{key}".strip("."))
    if isinstance(value, list) and "items" in schema:
        for item in value:
            yield from _violations(item, schema["items"], definitions, where)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_named_keys_exist(path: Path):
    assert set(named_keys(path.read_text(encoding="utf-8"))) - known_keys() == set()


def test_the_check_of_keys_can_fail():
    text = "`pretrain.budget: 24h` and `pretrain.bugdet`, `corpus.sources.path`, `finetune`, not `SYSTEM.NUM_GPUS`"
    assert set(named_keys(text)) - known_keys() == {"pretrain.bugdet"}


def unanswered(page: str, options: list[str]) -> list[str]:
    """Options that no row names in its first cell (in backticks), or whose other cells give no key and no reason."""
    rows = [re.split(r"\s*\|\s*", line.strip("| ")) for line in page.splitlines() if line.startswith("| ")]
    missing = []
    for option in options:
        name = re.compile(rf"(?<![\w.]){re.escape(option)}(?![\w.])")
        answers = [row[1:] for row in rows if any(name.search(code) for code in re.findall(r"`([^`]+)`", row[0]))]
        if not answers or not all(any(cell.startswith("– ") or "`" in cell for cell in row) for row in answers):
            missing.append(option)
    return missing


def test_every_option_of_the_reference_systems_is_answered():
    academic, extreme = (ROOT / "docs" / "coming-from.md").read_text(encoding="utf-8").split("## ExtremeBERT\n")
    assert unanswered(academic, ACADEMIC) == []
    extreme, autotiny = extreme.split("\n## AutoTinyBERT\n")
    assert unanswered(extreme, EXTREME) == []
    autotiny, bort = autotiny.split("\n## Bort\n")
    assert unanswered(autotiny, AUTOTINY) == []
    bort, nvidia = bort.split("\n## NVIDIA BERT\n")
    assert unanswered(bort, BORT) == []
    assert unanswered(nvidia, NVIDIA) == []
    assert unanswered("| `lr` | | |\n| `seed` | 42 | – none |", ["lr", "seed", "fp16"]) == ["lr", "fp16"]


def test_curves_and_their_settings_exist():
    """The last table on ExtremeBERT: every curve of ours, and the settings that its function takes."""
    page = (ROOT / "docs" / "coming-from.md").read_text(encoding="utf-8").split("| curve there |")[1].split("\n## ")[0]
    rows = [re.split(r"\s*\|\s*", line.strip("| ")) for line in page.splitlines() if line.startswith("| `")]
    named = {row[2].strip("`"): set(re.findall(r"[a-z_]+", row[3].split(":")[0])) - {"none"} for row in rows}
    assert "any" in named
    for name, settings in named.items():
        if name != "any":
            assert settings == set(inspect.signature(CURVES[name]).parameters), name


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_named_files_exist(path: Path):
    text = path.read_text(encoding="utf-8")
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    missing = [link for link in links if link and not (path.parent / link).exists()]
    files = re.findall(r"`((?:frugalbert|configs|tests|benchmarks|docs)/[A-Za-z0-9_./-]+\.[a-z0-9]+)`", text)
    missing += [name for name in files if not (ROOT / name).exists() and not name.startswith("docs/config.json")]
    assert missing == []


def test_methods_name_a_file_each():
    text = (ROOT / "docs" / "methods.md").read_text().split("\n## ")[0]
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 10
    assert [row for row in rows if not re.search(r"\| `[^`]+`", row.rstrip("| "))] == []


def test_the_tour_passes_through_the_package():
    """The tour names every working package's main files, so that it ages visibly."""
    text = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(?:frugalbert/)?((?:data|train|model|finetune|measure|report)/[a-z_]+\.py)`", text))
    assert len(named) >= 12
    assert [name for name in named if not (ROOT / "frugalbert" / name).exists()] == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_no_machine_paths_or_left_overs(path: Path):
    text = path.read_text(encoding="utf-8")
    assert re.findall(r"/work/|/root/|/tmp/|/home/|TODO|FIXME|XXX|TBD|lorem ipsum", text) == []


def test_the_page_of_benchmarks_is_what_the_results_say():
    tables = benchmark("tables")
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert page == tables.markdown(), "run `make docs`"
    assert "not measured yet" in tables.markdown(ROOT / "nowhere").lower()
    told = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert told == tables.faults(told), "run `make docs`"
    assert "not measured yet" in tables.faults(told, ROOT / "nowhere").lower()


def test_every_row_of_the_faults_has_a_test():
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert [row for row in rows.ROWS if f'fault("{row}")' not in text] == []
