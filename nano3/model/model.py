"""Nemotron 3 Nano: an embedding, one residual block per letter of the pattern, a norm and an untied head.

Parameter names are those of the released checkpoint inside `backbone.` (experts as transformers fuses them), so a
checkpoint's name is the path of an attribute here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nano3.config import KINDS, ModelConfig
from nano3.model.attention import Attention
from nano3.model.cache import LayerState
from nano3.model.mamba import Mamba
from nano3.model.moe import MLP, Balance, MoE
from nano3.model.norm import RMSNorm

MIXERS = {
    "M": Mamba,
    "E": MoE,
    "*": Attention,
    "-": lambda c: MLP(c.hidden_size, c.intermediate_size),
}


class Block(nn.Module):
    """x + mixer(norm(x)).  One mixer per block; there is no separate MLP sub-layer."""

    def __init__(self, c: ModelConfig, letter: str) -> None:
        super().__init__()
        self.kind = KINDS[letter]
        self.norm = RMSNorm(c.hidden_size, c.layer_norm_epsilon, c.kernels.rms_norm)
        self.mixer = MIXERS[letter](c)

    def forward(self, x: Tensor, seq_idx: Tensor | None, cache: LayerState = None) -> tuple[Tensor, Balance | None]:
        y = self.mixer(self.norm(x), seq_idx, cache)
        y, balance = y if isinstance(y, tuple) else (y, None)
        return x + y, balance

    def step(self, x: Tensor, cache: LayerState) -> Tensor:  # (B, D) -> (B, D)
        return x + self.mixer.step(self.norm(x), cache)


class Output(NamedTuple):
    hidden: Tensor  # (B, S, D), after the last norm
    balance: list[Balance]  # one per mixture layer, empty in eval mode


class Nano3(nn.Module):
    """recompute: kinds of block whose activations are computed again in the backward pass instead of being kept."""

    def __init__(self, c: ModelConfig, recompute: frozenset[str] = frozenset()) -> None:
        super().__init__()
        self.config, self.recompute = c, recompute
        self.embeddings = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c, letter) for letter in c.hybrid_override_pattern)
        self.norm_f = RMSNorm(c.hidden_size, c.layer_norm_epsilon, c.kernels.rms_norm)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)

    def forward(self, tokens: Tensor, seq_idx: Tensor | None = None, cache: list[LayerState] | None = None) -> Output:
        """tokens: (B, S) ids; seq_idx: (B, S), the document of each token of a packed row, non-decreasing.

        With a cache the row continues what the cache has seen, and the cache moves on by S tokens.
        """
        if cache is not None and seq_idx is not None:
            raise ValueError("a cached row holds one document: pass either cache or seq_idx")
        x = self.embeddings(tokens)
        balance = []
        for i, block in enumerate(self.layers):
            if self.training and block.kind in self.recompute:
                x, report = checkpoint(block, x, seq_idx, use_reentrant=False)
            else:
                x, report = block(x, seq_idx, None if cache is None else cache[i])
            if report is not None:
                balance.append(report)
        return Output(self.norm_f(x), balance)

    def step(self, tokens: Tensor, cache: list[LayerState]) -> Tensor:
        """One token of decoding per sequence: (B,) ids -> (B, V) logits in fp32.  Moves the cache on by one token."""
        x = self.embeddings(tokens)
        for block, state in zip(self.layers, cache, strict=True):
            x = block.step(x, state)
        return self.logits(self.norm_f(x))

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V), in fp32 (float64 for float64).  Training never calls this: its loss works in chunks."""
        y = self.lm_head(hidden)
        return y.to(torch.promote_types(y.dtype, torch.float32))

    @property
    def routers(self) -> list[nn.Module]:
        """The routers in the order of Output.balance."""
        return [block.mixer.gate for block in self.layers if block.kind == "moe"]
