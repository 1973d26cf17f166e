"""The routed experts: y_t = sum_k w_tk * down_e relu(up_e x_t)^2,  e = experts_tk.

Rows are ordered by expert, each expert multiplies its slice, and each token gathers its K results back: no capacity, no
dropped token, no atomics, so equal inputs give equal bits.  On a GPU the order is only ever a table of integers
(permute.py), and nothing is asked of the host.  The products read the rows of x where they lie, or a copy in expert
order, whichever is faster (grouped_gemm_configs.py): a copy costs one pass over memory, but TMA can read it.

The kernels save one tensor, hs = w relu(z)^2 with z = up_e x: it is what the down projection reads, what its weight
gradient reads, and it contains relu(z) = sqrt(hs / w).  So a row costs F elements instead of the 2 F of z and its
square (and the 2 D of its gathered input and output).  Gathering inside the products and forming dw in the epilogue of
dH are SonicMoE's ideas (arXiv:2512.14080); the square root is possible because relu^2 can be inverted.

A choice may be absent: its expert is computed by another rank.  It has no row, adds nothing to its token, and its
routing weight gets gradient 0.

Suffixes: T tokens, K chosen, R rows (T * K, or the real ones among them), D width, F expert hidden width, E experts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels._common import accumulate_dtype, result_is_known, triton, use_triton
from kernels.gradient_sink import Buffer, GradientSink, divert

if triton is not None:
    from kernels.grouped_gemm_configs import aligned, choose_configs
    from kernels.grouped_gemm_rows import (
        down_rows,
        down_rows_backward,
        routing_weight_gradients,
        up_rows,
        up_rows_backward,
    )
    from kernels.grouped_gemm_weights import weight_gradient
    from kernels.permute import Tiles, copy_rows, plan_rows, sum_rows, tiles_from_counts, zero_tail


def experts_reference(x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, up_EFD: Tensor, down_EDF: Tensor) -> Tensor:
    """The formula: every expert on every token, weighted by zero where it was not chosen."""
    dense_TE = weights_TK.new_zeros(x_TD.shape[0], up_EFD.shape[0]).scatter_add(-1, experts_TK, weights_TK)
    hidden = torch.einsum("td,efd->tef", x_TD, up_EFD).relu().square() * dense_TE.unsqueeze(-1).to(x_TD.dtype)
    return torch.einsum("tef,edf->td", hidden, down_EDF)


class _Gather(torch.autograd.Function):
    """Rows of x in expert order.  Backward: each token sums the gradients of its rows, in a fixed order."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, order_R: Tensor, place_TK: Tensor) -> Tensor:
        ctx.save_for_backward(place_TK)
        return x_TD.index_select(0, order_R // place_TK.shape[1])

    @staticmethod
    def backward(ctx, drows_RD: Tensor) -> tuple[Tensor, None, None]:
        (place_TK,) = ctx.saved_tensors
        return _sum_rows(drows_RD, place_TK), None, None


class _Combine(torch.autograd.Function):
    """The conjugate of _Gather: each token sums its rows; backward hands its gradient to each of them."""

    @staticmethod
    def forward(ctx, rows_RD: Tensor, order_R: Tensor, place_TK: Tensor) -> Tensor:
        ctx.save_for_backward(order_R)
        ctx.top_k = place_TK.shape[1]
        return _sum_rows(rows_RD, place_TK)

    @staticmethod
    def backward(ctx, dy_TD: Tensor) -> tuple[Tensor, None, None]:
        (order_R,) = ctx.saved_tensors
        return dy_TD.index_select(0, order_R // ctx.top_k), None, None


def _sum_rows(rows_RD: Tensor, place_TK: Tensor) -> Tensor:
    R = rows_RD.shape[0]
    gathered = rows_RD.index_select(0, place_TK.flatten().clamp(max=R - 1)).unflatten(0, place_TK.shape)
    if place_TK.numel() > R:  # absent choices: their places are past the last row
        gathered.masked_fill_((place_TK >= R).unsqueeze(-1), 0.0)
    return gathered.sum(1, dtype=accumulate_dtype(rows_RD)).to(rows_RD.dtype)


def sort_by_expert(experts_TK: Tensor, rows: int | None = None) -> tuple[Tensor, Tensor]:
    """order (R,): the flat (token, choice) index of each row in expert order, stable; place (T, K): its inverse.

    rows: R, the number of choices that are not absent (None: all T * K).  Absent ones have the largest id, so they
    come last: their places are R and above.
    """
    order = experts_TK.flatten().argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=order.device)
    return order[:rows], place.view_as(experts_TK)


def _mlp_torch(rows_RD: Tensor, weights_R: Tensor, counts_E: Tensor, up_EFD: Tensor, down_EDF: Tensor) -> Tensor:
    """Each expert on its slice of the rows; rows past the last expert's give zeros.  Reads `counts` on the host."""
    sizes = counts_E.tolist()
    rest = rows_RD.shape[0] - sum(sizes)
    scale = weights_R.unsqueeze(-1)
    out = []
    for xe, we, up_e, down_e in zip(
        rows_RD.split([*sizes, rest])[:-1],
        scale.split([*sizes, rest])[:-1],
        up_EFD.unbind(0),
        down_EDF.unbind(0),
        strict=True,
    ):
        hidden = F.linear(xe, up_e).relu()
        out.append(F.linear((hidden * hidden * we).to(rows_RD.dtype), down_e))
    return torch.cat([*out, rows_RD.new_zeros(rest, down_EDF.shape[1])])


def _find_rows(x: Tensor, order: Tensor | None, place: Tensor | None, copy: bool) -> tuple[Tensor, Tensor | None, int]:
    """x, order and K as a product takes them: rows in place have no order and K = 0."""
    if place is None:
        return x, None, 0
    if copy:
        return copy_rows(x, place, order.numel()), None, 0
    return x, order, place.shape[1]


class _Experts(torch.autograd.Function):
    """The whole block.  order and place None: x is rows in expert order, one weight each, and so is the result."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,  # (T, D), or (R, D)
        weights: Tensor,  # (T, K), or (R,)
        up: Tensor,
        down: Tensor,
        order: Tensor | None,
        place: Tensor | None,
        tiles: "Tiles",
        sinks: tuple[GradientSink | None, GradientSink | None],
    ) -> Tensor:
        configs = choose_configs(x, up, down)
        weights_R = weights.flatten() if order is None else weights.flatten().index_select(0, order)
        x_rows, *where = _find_rows(x, order, place, configs["up"].copy)
        hs = up_rows(x_rows, weights_R, up, tiles, *where, configs["up"])  # (R, F)
        del x_rows  # before the next buffer of its size
        if place is None:
            zero_tail(hs, tiles, tiles.block)
        ctx.save_for_backward(x, weights, weights_R, up, down, order, place, hs, *tiles[:3])
        ctx.block, ctx.configs, ctx.sinks = tiles.block, configs, sinks
        if result_is_known():
            return torch.empty_like(x)
        rows = down_rows(hs, down, tiles, configs["down"])  # (R, D)
        if place is None:
            zero_tail(rows, tiles)
        return rows if place is None else sum_rows(rows, place)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, weights_R, up, down, order, place, hs, *tables = ctx.saved_tensors
        tiles = Tiles(*tables, ctx.block)
        need_x, need_weights, need_up, need_down = ctx.needs_input_grad[:4]
        (up_sink, down_sink), configs = ctx.sinks, ctx.configs
        dx = dweights = dup = ddown = None
        dy = dy.contiguous()
        found = {copy: _find_rows(dy, order, place, copy) for copy in {configs["ddown"].copy, configs["dH"].copy}}
        if need_down:
            dy_rows, *where = found[configs["ddown"].copy]
            ddown = weight_gradient(dy_rows, hs, tiles, *where, True, configs["ddown"], down_sink)
        if need_x or need_weights or need_up:
            dy_rows, *where = found[configs["dH"].copy]
            dz, part = down_rows_backward(dy_rows, weights_R, hs, down, tiles, *where, configs["dH"])
            dweights = routing_weight_gradients(part, weights, place, tiles)
            del dy_rows, found
            if place is None:
                zero_tail(dz, tiles, tiles.block)
            if need_x:
                dx = up_rows_backward(dz, up, tiles, configs["dX"])
                if place is None:
                    zero_tail(dx, tiles)
                else:
                    dx = sum_rows(dx, place)
            if need_up:
                x_rows, *where = _find_rows(x, order, place, configs["dup"].copy)
                dup = weight_gradient(x_rows, dz, tiles, *where, False, configs["dup"], up_sink)
        return dx, dweights if need_weights else None, dup, ddown, *(None,) * 4


class _NoRows(torch.autograd.Function):
    """What is left of the block when none of its choices is computed here: zeros, and gradients of zero.

    Gradients of zero rather than none, because a rank of a data-parallel group has to reduce what the others reduce.
    """

    @staticmethod
    def forward(ctx, x: Tensor, *others: Tensor) -> Tensor:  # x (T, D), then weights, up, down
        ctx.save_for_backward(x, *others)
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        needed = zip(ctx.saved_tensors, ctx.needs_input_grad, strict=True)
        return tuple(torch.zeros_like(t) if need else None for t, need in needed)


def check_choices(what: str, x: Tensor, weights: Tensor, experts_TK: Tensor, counts: Tensor | None, up: Tensor) -> None:
    """Shapes only: a look at the ids would keep the host waiting.  The kernels do without counts."""
    fits = experts_TK.ndim == 2 and weights.shape == experts_TK.shape and len(experts_TK) == len(x)
    if not fits or (counts is not None and counts.shape != up.shape[:1]):
        raise ValueError(
            f"{what}: x {tuple(x.shape)}, weights {tuple(weights.shape)}, experts_TK {tuple(experts_TK.shape)}, counts "
            f"{None if counts is None else tuple(counts.shape)} and up {tuple(up.shape)} do not fit (T, D), (T, K), "
            "(T, K), (E,), (E, F, D)"
        )


def _check(x: Tensor, up: Tensor, down: Tensor, *sinks: Tensor | GradientSink | None) -> list[GradientSink | None]:
    if up.ndim != 3:
        raise ValueError(f"up {tuple(up.shape)} does not fit; give (E, F, D)")
    E, F_, D = up.shape
    if x.ndim != 2 or x.shape[1] != D or down.shape != (E, D, F_):
        raise ValueError(f"x {tuple(x.shape)}, up {tuple(up.shape)} and down {tuple(down.shape)} do not fit together")
    for sink, weight in zip(sinks, (up, down), strict=True):
        if isinstance(sink, Tensor) and (sink.shape != weight.shape or not sink.is_contiguous()):
            raise ValueError(f"a gradient buffer must be contiguous and of shape {tuple(weight.shape)}")
    return [Buffer(sink) if isinstance(sink, Tensor) else sink for sink in sinks]


def _on_triton(x: Tensor, up: Tensor, down: Tensor, rows: int, backend: str) -> bool:
    """The kernels want one dtype for all operands and at least one row; otherwise PyTorch goes by its own rules."""
    return use_triton(x, backend) and x.dtype == up.dtype == down.dtype and rows > 0


def experts(
    x: Tensor,
    weights: Tensor,
    experts_TK: Tensor,
    counts: Tensor,
    up: Tensor,
    down: Tensor,
    backend: str = "auto",
    *,
    rows: int | None = None,
    up_grad: Tensor | GradientSink | None = None,
    down_grad: Tensor | GradientSink | None = None,
) -> Tensor:
    """x: (T, D); weights: (T, K) fp32; experts_TK: (T, K); counts: (E,); up: (E, F, D); down: (E, D, F) -> (T, D).

    experts_TK: ids 0 .. E - 1 of the experts given here, or E for a choice that is computed elsewhere (expert
    parallelism): it adds nothing, and its weight, which may hold anything, gets gradient 0.  rows: how many choices are
    not elsewhere; None: all T * K.  Buffers are allocated for that many rows.  counts: those choices per expert.

    Experts without rows cost nothing and get a zero gradient.  The routing weight multiplies the activation, before the
    down projection, as Megatron does; the K rows of a token are summed in fp32.

    up_grad, down_grad: contiguous buffers of the weights' shape, fp32 or the weights' dtype, to which backward adds the
    weight gradients, or what gives one then (`gradient_sink.py`); autograd gets none for that weight.

    The kernels find the counts themselves and read nothing on the host, so `rows` must be right: they cannot check it
    and would read and write elsewhere.  The PyTorch path reads `counts` there, and raises ValueError where `rows` is
    not the number of ids below E.  The kernels give a routing weight of exactly 0 the gradient 0, since hs = 0 no
    longer has the activation (a sigmoid that underflows to 0 has derivative 0 anyway).
    """
    sinks = _check(x, up, down, up_grad, down_grad)
    check_choices("experts", x, weights, experts_TK, counts, up)
    E = up.shape[0]
    R = experts_TK.numel() if rows is None else rows
    if not 0 <= R <= experts_TK.numel():
        raise ValueError(f"rows={rows} does not fit {experts_TK.numel()} choices; count the ids below {E}")
    if _on_triton(x, up, down, R, backend):
        x, weights, up, down = _readable(x), weights.contiguous(), up.contiguous(), down.contiguous()
        order, place, tiles = plan_rows(experts_TK, E, choose_configs(x, up, down)["up"].block_m, R)
        return _Experts.apply(x, weights, up, down, order, place, tiles, sinks)
    on_host = R > 0 or not x.is_cuda  # a GPU without rows has no other reason to be waited for
    if on_host and (real := int((experts_TK < E).sum())) != R:
        raise ValueError(f"rows={rows}, but {real} of {experts_TK.numel()} ids are below {E}; pass rows={real}")
    up, down = map(divert, (up, down), sinks)
    if R == 0:
        return _NoRows.apply(x, weights, up, down)
    order, place = sort_by_expert(experts_TK, R)
    rows_RD = _Gather.apply(x, order, place)
    return _Combine.apply(_mlp_torch(rows_RD, weights.flatten()[order], counts, up, down), order, place)


def grouped_mlp(
    rows: Tensor,
    row_weights: Tensor,
    counts: Tensor,
    up: Tensor,
    down: Tensor,
    backend: str = "auto",
    *,
    up_grad: Tensor | GradientSink | None = None,
    down_grad: Tensor | GradientSink | None = None,
) -> Tensor:
    """The experts on rows that are in expert order already: what a rank computes after tokens were dispatched to it.

    rows: (R, D), those of expert 0 first; row_weights: (R,) fp32; counts: (E,) on the device, summing to at most R.
    Rows beyond that sum may hold anything: their results and gradients are zero.  Returns (R, D), not yet summed over
    a token's K rows.  Gradient buffers, and what is read on the host, are as for `experts`.
    """
    sinks = _check(rows, up, down, up_grad, down_grad)
    if row_weights.shape != rows.shape[:1] or counts.shape != up.shape[:1]:
        raise ValueError(
            f"grouped_mlp: rows {tuple(rows.shape)}, row_weights {tuple(row_weights.shape)}, counts "
            f"{tuple(counts.shape)} and up {tuple(up.shape)} do not fit (R, D), (R,), (E,), (E, F, D)"
        )
    if _on_triton(rows, up, down, rows.shape[0], backend):
        rows, row_weights, up, down = _readable(rows), row_weights.contiguous(), up.contiguous(), down.contiguous()
        tiles = tiles_from_counts(counts, rows.shape[0], choose_configs(rows, up, down)["up"].block_m)
        return _Experts.apply(rows, row_weights, up, down, None, None, tiles, sinks)
    up, down = map(divert, (up, down), sinks)
    return _mlp_torch(rows, row_weights, counts, up, down)


def _readable(x: Tensor) -> Tensor:
    """x itself if its rows can be read in place by 16-byte copies; one copy is cheaper than reading them otherwise."""
    return x if x.stride(-1) == 1 and aligned(x) else x.contiguous()
