"""The routed experts with LoRA: each matrix W_e of theirs becomes W_e + s B_e A_e, and the update is never formed.

    z_r = up_e x_r + s B_e (A_e x_r),   h_r = w_r relu(z_r)^2,   y_r = down_e h_r + s B'_e (A'_e h_r),   e = expert of r

Rows are in expert order as in `grouped_gemm.py`, so a thin product is a grouped product like the thick one: a group per
expert, r columns.  An adapter that all experts share (A (r, in), B (out, r) without an expert axis) is two plain
products; its A reads each token once, before the rows are gathered.

In PyTorch (model.kernels.experts=torch) gradients come from autograd, which computes none for a frozen weight: what
remains of the backward pass of a frozen base are the two products with its matrices that carry dy to x.

The kernels are those of the base: each of its four row products takes its thin summand into the accumulators, so the
result is rounded where the base's is, equals it to the bit while B is zero, and nothing but x, hs and two tensors of r
columns is kept:

    forward    hs = w relu(x up^T + (s x A^T) B^T)^2           y  = hs down^T + (s hs A'^T) B'^T
    backward   dz = 2 w relu(z) (dy down + (s dy B') A')       dx = dz up + (s dz B) A
    gradients  dB = dz^T (s x A^T)   dA = (s dz B)^T x         dB' = dy^T (s hs A'^T)   dA' = (s dy B')^T hs

A thin product, or an adapter's gradient, takes as long as reading its wide operand once.

The frozen matrices may be FP8 codes with scales (`fp8.py`): each product then expands the one that it takes, for as
long as it lasts.

Suffixes: T tokens, K chosen, R rows (one for each choice that is computed here), D width, F expert hidden width, E
experts, r rank.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels._common import INTERPRET, result_is_known, triton, use_triton
from kernels.fp8 import dequantise, expanded
from kernels.grouped_gemm import (
    _Combine,
    _find_rows,
    _Gather,
    _NoRows,
    _readable,
    check_choices,
    experts,
    sort_by_expert,
)

if triton is not None:
    from kernels.grouped_gemm_configs import Config, choose_configs
    from kernels.grouped_gemm_rows import (
        LowRank,
        down_rows,
        down_rows_backward,
        routing_weight_gradients,
        thin_rows,
        up_rows,
        up_rows_backward,
    )
    from kernels.grouped_gemm_weights import weight_gradient
    from kernels.permute import Tiles, plan_rows, sum_rows

Pair = tuple[Tensor, Tensor]  # A (E, r, in) and B (E, out, r), or shared: A (r, in) and B (out, r)


def adapted_experts_reference(
    x_TD: Tensor,
    weights_TK: Tensor,
    experts_TK: Tensor,
    up_EFD: Tensor,
    down_EDF: Tensor,
    up_lora: Pair | None,
    down_lora: Pair | None,
    scale: float,
) -> Tensor:
    """The formula with the update written out: every expert on every token."""
    up, down = (
        w if pair is None else w + scale * (pair[1] @ pair[0]) for w, pair in ((up_EFD, up_lora), (down_EDF, down_lora))
    )
    dense_TE = weights_TK.new_zeros(x_TD.shape[0], up.shape[0]).scatter_add(-1, experts_TK, weights_TK)
    hidden = torch.einsum("td,efd->tef", x_TD, up).relu().square() * dense_TE.unsqueeze(-1).to(x_TD.dtype)
    return torch.einsum("tef,edf->td", hidden, down)


def grouped_linear(rows: Tensor, matrices: Tensor, counts: Tensor) -> Tensor:
    """rows (R, in) in expert order, matrices (E, out, in), counts (E,) summing to R -> (R, out): each row times the
    matrix of its expert.  Differentiable in both; a matrix without rows has gradient zero.

    On a GPU in 16 bits torch's grouped_mm, which reads nothing on the host; elsewhere a product per expert.
    """
    if rows.is_cuda and rows.dtype.itemsize == 2:
        return F.grouped_mm(rows, matrices.transpose(-2, -1), offs=counts.cumsum(0).to(torch.int32))
    parts = rows.split(counts.tolist())
    return torch.cat([F.linear(part, matrix) for part, matrix in zip(parts, matrices.unbind(0), strict=True)])


class _GroupedCodes(torch.autograd.Function):
    """grouped_linear of matrices in FP8, of which one tensor is expanded at a time and none is kept."""

    @staticmethod
    def forward(ctx, rows: Tensor, codes: Tensor, scales: Tensor, counts: Tensor) -> Tensor:
        ctx.save_for_backward(codes, scales, counts)
        return grouped_linear(rows, dequantise(codes, scales, rows.dtype), counts)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        codes, scales, counts = ctx.saved_tensors
        return grouped_linear(dy, dequantise(codes, scales, dy.dtype).mT, counts), None, None, None


def _adapted_linear(
    rows: Tensor,
    base: Tensor,
    scales: Tensor | None,
    pair: Pair | None,
    scale: float,
    counts: Tensor,
    down: Tensor | None,
) -> Tensor:
    """(R, in) -> (R, out).  scales: of the base, if it is FP8.  down: rows A^T, if it is known already."""
    y = grouped_linear(rows, base, counts) if scales is None else _GroupedCodes.apply(rows, base, scales, counts)
    if pair is None:
        return y
    A, B = pair
    if A.ndim == 2:
        return y.addmm_(F.linear(rows, A) if down is None else down, B.T, alpha=scale)
    thin = grouped_linear(rows, A, counts)
    return y.add_(grouped_linear(thin, B, counts), alpha=scale)


class _AdaptedExperts(torch.autograd.Function):
    """The kernels on frozen experts.  A, B: of up, then of down; None without an adapter."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,  # (T, D)
        weights: Tensor,  # (T, K)
        up: Tensor,
        down: Tensor,
        up_scales: Tensor | None,
        down_scales: Tensor | None,
        A: Tensor | None,
        B: Tensor | None,
        A2: Tensor | None,
        B2: Tensor | None,
        scale: float,
        order: Tensor,
        place: Tensor,
        tiles: "Tiles",
    ) -> Tensor:
        configs = _tiles_of_products(x, up, down, max((t.shape[-2] for t in (A, A2) if t is not None), default=0))
        weights_R = weights.flatten().index_select(0, order)
        x_rows, *where = _find_rows(x, order, place, configs["up"].copy)
        thin = _thin(A, True, scale, x, x_rows, where, order, place, tiles, configs["up"])
        hs = up_rows(
            x_rows, weights_R, expanded(up, up_scales, x.dtype), tiles, *where, configs["up"], _low(thin, B, True)
        )
        del x_rows
        thin2 = _thin(A2, True, scale, None, hs, [None, 0], order, place, tiles, configs["down"])
        base = up, down, up_scales, down_scales
        ctx.save_for_backward(x, weights, weights_R, *base, A, B, A2, B2, order, place, hs, thin, thin2, *tiles[:3])
        ctx.block, ctx.configs, ctx.scale = tiles.block, configs, scale
        if result_is_known():
            return torch.empty_like(x)
        down = expanded(down, down_scales, x.dtype)
        return sum_rows(down_rows(hs, down, tiles, configs["down"], _low(thin2, B2, True)), place)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, weights_R, up, down, up_scales, down_scales, *rest = ctx.saved_tensors
        A, B, A2, B2, order, place, hs, thin, thin2, *tables = rest
        tiles, configs, scale = Tiles(*tables, ctx.block), ctx.configs, ctx.scale
        need_x, need_weights = ctx.needs_input_grad[:2]
        dA = dB = dA2 = dB2 = dx = None
        dy_rows, *where = _find_rows(dy.contiguous(), order, place, configs["dH"].copy)
        back2 = _thin(B2, False, scale, dy, dy_rows, where, order, place, tiles, configs["dH"])
        if A2 is not None:
            if A2.ndim == 2:
                dA2, dB2 = back2.T @ hs, dy.T @ sum_rows(thin2, place)
            else:
                dA2 = _adapter_gradient(back2, hs, None, 0, tiles, configs["dup"], False)
                dB2 = _adapter_gradient(thin2, dy_rows, *where, tiles, configs["dup"], True)
        down = expanded(down, down_scales, x.dtype)
        dz, part = down_rows_backward(
            dy_rows, weights_R, hs, down, tiles, *where, configs["dH"], _low(back2, A2, False)
        )
        del down  # before the other matrix is expanded
        del dy_rows
        dweights = routing_weight_gradients(part, weights, place, tiles) if need_weights else None
        back = _thin(B, False, scale, None, dz, [None, 0], order, place, tiles, configs["dX"])
        if A is not None:
            if A.ndim == 2:
                dA, dB = sum_rows(back, place).T @ x, dz.T @ thin
            else:
                # Gathered: a copy in expert order would be read once, and cost more than that.
                dA = _adapter_gradient(back, x, order, place.shape[1], tiles, configs["dup"], False)
                dB = _adapter_gradient(thin, dz, None, 0, tiles, configs["dup"], True)
        if need_x:
            up = expanded(up, up_scales, x.dtype)
            dx = sum_rows(up_rows_backward(dz, up, tiles, configs["dX"], _low(back, A, False)), place)
        return dx, dweights, *(None,) * 4, dA, dB, dA2, dB2, *(None,) * 4


def _tiles_of_products(x: Tensor, up: Tensor, down: Tensor, rank: int) -> dict[str, "Config"]:
    """Those of the base, but for Blackwell.  There Triton 3.6 compiles no product that follows a flattened loop, and
    every product of a program has columns of tensor memory of its own: the base's, and each 32 columns of the adapter.
    """
    configs = choose_configs(x, up, down, thin=True)
    if INTERPRET or torch.cuda.get_device_capability(x.device)[0] != 10:
        return configs
    widest = 512 // (1 + triton.cdiv(rank, 32))
    width = max(16, 1 << (widest.bit_length() - 1))
    return {name: c._replace(flatten=False, block_n=min(c.block_n, width)) for name, c in configs.items()}


def _low(thin: Tensor | None, matrix: Tensor | None, is_nk: bool) -> "LowRank | None":
    return None if thin is None else LowRank(thin, matrix, is_nk)


def _thin(
    matrix: Tensor | None,
    is_nk: bool,
    scale: float,
    tokens: Tensor | None,
    rows: Tensor,
    where: list,
    order: Tensor,
    place: Tensor,
    tiles: "Tiles",
    config: "Config",
) -> Tensor | None:
    """scale * rows matrix^T, (R, r) in expert order.  tokens: what the rows were gathered from, if they were; a matrix
    that experts share reads each of these once."""
    if matrix is None:
        return None
    if matrix.ndim == 3:
        return thin_rows(rows, matrix, is_nk, tiles, *where, config, scale)
    thin = (rows if tokens is None else tokens) @ (matrix.T if is_nk else matrix)
    if scale != 1:
        thin.mul_(scale)
    return thin if tokens is None else thin.index_select(0, order // place.shape[1])


def _adapter_gradient(
    thin: Tensor, wide: Tensor, order: Tensor | None, top_k: int, tiles: "Tiles", config: "Config", left: bool
) -> Tensor:
    """Per expert wide^T thin, (E, width, r), or if not `left` thin^T wide, (E, r, width)."""
    narrow = min(128, max(16, triton.next_power_of_2(thin.shape[1])))
    if left:
        block = {"block_m": min(config.block_m, 128), "block_n": narrow}
    else:  # Hopper's tensor cores take 64 rows or more
        block = {"block_m": max(narrow, 64), "block_n": min(config.block_n, 128)}
    c = config._replace(**block, extra_n=0, store=False, split=1, warps=4, stages=min(config.stages, 4), per_sm=2)
    return weight_gradient(wide, thin, tiles, order, top_k, left, c)


def adapted_experts(
    x: Tensor,
    weights: Tensor,
    experts_TK: Tensor,
    counts: Tensor,
    up: Tensor,
    down: Tensor,
    up_lora: Pair | None,
    down_lora: Pair | None,
    scale: float,
    backend: str = "auto",
    *,
    rows: int | None = None,
    up_scales: Tensor | None = None,
    down_scales: Tensor | None = None,
) -> Tensor:
    """`grouped_gemm.experts` with adapters (None: without one); all other arguments are its own.

    x: (T, D); weights: (T, K) fp32; experts_TK: (T, K), E for a choice that is computed elsewhere; counts: (E,); up:
    (E, F, D); down: (E, D, F); up_lora, down_lora: (A, B) of shapes (E, r, in), (E, out, r), or one for all experts,
    (r, in), (out, r); scale: factor of B A; rows: how many choices are computed here, None: all; up_scales,
    down_scales: both, if up and down are codes of `fp8.quantise` -> (T, D).

    Differentiable in x, weights and every matrix that requires a gradient.  Off a GPU it reads `counts` on the host.
    backend: the kernels have no gradient for up and down; "triton" wants them frozen, "auto" is "torch" where they are
    not, or where an adapter's dtype is not that of x.
    Under `computing_again` the kernels leave the result undefined.
    Raises ValueError on an adapter that does not fit its weight, and as `experts` does.
    Source: LoRA, arXiv:2106.09685, eq. 3, for each expert.
    """
    for pair, weight in ((up_lora, up), (down_lora, down)):
        _check(pair, weight)
    coded, bare = up_scales is not None, up_lora is None and down_lora is None
    if bare and not coded:
        return experts(x, weights, experts_TK, counts, up, down, backend, rows=rows)
    E, F_, D = up.shape
    if x.ndim != 2 or x.shape[1] != D or down.shape != (E, D, F_):
        raise ValueError(f"x {tuple(x.shape)}, up {tuple(up.shape)} and down {tuple(down.shape)} do not fit together")
    check_choices("adapted_experts", x, weights, experts_TK, counts, up)
    R = experts_TK.numel() if rows is None else rows
    if not 0 <= R <= experts_TK.numel():
        raise ValueError(f"rows={rows} does not fit {experts_TK.numel()} choices; count the ids below {E}")
    if R == 0:
        adapters = [t for pair in (up_lora, down_lora) if pair is not None for t in pair]
        return _NoRows.apply(x, weights, *(() if coded else (up, down)), *adapters)
    if not x.is_cuda and (real := int((experts_TK < E).sum())) != R:
        raise ValueError(f"rows={rows}, but {real} of {experts_TK.numel()} ids are below {E}; pass rows={real}")
    pairs = [t for pair in (up_lora or (None, None), down_lora or (None, None)) for t in pair]
    frozen = not (up.requires_grad or down.requires_grad)
    if not frozen and backend == "triton":
        raise ValueError("backend='triton' adapts frozen experts only; freeze up and down, or use backend='torch'")
    one_dtype = all(t is None or t.dtype == x.dtype for t in (*pairs, *(() if coded else (up, down))))
    if use_triton(x, backend) and frozen and one_dtype:
        x, weights, up, down = _readable(x), weights.contiguous(), up.contiguous(), down.contiguous()
        pairs = [t if t is None else t.contiguous() for t in pairs]
        plan = plan_rows(experts_TK, E, choose_configs(x, up, down)["up"].block_m, R)
        return _AdaptedExperts.apply(x, weights, up, down, up_scales, down_scales, *pairs, scale, *plan)
    order, place = sort_by_expert(experts_TK, R)
    shared = up_lora is not None and up_lora[0].ndim == 2
    thin = _Gather.apply(F.linear(x, up_lora[0]), order, place) if shared else None
    hidden = _adapted_linear(_Gather.apply(x, order, place), up, up_scales, up_lora, scale, counts, thin).relu()
    hidden = (hidden * hidden * weights.flatten()[order].unsqueeze(-1)).to(x.dtype)
    return _Combine.apply(_adapted_linear(hidden, down, down_scales, down_lora, scale, counts, None), order, place)


def _check(pair: Pair | None, weight: Tensor) -> None:
    if pair is None:
        return
    A, B = pair
    E, out, into = weight.shape
    lead = (E,) if A.ndim == 3 else ()
    if A.shape != (*lead, A.shape[-2], into) or B.shape != (*lead, out, A.shape[-2]):
        raise ValueError(f"A {tuple(A.shape)} and B {tuple(B.shape)} do not fit the weight {tuple(weight.shape)}")
