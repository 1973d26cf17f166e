"""Frozen weights in FP8: codes of 8 bits (E4M3, arXiv:2209.05433) and a scale for each block of 128 inputs of a row.

    w_oi ~ 2^s_ob code_oi,  b = floor(i / 128),  2^s the least power of two that brings a block's largest to 448 or less

A product with such a matrix expands it into a temporary of the dtype of x, multiplies, and frees it: forward, when
activations are computed again, and in the backward pass, where dx = dy W wants it once more.  Autograd keeps the codes.

Rounding is to nearest, ties to even; the scale is never so small that a finite number would pass 448.  The scale is a
power of two because a code has 4 significant bits and any float dtype holds 2^s times it: expansion is exact, so a
model in bf16 and one in float64 have the same weights.  Measured on normal weights, whole and with 8 of 2688 input
channels 20 times as large, the error |w^ - w| / |w| is 2.65 % and 2.68 %; with the block's largest number itself put to
448 it is 2.57 %, and 2.6 % for the channels that are not large, which one rounding to bf16 more would buy.  Powers of
two for a whole row give the same errors; blocks, because a cut of the inputs at a multiple of 128 (tensor parallelism)
leaves them as they are, and because one number out of all proportion then costs its block alone.

Bytes: 1 + 2 / 128 a weight.  A block with a number that is not finite is NaN.
"""

from __future__ import annotations  # so that tl.constexpr is not looked up where there is no triton

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels._bandwidth import jit, tl
from kernels._common import triton, use_triton

CODE = torch.float8_e4m3fn
SCALE = torch.bfloat16  # holds every power of two that fp32 does
BLOCK = 128  # inputs that have a scale in common
ROWS, WARPS = 64, 4


def scale_shape(shape: torch.Size) -> torch.Size:
    """The shape of the scales of a weight (..., in)."""
    return torch.Size((*shape[:-1], -(-shape[-1] // BLOCK)))


def quantise(w: Tensor) -> tuple[Tensor, Tensor]:
    """w: (..., in), rounded to fp32 if it is more -> codes (..., in) in E4M3, scales bf16 of `scale_shape`."""
    w = w.float()
    padded = F.pad(w, (0, -w.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    top = padded.abs().amax(-1)
    mantissa, exponent = torch.frexp(top)  # top = mantissa 2^exponent, 1/2 <= mantissa < 1, and 448 = 7/8 2^9
    exponent = (exponent - 9 + (mantissa > 0.875)).clamp(-126, 127)
    scales = ((exponent + 127) << 23).to(torch.int32).view(torch.float32)  # 2^exponent, from its bits: exact anywhere
    scales = scales.where(top > 0, 1.0).where(top.isfinite(), torch.nan)
    codes = (padded / scales.unsqueeze(-1)).flatten(-2)[..., : w.shape[-1]].to(CODE)
    return codes.contiguous(), scales.to(SCALE)


def dequantise_reference(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    spread = scales.to(dtype).repeat_interleave(BLOCK, -1)[..., : codes.shape[-1]]
    return codes.to(dtype) * spread


@jit
def _expand_kernel(codes_ptr, scales_ptr, out_ptr, rows, width, blocks, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """One program: ROWS rows of one block.  codes (rows, width) as bytes, scales (rows, blocks), out (rows, width).

    A byte is read as the fp16 that has its bits, moved up by half a place: that is 2^-8 of the code, those below the
    smallest normal number included.  So no architecture needs an instruction for E4M3.
    """
    pid = tl.program_id(0).to(tl.int64)
    row = pid // blocks * ROWS + tl.arange(0, ROWS)
    col = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    at, mask = row[:, None] * width + col[None, :], (row < rows)[:, None] & (col < width)[None, :]
    byte = tl.load(codes_ptr + at, mask=mask, other=0).to(tl.int16)
    half = (((byte & 0x80) << 8) | ((byte & 0x7F) << 7)).to(tl.float16, bitcast=True)
    code = tl.where((byte & 0x7F) == 0x7F, float("nan"), half.to(tl.float32) * 256.0)
    scale = tl.load(scales_ptr + row * blocks + pid % blocks, mask=row < rows, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, code * scale[:, None], mask=mask)


def dequantise(codes: Tensor, scales: Tensor, dtype: torch.dtype, backend: str = "auto") -> Tensor:
    """codes (..., in), scales of `scale_shape` -> (..., in), contiguous; exact in bf16, fp32 and float64 (as long
    as the dtype reaches so far down).  Not differentiable.  Raises ValueError on scales that do not fit, and as
    `use_triton` does."""
    if scales.shape != scale_shape(codes.shape):
        raise ValueError(
            f"dequantise: scales {tuple(scales.shape)} do not fit codes {tuple(codes.shape)}; they need "
            f"{tuple(scale_shape(codes.shape))}"
        )
    if dtype == torch.float64 or not use_triton(codes, backend) or codes.numel() == 0:
        return dequantise_reference(codes, scales, dtype)
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    width, blocks = codes.shape[-1], scales.shape[-1]
    rows = codes.numel() // width
    grid = (triton.cdiv(rows, ROWS) * blocks,)
    as_bytes = codes.contiguous().view(torch.uint8)
    _expand_kernel[grid](
        as_bytes, scales.contiguous(), out, rows, width, blocks, ROWS=ROWS, BLOCK=BLOCK, num_warps=WARPS
    )
    return out


def expanded(weight: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A weight as products want it: itself, or if it has scales, what its codes stand for."""
    return weight if scales is None else dequantise(weight, scales, dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(codes, scales)
        return F.linear(x, dequantise(codes, scales, x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None]:
        return dy @ dequantise(*ctx.saved_tensors, dy.dtype), None, None


def linear(x: Tensor, weight: Tensor, scales: Tensor | None = None) -> Tensor:
    """x W^T: x (..., in), weight (out, in) -> (..., out).  With scales the weight is codes: differentiable in x alone,
    for which nothing but the codes is kept."""
    return F.linear(x, weight) if scales is None else _Linear.apply(x, weight, scales)
