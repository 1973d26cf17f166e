"""One AdamW update of one tensor in one pass, with moments and weights that may be kept in few bits.

    m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2,  w = w - lr decay w - lr / c1 m / (sqrt(v / c2) + eps)

(arXiv:1711.05101; c1, c2 are the bias corrections 1 - b^t.)  Everything is computed in fp32 from what is stored.  What
is stored in fewer bits is rounded stochastically: up with the probability that makes the expectation right.  Rounded to
nearest, an exp_avg_sq would not move where (1 - b2) g^2 is less than half a unit of it, nor a bf16 weight where an
update is less than 2^-9 of it, and most are.

8-bit moments: blocks of at most 128 elements along a row share an fp32 scale, their largest magnitude (the idea of
arXiv:2110.02861, which has blocks of 2048 and a table for a code).  Adam divides one moment by the root of the other,
so small elements matter as much as large ones, and the code's steps must shrink with them.  Here a power does that:

    m = scale sign(c) (c / 127)^4, c in -127 .. 127    a step is 4 / c; down to 4e-9 of the block's largest
    v = scale (c / 255)^8,         c in 0 .. 255       sqrt(v) in the same steps, to 2e-10; 0 only where v is 0

The random bits are a hash of seed, tensor, step and the element's index in the whole tensor: no state, and the same
under any layout.
"""

from __future__ import annotations  # so that tl.constexpr is not looked up where there is no triton

import hashlib
import math
from typing import NamedTuple

import torch
from torch import Tensor

from kernels._bandwidth import jit, tl
from kernels._common import triton, use_triton

TILE, WARPS = 1024, 4  # elements of a program
WIDEST = 128  # elements that share a scale


class Moment(NamedTuple):
    """data: (R, W) in fp32, float64 or bf16; or codes, int8 for the first moment and uint8 for the second, with scale
    (R, ceil(W / block)) in fp32."""

    data: Tensor
    scale: Tensor | None = None


class Place(NamedTuple):
    """Where a matrix lies in the whole tensor, seen as a matrix: so its elements are numbered."""

    width: int  # of the whole
    row: int = 0
    column: int = 0


class Step(NamedTuple):
    """The numbers of an update."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    decay: float
    count: int  # this update's number, from 1

    @property
    def size(self) -> float:
        return self.lr / (1 - self.beta1**self.count)

    @property
    def root(self) -> float:
        return 1 / math.sqrt(1 - self.beta2**self.count)


def keys_of(seed: int, name: str, step: int) -> tuple[int, int]:
    """Two int32 keys of the random bits for one update of one tensor."""
    digest = hashlib.sha256(f"{seed} {name} {step}".encode()).digest()
    return tuple(int.from_bytes(digest[i : i + 4], "little", signed=True) for i in (0, 4))


def _mix(x: Tensor) -> Tensor:
    """A permutation of 32-bit numbers, kept in int64: a multiplication may wrap there, its low 32 bits are right."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x046CA68B)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 16)


def random_bits(index: Tensor, keys: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """int64 indices of elements -> two independent 32-bit numbers for each, as int64."""
    a, b = (k & 0xFFFFFFFF for k in keys)
    first = _mix(_mix((index & 0xFFFFFFFF) ^ a) ^ (((index >> 32) + b) & 0xFFFFFFFF))
    return first, _mix(first ^ 0x3C6EF372)


def round_bf16(x: Tensor, bits: Tensor) -> Tensor:
    """fp32 -> bf16, up in magnitude with the probability of the 16 bits that are cut off.  bits: 0 .. 65535."""
    cut = (x.view(torch.int32) + bits.to(torch.int32)) & -65536
    return torch.where(x.isnan(), x, cut.view(torch.float32)).bfloat16()


def _blocks(x: Tensor, block: int) -> Tensor:
    """(R, W) -> (R, ceil(W / block), block), the end of a row filled up with zeros."""
    R, W = x.shape
    return torch.nn.functional.pad(x, (0, -W % block)).view(R, -1, block)


def _fourth(x: Tensor) -> Tensor:
    return (x * x) * (x * x)


def encode(x: Tensor, block: int, bits: Tensor, second: bool) -> Moment:
    """(R, W) -> codes of 8 bits.  bits: 0 .. 65535 for each element.  second: of the second moment."""
    whole = _blocks(x, block)
    scale = whole.abs().amax(-1)
    share = whole.abs() / scale.masked_fill(scale == 0, 1.0)[..., None]
    u = (_blocks(bits, block).to(x.dtype) + 0.5) / 65536
    if second:
        y = share * 255.0**8
        low = y.sqrt().sqrt().sqrt().floor().clamp_max(254.0)
        below, above = (_fourth(x) ** 2 for x in (low, low + 1))
        code = torch.where(whole > 0, (low + (u * (above - below) < y - below)).clamp_min(1.0), 0.0)
    else:
        y = share * 127.0**4
        low = y.sqrt().sqrt().floor().clamp_max(126.0)
        below, above = _fourth(low), _fourth(low + 1)
        code = (low + (u * (above - below) < y - below)).copysign(whole)
    code = code.flatten(1)[:, : x.shape[1]]
    return Moment(code.nan_to_num().to(torch.uint8 if second else torch.int8), scale.float())


def decode(moment: Moment, block: int) -> Tensor:
    """The numbers that a moment stands for, (R, W), fp32 or wider."""
    data, scale = moment
    if scale is None:
        return data.to(torch.promote_types(data.dtype, torch.float32))
    t = _blocks(data.float(), block) / (255.0 if data.dtype == torch.uint8 else 127.0)
    x = _fourth(t) ** 2 if data.dtype == torch.uint8 else _fourth(t).copysign(t)
    return (scale[..., None] * x).flatten(1)[:, : data.shape[1]]


def store(moment: Moment, x: Tensor, block: int, bits: Tensor) -> None:
    """Put (R, W) numbers into a moment in its own form.  bits: 0 .. 65535 for each element."""
    if moment.scale is not None:
        new = encode(x, block, bits, moment.data.dtype == torch.uint8)
        moment.data.copy_(new.data)
        moment.scale.copy_(new.scale)
    else:
        moment.data.copy_(round_bf16(x.float(), bits) if moment.data.dtype == torch.bfloat16 else x)


def adamw_reference(
    weight: Tensor,
    gradient: Tensor,
    first: Moment,
    second: Moment,
    clip: Tensor,
    step: Step,
    keys: tuple[int, int],
    place: Place,
    block: int = WIDEST,
) -> None:
    if clip.isnan():
        return
    R, W = weight.shape
    rows = torch.arange(place.row, place.row + R, device=weight.device)[:, None]
    index = rows * place.width + place.column + torch.arange(W, device=weight.device)
    bits, more = random_bits(index, keys)
    wide = torch.promote_types(weight.dtype, torch.float32)
    g = gradient.to(wide) * clip.to(wide)
    m = step.beta1 * decode(first, block) + (1 - step.beta1) * g
    v = step.beta2 * decode(second, block) + (1 - step.beta2) * (g * g)
    w = weight.to(wide)
    w = w - (step.lr * step.decay * w + step.size * m / (v.sqrt() * step.root + step.eps))
    weight.copy_(round_bf16(w, bits & 0xFFFF) if weight.dtype == torch.bfloat16 else w)
    store(first, m, block, bits >> 16)
    store(second, v, block, more & 0xFFFF)


@jit
def _mixed(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x046CA68B
    return x ^ (x >> 16)


@jit
def _fourth_power(x):
    return (x * x) * (x * x)


@jit
def _largest(x):
    """[ROWS, BLOCK] of what is not negative -> [ROWS, 1]; infinite where a number is not finite, NaN included."""
    return tl.max(tl.where(x != x, float("inf"), x), axis=1, keep_dims=True)


@jit
def _narrow(x, bits, ptr):
    """fp32 -> the dtype of what ptr points to; bf16 with the 16 bits given."""
    if ptr.dtype.element_ty == tl.bfloat16:
        cut = ((x.to(tl.uint32, bitcast=True) + bits) >> 16) << 16
        x = tl.where(x != x, x, cut.to(tl.float32, bitcast=True))
    return x.to(ptr.dtype.element_ty)


@jit(do_not_specialize=["row0", "column0", "key0", "key1"])  # they change from tensor to tensor and step to step
def _adamw_kernel(
    weight_ptr, gradient_ptr, first_ptr, first_scale_ptr, second_ptr, second_scale_ptr, clip_ptr,
    W, blocks, per_row, whole, row0, column0, key0, key1, beta1, rest1, beta2, rest2, decay, size, root, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    """One program: ROWS of the blocks that rows of W elements are cut into.  weight, gradient, moments (R, W); scales
    (R, per_row).  CODES: the moments have 8 bits."""
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]  # [ROWS, 1], of the block
    row = (at // per_row).to(tl.int64)
    column = (at % per_row).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]  # [ROWS, BLOCK]
    clip = tl.load(clip_ptr).to(tl.float32)
    live = at < tl.where(clip == clip, blocks, 0)  # NaN: nothing is written
    mask = live & (column < W)
    here = row * W + column

    index = (row0 + row) * whole + column0 + column
    bits = _mixed(index.to(tl.uint32) ^ key0.to(tl.uint32))
    bits = _mixed(bits ^ ((index >> 32).to(tl.uint32) + key1.to(tl.uint32)))
    more = _mixed(bits ^ 0x3C6EF372)

    w = tl.load(weight_ptr + here, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(gradient_ptr + here, mask=mask, other=0.0).to(tl.float32) * clip
    m = tl.load(first_ptr + here, mask=mask, other=0).to(tl.float32)
    v = tl.load(second_ptr + here, mask=mask, other=0).to(tl.float32)
    if CODES:
        share = _fourth_power(tl.div_rn(m, 127.0))
        m = tl.load(first_scale_ptr + at, mask=live, other=0.0) * tl.where(m < 0, -share, share)
        share = _fourth_power(tl.div_rn(v, 255.0))
        v = tl.load(second_scale_ptr + at, mask=live, other=0.0) * (share * share)
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * (g * g)
    w -= decay * w + tl.div_rn(size * m, tl.sqrt_rn(v) * root + eps)
    tl.store(weight_ptr + here, _narrow(w, bits & 0xFFFF, weight_ptr), mask=mask)

    if CODES:
        scale = _largest(tl.abs(m))
        tl.store(first_scale_ptr + at, scale, mask=live)
        y = tl.div_rn(tl.abs(m), tl.where(scale == 0, 1.0, scale)) * 127.0**4
        low = tl.minimum(tl.floor(tl.sqrt_rn(tl.sqrt_rn(y))), 126.0)
        below = _fourth_power(low)
        above = _fourth_power(low + 1.0)
        u = ((bits >> 16).to(tl.float32) + 0.5) / 65536
        code = tl.where(u * (above - below) < y - below, low + 1.0, low)
        tl.store(first_ptr + here, tl.where(m < 0, -code, code).to(tl.int8), mask=mask)

        scale = _largest(v)
        tl.store(second_scale_ptr + at, scale, mask=live)
        y = tl.div_rn(v, tl.where(scale == 0, 1.0, scale)) * 255.0**8
        low = tl.minimum(tl.floor(tl.sqrt_rn(tl.sqrt_rn(tl.sqrt_rn(y)))), 254.0)
        below = _fourth_power(low)
        below *= below
        above = _fourth_power(low + 1.0)
        above *= above
        u = ((more & 0xFFFF).to(tl.float32) + 0.5) / 65536
        code = tl.where(u * (above - below) < y - below, low + 1.0, low)
        code = tl.where(v > 0, tl.maximum(code, 1.0), 0.0)
        tl.store(second_ptr + here, code.to(tl.int32).to(tl.uint8), mask=mask)
    else:
        tl.store(first_ptr + here, _narrow(m, bits >> 16, first_ptr), mask=mask)
        tl.store(second_ptr + here, _narrow(v, more & 0xFFFF, second_ptr), mask=mask)


def _check(weight: Tensor, gradient: Tensor, first: Moment, second: Moment, clip: Tensor, block: int) -> bool:
    """Whether the moments are codes.  A training step comes here once a tensor: what fits is told quickly."""
    if block not in (1, 2, 4, 8, 16, 32, 64, 128):
        raise ValueError(f"adamw: block={block} does not fit; give a power of two of at most 128")
    if weight.ndim != 2 or clip.numel() != 1:
        raise ValueError(f"adamw: weight {tuple(weight.shape)} with clip {tuple(clip.shape)} does not fit (R, W), (1,)")
    R, W = weight.shape
    per_row, codes = -(-W // block), first.scale is not None
    if codes != (second.scale is not None):
        raise ValueError("adamw: a moment with a scale does not fit one without; give both the same form")
    given = [("weight", weight), ("gradient", gradient), ("first.data", first.data), ("second.data", second.data)]
    scales = [("first.scale", first.scale), ("second.scale", second.scale)] if codes else []
    for named, shape in ((given, (R, W)), (scales, (R, per_row))):
        for name, t in named:
            if t.shape != shape or not t.is_contiguous():
                raise ValueError(
                    f"adamw: {name} {tuple(t.shape)} with strides {t.stride()} does not fit a weight {(R, W)} with "
                    f"blocks of {block}; it must be {shape} and contiguous"
                )
    forms = first.data.dtype, second.data.dtype
    if forms != (torch.int8, torch.uint8) if codes else not all(d.is_floating_point for d in forms):
        wanted = "int8 and uint8 with" if codes else "floating-point numbers without"
        raise ValueError(f"adamw: {forms[0]} and {forms[1]} does not fit moments; they are {wanted} scales")
    if R * per_row >= 2**31:  # the kernel numbers blocks in 32 bits
        raise ValueError(f"adamw: block={block} does not fit {(R, W)}: over 2^31 blocks; give a larger one")
    return codes


def adamw(
    weight: Tensor,
    gradient: Tensor,
    first: Moment,
    second: Moment,
    clip: Tensor,
    step: Step,
    keys: tuple[int, int],
    place: Place,
    block: int = WIDEST,
    backend: str = "auto",
) -> None:
    """Update weight (R, W), fp32, bf16 or float64, and both moments of the same form in place; all are contiguous.

    gradient: (R, W), fp32 or bf16 (float64 for such weights), multiplied by clip, one number on the device; where that
    is NaN nothing changes, so a step can be called off without asking the host.  keys: from `keys_of`.  block: elements
    that share a scale, a power of two of at most 128; for other forms it means nothing.
    Raises ValueError on shapes, forms or strides that do not fit, and as `use_triton` does.
    """
    codes = _check(weight, gradient, first, second, clip, block)
    R, W = weight.shape
    if weight.numel() == 0:
        return
    if not use_triton(weight, backend):
        adamw_reference(weight, gradient, first, second, clip, step, keys, place, block)
        return
    rows, per_row = TILE // block, triton.cdiv(W, block)
    blocks = R * per_row
    _adamw_kernel[(triton.cdiv(blocks, rows),)](
        weight, gradient, first.data, first.scale, second.data, second.scale, clip,
        W, blocks, per_row, place.width, place.row, place.column, *keys,
        step.beta1, 1 - step.beta1, step.beta2, 1 - step.beta2, step.lr * step.decay, step.size, step.root, step.eps,
        ROWS=rows, BLOCK=block, CODES=codes, num_warps=WARPS,
    )  # fmt: skip
