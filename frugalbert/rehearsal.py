"""The same pipeline at toy size: a configuration in, one of which every stage runs for seconds out."""

from __future__ import annotations

from typing import Any

from frugalbert.config import AUTO, Config

SMALL: dict[str, dict[str, Any]] = {
    "tokenizer": {"vocab_size": 1024, "max_characters": 2_000_000},
    "supernet": {"budget": "20steps", "batch_size": 8, "early_stop": None, "validation": {"rows": 32}},
    "latency": {"architectures": 12},
    "search": {"evaluations": 8, "rows": 32, "budget": None},
    "attention": {"budget": "20steps", "batch_size": 8, "early_stop": None, "validation": {"rows": 32}},
    "importance": {"budget": "20steps", "batch_size": 8, "early_stop": None, "validation": {"rows": 32}},
    "pretrain": {"budget": "20steps", "batch_size": 8, "early_stop": None, "validation": {"rows": 32}},
    "finetune": {"seeds": [0], "epochs": 1.0, "max_train_examples": 64, "blimp_pairs": 10, "predict_test": False},
    "bench": {"repeats": 3},
}


def rehearsal(config: Config) -> Config:
    """The same pipeline at toy size: every stage runs for seconds, so mistakes show before the long run."""
    value = config.model_dump(mode="json", exclude_unset=True)
    for name, small in SMALL.items():
        if value.get(name) is not None:
            trained = {
                key: item for key, item in small.items() if not (name == "tokenizer" and value[name].get("path"))
            }
            value[name] = {**value[name], **trained}
            for phase in value[name].get("phases", ()):
                phase.pop("batch_size", None)
    if (value.get("pretrain") or {}).get("arch") == AUTO:
        value["pretrain"] |= {"arch": "tiny-modern", "limit": {}}
    if value.get("finetune"):
        _rehearse_finetune(value["finetune"])
    if (value.get("search") or {}).get("finetune"):
        value["search"]["finetune"] |= SMALL["finetune"]
    if (value.get("search") or {}).get("training"):
        value["search"]["training"] |= {"steps": 2, "looks": 1}
    if (value.get("importance") or {}).get("study"):
        value["importance"]["study"] |= {"steps": 2, "looks": 1}
        value["importance"]["controls"] = min(2, value["importance"].get("controls", 2))
    if config.search and config.search.method == "extraction":
        _rehearse_extraction(config, value["search"])
    if value.get("corpus"):
        sources = [source if isinstance(source, dict) else {"path": source} for source in value["corpus"]["sources"]]
        value["corpus"]["sources"] = [{**source, "max_documents": 2000} for source in sources]
        value["corpus"]["held_out"] = max(0.02, config.corpus.held_out if config.corpus else 0.0)
    return Config.model_validate({**value, "name": f"{config.name[:80]}-rehearsal"})


def _rehearse_extraction(config: Config, search: dict[str, Any]) -> None:
    """Four of the whole space, within no limits: how many these leave is not known yet, and an interval must fit."""
    from frugalbert.space import Space

    assert config.space is not None
    for name in ("evaluations", "limit"):
        search.pop(name, None)
    search["extraction"] = {**search.get("extraction", {}), "interval": -(-Space.of(config.space).size() // 4)}


def _rehearse_finetune(section: dict[str, Any]) -> None:
    """Two settings of a sweep, one round of Agora, and no task with epochs of its own."""
    if section.get("sweep"):
        section["sweep"] |= {"method": "random", "trials": 2}
    if section.get("agora"):
        section["agora"] |= {
            "max_rounds": 1,
            "settings": {**section["agora"]["settings"], "method": "random", "trials": 2},
        }
    for own in section.get("per_task", {}).values():
        for name in ("epochs", "max_train_examples"):
            own.pop(name, None)
