"""One token of a causal depthwise convolution and SiLU, for decoding: the kept inputs move on by one.

    y[c] = silu(bias[c] + sum_j weight[c, j] * window[K - W + j, c])    j = 0 .. W-1; the last row is the token itself

Source and layout as in `conv1d.py`, which has whole sequences.  Bound by memory: window and weights are read once.
"""

from __future__ import annotations  # so that tl.constexpr is not looked up where there is no triton

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels._bandwidth import jit, sigmoid, tl
from kernels._common import accumulate_dtype, triton, use_triton
from kernels.conv1d import channel_last


def causal_conv1d_step_reference(
    x: Tensor, window: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    window = torch.cat([window[:, 1:], x.unsqueeze(1)], dim=1)
    W, acc = weight.shape[1], accumulate_dtype(x)
    y = (window[:, -W:].to(acc) * weight.T.to(acc)).sum(1)
    if bias is not None:
        y = y + bias.to(acc)
    return F.silu(y).to(x.dtype), window


@jit
def _step_kernel(
    x_ptr, window_ptr, weight_ptr, bias_ptr, y_ptr, new_ptr, C, x_batch, window_batch, window_row,
    K: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK channels of one sequence.  x (B, C), window (B, K, C) with strides; y, new contiguous."""
    blocks = tl.cdiv(C, BLOCK)
    cols = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    live = cols < C
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    rows = tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    x = tl.load(x_ptr + batch * x_batch + cols, mask=live, other=0.0)
    older = tl.load(
        window_ptr + batch * window_batch + (rows + 1).to(tl.int64) * window_row + cols[None, :],
        mask=live[None, :] & (rows < K - 1),
        other=0.0,
    )  # [ROWS, BLOCK]
    window = tl.where(rows == K - 1, x[None, :], older)
    tl.store(new_ptr + batch * K * C + rows * C + cols[None, :], window, mask=live[None, :] & (rows < K))
    tap = rows - (K - W)
    weight = tl.load(
        weight_ptr + cols[None, :] * W + tap, mask=live[None, :] & (tap >= 0) & (tap < W), other=0.0
    )  # [ROWS, BLOCK]
    a = tl.sum(window.to(tl.float32) * weight.to(tl.float32), axis=0)
    if BIAS:
        a += tl.load(bias_ptr + cols, mask=live, other=0.0).to(tl.float32)
    tl.store(y_ptr + batch * C + cols, a * sigmoid(a), mask=live)


def _step(x: Tensor, window: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    (B, K, C), W = window.shape, weight.shape[1]
    y = torch.empty(B, C, dtype=x.dtype, device=x.device)
    new = torch.empty(B, K, C, dtype=window.dtype, device=x.device)
    _step_kernel[(triton.cdiv(C, 256) * B,)](
        x, window, weight.contiguous(), bias, y, new, C, x.stride(0), window.stride(0), window.stride(1),
        K=K, W=W, ROWS=triton.next_power_of_2(K), BLOCK=256, BIAS=bias is not None, num_warps=2,
    )  # fmt: skip
    return y, new


def causal_conv1d_step(
    x: Tensor, window: Tensor, weight: Tensor, bias: Tensor | None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """One token of decoding.  x: (B, C); window: (B, >= W, C), the last inputs, newest last.

    Returns y (B, C) and the window moved on by one token, a new tensor of the same length.  Raises ValueError on shapes
    that do not fit and a window too short.  Where gradients are wanted it runs in PyTorch; the kernel has no backward.
    """
    fits = window.ndim == 3 and weight.ndim == 2 and window.shape[::2] == x.shape and weight.shape[0] == x.shape[-1]
    if not fits or (bias is not None and bias.shape != x.shape[-1:]):
        raise ValueError(
            f"causal_conv1d_step: x {tuple(x.shape)}, window {tuple(window.shape)}, weight {tuple(weight.shape)} and "
            f"bias {None if bias is None else tuple(bias.shape)} do not fit (B, C), (B, >= W, C), (C, W), (C,)"
        )
    if window.shape[1] < weight.shape[1]:
        raise ValueError(
            f"causal_conv1d_step: the window keeps {window.shape[1]} inputs; a width of {weight.shape[1]} needs as many"
        )
    wants_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, window, weight, bias))
    if not use_triton(x, backend) or wants_grad or window.dtype != x.dtype or x.numel() == 0:
        return causal_conv1d_step_reference(x, window, weight, bias)
    return _step(channel_last(x), channel_last(window), weight, None if bias is None else bias.contiguous())
