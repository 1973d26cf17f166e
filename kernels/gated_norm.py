"""Mamba-2's output norm, gate first: u = y * silu(z); each of G groups of channels is RMS-normalised by itself.

    out = u * rstd * weight,     rstd = 1 / sqrt(mean(u^2 over the group) + eps),     u = y * silu(z)

Source: RMSNorm, arXiv:1910.07467; the gated, grouped form is Mamba-2's, arXiv:2405.21060, section 7.

Memory: the backward keeps y and z (z usually is a slice of the input projection's output, which is kept anyway) and
computes gate and rstd again.  Traffic in elements: 3 T d forward and 5 T d backward, limited by bandwidth.

The kernels see a matrix of T * G rows, one per (token, group), of d / G channels each.
"""

from __future__ import annotations  # so that tl.constexpr is not looked up where there is no triton

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels._bandwidth import Launch, as_rows, jit, sigmoid, stages_of, sum_partials, tile_of, tl, walk
from kernels._common import accumulate_dtype, triton, use_triton

MAX_GROUP = 4096  # channels; a group twice as wide makes the backward spill
FORWARD = Launch(tile=4096, warps=8)  # Nano: the 8 groups of 512 of one token
BACKWARD = Launch(tile=2048, warps=8, programs_per_sm=2, stages=3)  # twice the tile: one program fits on an SM, not two


def gated_rms_norm_reference(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    acc = accumulate_dtype(y)
    u = y.to(acc) * F.silu(z.to(acc))
    u = u.unflatten(-1, (groups, -1))  # (..., G, d / G)
    u = u * (u.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (u.flatten(-2) * weight.to(acc)).to(y.dtype)


# In both kernels a program takes every num_programs-th tile of ROWS (token, group) rows, `steps` of them.  As
# num_programs * ROWS is a multiple of G, a row of the tile sees one group all the way: its weights stay in registers.
@jit(do_not_specialize=["T"])  # steps = 1 is compiled by itself, without the loop
def _fwd_kernel(
    y_ptr, z_ptr, weight_ptr, out_ptr, T, steps, y_stride, z_stride: tl.constexpr, eps,
    G: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y, z (T, d) with token strides; out (T, d) contiguous; weight (d,)."""
    first = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    cols = tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    channel = first % G * GROUP + cols  # [ROWS, BLOCK]
    first_token = (first // G).to(tl.int64)
    weight = tl.load(weight_ptr + channel, mask=cols < GROUP, other=0.0, eviction_policy="evict_last").to(tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        token = first_token + step * (tl.num_programs(0) * ROWS // G)  # [ROWS, 1]
        mask = (token < T) & (cols < GROUP)
        y = tl.load(y_ptr + token * y_stride + channel, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
        z = tl.load(z_ptr + token * z_stride + channel, mask=mask, other=0.0).to(tl.float32)
        u = y * (z * sigmoid(z))
        rstd = tl.rsqrt(tl.sum(u * u, axis=1, keep_dims=True) * (1.0 / GROUP) + eps)  # [ROWS, 1]
        tl.store(out_ptr + token * (G * GROUP) + channel, u * rstd * weight, mask=mask)


def _tiles(y: Tensor, groups: int, launch: Launch) -> tuple[int, int, int, int, int]:
    """Rows, columns and warps of a tile; programs and their steps."""
    rows, block, warps = tile_of(y.shape[1] // groups, launch)
    programs, _ = walk(triton.cdiv(y.shape[0] * groups, rows), launch, y)
    whole = groups // math.gcd(groups, rows)  # programs whose tiles together hold every group equally often
    programs = triton.cdiv(programs, whole) * whole
    return rows, block, warps, programs, triton.cdiv(y.shape[0] * groups, programs * rows)


def forward(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """The kernel, outside autograd.  y, z: (T, d), last dimension contiguous."""
    T, d = y.shape
    out = torch.empty(T, d, dtype=y.dtype, device=y.device)
    rows, block, warps, programs, steps = _tiles(y, groups, FORWARD)
    _fwd_kernel[(programs,)](
        y, z, weight, out, T, steps, y.stride(0), z.stride(0), eps,
        G=groups, GROUP=d // groups, ROWS=rows, BLOCK=block, STAGES=stages_of(FORWARD, 2 * rows * block, y),
        num_warps=warps,
    )  # fmt: skip
    return out


# With n = u * rstd and m = mean(weight * dout * n):   du = rstd * (weight * dout - n * m),   dweight = sum_t dout * n;
# s = sigmoid(z):   dy = du * z * s,   dz = du * y * s * (1 + z * (1 - s)).
@jit(do_not_specialize=["T", "steps"])
def _bwd_kernel(
    y_ptr, z_ptr, weight_ptr, dout_ptr, dy_ptr, dz_ptr, dweight_ptr,
    T, steps, y_stride, z_stride: tl.constexpr, dout_stride, dz_stride: tl.constexpr, eps,
    G: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y, z, dout, dz (T, d) with token strides; dy (T, d) contiguous; weight (d,).

    dweight (num_programs * ROWS, GROUP) fp32: a sum for each row of each program's tile, that of group (row % G).
    """
    first = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    cols = tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    channel = first % G * GROUP + cols  # [ROWS, BLOCK]
    first_token = (first // G).to(tl.int64)
    weight = tl.load(weight_ptr + channel, mask=cols < GROUP, other=0.0).to(tl.float32)
    dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        token = first_token + step * (tl.num_programs(0) * ROWS // G)  # [ROWS, 1]
        mask = (token < T) & (cols < GROUP)
        y = tl.load(y_ptr + token * y_stride + channel, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
        z = tl.load(z_ptr + token * z_stride + channel, mask=mask, other=0.0).to(tl.float32)
        dout = tl.load(dout_ptr + token * dout_stride + channel, mask=mask, other=0.0).to(tl.float32)
        s = sigmoid(z)
        silu = z * s
        u = y * silu
        wdout = weight * dout
        rstd = tl.rsqrt(tl.sum(u * u, axis=1, keep_dims=True) * (1.0 / GROUP) + eps)  # [ROWS, 1]
        m = tl.sum(wdout * u, axis=1, keep_dims=True) * rstd * (1.0 / GROUP)
        rstd = tl.where(token < T, rstd, 0.0)  # tokens past the end: eps = 0 would make 0 * inf
        n = u * rstd
        dweight += dout * n
        du = (wdout - n * m) * rstd
        tl.store(dy_ptr + token * (G * GROUP) + channel, du * silu, mask=mask)
        tl.store(dz_ptr + token * dz_stride + channel, du * y * (s + silu * (1.0 - s)), mask=mask)
    tl.store(dweight_ptr + first.to(tl.int64) * GROUP + cols, dweight, mask=cols < GROUP)


def backward(
    y: Tensor, z: Tensor, weight: Tensor, dout: Tensor, groups: int, eps: float, dz: Tensor, trained: bool
) -> tuple[Tensor, Tensor | None]:
    """y, z, dout, dz: (T, d), last dimension contiguous.  Writes dz; returns dy and, if the weight is trained, dweight,
    like y and weight."""
    T, d = y.shape
    dy = torch.empty(T, d, dtype=y.dtype, device=y.device)
    rows, block, warps, programs, steps = _tiles(y, groups, BACKWARD)
    partial = torch.empty(programs * rows, d // groups, dtype=torch.float32, device=y.device)
    _bwd_kernel[(programs,)](
        y, z, weight, dout, dy, dz, partial, T, steps, y.stride(0), z.stride(0), dout.stride(0), dz.stride(0), eps,
        G=groups, GROUP=d // groups, ROWS=rows, BLOCK=block, STAGES=stages_of(BACKWARD, 3 * rows * block, y),
        num_warps=warps,
    )  # fmt: skip
    return dy, sum_partials(partial.view(-1, d), weight.dtype) if trained else None


class _GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
        rows_y, rows_z = as_rows(y), as_rows(z)
        ctx.save_for_backward(rows_y, rows_z, weight)
        ctx.groups, ctx.eps = groups, eps
        return forward(rows_y, rows_z, weight, groups, eps).view(y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:
        y, z, weight = ctx.saved_tensors
        dz = torch.empty(z.shape, dtype=z.dtype, device=z.device)
        dy, dweight = backward(y, z, weight, as_rows(dout), ctx.groups, ctx.eps, dz, ctx.needs_input_grad[2])
        return dy.view(dout.shape), dz.view(dout.shape), dweight, None, None


def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float, backend: str = "auto") -> Tensor:
    """y, z: (..., d); weight: (d,); returns (..., d) in y's dtype.  Gate, sums and weight in fp32, one rounding.

    Any strides: tokens may lie apart (a slice of a wider tensor) without a copy.  Any group width; beyond MAX_GROUP it
    runs in PyTorch.  Differentiable in y, z and weight.  Raises ValueError if d is not a multiple of `groups` or shapes
    differ.
    """
    if y.shape[-1] % groups:
        raise ValueError(f"gated_rms_norm: width {y.shape[-1]} is not a multiple of groups={groups}")
    if z.shape != y.shape or weight.shape != y.shape[-1:]:
        raise ValueError(
            f"gated_rms_norm: y {tuple(y.shape)}, z {tuple(z.shape)} and weight {tuple(weight.shape)} do not fit; "
            "give (..., d), (..., d), (d,)"
        )
    if not use_triton(y, backend) or y.shape[-1] // groups > MAX_GROUP or y.numel() == 0:
        return gated_rms_norm_reference(y, z, weight, groups, eps)
    return _GatedRMSNorm.apply(y, z, weight.contiguous(), groups, eps)
