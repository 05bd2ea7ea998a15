"""`Encoder`: its vectors are what transformers gives text by text, whatever the form, order, batches and threads."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, processors
from torch import nn

from frugalbert import Encoder, dist
from frugalbert.measure import batching, mixed, serving
from frugalbert.measure.models import load_model, max_length
from tests.measure.conftest import edit_config

TEXTS = [
    "word1 word2 word3",
    "",
    " ".join(f"word{number}" for number in range(60)),  # with [CLS] and [SEP] 62 tokens
    "word9",
    "[SEP] word4 [CLS]",  # text, not special tokens
    *(" ".join(f"word{(number * place) % 251}" for place in range(number)) for number in range(2, 20)),
]


def expected(folder: Path, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and first token of one text alone, by transformers."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.encode_special_tokens = True
    inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=64, split_special_tokens=True)
    with torch.inference_mode():
        hidden = AutoModel.from_pretrained(folder)(**inputs).last_hidden_state[0]
    return hidden.mean(0).numpy(), hidden[0].numpy()


@pytest.fixture(scope="module")
def truth(stock_dir: Path) -> tuple[np.ndarray, np.ndarray]:
    means, firsts = zip(*(expected(stock_dir, text) for text in TEXTS), strict=True)
    return np.stack(means), np.stack(firsts)


@pytest.mark.parametrize("form", ["hf", "onnx", "onnx-int8"])
def test_every_form_gives_the_vectors_of_each_text_alone(
    stock_export: Path, truth: tuple[np.ndarray, np.ndarray], form: str
):
    encoder = Encoder(stock_export / form, precision="fp32", threads=2)
    found = encoder.encode(TEXTS)
    assert (found.shape, found.dtype) == ((len(TEXTS), 32), np.float32)
    if form == "onnx-int8":
        cosine = (found * truth[0]).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(truth[0], axis=1)
        assert cosine.min() > 0.99
        return
    np.testing.assert_allclose(found, truth[0], atol=1e-5)
    np.testing.assert_allclose(encoder.encode(TEXTS, pooling="cls"), truth[1], atol=1e-5)
    one = encoder.encode(TEXTS, normalize=True)
    np.testing.assert_allclose(one, truth[0] / np.linalg.norm(truth[0], axis=1, keepdims=True), atol=1e-5)
    assert encoder.num_cut == 0


def test_several_batches_on_several_threads(stock_dir: Path, truth: tuple[np.ndarray, np.ndarray]):
    """Batches of any size give the same; torch's own threads are as before, for new threads of the caller too."""
    encoder = Encoder(stock_dir, precision="fp32", threads=3)
    sizes = []
    for budget in (1, 40, 10_000):
        encoder.batches = lambda lengths, budget=budget: batching.by_length(lengths, budget)
        np.testing.assert_allclose(encoder.encode(TEXTS), truth[0], atol=1e-5)
        sizes.append(len(encoder.batches([len(text.split()) + 2 for text in TEXTS])))
    assert sizes[0] > sizes[1] > sizes[2]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    serving.spread(lambda batch, threads: torch.set_num_threads(threads), [{}] * 4, 3)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 2
    torch.set_num_threads(before)
    used: list[int] = []
    serving.spread(lambda batch, threads: used.append(threads), [{}] * 4, 2)
    serving.spread(lambda batch, threads: used.append(threads), [{}], 2)
    assert used == [1, 1, 1, 1, 2]


def test_more_texts_than_are_sorted_together(
    stock_dir: Path, truth: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("frugalbert.measure.encoder.CHUNK", 5)
    found = Encoder(stock_dir, precision="fp32", threads=1).encode(iter(TEXTS))
    np.testing.assert_allclose(found, truth[0], atol=1e-5)


def test_what_is_opened(stock_export: Path, stock_dir: Path, tmp_path: Path):
    def opened(path: Path) -> str:
        return Path(Encoder(path)._name).relative_to(tmp_path).as_posix()

    (tmp_path / "export").symlink_to(stock_export)
    assert opened(tmp_path / "export") == opened(tmp_path) == "export/hf"
    assert opened(tmp_path / "export" / "onnx" / "model.onnx") == "export/onnx"
    (tmp_path / "run" / "pretrain").mkdir(parents=True)
    (tmp_path / "run" / "pretrain" / "model").symlink_to(stock_dir)
    assert opened(tmp_path / "run") == "run/pretrain/model"


def test_onnx_needs_no_torch(stock_export: Path):
    code = f"""if True:
        import sys
        from frugalbert import Encoder
        assert Encoder({str(stock_export / "onnx")!r}, threads=2).encode(["word1"] * 3).shape == (3, 32)
        assert not {{"torch", "transformers"}} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# ---- length and precision -------------------------------------------------------------------------------------------


def test_what_is_cut_is_counted_and_said(stock_dir: Path, capsys: pytest.CaptureFixture[str]):
    long = " ".join(["word7"] * 100)
    encoder = Encoder(stock_dir, precision="fp32", threads=1)
    found = encoder.encode(["word1", long, long])
    assert encoder.num_cut == 2
    assert capsys.readouterr().err == f"{stock_dir}: 2 of 3 texts cut at 64 tokens\n"
    np.testing.assert_allclose(found[1], encoder.encode([" ".join(["word7"] * 62)])[0], atol=1e-5)
    assert encoder.num_cut == 0
    short = Encoder(stock_dir, precision="fp32", threads=1, max_length=8)
    np.testing.assert_allclose(short.encode([long])[0], encoder.encode([" ".join(["word7"] * 6)])[0], atol=1e-5)
    assert short.num_cut == 1


def test_bf16_is_chosen_where_it_is_exact_enough(stock_dir: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dist, "multiplies_bf16", lambda device: True)
    exact = Encoder(stock_dir, precision="fp32", device="cpu").encode(TEXTS, normalize=True)
    rough = Encoder(stock_dir, device="cpu", threads=1)
    assert rough.precision == "bf16"
    found = rough.encode(TEXTS, normalize=True)
    assert 0.999 < (found * exact).sum(1).min() < 1.0
    assert np.abs(found - exact).max() > 1e-5
    plain = Encoder.around(load_model(stock_dir, encoder_only=True), stock_dir, threads=1)  # as in training
    with dist.autocast(torch.device("cpu"), "bf16"):
        np.testing.assert_array_equal(plain.encode(TEXTS, normalize=True), found)
    monkeypatch.setattr(serving, "BF16_COSINE", 1.01)
    assert Encoder(stock_dir, device="cpu").precision == "fp32"
    monkeypatch.setattr(dist, "multiplies_bf16", lambda device: False)
    monkeypatch.setattr(serving, "BF16_COSINE", 0.0)
    assert Encoder(stock_dir, device="cpu").precision == "fp32"


def test_compiled(
    stock_dir: Path,
    truth: tuple[np.ndarray, np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """Graphs are made by torch, but kept from its C++ compiler: that takes long. Where it fails, it is said once."""
    graphs = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    plain = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module, dynamic: plain(module, backend=count, dynamic=dynamic))
    torch._dynamo.reset()
    encoder = Encoder(stock_dir, precision="fp32", threads=1, compile=True)
    before = len(graphs)
    np.testing.assert_allclose(encoder.encode(TEXTS), truth[0], atol=1e-5)
    assert 0 < before == len(graphs) < 6  # two layers, many shapes
    assert encoder.compile_seconds is not None

    def fail(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(nn.Module, "compile", lambda module, dynamic: plain(module, backend=fail, dynamic=dynamic))
    torch._dynamo.reset()
    capsys.readouterr()
    encoder = Encoder(stock_dir, precision="fp32", threads=1, compile=True)
    np.testing.assert_allclose(encoder.encode(TEXTS), truth[0], atol=1e-5)
    assert encoder.compile_seconds is None
    said = capsys.readouterr().err
    assert re.fullmatch(r"torch.compile does not work here \(.+\); the model runs uncompiled\n", said)
    torch._dynamo.reset()


# ---- heads ----------------------------------------------------------------------------------------------------------


def test_labels_with_probabilities(run_inputs: dict[str, Path], run_export: tuple[Path, dict]):
    from frugalbert.model.modeling import FrugalForSequenceClassification

    folder = run_inputs["finetune"] / "updown" / "model"
    model = FrugalForSequenceClassification.from_pretrained(folder)
    texts = ["word1 word2", "word5", ("word3 word4", "word8 word9"), ""]
    ids = [[2, 6, 7, 3], [2, 10, 3], [2, 8, 9, 3, 13, 14, 3], [2, 3]]
    for form in (folder, run_export[0] / "tasks" / "updown" / "onnx"):
        encoder = Encoder(form, precision="fp32", threads=1)
        for text, row, found in zip(texts, ids, encoder.predict(texts), strict=True):
            types = torch.tensor([[0] * 4 + [1] * 3]) if isinstance(text, tuple) else None
            with torch.inference_mode():
                logits = model.eval()(input_ids=torch.tensor([row]), token_type_ids=types).logits[0]
            assert found == pytest.approx(dict(zip(("up", "down"), logits.softmax(-1).tolist(), strict=True)), abs=1e-5)
            assert list(found.values()) == sorted(found.values(), reverse=True)
    assert Encoder(folder, threads=1).encode(["word1"]).shape == (1, 32)
    assert encoder.predict([]) == []


def test_a_classifier_is_timed_as_one(run_export: tuple[Path, dict]):
    """Its ONNX file has no hidden states: labels are what it serves."""
    encoder = Encoder(run_export[0] / "tasks" / "updown" / "onnx", threads=1)
    given = []

    def timer(call: Callable[[], Any]) -> dict[str, float]:
        given.append(call())
        return {"median_ms": 500.0}

    found = mixed.time_texts(encoder, {"texts": 4, "batching": "in order"}, 2, timer)
    assert [set(row) for row in given[0]] == [{"up", "down"}] * 4
    assert (found["texts_per_second"], found["tokens_per_second"]) == (8.0, 2.0 * found["tokens"])


def test_labels_without_names(run_export: tuple[Path, dict], tmp_path: Path):
    """A configuration of two labels has no names for them where transformers wrote it."""
    folder = tmp_path / "onnx"
    shutil.copytree(run_export[0] / "tasks" / "updown" / "onnx", folder)
    named = Encoder(folder, threads=1).predict(["word1"])[0]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({name: config[name] for name in config if name != "id2label"}))
    assert Encoder(folder, threads=1).predict(["word1"])[0] == {
        {"up": "LABEL_0", "down": "LABEL_1"}[name]: value for name, value in named.items()
    }


def test_an_onnx_file_that_labels_tokens(stock_dir: Path, tmp_path: Path):
    """It has no vector and no label of a text, and its time for texts is not taken."""
    from transformers import AutoConfig, BertForTokenClassification

    from frugalbert.measure import timing
    from frugalbert.measure.onnx import export_onnx

    folder = tmp_path / "onnx"
    shutil.copytree(stock_dir, folder)
    config = AutoConfig.from_pretrained(stock_dir, num_labels=3)
    export_onnx(BertForTokenClassification(config).eval(), folder / "model.onnx")
    encoder = Encoder(folder / "model.onnx", threads=1)
    assert not encoder.encodes
    assert not encoder.classifies
    with pytest.raises(ValueError, match="has no head that classifies texts"):
        encoder.predict(["word1"])
    told: list[dict[str, Any]] = []
    cells = [{"batching": "in order", "texts": 2}]
    task = {"kind": "onnx", "path": str(folder / "model.onnx"), "baseline": None, "device": "cpu", "threads": 1,
            "precision": "fp32", "max_length": None, "repeats": 1, "rows": 2, "cells": cells}  # fmt: skip
    timing.time_task(task, told.append)
    assert ["labels tokens" in line["note"] for line in told] == [True]


def test_several_labels_and_numbers(run_inputs: dict[str, Path], tmp_path: Path):
    folder = tmp_path / "model"
    shutil.copytree(run_inputs["finetune"] / "updown" / "model", folder)
    logits = {}
    for kind in ("single_label_classification", "multi_label_classification", "regression"):
        edit_config(folder, problem_type=kind)
        logits[kind] = Encoder(folder, precision="fp32", threads=1).predict(["word1 word2"])[0]
    numbers = np.array(list(logits["regression"].values()))
    assert list(logits["multi_label_classification"].values()) == pytest.approx(1 / (1 + np.exp(-numbers)))
    assert sum(logits["single_label_classification"].values()) == pytest.approx(1.0)


def test_around_a_model_in_memory(stock_dir: Path, truth: tuple[np.ndarray, np.ndarray]):
    from transformers import AutoModel

    encoder = Encoder.around(AutoModel.from_pretrained(stock_dir), stock_dir, precision="fp32", threads=1)
    np.testing.assert_allclose(encoder.encode(TEXTS), truth[0], atol=1e-5)


# ---- what is refused, and what is not -------------------------------------------------------------------------------


def test_nothing_and_next_to_nothing(stock_export: Path, stock_dir: Path, tmp_path: Path):
    for form in ("hf", "onnx"):
        encoder = Encoder(stock_export / form, threads=2)
        assert encoder.encode([]).shape == (0, 32)
        assert encoder.encode([""]).shape == (1, 32)
    bare = tmp_path / "bare"
    shutil.copytree(stock_dir, bare)
    backend = Tokenizer.from_file(str(bare / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    backend.save(str(bare / "tokenizer.json"))
    found = Encoder(bare, threads=1).encode(["word1", ""], normalize=True)  # the second has no token at all
    assert np.linalg.norm(found, axis=1).tolist() == pytest.approx([1.0, 0.0], abs=1e-6)


def test_text_that_is_no_text(stock_dir: Path):
    """A lone surrogate, as broken JSON has it, is a question mark; the other texts are not touched."""
    encoder = Encoder(stock_dir, precision="fp32", threads=1)
    found = encoder.encode(["word1 \ud800", "word2", ("word1 \ud800", "word2")])
    np.testing.assert_array_equal(found, encoder.encode(["word1 ?", "word2", ("word1 ?", "word2")]))


def test_longest_inputs():
    sizes = {"max_position_embeddings": 514, "model_type": "xlm-roberta", "pad_token_id": 1}
    assert [max_length(config) for config in (sizes, sizes | {"model_type": "bert"}, {})] == [512, 514, None]
    assert max_length(sizes | {"model_type": "mpnet"}) == 512


def test_positions_behind_the_padding_end_where_transformers_ends():
    from transformers import MPNetConfig, MPNetModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = MPNetConfig(vocab_size=20, max_position_embeddings=12, **sizes)
    longest = max_length(config)
    assert longest == 10
    model = MPNetModel(config).eval()
    model(torch.full((1, longest), 5))
    with pytest.raises(IndexError):
        model(torch.full((1, longest + 1), 5))


def test_mistakes_are_one_sentence(stock_export: Path, stock_dir: Path, run_export: tuple[Path, dict], tmp_path: Path):
    (tmp_path / "empty").mkdir()
    shutil.copytree(stock_dir, tmp_path / "silent", ignore=shutil.ignore_patterns("tokenizer*"))
    shutil.copytree(stock_dir, tmp_path / "torn")
    (tmp_path / "torn" / "tokenizer.json").write_text("{")
    shutil.copytree(stock_dir, tmp_path / "foreign")
    words = {f"w{number}": number for number in range(300)}
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(tmp_path / "foreign" / "tokenizer.json"))
    encoder = Encoder(stock_dir, threads=1)
    classifier = Encoder(run_export[0] / "tasks" / "updown" / "onnx", threads=1)
    wrong: Any = None
    for call, words in (
        (lambda: encoder.encode("a text"), "texts is one text; write a list of texts: [text]"),
        (lambda: encoder.encode(["a", wrong]), "texts[1] is NoneType; every text must be a str"),
        (lambda: encoder.encode(["a", b"b"]), "texts[1] is bytes"),  # type: ignore[list-item]
        (lambda: encoder.encode([("a", "b", "c")]), "texts[0] is tuple"),  # type: ignore[list-item]
        (lambda: encoder.encode(["a"], pooling=wrong), "pooling None is unknown; write mean or cls"),
        (lambda: encoder.predict(["a"]), "stock has no head that classifies texts; open a fine-tuned model to predict"),
        (lambda: classifier.encode(["a"]), "onnx gives a head's outputs alone; encode with its hf/ directory"),
        (lambda: Encoder(stock_dir, max_length=65), "max_length is 65, but"),
        (lambda: Encoder(tmp_path / "absent"), "absent does not exist; name a model directory"),
        (lambda: Encoder(tmp_path / "absent.onnx"), "absent.onnx does not exist"),
        (lambda: Encoder(tmp_path / "empty"), "empty is not a model: it has no config.json"),
        (lambda: Encoder(tmp_path / "silent"), "silent has no tokenizer.json; save the model's tokenizer beside it"),
        (lambda: Encoder(tmp_path / "torn"), "tokenizer.json is no tokenizer"),
        (lambda: Encoder(tmp_path / "foreign"), "foreign: its tokenizer has 300 entries, the model 256; save the one"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)) as caught:
            call()
        assert "\n" not in str(caught.value)


# ---- batches --------------------------------------------------------------------------------------------------------

LENGTHS = st.lists(st.integers(1, 600), max_size=200)


@settings(derandomize=True, max_examples=200)
@given(LENGTHS, st.integers(1, 5000), st.integers(1, 4))
def test_every_text_once_within_the_budget(lengths: list[int], budget: int, workers: int):
    batches = batching.by_length(lengths, budget, workers)
    assert sorted(place for batch in batches for place in batch) == list(range(len(lengths)))
    for batch in batches:
        sizes = [lengths[place] for place in batch]
        assert len(batch) * max(sizes) <= budget or len(batch) == 1
        assert sum(max(sizes) - size for size in sizes) <= budget // batching.PADDING
    assert [max(lengths[place] for place in batch) for batch in batches] == sorted(
        (max(lengths[place] for place in batch) for batch in batches), reverse=True
    )


@settings(derandomize=True, max_examples=100)
@given(LENGTHS, st.integers(1, 64))
def test_padding_is_counted(lengths: list[int], rows: int):
    batches = batching.in_order(lengths, rows)
    assert [place for batch in batches for place in batch] == list(range(len(lengths)))
    computed = sum(len(batch) * max(lengths[place] for place in batch) for batch in batches)
    assert batching.padding(lengths, batches) == pytest.approx(1 - sum(lengths) / computed if computed else 0.0)


def test_few_texts_are_shared_among_the_cores():
    assert [len(batch) for batch in batching.by_length([10] * 8, workers=1)] == [8]
    assert [len(batch) for batch in batching.by_length([10] * 8, workers=4)] == [2] * 4


def test_sorting_saves_padding():
    lengths = np.random.default_rng(0).integers(4, 256, 1000).tolist()
    assert batching.padding(lengths, batching.by_length(lengths)) < 0.05
    assert batching.padding(lengths, batching.in_order(lengths, 32)) > 0.4
