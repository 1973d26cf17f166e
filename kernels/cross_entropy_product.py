"""The three matrix products of `kernels.cross_entropy`, persistent and fed by the copy engine.

    logits = x W^T        dX = dlogits W        dW (+)= dlogits^T x

One program a multiprocessor takes tiles of 128 x 256 in turn, the next tile's loads running during the last one's
stores. Where the tiles do not fill the last round, as in dX with few tokens, the tiles left over are cut along the
inner dimension into as many pieces as there are idle programs; the pieces go to fp32 slots and a second kernel adds
them in order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels._common import free_sms
from kernels._descriptors import describable, descriptor

TILE_M, TILE_N, TILE_K, WARPS, STAGES = 128, 256, 64, 8, 3
SHORTEST = 64  # steps along K that a piece of a tile must have to be worth its slot
RASTER = 8  # tiles of the shorter side that are walked together, so that their operands are met again in L2


@triton.jit
def _place(tile, tiles_m, tiles_n, RASTER: tl.constexpr):
    """Row and column of a tile: bands of RASTER rows, inside a band column by column."""
    band = tile // (RASTER * tiles_n)
    height = tl.minimum(tiles_m - band * RASTER, RASTER)
    inside = tile % (RASTER * tiles_n)
    return band * RASTER + inside % height, inside // height


# A sum of a single term, if compiled for K = 1, is a loop of one step that the compiler of Triton 3.6 fails on.
@triton.jit(do_not_specialize=["K"])
def _product_kernel(
    a_desc, b_desc, c_desc, slots_ptr, M, N, K, whole, pieces,
    A_T: tl.constexpr, B_T: tl.constexpr, ADD: tl.constexpr, SPLIT: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, RASTER: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """c (M, N) = a b, or += with ADD.  a (M, K), stored (K, M) if A_T; b (K, N), stored (N, K) if B_T.

    Tiles 0 .. whole are computed whole; each later one in `pieces` along K, piece by piece into slots (tile, piece).
    """
    tiles_m = tl.cdiv(M, TILE_M)
    tiles_n = tl.cdiv(N, TILE_N)
    steps = tl.cdiv(K, TILE_K)
    items = whole + (tiles_m * tiles_n - whole) * pieces
    for item in tl.range(tl.program_id(0), items, PROGRAMS, flatten=True):
        tile = item
        k0 = 0
        k1 = steps
        extra = 0
        if SPLIT:
            extra = tl.maximum(item - whole, 0)
            tile = tl.where(item < whole, item, whole + extra // pieces)
            k0 = tl.where(item < whole, 0, steps * (extra % pieces) // pieces)
            k1 = tl.where(item < whole, steps, steps * (extra % pieces + 1) // pieces)
        m, n = _place(tile, tiles_m, tiles_n, RASTER)
        acc = tl.zeros([TILE_M, TILE_N], tl.float32)
        for k in tl.range(k0, k1):
            a = a_desc.load([k * TILE_K, m * TILE_M]).T if A_T else a_desc.load([m * TILE_M, k * TILE_K])
            b = b_desc.load([n * TILE_N, k * TILE_K]).T if B_T else b_desc.load([k * TILE_K, n * TILE_N])
            acc = tl.dot(a, b, acc, input_precision="ieee")
        if item < whole:
            # In two halves: the whole tile would not fit into shared memory beside the operands on their way.
            left, right = acc.reshape([TILE_M, 2, TILE_N // 2]).permute(0, 2, 1).split()
            if ADD:
                left += c_desc.load([m * TILE_M, n * TILE_N]).to(tl.float32)
            c_desc.store([m * TILE_M, n * TILE_N], left.to(c_desc.dtype))
            if ADD:
                right += c_desc.load([m * TILE_M, n * TILE_N + TILE_N // 2]).to(tl.float32)
            c_desc.store([m * TILE_M, n * TILE_N + TILE_N // 2], right.to(c_desc.dtype))
        else:
            slot = slots_ptr + extra.to(tl.int64) * (TILE_M * TILE_N)
            at = tl.arange(0, TILE_M)[:, None] * TILE_N + tl.arange(0, TILE_N)[None, :]
            tl.store(slot + at, acc)


@triton.jit
def _add_pieces_kernel(
    slots_ptr, c_ptr, M, N, c_row, whole, pieces,
    ADD: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, RASTER: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows of a tile that came in pieces; adds them in order."""
    extra = tl.program_id(0)
    m, n = _place(whole + extra, tl.cdiv(M, TILE_M), tl.cdiv(N, TILE_N), RASTER)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, TILE_N)
    acc = tl.zeros([ROWS, TILE_N], tl.float32)
    slot = slots_ptr + extra.to(tl.int64) * pieces * (TILE_M * TILE_N) + row[:, None] * TILE_N + col[None, :]
    for _ in tl.range(0, pieces):
        acc += tl.load(slot)
        slot += TILE_M * TILE_N
    rows, cols = m * TILE_M + row[:, None], n * TILE_N + col[None, :]
    c = c_ptr + rows.to(tl.int64) * c_row + cols
    inside = (rows < M) & (cols < N)
    if ADD:
        acc += tl.load(c, mask=inside, other=0.0).to(tl.float32)
    tl.store(c, acc.to(c_ptr.dtype.element_ty), mask=inside)


def multipliable(*operands: Tensor) -> bool:
    """Whether these matrices suit the kernel: bf16 or fp16, rows contiguous and in multiples of 16 bytes."""
    return all(t.element_size() == 2 and describable(t) for t in operands)


def multiply_(
    c: Tensor,
    a: Tensor,
    b: Tensor,
    a_t: bool = False,
    b_t: bool = False,
    add: bool = False,
    programs: int | None = None,
) -> Tensor:
    """c (M, N) = a b, or c += a b; a is stored transposed if a_t, b if b_t.  Sums in fp32, in a fixed order."""
    M, N = c.shape
    K = a.shape[0] if a_t else a.shape[1]
    if programs is None:
        programs = free_sms(c.device)
    tiles = triton.cdiv(M, TILE_M) * triton.cdiv(N, TILE_N)
    rest = tiles % programs
    # With many rounds the last one hardly counts.
    pieces = min(programs // rest, triton.cdiv(K, TILE_K) // SHORTEST) if rest and tiles < 8 * programs else 1
    whole = tiles - rest if pieces > 1 else tiles
    slots = c if whole == tiles else torch.empty(rest * pieces, TILE_M, TILE_N, dtype=torch.float32, device=c.device)

    def describe(t: Tensor, rows: int, cols: int) -> TensorDescriptor:
        return descriptor(t, [rows, cols])

    sizes = {"TILE_M": TILE_M, "TILE_N": TILE_N, "RASTER": RASTER}
    _product_kernel[(min(programs, whole + (tiles - whole) * pieces),)](
        describe(a, *((TILE_K, TILE_M) if a_t else (TILE_M, TILE_K))),
        describe(b, *((TILE_N, TILE_K) if b_t else (TILE_K, TILE_N))),
        describe(c, TILE_M, TILE_N // 2),
        slots, M, N, K, whole, pieces, A_T=a_t, B_T=b_t, ADD=add, SPLIT=whole < tiles, TILE_K=TILE_K, PROGRAMS=programs,
        num_warps=WARPS, num_stages=STAGES, **sizes,
    )  # fmt: skip
    if whole < tiles:
        _add_pieces_kernel[(tiles - whole, TILE_M // 16)](
            slots, c, M, N, c.stride(0), whole, pieces, ADD=add, ROWS=16, num_warps=4, **sizes
        )
    return c
