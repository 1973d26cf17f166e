"""The routed experts with LoRA: each matrix W_e of theirs becomes W_e + s B_e A_e, and the update is never formed.

    z_r = up_e x_r + s B_e (A_e x_r),   h_r = w_r relu(z_r)^2,   y_r = down_e h_r + s B'_e (A'_e h_r),   e = expert of r

Rows are in expert order as in `grouped_gemm.py`, so a thin product is a grouped product like the thick one: a group per
expert, r columns.  An adapter that all experts share (A (r, in), B (out, r) without an expert axis) is two plain
products; its A reads each token once, before the rows are gathered.

Gradients come from autograd, which computes none for a frozen weight: what remains of the backward pass of a frozen
base are the two products with its matrices that carry dy to x.

Suffixes: T tokens, K chosen, R rows (one for each choice that is computed here), D width, F expert hidden width, E
experts, r rank.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels._common import use_triton
from kernels.grouped_gemm import _Combine, _Gather, _NoRows, experts, sort_by_expert

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


def _adapted_linear(
    rows: Tensor, base: Tensor, pair: Pair | None, scale: float, counts: Tensor, down: Tensor | None
) -> Tensor:
    """(R, in) -> (R, out).  down: rows A^T, if it is known already."""
    y = grouped_linear(rows, base, counts)
    if pair is None:
        return y
    A, B = pair
    if A.ndim == 2:
        return y.addmm_(F.linear(rows, A) if down is None else down, B.T, alpha=scale)
    thin = grouped_linear(rows, A, counts)
    return y.add_(grouped_linear(thin, B, counts), alpha=scale)


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
) -> Tensor:
    """`grouped_gemm.experts` with adapters (None: without one); all other arguments are its own.

    x: (T, D); weights: (T, K) fp32; experts_TK: (T, K), E for a choice that is computed elsewhere; counts: (E,); up:
    (E, F, D); down: (E, D, F); up_lora, down_lora: (A, B) of shapes (E, r, in), (E, out, r), or one for all experts,
    (r, in), (out, r); scale: factor of B A; rows: how many choices are computed here, None: all -> (T, D).

    Differentiable in x, weights and every matrix that requires a gradient.  Off a GPU it reads `counts` on the host.
    Raises ValueError on an adapter that does not fit its weight, and as `experts` does.
    Source: LoRA, arXiv:2106.09685, eq. 3, for each expert.
    """
    for pair, weight in ((up_lora, up), (down_lora, down)):
        _check(pair, weight)
    if up_lora is None and down_lora is None:
        return experts(x, weights, experts_TK, counts, up, down, backend, rows=rows)
    use_triton(x, backend)  # refuses what cannot be; the products are torch's either way
    E, R = up.shape[0], experts_TK.numel() if rows is None else rows
    if R == 0:
        adapters = [t for pair in (up_lora, down_lora) if pair is not None for t in pair]
        return _NoRows.apply(x, weights, up, down, *adapters)
    if not x.is_cuda and (real := int((experts_TK < E).sum())) != R:
        raise ValueError(f"rows={rows}, but {real} of {experts_TK.numel()} ids are below {E}; pass rows={real}")
    order, place = sort_by_expert(experts_TK, R)
    shared = up_lora is not None and up_lora[0].ndim == 2
    thin = _Gather.apply(F.linear(x, up_lora[0]), order, place) if shared else None
    hidden = _adapted_linear(_Gather.apply(x, order, place), up, up_lora, scale, counts, thin).relu()
    hidden = (hidden * hidden * weights.flatten()[order].unsqueeze(-1)).to(x.dtype)
    return _Combine.apply(_adapted_linear(hidden, down, down_lora, scale, counts, None), order, place)


def _check(pair: Pair | None, weight: Tensor) -> None:
    if pair is None:
        return
    A, B = pair
    E, out, into = weight.shape
    lead = (E,) if A.ndim == 3 else ()
    if A.shape != (*lead, A.shape[-2], into) or B.shape != (*lead, out, A.shape[-2]):
        raise ValueError(f"A {tuple(A.shape)} and B {tuple(B.shape)} do not fit the weight {tuple(weight.shape)}")
