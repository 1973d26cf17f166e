"""The model against transformers' NemotronH, over random geometries: logits, every gradient, decoding, generation."""

import random

import pytest
import torch

from nano3.config import ModelConfig
from nano3.model.cache import create_cache
from nano3.model.generate import generate
from tests.oracles import CPU, copy_from_hf, fill_by_hash, hf_model, hf_name, our_model, relative

# fp32 against fp32: each side is within about 1e-6 of float64 at these sizes, gradients of long sums a little more.
BOUND = 2e-5
GEOMETRIES = 20


def geometry(seed: int) -> tuple[ModelConfig, int]:
    """A random model with every letter it can have, and a sequence length from 1 to 3 chunks, rarely a multiple."""
    r = random.Random(seed)
    chunk = r.choice([8, 16, 32])
    groups = r.choice([1, 2, 8])
    n_group = r.choice([1, 1, 2, 4])
    E = r.choice([8, 12, 16])
    K = r.choice([1, 2, 3, 5]) if n_group == 1 else r.choice([1, 2, 3])
    letters = "".join(r.sample("M*E", 3)) + "".join(r.choices("ME*-", k=r.randint(0, 3)))
    kv = r.choice([1, 2, 4])
    config = ModelConfig(
        hybrid_override_pattern=letters,
        vocab_size=r.choice([96, 160]),
        hidden_size=r.choice([32, 48]),
        num_attention_heads=kv * r.choice([1, 2]),
        num_key_value_heads=kv,
        head_dim=r.choice([8, 16]),
        mamba_num_heads=groups * r.choice([2, 3]),
        mamba_head_dim=r.choice([8, 16]),
        n_groups=groups,
        ssm_state_size=r.choice([8, 16]),
        conv_kernel=r.choice([2, 4, 4]),
        use_conv_bias=r.choice([True, True, False]),
        chunk_size=chunk,
        n_routed_experts=E,
        num_experts_per_tok=K,
        moe_intermediate_size=r.choice([24, 40]),
        moe_shared_expert_intermediate_size=r.choice([32, 56]),
        n_group=n_group,
        topk_group=r.choice([1, 2]) if n_group > 2 else 1,
        norm_topk_prob=r.choice([True, False]),
        routed_scaling_factor=r.choice([1.0, 2.5]),
        intermediate_size=40,
    )
    return config, r.randint(1, 3 * chunk)


def test_geometries_cover_what_they_should() -> None:
    drawn = [geometry(seed) for seed in range(GEOMETRIES)]
    for field, values in {
        "n_groups": {1, 2, 8},
        "n_group": {1, 2, 4},
        "norm_topk_prob": {True, False},
        "num_key_value_heads": {1, 2, 4},
        "conv_kernel": {2, 4},
        "use_conv_bias": {True, False},
    }.items():
        assert {getattr(c, field) for c, _ in drawn} == values
    assert any("-" in c.hybrid_override_pattern for c, _ in drawn)
    assert any(c.chunk_size > S for c, S in drawn)
    assert any(2 * c.chunk_size < S and S % c.chunk_size for c, S in drawn)


@pytest.mark.parametrize("seed", range(GEOMETRIES))
def test_logits_gradients_decoding_and_generation(seed: int) -> None:
    c, S = geometry(seed)
    hf = hf_model(c)
    ours = fill_by_hash(our_model(c))
    with torch.no_grad():
        for name, tensor in hf.state_dict().items():
            mine = ours.state_dict()[name.removeprefix("model.")]
            tensor.copy_(mine)
    copy_from_hf(ours, hf)
    ids = torch.randint(c.vocab_size, (2, S), generator=torch.Generator().manual_seed(seed))
    ours.train()
    theirs = hf(ids, use_cache=False).logits
    mine = ours.logits(ours(ids).hidden)
    assert relative(mine, theirs) <= BOUND

    upstream = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(seed))
    theirs.backward(upstream)
    mine.backward(upstream)
    reference = dict(hf.named_parameters())
    largest = max(p.grad.norm() for p in reference.values() if p.grad is not None)
    for name, p in ours.named_parameters():
        truth = reference[hf_name(name)].grad
        # Some gradients are zero in exact arithmetic, and rounding on both sides: q and k where there is one token to
        # look at, the router where one renormalised weight is always 1.  They must stay rounding.
        if truth is None or truth.norm() < 1e-6 * largest:
            assert p.grad is None or p.grad.norm() <= 1e-6 * largest, name
        else:
            assert relative(p.grad, truth) <= BOUND, name

    ours.eval()
    with torch.inference_mode():
        full = ours.logits(ours(ids).hidden)
        for start in {S // 2, max(0, S - 3), 0}:
            cache = create_cache(c, 2, S, torch.float32, CPU)
            if start:
                ours(ids[:, :start], cache=cache)
            for t in range(start, S):
                assert relative(ours.logits(ours.step(ids[:, t], cache)), full[:, t]) <= 1e-5
    prompt = ids[:1]
    everything = torch.ones_like(prompt)  # or it takes id 0 for padding
    generated = hf.generate(
        prompt, attention_mask=everything, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    assert list(generate(ours, prompt[0].tolist(), 8)) == generated[0, S:].tolist()
