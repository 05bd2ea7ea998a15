"""What is known about an export in; its model card out, in the Hugging Face hub's own format (Mitchell et al. 2019,
arXiv 1810.03993): a README.md with YAML metadata, beside every exported form of the model.

Nothing is claimed that no file of the run says: a fact without a source is left out.
"""

from __future__ import annotations

import contextlib
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from frugalbert import config as sections
from frugalbert import run
from frugalbert.dist import processor_name
from frugalbert.measure.models import OURS, max_length
from frugalbert.measure.provenance import base_of, found_by, hub_name, masked_by, plain, start_of, taught_by
from frugalbert.progress import duration, number

TEMPLATE = Path(__file__).with_name("card.md.j2")
LICENCES = frozenset(
    "apache-2.0 mit bsd-2-clause bsd-3-clause cc0-1.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-4.0 cc-by-nc-sa-4.0 "
    "gpl-2.0 gpl-3.0 lgpl-3.0 agpl-3.0 mpl-2.0 gfdl odc-by odbl pddl openrail unlicense unknown other".split()
)
"""Identifiers that the hub knows; anything else is written as `other` with its name."""
STAGES = (
    "corpus", "tokenizer", "shards", "space", "supernet", "latency", "search", "attention", "pretrain", "finetune",
)  # fmt: skip
PIPELINES = {
    "ForMaskedLM": "fill-mask",
    "ForPairs": "fill-mask",
    "BertForPreTraining": "fill-mask",
    "ForSequenceClassification": "text-classification",
}
FORMATS = {"hf": "hf/", "onnx": "onnx/model.onnx", "onnx-int8": "onnx-int8/model.onnx"}


def write(out: Path, section: sections.Export, inputs: dict[str, Path], result: dict[str, Any]) -> None:
    """Write README.md into every format's directory below `out`."""
    text = render(section, inputs, result)
    for name in result["formats"]:
        run.write_atomic(out / name / "README.md", text)


def render(section: sections.Export, inputs: dict[str, Path], result: dict[str, Any]) -> str:
    """The card's text. `result` = what goes into export.json (`task`: only in the card of a fine-tuned model)."""
    from huggingface_hub import ModelCard

    known = _known(inputs)
    if "task" in result:
        known["results"] = [row for row in known["results"] if row["task"] == result["task"]]
    card = ModelCard.from_template(
        _metadata(section, known, result),
        template_path=str(TEMPLATE),
        name=plain(known["name"]),
        summary=_summary(known, result),
        facts=_facts(section, known, result),
        usage=_usage(result),
        files=_files(result),
        evaluation=[_evaluation(row) for row in known["results"]],
        latency=[_latency(row) for row in result["latency"]],
        limits=_limits(known, result),
        made=_made(known),
        recipe=_recipe(section, known),
    )
    return re.sub(r"\n{3,}", "\n\n", str(card)).rstrip() + "\n"


def _known(inputs: dict[str, Path]) -> dict[str, Any]:
    """Everything that the stages before wrote about themselves; absent files are empty mappings."""

    def read(stage: str, name: str, default: Any) -> Any:
        path = inputs[stage] / name if stage in inputs else None
        return run.read_json(path) if path is not None and path.is_file() else default

    place = inputs["pretrain"].resolve().parent if "pretrain" in inputs else inputs["model"].resolve()
    return {
        "name": place.name,
        "trained": "pretrain" in inputs,
        "records": {stage: read(stage, run.RECORD, {}) for stage in STAGES},
        "summary": read("pretrain", "summary.json", {}),
        "search": read("search", "search.json", {}),
        "supernet": read("supernet", "summary.json", {}),
        "masks": read("attention", "masks.json", {}),
        "corpus": read("corpus", "index.json", {}),
        "results": read("finetune", "results.json", []),
    }


def describe(model: Any, tokenizers: list[Path]) -> dict[str, Any]:
    """What the model says about itself: class, sizes in one line, parameters, FLOPs, tokenizer, longest input."""
    config = model.config
    about: dict[str, Any] = {
        "class": type(model).__name__,
        "arch": _sizes(config),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "longest": max_length(config),
        "tokenizer": next(filter(None, map(_tokenizer, tokenizers)), None),
    }
    if config.model_type == OURS:
        from frugalbert.model.cost import forward_flops

        length = min(128, config.max_position_embeddings)
        about |= {"flops_per_token": forward_flops(config.to_arch(), length), "length": length}
    return about


def _sizes(config: Any) -> str:
    if config.model_type == OURS:
        return config.to_arch().brief()
    values = config.to_dict()
    sizes = [f"{values.get('num_hidden_layers', '?')}x{values.get('hidden_size', '?')}"]
    sizes += [f"{word}={values[key]}" for key, word in (("num_attention_heads", "heads"), ("intermediate_size", "ffn"))
              if key in values]  # fmt: skip
    return " ".join([config.model_type, *sizes])


def _tokenizer(folder: Path) -> str | None:
    if not (folder / "tokenizer.json").is_file():
        return None
    model = run.read_json(folder / "tokenizer.json").get("model") or {}
    return f"{plain(model.get('type', '?'))}, {len(model.get('vocab') or ()):,} tokens"


# ---- metadata -------------------------------------------------------------------------------------------------------


def _metadata(section: sections.Export, known: dict[str, Any], result: dict[str, Any]) -> Any:
    from huggingface_hub import EvalResult, ModelCardData

    licence = section.licence.strip()
    named = licence.lower() if licence.lower() in LICENCES else "other"
    scores = [
        EvalResult(
            task_type="text-classification",
            dataset_type="nyu-mll/glue" if row["task"] in GLUE else str(row["task"]),
            dataset_config=row["task"] if row["task"] in GLUE else None,
            dataset_name=str(row["task"]),
            dataset_split="validation",
            metric_type=_metric(row),
            metric_name=str(row["metric"]),
            metric_value=round(float(row["mean"]), 6),
            metric_args={"seeds": list(row["seeds"]), "standard_deviation": row["std"]},
        )
        for row in known["results"]
        if row["init"] == "pretrained" and row["mean"] is not None
    ]
    return ModelCardData(
        license=named,
        license_name=licence if named == "other" and licence.lower() != "other" else None,
        library_name="transformers",
        pipeline_tag=next(
            (tag for head, tag in PIPELINES.items() if result["class"].endswith(head)), "feature-extraction"
        ),
        tags=["frugalbert", "encoder", *(["custom_code"] if _needs_code(result) else [])],
        base_model=hub_name(start_of(known)),
        datasets=[name for name in map(_dataset, _sources(known)) if name] or None,
        model_name=known["name"],
        eval_results=scores or None,
    )


GLUE = ("cola", "sst2", "mrpc", "stsb", "rte", "wnli", "qnli")


def _metric(row: dict[str, Any]) -> str:
    """The hub's identifier of a metric."""
    name = str(row["metric"])
    return {"mcc": "matthews_correlation", "pearson": "pearsonr", "spearman": "spearmanr"}.get(name, name)


def _sources(known: dict[str, Any]) -> list[str]:
    asked = known["records"]["corpus"].get("section", {}).get("sources") or []
    return [source if isinstance(source, str) else str(source.get("path")) for source in asked]


def _dataset(source: str) -> str | None:
    return source.removeprefix("hub:") if source.startswith("hub:") else None


def _needs_code(result: dict[str, Any]) -> bool:
    return not result["formats"].get("hf", {}).get("stock", True)


# ---- the page -------------------------------------------------------------------------------------------------------


def _summary(known: dict[str, Any], result: dict[str, Any]) -> str:
    how = "pre-trained with" if known["trained"] else "exported by"
    task = f", fine-tuned on {plain(result['task'])}" if "task" in result else ""
    return f"A compact text encoder of {number(result['parameters'])} parameters, {how} frugalbert{task}."


def _facts(section: sections.Export, known: dict[str, Any], result: dict[str, Any]) -> list[tuple[str, str]]:
    summary, corpus, records = known["summary"], known["corpus"], known["records"]
    pretrain = records["pretrain"].get("section", {})
    text = None
    if corpus:
        names = ", ".join(_dataset(name) or Path(name).name for name in _sources(known))
        text = f"{plain(names)}: {corpus.get('documents', 0):,} documents, {corpus.get('characters', 0):,} characters"
    budget = None
    if summary:
        budget = (
            f"{pretrain.get('budget', '?')}: {summary.get('steps', 0):,} steps, {summary.get('tokens', 0):,} tokens"
        )
        budget += f" in {duration(summary.get('seconds', 0.0))}"
    flops = result.get("flops_per_token")
    loss = summary.get("final_validation_loss")
    facts = {
        "base model": base_of(known),
        "architecture": f"`{_brief(result['arch'])}`",
        "found by": found_by(known),
        "attention": masked_by(known),
        "taught by": taught_by(known),
        "parameters": f"{result['parameters']:,}",
        "FLOPs": f"{number(flops)} per token, forward, at length {result.get('length')}" if flops else None,
        "tokenizer": result.get("tokenizer"),
        "longest input": f"{result['longest']} tokens" if result.get("longest") else None,
        "corpus": text,
        "corpus licence": plain(corpus.get("licence", "unknown")) if corpus else None,
        "licence": plain(section.licence),
        "budget used": budget,
        "hardware": plain(summary.get("device") or records["pretrain"].get("device") or "") or None,
        "precision": summary.get("precision"),
        "held-out masked-LM loss": None if loss is None else f"{loss:.4f} nats a token (unigrams "
        f"{summary.get('unigram_nll', float('nan')):.4f}, bigrams {summary.get('bigram_nll', float('nan')):.4f})",
    }  # fmt: skip
    return [(key, value) for key, value in facts.items() if value]


def _brief(arch: str) -> str:
    """Long attention patterns cut (config.json has them whole), and nothing that a table would take for its own."""
    return re.sub(r"(?<=pattern=)\S{60,}", lambda match: match[0][:50] + "…", arch).replace("|", "\\|")


def _usage(result: dict[str, Any]) -> str:
    lines = []
    if "hf" in result["formats"]:
        owner = {
            **dict.fromkeys(("ForMaskedLM", "ForPairs", "BertForPreTraining"), "AutoModelForMaskedLM"),
            "ForSequenceClassification": "AutoModelForSequenceClassification",
        }
        auto = next((name for ending, name in owner.items() if result["class"].endswith(ending)), "AutoModel")
        code = ", trust_remote_code=True" if _needs_code(result) else ""
        lines += [
            f"from transformers import {auto}, AutoTokenizer",
            f'tokenizer = AutoTokenizer.from_pretrained("PATH"{code})',
            f'model = {auto}.from_pretrained("PATH"{code})',
        ]
    if set(result["formats"]) - {"hf"}:
        lines += [
            "import onnxruntime",
            'session = onnxruntime.InferenceSession("PATH/model.onnx")  # int64 (batch, sequence) in',
        ]
    return "\n".join(lines)


def _files(result: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for name, values in result["formats"].items():
        text = f"largest difference {values['max_abs_difference']:.2g}" if "max_abs_difference" in values else ""
        if "mean_cosine" in values:
            text += f", mean cosine {values['mean_cosine']:.5f} on {values['measured_on']}"
        if "masked_agreement" in values:
            text += f", same masked token in {values['masked_agreement']:.1%} of {values['masked_tokens']:,}"
        for task, drop in values.get("dev_metric_drop", {}).items():
            text += f", {plain(task)} {drop['metric']} {drop['fp32']:.4f} -> {drop['int8']:.4f}"
        rows.append({"name": FORMATS[name], "bytes": f"{values['bytes']:,}", "difference": text})
    return rows


def _evaluation(row: dict[str, Any]) -> dict[str, str]:
    interval = row.get("interval")
    return {
        "task": plain(row["task"]),
        "metric": plain(row["metric"]),
        "init": "pre-trained" if row["init"] == "pretrained" else "random",
        "score": " ± ".join(f"{row[key]:.4f}" for key in ("mean", "std") if row[key] is not None) or "undefined",
        "interval": f"{interval[0]:.4f} to {interval[1]:.4f}" if interval and None not in interval else "",
        "seeds": ", ".join(str(seed) for seed in row["seeds"]),
        "examples": f"{row['train_examples']:,} / {row['dev_examples']:,}",
    }


def _latency(row: dict[str, Any]) -> dict[str, str]:
    return {
        "file": FORMATS[row["format"]],
        "device": plain(processor_name()),
        "threads": str(row["threads"]),
        "shape": f"{row['batch_size']} x {row['length']}",
        "median": f"{row['median_ms']:.3g}{' (noisy)' if row['noisy'] else ''}",
        "p90": f"{row['p90_ms']:.3g}",
    }


def _limits(known: dict[str, Any], result: dict[str, Any]) -> list[str]:
    lines = []
    if result.get("longest"):
        lines.append(f"It reads at most {result['longest']} tokens; longer texts must be cut.")
    if known["trained"]:
        lines.append("It knows the language and the subjects of its corpus only, and repeats that corpus's biases.")
        lines.append("It was not checked for fairness, safety or memorised personal data.")
    else:
        lines.append("How it was trained is not known here: see the card of the model it was made from.")
    if "onnx-int8" in result["formats"]:
        lines.append(
            f"The int8 file's outputs differ from the others' as the table says, on {plain(processor_name())}; "
            "check it on your own data, and on processors without 8-bit dot products (VNNI) once more."
        )
    padded = result["formats"].get("hf", {}).get("parameters", result["parameters"])
    if padded > result["parameters"]:
        lines.append(
            f"`hf/` has {padded:,} parameters, because the stock class wants wider heads or layers: the rest are zeros "
            "that change no output but cost time. The ONNX files do without, and so does `export.stock=false`."
        )
    if _needs_code(result):
        why = result["formats"]["hf"]["why_not_stock"]
        lines.append(
            "`hf/` brings its own code (`modeling.py` beside the weights; read it first), which runs with "
            f"`trust_remote_code=True`, because no stock class has this shape: {plain(why)}."
        )
    return lines


def _made(known: dict[str, Any]) -> str:
    record = known["records"]["pretrain"]
    versions = {**run.versions(), **record.get("versions", {})}
    versions.pop("platform", None)
    for name in ("onnx", "onnxruntime"):
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    text = ", ".join(f"{plain(name)} {plain(value)}" for name, value in versions.items())
    prints = [f"{stage} `{record['fingerprint']}`" for stage, record in known["records"].items() if record]
    identity = f"\n\nConfiguration hashes: {', '.join(prints)}." if prints else ""
    return f"Versions: {text}.{identity}"


def _recipe(section: sections.Export, known: dict[str, Any]) -> str | None:
    """The settings that differ from the defaults, of every stage that was recorded, as YAML."""
    import yaml

    records = {name: record for name, record in known["records"].items() if record}
    if not records:
        return None
    asked = {name: _changed(record["section"], _section(name)) for name, record in records.items()}
    asked["export"] = _changed(section.model_dump(mode="json"), sections.Export)
    text = yaml.safe_dump({"name": known["name"], **asked}, sort_keys=False, allow_unicode=True, width=1000)
    return text.replace("```", "'''").strip()


def _section(name: str) -> Any:
    return getattr(sections, name.capitalize())


def _changed(values: dict[str, Any], kind: Any) -> dict[str, Any]:
    """`values` of a section without those that equal its defaults."""
    defaults = kind.model_construct().model_dump(mode="json", warnings=False)
    found = {}
    for name, value in values.items():
        if name in defaults and defaults[name] == value:
            continue
        default = kind.model_fields[name].default
        nested = isinstance(value, dict) and isinstance(default, sections.Section)
        if isinstance(value, dict) and not nested:
            value = {key: item for key, item in value.items() if item is not None}
        found[name] = _changed(value, type(default)) if nested else value
    return found
