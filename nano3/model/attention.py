"""Grouped-query attention without positions: no rotary embedding, no norm of q and k, no bias.

Order enters by causality, and by the Mamba layers around it.
"""

from __future__ import annotations

from torch import Tensor, nn

from kernels.attention import attention
from nano3.config import ModelConfig
from nano3.model.cache import AttentionState, Rows
from nano3.model.linear import Linear
from nano3.parallel.mesh import ALONE, Mesh
from nano3.parallel.tensor import enter, leave


class Attention(nn.Module):
    """With tensor parallelism a rank has Hq / tp query heads and the KV heads they read; where tp exceeds the number
    of KV heads, tp / Hkv ranks hold the same one and sum its gradient."""

    def __init__(self, c: ModelConfig, mesh: Mesh = ALONE) -> None:
        super().__init__()
        self.tp, self.head_dim, self.backend = mesh.tp, c.head_dim, c.kernels.attention
        q = c.num_attention_heads // self.tp.size * c.head_dim
        kv = max(1, c.num_key_value_heads // self.tp.size) * c.head_dim
        self.q_proj = Linear(c.hidden_size, q)
        self.k_proj = Linear(c.hidden_size, kv)
        self.v_proj = Linear(c.hidden_size, kv)
        self.o_proj = Linear(q, c.hidden_size, ends_block=True)

    def forward(
        self, u: Tensor, rows: Rows, cache: AttentionState | None, whole: bool
    ) -> Tensor:  # (B, S / tp, D) -> (B, S / tp, D)
        u = enter(u, self.tp, whole)
        q, k, v = (p(u).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        if cache is not None:
            k, v = cache.append(k, v)
        return leave(self.o_proj(attention(q, k, v, rows.seq_idx, self.backend).flatten(-2)), self.tp, whole)

    def step(self, u: Tensor, cache: AttentionState) -> Tensor:
        """One token of decoding: (B, D) -> (B, D)."""
        return self(u.unsqueeze(1), Rows(), cache, whole=True).squeeze(1)
