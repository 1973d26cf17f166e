"""Mamba-2's output norm, gate first: u = y * silu(z); each of G groups of channels is RMS-normalised by itself.

Source: RMSNorm, arXiv:1910.07467; the gated, grouped form is Mamba-2's, arXiv:2405.21060, section 7.
"""

import torch.nn.functional as F
from torch import Tensor

from kernels._common import accumulate_dtype


def gated_rms_norm_reference(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    acc = accumulate_dtype(y)
    u = y.to(acc) * F.silu(z.to(acc))
    u = u.unflatten(-1, (groups, -1))  # (..., G, d / G)
    u = u * (u.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (u.flatten(-2) * weight.to(acc)).to(y.dtype)


def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """y, z: (..., d); weight: (d,); returns (..., d) in y's dtype.  Gate, sums and weight in fp32, one rounding.

    Raises ValueError if d is not a multiple of `groups`.
    """
    if y.shape[-1] % groups:
        raise ValueError(f"gated_rms_norm: width {y.shape[-1]} is not a multiple of groups={groups}")
    return gated_rms_norm_reference(y, z, weight, groups, eps)
