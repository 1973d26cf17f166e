"""Adapters: gradients against the explicit W + s B A, the base to the bit at step 0, no product for frozen weights."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.adapted_experts import adapted_experts, adapted_experts_reference
from nano3.config import PeftConfig, UserError
from nano3.model.init import allocate, initialise
from nano3.model.lora import adaptable, sites_of
from nano3.model.model import Nano3
from nano3.parallel.mesh import ALONE
from nano3.train.checkpoint import build
from tests.oracles import GOLDEN, relative

CPU = torch.device("cpu")
MODEL = replace(GOLDEN, hybrid_override_pattern="ME*-M", intermediate_size=48)
LORA = PeftConfig(scheme="lora", rank=4, alpha=6.0)


def model_of(peft: PeftConfig, dtype: torch.dtype = torch.float64, recompute: frozenset[str] = frozenset()) -> Nano3:
    model = allocate(build(MODEL, recompute, ALONE, None, peft), CPU, dtype)
    return initialise(model, MODEL, seed=3)


def wake(model: Nano3) -> None:
    """B other than zero."""
    for name, p in model.named_parameters():
        if name.endswith(".B"):
            torch.nn.init.normal_(p, std=0.2)


def merged(model: Nano3, base: Nano3) -> dict[str, Tensor]:
    """The base's tensors with W + s B A in the place of each adapted W, as functions of A and B."""
    tensors = {n: t.detach() for n, t in [*base.named_parameters(), *base.named_buffers()]}
    for site in sites_of(MODEL, model.peft):
        A, B = (model.get_parameter(f"{site.adapter}.{x}") for x in "AB")
        tensors[site.weight] = tensors[site.weight] + model.peft.scale * (B @ A)
    return tensors


@pytest.mark.parametrize(
    "peft",
    [LORA, replace(LORA, experts="shared"), replace(LORA, rslora=True, experts="none")],
    ids=["per-expert", "shared", "rslora"],
)
@pytest.mark.parametrize("recompute", [frozenset(), frozenset(["moe", "mamba"])], ids=["kept", "recomputed"])
def test_gradients_equal_those_of_the_explicit_sum(peft: PeftConfig, recompute: frozenset[str]) -> None:
    model, base = model_of(peft, recompute=recompute).train(), model_of(PeftConfig()).train()
    wake(model)
    tokens = torch.randint(0, MODEL.vocab_size, (2, 23))
    weight = torch.randn(2, 23, MODEL.hidden_size, dtype=torch.float64)
    mine = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {n.rsplit(".", 1)[0] for n in mine} == {site.adapter for site in sites_of(MODEL, peft)}

    def gradients(out) -> list[Tensor]:
        loss = (out.hidden * weight).sum() + sum(b.aux_B.sum() for b in out.balance)
        return [out.hidden, *torch.autograd.grad(loss, list(mine.values()))]

    ours = gradients(model(tokens))
    truth = gradients(functional_call(base, merged(model, base), (tokens,)))
    for name, got, expected in zip(["hidden", *mine], ours, truth, strict=True):
        assert relative(got, expected) < 1e-10, name


def test_every_target_of_the_default_has_an_adapter() -> None:
    """All that can be adapted, out_proj and routed experts included; per-expert tensors have an expert axis."""
    assert [site.module for site in sites_of(MODEL, LORA)] == adaptable(MODEL)
    model = model_of(LORA)
    assert model.get_parameter("layers.1.mixer.experts.lora.down_proj.A").shape == (8, 4, MODEL.moe_intermediate_size)
    assert model.get_parameter("layers.0.mixer.out_proj.lora.B").requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("experts", ["per-expert", "shared"])
def test_at_the_start_it_is_the_base_to_the_bit(dtype: torch.dtype, experts: str) -> None:
    model, base = (model_of(p, dtype).eval() for p in (replace(LORA, experts=experts), PeftConfig()))
    tokens = torch.randint(0, MODEL.vocab_size, (2, 37))
    ours, theirs = (m.logits(m(tokens).hidden) for m in (model, base))
    assert torch.equal(ours, theirs)
    wake(model)
    assert not torch.equal(model.logits(model(tokens).hidden), theirs)


class Shapes(TorchDispatchMode):
    """Notes the shape of everything that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "mm" in str(func) or "bmm" in str(func) or "convolution" in str(func):
            self.seen |= {tuple(t.shape) for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, Tensor)}
        return out


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_no_gradient_of_a_frozen_matrix_is_computed(frozen: bool) -> None:
    """In the backward pass no product has the shape of a weight; where weights are trained, each has one."""
    model = model_of(LORA if frozen else PeftConfig(), torch.float32).train()
    out = model(torch.randint(0, MODEL.vocab_size, (1, 29)))
    with Shapes() as shapes:
        (out.hidden.sum() + sum(b.aux_B.sum() for b in out.balance)).backward()
    weights = {s.weight: tuple(model.get_parameter(s.weight).shape[-2:]) for s in sites_of(MODEL, LORA)}
    found = {n for n, shape in weights.items() if shape in shapes.seen or shape[::-1] in shapes.seen}
    assert found == (set() if frozen else set(weights))
    for name, p in model.named_parameters():
        if frozen and ".lora." not in name:
            assert not p.requires_grad, name
            assert p.grad is None, name


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        (["linear_qkv"], ["layers.2.mixer.q_proj", "layers.2.mixer.k_proj", "layers.2.mixer.v_proj"]),
        (["*.layers.4.*.out_proj"], ["layers.4.mixer.out_proj"]),
        (["backbone.layers.0.mixer.in_proj"], ["layers.0.mixer.in_proj"]),
        (["experts.up_proj"], ["layers.1.mixer.experts.up_proj"]),
        (["shared_experts.linear_fc2"], ["layers.1.mixer.shared_experts.down_proj"]),
        (["*.layers.1.*.linear_fc*", "o_proj"], None),
    ],
)
def test_targets_by_anyones_names(asked: list[str], found: list[str] | None) -> None:
    sites = [s.module for s in sites_of(MODEL, replace(LORA, target_modules=asked))]
    fc = [m for m in adaptable(MODEL) if m.startswith("layers.1.")]
    assert sites == (found or [*fc, "layers.2.mixer.o_proj"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ["in_proj", "gate_proj"]}, r"'gate_proj' matches nothing; there are in_proj, out_proj.*"),
        ({"exclude_modules": ["layers.9.*"]}, r"exclude_modules: 'layers.9.\*' matches nothing"),
        ({"target_modules": ["experts.up_proj"], "experts": "none"}, r"peft.experts=none leaves routed experts out"),
        ({"exclude_modules": ["*"]}, r"leave nothing to adapt"),
        ({"target_modules": ["conv1d"]}, r"'conv1d' matches nothing.*in full for example layers.0.mixer.in_proj"),
    ],
)
def test_a_target_that_matches_nothing_is_refused_with_what_there_is(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        sites_of(MODEL, replace(LORA, **changes))


def test_the_default_targets_suit_a_model_without_some_kinds() -> None:
    c = replace(MODEL, hybrid_override_pattern="M-M")
    assert len(sites_of(c, LORA)) == 6


@pytest.mark.parametrize("shared", [False, True], ids=["per-expert", "shared"])
def test_adapted_experts_equal_the_formula(shared: bool) -> None:
    """Values and all gradients in float64, with an expert that gets no token, and choices that are computed elsewhere
    in a second call; and without any row, zeros."""
    E, T, K, D, H, r = 5, 17, 2, 12, 20, 3
    g = torch.Generator().manual_seed(1)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()

    x, weights, up, down = rand(T, D), rand(T, K), rand(E, H, D), rand(E, D, H)
    lead = () if shared else (E,)
    loras = [(rand(*lead, r, D), rand(*lead, H, r)), (rand(*lead, r, H), rand(*lead, D, r))]
    leaves = [x, weights, up, down, *loras[0], *loras[1]]
    chosen = torch.rand(T, E - 1, generator=g).topk(K).indices  # the last expert gets nothing
    dy = torch.randn(T, D, generator=g, dtype=torch.float64)

    def check(ids: Tensor, weight: Tensor) -> None:
        here = ids < E
        counts = torch.bincount(ids[here], minlength=E)
        got = adapted_experts(x, weight, ids, counts, up, down, *loras, 0.7, rows=int(here.sum()))
        kept = weight.where(here, 0)
        want = adapted_experts_reference(x, kept, ids.where(here, 0), up, down, *loras, 0.7)
        for a, b in zip(torch.autograd.grad(got, leaves, dy), torch.autograd.grad(want, leaves, dy), strict=True):
            assert relative(a, b) < 1e-12
        assert relative(got, want) < 1e-12

    check(chosen, weights)
    check(chosen.where(torch.rand(T, K, generator=g) < 0.6, E), weights)
    ids, counts = torch.full((T, K), E), torch.zeros(E, dtype=torch.int64)
    none = adapted_experts(x, weights, ids, counts, up, down, *loras, 0.7, rows=0)
    assert none.abs().max() == 0
    assert all(g.abs().max() == 0 for g in torch.autograd.grad(none, leaves, dy))


def test_adapters_that_do_not_fit_are_refused() -> None:
    x, w, ids, counts = torch.zeros(3, 4), torch.zeros(3, 1), torch.zeros(3, 1, dtype=torch.int64), torch.tensor([3, 0])
    up, down = torch.zeros(2, 6, 4), torch.zeros(2, 4, 6)
    with pytest.raises(ValueError, match="do not fit the weight"):
        adapted_experts(x, w, ids, counts, up, down, (torch.zeros(2, 3, 4), torch.zeros(2, 4, 3)), None, 1.0)
