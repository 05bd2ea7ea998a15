"""An exported encoder and texts in; vectors, or labels with probabilities, out.

    from frugalbert import Encoder

    encoder = Encoder("runs/quickstart")
    vectors = encoder.encode(["a text", "another one"], normalize=True)

Texts are sorted by length and computed in batches of about as many tokens each (`batching.py`), so that little padding
is; the vectors come in the order of the texts. Those of an int8 file also depend, a little, on the batch that a text is
in: a call has one scale for all its activations. Mean over tokens as in sentence-transformers (Reimers and Gurevych
2019, arXiv 1908.10084), or the [CLS] token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from frugalbert import dist, run
from frugalbert.config import Machine
from frugalbert.measure import batching
from frugalbert.measure.models import find_served, load_for_serving, max_length, read_model_config
from frugalbert.measure.serving import Forward, Inputs, Served, serve_onnx, serve_torch, spread

CHUNK = 8192
"""Texts that are tokenised and sorted together."""
MAX_LENGTH = 512
"""Of a model whose configuration does not say."""
Text = str | tuple[str, str]
Vectors = np.ndarray[Any, np.dtype[np.float32]]


class Encoder:
    """An encoder that is ready to serve. `num_cut`: texts of the last call that were longer than `max_length` tokens.

    `path` is a run (its export, or what it pre-trained), an export, a Hugging Face directory (also of a fine-tuned
    model), or an ONNX directory or file. Of several forms PyTorch's is opened; name the directory for another.

    Args:
        device: `auto` is a GPU if torch finds one. ONNX files run on the CPU.
        precision: of PyTorch: `fp32`, `bf16`, or `auto`: bf16 if the hardware multiplies it and the hidden states of
            this model keep a mean cosine of 0.999 with those in fp32.
        threads: CPU threads; None = the cores that this process may use (affinity, quota, OMP_NUM_THREADS).
        max_length: cut texts to so many tokens; None = the model's longest input.
        compile: torch.compile of PyTorch models; `compile_seconds` says what it took.

    Raises ValueError with one sentence if there is no model, no tokenizer, or no GPU that was asked for.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        precision: Literal["auto", "fp32", "bf16"] = "auto",
        threads: int | None = None,
        max_length: int | None = None,
        compile: bool = False,  # noqa: A002
    ) -> None:
        machine = Machine(device=device, threads=threads or "auto")
        place = find_served(Path(path))
        if place.suffix == ".onnx":
            served, folder = serve_onnx(place, dist.pick_threads(machine)), place.parent
        else:
            read_model_config(place)
            where, cores = dist.pick_device(machine), dist.pick_threads(machine)
            served, folder = serve_torch(load_for_serving(place), where, precision, cores, compiled=compile), place
        self._use(served, folder, max_length)

    @classmethod
    def around(
        cls, model: Any, tokenizer: Path | str, *, precision: Literal["auto", "fp32", "bf16"] = "fp32",
        threads: int | None = None, max_length: int | None = None, compile: bool = False,  # noqa: A002
    ) -> Encoder:  # fmt: skip
        """An encoder around a PyTorch model in memory, where it is; `tokenizer`: a directory that has one.

        Any precision but fp32 may cast the model's own weights.
        """
        self = cls.__new__(cls)
        cores = dist.pick_threads(Machine(threads=threads or "auto"))
        served = serve_torch(model, next(model.parameters()).device, precision, cores, compiled=compile)
        self._use(served, Path(tokenizer), max_length)
        return self

    def _use(self, served: Served, folder: Path, limit: int | None) -> None:
        self._served, self._name, self._tokenizer = served, str(folder), _tokenizer(folder)
        self.width, self.device, self.precision = served.width, served.device, served.precision
        self.compile_seconds, self.num_cut = served.compile_seconds, 0
        most = max_length(served.config) or MAX_LENGTH
        if limit is not None and not 4 <= limit <= most:
            raise ValueError(f"max_length is {limit}, but {folder} reads 4 to {most} tokens; write one of these")
        entries, known = self._tokenizer.get_vocab_size(), served.config.get("vocab_size")
        if known and entries > known:
            raise ValueError(
                f"{folder}: its tokenizer has {entries} entries, the model {known}; save the one that belongs"
            )
        self.max_length = limit or most
        self._tokenizer.enable_truncation(self.max_length)
        budget = batching.BUDGET if self.device == "cpu" else batching.GPU_BUDGET
        self.batches: Callable[[list[int]], batching.Batches] = partial(
            batching.by_length, budget=budget, workers=served.threads
        )

    @property
    def encodes(self) -> bool:
        """Whether the model gives hidden states: `encode`."""
        return "last_hidden_state" in self._served.outputs

    @property
    def classifies(self) -> bool:
        """Whether the model has labels for a text: `predict`."""
        return "logits" in self._served.outputs

    # ---- what it gives -----------------------------------------------------------------------------------------------

    def encode(
        self, texts: Iterable[Text], *, pooling: Literal["mean", "cls"] = "mean", normalize: bool = False
    ) -> Vectors:
        """Vectors (texts, width) in float32, in the order of `texts`; a pair (a, b) is one text of two segments.

        `mean`: over the tokens of a text, special ones included; `cls`: the first token. `normalize`: to length 1.
        A text without tokens has the vector 0. Raises ValueError for what is no list of texts, and for an ONNX file
        that gives a head's outputs alone.
        """
        if pooling not in ("mean", "cls"):
            raise ValueError(f"pooling {pooling!r} is unknown; write mean or cls")
        forward = self._output("last_hidden_state", "gives a head's outputs alone; encode with its hf/ directory")

        def pooled(inputs: Inputs, threads: int) -> Any:
            hidden_BTD = forward(inputs, threads)
            if pooling == "cls":
                return hidden_BTD[:, 0]
            mask_BT = inputs["attention_mask"]
            share_BT = (mask_BT / mask_BT.sum(1, keepdims=True)).astype(np.float32)
            if not isinstance(hidden_BTD, np.ndarray):
                share_BT = hidden_BTD.new_tensor(share_BT)
            return (hidden_BTD * share_BT[..., None]).sum(1)

        vectors = self._map(texts, pooled, self.width)
        if normalize:
            vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return vectors

    def predict(self, texts: Iterable[Text]) -> list[dict[str, float]]:
        """For each text its labels with their probabilities, likeliest first; of a regression the number itself.

        Raises ValueError if the model was not fine-tuned to classify texts.
        """
        forward = self._output("logits", "has no head that classifies texts; open a fine-tuned model to predict")
        default = {number: f"LABEL_{number}" for number in range(self.width)}  # as transformers leaves them out
        names = {int(number): name for number, name in (self._served.config.get("id2label") or default).items()}
        kind = self._served.config.get("problem_type")
        logits = self._map(texts, forward, len(names)).astype(np.float64)
        if kind == "multi_label_classification":
            logits = 1 / (1 + np.exp(-logits))
        elif kind != "regression" and len(names) > 1:
            logits = np.exp(logits - logits.max(-1, keepdims=True))
            logits /= logits.sum(-1, keepdims=True)
        return [{names[place]: float(row[place]) for place in np.argsort(-row, kind="stable")} for row in logits]

    def count_tokens(self, texts: Iterable[Text]) -> list[int]:
        """Tokens of each text, special ones included, at most `max_length`."""
        return [len(row.ids) for row in self._tokens(_checked(texts))]

    def _tokens(self, texts: list[Text]) -> list[Any]:
        try:
            return self._tokenizer.encode_batch_fast(texts)
        except TypeError:  # half a character (a lone surrogate) in some text
            whole = [tuple(map(_whole, text)) if isinstance(text, tuple) else _whole(text) for text in texts]
            return self._tokenizer.encode_batch_fast(whole)

    def _output(self, name: str, otherwise: str) -> Forward:
        if name not in self._served.outputs:
            raise ValueError(f"{self._name} {otherwise}")
        return self._served.outputs[name]

    # ---- the way there -----------------------------------------------------------------------------------------------

    def _map(self, texts: Iterable[Text], forward: Forward, width: int) -> Vectors:
        """`forward` of all texts; its rows (batch, width) in the order of the texts."""
        asked = _checked(texts)
        found = np.zeros((len(asked), width), dtype=np.float32)
        self.num_cut = 0
        for start in range(0, len(asked), CHUNK):
            rows = self._tokens(asked[start : start + CHUNK])
            self.num_cut += sum(bool(row.overflowing) for row in rows)
            lengths = [len(row.ids) for row in rows]
            batches = [batch[np.array(lengths)[batch] > 0] for batch in self.batches(lengths)]
            batches = [batch for batch in batches if len(batch)]
            inputs = [self._inputs([rows[place] for place in batch]) for batch in batches]
            for batch, values in zip(batches, spread(forward, inputs, self._served.threads), strict=True):
                found[start + batch] = values if isinstance(values, np.ndarray) else values.cpu().numpy()
        if self.num_cut:
            run.say(f"{self._name}: {self.num_cut} of {len(asked)} texts cut at {self.max_length} tokens")
        return found

    def _inputs(self, rows: list[Any]) -> Inputs:
        """Token ids and mask (batch, longest); types if a text of the batch is a pair."""
        shape = (len(rows), max(len(row.ids) for row in rows))
        ids, mask = np.full(shape, self._served.config.get("pad_token_id") or 0), np.zeros(shape, dtype=np.int64)
        inputs = {"input_ids": ids, "attention_mask": mask}
        paired = (self._served.config.get("type_vocab_size") or 0) > 1 and any(1 in row.type_ids for row in rows)
        if paired:
            inputs["token_type_ids"] = np.zeros(shape, dtype=np.int64)
        for number, row in enumerate(rows):
            ids[number, : len(row.ids)], mask[number, : len(row.ids)] = row.ids, 1
            if paired:
                inputs["token_type_ids"][number, : len(row.ids)] = row.type_ids
        return inputs


def _whole(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


def _checked(texts: Iterable[Text]) -> list[Text]:
    if isinstance(texts, str):
        raise ValueError("texts is one text; write a list of texts: [text]")
    asked = list(texts)
    for place, text in enumerate(asked):
        pair = isinstance(text, tuple) and len(text) == 2 and all(isinstance(part, str) for part in text)
        if not pair and not isinstance(text, str):
            raise ValueError(f"texts[{place}] is {type(text).__name__}; every text must be a str, or a pair (str, str)")
    return asked


def _tokenizer(folder: Path) -> Any:
    """A directory's fast tokenizer, for which "[CLS]" in a text is text. Raises ValueError."""
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    try:
        if file.is_file():
            backend = Tokenizer.from_file(str(file))
        elif (folder / "vocab.txt").is_file():  # of BERT, saved before there were fast tokenizers
            from transformers import AutoTokenizer

            backend = AutoTokenizer.from_pretrained(folder, local_files_only=True).backend_tokenizer
        else:
            raise ValueError(f"{folder} has no tokenizer.json; save the model's tokenizer beside it")
    except ValueError:
        raise
    except Exception as error:  # the library raises bare exceptions
        raise ValueError(f"{file} is no tokenizer ({str(error)[:160]}); copy it again") from None
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend
