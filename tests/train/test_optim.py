"""AdamW: decay groups, clipping, masters, accumulation, against torch's AdamW and against arithmetic."""

import pytest
import torch

from nano3.config import OptimizerConfig
from nano3.model.init import initialise
from nano3.train.optim import AdamW, decays
from tests.oracles import GOLDEN, our_model


def feed(p: torch.nn.Parameter, gradient: torch.Tensor) -> None:
    """Let autograd bring this gradient, as training does: the optimizer takes it from there."""
    (p * gradient).sum().backward()


def test_one_dimension_never_decays_and_all_else_does() -> None:
    model = our_model(GOLDEN)
    still = {n for n, p in model.named_parameters() if not decays(p)}
    assert {n.rsplit(".", 1)[-1] for n in still} == {"weight", "bias", "A_log", "D", "dt_bias"}
    assert all(n.endswith(("norm.weight", "norm_f.weight", "conv1d.bias", "A_log", "D", "dt_bias")) for n in still)
    assert decays(model.layers["0"].mixer.conv1d.weight)
    assert decays(model.layers["1"].mixer.gate.weight)
    assert decays(model.embeddings.weight)


def test_steps_equal_torchs_adamw_with_clipping() -> None:
    c = OptimizerConfig(lr=1e-2, clip_grad=0.5)
    model = initialise(our_model(GOLDEN), GOLDEN, 0)
    twin = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    groups = [
        {"params": [p for p in twin.values() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in twin.values() if p.ndim == 1], "weight_decay": 0.0},
    ]
    theirs = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    ours = AdamW(model, c)
    for step in range(4):
        lr = 1e-2 / (step + 1)
        for n, p in model.named_parameters():
            twin[n].grad = torch.randn_like(p) * (0.1 if step == 3 else 1e-4)  # clipped at the last step only
            feed(p, twin[n].grad)
        norm = torch.nn.utils.clip_grad_norm_(twin.values(), 0.5).item()
        for g in theirs.param_groups:
            g["lr"] = lr
        theirs.step()
        assert ours.step(lr) == pytest.approx(norm, rel=1e-6)
        assert (norm > 0.5) == (step == 3)
        for n, p in model.named_parameters():
            assert torch.allclose(p, twin[n], rtol=1e-5, atol=1e-7), n
            assert p.grad is None


def test_bf16_updates_accumulate_in_the_fp32_master() -> None:
    """A step far below half a bf16 unit of the weight is lost in bf16 and must not be lost in the master."""
    model = initialise(our_model(GOLDEN, torch.bfloat16), GOLDEN, 0)
    optimizer = AdamW(model, OptimizerConfig(weight_decay=0.0, clip_grad=0.0))
    p = model.lm_head.weight
    before, master = p.detach().clone(), optimizer.masters["lm_head.weight"]
    assert master.dtype == torch.float32
    for _ in range(100):
        (p.float().sum() * 1.0).backward()
        optimizer.step(1e-5)  # Adam moves every weight by lr: 1e-3 in 100 steps
    assert torch.allclose(master, before.float() - 1e-3, atol=1e-6)
    assert torch.equal(p, master.bfloat16())


def test_micro_batches_accumulate_in_fp32() -> None:
    model = initialise(our_model(GOLDEN, torch.bfloat16), GOLDEN, 0)
    optimizer = AdamW(model, OptimizerConfig())
    p = model.lm_head.weight
    (p.float().sum() * 1.0).backward()
    for _ in range(8):
        (p.float().sum() * 2.0**-10).backward()  # each would vanish beside 1 in bf16
    assert p.grad is None
    assert (optimizer.reduced_gradients()["lm_head.weight"] == 1 + 8 * 2.0**-10).all()


def test_state_restores_the_same_future() -> None:
    def advance(model, optimizer, steps):
        g = torch.Generator().manual_seed(5)
        for _ in range(steps):
            for p in model.parameters():
                feed(p, torch.randn(p.shape, generator=g))
            optimizer.step(1e-2)

    first = initialise(our_model(GOLDEN), GOLDEN, 0)
    a = AdamW(first, OptimizerConfig())
    advance(first, a, 3)
    second = our_model(GOLDEN)
    second.load_state_dict(first.state_dict())
    b = AdamW(second, OptimizerConfig())
    for name, kept in b.resume_state(a.steps).items():
        for kind, tensor in kept.items():
            tensor.copy_(a.state()[name][kind])
    advance(first, a, 2)
    advance(second, b, 2)
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)
