"""What a step sums up is what autograd gives, whichever way a gradient takes; and nothing of it outlives its use."""

import gc
import weakref

import pytest
import torch
from torch import Tensor

from kernels.gradient_sink import Buffer, linear
from nano3.config import Config
from nano3.model.init import allocate, initialise
from nano3.model.lora import adapted
from nano3.model.model import Nano3
from nano3.parallel.data import make_buckets
from nano3.parallel.layout import check_layout
from nano3.parallel.mesh import ALONE, Mesh
from nano3.train.checkpoint import build
from nano3.train.gradients import Gradients
from nano3.train.step import training_step
from tests.oracles import CPU
from tests.parallel.layouts import batches_of, config_for, wake_adapters
from tests.train.mirror import Mirror, mirror_mesh

BF16 = torch.bfloat16


class Collected(Gradients):
    """What would be handed to the optimizer."""

    def __init__(self, model: Nano3, **options: bool) -> None:
        super().__init__(model, **options)
        self.model, self.from_autograd = model, set()

    def _accumulate(self, name: str, gradient: Tensor) -> None:
        self.from_autograd.add(name)
        super()._accumulate(name, gradient)

    def step(self, lr: float, fine: Tensor) -> Tensor:
        self.found = {n: g.clone() for n, g in self.reduced_gradients().items()}
        self.last_micro_batch = False
        return torch.zeros(())


class Autograd:
    """Gradients as PyTorch adds them up: no sinks, no buckets."""

    last_micro_batch = False

    def __init__(self, model: Nano3) -> None:
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def step(self, lr: float, fine: Tensor) -> Tensor:
        self.found = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in self.parameters.items()}
        for p in self.parameters.values():
            p.grad = None
        return torch.zeros(())


def model_of(config: Config, dtype: torch.dtype, mesh: Mesh = ALONE) -> Nano3:
    model = allocate(build(config.model, config.recompute, mesh, None, config.peft), CPU, dtype)
    initialise(model, config.model, seed=5)
    wake_adapters(model)
    return model


def two_steps(model: Nano3, gradients: object, config: Config, mesh: Mesh = ALONE) -> list[dict[str, Tensor]]:
    """The gradients of two steps of three micro-batches; in the second step all tokens of a row are the same."""
    out = []
    for step in range(2):
        batches = batches_of(config, step, False, 0, 1)[:3]
        if step:
            batches = [b._replace(tokens=b.tokens[:, :1].expand_as(b.tokens)) for b in batches]
        training_step(model, gradients, batches, config, mesh, 0.0, False)
        out.append(gradients.found)
    return out


SETTINGS = ["train.micro_batch_size=2"]
KINDS = {
    "one bucket": ([], 1 << 24),
    "many buckets": ([], 300),
    "recompute": (["train.recompute=full"], 300),
    "frozen": (["peft.freeze=[embeddings.weight,layers.1.*,'*.q_proj.weight']"], 1 << 24),
    "lora": (["peft.scheme=lora", "peft.rank=4", "peft.freeze_router=false"], 1 << 24),
}


@pytest.mark.parametrize(("settings", "size"), KINDS.values(), ids=KINDS)
def test_sums_are_those_of_autograd(monkeypatch: pytest.MonkeyPatch, settings: list[str], size: int) -> None:
    """Every kind of block; no sum of the first step is left in the second."""
    monkeypatch.setattr(make_buckets, "__defaults__", (size,))
    config = config_for((*SETTINGS, *settings))
    ours, theirs = (model_of(config, torch.float64) for _ in range(2))
    truth, gradients = two_steps(theirs, Autograd(theirs), config), Collected(ours)
    for found, true in zip(two_steps(ours, gradients, config), truth, strict=True):
        assert found.keys() == true.keys()
        for name, g in true.items():
            assert torch.allclose(found[name], g, rtol=1e-9, atol=1e-12), name
    assert all(p.grad is None for p in ours.parameters())
    large = {n for n in gradients.from_autograd if ours.get_parameter(n).ndim > 1 and adapted(n) is None}
    assert all(n.endswith((".gate.weight", ".conv1d.weight")) for n in large), large


@pytest.mark.parametrize("size", [1 << 24, 300])
def test_two_ranks_whose_rows_do_not_divide(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Each rank gets its rows of the gradient: the other, its mirror, has the same tokens and so half of the loss."""
    monkeypatch.setattr(make_buckets, "__defaults__", (size,))
    config = config_for((*SETTINGS, "model.hidden_size=27", "model.n_routed_experts=7", "model.vocab_size=63"))
    theirs = model_of(config, torch.float64)
    truth = two_steps(theirs, Autograd(theirs), config)
    for rank in range(2):
        mesh = mirror_mesh(config, check_layout(config, 2), rank)
        model = model_of(config, torch.float64, mesh)
        gradients = Collected(model)
        assert any(p.shape[0] % 2 for p in model.parameters() if p.ndim > 1)
        with monkeypatch.context() as patch:
            Mirror(patch)
            found = two_steps(model, gradients, config, mesh)
        for mine, true in zip(found, truth, strict=True):
            for name, g in true.items():
                assert torch.allclose(mine[name], gradients.shard(name, g), rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("narrow", [False, True])
def test_in_bf16_they_differ_from_autograds_by_its_rounding(narrow: bool) -> None:
    """Autograd rounds each of three micro-batches' gradients to 8 bits, and bf16 sums are rounded as often again."""
    config = config_for((*SETTINGS,))
    models = [model_of(config, BF16) for _ in range(2)]
    ours, theirs = (Collected(model, sum_in_bf16=narrow) for model in models)
    for p in models[1].parameters():
        del p.sink
    for found, plain in zip(*(two_steps(g.model, g, config) for g in (ours, theirs)), strict=True):
        for name, g in plain.items():
            assert found[name].dtype == (BF16 if narrow and ours.parameters[name].dtype == BF16 else torch.float32)
            assert (found[name] - g).float().norm() <= 2**-7 * g.float().norm(), name
    assert any(not torch.equal(g, plain[name]) for name, g in found.items())


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_a_product_adds_to_sums_without_rounding_its_own(dtype: torch.dtype) -> None:
    x, dy = torch.randn(2, 50, 8).to(dtype), torch.randn(2, 50, 6).to(dtype)
    weight, sums = torch.randn(6, 8).to(dtype).requires_grad_(), torch.ones(6, 8)
    x.requires_grad_()
    linear(x, weight, Buffer(sums)).backward(dy)
    assert weight.grad is None
    assert torch.allclose(sums, 1 + torch.einsum("bto,bti->oi", dy.float(), x.detach().float()), rtol=0, atol=1e-4)
    assert torch.equal(x.grad, dy @ weight)
    assert torch.equal(linear(x, weight, Buffer(sums)), linear(x, weight))


def test_nothing_is_kept_of_a_finished_run() -> None:
    """Weights and sums go when the model and what collects its gradients go."""
    config = config_for((*SETTINGS,))
    model = model_of(config, torch.float32)
    gradients = Collected(model)
    two_steps(model, gradients, config)
    held = [weakref.ref(t) for t in (model, gradients, *model.parameters())]
    del model, gradients
    gc.collect()
    assert [r() for r in held if r() is not None] == []
