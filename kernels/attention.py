"""Causal grouped-query attention: softmax(q k^T / sqrt(d)) v, query head j reading key-value head j // (Hq / Hkv).

Our kernels (`kernels.attention_forward`, `kernels.attention_backward`) never hold the scores, skip keys ahead of the
query and, in packed rows, keys of other documents; for the backward pass they keep q, k, v, the output and one fp32
number a query and head.  PyTorch's scaled_dot_product_attention does the plain causal square as well, through cuDNN
where it can.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels._common import accumulate_dtype, triton, use_triton

if triton is not None:
    from kernels._descriptors import readable
    from kernels.attention_backward import launch_key, launch_query
    from kernels.attention_forward import launch_decode, launch_forward

# What "auto" means for the plain causal square on a CUDA device, the case that cuDNN is made for.  Measured there, see
# benchmarks/kernels_attention.py.  Packed rows, a cache and single queries are always ours: elsewhere they cost a
# dense mask.
AUTO_ON_CUDA = "torch"

TORCH_ORDER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def attention_mask(q_len: int, kv_len: int, seq_idx: Tensor | None, device: torch.device) -> Tensor:
    """True where a query may look, (q_len, kv_len) or (B, 1, S, S): not ahead, and within its own document.

    The queries are the last `q_len` of `kv_len` positions.
    """
    query = torch.arange(kv_len - q_len, kv_len, device=device)
    causal = query[:, None] >= torch.arange(kv_len, device=device)
    if seq_idx is None:
        return causal
    return causal & (seq_idx[:, None, :, None] == seq_idx[:, None, None, :])


def attention_reference(q: Tensor, k: Tensor, v: Tensor, seq_idx: Tensor | None = None) -> Tensor:
    acc = accumulate_dtype(q)
    share = q.shape[2] // k.shape[2]
    q, (k, v) = q.to(acc), (t.to(acc).repeat_interleave(share, dim=2) for t in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    mask = attention_mask(q.shape[1], k.shape[1], seq_idx, q.device)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


def _torch_attention(q: Tensor, k: Tensor, v: Tensor, seq_idx: Tensor | None) -> Tensor:
    if q.numel() == 0:  # PyTorch 2.11's operator divides by zero; no query, no gradient
        return q + 0.0 * (k.sum() + v.sum())
    Sq, Skv = q.shape[1], k.shape[1]
    plain = seq_idx is None and Sq in (1, Skv)  # one query sees all keys; as many queries as keys is the causal square
    mask = None if plain else attention_mask(Sq, Skv, seq_idx, q.device)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    causal = plain and Sq == Skv and Sq > 1
    if q.device.type == "cpu":  # its fast path has no grouped heads
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal).transpose(1, 2)
    with sdpa_kernel(TORCH_ORDER, set_priority=True):
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
        )
    return y.transpose(1, 2)


def document_starts(seq_idx: Tensor) -> Tensor:
    """seq_idx (B, S), non-decreasing -> (B, S) int32, the first position of each token's document."""
    return torch.searchsorted(seq_idx, seq_idx, out_int32=True)


def document_stops(seq_idx: Tensor) -> Tensor:
    """seq_idx (B, S), non-decreasing -> (B, S) int32, one past the last position of each token's document."""
    return torch.searchsorted(seq_idx, seq_idx, out_int32=True, right=True)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, seq_idx: Tensor | None) -> Tensor:
        start = None if seq_idx is None else document_starts(seq_idx)
        o, lse = launch_forward(q, k, v, start)
        ctx.save_for_backward(q, k, v, o, lse, seq_idx, start)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, lse, seq_idx, start = ctx.saved_tensors
        do = readable(do)
        dq, delta = launch_query(q, k, v, o, do, lse, start)
        stop = None if seq_idx is None else document_stops(seq_idx)
        dk, dv = launch_key(q, k, v, do, lse, delta, stop)
        return dq, dk, dv, None


def _chosen(q: Tensor, k: Tensor, v: Tensor, seq_idx: Tensor | None, backend: str) -> str:
    """The backend that runs: "triton" or "torch"."""
    if not use_triton(q, backend):
        return "torch"
    fits = q.dtype == k.dtype == v.dtype and q.dtype in (torch.float32, torch.bfloat16, torch.float16)
    # Tiles are as wide as the next power of two, and the copy engine wants rows in multiples of 16 bytes.
    fits = fits and q.shape[-1] <= 128 and q.shape[-1] * q.element_size() % 16 == 0
    fits = fits and q.numel() > 0
    if not fits:
        return "torch"
    if backend == "auto" and q.is_cuda and seq_idx is None and q.shape[1] == k.shape[1] > 1:
        return AUTO_ON_CUDA
    return "triton"


def _check(q: Tensor, k: Tensor, v: Tensor, seq_idx: Tensor | None) -> None:
    shapes = f"q is {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.ndim == k.ndim == 4 or k.shape != v.shape or q.shape[::3] != k.shape[::3]:
        raise ValueError(f"attention: {shapes}; they do not fit (B, Sq, Hq, d), (B, Skv, Hkv, d), (B, Skv, Hkv, d)")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"attention: {q.shape[2]} query heads are not a multiple of {k.shape[2]} key-value heads")
    if q.shape[1] > k.shape[1]:
        raise ValueError(f"attention: {shapes}; the {q.shape[1]} queries must be the last of at least as many keys")
    if seq_idx is not None and q.shape[1] != k.shape[1]:
        raise ValueError("attention: seq_idx needs as many queries as keys")
    if seq_idx is not None and seq_idx.shape != q.shape[:2]:
        raise ValueError(f"attention: seq_idx is {tuple(seq_idx.shape)}; q {tuple(q.shape)} needs {tuple(q.shape[:2])}")


def attention(q: Tensor, k: Tensor, v: Tensor, seq_idx: Tensor | None = None, backend: str = "auto") -> Tensor:
    """q: (B, Sq, Hq, d); k, v: (B, Skv, Hkv, d); returns (B, Sq, Hq, d) in q's dtype.

    The queries are the last Sq of the Skv positions (cached prefill and decoding have Sq < Skv).  seq_idx: (B, S)
    integers that never decrease along a row, the document of each token of a packed row; it needs Sq == Skv.  Softmax
    in fp32.  Gradients for q, k and v are sums in a fixed order: two runs agree to the bit.
    backend: "triton" is our kernels, "torch" PyTorch's scaled_dot_product_attention (cuDNN first), "auto" the faster
    of the two.  What ours do not cover (d > 128, rows that are no multiple of 16 bytes, float64) runs in PyTorch.
    Raises ValueError on shapes that do not fit, seq_idx with a cache, or an unknown backend.
    """
    _check(q, k, v, seq_idx)
    if _chosen(q, k, v, seq_idx, backend) == "torch":
        return _torch_attention(q, k, v, seq_idx)
    wants_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    if q.shape[1] == 1 and not wants_gradient:
        q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
        return launch_decode(q, k, v)
    q, k, v = map(readable, (q, k, v))
    return _Attention.apply(q, k, v, None if seq_idx is None else seq_idx.contiguous())
