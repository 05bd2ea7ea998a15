"""The YAML file, section by section: the page to read before writing one.

Every section is a frozen, closed model: an unknown key, a wrong type or two settings that contradict each other are
refused with the sentence that repairs them. The order of the sections is the order of the pipeline; a section that is
not written means that its stage does not run. `frugalbert explain` prints this page, `docs/config.md` is made from it.
No torch here: `plan`, `explain` and `--help` load this module alone.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    WithJsonSchema,
    model_validator,
)

from frugalbert.budget import Budget as _Budget
from frugalbert.model.arch import Arch

FROM_SEARCH = "from search"
"""Value of `pretrain.arch` and `pretrain.start`: what the stage search has found."""
FROM_TEACHER = "from teacher"
"""Value of `pretrain.start`: a slice of the teacher."""
FROM_ATTENTION = "from attention"
"""Value of `pretrain.arch` and `pretrain.start`: what the stage attention has found."""
AUTO = "auto"
"""Value of `pretrain.arch`: the size is chosen for the budget, the machine and `pretrain.limit`."""
FROM_SUPERNET = "from supernet"
"""Value of `pretrain.distill.teacher`: the super-network of the same run, whole."""


def _tuple(value: Any) -> Any:
    """A YAML list becomes a tuple; a single value becomes a tuple of one."""
    if isinstance(value, list | tuple):
        return tuple(cast("list[Any]", value))
    return None if value is None else (value,)


def _known_arch(text: str) -> str:
    if text not in (FROM_SEARCH, FROM_ATTENTION):
        Arch.parse_or_path(text)
    return text


def _known_arch_or_auto(text: str) -> str:
    return text if text == AUTO else _known_arch(text)


Budget = Annotated[
    _Budget,
    PlainValidator(_Budget.parse),
    PlainSerializer(str),
    WithJsonSchema({"type": "string", "examples": ["24h", "90m", "2e9tok", "10000steps", "3epochs"]}),
]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Rate = Annotated[float, Field(ge=0.0, lt=1.0)]
Weight = Annotated[float, Field(ge=0.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
Texts = Annotated[tuple[str, ...], BeforeValidator(_tuple)]
Counts = Annotated[tuple[Count, ...], BeforeValidator(_tuple), Field(min_length=1)]
Seeds = Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(_tuple), Field(min_length=1)]
Shares = Annotated[tuple[Share, ...], BeforeValidator(_tuple)]


def _values(value: Any) -> Any:
    """A range such as `1e-5..1e-3` stays a text; anything else becomes a tuple."""
    return value if isinstance(value, str) and ".." in value else _tuple(value)


Number = r"[0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?"
Values = Annotated[
    tuple[Weight, ...] | Annotated[str, Field(pattern=rf"^{Number}\.\.{Number}$")], BeforeValidator(_values)
]
"""What a sweep tries: some values, or a range `1e-5..1e-3`."""


class Section(BaseModel):
    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
        use_attribute_docstrings=True,
    )


class Machine(Section):
    """Where it runs. Never part of a result's identity: change it freely between two calls of `run`."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes the GPU when there is one. Several GPUs: start with `torchrun`."""
    threads: Literal["auto"] | Count = "auto"
    """CPU threads of one training process; `auto` = the cores this process may use, shared among its local ranks."""
    workers: Literal["auto"] | Count = "auto"
    """Processes that prepare data; `auto` = one per core."""
    scheduler: str | None = None
    """A Dask scheduler (`tcp://host:8786`, `tls://…`) that prepares data on other machines; none = local processes."""
    micro_batch: Literal["auto"] | Count = "auto"
    """Sequences in memory at once; the global batch is reached by accumulation. `auto`: the fastest of a few that fit,
    tried before the first step of all but short trainings; halved on out-of-memory."""
    compile: Literal["auto"] | bool = "auto"
    """torch.compile of one encoder block, reused by all layers. `auto`: tried, and kept if it is faster, where 10
    minutes (on a CPU an hour) of training follow. Without a compiler it is left out, with a line that says why."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """With several ranks: replicas (`ddp`), or parameters spread over them (`fsdp`, for large models)."""
    trackers: Texts = ()
    """Also send the figures to these (`tensorboard`, `wandb`, `trackio`, …). The run's own files are the truth."""


class Source(Section):
    """One source of documents with settings of its own; a plain text in `sources` means the defaults."""

    path: str
    """A file, a glob, a directory, `hub:NAME` for a Hugging Face dataset, or `python-docs` (built in)."""
    format: Literal[
        "auto", "text", "paragraphs", "lines", "jsonl", "csv", "tsv", "parquet", "wikiextractor", "wikipedia-xml",
        "dataset",
    ] = "auto"  # fmt: skip
    """`text`: file = document; `paragraphs`: blank lines separate documents; `lines`: line = document; `wikipedia-xml`:
    a dump (`*-pages-articles*.xml.bz2`; extra `wikipedia`), one file per worker, so take it in its numbered parts;
    `auto`: by the name and the first bytes (`.txt` is `paragraphs` when the file has blank lines, otherwise `text`)."""
    field: str = "text"
    """The text's column or key in JSONL, CSV, Parquet and datasets."""
    weight: Positive = 1.0
    """Mixture weight: 2.0 reads every document twice (as different samples), 0.5 keeps every second one."""
    subset: str | None = None
    """A dataset's configuration name."""
    split: str = "train"
    """A dataset's split."""
    revision: str | None = None
    """A hub dataset's revision; name one to make the run repeatable."""
    max_documents: Count | None = None
    """Read at most this many documents of the source."""


class Corpus(Section):
    """Sources of text to clean, de-duplicated documents with a held-out split."""

    sources: Annotated[tuple[str | Source, ...], BeforeValidator(_tuple), Field(min_length=1)]
    """What to read: paths, globs, directories, `hub:NAME`, `python-docs`, or mappings with more settings."""
    held_out: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.005
    """Share of the documents kept for validation, chosen by a hash of the text: stable under any reordering."""
    min_characters: Annotated[int, Field(ge=0)] = 40
    """Shorter documents are dropped."""
    encoding_errors: Literal["replace", "skip", "strict"] = "replace"
    """Undecodable bytes: replace them, skip the document, or stop. All are counted and reported."""
    dedup: Literal["exact", "near", "none"] = "exact"
    """`near` also drops documents whose word 5-gram MinHash similarity passes `near_threshold` (extra `dedup`)."""
    near_threshold: Share = 0.8
    """Jaccard similarity from which two documents count as near-duplicates."""
    licence: str = "unknown"
    """Licence of the text, copied into the manifest and the model card."""


class Tokenizer(Section):
    """Train a tokenizer on the corpus, or load one."""

    kind: Literal["wordpiece", "bpe", "unigram"] = "wordpiece"
    """`bpe` is byte-level."""
    vocab_size: Annotated[int, Field(ge=128, le=1_000_000)] = 30522
    """Rounded up to a multiple of 64; a corpus too small to fill it is refused."""
    lowercase: bool = True
    """Lower-case and strip accents before tokenising."""
    min_frequency: Count = 2
    """Rarer pieces do not enter the vocabulary."""
    max_characters: Count = 200_000_000
    """Characters of the training split that the trainer sees, spread over the whole corpus."""
    path: str | None = None
    """Load instead of train: a directory, a `tokenizer.json`, a BERT `vocab.txt`, or a hub name."""

    @model_validator(mode="after")
    def _load_or_train(self) -> Tokenizer:
        fields = type(self).model_fields
        training = ("kind", "vocab_size", "min_frequency", "max_characters")
        extra = [name for name in training if getattr(self, name) != fields[name].default]
        if self.path is not None and extra:
            raise ValueError(f"path loads a finished tokenizer, {extra[0]} trains one; remove one of the two")
        return self


class SampleFiles(Section):
    """Also write the rows as HDF5 sample files with fixed masks, as academic-budget-bert and ExtremeBERT train on
    (`shards/hdf5/length-128/train_shard_0.hdf5` …). Needs `pack: false` and the extra `hdf5`."""

    copies: Count = 10
    """Differently masked copies of every row, each in files of its own (their dup_factor)."""
    rate: Rate = 0.15
    """Share of masked tokens, by the rule of `pretrain.mask`."""
    max_predictions: Count = 20
    """Mask at most this many tokens of a row; also the width of the stored positions."""
    whole_words: bool = False
    """Mask all pieces of a word together."""
    train_files: Count = 256
    """Files per copy of the training rows; never more than rows."""
    test_files: Count = 128
    """Files per copy of the held-out rows."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Order and masks: those of a training with the same `pretrain.seed`."""


class Shards(Section):
    """Documents packed into rows of token ids."""

    length: Annotated[
        tuple[Annotated[int, Field(ge=8, le=65536)], ...], BeforeValidator(_tuple), Field(min_length=1)
    ] = (128,)
    """Row length in tokens; several lengths (`[128, 512]`) make several shard sets for `pretrain.phases`."""
    pack: bool = True
    """Several documents in one row (training isolates them). Without it every document starts a row of its own."""
    min_piece: Count = 16
    """The rest of a row is padded rather than given a shorter piece of a document than this."""
    short_share: Share = 0.0
    """Share of the documents that are cut into short pieces, of one length per document drawn evenly from 2 to the
    row's (the references' short_seq_prob, 0.1): practice with short inputs. Nothing is lost; with `pack` the rows stay
    full, of more pieces that do not see each other; without it each piece has a padded row of its own."""
    samples: Texts = ()
    """Instead of a corpus: HDF5 sample files of academic-budget-bert or ExtremeBERT (paths, globs, directories). Labels
    are put back and masked copies kept once; each segment counts as a document. Needs `tokenizer.path` of their
    vocabulary and the extra `hdf5`; HDF5 is a complex format, so read only files that you trust."""
    held_out: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.005
    """Share of `samples` kept for validation, chosen by a hash of the ids (with a corpus: `corpus.held_out`)."""
    hdf5: SampleFiles | None = None
    """Sample files for the reference systems."""
    pairs: Literal["none", "nsp", "sop"] = "none"
    """Rows of two segments `[CLS] A [SEP] B [SEP]` of consecutive sentences, with a label that `pretrain` learns beside
    the masked words. `nsp`: B follows A, or is taken from another document, 50/50 (BERT); `sop`: the halves of one
    passage, in order or swapped, 50/50 (ALBERT). Needs `pack: false`. `short_share` is BERT's share of short targets;
    what is too long for a row is cut off, as BERT does. A text read twice (a source's `weight`) makes other pairs."""

    @model_validator(mode="after")
    def _pairs(self) -> Shards:
        if self.pairs != "none" and (self.samples or self.hdf5 is not None):
            raise ValueError(f"pairs: {self.pairs} needs sentences of a corpus; remove samples and hdf5")
        if self.pairs != "none" and self.pack:
            raise ValueError(f"pairs: {self.pairs} gives every pair a row of its own; write pack: false")
        return self

    @model_validator(mode="after")
    def _sample_files(self) -> Shards:
        if self.hdf5 is not None and self.pack:
            raise ValueError("hdf5 files hold one document per sample; write pack: false or remove hdf5")
        if self.held_out != type(self).model_fields["held_out"].default and not self.samples:
            raise ValueError("held_out belongs to samples; write corpus.held_out instead")
        return self


class Mask(Section):
    """Which tokens are hidden, drawn on the fly on the device."""

    rate: Annotated[tuple[Rate, ...], BeforeValidator(_tuple), Field(min_length=1, max_length=2)] = (0.15,)
    """Share of masked tokens; two values `[0.3, 0.15]` go linearly from the first to the second over the budget."""
    style: Literal["bert", "mask"] = "bert"
    """`bert`: 80 % [MASK], 10 % random, 10 % unchanged (Devlin et al. 2019); `mask`: always [MASK]."""
    whole_words: bool = False
    """Mask all pieces of a word together."""
    random_token_includes_special: bool = False
    """Let random replacements be special tokens, as the reference systems do."""
    max_predictions: Count | None = None
    """Mask at most this many tokens of a row, whatever `rate` says; none = no cap."""
    copies: Count | None = None
    """The number of differently masked copies of a row that the epochs go through in turn (the references' dup_factor);
    none = new masks in every epoch."""


class Phase(Section):
    """A later part of the budget, mostly at another row length (BERT's second phase)."""

    length: Count
    """One of `shards.length`."""
    share: Annotated[float, Field(gt=0.0, lt=1.0)]
    """Share of the budget, counted from the end."""
    learning_rate: Positive | None = None
    """Begin the schedule anew with this peak rate: warm-up and curve then take this phase (and those after it without a
    rate of their own) for the whole, and the optimizer counts its steps from 0, with its moments as they are (NVIDIA
    BERT's phase 2). The parts before it have a whole schedule of their own, too. Muon's rate changes in proportion."""
    warmup: Rate | None = None
    """Share of the phase with a rising rate; needs `learning_rate`; none = as the section's `warmup`."""
    batch_size: Count | None = None
    """Sequences a step; none = as many tokens as before."""
    max_predictions: Count | None = None
    """Instead of `mask.max_predictions`."""

    @model_validator(mode="after")
    def _own_schedule(self) -> Phase:
        if self.warmup is not None and self.learning_rate is None:
            raise ValueError("warmup of a phase belongs to a schedule of its own; add learning_rate to the phase")
        return self


class Ramp(Section):
    """A global batch that grows: by doubling, along a straight line over the first part of the budget."""

    start: Count
    """Sequences of the first global batch."""
    share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """Share of the budget after which the batch has its full size."""


class Validation(Section):
    """Held-out masked-LM loss: the same fixed rows and the same masks every time, at 15 % masks."""

    every: Share = 0.05
    """Share of the budget between two validations (0 = only at the end)."""
    begin_every: Share = 0.02
    """The same within the first `begin_share` of the budget."""
    begin_share: Share = 0.1
    """How long the beginning lasts."""
    end_every: Share = 0.05
    """The same within the last `end_share` of the budget."""
    end_share: Share = 0.1
    """How long the end lasts."""
    rows: Count = 1024
    """Rows of the held-out shards that are evaluated (all, if there are fewer)."""


class EarlyStop(Section):
    """Give up a run that goes nowhere (24hBERT: after 180 minutes with loss above 6)."""

    after: Budget
    """Not before this much has been used; the same unit as the budget."""
    loss: Positive
    """Stop if the latest validation loss is above this."""


class Checkpoints(Section):
    """What is kept on disk while training."""

    every: Budget = _Budget("seconds", 600.0)
    """Time, steps or tokens between two training checkpoints; one is also written at the end and when stopped."""
    keep: Annotated[int, Field(ge=2)] = 2
    """Training checkpoints kept; older ones are removed. At least 2, so that a damaged one has a predecessor."""
    markers: Shares = ()
    """Progress at which a fine-tuning checkpoint (weights, config, tokenizer) is kept for good: `[0.5, 0.9]`."""
    average: Annotated[int, Field(ge=0)] = 0
    """Average this many snapshots of the last tenth of the budget into the final weights if that lowers the loss."""


class ReplacedTokens(Section):
    """Replaced-token detection (ELECTRA, arXiv 2003.10555)."""

    generator_width: Annotated[float, Field(gt=0.0, le=1.0)] = 0.25
    """Width of the generator as a share of the discriminator's (section 3.2 of the paper: 1/4 to 1/2)."""
    weight: Positive = 50.0
    """Weight of the discriminator's loss (lambda)."""


class Training(Section):
    """What every training on the shards can be told: `supernet` and `pretrain` share these."""

    budget: Budget
    """When to stop: `24h`, `90m`, `2e9tok`, `10000steps`, `3epochs`. Drives every schedule."""
    stop_at: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Stop at this share of the budget although the schedules are made for all of it (24hBERT's longer schedules)."""
    batch_size: Count = 256
    """Global batch in sequences of the first row length; later phases keep the number of tokens, unless they say so."""
    batch_ramp: Ramp | None = None
    """Begin with a smaller batch, which learns more per token while the loss is high; the rates are lower meanwhile, by
    the square root of the batches' ratio."""
    optimizer: str = "adamw"
    """`adamw`, `bertadam` (the same without bias correction, as BERT's own), `muon` (matrices; AdamW for the rest),
    `lamb`, `adam`, `sgd`, `file.py:function` beside the YAML, a name that installed packages register (entry point
    `frugalbert.optimizers`), or ExtremeBERT's file (`.conf`)."""
    optimizer_options: dict[str, bool | int | float | str] = {}
    """Further settings of the optimizer, checked against its signature."""
    learning_rate: Positive = 1e-3
    """Peak rate of AdamW, LAMB, Adam, SGD (with `muon`: of the parameters AdamW keeps)."""
    muon_learning_rate: Positive = 0.02
    """Peak rate of Muon's matrices."""
    betas: Annotated[tuple[Share, Share], BeforeValidator(_tuple)] = (0.9, 0.98)
    """Adam's decay rates (SGD: the first is the momentum)."""
    epsilon: Positive = 1e-6
    """Adam's epsilon."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    """Decoupled weight decay; never on norms and biases."""
    clip_norm: Annotated[float, Field(ge=0.0)] = 1.0
    """Global gradient-norm clip; 0 = none."""
    warmup: Share = 0.06
    """Share of the budget in which the learning rate rises linearly from 0."""
    curve: str = "linear"
    """After warm-up: `linear`, `cosine`, `wsd`, `constant`, `elastic_step` (ExtremeBERT), one of the other curves that
    `frugalbert explain curves` lists, `file.py:function`, a name that an installed package registers (entry point
    `frugalbert.curves`), or ExtremeBERT's file (`.conf`)."""
    curve_options: dict[str, float | Annotated[tuple[float, ...], BeforeValidator(_tuple)]] = {}
    """Settings of the curve, e.g. `{cooldown: 0.4}` for `wsd`."""
    dropout: Rate = 0.0
    """Dropout of hidden states and attention during pre-training."""
    mask: Mask = Mask()
    """Masking."""
    isolate_documents: bool = True
    """Documents that share a row do not see each other."""
    phases: Annotated[tuple[Phase, ...], BeforeValidator(_tuple)] = ()
    """Longer rows for the last part of the budget, e.g. `[{length: 512, share: 0.1}]`; perhaps with a rate, a batch and
    a cap of masks of their own."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of matrix products (weights stay fp32). `auto`: bf16 where the hardware multiplies it, else fp32; on a
    CPU with bf16 whichever a trial before the first step finds faster, in all but short trainings."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Initial weights, data order, masks and dropout."""
    validation: Validation = Validation()
    """How often held-out loss is measured."""
    early_stop: EarlyStop | None = None
    """Give up a run that goes nowhere."""
    non_finite: Literal["restore", "skip", "stop"] = "restore"
    """NaN or infinite loss or gradient: the step is skipped; `restore` goes back to the last checkpoint after 10 such
    steps in a row and stops after 3 restores; `skip` only skips; `stop` stops at once."""
    checkpoints: Checkpoints = Checkpoints()
    """What is kept on disk."""

    @model_validator(mode="after")
    def _consistent(self) -> Training:
        if self.early_stop and self.early_stop.after.kind != self.budget.kind:
            raise ValueError(
                f"early_stop.after counts {self.early_stop.after.kind} but budget counts {self.budget.kind}; "
                "write both in the same unit"
            )
        if sum(phase.share for phase in self.phases) >= 1.0:
            raise ValueError("the shares of phases add up to the whole budget; leave some for the first row length")
        if self.batch_ramp and self.batch_ramp.start >= self.batch_size:
            raise ValueError(f"batch_ramp.start must be below batch_size {self.batch_size}, to which it grows")
        if self.batch_ramp and self.batch_ramp.share + sum(phase.share for phase in self.phases) > 1.0:
            raise ValueError("batch_ramp.share reaches into the phases; lower it")
        if self.warmup >= 1.0:
            raise ValueError("warmup 1.0 leaves nothing to train at the peak rate; write a share such as 0.06")
        return self


AXIS = re.compile(r"(\d{1,6})\.\.(\d{1,6})(?:/(\d{1,6}))?")


def _axis(value: Any) -> Any:
    """`[4, 6]`, `4`, or `128..768/16` (from, to, step) becomes the ascending tuple of the values."""
    if not isinstance(value, str):
        return _tuple(value)
    match = AXIS.fullmatch(value.replace(" ", ""))
    first, last, step = (int(match[1]), int(match[2]), int(match[3] or 1)) if match else (1, 0, 1)
    if first > last or step < 1 or last - first > 100_000 * step:
        raise ValueError(f"{value!r} is no range; write from..to/step such as 128..768/16, or a list such as [4, 6]")
    return tuple(range(first, last + 1, step))


_RANGE: dict[str, Any] = {"pattern": f"^{AXIS.pattern}$"}  # in the schema: what a text may be instead
Axis = Annotated[tuple[Count, ...], BeforeValidator(_axis), Field(min_length=1, json_schema_extra=_RANGE)]


class Space(Section):
    """Which architectures a search may choose from: every combination of the values of its axes. Its largest one is the
    super-network. An axis is a list `[4, 6]` or a range `128..768/16` (from, to, step). For GPUs write multiples of 8,
    better of 64, for hidden, head_dim and ffn (NVIDIA's rule for tensor cores); `plan` names others."""

    family: Literal["bert", "bert-preln", "modern"] = "bert"
    """Of all architectures."""
    depth: Axis
    """Numbers of layers."""
    hidden: Axis
    """Widths of the residual stream."""
    heads: Axis
    """Numbers of attention heads. AutoTinyBERT: `1..12` with head_dim 64, or always 12 with `head_dim: 15..64`."""
    head_dim: Axis
    """Sizes of one head; queries, keys and values are heads * head_dim wide, which need not be `hidden`."""
    ffn: Axis
    """Feed-forward widths."""
    mixed: bool = False
    """Let every layer have its own heads, head_dim and ffn."""
    qkv_at_most_hidden: bool = False
    """Leave out architectures whose heads together are wider than the stream."""
    qkv_is_hidden: bool = False
    """Leave out architectures whose heads together are not exactly as wide as the stream (all of BERT's kind are)."""
    exportable: bool = False
    """Leave out architectures that stock Hugging Face BERT cannot represent by zero-padded heads."""


class Supernet(Training):
    """Train one encoder all of whose slices are good encoders: the largest of `space`, a few of its slices per step."""

    sampling: Literal["sandwich", "random", "random-linear", "alternate", "all"] = "sandwich"
    """Which architectures a batch trains. `sandwich`: the largest, the smallest and `random_archs` others; `random`:
    `random_archs` of them; `random-linear`: the largest, from time to time and later always a random one;
    `alternate`: the largest and a random one in turn; `all`: every one (small spaces)."""
    random_archs: Annotated[int, Field(ge=0)] = 2
    """Random architectures per batch."""
    stratified: bool = True
    """Draw sizes evenly: otherwise the smallest and largest are hardly ever drawn."""
    inplace_weight: Annotated[float, Field(ge=0.0)] = 1.0
    """Weight of learning from the largest one's predictions at the masked tokens, beside the text (`sandwich`, `all`,
    `random-linear`, `alternate`)."""
    layers: Literal["first", "even"] = "first"
    """Which layers a shallower encoder keeps."""
    combine: Literal["mean", "sum"] = "mean"
    """How the losses of a batch's architectures add up."""
    update: Literal["sampled", "all"] = "sampled"
    """Whether momentum and weight decay also move weights that no architecture of the batch used (`all`)."""
    start: str | None = None
    """Begin with these weights (a model directory or hub name of the largest architecture) instead of random ones."""
    reorder: bool = True
    """With `start`: sort heads and feed-forward channels by importance first, so that slices keep the best."""
    teacher: str | None = None
    """Learn from this model (directory or hub name, same vocabulary) instead of from masked words."""
    distill: Annotated[tuple[Literal["attention", "hidden", "relation"], ...], BeforeValidator(_tuple)] = (
        "attention", "hidden",
    )  # fmt: skip
    """What is learnt from the teacher's last layer: attention logits (equal numbers of heads), hidden states
    (AutoTinyBERT), or relations among queries, keys and values (MiniLMv2; any number of heads)."""
    relation_heads: Count = 12
    """Heads that queries, keys and values are split into for `relation`."""

    @model_validator(mode="after")
    def _masks(self) -> Supernet:
        if 0.0 in self.mask.rate and self.teacher is None:
            raise ValueError("mask.rate 0 leaves nothing to learn without a teacher; write 0.15, or name a teacher")
        return self


class Served(Section):
    """How an encoder will serve, whose time per call counts."""

    backend: Literal["torch", "onnx", "onnx-int8"] = "torch"
    """What runs them."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where they will serve; unlike `machine.device` it decides the result. On a GPU they run in bf16."""
    threads: Count = 1
    """CPU threads. On one thread the process's CPU time is measured, which other programs do not lengthen."""
    batch_size: Count = 1
    """Sequences per call."""
    length: Annotated[int, Field(ge=8)] = 128
    """Tokens per sequence."""

    @model_validator(mode="after")
    def _device(self) -> Served:
        if self.device == "cuda" and self.backend != "torch":
            raise ValueError(f"backend {self.backend} runs on the CPU; write device: cpu, or backend: torch")
        return self


class Latency(Served):
    """Time sampled architectures of the space on this machine, and learn to predict the others' latency."""

    architectures: Annotated[int, Field(ge=12)] = 120
    """How many are timed; a fifth of them judge the predictor."""
    repeats: Annotated[int, Field(ge=9)] = 9
    """Timed calls per reading, after warm-up; the median counts. Every architecture is read three times, in turn."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Which architectures are timed."""


class SizeLimit(Served):
    """What an encoder may cost that `pretrain.arch: auto` chooses."""

    latency_ms: Positive | None = None
    """Milliseconds per call at most, timed on this machine as the stage `latency` does."""
    parameters: Positive | None = None
    """Parameters at most, with embeddings."""


Window = Annotated[tuple[Positive, ...], BeforeValidator(_tuple), Field(min_length=1, max_length=2)]


class Limit(Section):
    """What the chosen encoder may cost. Every limit that is given holds; a pair `[6.8, 8]` is a window."""

    latency_ms: Window | None = None
    """Milliseconds as `latency` measures them, at most."""
    speedup: Window | None = None
    """Times as fast as the space's largest architecture, as `latency` predicts both, at least."""
    parameters: Window | None = None
    """Parameters of the encoder with embeddings, at most."""
    flops: Window | None = None
    """Operations for one sequence of `latency.length` tokens (128 without a section latency), at most."""

    @model_validator(mode="after")
    def _ascending(self) -> Limit:
        for name in type(self).model_fields:
            value = getattr(self, name)
            if value is not None and value[0] > value[-1]:
                raise ValueError(f"{name}: [{value[0]:g}, {value[1]:g}] is an empty window; write the smaller first")
        return self


def _known_maximum(text: str) -> str:
    Arch.parse_or_path(text)
    return text


class Extraction(Section):
    """How `method: extraction` goes through the space: listed by rising parameters and inference cost, every
    `interval`-th architecture is judged, and the largest W = (p(T) - p)/p(T) * (i(T) - i)/i(T) / error is taken."""

    interval: Count = 1
    """Judge one architecture out of so many; 1 judges all."""
    representative: Literal["first", "middle", "last"] = "first"
    """Which one of an interval."""
    maximum: Annotated[str, AfterValidator(_known_maximum)] | None = None
    """The maximum point T: a preset, a line or an `arch.json`, whose parameters p(T) and inference cost i(T) normalise,
    and so decide the trade-off; larger ones are rejected. None: the member of the space that is largest in both."""
    inference: Literal["flops", "latency"] = "flops"
    """The inference cost i: operations in closed form, or milliseconds (section `latency`)."""
    floor: Positive = 1e-3
    """Errors below this count as this."""


class ShortRecipe(Section):
    """One recipe of short trainings; whatever it does not say is as `pretrain` has it by default."""

    optimizer: Literal["sgd", "adam", "adamw", "bertadam", "lamb", "muon"] = "sgd"
    """`sgd` is what the theory of extraction assumes; the others are outside of it."""
    learning_rate: Positive
    """Peak rate (with `muon`: of the parameters AdamW keeps)."""
    batch_size: Count = 32
    """Sequences a step."""
    betas: Annotated[tuple[Share, Share], BeforeValidator(_tuple)] | None = None
    """As in `pretrain`; none = no momentum with `sgd`, [0.9, 0.98] with the others."""


class ShortTraining(Section):
    """Train every candidate from scratch for a few steps: the same data, order and seeds for all of them."""

    steps: Count
    """Optimizer steps of each training."""
    recipes: Annotated[tuple[ShortRecipe, ...], BeforeValidator(_tuple), Field(min_length=1)]
    """Each is tried; a candidate is judged by the one that serves it best. `{learning_rate: 0.5}` is a list of one."""
    seeds: Seeds = (0,)
    """One training per seed; the mean counts."""
    looks: Count = 4
    """How often the error is measured during a training, evenly; the lowest counts."""

    @model_validator(mode="after")
    def _looks(self) -> ShortTraining:
        if self.looks > self.steps:
            raise ValueError(f"looks {self.looks} is more than steps {self.steps}; write at most that")
        return self


class Search(Section):
    """Find the best architecture of the space within a limit, by the losses of the super-network's slices or of short
    trainings."""

    method: Literal["evolution", "pareto", "random", "fast", "extraction"] = "evolution"
    """`evolution`: mutation, crossover and elites; `pareto`: the front of loss against latency by non-dominated
    sorting (NSGA-II); `random`; `fast`: AutoTinyBERT's rule of thumb, then random; `extraction`: every n-th of the
    whole space by the coefficient W (Bort)."""
    limit: Limit = Limit()
    """What the encoder may cost; may be left out with `extraction`."""
    extraction: Extraction = Extraction()
    """Only for `method: extraction`."""
    evaluations: Annotated[int, Field(ge=2)] = 200
    """Architectures that are scored; `extraction` scores as many as its interval says."""
    budget: Budget | None = None
    """Also stop after this time, such as `1h`."""
    quality: Literal["loss", "distillation", "finetune", "training"] = "loss"
    """What a candidate is judged by: the inherited weights' held-out masked-LM loss, their distillation loss (with
    `supernet.teacher`), or a fine-tuning of the slice (AutoTinyBERT): 1 minus its tasks' mean headline metric. Report
    on other data than those tasks' dev sets then. `training`: the held-out loss after a short training from scratch
    (Bort), without a super-network."""
    rows: Count = 256
    """Held-out rows per candidate for `loss`, `distillation` and `training`."""
    training: ShortTraining | None = None
    """Steps and recipes for `quality: training`."""
    finetune: Finetune | None = None
    """Tasks and recipe for `quality: finetune`, with the keys of the section `finetune`; never a random baseline."""
    population: Annotated[int, Field(ge=4)] = 32
    """Candidates per generation of `evolution` and `pareto`."""
    crossover: Share = 0.4
    """Share of children with two parents; the others are mutated."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of every random choice."""

    @model_validator(mode="after")
    def _limits(self) -> Search:
        self._extraction()
        if self.limit == Limit() and self.method != "extraction":
            raise ValueError("limit is empty; write for example {latency_ms: 8}")
        if self.budget is not None and self.budget.kind != "seconds":
            raise ValueError("budget must be a time such as 1h; evaluations counts candidates")
        if (self.quality == "training") != (self.training is not None):
            raise ValueError(
                "quality: training and training: {steps: …, recipes: …} belong together; write both or neither"
            )
        if (self.quality == "finetune") != (self.finetune is not None):
            raise ValueError("quality: finetune and finetune: {tasks: […]} belong together; write both or neither")
        if self.finetune is not None and self.finetune.model is not None:
            raise ValueError("finetune.model has no place here: slices of the super-network are fine-tuned; remove it")
        return self

    def _extraction(self) -> None:
        if self.method != "extraction":
            if self.extraction != Extraction():
                raise ValueError("extraction belongs to method: extraction; remove it or set the method")
            return
        for name in ("evaluations", "budget", "population", "crossover"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name} does not go with method: extraction; extraction.interval says how many it scores"
                )


class Attention(Training):
    """Learn which pairs of tokens need to meet (SparseBERT, arXiv 2102.12871): an encoder is trained together with
    logits that switch attention on and off. Leaves an architecture with attention patterns, `pretrain.arch: from
    attention`."""

    arch: Annotated[str, AfterValidator(_known_arch)] = "small-modern"
    """The encoder whose attention is to become sparse: as `pretrain.arch`; its own patterns do not matter."""
    start: str | None = None
    """Begin with these weights (a model directory or hub name, or `from search`) instead of random ones."""
    pair_weight: Weight = 1.0
    """As `pretrain.pair_weight`."""
    structure: Literal["unstructured", "toeplitz", "block", "block-toeplitz", "toeplitz-priced"] = "toeplitz"
    """What is switched together: single pairs (DAMu), distances i - j (DAMs), blocks, distances of blocks, or distances
    that pay for the blocks they touch. Hardware skips blocks, not pairs: only the last three save time."""
    symmetric: bool = True
    """(i, j) and (j, i) together."""
    block: Literal[8, 16, 32, 64, 128] = 64
    """Size of a block in tokens."""
    global_positions: Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(_tuple)] = ()
    """Positions of a document (0 = [CLS]) that may also learn to see all, and to be seen by all."""
    share: Literal["layers", "none", "heads", "all"] = "layers"
    """Who has masks in common: `layers`: one for each head in all layers; `heads`: one per layer; `all`, `none`."""
    layers_per_group: Count | None = None
    """With `share: layers`: so many neighbouring layers share, not all."""
    density: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Share of pairs to keep (`toeplitz-priced`: of blocks): a controller steers there, `finalise: topk` hits it."""
    penalty: Weight | None = None
    """Instead of `density`: this times the mean density is added to the loss. The published lambdas belong to another
    gating and a sum; they mean nothing here."""
    gating: Literal["renormalised", "additive", "post-softmax"] = "renormalised"
    """How a mask enters the softmax. `additive` is the reference's -10000, where dropped pairs learn nothing."""
    soft: bool = False
    """No sampling: probabilities themselves multiply the attention (importance maps; with `gating: post-softmax`)."""
    temperature: Annotated[tuple[Positive, ...], BeforeValidator(_tuple), Field(min_length=1, max_length=2)] = (1.0,)
    """Of the relaxation; two values go linearly from the first to the second."""
    penalty_on: Literal["expected", "sampled"] = "expected"
    """Which density the penalty and the controller see."""
    sum: bool = False
    """`penalty` times the sum over all pairs of all masks, as the reference has it, not the mean."""
    mask_learning_rate: Positive = 0.02
    """Adam's rate for the logits, constant. Their sum over all steps must allow logits to travel: 20 or more."""
    mask_clip_norm: Positive = 1.0
    """Gradient-norm clip of the logits alone."""
    levels: Literal[1, 2] = 1
    """2: weights and masks learn from different halves of the rows, in turn (DARTS, arXiv 1806.09055)."""
    finalise: Literal["auto", "topk", "threshold"] = "auto"
    """`topk`: the likeliest pairs up to `density` exactly; `threshold`: whatever is likelier than not. `auto`: `topk`
    with a density."""
    least_per_head: Share = 0.0
    """`topk` leaves every mask at least this density."""
    empty_rows: Literal["nearest", "diagonal", "error"] = "nearest"
    """A query that would see nothing is given its likeliest key, itself, or the stage stops."""
    beyond: bool = False
    """Distances longer than any that was searched are on."""

    def check_density(self, length: int) -> None:
        """Raises ValueError for a density that leaves queries without any key whatever is kept."""
        least = min(1.0, (self.block if self.structure.startswith("block") else 1) / length)
        if self.density is not None and self.density < least:
            raise ValueError(
                f"attention.density {self.density:g} leaves queries without any key at {length} tokens; write at least "
                f"{least:.4g} for structure: {self.structure}"
            )

    @model_validator(mode="after")
    def _masks(self) -> Attention:
        if (self.density is None) == (self.penalty is None) and not self.soft:
            raise ValueError("write either density (the share of pairs to keep, such as 0.1) or penalty")
        if self.finalise == "topk" and self.density is None:
            raise ValueError("finalise: topk needs density; write for example density: 0.1")
        if self.structure == "toeplitz-priced" and (self.global_positions or not self.symmetric):
            raise ValueError("toeplitz-priced has symmetric distances alone; remove global_positions and symmetric")
        if self.structure == "block-toeplitz" and not self.symmetric:
            raise ValueError("structure: block-toeplitz is symmetric; remove symmetric: false")
        if self.levels == 2 and (self.phases or self.batch_ramp):
            raise ValueError("levels: 2 has rows of one length in batches of one size; remove phases and batch_ramp")
        if self.layers_per_group is not None and self.share != "layers":
            raise ValueError("layers_per_group belongs to share: layers; remove it or set share")
        if self.sum and self.penalty is None:
            raise ValueError("sum belongs to penalty; remove it or write a penalty")
        if self.start == FROM_SEARCH and self.arch != FROM_SEARCH:
            raise ValueError("start: from search needs arch: from search as well")
        if FROM_ATTENTION in (self.arch, self.start):
            raise ValueError("from attention is what this section makes; name an architecture, or from search")
        return self


class Importance(Training):
    """Which pairs of tokens matter (SparseBERT, arXiv 2102.12871): an encoder is trained with a soft mask, one
    probability for each pair of positions, multiplied into the attention after the softmax. Nothing is made sparse:
    the results are `importance.json`, pictures, and with `study` what leaving pairs out costs."""

    arch: Annotated[str, AfterValidator(_known_arch)] = "small-modern"
    """The encoder: as `pretrain.arch`; its own patterns do not matter."""
    start: str | None = None
    """Begin with these weights (a model directory or hub name, or `from search`) instead of random ones."""
    share: Literal["layers", "none"] = "layers"
    """`layers`: one map for each head in all layers, as the reference has it; `none`: one for each layer and head."""
    mask_learning_rate: Positive = 0.02
    """Adam's rate for the logits of the maps, constant."""
    study: ShortTraining | None = None
    """Also train from scratch, with the same data and steps for all: full attention, attention without the diagonal,
    and `controls`, each with every seed. One recipe; intervals need two seeds or more."""
    controls: Count = 5
    """Random drops in the study: in every head as many pairs as the diagonal has, drawn anew for each control."""

    @model_validator(mode="after")
    def _study(self) -> Importance:
        if self.study is not None and len(self.study.recipes) > 1:
            raise ValueError("study compares patterns under one recipe; write one in study.recipes")
        if self.study is None and self.controls != type(self).model_fields["controls"].default:
            raise ValueError("controls belong to study; remove them or write study: {steps: …, recipes: …}")
        if self.start == FROM_SEARCH and self.arch != FROM_SEARCH:
            raise ValueError("start: from search needs arch: from search as well")
        if FROM_ATTENTION in (self.arch, self.start):
            raise ValueError("importance looks at dense attention; name an architecture, or from search")
        return self


LayerPair = Annotated[tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]], BeforeValidator(_tuple)]


class Distill(Section):
    """Learn from a teacher: a weighted sum of what is written with a weight above 0. By default Bort's loss (arXiv
    2010.10499) as it was meant: 0.1 of masked words, 0.5 of the teacher's softened predictions at the same places."""

    teacher: str
    """A masked LM: a directory relative to the YAML, a hub name, or `from supernet`. It reads the same ids, so it needs
    the same tokenizer; with another one only `hidden` is possible, compared word by word."""
    mlm: Weight = 0.1
    """Weight of the masked words themselves."""
    logits: Weight = 0.5
    """Weight of T^2 KL(teacher || student) at the masked tokens (Hinton et al., arXiv 1503.02531)."""
    temperature: Positive = 2.0
    """T: both models' logits are divided by it."""
    attention: Weight = 0.0
    """Weight of the squared difference of attention logits, head by head (AutoTinyBERT, TinyBERT): equal numbers of
    heads."""
    hidden: Weight = 0.0
    """Weight of the squared difference of hidden states, projected where the widths differ (AutoTinyBERT, TinyBERT)."""
    relation: Weight = 0.0
    """Weight of MiniLMv2's relations among queries, keys and values of the last layer (arXiv 2012.15828): any heads."""
    layers: Literal["last", "even"] | Annotated[tuple[LayerPair, ...], BeforeValidator(_tuple)] = "last"
    """Which layers `attention` and `hidden` compare: the last ones; `even`: every layer of the student with one of the
    teacher's at the same share of its depth, and the embeddings (TinyBERT); or pairs `[[0, 0], [2, 6]]` of a student's
    and a teacher's layer, counted from 1, 0 = embeddings."""
    relation_heads: Count = 12
    """Heads that queries, keys and values are split into for `relation`."""
    relation_layer: Count | None = None
    """The teacher's layer for `relation`, counted from 1; default: its last (MiniLMv2: the 21st of 24)."""
    slice: Literal["even", "first"] = "even"
    """With `start: from teacher`: which of the teacher's layers are kept; of each the most important heads,
    feed-forward units and channels."""
    top_k: Count | None = None
    """Of the teacher's predictions keep so many likeliest, and the rest as one class; none = the whole vocabulary.
    Few of them say little about what is unlikely and slow the beginning down."""
    cache: str | None = None
    """Keep the teacher's `top_k` predictions in this directory (relative to the YAML) and ask it once for each masked
    copy of a row. Needs `top_k`, `mask.copies` and one `mask.rate`; students with the same seed and masks share it."""

    @model_validator(mode="after")
    def _something(self) -> Distill:
        if not any((self.logits, self.attention, self.hidden, self.relation)):
            raise ValueError("nothing is learnt from the teacher; give logits, attention, hidden or relation a weight")
        if (self.top_k or self.cache) and not self.logits:
            raise ValueError("top_k and cache belong to logits, whose weight is 0; remove them")
        if self.cache and self.top_k is None:
            raise ValueError("cache keeps the most likely predictions; write how many, for example top_k: 32")
        if self.cache and (self.attention or self.hidden or self.relation):
            raise ValueError("cache holds predictions alone; attention, hidden and relation need the teacher itself")
        if self.layers != "last" and not (self.attention or self.hidden):
            raise ValueError("layers belongs to attention and hidden, whose weights are 0; remove it")
        return self


class Pretrain(Training):
    """Train an encoder on the shards within a budget."""

    arch: Annotated[str, AfterValidator(_known_arch_or_auto)] = "small-modern"
    """A preset's name (`frugalbert explain arch` lists them), one line such as `modern 4x256 heads=4 ffn=640`, a
    path to an `arch.json`, `from search`, or `from attention`. `auto`: the size that a budget in time is best spent on,
    by the speed of this machine and a fit to trainings of many sizes; before the first step, of the same budget."""
    limit: SizeLimit = SizeLimit()
    """Only for `arch: auto`: what the encoder may cost, such as `{latency_ms: 8}`."""
    start: str | None = None
    """Continue from these weights (a model directory or hub name) instead of random ones; `from search`: the chosen
    architecture's share of the super-network; `from attention`: the weights that learnt with the masks; `from teacher`:
    a slice of `distill.teacher`."""
    objective: Literal["mlm", "rtd", "distill"] = "mlm"
    """Masked language modelling, replaced-token detection, or learning from a teacher."""
    replaced: ReplacedTokens = ReplacedTokens()
    """Only for `objective: rtd`."""
    distill: Distill | None = None
    """Only for `objective: distill`: the teacher, and what is learnt from it."""
    pair_weight: Weight = 1.0
    """With `shards.pairs`: weight of the loss of the pairs' labels beside that of the masked words (BERT: 1); 0 = the
    masked words alone. Pairs train the pooler, which fine-tuning begins with."""

    @model_validator(mode="after")
    def _objective(self) -> Pretrain:
        if 0.0 in self.mask.rate:
            raise ValueError("mask.rate 0 hides nothing that could be learnt; write for example 0.15")
        self._sizes()
        for source in (FROM_SEARCH, FROM_ATTENTION):
            if self.start == source and self.arch != source:
                raise ValueError(f"start: {source} needs arch: {source} as well")
        if self.objective != "rtd" and self.replaced != ReplacedTokens():
            raise ValueError("replaced belongs to objective: rtd; remove it or set the objective")
        if (self.objective == "distill") != (self.distill is not None):
            raise ValueError("objective: distill and distill: {teacher: …} belong together; write both or neither")
        if self.start == FROM_TEACHER and self.distill is None:
            raise ValueError("start: from teacher needs objective: distill and distill: {teacher: …}")
        if self.distill and self.distill.cache and (self.mask.copies is None or len(set(self.mask.rate)) > 1):
            raise ValueError(
                "distill.cache needs masks that come again; write mask: {rate: 0.15, copies: 10}, or remove the cache"
            )
        if self.distill and self.distill.cache and any(phase.max_predictions for phase in self.phases):
            raise ValueError("distill.cache knows one mask.max_predictions; remove it from phases, or the cache")
        return self

    def _sizes(self) -> None:
        if self.arch != AUTO:
            if self.limit != SizeLimit():
                raise ValueError("limit belongs to arch: auto; remove it, or write that (a space has search.limit)")
            return
        if self.budget.kind != "seconds":
            raise ValueError(
                f"arch: auto weighs size against time, and budget {self.budget} is none; write one such as 24h, or "
                "name an architecture"
            )
        if self.start is not None or self.objective == "distill":
            raise ValueError("arch: auto begins with random weights and learns from text; name an architecture")


class Columns(Section):
    """Where a custom task's texts and labels stand."""

    text: str = "text"
    """Column of the (first) text; of the passage of a multiple choice."""
    text_b: str | None = None
    """Column of the second text of a pair; of the question of a multiple choice, which each option completes."""
    label: str = "label"
    """Column of the label. Multi-label: labels separated by `;` or a JSON list. Multiple choice: the number of the
    right option, from 0, its letter or its text."""
    options: Texts = ()
    """Columns of the options of a multiple choice, or one column that holds a JSON list of them."""
    id: str | None = None
    """Column of the row's key, written beside its prediction; without one the row's number."""


class Task(Section):
    """A custom task from CSV, TSV or JSONL files, SQuAD's JSON, or CoNLL columns."""

    name: Name
    """Name in tables and folders."""
    type: Literal[
        "classification", "regression", "multilabel", "multiple-choice", "question-answering", "token-classification"
    ] = "classification"
    """What is predicted. A pair of texts is any of the first three with `columns.text_b`. `question-answering` reads
    SQuAD's JSON, or JSONL with `question`, `context` and `answers`; `token-classification` CoNLL columns (word first,
    tag last, a blank line between sentences)."""
    train: str
    """Training file, relative to the YAML."""
    dev: str | None = None
    """Evaluation file; without one `dev_share` of the training file is held out."""
    test: str | None = None
    """A file to predict, with `predict_test`; labels are not needed."""
    dev_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Share held out when there is no `dev`, chosen by a hash of the text."""
    columns: Columns = Columns()
    """Column names."""
    metrics: Texts = ()
    """`accuracy`, `f1`, `mcc`, `pearson`, `spearman`, `mse`, …; the first is the headline; default by type."""


class Sweep(Section):
    """Try several settings of the recipe, every one with all of `seeds`, and keep the best mean over them."""

    preset: Literal["24hbert", "extremebert", "bort"] | None = None
    """Values of a published grid, by the size of the task; what is written here beside it takes their place."""
    method: Literal["grid", "random", "tpe"] = "grid"
    """All combinations, some of them by chance, or proposed by Optuna's tree-structured Parzen estimator."""
    trials: Count = 20
    """Settings to try with `random` and `tpe`."""
    at_once: Count = 4
    """`tpe`: settings proposed together before it learns how they did; changes the result, unlike `machine.workers`."""
    learning_rate: Values = ()
    """Values to try; empty = the recipe's. `random` and `tpe` also take a range, `1e-5..1e-3`, drawn by logarithm."""
    batch_size: Annotated[tuple[Count, ...], BeforeValidator(_tuple)] = ()
    """Values to try."""
    epochs: Values = ()
    """Values or a range to try."""
    warmup: Values = ()
    """Values or a range to try."""
    weight_decay: Values = ()
    """Values or a range to try."""
    layer_decay: Values = ()
    """Values or a range to try."""
    keep: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Below 1: after each seed only this share of the settings, the best so far, gets the next seed."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of `random` and `tpe`."""


class Agora(Section):
    """Agora (arXiv 2010.07990; the loop stands in docs/methods.md): train every one of some settings, make new examples
    from the best one's mistakes, have a teacher label them, let settings go, and again. For one task, with `select:
    train`: the examples that select also show the mistakes, and are never trained on; the dev set stays untouched."""

    teacher: str | None = None
    """Who labels new examples: directory or hub name of a sequence classifier of the task; labels go by name."""
    weak_teacher: bool = False
    """Go on with a teacher that is right on no more than two thirds of the steering examples, which Agora rules out."""
    labels: Literal["teacher", "gold", "random"] = "teacher"
    """Ablations: the label of the mistake that a new example was made from, or any label by chance."""
    settings: Sweep
    """What to train, written as in `sweep`: a grid, settings by chance or a preset; `tpe`, `at_once` and `keep` have no
    meaning here."""
    transforms: Annotated[Texts, Field(min_length=1)] = ("dropout",)
    """How new examples are made, each by one of these in turn: `dropout`, `delete`, `swap` of words, `mix` of two
    mistakes, `masked-lm`, `synonym` by embeddings, or `file.py:function` beside the YAML."""
    transform_model: str | None = None
    """Directory or hub name of the masked language model of `masked-lm` and `synonym`; default: the model itself."""
    strength: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.15
    """Share of the words that a transformation touches."""
    per_mistake: Count = 2
    """New examples made from each mistake."""
    max_overlap: Annotated[float, Field(gt=0.0, le=1.0)] = 0.8
    """A new example that shares more of its runs of three words with a steering, dev or test example is left out."""
    tolerance: Positive = 0.5
    """Regression: a prediction is right within so many standard deviations of the training labels."""
    prune: Literal["lcs", "worst", "halving"] = "lcs"
    """Which settings leave after a round: the worst with those most like it, the worst, or the worse half."""
    replay: Count | None = None
    """Every so many rounds make new examples once more, from the mistakes of the best student so far."""
    max_rounds: Count | None = None
    """Stop after so many rounds; never more than there are settings."""
    max_trainings: Count | None = None
    """No round begins that would exceed it."""
    max_examples_per_round: Count = 1000
    """A round adds at most so many."""
    max_examples: Count | None = None
    """Stop once so many have been added."""
    max_teacher_calls: Count | None = None
    """Stop once the teacher has labelled so many."""
    max_minutes: Positive | None = None
    """No round begins after it."""
    patience: Count | None = None
    """Stop after so many rounds without a better student."""

    @model_validator(mode="after")
    def _labelled(self) -> Agora:
        if self.labels == "teacher" and self.teacher is None:
            raise ValueError("agora needs a teacher; write agora.teacher, or labels: gold or random for an ablation")
        if self.settings.method == "tpe":
            raise ValueError("agora.settings has to be known from the start; write method: grid or random")
        return self


class TaskSettings(Section):
    """What one task does otherwise than the section says."""

    start: Annotated[str, Field(pattern=r"^from task [A-Za-z0-9._-]+$")] | None = None
    """`from task mnli`: also start from the encoder fine-tuned on that task of this run, with a new head (STILTs,
    arXiv 1811.01088); results stand beside those without, and the model that is kept is this one."""
    learning_rate: Positive | None = None
    """As in `finetune`."""
    batch_size: Count | None = None
    """As in `finetune`."""
    epochs: Positive | None = None
    """As in `finetune`."""
    max_length: Annotated[int, Field(ge=8)] | None = None
    """As in `finetune`."""
    max_train_examples: Count | None = None
    """As in `finetune`."""


class Finetune(Section):
    """Fine-tune the pre-trained encoder on tasks, beside the same encoder from random weights."""

    tasks: Annotated[tuple[str | Task, ...], BeforeValidator(_tuple), Field(min_length=1)]
    """`glue`, `superglue`, `squad1`, `squad2`, `race`, `blimp`, single tasks of these (`cola`, `boolq`, `race-high` …),
    `python-docs`, or custom tasks."""
    data: str | None = None
    """Directory with the tasks' official folders (`CoLA/train.tsv`, `glue/CoLA/train.tsv`, `BoolQ/train.jsonl` …);
    without it the data come from the hub."""
    model: str | None = None
    """Fine-tune this model: a directory, a run (what it pre-trained) or a hub name; none = what `pretrain` made."""
    train: bool = True
    """`false`: evaluate the model as it is, with the head it has; labels are mapped by name."""
    learning_rate: Positive = 1e-4
    """Peak rate; linear warm-up, then linear to 0."""
    batch_size: Count = 32
    """Examples a step."""
    epochs: Positive | Literal["auto"] = 3.0
    """Passes over the training examples. `auto`: 20 below 1,000 of them, 10 below 5,000, 5 below 50,000, else 3."""
    warmup: Share = 0.06
    """Share of the steps with rising rate."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    """Decoupled weight decay."""
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Each layer's rate is this times that of the layer above it (ULMFiT, arXiv 1801.06146; ELECTRA)."""
    class_weights: Literal["none", "balanced"] = "none"
    """`balanced`: rare classes weigh more in the loss, inversely to their frequency."""
    max_length: Annotated[int, Field(ge=8)] = 128
    """Longer inputs are cut, from the longer text of a pair."""
    max_train_examples: Count | None = None
    """Use at most this many training examples per task (balanced for `python-docs`)."""
    dropout: Rate = 0.1
    """Dropout while fine-tuning."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """As in `pretrain`."""
    select: Literal["none", "train", "dev"] = "none"
    """Which examples choose the epoch and a sweep's setting: none (the last step's model), `select_share` of the
    training examples (the dev set stays untouched), or the dev set itself, which the results then say."""
    select_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Share of the training examples that `select: train` holds out, by a hash of the text."""
    patience: Count | None = None
    """With `select`: stop after this many epochs without a better one."""
    seeds: Seeds = (0, 1, 2)
    """One run per seed; tables show mean, standard deviation and interval."""
    random_baseline: bool = True
    """Also fine-tune the same architecture from random weights, same recipe and seeds."""
    predict_test: bool = False
    """Also predict the test sets, for `frugalbert submit`."""
    per_task: dict[Name, TaskSettings] = {}
    """Settings of single tasks, and which tasks also start from another."""
    stride: Count = 128
    """Question answering: by how many tokens the windows of a long passage overlap."""
    max_question_length: Count = 64
    """Question answering: longer questions are cut to this many tokens."""
    max_answer_length: Count = 30
    """Question answering: the longest answer that is considered, in tokens."""
    negatives: Count = 10
    """ReCoRD: wrong candidates a query is trained with; evaluation always uses all."""
    blimp: Literal["exact", "one-pass"] = "exact"
    """Pseudo-log-likelihood with every token masked in turn, or from one pass over the whole sentence, which is cheap,
    sees what it scores and is labelled so."""
    blimp_pairs: Count | None = None
    """Score only the first so many pairs of each paradigm; all 1,000 take an hour on one core."""
    sweep: Sweep | None = None
    """Try several settings."""
    agora: Agora | None = None
    """Also train by Agora (`agora` beside `pretrained` in the results)."""


Search.model_rebuild()  # it holds a Finetune


class Export(Section):
    """Write the encoder for deployment."""

    formats: Annotated[tuple[Literal["hf", "onnx", "onnx-int8"], ...], BeforeValidator(_tuple)] = (
        "hf",
        "onnx",
        "onnx-int8",
    )
    """`hf`: a Hugging Face directory with model card; `onnx`: dynamic axes, checked against PyTorch; `onnx-int8`:
    dynamically quantised (ONNX Runtime), with the measured difference."""
    stock: bool = True
    """Write plain `BertModel` / `ModernBertModel` files where the architecture is exactly representable."""
    task: str | None = None
    """Also export the best fine-tuned model of this task."""
    licence: str = "unknown"
    """Licence of the model, for the card."""


class Bench(Section):
    """Latency and throughput of the exported encoder, beside BERT-base of the same vocabulary and length."""

    lengths: Counts = (32, 128)
    """Sequence lengths in tokens."""
    batch_sizes: Counts = (1, 8)
    """Sequences per call."""
    threads: Counts = (1,)
    """CPU threads."""
    repeats: Count = 30
    """Timed calls per cell, after warm-up."""
    texts: Annotated[int, Field(ge=0)] = 32
    """Real texts of mixed lengths (paragraphs of Python's manual) that are tokenised and encoded as well: in batches of
    about the same length, and in batches of the largest of `batch_sizes` as they come. 0 = none."""
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    """Of PyTorch models on the CPU. `auto`: bf16 where the CPU multiplies it and the results keep a cosine of 0.999."""
    compile: bool = False
    """Time PyTorch models compiled (torch.compile) as well; what compiling took is told beside it."""
    baseline: Literal["bert-base", "none"] = "bert-base"
    """What to time beside it: stock BERT-base with random weights (time does not depend on their values)."""


class Report(Section):
    """One self-contained HTML page about the run."""

    title: str | None = None
    """Heading; default: the run's name."""


class Config(Section):
    """One run."""

    name: Name
    """Name of the run; its directory is `runs/NAME` unless `--dir` says otherwise."""
    machine: Machine = Machine()
    """Where it runs."""
    corpus: Corpus | None = None
    """Sources of text."""
    tokenizer: Tokenizer | None = None
    """Tokenizer, trained or loaded."""
    shards: Shards | None = None
    """Packed token shards."""
    space: Space | None = None
    """Architectures to choose from."""
    supernet: Supernet | None = None
    """One network for all of them."""
    latency: Latency | None = None
    """Their latency on this machine."""
    search: Search | None = None
    """The best one within a limit."""
    attention: Attention | None = None
    """Sparse attention patterns, learned."""
    importance: Importance | None = None
    """Which pairs of tokens matter."""
    pretrain: Pretrain | None = None
    """Pre-training."""
    finetune: Finetune | None = None
    """Fine-tuning and evaluation."""
    export: Export | None = None
    """Deployment formats."""
    bench: Bench | None = None
    """Latency."""
    report: Report | None = None
    """HTML report."""

    @model_validator(mode="after")
    def _rows(self) -> Config:
        """What `pretrain` asks of the shards."""
        if self.pretrain is None or self.shards is None:
            return self
        pairs = self.shards.pairs
        if pairs != "none" and self.pretrain.objective != "mlm":
            raise ValueError(
                f"shards.pairs: {pairs} goes with pretrain.objective: mlm alone; write that, or shards.pairs: none"
            )
        if pairs == "none" and self.pretrain.pair_weight != 1.0:
            raise ValueError("pretrain.pair_weight belongs to shards.pairs; remove it, or write pairs: nsp or sop")
        return self

    @model_validator(mode="after")
    def _lengths(self) -> Config:
        """What every training asks of the rows' lengths."""
        for name in ("supernet", "attention", "importance", "pretrain"):
            section = getattr(self, name)
            if section is None or self.shards is None:
                continue
            lengths = [phase.length for phase in section.phases]
            for length in lengths:
                if length not in self.shards.length:
                    raise ValueError(
                        f"{name}.phases asks for length {length}, shards.length has {list(self.shards.length)}; add it "
                        "there"
                    )
            if isinstance(section, Attention):
                section.check_density(max(lengths or self.shards.length[:1]))
        return self

    @model_validator(mode="after")
    def _order(self) -> Config:
        needs = {"tokenizer": ("corpus",), "shards": ("corpus", "tokenizer"), "pretrain": ("tokenizer", "shards")}
        needs |= {name: ("tokenizer", "shards") for name in ("attention", "importance")}
        needs |= {"space": ("tokenizer",), "latency": ("space",)}
        needs |= {"supernet": ("shards", "space")}
        trained = self.search is not None and self.search.quality == "training"
        needs |= {"search": ("space", "shards") if trained else ("space", "supernet")}
        if self.shards and self.shards.samples:
            if self.corpus is not None:
                raise ValueError("shards.samples takes the place of the corpus; remove one of the two")
            if self.tokenizer is None or self.tokenizer.path is None:
                raise ValueError("shards.samples needs tokenizer.path: the vocabulary that the samples were made with")
            needs["shards"] = ("tokenizer",)
        for section, before in needs.items():
            if section == "tokenizer" and self.tokenizer is not None and self.tokenizer.path:
                continue
            missing = [name for name in before if getattr(self, name) is None]
            if getattr(self, section) is not None and missing:
                raise ValueError(f"{section} needs the section {missing[0]}; add it or remove {section}")
        for user in ("attention", "importance", "pretrain"):
            for source in (FROM_SEARCH, FROM_ATTENTION):
                name = source.removeprefix("from ")
                if getattr(getattr(self, user), "arch", None) == source and getattr(self, name) is None:
                    raise ValueError(f"{user}.arch: {source} needs the section {name}; add it or name an architecture")
        if (
            self.pretrain and self.pretrain.distill and self.pretrain.distill.teacher == FROM_SUPERNET
            and self.supernet is None
        ):  # fmt: skip
            raise ValueError(
                "pretrain.distill.teacher: from supernet needs the section supernet; add it or name a model"
            )
        if self.search and self.latency is None and (self.search.limit.latency_ms or self.search.limit.speedup):
            raise ValueError("search.limit speaks of latency, which the section latency measures; add latency: {}")
        if self.search and self.latency is None and self.search.extraction.inference == "latency":
            raise ValueError("search.extraction.inference: latency needs the section latency; add latency: {}")
        for user in ("attention", "importance", "pretrain"):
            if trained and getattr(getattr(self, user), "start", None) == FROM_SEARCH:
                raise ValueError(
                    f"search.quality: training gives an architecture without weights; remove {user}.start: from search"
                )
        if self.search and self.supernet and self.search.quality not in ("finetune", "training"):
            wanted = "distillation" if self.supernet.teacher else "loss"
            if self.search.quality != wanted:
                having = "with" if self.supernet.teacher else "without"
                raise ValueError(
                    f"search.quality {self.search.quality} does not go with a super-network that is trained {having} a "
                    f"teacher; write {wanted}"
                )
        for section in ("export", "bench"):
            if getattr(self, section) is not None and self.pretrain is None:
                raise ValueError(
                    f"{section} needs the section pretrain; for a finished model use `frugalbert {section}`"
                )
        if self.finetune and self.pretrain is None and self.finetune.model is None:
            raise ValueError("finetune needs the section pretrain, or finetune.model")
        if self.bench and self.export is None:
            raise ValueError("bench times the exported encoder; add the section export: {}")
        return self
