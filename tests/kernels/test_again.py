"""Blocks whose activations are computed again: what they leave undefined the second time reaches no gradient."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels._common import INTERPRET
from nano3.config import KINDS, PeftConfig
from nano3.model.init import allocate, initialise
from nano3.parallel.mesh import ALONE
from nano3.train.checkpoint import build
from tests.kernels.conftest import DEVICE
from tests.oracles import GOLDEN

# The interpreter is slow; mixtures are what has kernels that leave something out.
MODEL = replace(GOLDEN, hybrid_override_pattern="E" if INTERPRET else "ME*")


def gradients(peft: PeftConfig, recompute: frozenset[str]) -> list[Tensor]:
    model = allocate(build(MODEL, recompute, ALONE, None, peft), torch.device(DEVICE), torch.float32)
    initialise(model, MODEL, seed=3, device=torch.device(DEVICE)).train()
    g = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if name.endswith(".B"):
            p.data.copy_(torch.randn(p.shape, generator=g) / 4)
    tokens = torch.randint(0, MODEL.vocab_size, (1, 11), generator=g).to(DEVICE)
    out = model(tokens)
    loss = (out.hidden * torch.randn(out.hidden.shape, generator=g).to(DEVICE)).sum()
    loss = loss + sum(b.aux_B.sum() for b in out.balance)
    trained = [p for n, p in model.named_parameters() if p.requires_grad and n != "lm_head.weight"]
    return [out.hidden, *torch.autograd.grad(loss, trained)]


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("peft", [PeftConfig(), PeftConfig(scheme="lora", rank=4, alpha=6.0)], ids=["full", "lora"])
def test_gradients_are_those_of_what_is_kept(peft: PeftConfig) -> None:
    """To the bit: the kernels', and where these do not run, PyTorch's."""
    kept, again = (gradients(peft, kinds) for kinds in (frozenset(), frozenset(KINDS.values())))
    for a, b in zip(kept, again, strict=True):
        assert torch.equal(a, b)
