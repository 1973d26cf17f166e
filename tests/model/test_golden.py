"""Every row of the golden table (a tiny model, weights from an integer hash, transformers without its time-step floor).

Bounds: the table prints about 7 digits in fp32 and 11 in float64, so half a unit of its last place is what can be
asked.
"""

import pytest
import torch
import torch.nn.functional as F

from nano3.model.cache import create_cache
from nano3.model.generate import generate
from nano3.model.init import named_tensors
from nano3.model.model import Nano3
from nano3.model.moe import update_selection_bias
from tests.oracles import CPU, GOLDEN, fill_by_hash, golden_ids, our_model


@pytest.fixture(scope="module", params=[torch.float64, torch.float32], ids=["fp64", "fp32"])
def golden(request: pytest.FixtureRequest) -> Nano3:
    return fill_by_hash(our_model(GOLDEN, request.param)).train()


def loss_of(model: Nano3) -> torch.Tensor:
    ids = golden_ids()
    return F.cross_entropy(model.logits(model(ids).hidden)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def digits(model: Nano3, fp64: float, fp32: float) -> float:
    return fp64 if model.embeddings.weight.dtype == torch.float64 else fp32


def test_loss(golden: Nano3) -> None:
    assert loss_of(golden).item() == pytest.approx(5.3375639073, abs=digits(golden, 1e-9, 5e-7))


def test_logits(golden: Nano3) -> None:
    logits = golden.logits(golden(golden_ids()).hidden).detach()
    printed = 3e-6  # fp32 rounding of transformers' own numbers, which the table gives to 6 decimals
    assert logits[0, 0, :4].tolist() == pytest.approx([-0.815167, -0.924795, 0.519788, -1.139228], abs=printed)
    assert logits[1, 39, :4].tolist() == pytest.approx([-0.113709, -0.753096, -0.693141, 0.423903], abs=printed)
    exact = [0.57264687, 1.65486953, -1.01999669, 1.23713782]
    assert logits[0, 39, :4].tolist() == pytest.approx(exact, abs=digits(golden, 6e-9, printed))
    sums = [logits.sum().item(), logits.abs().sum().item(), logits.square().sum().item()]
    assert sums == pytest.approx([174.57472443, 9911.514436, 14964.735192], rel=digits(golden, 1e-10, 2e-6))
    expected = (
        "41 12 66 69 7 21 21 7 42 107 51 67 9 40 69 50 68 111 7 111 "
        "72 75 18 9 40 18 78 107 39 9 12 81 6 7 46 17 94 7 60 78"
    )
    assert logits[0].argmax(-1).tolist() == [int(t) for t in expected.split()]


def prefill(model: Nano3, tokens: int):
    dtype = model.embeddings.weight.dtype
    cache = create_cache(model.config, 2, 40, dtype, CPU)
    model.eval()
    with torch.inference_mode():
        model(golden_ids()[:, :tokens], cache=cache)
    return cache


def test_states_after_forty_tokens(golden: Nano3) -> None:
    cache = prefill(golden, 40)
    norms = [cache[i].state.norm().item() for i in (0, 2)]
    assert norms == pytest.approx([1.64103294, 2.10191841], abs=digits(golden, 6e-9, 2e-6))
    golden.train()


def test_states_after_thirty_seven_tokens_and_decoding(golden: Nano3) -> None:
    cache = prefill(golden, 37)
    assert [cache[i].window.norm().item() for i in (0, 2)] == pytest.approx([47.539099, 47.237455], abs=3e-5)
    assert [cache[i].state.norm().item() for i in (0, 2)] == pytest.approx([2.909058, 0.986000], abs=2e-6)
    with torch.inference_mode():
        full = golden.logits(golden(golden_ids()).hidden)
        decoded = torch.stack([golden.logits(golden.step(golden_ids()[:, t], cache)) for t in range(37, 40)], dim=1)
    assert (decoded - full[:, 37:]).abs().max().item() <= digits(golden, 1e-13, 5e-6)
    golden.train()


def test_greedy_continuation(golden: Nano3) -> None:
    golden.eval()
    ids = list(generate(golden, golden_ids()[0, :10].tolist(), 12))
    assert ids == [107, 106, 7, 78, 108, 68, 104, 61, 6, 21, 31, 126]
    golden.train()


def test_gradient_norms(golden: Nano3) -> None:
    golden.zero_grad(set_to_none=True)
    loss_of(golden).backward()
    norms = {n: p.grad.norm().item() for n, p in golden.named_parameters()}
    expected = {
        "embeddings.weight": 2.683069e-1,
        "layers.0.mixer.in_proj.weight": 1.691518,
        "layers.0.mixer.conv1d.weight": 5.370113e-1,
        "layers.0.mixer.conv1d.bias": 2.434682e-1,
        "layers.0.mixer.A_log": 8.229717e-3,
        "layers.0.mixer.D": 1.118549e-1,
        "layers.0.mixer.dt_bias": 1.119854e-2,
        "layers.0.mixer.norm.weight": 1.516063e-1,
        "layers.0.mixer.out_proj.weight": 1.069924,
        "layers.1.mixer.gate.weight": 1.140303e-1,
        "layers.1.mixer.experts.up_proj": 7.824483e-1,
        "layers.1.mixer.experts.down_proj": 6.733077e-1,
        "layers.1.mixer.shared_experts.up_proj.weight": 7.309490e-1,
        "layers.3.mixer.q_proj.weight": 1.196761e-1,
        "layers.3.mixer.k_proj.weight": 1.212136e-1,
        "layers.3.mixer.o_proj.weight": 1.729191e-1,
        "norm_f.weight": 2.049147e-1,
        "lm_head.weight": 9.128899e-1,
    }
    for name, norm in expected.items():
        assert norms[name] == pytest.approx(norm, rel=2e-6), name
    assert sum(v * v for v in norms.values()) ** 0.5 == pytest.approx(2.950867, rel=1e-6)


def test_routing_counts_bias_step_and_auxiliary_loss(golden: Nano3) -> None:
    balance = golden(golden_ids()).balance
    assert balance[0].counts_E.tolist() == [41, 30, 42, 32, 23, 29, 15, 28]
    assert balance[1].counts_E.tolist() == [14, 40, 22, 25, 13, 51, 50, 25]
    steps = []
    for b in balance:
        bias = torch.zeros(8)
        update_selection_bias(bias, b.counts_E, 1e-3)
        assert bias.abs().max().item() == pytest.approx(1e-3)
        steps.append(bias.sign().int().tolist())
    # 30 is the mean load of 240 choices over 8 experts: exactly at it, expert 1 of the first layer stays
    assert steps == [[-1, 0, -1, -1, 1, 1, 1, 1], [1, -1, 1, 1, 1, -1, -1, 1]]
    aux = [b.aux_B.mean().item() for b in balance]
    # the table's numbers come from router logits in fp32: float64 differs by 1.1e-8 from the second
    assert aux == pytest.approx([1.02376583, 1.08402244], abs=digits(golden, 2e-8, 5e-7))


def test_bias_free_counts(golden: Nano3) -> None:
    biases = [r.e_score_correction_bias.clone() for r in golden.routers.values()]
    seen = []
    for i, router in enumerate(golden.routers.values()):  # one layer at a time: a bias changes what the next layer sees
        router.e_score_correction_bias.zero_()
        seen.append(golden(golden_ids()).balance[i].counts_E.tolist())
        router.e_score_correction_bias.copy_(biases[i])
    assert seen == [[35, 31, 41, 29, 23, 29, 22, 30], [18, 37, 20, 30, 22, 43, 45, 25]]


def test_every_tensor_has_a_gradient(golden: Nano3) -> None:
    golden.zero_grad(set_to_none=True)
    loss_of(golden).backward()
    assert set(dict(golden.named_parameters())) == {n for n, p in golden.named_parameters() if p.grad.norm() > 0}
    assert len(named_tensors(golden)) == len(dict(golden.named_parameters())) + 2  # the two selection biases
