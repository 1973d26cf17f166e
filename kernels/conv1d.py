"""Causal depthwise convolution and SiLU on channel-last data.

    y[t, c] = silu(bias[c] + sum_j weight[c, j] * x[t - W + 1 + j, c])        j = 0 .. W-1; the last tap is the token itself

A tap that would reach before the sequence reads `initial` (zeros if absent); one that would reach into another document
of a packed row reads zero.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels._common import accumulate_dtype


def causal_conv1d_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None = None, initial: Tensor | None = None
) -> Tensor:
    acc = accumulate_dtype(x)
    S, W = x.shape[1], weight.shape[1]
    before = x.new_zeros(x.shape[0], W - 1, x.shape[2]) if initial is None else initial.to(x.dtype)
    padded = torch.cat([before, x], dim=1).to(acc)  # (B, W - 1 + S, C)
    if seq_idx is not None:
        documents = F.pad(seq_idx, (W - 1, 0), mode="replicate")  # `initial` belongs to the first token's document
    y = None
    for j in range(W):
        tap = padded[:, j : j + S]
        if seq_idx is not None:
            tap = tap * (documents[:, j : j + S] == seq_idx).unsqueeze(-1)
        term = tap * weight[:, j].to(acc)
        y = term if y is None else y + term
    if bias is not None:
        y = y + bias.to(acc)
    return F.silu(y).to(x.dtype)


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None = None, initial: Tensor | None = None
) -> Tensor:
    """x: (B, S, C); weight: (C, W), W from 2 to 4; bias: (C,) or None; returns (B, S, C) in x's dtype.

    seq_idx: (B, S) integers, the document of each token, non-decreasing along a row.  initial: (B, W-1, C), the columns
    before the first.  Sums and SiLU run in fp32.  Raises ValueError on shapes that do not fit.
    """
    if x.ndim != 3 or weight.shape[0] != x.shape[2] or not 2 <= weight.shape[1] <= 4:
        raise ValueError(
            f"causal_conv1d: x {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit (B, S, C), (C, 2..4)"
        )
    return causal_conv1d_reference(x, weight, bias, seq_idx, initial)


def causal_conv1d_step(x: Tensor, window: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """One token of decoding.  x: (B, C); window: (B, >= W-1, C), the last inputs, newest last.

    Returns y (B, C) and the window moved on by one token, a new tensor of the same length.
    """
    window = torch.cat([window[:, 1:], x.unsqueeze(1)], dim=1)
    W, acc = weight.shape[1], accumulate_dtype(x)
    if window.shape[1] < W:
        raise ValueError(f"causal_conv1d_step: the window keeps {window.shape[1]} inputs; a width of {W} needs as many")
    y = (window[:, -W:].to(acc) * weight.T.to(acc)).sum(1)
    if bias is not None:
        y = y + bias.to(acc)
    return F.silu(y).to(x.dtype), window
