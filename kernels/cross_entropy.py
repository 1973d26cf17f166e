"""The head and its loss in one operator: logits = x W^T exist for a few thousand tokens at a time, never whole.

    loss_t = log sum_v exp(logit_tv) - logit_t,label        d logits = (softmax - onehot) * weight_t

Token weights are known before the forward pass (usually 1 / number of real tokens), so the gradients of both operands
are computed right there, chunk by chunk, and the logits are neither kept nor computed twice.  The three products of a
chunk are cuBLAS's; in between one kernel turns the logits into their gradient in place
(`kernels.cross_entropy_softmax`).  At T = 8192, V = 131072, D = 2688 in bf16 this holds 1.2 GiB: one chunk of logits
(0.5), the gradient of the weight (0.66) and of x.

A vocabulary split over ranks: each rank calls with its rows of the weight, their `vocab_offset`, and a `gather` that
collects the ranks' statistics, three numbers a token; the gradient of x is then this rank's summand.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels._common import accumulate_dtype, triton, use_triton
from kernels.gradient_sink import Buffer, GradientSink, add_product_

if triton is not None:
    from kernels.cross_entropy_product import multipliable, multiply_
    from kernels.cross_entropy_softmax import logits_gradient_, logits_loss_gradient_, logits_statistics, scale_

IGNORE = -100  # the label of a token without a loss, as in PyTorch
CHUNK = 2048  # tokens whose logits exist at a time

# What the chunks' products are added up in when the caller gives no buffer.  False: the weight's dtype, one rounding
# a chunk (4 at T = 8192) and no memory beyond the gradient itself.  True: fp32, twice the memory and twice the traffic.
FP32_WEIGHT_GRADIENT = False

# Which of the three products run in `kernels.cross_entropy_product` rather than in cuBLAS, by measurement on an H100
# (benchmarks/kernels_head.py --sweep): any of "logits", "dx", "dw".
OWN_PRODUCTS: frozenset[str] = frozenset({"dx"})


def linear_cross_entropy_reference(
    x: Tensor, weight: Tensor, labels: Tensor, token_weight: Tensor
) -> tuple[Tensor, Tensor]:
    acc = accumulate_dtype(x)
    logits = (x @ weight.T).to(acc)
    real = labels != IGNORE
    at_label = logits.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    losses = (logits.logsumexp(-1) - at_label).where(real, 0)
    return (losses * token_weight.where(real, 0)).sum(), losses.detach()


def _check_logits(what: str, logits: Tensor, **vectors: Tensor) -> None:
    for name, t in vectors.items():
        if logits.ndim != 2 or t.shape != logits.shape[:1]:
            raise ValueError(
                f"{what}: logits {tuple(logits.shape)} and {name} {tuple(t.shape)} do not fit (T, V) and (T,)"
            )


def vocabulary_statistics(logits: Tensor, labels: Tensor, vocab_offset: int = 0, backend: str = "auto") -> Tensor:
    """What one slice of the vocabulary contributes to the loss of each token.

    logits: (T, V), columns vocab_offset .. vocab_offset + V of the whole vocabulary.  labels: (T,), in the whole
    vocabulary.
    Returns (3, T), fp32 or float64: m = max of the slice, s = sum of exp(logit - m), and the logit at the label, 0 if
    the label lies in another slice.  `combine_statistics` makes one loss of the slices' results.  Raises ValueError on
    shapes that do not fit.
    """
    _check_logits("vocabulary_statistics", logits, labels=labels)
    if use_triton(logits, backend):
        return logits_statistics(logits.contiguous(), labels.contiguous(), vocab_offset)
    logits = logits.to(accumulate_dtype(logits))
    local = labels - vocab_offset
    mine = (local >= 0) & (local < logits.shape[1])
    top = logits.amax(-1)
    at_label = logits.gather(-1, local.where(mine, 0).unsqueeze(-1)).squeeze(-1).where(mine, 0)
    return torch.stack([top, (logits - top.unsqueeze(-1)).exp().sum(-1), at_label])


def combine_statistics(parts: Tensor) -> tuple[Tensor, Tensor]:
    """parts: (R, 3, T), the statistics of R slices, in order.  Returns log sum exp and the logit at the label, (T,)."""
    top, total, at_label = parts.unbind(1)
    highest = top.amax(0)
    return highest + (total * (top - highest).exp()).sum(0).log(), at_label.sum(0)


def vocabulary_gradient(
    logits: Tensor, lse: Tensor, labels: Tensor, token_weight: Tensor, vocab_offset: int = 0, backend: str = "auto"
) -> Tensor:
    """(softmax - onehot) * token_weight for one slice of the vocabulary, in the logits' dtype; overwrites the logits.

    logits, labels, vocab_offset: as in `vocabulary_statistics`.  lse: (T,), log sum exp over the whole vocabulary.
    Raises ValueError on shapes that do not fit.
    """
    _check_logits("vocabulary_gradient", logits, lse=lse, labels=labels, token_weight=token_weight)
    if use_triton(logits, backend) and logits.is_contiguous():
        vectors = lse.contiguous(), labels.contiguous(), token_weight.contiguous()
        return logits_gradient_(logits, *vectors, vocab_offset, IGNORE)
    local = labels - vocab_offset
    mine = (local >= 0) & (local < logits.shape[1])
    p = logits.to(lse.dtype).sub_(lse.unsqueeze(-1)).exp_()
    p.scatter_add_(-1, local.where(mine, 0).unsqueeze(-1), -mine.unsqueeze(-1).to(p.dtype))
    return logits.copy_(p.mul_(token_weight.where(labels != IGNORE, 0).unsqueeze(-1)))


def _own(name: str, *operands: Tensor) -> bool:
    """Whether the product runs in our kernel: chosen, and on a GPU whose shared memory holds its tiles."""
    able = name in OWN_PRODUCTS and operands[0].is_cuda and multipliable(*operands)
    return able and torch.cuda.get_device_capability(operands[0].device) in ((9, 0), (10, 0))


def _add_product_(sums: Tensor, a: Tensor, b: Tensor, holds: bool) -> None:
    """sums += a^T b, or sums = a^T b if they hold nothing."""
    if sums.dtype == a.dtype and _own("dw", sums, a, b):
        multiply_(sums, a, b, a_t=True, add=holds)
    else:
        add_product_(sums, a, b, holds)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        labels: Tensor,
        token_weight: Tensor,
        chunk: int,
        sink: GradientSink | None,
        vocab_offset: int,
        gather: Callable[[Tensor], Tensor] | None,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        T, V = x.shape[0], weight.shape[0]
        acc = accumulate_dtype(x)
        need_x, need_w = ctx.needs_input_grad[:2]
        kernels = use_triton(x, backend)
        whole = kernels and (need_x or need_w) and gather is None and vocab_offset == 0
        losses = torch.empty(T, dtype=acc, device=x.device)
        dx = torch.empty_like(x) if need_x else None
        dw, holds = None, False
        if need_w and sink is not None:
            dw, holds = sink.open()
        elif need_w:
            narrow = kernels and not FP32_WEIGHT_GRADIENT
            dw = torch.empty(weight.shape, dtype=weight.dtype if narrow else acc, device=x.device)
        chunks = max(1, -(-T // chunk))
        step = max(1, -(-T // chunks))  # chunks of one size: no short one at the end with tiles half empty
        space = torch.empty(min(step, T), V, dtype=x.dtype, device=x.device)
        for start in range(0, T, step):
            rows = slice(start, start + step)
            logits = space[: x[rows].shape[0]]
            if _own("logits", logits, x[rows], weight):
                multiply_(logits, x[rows], weight, b_t=True)
            else:
                torch.mm(x[rows], weight.T, out=logits)
            real = labels[rows] != IGNORE
            if whole:
                logits_loss_gradient_(logits, labels[rows], token_weight[rows], losses[rows], IGNORE)
            else:
                stats = vocabulary_statistics(logits, labels[rows], vocab_offset, backend)
                lse, at_label = combine_statistics(stats.unsqueeze(0) if gather is None else gather(stats))
                losses[rows] = (lse - at_label).where(real, 0)
                if need_x or need_w:
                    vocabulary_gradient(logits, lse, labels[rows], token_weight[rows], vocab_offset, backend)
            if need_x and _own("dx", dx[rows], logits, weight):
                multiply_(dx[rows], logits, weight)
            elif need_x:
                torch.mm(logits, weight, out=dx[rows])
            if need_w:
                _add_product_(dw, logits, x[rows], holds)
                holds = True
        if need_w and not holds:  # no tokens
            dw.zero_()
        # Plain attributes: autograd takes a gradient over without a copy only if nothing else holds it, which
        # save_for_backward would.
        ctx.dx, ctx.dw = dx, dw if sink is None else None
        ctx.sink = sink if need_w else None
        ctx.weight_dtype, ctx.kernels, ctx.used = weight.dtype, kernels, False
        total = (losses * token_weight.where(labels != IGNORE, 0)).sum()
        ctx.mark_non_differentiable(losses)
        return total, losses

    @staticmethod
    @once_differentiable
    def backward(ctx, dtotal: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw = ctx.dx, ctx.dw
        if ctx.sink is not None:
            ctx.sink.close()
        if not ctx.kernels:
            dx = None if dx is None else (dx * dtotal).to(dx.dtype)
            dw = None if dw is None else (dw * dtotal).to(ctx.weight_dtype)
        else:
            if ctx.used:
                raise RuntimeError("linear_cross_entropy: its gradients were handed out without a copy; call it again")
            ctx.dx, ctx.dw, ctx.used = None, None, True
            dx = None if dx is None else scale_(dx, dtotal)
            dw = None if dw is None else scale_(dw, dtotal).to(ctx.weight_dtype)
        return dx, dw, None, None, None, None, None, None, None


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weight: Tensor,
    chunk: int = CHUNK,
    weight_grad: Tensor | GradientSink | None = None,
    vocab_offset: int = 0,
    gather: Callable[[Tensor], Tensor] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """x: (T, D); weight: (V, D); labels: (T,) int64, -100 where there is no loss; token_weight: (T,) fp32, constant.

    Returns (sum over t of token_weight_t * loss_t, differentiable in x and weight; losses (T,), not differentiable), in
    fp32 or float64.  Holds the logits of at most `chunk` tokens and one gradient of `weight`.  The backward pass of
    the kernels may run once: the gradients were computed on the way forward and are handed out without a copy.
    weight_grad: (V, D), fp32 or the weight's dtype, or what gives such a buffer (`gradient_sink.py`).  If given, the
    gradient of `weight` is added into it during this call and autograd returns none, so the result must be
    differentiated, and with an upstream gradient of 1: put factors into token_weight.  A sink is closed in the backward
    pass, which is when those who wait for gradients may count on it.
    A vocabulary split over ranks: weight holds rows vocab_offset .. vocab_offset + V, and gather turns the statistics
    (3, n) of this rank into those of all, (R, 3, n), the same on every rank (`vocabulary_statistics`).  Loss and
    losses are then the whole vocabulary's on every rank; the gradient of x is its part, for the caller to add up.
    backend: "auto", "triton" or "torch".
    Raises ValueError on shapes that do not fit.  Labels beyond V are the caller's to exclude.
    """
    fits = x.ndim == weight.ndim == 2 and x.shape[1] == weight.shape[1] and labels.shape == x.shape[:1]
    if not fits or token_weight.shape != labels.shape:
        raise ValueError(
            f"linear_cross_entropy: x {tuple(x.shape)}, weight {tuple(weight.shape)}, labels {tuple(labels.shape)} and "
            f"token_weight {tuple(token_weight.shape)} do not fit (T, D), (V, D), (T,), (T,)"
        )
    if chunk < 1:
        raise ValueError(f"linear_cross_entropy: chunk={chunk} tokens at a time; it must be at least 1")
    if isinstance(weight_grad, Tensor) and weight_grad.shape != weight.shape:
        raise ValueError(
            f"linear_cross_entropy: weight_grad {tuple(weight_grad.shape)} is not like weight {tuple(weight.shape)}"
        )
    if not torch.is_grad_enabled():  # a Function is told of requires_grad even then, and would compute for nothing
        x, weight = x.detach(), weight.detach()
    sink = Buffer(weight_grad) if isinstance(weight_grad, Tensor) else weight_grad
    return _LinearCrossEntropy.apply(
        x, weight, labels.contiguous(), token_weight.contiguous(), chunk, sink, vocab_offset, gather, backend
    )
