"""The head and its loss in one operator: logits = x W^T exist for a few thousand tokens at a time, never whole.

    loss_t = log sum_v exp(logit_tv) - logit_t,label        d logits = (softmax - onehot) * weight_t

Token weights are known before the forward pass (usually 1 / number of real tokens), so the gradients of both operands are
computed right there, chunk by chunk, and the logits are neither kept nor computed twice.
"""

import torch
from torch import Tensor

from kernels._common import accumulate_dtype

IGNORE = -100  # the label of a token without a loss, as in PyTorch


def linear_cross_entropy_reference(
    x: Tensor, weight: Tensor, labels: Tensor, token_weight: Tensor
) -> tuple[Tensor, Tensor]:
    acc = accumulate_dtype(x)
    logits = (x @ weight.T).to(acc)
    real = labels != IGNORE
    at_label = logits.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    losses = (logits.logsumexp(-1) - at_label).where(real, 0)
    return (losses * token_weight.where(real, 0)).sum(), losses.detach()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, labels: Tensor, token_weight: Tensor, chunk: int
    ) -> tuple[Tensor, Tensor]:
        acc = accumulate_dtype(x)
        need_x, need_w = ctx.needs_input_grad[:2]
        losses = torch.empty(x.shape[0], dtype=acc, device=x.device)
        dx = torch.empty_like(x) if need_x else None
        dw = torch.zeros(weight.shape, dtype=acc, device=x.device) if need_w else None
        for start in range(0, x.shape[0], chunk):
            rows = slice(start, start + chunk)
            logits = (x[rows] @ weight.T).to(acc)
            label = labels[rows].clamp_min(0).unsqueeze(-1)
            real = labels[rows] != IGNORE
            lse = logits.logsumexp(-1, keepdim=True)
            losses[rows] = (lse - logits.gather(-1, label)).squeeze(-1).where(real, 0)
            if need_x or need_w:
                dlogits = logits.sub_(lse).exp_()
                dlogits.scatter_add_(-1, label, torch.full_like(lse, -1.0))
                dlogits = dlogits.mul_(token_weight[rows].where(real, 0).unsqueeze(-1)).to(x.dtype)
                if need_x:
                    dx[rows] = dlogits @ weight
                if need_w:
                    dw += dlogits.T @ x[rows]
        ctx.save_for_backward(dx, dw)
        ctx.weight_dtype = weight.dtype
        total = (losses * token_weight.where(labels != IGNORE, 0)).sum()
        ctx.mark_non_differentiable(losses)
        return total, losses

    @staticmethod
    def backward(ctx, dtotal: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw = ctx.saved_tensors
        dx = None if dx is None else (dx * dtotal).to(dx.dtype)
        dw = None if dw is None else (dw * dtotal).to(ctx.weight_dtype)
        return dx, dw, None, None, None


def linear_cross_entropy(
    x: Tensor, weight: Tensor, labels: Tensor, token_weight: Tensor, chunk: int = 4096
) -> tuple[Tensor, Tensor]:
    """x: (T, D); weight: (V, D); labels: (T,) int64, -100 where there is no loss; token_weight: (T,) fp32, constant.

    Returns (sum over t of token_weight_t * loss_t, differentiable in x and weight; losses (T,), not differentiable), in
    fp32 or float64.  Holds the logits of `chunk` tokens and one fp32 gradient of `weight`.
    Raises ValueError on shapes that do not fit.  Labels beyond V are the caller's to exclude.
    """
    if x.shape[0] != labels.shape[0] or x.shape[-1] != weight.shape[-1] or token_weight.shape != labels.shape:
        raise ValueError(
            f"linear_cross_entropy: x {tuple(x.shape)}, weight {tuple(weight.shape)}, labels {tuple(labels.shape)} and "
            f"token_weight {tuple(token_weight.shape)} do not fit (T, D), (V, D), (T,), (T,)"
        )
    return _LinearCrossEntropy.apply(x, weight, labels, token_weight, chunk)
