"""Causal grouped-query attention: softmax(q k^T / sqrt(d)) v, query head j reading key-value head j // (Hq / Hkv)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels._common import accumulate_dtype


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


def attention(q: Tensor, k: Tensor, v: Tensor, seq_idx: Tensor | None = None) -> Tensor:
    """q: (B, Sq, Hq, d); k, v: (B, Skv, Hkv, d); returns (B, Sq, Hq, d) in q's dtype.

    The queries are the last Sq of the Skv positions (a cached prefill or a decoding step has Sq < Skv).  seq_idx: (B, S),
    the document of each token of a packed row; it needs Sq == Skv.  Softmax in fp32.  This is PyTorch's own
    scaled_dot_product_attention, which `attention_reference` spells out.
    Raises ValueError if Hq is not a multiple of Hkv, or seq_idx comes with a cache.
    """
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"attention: {q.shape[2]} query heads are not a multiple of {k.shape[2]} key-value heads")
    if seq_idx is not None and q.shape[1] != k.shape[1]:
        raise ValueError("attention: seq_idx needs as many queries as keys")
    Sq, Skv = q.shape[1], k.shape[1]
    plain = seq_idx is None and Sq in (1, Skv)  # one query sees all keys; as many queries as keys is the causal square
    mask = None if plain else attention_mask(Sq, Skv, seq_idx, q.device)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if q.device.type == "cpu":  # its fast path has no grouped heads
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    causal = plain and Sq == Skv and Sq > 1
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
    return y.transpose(1, 2)
