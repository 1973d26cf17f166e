"""Grouped-query attention without positions: no rotary embedding, no norm of q and k, no bias.

Order enters by causality, and by the Mamba layers around it.
"""

from __future__ import annotations

from torch import Tensor, nn

from kernels.attention import attention
from nano3.config import ModelConfig
from nano3.model.cache import AttentionState


class Attention(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.head_dim, self.backend = c.head_dim, c.kernels.attention
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)

    def forward(
        self, u: Tensor, seq_idx: Tensor | None, cache: AttentionState | None
    ) -> Tensor:  # (B, S, D) -> (B, S, D)
        q, k, v = (p(u).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        if cache is not None:
            k, v = cache.append(k, v)
        return self.o_proj(attention(q, k, v, seq_idx, self.backend).flatten(-2))

    def step(self, u: Tensor, cache: AttentionState) -> Tensor:
        """One token of decoding: (B, D) -> (B, D)."""
        return self(u.unsqueeze(1), None, cache).squeeze(1)
