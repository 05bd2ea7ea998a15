"""What a GPU's autocast makes of a layer, told by tensors that have a device and a dtype but no numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from frugalbert.model.arch import Arch
from frugalbert.model.configuration import FrugalConfig
from frugalbert.model.layers import FrugalLayer


@pytest.mark.parametrize("family", ["bert", "bert-preln", "modern"])
def test_norms_do_not_widen_the_stream(family: str):
    modern = family == "modern"
    arch = Arch.parse(f"{family} 2x16 heads=2 ffn=24" + " qk_norm=yes" * modern)
    with torch.device("meta"):
        layer = FrugalLayer(FrugalConfig.from_arch(arch, 50), arch, 1)
    found: dict[str, torch.dtype] = {}
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():
        for module in layer.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(torch.empty(parameter.shape), requires_grad=False))
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(lambda _, given, name=name: found.update({name: given[0].dtype}))
        x = torch.empty(2, 8, 16, dtype=torch.bfloat16)
        turns = (torch.empty(1, 1, 8, 8, dtype=torch.bfloat16),) * 2 if modern else None
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            assert nn.LayerNorm(16)(x).dtype == torch.float32  # what happens to others
            found["output"] = layer(x, None, turns).dtype
        finally:
            torch.set_autocast_enabled("cuda", False)
    assert len(found) == 7 + modern  # its gate
    assert set(found.values()) == {torch.bfloat16}, found
