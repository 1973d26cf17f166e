"""What stands between the two projections of a Mamba-2 mixer, as one node of the autograd graph:

    z | xBC | dt = projected         x | B | C = causal_conv1d(xBC)
    out = gated_rms_norm(ssd(x, dt, -exp(A_log), B, C, D, dt_bias), z)

These are three operators with a file each, and called one after the other (`nano3.model.mamba` does, wherever this does
not fit) they give the same bits: the kernels are the same.  But between separate nodes autograd copies: dx, dB and dC
into the one tensor that the convolution's backward reads, and dz, dxBC and ddt into the one that is the gradient of
`projected`.  That moves 66 kB a token in bf16, more than the SSD's forward.  Here the kernels are given the columns of
these two tensors to write to.

Memory: the backward keeps `projected`, the convolution's output and y, as the three operators together do; the second
of them only if asked to, for one more run of the convolution's forward kernel makes it again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import conv1d, gated_norm, ssd
from kernels._bandwidth import as_rows
from kernels._common import use_triton


class Sizes(NamedTuple):
    """Heads, their width, groups, the state's second dimension."""

    H: int
    P: int
    G: int
    N: int

    def columns(self, projected: Tensor) -> tuple[Tensor, ...]:
        """z, xBC and dt of (B, S, 2 H P + 2 G N + H), as views."""
        inner = self.H * self.P
        return projected.split([inner, inner + 2 * self.G * self.N, self.H], dim=-1)

    def heads(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, S, H, P), B and C (B, S, G, N), as views."""
        x, B, C = xBC.split([self.H * self.P, self.G * self.N, self.G * self.N], dim=-1)
        return x.unflatten(-1, (self.H, self.P)), B.unflatten(-1, (self.G, self.N)), C.unflatten(-1, (self.G, self.N))


def fits(projected: Tensor, sizes: Sizes, backends: tuple[str, ...]) -> bool:
    """Whether the convolution, the SSD and the norm (with these backends) would all run their kernels."""
    if not all(use_triton(projected, backend) for backend in backends) or projected.numel() == 0:
        return False
    group = sizes.H * sizes.P // sizes.G
    return ssd.state_fits(projected, sizes.P, sizes.N) and group <= gated_norm.MAX_GROUP


class _MambaMixer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, projected, conv_weight, conv_bias, A_log, D, dt_bias, norm_weight, sizes, dt_limit, eps, seq_idx, keep_conv
    ):  # fmt: skip
        z, before, dt = sizes.columns(projected)
        A = -A_log.exp()
        xBC = conv1d.forward(before, conv_weight, conv_bias, seq_idx)
        x, B, C = sizes.heads(xBC)
        y, _ = ssd.forward(x, dt, A, B, C, D, dt_bias, dt_limit, seq_idx)
        kept = xBC if keep_conv else None
        ctx.save_for_backward(projected, kept, y, conv_weight, conv_bias, A, D, dt_bias, norm_weight, seq_idx)
        ctx.sizes, ctx.dt_limit, ctx.eps = sizes, dt_limit, eps
        return gated_norm.forward(as_rows(y.flatten(2)), as_rows(z), norm_weight, sizes.G, eps).view(z.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        projected, xBC, y, conv_weight, conv_bias, A, D, dt_bias, norm_weight, seq_idx = ctx.saved_tensors
        sizes = ctx.sizes
        conv_trained, ssd_trained, norm_trained = (any(ctx.needs_input_grad[i:j]) for i, j in ((1, 3), (3, 6), (6, 7)))
        z, before, dt = sizes.columns(projected)
        if xBC is None:
            xBC = conv1d.forward(before, conv_weight, conv_bias, seq_idx)
        x, B, C = sizes.heads(xBC)
        # Every column of the two is written by one of the kernels.
        dprojected = torch.empty(projected.shape, dtype=projected.dtype, device=projected.device)
        dxBC = torch.empty(xBC.shape, dtype=xBC.dtype, device=xBC.device)
        dz, dbefore, ddt = sizes.columns(dprojected)
        dx, dB, dC = sizes.heads(dxBC)
        dy, dnorm = gated_norm.backward(
            as_rows(y.flatten(2)), as_rows(z), norm_weight, as_rows(dout), sizes.G, ctx.eps, as_rows(dz), norm_trained
        )
        dA, dD, ddt_bias, _ = ssd.backward(
            x, dt, A, B, C, D, dt_bias, ctx.dt_limit, seq_idx, None, dy.view(y.shape), None, (dx, ddt, dB, dC),
            ssd_trained,
        )  # fmt: skip
        dconv, dconv_bias, _ = conv1d.backward(
            before, conv_weight, conv_bias, seq_idx, None, dxBC, dbefore, conv_trained
        )
        dA_log = None if dA is None else dA * A  # A is -exp(A_log), and so is its derivative
        return dprojected, dconv, dconv_bias, dA_log, dD, ddt_bias, dnorm, None, None, None, None, None


def mamba_mixer(
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A_log: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    sizes: Sizes,
    dt_limit: tuple[float, float],
    eps: float,
    seq_idx: Tensor | None = None,
    keep_conv: bool = True,
) -> Tensor:
    """projected: (B, S, 2 H P + 2 G N + H), columns z | x | B | C | dt; conv_weight: (H P + 2 G N, W), W from 2 to 4;
    conv_bias: of as many channels, or None; A_log, D, dt_bias: (H,); norm_weight: (H P,); seq_idx: (B, S), the document
    of each token, or None.  Returns (B, S, H P) in projected's dtype; differentiable in every tensor but seq_idx.
    keep_conv=False: the backward makes the convolution's output again, the same bits, and H P + 2 G N numbers a token
    less are kept.

    It has no form in PyTorch of its own: call it where `fits`, and the three operators elsewhere, or where there is an
    initial state or the final one is wanted.  Raises ValueError on shapes that do not fit.
    """
    inner, channels = sizes.H * sizes.P, sizes.H * sizes.P + 2 * sizes.G * sizes.N
    wide = projected.ndim == 3 and projected.shape[-1] == inner + channels + sizes.H
    if not wide or conv_weight.ndim != 2 or not 2 <= conv_weight.shape[1] <= 4:
        raise ValueError(
            f"mamba_mixer: projected {tuple(projected.shape)} and conv_weight {tuple(conv_weight.shape)} do not fit; "
            f"{sizes} need (B, S, {inner + channels + sizes.H}) and ({channels}, 2..4)"
        )
    expected = {
        "conv_weight": (conv_weight, (channels, conv_weight.shape[1])), "conv_bias": (conv_bias, (channels,)),
        "A_log": (A_log, (sizes.H,)), "D": (D, (sizes.H,)), "dt_bias": (dt_bias, (sizes.H,)),
        "norm_weight": (norm_weight, (inner,)), "seq_idx": (seq_idx, tuple(projected.shape[:2])),
    }  # fmt: skip
    for name, (t, shape) in expected.items():
        if t is not None and t.shape != shape:
            raise ValueError(
                f"mamba_mixer: {name} is {tuple(t.shape)}; projected {tuple(projected.shape)} and {sizes} need {shape}"
            )
    seq_idx = None if seq_idx is None else seq_idx.contiguous()
    conv_weight, conv_bias = conv_weight.contiguous(), None if conv_bias is None else conv_bias.contiguous()
    heads = [t.contiguous() for t in (A_log, D, dt_bias)]
    parameters = (conv_weight, conv_bias, *heads, norm_weight.contiguous())
    return _MambaMixer.apply(projected.contiguous(), *parameters, sizes, dt_limit, eps, seq_idx, keep_conv)
