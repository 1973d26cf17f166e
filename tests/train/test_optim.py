"""AdamW: decay groups, clipping, masters, accumulation, against torch's AdamW and against arithmetic; fewer bytes."""

import subprocess
import sys

import pytest
import torch

from nano3.config import OptimizerConfig, UserError
from nano3.model.init import initialise
from nano3.parallel.tensor import Split
from nano3.train.optim import AdamW, decays
from nano3.train.update import Compact, Fused, block_of, check_forms
from tests.conftest import ROOT
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
        assert ours.step(lr).item() == pytest.approx(norm, rel=1e-6)
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


def test_gradients_in_bf16_are_summed_in_it_and_their_norm_is_not() -> None:
    model = initialise(our_model(GOLDEN, torch.bfloat16), GOLDEN, 0)
    optimizer = AdamW(model, OptimizerConfig(gradients="bf16", clip_grad=1e-3))
    wide = {b.members[0].parameter.dtype for b in optimizer.buckets if b.dtype == torch.float32}
    assert wide == {torch.float32}
    assert {b.wire for b in optimizer.buckets if b.dtype == torch.bfloat16} == {torch.bfloat16}
    p = model.lm_head.weight
    (p.float().sum() * 1.0).backward()
    (p.float().sum() * 2.0**-10).backward()  # vanishes beside 1
    for q in model.parameters():
        q.grad = None
    assert optimizer.step(1e-3).item() == pytest.approx(p.numel() ** 0.5, rel=1e-6)


def test_without_masters_small_updates_arrive_on_average() -> None:
    """100 steps of 2^-12 of a weight's unit each, in bf16, which would all be lost if rounded to nearest."""
    model = initialise(our_model(GOLDEN, torch.bfloat16), GOLDEN, 0)
    optimizer = AdamW(model, OptimizerConfig(weight_decay=0.0, clip_grad=0.0, masters="none"), seed=3)
    p = model.lm_head.weight
    with torch.no_grad():
        p.fill_(1.0)
    for _ in range(100):
        (p.float().sum() * 1.0).backward()
        optimizer.step(1e-5)
    moved = 1 - p.double().mean().item()
    assert optimizer.masters["lm_head.weight"].data_ptr() == p.data_ptr()
    assert moved == pytest.approx(1e-3, rel=5 * (2**-8 / 1e-3 / p.numel()) ** 0.5)  # five standard deviations
    assert set(optimizer.state()["lm_head.weight"]) == {"exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize(("moments", "bound"), [("bf16", 0.005), ("8bit", 0.1)])
def test_moments_in_fewer_bits_lead_to_almost_the_same_place(moments: str, bound: float) -> None:
    """20 steps of gradients whose sizes differ by four decades within a block, against fp32 moments.

    By the distance travelled: 0.003 and 0.065 seen; codes in even steps, or in squares, are 0.5 and 0.3 off.
    """
    ends = []
    for form in ("fp32", moments):
        model = initialise(our_model(GOLDEN), GOLDEN, 0)
        optimizer = AdamW(model, OptimizerConfig(moments=form, clip_grad=0.0, weight_decay=0.0))
        assert isinstance(optimizer.update, Fused if form == "fp32" else Compact)
        g = torch.Generator().manual_seed(5)
        p = model.embeddings.weight
        start, size = p.detach().clone(), 10 ** (4 * torch.rand(p.shape, generator=g) - 4)
        for _ in range(20):
            feed(p, (torch.randn(p.shape, generator=g) + 0.5) * size)
            optimizer.step(1e-3)
        ends.append(p.detach() - start)
    assert (ends[1] - ends[0]).norm() < bound * ends[0].norm()


def test_which_tensors_have_codes_does_not_depend_on_the_layout() -> None:
    for tp in (1, 2, 4, 8):
        assert block_of(torch.Size((2688, 4096 // tp)), Split("tp", 1, (4096,))) == 64 * 2
        assert block_of(torch.Size((2688, 3712 // tp)), Split("tp", 1, (3712,))) == 16
        assert block_of(torch.Size((4096 // tp, 2688)), Split("tp", 0, (4096,))) == 128
    assert block_of(torch.Size((128, 1856, 32)), Split("ep", 0, (128,))) == 32
    assert block_of(torch.Size((6144, 1, 4)), None) == block_of(torch.Size((4096,)), None) == 0


def test_forms_of_bf16_weights_are_refused_for_fp32_ones() -> None:
    check_forms(OptimizerConfig(moments="8bit"), bf16=False)
    for key, value in (("masters", "none"), ("gradients", "bf16")):
        c = OptimizerConfig(**{key: value})
        check_forms(c, bf16=True)
        with pytest.raises(UserError, match=rf"optimizer\.{key}={value} .*train\.precision=bf16"):
            check_forms(c, bf16=False)
    check_forms(OptimizerConfig(), bf16=True, reduce_in_fp32=False)
    with pytest.raises(UserError, match=r"parallel\.grad_reduce_in_fp32=false .*train\.precision=bf16"):
        check_forms(OptimizerConfig(), bf16=False, reduce_in_fp32=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_norm_has_one_dtype_whoever_counts(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """tp rank 0 counts what all tp ranks hold; a factor for clipping of another dtype would pull the copies apart."""

    def norm(counted: bool) -> torch.Tensor:
        model = initialise(our_model(GOLDEN).to(dtype), GOLDEN, 0)
        optimizer = AdamW(model, OptimizerConfig())
        monkeypatch.setattr(optimizer, "_counted", lambda name: counted)
        feed(model.norm_f.weight, torch.ones_like(model.norm_f.weight))
        return optimizer.step(1e-3)

    assert norm(counted=False).dtype == norm(counted=True).dtype


FORMS = [
    OptimizerConfig(),
    OptimizerConfig(moments="8bit"),
    OptimizerConfig(moments="bf16", masters="none", gradients="bf16"),
]


@pytest.mark.parametrize("config", FORMS, ids=lambda c: f"{c.moments}-{c.masters}-{c.gradients}")
def test_state_restores_the_same_future(config: OptimizerConfig) -> None:
    dtype = torch.float32 if config.masters == "fp32" else torch.bfloat16

    def advance(model, optimizer, steps):
        g = torch.Generator().manual_seed(5)
        for _ in range(steps):
            for p in model.parameters():
                feed(p, torch.randn(p.shape, generator=g))
            optimizer.step(1e-2)

    first = initialise(our_model(GOLDEN, dtype), GOLDEN, 0)
    a = AdamW(first, config)
    advance(first, a, 3)
    second = our_model(GOLDEN, dtype)
    second.load_state_dict(first.state_dict())
    b = AdamW(second, config)
    for name, kept in b.resume_state(a.steps).items():
        for kind, tensor in kept.items():
            tensor.copy_(a.state()[name][kind])
    advance(first, a, 2)
    advance(second, b, 2)
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)


def test_neither_the_model_nor_its_update_imports_the_compiler() -> None:
    """PyTorch's takes a second or two of every start, and nothing here is compiled by it."""
    script = (
        "import sys, torch\n"
        "from tests.train.small import small\n"
        "from nano3.model.init import allocate, initialise\n"
        "from nano3.train.checkpoint import build\n"
        "from nano3.train.optim import AdamW\n"
        "c = small()\n"
        "model = allocate(build(c.model), torch.device('cpu'), torch.float32)\n"
        "initialise(model, c.model, 0)\n"
        "optimizer = AdamW(model, c.optimizer)\n"
        "for p in model.parameters():\n"
        "    p.sum().backward()\n"
        "optimizer.step(1e-3)\n"
        "assert optimizer.steps == 1\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
