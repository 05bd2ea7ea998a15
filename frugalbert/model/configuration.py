"""FrugalConfig: an Arch, a vocabulary and the training settings as a Hugging Face configuration.

`config.json` carries the architecture as its one-line text in `arch`; the usual Hugging Face names (`hidden_size`,
`num_hidden_layers` …) are written beside it for other tools and always follow from it.
"""

from typing import Any

from transformers import PreTrainedConfig

from .arch import Arch
from .backends import BACKENDS
from .patterns import parse

AUTO_CLASSES = {
    "AutoConfig": "configuration.FrugalConfig",
    "AutoModel": "modeling.FrugalModel",
    "AutoModelForMaskedLM": "modeling.FrugalForMaskedLM",
    "AutoModelForPreTraining": "modeling.FrugalForReplacedTokenDetection",
    "AutoModelForSequenceClassification": "modeling.FrugalForSequenceClassification",
    "AutoModelForQuestionAnswering": "modeling.FrugalForQuestionAnswering",
    "AutoModelForMultipleChoice": "modeling.FrugalForMultipleChoice",
    "AutoModelForTokenClassification": "modeling.FrugalForTokenClassification",
}


class FrugalConfig(PreTrainedConfig):
    """Built with `from_arch`. Raises ValueError for an architecture text that is none."""

    model_type = "frugalbert"

    arch: str = "small-modern"
    vocab_size: int = 30522
    pad_token_id: int | None = 0
    sep_token_id: int | None = None
    """For attention patterns with `sep` among the tokens that all see."""
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    classifier_dropout: float | int | None = None
    """None = hidden_dropout_prob."""
    classifier_pooling: str = "cls"
    """What a `modern` sequence classifier looks at: `cls` (the first token) or `mean` (all real tokens)."""
    initializer_range: float = 0.02
    zero_init_outputs: bool | None = None
    """Start with attention and feed-forward outputs at zero, so that every layer begins as the identity; None = in
    family `modern` only (modded-nanogpt; helps pre-norm encoders on small budgets)."""
    attention_backend: str = "auto"
    """How layers with an attention pattern compute it: `auto` (what pays), `sdpa` (all pairs, masked), `gather` or
    `flex` (only what the pattern needs), as `backends.py` describes them."""
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        arch = Arch.parse(self.arch)
        self.arch = arch.to_text()
        self.hidden_size = arch.hidden
        self.num_hidden_layers = len(arch.layers)
        self.num_attention_heads = max(layer.heads for layer in arch.layers)
        self.intermediate_size = max(layer.ffn for layer in arch.layers)
        reach = [head.reach for layer in arch.layers for head in parse(layer.pattern) if head.reach is not None]
        self.max_position_embeddings = min(arch.max_length, *reach) if reach else arch.max_length
        self.type_vocab_size = arch.token_types
        if self.zero_init_outputs is None:
            self.zero_init_outputs = arch.family == "modern"
        if self.classifier_pooling not in ("cls", "mean"):
            raise ValueError(f"classifier_pooling must be cls or mean, not {self.classifier_pooling!r}")
        if self.attention_backend not in BACKENDS:
            raise ValueError(f"attention_backend must be one of {', '.join(BACKENDS)}, not {self.attention_backend!r}")
        for name in DERIVED:
            kwargs.pop(name, None)
        kwargs.setdefault("auto_map", dict(AUTO_CLASSES))
        super().__post_init__(**kwargs)

    @classmethod
    def from_arch(
        cls, arch: Arch, vocab_size: int, pad_token_id: int | None = 0, dropout: float = 0.0, **settings: Any
    ) -> "FrugalConfig":
        """`dropout` is that of hidden states and attention; `settings` are further fields, or Hugging Face's own."""
        return cls(
            arch=arch.to_text(),
            vocab_size=vocab_size,
            pad_token_id=pad_token_id,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            **settings,
        )

    def to_arch(self) -> Arch:
        return Arch.parse(self.arch)


DERIVED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
)
