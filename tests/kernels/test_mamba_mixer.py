"""The mixer's middle as one node gives the bits of the three operators one after the other, and keeps no more."""

import pytest
import torch
from torch import Tensor

from nano3.config import KernelsConfig, ModelConfig
from nano3.model import mamba
from nano3.model.cache import Rows

SMALL = {
    "hidden_size": 24,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "ssm_state_size": 16,
}


def made(device: str, dtype: torch.dtype, **settings) -> mamba.Mamba:
    mixer = mamba.Mamba(ModelConfig(**settings)).to(device)
    for name, p in mixer.named_parameters():
        torch.nn.init.normal_(p, std=0.3)
        p.data += name == "norm.weight"
        p.data = p.data.to(torch.float32 if p.ndim == 1 and p.shape[0] == mixer.H else dtype)  # A_log, D, dt_bias
    return mixer


def run(mixer: mamba.Mamba, u: Tensor, seq_idx: Tensor | None) -> tuple[dict[str, Tensor], int]:
    """The output and every gradient by name; and the bytes kept for the backward, parameters not counted."""
    own = {p.untyped_storage().data_ptr() for p in mixer.parameters()}
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    u = u.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = mixer(u, Rows(seq_idx), None, True)
    named = dict(mixer.named_parameters())
    grads = torch.autograd.grad(out, [u, *named.values()], torch.randn_like(out, dtype=torch.float32).to(out.dtype))
    return {"out": out.detach(), "u": grads[0]} | dict(zip(named, grads[1:], strict=True)), sum(kept.values())


def compare(mixer: mamba.Mamba, u: Tensor, seq_idx: Tensor | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def same_draw() -> tuple[dict[str, Tensor], int]:
        torch.manual_seed(1)
        return run(mixer, u, seq_idx)

    fused, kept = same_draw()
    mixer.keep_conv = False
    again, kept_less = same_draw()
    monkeypatch.setattr(mamba, "fits", lambda *_: False)
    composed, kept_composed = same_draw()
    for name, t in composed.items():
        assert torch.isfinite(t).all(), name
        assert fused[name].dtype == t.dtype, name
        assert torch.equal(fused[name], t), name
        assert torch.equal(again[name], t), f"{name}, with the convolution computed again"
    assert kept <= kept_composed
    assert kept - kept_less == u[..., 0].numel() * mixer.conv_dim * u.element_size()


@pytest.mark.parametrize(
    ("Bt", "S", "packed", "settings"),
    [
        (2, 20, True, {}),
        (1, 35, False, {"use_conv_bias": False, "conv_kernel": 3, "time_step_limit": [0.5, 1.0]}),
    ],
    ids=["packed", "odd options"],
)
@pytest.mark.usefixtures("poisoned_empty")
def test_same_bits_as_three_operators(
    Bt: int, S: int, packed: bool, settings: dict, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    fused = mamba.mamba_mixer
    monkeypatch.setattr(mamba, "mamba_mixer", lambda *a: calls.append(1) or fused(*a))
    mixer = made(device, torch.float32, **SMALL, **settings)
    seq_idx = torch.tensor([0] * 5 + [1] * 12 + [2] * (S - 17), device=device).expand(Bt, S) if packed else None
    compare(mixer, torch.randn(Bt, S, 24, device=device), seq_idx, monkeypatch)
    assert len(calls) == 2, "the model did not take the one node where it fits, or took it where it does not"


def test_where_a_kernel_does_not_run_the_three_operators_do(device: str) -> None:
    u = torch.randn(1, 5, 24, device=device)
    by_torch = [KernelsConfig(**{name: "torch"}) for name in ("conv1d", "ssd", "gated_norm")]
    for settings in (*({"kernels": k} for k in by_torch), {"ssm_state_size": 300}):
        mixer = made(device, torch.float32, **(SMALL | settings))
        assert not mamba.fits(mixer.in_proj(u), mixer.sizes, mixer.backends), settings
    mixer = made(device, torch.float32, **SMALL)
    assert mamba.fits(mixer.in_proj(u), mixer.sizes, mixer.backends)
    assert not mamba.fits(mixer.in_proj(u).double(), mixer.sizes, mixer.backends)


def test_shapes_that_do_not_fit_are_refused(device: str) -> None:
    u = torch.randn(1, 5, 24, device=device)
    with pytest.raises(ValueError, match=r"mamba_mixer.*2\.\.4"):
        made(device, torch.float32, **SMALL, conv_kernel=5)(u, Rows(), None, True)


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
def test_same_bits_compiled(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nano's sizes, bf16."""
    mixer = made("cuda", torch.bfloat16, hidden_size=256)
    starts = torch.rand(2, 1500, device="cuda") < 0.003
    u = torch.randn(2, 1500, 256, device="cuda", dtype=torch.bfloat16)
    compare(mixer, u, starts.cumsum(1).int() if packed else None, monkeypatch)
