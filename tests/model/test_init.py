"""Initial values: moments and ranges of every tensor, independence of layout, no number drawn twice."""

import math

import pytest
import torch
import torch.nn.functional as F

from nano3.config import ModelConfig
from nano3.model.init import FP32, draw, initialise, named_tensors
from nano3.presets import PRESETS
from tests.oracles import our_model

C = ModelConfig(
    hybrid_override_pattern="MEM*-E",
    vocab_size=512,
    hidden_size=192,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=32,
    mamba_num_heads=64,
    mamba_head_dim=8,
    n_groups=4,
    ssm_state_size=32,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=96,
    moe_shared_expert_intermediate_size=192,
    intermediate_size=96,
    init_method_std=0.0173,
)


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return {n: t.detach() for n, t in named_tensors(initialise(our_model(C), C, seed=7)).items()}


def test_moments_and_ranges_of_every_tensor(tensors: dict[str, torch.Tensor]) -> None:
    checked = set()

    def named(*suffixes: str):
        for name, t in tensors.items():
            if name.endswith(suffixes) and name not in checked:
                checked.add(name)
                yield name, t

    def normal(t: torch.Tensor, std: float) -> None:
        n = t.numel()  # five standard errors of the mean, of the deviation, and of the fourth moment
        assert abs(t.mean().item()) <= 5 * std / math.sqrt(n)
        assert t.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * n))
        assert (t / std).pow(4).mean().item() == pytest.approx(3, abs=5 * math.sqrt(96 / n))

    for _, t in named("out_proj.weight", "o_proj.weight", "down_proj.weight", "down_proj"):
        normal(t, 0.0173 / math.sqrt(6))  # six layers write into the residual stream
    for name, t in named("conv1d.weight", "conv1d.bias"):
        assert t.abs().max() <= 0.5
        assert t.abs().max() > 0.49, name  # U(-1/sqrt(4), 1/sqrt(4))
        assert t.std().item() == pytest.approx(0.5 / math.sqrt(3), rel=0.15)
    for _, t in named("A_log"):
        A = t.exp()
        assert A.min() >= 1
        assert A.max() <= 16.0001
        assert A.mean().item() == pytest.approx(8.5, abs=5 * 15 / math.sqrt(12 * 64))
    for _, t in named("dt_bias"):
        step = F.softplus(t)
        assert step.min() >= 0.99e-3
        assert step.max() <= 0.1001
        middle = (math.log(1e-3) + math.log(0.1)) / 2
        assert step.log().mean().item() == pytest.approx(middle, abs=5 * math.log(100) / math.sqrt(12 * 64))
    for _, t in named(".D", "norm.weight", "norm_f.weight"):
        assert (t == 1).all()
    for _, t in named("e_score_correction_bias"):
        assert (t == 0).all()
    for _, t in named(""):  # embedding, head, router and every other matrix
        assert t.ndim >= 2
        normal(t, 0.0173)
    assert checked == set(tensors)


def test_no_two_tensors_draw_the_same_numbers(tensors: dict[str, torch.Tensor]) -> None:
    drawn = []
    for name, t in tensors.items():
        if t.min() != t.max():
            drawn += [(f"{name}[{e}]", x) for e, x in enumerate(t)] if ".experts." in name else [(name, t)]
    starts = {name: tuple((t.flatten()[:8] / t.flatten()[0]).tolist()) for name, t in drawn}  # scales do not hide it
    assert len(set(starts.values())) == len(starts)
    flat = torch.cat([t.flatten() for name, t in drawn if "A_log" not in name and "dt_bias" not in name])
    # 32-bit floats of 24 random bits collide by chance; 8 equal in a row do not
    runs = flat.unfold(0, 8, 8)
    assert len(torch.unique(runs, dim=0)) == len(runs)


def test_same_seed_same_model_whatever_is_around_it(tensors: dict[str, torch.Tensor]) -> None:
    again = named_tensors(initialise(our_model(C), C, seed=7))
    assert all(torch.equal(again[n], t) for n, t in tensors.items())
    other = named_tensors(initialise(our_model(C), C, seed=8))
    assert not torch.equal(other["embeddings.weight"], tensors["embeddings.weight"])
    # a rank that holds one expert draws that expert alone
    name = "layers.1.mixer.experts.up_proj"
    torch.rand(5)
    alone = draw(name, tensors[name].shape[1:], C, 7, expert=3)
    assert torch.equal(alone, tensors[name][3])
    # another layer more changes no tensor but the scale of the output layers
    longer = ModelConfig(**{**vars(C), "hybrid_override_pattern": "MEM*-EM"})
    for n, t in named_tensors(initialise(our_model(longer), longer, seed=7)).items():
        if n in tensors and not n.endswith(("out_proj.weight", "o_proj.weight", "down_proj.weight", "down_proj")):
            assert torch.equal(t, tensors[n]), n


def test_bf16_keeps_the_sensitive_tensors_in_fp32(tensors: dict[str, torch.Tensor]) -> None:
    model = initialise(our_model(C, torch.bfloat16), C, seed=7)
    for name, t in named_tensors(model).items():
        sensitive = name.rsplit(".", 1)[-1] in FP32
        assert t.dtype == (torch.float32 if sensitive else torch.bfloat16), name
        assert torch.equal(t.detach(), tensors[name].to(t.dtype))


def test_published_standard_deviations_follow_the_rule() -> None:
    for preset in PRESETS.values():
        if std := preset["model"].get("init_method_std"):
            c = ModelConfig(hidden_size=preset["model"].get("hidden_size", 2688))
            assert c.init_std == pytest.approx(std, rel=0.02)
