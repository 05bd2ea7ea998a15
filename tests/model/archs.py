"""Random small architectures of all families, and models of them whose every parameter matters."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import nn

from frugalbert.model import modeling
from frugalbert.model.arch import ACTIVATIONS, Arch, LayerArch
from frugalbert.model.configuration import FrugalConfig

VOCABULARY = 61
CLASSES = {
    "encoder": modeling.FrugalModel,
    "mlm": modeling.FrugalForMaskedLM,
    "pairs": modeling.FrugalForPairs,
    "rtd": modeling.FrugalForReplacedTokenDetection,
    "sequence": modeling.FrugalForSequenceClassification,
    "choice": modeling.FrugalForMultipleChoice,
    "token": modeling.FrugalForTokenClassification,
    "span": modeling.FrugalForQuestionAnswering,
}


@st.composite
def archs(draw: st.DrawFn, windows: bool = True) -> Arch:
    family = draw(st.sampled_from(["bert", "bert-preln", "modern"]))
    hidden = draw(st.integers(1, 12))
    patterns = st.one_of(st.just("dense"), st.integers(1, 5).map("window:{}".format)) if windows else st.just("dense")
    layers = draw(
        st.lists(
            st.builds(
                LayerArch,
                hidden=st.one_of(st.just(hidden), st.integers(1, hidden)),
                heads=st.integers(1, 3),
                head_dim=st.integers(1, 4).map(lambda size: 2 * size if family == "modern" else size),
                ffn=st.integers(1, 9),
                pattern=patterns,
            ),
            min_size=1,
            max_size=4,
        )
    )
    options = {
        "max_length": draw(st.integers(16, 40)),
        "token_types": draw(st.integers(0, 3)),
        "embedding_norm": draw(st.booleans()),
        "norm_epsilon": draw(st.sampled_from([1e-12, 1e-5, 3.7e-3])),
        "activation": draw(st.sampled_from(ACTIVATIONS)),
        "qk_norm": family == "modern" and draw(st.booleans()),
        "rope_theta": draw(st.sampled_from([10_000.0, 160_000.0, 12.5])),
        "local_rope_theta": draw(st.sampled_from([10_000.0, 500.0])),
    }
    return Arch.build(family, hidden, tuple(layers), options)


def randomise(model: nn.Module, scale: float = 0.2) -> nn.Module:
    """Every parameter random, so that none is neutral (zero-initialised outputs and biases, unit norms); eval mode."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            if "norm" in name.lower() and name.endswith("weight"):
                parameter.add_(1.0)
    return model.eval()


def build(arch: Arch | str, head: str = "encoder", **settings: object) -> modeling.FrugalPreTrainedModel:
    arch = Arch.parse(arch) if isinstance(arch, str) else arch
    torch.manual_seed(0)
    return randomise(CLASSES[head](FrugalConfig.from_arch(arch, VOCABULARY, **settings)))  # type: ignore[return-value]


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))
