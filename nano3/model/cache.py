"""What a sequence leaves behind for the tokens to come.

A Mamba-2 layer keeps its last `conv_kernel` inputs of the convolution and its state, whatever the length; an attention
layer keeps keys and values, which grow; the other kinds keep nothing.  SSM states are fp32 in every mode.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nano3.config import ModelConfig
from nano3.parallel.mesh import Axis


@dataclass
class MambaState:
    window: Tensor  # (B, W, conv_dim): x, B, C before the convolution, newest last, zeros before the start
    state: Tensor  # (B, H, P, N)


@dataclass
class AttentionState:
    keys: Tensor  # (B, capacity, Hkv, head_dim)
    values: Tensor
    length: int = 0  # tokens held

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, S, Hkv, d) behind what is there; returns all keys and values so far, as views."""
        end = self.length + k.shape[1]
        if end > self.keys.shape[1]:
            raise ValueError(
                f"the cache holds {self.keys.shape[1]} tokens and was asked to hold {end}; create it longer"
            )
        self.keys[:, self.length : end], self.values[:, self.length : end] = k, v
        self.length = end
        return self.keys[:, :end], self.values[:, :end]


LayerState = MambaState | AttentionState | None


class Rows(NamedTuple):
    """What is known of a micro-batch's tokens besides their ids; None: one document a row, and no padding."""

    seq_idx: Tensor | None = None  # (B, S), the document of each token
    real: Tensor | None = None  # (B, S / tp) bool, False for padding
    document: Tensor | None = None  # (B, S / tp), seq_idx counted on from row to row: 0, 1, 2, … through all of them


def rows_of(seq_idx: Tensor | None, real: Tensor | None, tp: Axis) -> Rows:
    """Rows from what is known of whole rows, (B, S) each."""
    mine = (lambda x: x.chunk(tp.size, dim=1)[tp.rank]) if tp.size > 1 else (lambda x: x)
    if seq_idx is None:
        return Rows(None, None if real is None else mine(real))
    begins = torch.ones_like(seq_idx, dtype=torch.bool)
    begins[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    document = begins.flatten().cumsum(0).view_as(seq_idx) - 1
    return Rows(seq_idx, None if real is None else mine(real), mine(document))


def create_cache(
    c: ModelConfig, batch: int, capacity: int, dtype: torch.dtype, device: torch.device, tp: int = 1
) -> list[LayerState]:
    """One entry per layer, for `batch` sequences of at most `capacity` tokens; the heads of one of `tp` ranks."""
    cache: list[LayerState] = []
    for letter in c.hybrid_override_pattern:
        if letter == "M":
            window = torch.zeros(batch, c.conv_kernel, c.conv_dim // tp, dtype=dtype, device=device)
            shape = (batch, c.mamba_num_heads // tp, c.mamba_head_dim, c.ssm_state_size)
            state = torch.zeros(shape, dtype=torch.promote_types(dtype, torch.float32), device=device)
            cache.append(MambaState(window, state))
        elif letter == "*":
            shape = (batch, capacity, max(1, c.num_key_value_heads // tp), c.head_dim)
            cache.append(AttentionState(*(torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))))
        else:
            cache.append(None)
    return cache
