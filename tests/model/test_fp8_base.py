"""LoRA on a base in FP8: the model of the expanded weights, without ever keeping them."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from kernels import fp8
from kernels.adapted_experts import adapted_experts
from nano3.config import PeftConfig
from nano3.model.generate import generate
from nano3.model.init import named_tensors
from nano3.model.lora import adaptable, in_fp8, sites_of
from nano3.model.model import Nano3
from tests.kernels.conftest import DEVICE, needs_triton
from tests.kernels.test_grouped_gemm import choices
from tests.model.test_lora import LORA, MODEL, merged, model_of, wake
from tests.oracles import relative

FP8 = replace(LORA, base_dtype="fp8")


def expanded(model: Nano3, base: Nano3) -> Nano3:
    """`base` with the weights that the codes of `model` stand for."""
    tensors = named_tensors(base)
    for name, t in named_tensors(model).items():
        if t.dtype == fp8.CODE:
            tensors[name].data.copy_(fp8.dequantise_reference(t, t.scales, torch.float64))
    return base


def gradients(out, mine: dict[str, Tensor], weight: Tensor) -> list[Tensor]:
    loss = (out.hidden * weight).sum() + sum(b.aux_B.sum() for b in out.balance)
    return [out.hidden, *torch.autograd.grad(loss, list(mine.values()))]


@pytest.mark.parametrize(
    "peft",
    [
        FP8,
        replace(FP8, experts="shared"),
        replace(FP8, experts="none", exclude_modules=["q_proj", "linear_fc2"]),
        replace(FP8, target_modules=["experts.up_proj"]),
    ],
    ids=["per-expert", "shared", "none", "up"],
)
@pytest.mark.parametrize("recompute", [frozenset(), frozenset(["moe", "mamba"])], ids=["kept", "recomputed"])
def test_gradients_are_those_of_the_expanded_weights(peft: PeftConfig, recompute: frozenset[str]) -> None:
    """Of every adapter, and the result, to 1e-10 in float64; codes and scales do not move by a bit."""
    model, base = model_of(peft, recompute=recompute).train(), model_of(PeftConfig()).train()
    assert {n for n, t in model.named_parameters() if t.dtype == fp8.CODE} == {
        n for n in dict(base.named_parameters()) if n.removesuffix(".weight") in adaptable(MODEL)
    }
    expanded(model, base)
    wake(model)
    before = {n: t.clone() for n, t in named_tensors(model).items()}
    scales = {n: t.scales.clone() for n, t in model.named_parameters() if t.dtype == fp8.CODE}
    tokens = torch.randint(0, MODEL.vocab_size, (2, 23))
    weight = torch.randn(2, 23, MODEL.hidden_size, dtype=torch.float64)
    mine = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {n.rsplit(".", 1)[0] for n in mine} == {site.adapter for site in sites_of(MODEL, peft)}
    ours = gradients(model(tokens), mine, weight)
    truth = gradients(functional_call(base, merged(model, base), (tokens,)), mine, weight)
    for name, got, expected in zip(["hidden", *mine], ours, truth, strict=True):
        assert relative(got, expected) < 1e-10, name
    for name, t in named_tensors(model).items():
        same = t.view(torch.uint8), before[name].view(torch.uint8)
        assert torch.equal(*same), name
    assert all(torch.equal(model.get_parameter(n).scales, s) for n, s in scales.items())


@pytest.mark.parametrize("experts", ["per-expert", "none"])
def test_autograd_keeps_no_expanded_weight(experts: str) -> None:
    """Nothing that is saved has the shape of a weight in FP8, but the codes themselves."""
    model = model_of(replace(FP8, experts=experts), torch.float32).train()
    shapes = {tuple(t.shape) for t in model.parameters() if t.dtype == fp8.CODE}
    shapes |= {(*s[:-2], s[-1], s[-2]) for s in shapes} | {s[1:] for s in shapes if len(s) == 3}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        model(torch.randint(0, MODEL.vocab_size, (1, 29)))
    codes = [t for t in kept if t.dtype == fp8.CODE]
    assert len({t.data_ptr() for t in codes}) == len(adaptable(MODEL)) - 1  # the first of all has an x without gradient
    assert not [t.shape for t in kept if t.dtype != fp8.CODE and tuple(t.shape) in shapes]


@needs_triton
@pytest.mark.parametrize("adapted", [True, False], ids=["adapted", "bare"])
def test_the_kernels_expand_what_they_take(adapted: bool) -> None:
    """To the bit what they give on the expanded matrices, gradients too; and they keep codes only."""
    E, T, D, F, K, r = 4, 13, 40, 24, 2, 3
    g = torch.Generator().manual_seed(1)

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(DEVICE) / shape[-1] ** 0.5

    x, weights, dy, ids = make(T, D), make(T, K), make(T, D), choices(T, K, E, "all").to(DEVICE)
    (up, up_scales), (down, down_scales) = fp8.quantise(make(E, F, D)), fp8.quantise(make(E, D, F))
    adapters = [make(E, r, D), make(E, F, r), make(E, r, F), make(E, D, r)] if adapted else []
    leaves = [t.requires_grad_() for t in (x, weights, *adapters)]
    pairs = (adapters[:2], adapters[2:]) if adapted else (None, None)

    def run(up: Tensor, down: Tensor, **scales: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
            y = adapted_experts(x, weights, ids, None, up, down, *pairs, 0.7, "triton", **scales)
        return [y, *torch.autograd.grad(y, leaves, dy)], kept

    ours, kept = run(up, down, up_scales=up_scales, down_scales=down_scales)
    plain = (fp8.dequantise_reference(c, s, torch.float32) for c, s in ((up, up_scales), (down, down_scales)))
    for got, expected in zip(ours, run(*plain)[0], strict=True):
        assert torch.equal(got, expected)
    assert {t.dtype for t in kept if t.shape in ((E, F, D), (E, D, F))} == {fp8.CODE}


def test_the_logits_move_little() -> None:
    """What a base in FP8 costs before training, on random weights: 2 to 3 % a matrix; 7 % of the logits of the median
    token (more where an expert changes, which random routers do easily), and 0.007 nats of divergence on average."""
    model, base = model_of(FP8).eval(), model_of(PeftConfig()).eval()
    tokens = torch.randint(0, MODEL.vocab_size, (4, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = (m.logits(m(tokens).hidden) for m in (model, base))
    median = ((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).median()
    assert 0.01 < median < 0.1
    p, q = theirs.log_softmax(-1), ours.log_softmax(-1)
    assert (p.exp() * (p - q)).sum(-1).mean() < 0.02
    for name, t in base.named_parameters():
        if in_fp8(name, FP8):
            held = model.get_parameter(name)
            assert relative(fp8.dequantise_reference(held, held.scales, torch.float64), t) < 0.03, name


def test_one_token_at_a_time_reads_the_codes_too() -> None:
    model, base = model_of(FP8).eval(), model_of(PeftConfig()).eval()
    expanded(model, base)
    prompt = [3, 1, 4, 1, 5]
    assert list(generate(model, prompt, 6)) == list(generate(base, prompt, 6))
