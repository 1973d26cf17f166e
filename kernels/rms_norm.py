"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight  (arXiv:1910.07467, eq. 4), the weight applied before rounding."""

from torch import Tensor

from kernels._common import accumulate_dtype


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    u = x.to(accumulate_dtype(x))
    return (u * (u.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.to(u.dtype)).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: (..., D), weight: (D,); returns (..., D) in x's dtype.  Sums run in fp32 (float64 for float64 input)."""
    return rms_norm_reference(x, weight, eps)
